"""The runs behind the tables in ``results/``; each starts with ``python -m training_scripts.studies.NAME``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts one folder up import each other by their bare names
