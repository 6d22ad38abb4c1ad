"""Two-tower retrieval models from click logs, for sentence-transformers."""

from st_fpsloss.callbacks import LossStateCallback, last_complete_checkpoint
from st_fpsloss.losses import FPSLoss
from st_fpsloss.towers import Tower, freeze_unused_parameters, two_tower

__all__ = [
    "FPSLoss",
    "LossStateCallback",
    "Tower",
    "freeze_unused_parameters",
    "last_complete_checkpoint",
    "two_tower",
]
