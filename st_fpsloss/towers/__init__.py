"""Two-tower models: towers out of stock sentence-transformers modules, side features, and modules from scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from st_fpsloss.utils.lazy import lazy

if TYPE_CHECKING:
    from st_fpsloss.towers.build import two_tower
    from st_fpsloss.towers.encoder import freeze_unused_parameters
    from st_fpsloss.towers.features import Categorical, DocumentHistory, History, Numerical, Tags
    from st_fpsloss.towers.from_scratch import id_embedding, id_transformer
    from st_fpsloss.towers.modules.document_reader import history_documents
    from st_fpsloss.towers.tower import Tower
else:
    # Each where it is first used: features are read without torch where queries are encoded without it.
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "build": ["two_tower"],
            "encoder": ["freeze_unused_parameters"],
            "features": ["Categorical", "DocumentHistory", "History", "Numerical", "Tags"],
            "from_scratch": ["id_embedding", "id_transformer"],
            "modules.document_reader": ["history_documents"],
            "tower": ["Tower"],
        },
    )

__all__ = [
    "Categorical",
    "DocumentHistory",
    "History",
    "Numerical",
    "Tags",
    "Tower",
    "freeze_unused_parameters",
    "history_documents",
    "id_embedding",
    "id_transformer",
    "two_tower",
]
