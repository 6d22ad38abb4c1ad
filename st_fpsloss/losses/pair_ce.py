"""PairCELoss: the cross-entropy of ranking the positive before a negative."""

from __future__ import annotations

from sentence_transformers import SentenceTransformer
from typing_extensions import Unpack

from st_fpsloss.losses.arguments import ClickArguments
from st_fpsloss.losses.negative_strategy import Negatives, NegativeStrategy
from st_fpsloss.losses.pairwise import PairwiseLoss
from st_fpsloss.objectives.pairwise import Logistic


class PairCELoss(PairwiseLoss):
    """Cross-entropy on pairs: a query's positive should be ranked before its negative.

    The probability that the positive d⁺ comes before the negative d⁻ is modelled as σ(R(q, d⁺) - R(q, d⁻)), and the
    loss is its cross-entropy with certainty,

    ``CrossEntropy(1, σ(R(q, d⁺) - R(q, d⁻))) = log(1 + exp(R(q, d⁻) - R(q, d⁺)))``,

    the mean over all pairs of a row with r > 0 and one of its negatives. R is α times the dot product or the cosine; α
    is learned. Known as BPR in recommendation and as RankNet in search.

    Args:
        **shared: those of :class:`st_fpsloss.losses.arguments.ClickArguments`.

    Relations:
        - :class:`TripletLoss` stops pushing where the margin is reached; this loss never stops, ever more gently.
        - :class:`SampledSoftmaxLoss` lets the negatives of a row compete with each other: the hardest counts most.
          With one negative a row the two are equal.

    Raises:
        ValueError: If an argument is none of its choices, two do not go together, or there are no negatives.

    Example:
        >>> from st_fpsloss import PairCELoss, Tower, two_tower
        >>> from st_fpsloss.towers import id_embedding
        >>> model = two_tower(Tower(id_embedding(["red", "blue"], 8)), Tower(id_embedding(["rose", "sky"], 8)))
        >>> loss = PairCELoss(model)
        >>> queries = model.preprocess(["red", "blue"], task="query")
        >>> documents, negatives = (model.preprocess(d, task="document") for d in (["rose", "sky"], ["sky", "rose"]))
        >>> loss([queries, documents, negatives]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        negatives: Negatives | None = None,
        hardest: int | None = None,
        **shared: Unpack[ClickArguments],
    ) -> None:
        super().__init__(model, NegativeStrategy(negatives, hardest), **shared)

    @property
    def pair_objective(self) -> Logistic:
        """``softplus(-(R⁺ - R⁻))``."""
        return Logistic()

    @property
    def citation(self) -> str:
        """BibTeX of what the loss builds on."""
        return """
@inproceedings{burges2005learning,
    title={Learning to Rank using Gradient Descent},
    author={Burges, Chris and Shaked, Tal and Renshaw, Erin and Lazier, Ari and Deeds, Matt and Hamilton, Nicole and Hullender, Greg},
    booktitle={Proceedings of the 22nd International Conference on Machine Learning},
    year={2005},
}
@inproceedings{rendle2009bpr,
    title={BPR: Bayesian Personalized Ranking from Implicit Feedback},
    author={Rendle, Steffen and Freudenthaler, Christoph and Gantner, Zeno and Schmidt-Thieme, Lars},
    booktitle={Proceedings of the Twenty-Fifth Conference on Uncertainty in Artificial Intelligence},
    year={2009},
}
"""  # noqa: E501
