"""What the scripts in ``training_scripts/`` share: their command lines, reading data, making a loss, and the run."""
