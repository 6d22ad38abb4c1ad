"""The query tower of a model in memory, with the surface of an exported one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from st_fpsloss.retrieval.encode import embed
from st_fpsloss.towers.features.values import input_row, input_text
from st_fpsloss.towers.modules.feature_input import FeatureInput

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from st_fpsloss.retrieval import DocumentIndex


class TorchQueryEncoder:
    """Embeds queries as :class:`~st_fpsloss.serving.QueryEncoder` does, with torch.

    Args:
        model: The model.

    Attributes:
        model: The model.
        features: The side features of the query tower.
        reads_text: Whether the query tower reads text.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model
        routes = getattr(model[0], "sub_modules", {})
        first = routes["query"][0] if "query" in routes else model[0]
        featured = isinstance(first, FeatureInput)
        self.features = list(first._readers) if featured else []
        self.reads_text = not featured or first.text_encoder is not None
        self._known = [*(["text"] if self.reads_text else []), *(feature.name for feature in self.features)]

    def encode(self, inputs: Sequence[Any]) -> np.ndarray:
        """Embeds queries, see :meth:`QueryEncoder.encode`."""
        rows: list[Any] = [input_row(item, self._known) for item in inputs]
        if not self.features:
            rows = [input_text(row.get("text")) for row in rows]
        return embed(self.model.encode_query, rows)

    def check_index(self, index: DocumentIndex) -> None:
        """Refuses an index whose documents another model embedded, see :meth:`DocumentIndex.check_model`."""
        index.check_model(self.model)
