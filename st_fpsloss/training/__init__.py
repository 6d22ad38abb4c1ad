"""What the stock trainer is given beside the loss: callbacks, checkpoints, collators, warnings."""

from st_fpsloss.training.alignment import align_towers
from st_fpsloss.training.callbacks import LossStateCallback
from st_fpsloss.training.checkpoints import last_complete_checkpoint
from st_fpsloss.training.collator import DeduplicatingCollator
from st_fpsloss.training.prefix_collator import PrefixCollator
from st_fpsloss.training.saving import save_model

__all__ = [
    "DeduplicatingCollator",
    "LossStateCallback",
    "PrefixCollator",
    "align_towers",
    "last_complete_checkpoint",
    "save_model",
]
