"""TripletLoss: the positive before the negative by a margin."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from typing_extensions import Unpack

from st_fpsloss.losses.arguments import MaskArguments
from st_fpsloss.losses.negative_strategy import Negatives, NegativeStrategy
from st_fpsloss.losses.pairwise import PairwiseLoss
from st_fpsloss.objectives.pairwise import Hinge


class TripletLoss(PairwiseLoss):
    """Hinge loss on pairs: a query's positive should be more similar to it than its negative, by a margin.

    ``max(0, margin - R(q, d⁺) + R(q, d⁻))``,

    the mean over all pairs of a row with r > 0 and one of its negatives. R is α times the dot product or the cosine.
    α is 1 and stays 1: a learned one would only rescale the margin, or collapse.

    Args:
        margin: the lead of the positive from which on a pair has no loss. Cosines lie between -1 and 1, so that with
            cosine a margin of 0.1 to 0.5 is usual.
        scale: α.
        learn_scale: learn α.
        semi_hard: take only in-batch negatives that are in the right order and within the margin,
            R⁺ - margin < R⁻ < R⁺: with the hardest of all, training from scratch can collapse.

    Relations:
        - :class:`PairCELoss` is the same on a smooth curve, without a margin.
        - sentence-transformers' ``TripletLoss`` measures distances, takes one negative, and encodes every row.

    Raises:
        ValueError: If an argument is none of its choices, two do not go together, or there are no negatives.

    Example:
        >>> from st_fpsloss import Tower, TripletLoss, two_tower
        >>> from st_fpsloss.towers import id_embedding
        >>> model = two_tower(Tower(id_embedding(["red", "blue"], 8)), Tower(id_embedding(["rose", "sky"], 8)))
        >>> loss = TripletLoss(model, margin=0.5)
        >>> queries = model.preprocess(["red", "blue"], task="query")
        >>> documents, negatives = (model.preprocess(d, task="document") for d in (["rose", "sky"], ["sky", "rose"]))
        >>> loss([queries, documents, negatives]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        margin: float = 1.0,
        *,
        scale: float = 1.0,
        learn_scale: bool = False,
        negatives: Negatives | None = None,
        hardest: int | None = None,
        semi_hard: bool = False,
        **shared: Unpack[MaskArguments],
    ) -> None:
        if not 0 < margin < float("inf"):
            raise ValueError(f"`margin` must be a finite number above 0, got {margin!r}.")
        strategy = NegativeStrategy(negatives, hardest, semi_hard)
        super().__init__(model, strategy, scale=scale, learn_scale=learn_scale, **shared)
        self.margin = margin

    @property
    def pair_objective(self) -> Hinge:
        """``max(0, margin - (R⁺ - R⁻))``."""
        return Hinge(self.margin, self.strategy.semi_hard)

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {**super().get_config_dict(), "margin": self.margin}

    @property
    def citation(self) -> str:
        """BibTeX of what the loss builds on."""
        return """
@inproceedings{schroff2015facenet,
    title={FaceNet: A Unified Embedding for Face Recognition and Clustering},
    author={Schroff, Florian and Kalenichenko, Dmitry and Philbin, James},
    booktitle={Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
    year={2015},
}
"""
