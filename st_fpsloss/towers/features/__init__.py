"""Side features of a tower: their kinds, what they learn from data, and their values as tensors."""

from st_fpsloss.towers.features.documents import DocumentHistory
from st_fpsloss.towers.features.ids import Categorical, History, Tags
from st_fpsloss.towers.features.numerical import Numerical

__all__ = [
    "Categorical",
    "DocumentHistory",
    "History",
    "Numerical",
    "Tags",
]
