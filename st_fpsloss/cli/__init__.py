"""The command line: reading data, making models and losses, and the runs."""
