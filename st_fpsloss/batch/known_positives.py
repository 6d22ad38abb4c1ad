"""Positives of the whole log: documents that a query is known to want are no negatives, wherever they meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_fpsloss.data.inputs import pairs_of
from st_fpsloss.encoding.fingerprints import input_fingerprints


class KnownPositives:
    """Pairs (query, document) by the fingerprints of their encoded rows.

    Args:
        model: the model whose towers preprocess the inputs.
        positives: query -> documents, or, for inputs that are dicts, an iterable of (query, document).
    """

    def __init__(
        self,
        model: SentenceTransformer,
        positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]],
    ) -> None:
        queries_given, documents_given = pairs_of(positives)
        if not queries_given:
            raise ValueError("`known_positives` is empty. Pass None to mask the positives of the batch alone.")
        queries = input_fingerprints(model, queries_given, "query")
        documents = input_fingerprints(model, documents_given, "document")
        order = np.argsort(queries, kind="stable")
        self._queries, self._documents = queries[order], documents[order]

    def among(self, query_fingerprints: Tensor, document_fingerprints: Tensor) -> Tensor:
        """Known positives among a batch, O(positives of its queries).

        Args:
            query_fingerprints: (A,) int64, of the batch's unique queries.
            document_fingerprints: (B,) int64, of its unique documents.

        Returns:
            (2, K) numbers of the query and of the document of each.
        """
        queries, documents = query_fingerprints.cpu().numpy(), document_fingerprints.cpu().numpy()
        begin = np.searchsorted(self._queries, queries, side="left")
        count = np.searchsorted(self._queries, queries, side="right") - begin
        query = np.repeat(np.arange(len(queries)), count)
        entry = np.arange(count.sum()) + np.repeat(begin - (count.cumsum() - count), count)
        order = np.argsort(documents)
        found = np.searchsorted(documents, self._documents[entry], sorter=order).clip(max=len(documents) - 1)
        document = order[found]
        present = documents[document] == self._documents[entry]
        return torch.as_tensor(np.stack([query[present], document[present]]), device=query_fingerprints.device)
