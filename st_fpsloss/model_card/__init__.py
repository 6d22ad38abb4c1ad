"""The model card: both towers in words, what was learned from which clicks, and what the model tells about its data."""

from st_fpsloss.model_card.card import TwoTowerModelCardData, input_modules, use_two_tower_card
from st_fpsloss.model_card.training import record_losses, record_training

__all__ = ["TwoTowerModelCardData", "input_modules", "record_losses", "record_training", "use_two_tower_card"]
