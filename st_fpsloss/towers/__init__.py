"""Two-tower models: towers out of stock sentence-transformers modules, side features, and modules from scratch."""

from __future__ import annotations

from st_fpsloss.towers.features.kinds import Categorical, History, Numerical, Tags
from st_fpsloss.towers.from_scratch import id_embedding, id_transformer
from st_fpsloss.towers.tower import Tower, freeze_unused_parameters
from st_fpsloss.towers.two_tower import two_tower

__all__ = [
    "Categorical",
    "History",
    "Numerical",
    "Tags",
    "Tower",
    "freeze_unused_parameters",
    "id_embedding",
    "id_transformer",
    "two_tower",
]
