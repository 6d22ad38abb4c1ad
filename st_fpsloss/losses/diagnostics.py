"""What a loss tells of its training: settings that cannot work, figures of its batches, and what they warn of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor, nn
from transformers import TrainingArguments

from st_fpsloss.batch.clicks import ClickBatch, Duplicates, Relevance
from st_fpsloss.batch.distributed import world_size
from st_fpsloss.batch.known_positives import KnownPositives
from st_fpsloss.batch.statistics import masked_share, norm_popularity, repeated_rows
from st_fpsloss.losses.arguments import Similarity
from st_fpsloss.losses.scale import ScaledLoss

# Warnings begin here. A healthy run is far from each of them.
_OFTEN_AT_BOUND = 0.1
_MANY_MASKED = 0.5
_OFTEN_IDLE = 0.5
_LOW_COSINE_SCALE = 2.0


class DiagnosedLoss(ScaledLoss):
    """Base of the losses: checks before training, figures of batches, and warnings. A loss adds its own to each.

    :class:`st_fpsloss.LossStateCallback` calls them. Figures are taken from the embeddings that the loss has just seen,
    at each logging step and a few early ones: training itself does no further work.
    """

    model: SentenceTransformer
    similarity: Similarity
    relevance: Relevance
    duplicates: Duplicates
    known_positives: KnownPositives | None
    gather_across_devices: bool
    last_batch: tuple[Tensor, Tensor, ClickBatch] | None
    """Distinct queries (A, dim) and documents (B, dim) of the last training batch, and its clicks."""

    def check_setting(self, model: nn.Module | None, args: TrainingArguments, dataset: Any = None) -> None:
        """Refuse what would train nothing, or mask nothing, and look healthy.

        Args:
            model: the trainer's model, None where it is not known.
            args: the training arguments.
            dataset: the data set of the trainer's data loader.

        Raises:
            ValueError: If the loss was made for another model, has known positives while the arguments have prompts, or
                gathers over ranks that draw from several data sets.
        """
        if model is not None and _unwrapped(self.model) is not _unwrapped(model):
            kind = type(self).__name__
            raise ValueError(
                f"The `loss` ({kind}) was made for another model object than the trainer's: the optimizer would move "
                "the parameters of the one, and the gradients reach the other. Make the loss again from the trainer's "
                f"model, loss = {kind}(model, ...); in a notebook, run the cell of the loss, and those after it, "
                "whenever that of the model was run."
            )
        prompts = getattr(args, "prompts", None)
        if self.known_positives is not None and has_text(prompts):
            raise ValueError(
                f"`known_positives` are known by their inputs without prompts, and the training arguments have prompts="
                f"{prompts!r}: none would be recognised, and none masked. Leave out one of the two, or put the prompts "
                "into the texts themselves, those of the data set and those of `known_positives`."
            )
        if self._gathers and len(getattr(dataset, "datasets", ())) > 1:
            raise ValueError(
                "`gather_across_devices=True` needs one data set: of several, each rank draws by itself, so that one "
                "softmax would have rows of different ones. Pass gather_across_devices=False, or train one after the "
                "other."
            )

    @property
    def _gathers(self) -> bool:
        return self.gather_across_devices and world_size() > 1

    def setting_warnings(self, model: SentenceTransformer) -> list[str]:
        """What is wrong with the settings, known before training; a sentence each, with its cure."""
        searched = str(model.similarity_fn_name)
        if searched == self.similarity or _ends_normalised(model):
            return []
        return [
            f"The loss trains with the similarity {self.similarity!r}, and model.similarity_fn_name is {searched!r}, "
            "which RetrievalEvaluator, DocumentIndex and model.similarity use: they will rank by another one. Set "
            f"model.similarity_fn_name = {self.similarity!r} before training, or leave `similarity` off."
        ]

    @torch.no_grad()
    def batch_statistics(self) -> dict[str, float]:
        """Figures of the last batch, as :class:`st_fpsloss.training.diagnostics.LossDiagnostics` explains them."""
        if self.last_batch is None:
            return {}
        return self.statistics_of(*self.last_batch)

    def statistics_of(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> dict[str, float]:
        """Figures of a batch, from its distinct queries (A, dim) and documents (B, dim)."""
        figures = {
            "alpha_at_bound": float(self.alpha >= self.max_scale * (1 - 1e-6)),
            "repeated_rows": repeated_rows(batch),
        }
        negatives_exist = self.has_negatives(batch)
        if negatives_exist is not None:
            positives_exist = bool((batch.relevance > 0).any())
            figures["without_positives"] = float(not positives_exist)
            figures["without_negatives"] = float(positives_exist and not negatives_exist)
        if self.duplicates == "mask":
            figures["masked_share"] = masked_share(batch)
        if self.similarity == "dot" and batch.document_log_q is not None:
            correlation = norm_popularity(documents, batch)
            if correlation is not None:
                figures["norm_popularity"] = correlation
        return figures

    def has_negatives(self, batch: ClickBatch) -> bool | None:
        """Whether any row with r > 0 has a negative; None where the loss learns from rows without."""
        return None

    def training_warnings(self, means: Mapping[str, float]) -> list[str]:
        """What is wrong with a training by the means of its figures; a sentence each, with its cure."""
        at_bound = means.get("alpha_at_bound", 0.0)
        if not self.logit_scale.requires_grad or at_bound < _OFTEN_AT_BOUND:
            return _empty_batch_warnings(means)
        return [
            f"α stood at its bound max_scale={self.max_scale:g} at {at_bound:.0%} of the steps looked at. It minimises "
            "the training loss, not the ranking: compare with fixed ones on validation (scale=5, learn_scale=False), "
            'give it a lower rate (learning_rate_mapping={"logit_scale": 1e-4}), or raise `max_scale` if it helps.',
            *_empty_batch_warnings(means),
        ]

    def summary(self, means: Mapping[str, float]) -> str:
        """The figures of a training in one line."""
        learned = "learned" if self.logit_scale.requires_grad else "fixed"
        parts = [f"{type(self).__name__}: α {self.alpha:.4g} ({learned}, at most {self.max_scale:g})"]
        if "effective_negatives" in means:
            parts.append(f"{means['effective_negatives']:.1f} effective of {means['distinct_negatives']:.0f} negatives")
        if "masked_share" in means:
            parts.append(f"{means['masked_share']:.1%} of columns masked")
        if "repeated_rows" in means:
            parts.append(f"{means['repeated_rows']:.0%} of rows repeated and not encoded")
        if "norm_popularity" in means:
            parts.append(f"norms follow popularity by {means['norm_popularity']:.2f} (Spearman)")
        return ", ".join(parts) + "."


def flat_softmax_warnings(loss: ScaledLoss, similarity: Similarity) -> list[str]:
    """A softmax over cosines whose α is fixed too low to tell one document from the others."""
    alpha = loss.alpha
    if similarity != "cosine" or loss.logit_scale.requires_grad or alpha >= _LOW_COSINE_SCALE:
        return []
    return [
        f"α = {alpha:g} is fixed and the similarity is a cosine: in a softmax over 64 documents no click can get a "
        f"probability above {1 / (1 + 63 * math.exp(-2 * alpha)):.2f}. Leave `scale` off (it starts at 1/0.07), pass 5 "
        "or more, or let it learn."
    ]


def has_text(prompts: Any) -> bool:
    """Whether prompts, in whatever form the training arguments have them, put anything before any input."""
    return any(map(has_text, prompts.values())) if isinstance(prompts, Mapping) else bool(prompts)


def _empty_batch_warnings(means: Mapping[str, float]) -> list[str]:
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


def _ends_normalised(model: SentenceTransformer) -> bool:
    """Whether all embeddings have length 1, so that dot product and cosine are the same."""
    last = list(model)[-1]
    tails = [list(modules)[-1] for modules in last.sub_modules.values()] if isinstance(last, Router) else [last]
    return all(isinstance(tail, Normalize) for tail in tails)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that DistributedDataParallel, and then torch.compile, was given."""
    return extract_model_from_parallel(model, keep_torch_compile=False)
