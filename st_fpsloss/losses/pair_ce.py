"""PairCELoss: the cross-entropy of ranking the positive before a negative."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sentence_transformers import SentenceTransformer

from st_fpsloss.batch.clicks import Duplicates, Relevance
from st_fpsloss.losses.checks import Similarity
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
        model: a two-tower model, as :func:`st_fpsloss.two_tower` makes it, or any SentenceTransformer.
        scale: start of α; None for 1/0.07 with cosine and 1 with dot product.
        learn_scale: learn α.
        max_scale: bound of α.
        negatives: ``"explicit"``: the negative columns of the row itself; ``"in_batch"``: every document column of
            every row of the batch; None: explicit where the batch has negative columns, else in-batch. Either way a
            document that was shown to the query and not clicked (a row with r ≤ 0) is a negative of that query.
        hardest: take only this many in-batch negatives of a row, those most similar to its query; None for all.
        relevance: ``"mask"``: every pair counts the same; ``"weight"``: a pair is weighted by the r of its positive.
        duplicates: ``"mask"``: a document that is a positive of the row's query anywhere in the batch is no negative of
            that row; ``"keep"``: only the positive's own column is none.
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
        scale: float | None = None,
        learn_scale: bool = True,
        max_scale: float = 100.0,
        negatives: Negatives | None = None,
        hardest: int | None = None,
        relevance: Relevance = "mask",
        duplicates: Duplicates = "mask",
        known_positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]] | None = None,
        similarity: Similarity | None = None,
        mini_batch_num_tokens: int | None = None,
        cache_gradients: bool | int = False,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(
            model,
            NegativeStrategy(negatives, hardest),
            scale=scale,
            learn_scale=learn_scale,
            max_scale=max_scale,
            relevance=relevance,
            duplicates=duplicates,
            known_positives=known_positives,
            similarity=similarity,
            mini_batch_num_tokens=mini_batch_num_tokens,
            cache_gradients=cache_gradients,
            gather_across_devices=gather_across_devices,
        )

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
