"""FullSoftmaxLoss: the softmax over all documents of a small corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from typing_extensions import Unpack

from st_fpsloss.batch.clicks import ClickBatch
from st_fpsloss.batch.negatives import Positives
from st_fpsloss.encoding.rows import TokenizedRows, preprocessed_rows
from st_fpsloss.losses.arguments import ScaleArguments
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.losses.diagnostics import flat_softmax_warnings
from st_fpsloss.objectives.softmax import SoftmaxTargets, full_product_softmax


class FullSoftmaxLoss(ClickLoss):
    """Softmax over all documents of a small corpus: no sampling, no correction.

    ``-log( exp R(q, d⁺) / Σ exp R(q, d) )`` over all documents d of the corpus,

    the mean over rows with r > 0. R is α times the dot product or the cosine; α is learned. Every document stands in
    the sum once, the query's other positives included, and is encoded once a step; so the loss is -log p(d⁺|q) itself,
    which every sampled or in-batch softmax only estimates.

    Args:
        corpus: inputs of all documents there are, as the data set has them.
        corpus_prompt: what the training arguments' ``prompts`` put before documents, if they do.

    Relations:
        - :class:`FPSLoss` takes the documents of the batch: for a corpus that is too large to encode at every step.
        - :class:`SampledSoftmaxLoss` takes a few negatives of each row.

    Raises:
        ValueError: If an argument is none of its choices, or the corpus lacks a document of the batch.

    Example:
        >>> from st_fpsloss import FullSoftmaxLoss, Tower, two_tower
        >>> from st_fpsloss.towers import id_embedding
        >>> model = two_tower(Tower(id_embedding(["red", "blue"], 8)), Tower(id_embedding(["rose", "sky"], 8)))
        >>> loss = FullSoftmaxLoss(model, corpus=["rose", "sky"])
        >>> queries = model.preprocess(["red", "blue"], task="query")
        >>> documents = model.preprocess(["rose", "sky"], task="document")
        >>> loss([queries, documents]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        corpus: Sequence[Any],
        *,
        corpus_prompt: str | None = None,
        **shared: Unpack[ScaleArguments],
    ) -> None:
        super().__init__(model, bias=0.0, learn_bias=False, duplicates="keep", **shared)  # β cancels in a softmax
        inputs = list(corpus)
        if not inputs:
            raise ValueError("`corpus` is empty. Pass the inputs of all documents.")
        self._corpus = TokenizedRows.stack(list(preprocessed_rows(model, inputs, "document", corpus_prompt)))
        self._fingerprints = self._corpus.fingerprints()

    def needed_rows(self, relevance: Tensor, columns: Sequence[TokenizedRows]) -> list[Tensor | None]:
        """The positives alone: all other documents are in the corpus."""
        positive = relevance > 0
        return [positive, positive, *[torch.zeros_like(positive)] * (len(columns) - 2)]

    def extra_candidates(self) -> list[TokenizedRows]:
        """The corpus."""
        self._corpus = self._corpus.to(self.logit_scale.device)
        return [self._corpus]

    def add_corrections(self, batch: ClickBatch) -> ClickBatch:
        """Nothing to correct; check that the corpus has every positive."""
        rows = (batch.relevance > 0).nonzero().flatten()
        self._fingerprints = self._fingerprints.to(rows.device)
        missing = rows[~torch.isin(batch.document_fingerprints[batch.document[0, rows]], self._fingerprints)]
        if len(missing):
            raise ValueError(
                f"`corpus` lacks the document of row {int(missing[0])} of the batch. Add it, as it is in the data set; "
                "if the training arguments' `prompts` put something before documents, pass it as `corpus_prompt`."
            )
        return batch

    def objective(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """Mean over the rows with r > 0."""
        positives = Positives.of(batch, self.relevance)
        positives = positives.select(positives.is_local(batch))
        anchors, anchor = torch.unique(positives.query, return_inverse=True)
        targets = SoftmaxTargets(
            anchor, positives.document, positives.weight, candidate_log_weight=documents.new_zeros(len(documents))
        )
        return full_product_softmax(queries[anchors], documents, self.logit_scale.exp(), targets)

    def setting_warnings(self, model: SentenceTransformer) -> list[str]:
        """What is wrong with the settings, known before training; a sentence each, with its cure."""
        return [*flat_softmax_warnings(self, self.similarity), *super().setting_warnings(model)]

    def has_negatives(self, batch: ClickBatch) -> bool:
        """All other documents of the corpus are negatives."""
        return len(self._corpus) > 1

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {**super().get_config_dict(), "corpus": len(self._corpus)}

    @property
    def citation(self) -> str:
        """BibTeX of what the loss builds on."""
        return """
@article{bengio2008adaptive,
    title={Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model},
    author={Bengio, Yoshua and Senécal, Jean-Sébastien},
    journal={IEEE Transactions on Neural Networks},
    year={2008},
}
"""
