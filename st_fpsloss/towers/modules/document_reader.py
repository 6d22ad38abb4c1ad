"""Where a query tower gets the documents of histories from: inputs, ids of inputs, or vectors that are stored."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor

from st_fpsloss.encoding.embedding_store import EmbeddingStore
from st_fpsloss.encoding.gradient_cache import encode
from st_fpsloss.encoding.memory import free_memory
from st_fpsloss.encoding.plan import BatchPlan
from st_fpsloss.encoding.rows import Features, TokenizedRows, routes_by_task
from st_fpsloss.model_card.description import tower_modules
from st_fpsloss.towers.features.documents import numbered

_NUM_TOKENS = 4096  # of a mini-batch of documents, padding included
_SHARE_OF_FREE_MEMORY = 0.1


@runtime_checkable
class StoredVectors(Protocol):
    """What :class:`~st_fpsloss.DocumentIndex` has of vectors by id."""

    def check_model(self, model: SentenceTransformer) -> None:
        """Refuse a model that did not make the vectors."""

    def vectors(self, ids: Sequence[Any]) -> np.ndarray:
        """The vectors (N, dim) of ids."""


class DocumentReader:
    """Preprocesses and encodes the documents of histories with the document tower of a model.

    Outside of training what it encoded is kept, until a weight of the document tower changes.

    Args:
        model: The model, complete.

    Raises:
        ValueError: The model has no document tower.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        if not routes_by_task(model):
            raise ValueError("A DocumentHistory needs a model with a document tower: build it with two_tower.")
        self.model = model
        self.source: Mapping[Any, Any] | StoredVectors | None = None
        self._store: EmbeddingStore | None = None
        self._state: Hashable = None

    def preprocess(self, histories: Sequence[Sequence[Any]]) -> tuple[np.ndarray, Features | Tensor | None]:
        """Reads N histories.

        Returns:
            Numbers (N, width) of their documents, from 1, 0 behind them; and these documents, preprocessed, or the
            vectors (D, dim) that are stored for them; None where there are none.

        Raises:
            ValueError: A history holds what is neither a document nor, with :func:`history_documents`, a known id.
        """
        numbers, documents = numbered(histories)
        if not documents:
            return numbers, None
        if isinstance(self.source, Mapping):
            documents = [_looked_up(self.source, document) for document in documents]
        elif self.source is not None:
            return numbers, torch.from_numpy(self.source.vectors(documents))
        for document in documents:
            if not isinstance(document, (str, Mapping)):
                raise ValueError(
                    f"A history holds {document!r:.100} (a {type(document).__name__}): its documents are strings or "
                    "dicts, as encode_document takes them. For ids see st_fpsloss.history_documents."
                )
        prompt = self.model.prompts.get("document") or None
        return numbers, self.model.preprocess(documents, prompt=prompt, task="document")

    def vectors(self, given: Features | Tensor | None, device: torch.device) -> Tensor | None:
        """The embeddings (D, dim) of documents as :meth:`preprocess` returned them."""
        if given is None:
            return None
        if isinstance(given, Tensor):
            return given.to(device)
        rows = TokenizedRows.from_features(given).to(device)
        if self.model.training or torch.is_grad_enabled():
            return self._encoded(rows)
        return self._encoded_once(rows)

    def examples(self, text: str, number: int) -> list[Any]:
        """A history that a query may have, for documentation."""
        first: Any = tower_modules(self.model, "document")[0]
        if not hasattr(first, "example_input"):
            return [text]
        return [first.example_input(text, number), first.example_input(text, number + 1)]

    def _encoded(self, rows: TokenizedRows) -> Tensor:
        plan = BatchPlan.from_columns([rows], [None], _NUM_TOKENS)
        return encode(self.model, plan)[plan.index[0]]

    def _encoded_once(self, rows: TokenizedRows) -> Tensor:
        fingerprints, inverse = torch.unique(rows.fingerprints(), return_inverse=True)
        first = torch.empty_like(fingerprints).scatter_(0, inverse, torch.arange(len(rows), device=inverse.device))
        state = self._weights_and_precision(fingerprints.device)
        if self._state != state:
            self._store, self._state = None, state
        found = torch.zeros(len(fingerprints), dtype=torch.bool)
        if self._store is not None:
            found, kept = self._store.get(fingerprints)
        missing = (~found).to(first.device).nonzero().flatten()
        if not len(missing):
            return kept.to(first.device)[inverse]
        encoded = self._encoded(rows.select(first[missing]))
        if self._store is None:
            room = _SHARE_OF_FREE_MEMORY * free_memory(torch.device("cpu"))
            self._store = EmbeddingStore(encoded.shape[1], encoded.dtype, max_bytes=room)
        self._store.add(fingerprints[missing], encoded)
        vectors = encoded.new_empty(len(fingerprints), encoded.shape[1])
        vectors[missing] = encoded
        if bool(found.any()):
            vectors[found.to(first.device)] = kept.to(first.device)
        return vectors[inverse]

    def _weights_and_precision(self, device: torch.device) -> Hashable:
        tensors = [
            tensor
            for module in tower_modules(self.model, "document")
            for tensor in module.state_dict(keep_vars=True).values()
        ]
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors), precision


@contextmanager
def history_documents(model: SentenceTransformer, documents: Mapping[Any, Any] | StoredVectors) -> Iterator[None]:
    """Within it, the histories of queries (:class:`~st_fpsloss.DocumentHistory`) hold ids of documents.

    With a :class:`~st_fpsloss.DocumentIndex` no document is encoded: a query costs a small transformer over the stored
    vectors. That is for encoding and searching; training needs the documents, by a dict::

        with history_documents(model, index):
            index.search(model, [{"seen": ["d1", "d7"]}], k=10)
        with history_documents(model, {"d1": "a heist in a dream", "d7": {"text": "toys", "year": 1995}}):
            trainer.train()

    Args:
        model: A model whose query tower has a history of documents.
        documents: An index that the model has built; or a dict of id to document.

    Raises:
        ValueError: The query tower reads no documents, or the index is not of this model. Within it: a history holds an
            id that is not there.
    """
    readers = [reader for module in model.modules() if (reader := getattr(module, "document_reader", None))]
    if not readers:
        raise ValueError("No tower of the model has a DocumentHistory, so there is nothing to look up.")
    if not isinstance(documents, Mapping):
        if not isinstance(documents, StoredVectors):
            raise ValueError(f"documents={documents!r:.100} is neither a DocumentIndex nor a dict of id to document.")
        documents.check_model(model)
        *_, last = model.children()
        if model.similarity_fn_name == "cosine" and not isinstance(last, Normalize):
            raise ValueError(
                "The index holds normalized vectors, but the model ends in no Normalize: its histories read others. "
                "Build it with two_tower(similarity='cosine'), or give a dict of id to document."
            )
    before = [reader.source for reader in readers]
    for reader in readers:
        reader.source = documents
    try:
        yield
    finally:
        for reader, source in zip(readers, before, strict=True):
            reader.source = source


def _looked_up(documents: Mapping[Any, Any], document_id: Any) -> Any:
    try:
        return documents[document_id]
    except (KeyError, TypeError):
        raise ValueError(
            f"A history holds {document_id!r:.100}, which is none of the {len(documents)} ids of `documents`: leave it "
            "out of the history, or add its document."
        ) from None
