"""FPSLoss: the full product softmax."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_fpsloss.batch.clicks import ClickBatch, Direction, Duplicates, LogQ, Relevance
from st_fpsloss.encoding.rows import TokenizedRows
from st_fpsloss.frequencies.table import Frequencies
from st_fpsloss.losses.checks import Similarity
from st_fpsloss.losses.log_q import LogQLoss
from st_fpsloss.objectives.softmax import full_product_softmax


class FPSLoss(LogQLoss):
    """Full product softmax: every document of the batch is a negative for every other query.

    Given clicks (query, document, relevance r), each query should tell its document from all other documents of the
    batch:

    ``L = -1[r>0]ᵀ log diag softmax(α U Wᵀ + β)``, divided by the number of rows with r > 0,

    with U and W the query and document embeddings. The scale α (an inverse temperature) is learned; a scalar β cancels
    in a softmax, its exact gradient is 0, and it stays exactly where it starts.

    A click log repeats its queries and documents. Each distinct one is encoded once a batch and the loss is computed on
    distinct rows, with the same value and gradients.

    Args:
        model: a two-tower model, as :func:`st_fpsloss.two_tower` makes it, or any SentenceTransformer.
        scale: start of α; None for 1/0.07 with cosine and 1 with dot product.
        bias: start of β.
        learn_scale: learn α, at the trainer's learning rate: Adam moves log α by at most that much a step, so at the
            2e-5 of a transformer α stays where it starts for thousands of steps. What ranked as well as the best fixed
            α from every start (``model_cards/comparisons.md``) was a rate of its own,
            ``learning_rate_mapping={"logit_scale": 2e-2}``, with ``max_scale=30``, since on a small log α grows past
            what ranks best. Fix it where a run is too short to learn it.
        learn_bias: leave β a parameter. It has no effect in a softmax.
        max_scale: bound of α, as in CLIP.
        directions: ``"query_to_doc"``, ``"doc_to_query"`` (the softmax over queries), or both: their mean.
        relevance: ``"mask"``: every row with r > 0 counts the same; ``"weight"``: a row's loss is weighted by r. A row
            with r ≤ 0 is no positive; its document is a negative of the other queries, and of its own.
        duplicates: ``"mask"``: a document that is a positive of the row's query anywhere in the batch is no negative of
            that row; ``"keep"``: the formula to the letter, which for a query with several positives is the
            multi-positive softmax.
        log_q: correct for in-batch negatives being drawn by popularity: ``"standard"`` subtracts log Q from every
            column (Yi et al. 2019), ``"corrected"`` from the negatives alone (arXiv 2507.09331; needs
            ``duplicates="mask"``; a positive competes with all documents but the query's other positives of the batch),
            None does not correct. On a log where a few documents have most of the clicks, this decides about the
            quality of the ranking.
        frequencies: what counts how often rows occur, by ``"query"`` and ``"document"``: a
            :class:`st_fpsloss.frequencies.FrequencyTable`, or a :class:`st_fpsloss.frequencies.FrequencySketch`
            for many millions of distinct rows. None counts exactly, during training.
        known_positives: query -> documents of the whole log (or an iterable of such pairs, for inputs that are dicts),
            no negatives of that query in any batch; needs ``duplicates="mask"``.
        similarity: ``"dot"`` or ``"cosine"``; None takes the model's ``similarity_fn_name``. With cosine the loss
            normalises the embeddings itself.
        mini_batch_num_tokens: padded tokens encoded at a time; None for 2048 on a CPU and 32768 on an accelerator.
        cache_gradients: embed mini-batches without a graph first and once more in the backward pass, so that memory
            does not grow with the batch (GradCache), with the same gradients. True keeps the graphs of about one
            mini-batch a tower; a whole number as 16384 those of mini-batches of so many tokens in all, padding
            included, so that only the others are embedded twice. A kept token takes 0.3 MiB in MiniLM (6 layers,
            with dropout), so that 16384 take 5 GiB; in other encoders about in proportion to layers times width.
        gather_across_devices: with several processes, let the documents of all of them be negatives.

    Requirements:
        1. Columns query, document and, if any, negative documents, in this order; with a two-tower model
           ``router_mapping`` says which is which.
        2. :class:`st_fpsloss.LossStateCallback` in the trainer, so that α is saved, resumed and logged.

    Inputs:
        +-------------------------------------------------+---------------------+
        | Inputs                                          | Labels              |
        +=================================================+=====================+
        | (query, document) clicks                        | none, or relevance  |
        +-------------------------------------------------+---------------------+
        | (query, document, negative_1, ..., negative_n)  | none, or relevance  |
        +-------------------------------------------------+---------------------+

    Relations:
        - ``MultipleNegativesRankingLoss`` is this loss with a fixed scale, every row encoded, and duplicates kept.

    Raises:
        ValueError: If an argument is none of its choices, or two do not go together.

    Example:
        >>> from st_fpsloss import FPSLoss, Tower, two_tower
        >>> from st_fpsloss.towers import id_embedding
        >>> model = two_tower(Tower(id_embedding(["red", "blue"], 8)), Tower(id_embedding(["rose", "sky"], 8)))
        >>> loss = FPSLoss(model)
        >>> queries = model.preprocess(["red", "blue"], task="query")
        >>> documents = model.preprocess(["rose", "sky"], task="document")
        >>> loss([queries, documents]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        bias: float = 0.0,
        learn_scale: bool = True,
        learn_bias: bool = True,
        max_scale: float = 100.0,
        directions: Sequence[Direction] = ("query_to_doc",),
        relevance: Relevance = "mask",
        duplicates: Duplicates = "mask",
        log_q: LogQ | None = None,
        frequencies: Mapping[str, Frequencies] | None = None,
        known_positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]] | None = None,
        similarity: Similarity | None = None,
        mini_batch_num_tokens: int | None = None,
        cache_gradients: bool | int = False,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(
            model,
            scale=scale,
            bias=bias,
            learn_scale=learn_scale,
            learn_bias=learn_bias,
            max_scale=max_scale,
            relevance=relevance,
            duplicates=duplicates,
            log_q=log_q,
            frequencies=frequencies,
            known_positives=known_positives,
            similarity=similarity,
            mini_batch_num_tokens=mini_batch_num_tokens,
            cache_gradients=cache_gradients,
            gather_across_devices=gather_across_devices,
        )
        self.directions = _check_directions(directions)

    def needed_rows(self, relevance: Tensor, columns: Sequence[TokenizedRows]) -> list[Tensor | None]:
        """Queries of rows with r ≤ 0 ask nothing, and document to query knows no negative documents."""
        positive = relevance > 0
        if self.directions == ("query_to_doc",):
            return [positive, *[None] * (len(columns) - 1)]
        if self.directions == ("doc_to_query",):
            return [None, positive, *[torch.zeros_like(positive)] * (len(columns) - 2)]
        return [None] * len(columns)

    def add_corrections(self, batch: ClickBatch) -> ClickBatch:
        """Add known positives; count the batch's rows and look up their log Q."""
        batch = super().add_corrections(batch)
        if self.log_q is None:
            return batch
        query_log_q = document_log_q = None
        if "query_to_doc" in self.directions:
            document_log_q = self.count_and_look_up("document", batch.document, batch.document_fingerprints)
        if "doc_to_query" in self.directions:
            query_log_q = self.count_and_look_up("query", batch.query, batch.query_fingerprints)
        return replace(batch, query_log_q=query_log_q, document_log_q=document_log_q)

    def objective(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """Mean over the directions of the full product softmax."""
        alpha = self.logit_scale.exp()
        losses = []
        for direction in self.directions:
            self.check_log_q("document_log_q" if direction == "query_to_doc" else "query_log_q", batch)
            asking, answering = (queries, documents) if direction == "query_to_doc" else (documents, queries)
            anchors, targets = batch.softmax_targets(direction, self.relevance, self.duplicates, self.log_q)
            losses.append(full_product_softmax(asking[anchors], answering, alpha, targets))
        return torch.stack(losses).mean()

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {**super().get_config_dict(), "directions": self.directions}


def _check_directions(directions: Sequence[Direction]) -> tuple[Direction, ...]:
    known = get_args(Direction)
    if isinstance(directions, str) or not directions or not set(directions) <= set(known):
        raise ValueError(
            f"`directions` must be a tuple of {' and '.join(map(repr, known))}, got {directions!r}; "
            'for one direction write ("query_to_doc",).'
        )
    return tuple(dict.fromkeys(directions))
