"""TripletLoss: the positive before the negative by a margin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sentence_transformers import SentenceTransformer

from st_fpsloss.batch.clicks import Duplicates, Relevance
from st_fpsloss.losses.checks import Similarity
from st_fpsloss.losses.negative_strategy import Negatives, NegativeStrategy
from st_fpsloss.losses.pairwise import PairwiseLoss
from st_fpsloss.objectives.pairwise import Hinge


class TripletLoss(PairwiseLoss):
    """Hinge loss on pairs: a query's positive should be more similar to it than its negative, by a margin.

    ``max(0, margin - R(q, d⁺) + R(q, d⁻))``,

    the mean over all pairs of a row with r > 0 and one of its negatives. R is α times the dot product or the cosine.
    α is 1 and stays 1: a learned one would only rescale the margin, or collapse.

    Args:
        model: a two-tower model, as :func:`st_fpsloss.two_tower` makes it, or any SentenceTransformer.
        margin: the lead of the positive from which on a pair has no loss. Cosines lie between -1 and 1, so that with
            cosine a margin of 0.1 to 0.5 is usual.
        scale: α.
        learn_scale: learn α.
        max_scale: bound of α.
        negatives: ``"explicit"``: the negative columns of the row itself; ``"in_batch"``: every document column of
            every row of the batch; None: explicit where the batch has negative columns, else in-batch. Either way a
            document that was shown to the query and not clicked (a row with r ≤ 0) is a negative of that query.
        hardest: take only this many in-batch negatives of a row, those most similar to its query; None for all.
        semi_hard: take only in-batch negatives that are in the right order and within the margin,
            R⁺ - margin < R⁻ < R⁺: with the hardest of all, training from scratch can collapse.
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

    Inputs:
        +-------------------------------------------------+---------------------+
        | Inputs                                          | Labels              |
        +=================================================+=====================+
        | (query, document) clicks                        | none, or relevance  |
        +-------------------------------------------------+---------------------+
        | (query, document, negative_1, ..., negative_n)  | none, or relevance  |
        +-------------------------------------------------+---------------------+

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
        scale: float = 1.0,
        learn_scale: bool = False,
        max_scale: float = 100.0,
        negatives: Negatives | None = None,
        hardest: int | None = None,
        semi_hard: bool = False,
        relevance: Relevance = "mask",
        duplicates: Duplicates = "mask",
        known_positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]] | None = None,
        similarity: Similarity | None = None,
        mini_batch_num_tokens: int | None = None,
        cache_gradients: bool | int = False,
        gather_across_devices: bool = False,
    ) -> None:
        if not 0 < margin < float("inf"):
            raise ValueError(f"`margin` must be a finite number above 0, got {margin!r}.")
        super().__init__(
            model,
            NegativeStrategy(negatives, hardest, semi_hard),
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
