"""Training on every prefix of a history from one row a history: the collator for the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from st_fpsloss.encoding.prefixes import PREFIXES
from st_fpsloss.encoding.rows import TokenizedRows, routes_by_task
from st_fpsloss.model_card import input_modules
from st_fpsloss.towers.features.documents import DocumentHistory
from st_fpsloss.towers.features.ids import History
from st_fpsloss.towers.features.values import categories, category
from st_fpsloss.towers.modules.feature_input import FeatureInput


class PrefixCollator(SentenceTransformerDataCollator):
    """Makes clicks of whole histories: every prefix of a row's history is a query, the item after it the document.

    The data set has one column, queries as dicts, in which the history goes on to the last target: ``["a", "b", "c"]``
    stands for the clicks (a → b) and (a b → c). A batch of N histories so is a batch of as many clicks as they have
    next items, with the same loss and gradients as if these were given one by one (without dropout; of a history's
    prefixes it draws one pattern). But the transformer over the history reads it once instead of once a prefix, as
    SASRec (Kang and McAuley 2018) trains. All losses of this package take such a batch; so does evaluation on it.

    The other features of a query are those of all its prefixes: none of them may be made of the history.

    Args:
        model: the model that is trained; its query tower has the history among its features.
        history: name of that :class:`st_fpsloss.History` or :class:`st_fpsloss.DocumentHistory`. Of either it has ids
            in the data set; a history of documents reads their documents.
        documents: the document of each item: id as in the histories -> input, a string or a dict.
        prompts: what is put before the texts, ``{"query": ..., "document": ...}``; the trainer's ``prompts`` are not
            read.

    Raises:
        ValueError: The query tower does not have that history, or another one beside it; or ``documents`` is no
            mapping.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss import FPSLoss, Tower, two_tower
        >>> from st_fpsloss.training.prefix_collator import PrefixCollator
        >>> from st_fpsloss.towers import History, id_embedding
        >>> films = ["alien", "brazil", "casablanca"]
        >>> user = Tower(features=[History("seen", vocabulary=films, dim=8)], hidden_dims=())
        >>> model = two_tower(user, Tower(id_embedding(films, 8)), embedding_dim=8)
        >>> collator = PrefixCollator(model, history="seen", documents={film: film for film in films})
        >>> batch = collator([{"query": {"seen": ["alien", "brazil", "casablanca"]}}, {"query": {"seen": films[1:]}}])
        >>> len(batch["query_input_ids"]), len(batch["document_offsets"])  # histories, clicks
        (2, 3)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        history: str,
        documents: Mapping[Any, Any],
        prompts: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(documents, Mapping):
            raise ValueError(
                f"documents={documents!r:.100} is a {type(documents).__name__}: give a dict from the ids of the "
                "histories to inputs; where the ids are the inputs, {item: item for item in documents}."
            )
        super().__init__(preprocess_fn=model.preprocess, prompts=dict(prompts or {}))
        self.history = history
        self.documents = {category("documents", item): document for item, document in documents.items()}
        self._by_task = routes_by_task(model)
        self._cut, feature = _history_of(model, history)
        self._max_length, self._reads_documents = feature.max_length, isinstance(feature, DocumentHistory)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates histories.

        Args:
            features: one row each, ``{column: query}``.

        Returns:
            The preprocessed queries, and the documents of all their next items, as the trainer takes them.

        Raises:
            ValueError: A row is no history of two or more items, or longer than the tower reads; or a document is
                missing.
        """
        ((column, *others),) = {tuple(row) for row in features}
        if others:
            raise ValueError(f"PrefixCollator takes one column, of queries, but the data set has {[column, *others]}.")
        queries, targets = [], []
        for row in features:
            items = self._items(row[column])
            seen = [self._document(item) for item in items[:-1]] if self._reads_documents else items[:-1]
            queries.append({**row[column], self.history: seen})
            targets += items[1:]
        asked = self._preprocessed(queries, "query")
        answers = self._documents(targets)
        return {
            **{f"query_{name}": value for name, value in asked.items()},
            f"query_{PREFIXES}": self._cut,
            **{f"document_{name}": value for name, value in answers.items()},
        }

    def _items(self, query: Any) -> list[str]:
        if not isinstance(query, Mapping):
            raise ValueError(f"The query {query!r:.100} is no dict: give one with the key {self.history!r}.")
        items = categories(self.history, query.get(self.history), ordered=True)
        if not 2 <= len(items) <= self._max_length + 1:
            raise ValueError(
                f"A history has {len(items)} items: the tower reads {self._max_length}, so give 2 to "
                f"{self._max_length + 1}, the last target included. next_item_windows cuts histories so."
            )
        return items

    def _documents(self, items: Sequence[str]) -> dict[str, Any]:
        distinct = list(dict.fromkeys(items))
        rows = TokenizedRows.from_features(self._preprocessed([self._document(item) for item in distinct], "document"))
        number = {item: place for place, item in enumerate(distinct)}
        return rows.select(torch.tensor([number[item] for item in items])).features()

    def _document(self, item: str) -> Any:
        if item not in self.documents:
            raise ValueError(f"`documents` lacks the item {item!r}, which a history of the data set has.")
        return self.documents[item]

    def _preprocessed(self, inputs: Sequence[Any], task: str) -> dict[str, Any]:
        prompts = self.prompts if isinstance(self.prompts, dict) else {}
        return self.preprocess_fn(inputs, prompt=prompts.get(task), task=task if self._by_task else None)


def _history_of(model: SentenceTransformer, name: str) -> tuple[tuple[str, ...], History | DocumentHistory]:
    """The tensors that a prefix of the model's history cuts, and the history."""
    first, _ = input_modules(model)
    if not isinstance(first, FeatureInput):
        raise ValueError(
            f"history={name!r}: the query tower has no features, but starts with a {type(first).__name__}."
        )
    cut = first.tensors_of_a_prefix(name)
    return cut, next(feature for feature in first.features if isinstance(feature, (History, DocumentHistory)))
