"""SampledSoftmaxLoss: softmax over the positive and a few negatives, or over a whole small catalogue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_fpsloss.batch.clicks import ClickBatch, Duplicates, LogQ, Relevance
from st_fpsloss.batch.negatives import NegativePairs, Positives, explicit_negatives, in_batch_negatives, pair_logits
from st_fpsloss.encoding.rows import TokenizedRows
from st_fpsloss.frequencies.table import Frequencies
from st_fpsloss.losses.checks import Similarity
from st_fpsloss.losses.corpus import Catalogue
from st_fpsloss.losses.log_q import LogQLoss
from st_fpsloss.losses.negative_strategy import Negatives, NegativeStrategy
from st_fpsloss.objectives.sampled_softmax import sampled_softmax
from st_fpsloss.objectives.softmax import SoftmaxTargets, full_product_softmax


class SampledSoftmaxLoss(LogQLoss):
    """Softmax over a query's positive and its n sampled negatives: the classic choice after pretraining.

    ``-log( exp R(q, d⁺) / Σ exp R(q, d_i) )`` over d⁺ and the negatives d_i,

    the mean over rows with r > 0. R is α times the dot product or the cosine; α is learned. 5 to 20 negatives are
    usual; :mod:`st_fpsloss.negatives` samples and mines them. In-batch, it is :class:`FPSLoss` from query to document.

    On a small catalogue no sampling is needed: with ``catalogue`` the sum goes over all of its documents, each encoded
    once a step, and the loss is -log p(d⁺|q) itself, which every sampled or in-batch softmax only estimates.

    Args:
        model: a two-tower model, as :func:`st_fpsloss.two_tower` makes it, or any SentenceTransformer.
        scale: start of α; None for 1/0.07 with cosine and 1 with dot product.
        learn_scale: learn α.
        max_scale: bound of α.
        negatives: ``"explicit"``: the negative columns of the row itself; ``"in_batch"``: every document column of
            every row of the batch; None: explicit where the batch has negative columns, else in-batch. Either way a
            document that was shown to the query and not clicked (a row with r ≤ 0) is a negative of that query.
        hardest: take only this many in-batch negatives of a row, those most similar to its query; None for all.
        catalogue: inputs of all documents there are, as the data set spells them; takes the place of ``negatives``.
            Every document stands in the sum once, the query's other positives included.
        catalogue_prompt: what the training arguments' ``prompts`` put before documents, if they do.
        relevance: ``"mask"``: every row with r > 0 counts the same; ``"weight"``: a row's loss is weighted by r.
        duplicates: ``"mask"``: a document that is a positive of the row's query anywhere in the batch is no negative of
            that row; ``"keep"``: only the positive's own column is none.
        log_q: correct for how the negatives are drawn: ``"standard"`` subtracts log Q from every column (Yi et al.
            2019), ``"corrected"`` from the negatives alone (arXiv 2507.09331; needs ``duplicates="mask"``), None does
            not correct. With explicit negatives Q is the distribution of the negative columns.
        frequencies: what counts how often rows occur, by ``"document"``: a
            :class:`st_fpsloss.frequencies.FrequencyTable`, or a :class:`st_fpsloss.frequencies.FrequencySketch`
            for many millions of distinct rows. None counts exactly, during training.
        known_positives: query -> documents of the whole log (or an iterable of such pairs, for inputs that are dicts),
            no negatives of that query in any batch; needs ``duplicates="mask"``.
        similarity: ``"dot"`` or ``"cosine"``; None takes the model's ``similarity_fn_name``.
        mini_batch_num_tokens: padded tokens encoded at a time; None for 2048 on a CPU and 32768 on an accelerator.
        cache_gradients: embed mini-batches without a graph first and once more in the backward pass, so that memory
            does not grow with the batch (GradCache), with the same gradients. True keeps the graphs of about one
            mini-batch a tower; a whole number as 16384 those of mini-batches of so many tokens in all, padding
            included, so that only the others are embedded twice. A kept token takes 0.3 MiB in MiniLM (6 layers,
            with dropout), so that 16384 take 5 GiB; in other encoders about in proportion to layers times width.
        gather_across_devices: with several processes, let the documents of all of them be in-batch negatives.

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
        - :class:`FPSLoss` takes the documents of all rows of the batch for negatives.
        - :class:`PairCELoss` takes the negatives one by one.

    Raises:
        ValueError: If an argument is none of its choices, two do not go together, there are no negatives, or the
            catalogue lacks a document of the batch.

    Example:
        >>> from st_fpsloss import SampledSoftmaxLoss, Tower, two_tower
        >>> from st_fpsloss.towers import id_embedding
        >>> model = two_tower(Tower(id_embedding(["red", "blue"], 8)), Tower(id_embedding(["rose", "sky"], 8)))
        >>> loss = SampledSoftmaxLoss(model, catalogue=["rose", "sky"])
        >>> queries = model.preprocess(["red", "blue"], task="query")
        >>> documents = model.preprocess(["rose", "sky"], task="document")
        >>> loss([queries, documents]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        learn_scale: bool = True,
        max_scale: float = 100.0,
        negatives: Negatives | None = None,
        hardest: int | None = None,
        catalogue: Sequence[Any] | None = None,
        catalogue_prompt: str | None = None,
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
            bias=0.0,  # β cancels in a softmax
            learn_scale=learn_scale,
            learn_bias=False,
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
        self.strategy = NegativeStrategy(negatives, hardest)
        if hardest is not None and log_q is not None:
            raise ValueError("`log_q` corrects for drawn negatives, `hardest` does not draw: pass one of them.")
        self.catalogue: Catalogue | None = None
        if catalogue is not None:
            _check_catalogue_options(
                negatives=negatives,
                hardest=hardest,
                log_q=log_q,
                known_positives=known_positives,
            )
            self.catalogue = Catalogue(model, catalogue, catalogue_prompt)

    def check_batch(self, num_columns: int, labels: Tensor | None) -> None:
        """Explicit negatives need columns, or rows that were shown and not clicked."""
        if self.catalogue is None:
            self.strategy.check(num_columns, labels)

    def needed_rows(self, relevance: Tensor, columns: Sequence[TokenizedRows]) -> list[Tensor | None]:
        """Rows with r ≤ 0 ask nothing; what they are negatives of depends on the choice of negatives."""
        if self.catalogue is None:
            return self.strategy.needed_rows(relevance, columns, self._gathers)
        positive = relevance > 0  # all documents are in the catalogue
        return [positive, positive, *[torch.zeros_like(positive)] * (len(columns) - 2)]

    def extra_candidates(self, num_rows: int) -> list[tuple[TokenizedRows, Tensor]]:
        """The catalogue."""
        if self.catalogue is None:
            return []
        return self.catalogue.columns(num_rows, self.logit_scale.device, same_on_all_ranks=self._gathers)

    def add_corrections(self, batch: ClickBatch) -> ClickBatch:
        """Add known positives and log Q; check that the catalogue has every positive."""
        if self.catalogue is not None:
            self.catalogue.check(batch)
        batch = super().add_corrections(batch)
        if self.log_q is None:
            return batch
        drawn = slice(1, None) if self.strategy.is_explicit(len(batch.document)) else slice(None)
        log_q = self.count_and_look_up("document", batch.document, batch.document_fingerprints, drawn)
        return replace(batch, document_log_q=log_q)

    def objective(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """Mean over the rows with r > 0."""
        self.check_log_q("document_log_q", batch)
        if self.catalogue is not None:
            return self._over_all(queries, documents, batch)
        explicit = self.strategy.is_explicit(len(batch.document))
        if not explicit and self.strategy.hardest is None:
            anchors, targets = batch.softmax_targets("query_to_doc", self.relevance, self.duplicates, self.log_q)
            return full_product_softmax(queries[anchors], documents, self.logit_scale.exp(), targets)
        positives = Positives.of(batch, self.relevance)
        own = positives.is_local(batch)
        mine = positives.select(own)
        if explicit:
            cells = explicit_negatives(batch, positives, self.duplicates).of(own)
        else:
            pairs = in_batch_negatives(batch, mine, self.duplicates)
            cells = self.strategy.hardest_of(pairs, queries[mine.query], documents)
        return self._over_pairs(queries, documents, batch, mine, cells)

    def _over_all(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """Softmax over all distinct documents, each standing in the sum once."""
        positives = Positives.of(batch, self.relevance)
        positives = positives.select(positives.is_local(batch))
        anchors, anchor = torch.unique(positives.query, return_inverse=True)
        targets = SoftmaxTargets(
            anchor, positives.document, positives.weight, candidate_log_weight=documents.new_zeros(len(documents))
        )
        return full_product_softmax(queries[anchors], documents, self.logit_scale.exp(), targets)

    def _over_pairs(
        self, queries: Tensor, documents: Tensor, batch: ClickBatch, positives: Positives, cells: NegativePairs
    ) -> Tensor:
        """Softmax of each positive over its own negatives; a positive without any has no loss."""
        alpha = self.logit_scale.exp()
        positive, negative = pair_logits(queries, documents, alpha, positives, cells)
        negative = negative + cells.count.log()
        if self.log_q is not None and batch.document_log_q is not None and cells.column is not None:
            log_q = batch.document_log_q.to(negative.dtype)
            if self.log_q == "standard":
                positive = positive - log_q[0, positives.row]
            negative = negative + self._log_weights(log_q, batch.log_unmasked_q()[positives.query], cells)
        asking, row = torch.unique(cells.positive, return_inverse=True)
        return (positives.weight[asking] * sampled_softmax(positive[asking], negative, row)).sum()

    def _log_weights(self, log_q: Tensor, log_unmasked_q: Tensor, cells: NegativePairs) -> Tensor:
        """What ``log_q`` adds to each explicit negative (K,).

        A document that was shown and not clicked (it stands in column 0) was not drawn, so it is not corrected for
        that: it counts as one document does in the sum that the drawn ones estimate.

        Args:
            log_q: (columns - 1, M).
            log_unmasked_q: (P,) log share of Q that the negatives of each positive come from.
            cells: the negatives.
        """
        assert cells.column is not None
        is_drawn = cells.column[0] > 0
        drawn = torch.bincount(cells.positive[is_drawn], minlength=len(log_unmasked_q)).clamp_min(1).to(log_q.dtype)
        of_drawn = -log_q[cells.column[0], cells.column[1]]
        if self.log_q == "standard":
            return torch.where(is_drawn, of_drawn, drawn.log()[cells.positive])
        return torch.where(is_drawn, of_drawn + (log_unmasked_q - drawn.log())[cells.positive], 0.0)

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        own = self.strategy.get_config_dict() if self.catalogue is None else {"catalogue": len(self.catalogue)}
        return {**super().get_config_dict(), **own}

    @property
    def citation(self) -> str:
        """BibTeX of what the loss builds on."""
        return f"""
@article{{bengio2008adaptive,
    title={{Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model}},
    author={{Bengio, Yoshua and Senécal, Jean-Sébastien}},
    journal={{IEEE Transactions on Neural Networks}},
    year={{2008}},
}}
{super().citation.strip()}
"""


def _check_catalogue_options(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"`{name}` has no part in a softmax over a whole `catalogue`: leave one of them out.")
