"""What goes wrong silently in training: figures of a loss while it trains, and sentences where something is off.

Figures are taken of one batch at each logging step and at a few early ones, from the embeddings that the loss has just
seen, on a few of its rows: training itself does no further work. :class:`st_fpsloss.LossStateCallback` logs them and
says the sentences.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from st_fpsloss.batch.clicks import ClickBatch, Direction, Duplicates, renumbered
from st_fpsloss.batch.negatives import Positives, explicit_negatives
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.losses.fps import FPSLoss
from st_fpsloss.losses.pairwise import PairwiseLoss
from st_fpsloss.losses.sampled_softmax import SampledSoftmaxLoss

_SAMPLED_ROWS = 64

# Sentences are said from here on. A healthy run is far from each of them.
_OFTEN_AT_BOUND = 0.1
_MANY_MASKED = 0.5
_OFTEN_IDLE = 0.5
_FEW_NEGATIVES, _OF_MANY = 2.0, 20


@dataclass
class LossDiagnostics:
    """Running means of the figures of a loss over the batches that were looked at.

    - ``alpha_at_bound``: share of these batches after which α stood at ``max_scale``.
    - ``without_positives``, ``without_negatives``: share of these batches that had no row with r > 0, or such rows but
      no negative for any of them. The loss then is constant. Not with SigmoidLoss, which learns from each by itself.
    - ``masked_share``: share of a row's columns, its own aside, that are no negatives of it.
    - ``repeated_rows``: share of the rows of all columns that repeat another one, and so were not encoded.
    - ``distinct_negatives``: different negatives of a row; ``effective_negatives``: how many equal ones would have the
      entropy of the weights that the softmax gives them. FPSLoss alone.
    - ``norm_popularity``: Spearman's correlation over a batch's distinct documents between the norm of the embedding
      and log Q. With a dot product and log Q alone.
    """

    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, figures: dict[str, float]) -> None:
        """Enter the figures of one more batch."""
        for name, value in figures.items():
            self._sums[name] += value
            self._counts[name] += 1

    def means(self) -> dict[str, float]:
        """The mean of each figure over the batches that had it."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}


@torch.no_grad()
def batch_statistics(loss: ClickLoss) -> dict[str, float]:
    """Figures of the batch that the loss has seen last, as :class:`LossDiagnostics` explains them."""
    if loss.last_batch is None:
        return {}
    queries, documents, batch = loss.last_batch
    figures = {
        "alpha_at_bound": float(loss.alpha >= loss.max_scale * (1 - 1e-6)),
        "repeated_rows": _repeated_rows(batch),
    }
    if isinstance(loss, (FPSLoss, SampledSoftmaxLoss, PairwiseLoss)):
        asks = bool((batch.relevance > 0).any())
        figures["without_positives"] = float(not asks)
        figures["without_negatives"] = float(asks and not _has_negatives(loss, batch))
    if loss.duplicates == "mask":
        figures["masked_share"] = _masked_share(batch)
    if isinstance(loss, FPSLoss):
        asking = (queries, documents) if "query_to_doc" in loss.directions else (documents, queries)
        figures |= _negatives(loss, *asking, batch)
    if loss.similarity == "dot" and batch.document_log_q is not None:
        correlation = _norm_popularity(documents, batch.document, batch.document_log_q)
        if correlation is not None:
            figures["norm_popularity"] = correlation
    return figures


def training_warnings(loss: ClickLoss, means: dict[str, float]) -> list[str]:
    """What is wrong with a training by the means of its figures; a sentence each, with its cure."""
    found = []
    at_bound = means.get("alpha_at_bound", 0.0)
    if loss.logit_scale.requires_grad and at_bound >= _OFTEN_AT_BOUND:
        found.append(
            f"α stood at its bound max_scale={loss.max_scale:g} at {at_bound:.0%} of the steps looked at. It minimises "
            "the training loss, not the ranking: compare with fixed ones on validation (scale=5, learn_scale=False), "
            'give it a lower rate (learning_rate_mapping={"logit_scale": 1e-4}), or raise `max_scale` if it helps.'
        )
    found += _empty_batch_warnings(means)
    distinct, effective = means.get("distinct_negatives", 0.0), means.get("effective_negatives", 0.0)
    if distinct >= _OF_MANY and effective < _FEW_NEGATIVES:
        found.append(
            f"A row learns from {effective:.1f} negatives of its {distinct:.0f}: the softmax looks at nothing but the "
            f"most similar one, which may be a positive that nobody clicked. Lower α (it is {loss.alpha:.3g}) by "
            "`scale`, `max_scale` or its learning rate."
        )
    return found


def _empty_batch_warnings(means: dict[str, float]) -> list[str]:
    """What batches lack that a loss could learn from."""
    found = []
    without_positives = means.get("without_positives", 0.0)
    if without_positives >= _OFTEN_IDLE:
        found.append(
            f"{without_positives:.0%} of the batches have no row with a label above 0: their loss is 0 and teaches "
            "nothing. A click has a label above 0, a document that was shown and not clicked one of 0 or below: check "
            "the labels, remove the column if every row is a click, and shuffle the log."
        )
    masked, without_negatives = means.get("masked_share", 0.0), means.get("without_negatives", 0.0)
    if masked >= _MANY_MASKED:
        found.append(
            f"{masked:.0%} of the columns are masked as positives of their row's query, and teach it nothing. Shuffle "
            "the log (sorted by query or by document, a batch has few of them), check that different queries (or "
            "documents) are not the same input, and that `known_positives` has clicks alone."
        )
    elif without_negatives >= _OFTEN_IDLE:
        found.append(
            f"{without_negatives:.0%} of the batches have no negative for any row: their loss is constant and teaches "
            "nothing. Raise per_device_train_batch_size, shuffle the log so that a batch has more than one document, "
            "or add columns of negatives (with_negatives)."
        )
    return found


def summary(loss: ClickLoss, means: dict[str, float]) -> str:
    """The figures of a training in one line."""
    learned = "learned" if loss.logit_scale.requires_grad else "fixed"
    parts = [f"{type(loss).__name__}: α {loss.alpha:.4g} ({learned}, at most {loss.max_scale:g})"]
    if "effective_negatives" in means:
        parts.append(f"{means['effective_negatives']:.1f} effective of {means['distinct_negatives']:.0f} negatives")
    if "masked_share" in means:
        parts.append(f"{means['masked_share']:.1%} of columns masked")
    if "repeated_rows" in means:
        parts.append(f"{means['repeated_rows']:.0%} of rows repeated and not encoded")
    if "norm_popularity" in means:
        parts.append(f"norms follow popularity by {means['norm_popularity']:.2f} (Spearman)")
    return ", ".join(parts) + "."


def _repeated_rows(batch: ClickBatch) -> float:
    num_rows = int((batch.query >= 0).sum() + (batch.document >= 0).sum())
    return 1 - (len(batch.query_fingerprints) + len(batch.document_fingerprints)) / max(1, num_rows)


def _masked_share(batch: ClickBatch) -> float:
    count = _counts(batch.document, len(batch.document_fingerprints))
    cells = batch.false_negatives()
    taken = count.new_zeros(len(batch.query_fingerprints)).index_add_(0, cells[0], count[cells[1]])
    rows = batch.query[batch.relevance > 0]
    num_others = float(count.sum()) - 1
    return float((taken[rows] - 1).mean()) / num_others if len(rows) and num_others else 0.0


def _has_negatives(loss: FPSLoss | SampledSoftmaxLoss | PairwiseLoss, batch: ClickBatch) -> bool:
    """Whether any row with r > 0 has a negative, in a batch that has such rows."""
    if isinstance(loss, FPSLoss):
        return any(_has_other_answers(batch, direction, loss.duplicates) for direction in loss.directions)
    if loss.strategy.is_explicit(len(batch.document)):
        return bool(explicit_negatives(batch, Positives.of(batch, loss.relevance), loss.duplicates).count.sum() > 0)
    return _has_other_answers(batch, "query_to_doc", loss.duplicates)


def _has_other_answers(batch: ClickBatch, direction: Direction, duplicates: Duplicates) -> bool:
    """Whether any row that asks has an in-batch negative."""
    asking, answering, cells = batch.query, batch.document, batch.false_negatives()
    if direction == "doc_to_query":
        asking, answering, cells = batch.document[0], batch.query, cells.flip(0)
    num_answers = len(torch.unique(answering[answering >= 0]))
    if duplicates == "keep":
        return num_answers > 1
    taken = torch.bincount(cells[0])[asking[batch.relevance > 0]]
    return bool((taken < num_answers).any())


def _negatives(loss: FPSLoss, asking: Tensor, answering: Tensor, batch: ClickBatch) -> dict[str, float]:
    """Distinct and effective negatives, the mean over some of the rows that ask in the first direction."""
    direction: Direction = "query_to_doc" if "query_to_doc" in loss.directions else "doc_to_query"
    anchors, targets = batch.softmax_targets(direction, loss.relevance, "mask", loss.log_q)
    step = max(1, len(anchors) // _SAMPLED_ROWS)
    sample = torch.arange(0, len(anchors), step, device=anchors.device)[:_SAMPLED_ROWS]
    dtype = torch.promote_types(answering.dtype, torch.float32)
    logits = loss.alpha * asking[anchors[sample]].to(dtype) @ answering.to(dtype).T
    logits += targets.candidate_log_weight.to(dtype)
    assert targets.false_negatives is not None
    row, candidate = renumbered(targets.false_negatives, sample, len(anchors))
    logits[row, candidate] = -torch.inf
    weights = logits.softmax(dim=1)
    entropy = torch.special.entr(weights).sum(dim=1)
    held = entropy.isfinite()  # a row without negatives has NaN
    if not held.any():
        return {}
    distinct = (logits > -torch.inf).sum(dim=1)[held].to(dtype)
    return {
        "distinct_negatives": float(distinct.mean()),
        "effective_negatives": float(entropy[held].exp().mean()),
    }


def _norm_popularity(documents: Tensor, index: Tensor, log_q: Tensor) -> float | None:
    held = index >= 0
    popularity = log_q.new_zeros(len(documents))
    popularity[index[held]] = log_q[held]  # columns of one document have one Q, or nearly so
    ranks = torch.stack([_ranks(documents.float().norm(dim=1)), _ranks(popularity)])
    if len(documents) < 2 or bool((ranks.std(dim=1) == 0).any()):
        return None
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks (N,), equal values with the mean of theirs."""
    _, inverse, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count - 1) / 2)[inverse]


def _counts(index: Tensor, size: int) -> Tensor:
    return torch.bincount(index[index >= 0], minlength=size).to(torch.float64)
