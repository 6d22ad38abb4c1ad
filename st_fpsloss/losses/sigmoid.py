"""SigmoidLoss: every pair of a query and a document is a decision of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from typing_extensions import Unpack

from st_fpsloss.batch.clicks import ClickBatch
from st_fpsloss.batch.distributed import over_ranks, world_size
from st_fpsloss.batch.negatives import sigmoid_targets
from st_fpsloss.losses.arguments import ClickArguments
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.objectives.sigmoid import sigmoid_over_pairs


class SigmoidLoss(ClickLoss):
    """Pairwise sigmoid loss (SigLIP): for each query and each document of the batch, whether they belong together.

    ``-log σ(y (α R(q, d) + β))``, y = 1 for a click and -1 for every other pair of U Wᵀ,

    the sum over the pairs of every row's query with every document column of the batch, divided by the number of rows
    with r > 0. A row with r ≤ 0 (shown, not clicked) has y = -1 on its document as well. Unlike in a softmax no pair
    depends on another, and β means something: it is the log odds of a pair at R = 0. There are many more negatives
    than positives, so it starts low, and it is learned like α.

    Args:
        bias: start of β; None for -ln(documents - 1) of the first training batch, which are the log odds of guessing.
        learn_bias: learn β.
        relevance: ``"mask"``: every row with r > 0 counts the same; ``"weight"``: the pairs of a row are weighted by
            its r (those of a row with r ≤ 0 by 1), and the sum is divided by the sum of r over rows with r > 0.
        duplicates: ``"mask"``: a pair whose document is a positive of the query elsewhere in the batch is left out;
            ``"keep"``: it is a negative.

    Relations:
        - :class:`FPSLoss` tells each query's document from the others, on the same pairs.

    Raises:
        ValueError: If an argument is none of its choices, or two do not go together.

    Example:
        >>> from st_fpsloss import SigmoidLoss, Tower, two_tower
        >>> from st_fpsloss.towers import id_embedding
        >>> model = two_tower(Tower(id_embedding(["red", "blue"], 8)), Tower(id_embedding(["rose", "sky"], 8)))
        >>> loss = SigmoidLoss(model)
        >>> queries = model.preprocess(["red", "blue"], task="query")
        >>> documents = model.preprocess(["rose", "sky"], task="document")
        >>> loss([queries, documents]).backward()
        >>> loss.beta  # -ln(2 - 1)
        0.0
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        bias: float | None = None,
        learn_bias: bool = True,
        **shared: Unpack[ClickArguments],
    ) -> None:
        super().__init__(model, bias=0.0 if bias is None else bias, learn_bias=learn_bias, **shared)
        self._bias_is_set = bias is not None
        self._first_documents = 0  # of this rank's first training batch, until all ranks start at one β

    def objective(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """Sum over the pairs, divided by the rows with r > 0."""
        targets = sigmoid_targets(batch, self.relevance, self.duplicates)
        return sigmoid_over_pairs(queries, documents, self.logit_scale.exp(), self._bias_for(batch), targets)

    def _bias_for(self, batch: ClickBatch) -> Tensor:
        """β; before the first training batch, what it would start at with this one."""
        if self._bias_is_set or self._first_documents:
            return self.logit_bias
        num_documents = int((batch.document >= 0).sum())
        if not self.training or not torch.is_grad_enabled():
            return torch.full_like(self.logit_bias, _first_bias(num_documents))
        self._first_documents = num_documents
        with torch.no_grad():
            self.logit_bias.fill_(_first_bias(num_documents))
        self._bias_is_set = self._gathers or world_size() == 1
        return self.logit_bias

    def share_over_ranks(self) -> None:
        """Start at one β on all ranks, whose first batches may differ, or come later."""
        if self._bias_is_set:
            return
        num_documents = int(over_ranks(torch.tensor(self._first_documents, device=self.logit_bias.device), "max"))
        if num_documents:
            with torch.no_grad():
                self.logit_bias.fill_(_first_bias(num_documents))
            self._bias_is_set = True

    def export_state(self) -> dict[str, Any]:
        """α, β, and whether β has started."""
        return {**super().export_state(), "bias_is_set": self._bias_is_set}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`export_state` gave."""
        super().import_state(state)
        self._bias_is_set = state["bias_is_set"]

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {
            **super().get_config_dict(),
            "bias": round(self.beta, 4) if self._bias_is_set else None,
            "learn_bias": self.logit_bias.requires_grad,
        }

    @property
    def citation(self) -> str:
        """BibTeX of what the loss builds on."""
        return """
@inproceedings{zhai2023sigmoid,
    title={Sigmoid Loss for Language Image Pre-Training},
    author={Zhai, Xiaohua and Mustafa, Basil and Kolesnikov, Alexander and Beyer, Lucas},
    booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
    year={2023},
}
"""


def _first_bias(num_documents: int) -> float:
    """The log odds of guessing which of the documents is the positive."""
    return math.log(1 / max(1, num_documents - 1))
