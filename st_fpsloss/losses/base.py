"""What all losses share: the model and its columns, α and β, relevance, and the way through the encoding engine."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate.utils import extract_model_from_parallel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator, ForwardDecorator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from st_fpsloss.batch.clicks import ClickBatch, Duplicates, Relevance
from st_fpsloss.batch.distributed import Exchange, gather_clicks, world_size
from st_fpsloss.batch.encoded import EncodedClicks, check_shape, unique_by_id
from st_fpsloss.batch.known_positives import KnownPositives
from st_fpsloss.encoding.frozen import FrozenEncoderCache
from st_fpsloss.encoding.gradient_cache import CachedEncoding, encode
from st_fpsloss.encoding.memory import GraphBudget, MemoryBudget, TokenBudget
from st_fpsloss.encoding.plan import BatchPlan
from st_fpsloss.encoding.prefixes import rows_of_column
from st_fpsloss.encoding.rows import Features, TokenizedRows, routes_by_task
from st_fpsloss.losses.arguments import CacheFrozen, CacheGradients, Pairs, Similarity, complete
from st_fpsloss.losses.checks import (
    check_cache_frozen,
    check_cache_gradients,
    check_choice,
    check_embeddings,
    check_layers,
    check_model,
    check_relevance,
    similarity_of,
)
from st_fpsloss.losses.diagnostics import DiagnosedLoss
from st_fpsloss.utils.checks import positive_int

logger = logging.getLogger(__name__)

# Padded tokens a mini-batch. A CPU is as fast at 2048 as at 16384 and needs an eighth of the memory.
_NUM_TOKENS_CPU = 2048
_NUM_TOKENS_ACCELERATOR = 32768


class ClickLoss(DiagnosedLoss, ABC):
    """Base of the losses on click logs: columns query, document, any number of negative documents, and a label r.

    A subclass says what is to be learned from unique embeddings (:meth:`objective`) and which rows it needs
    (:meth:`needed_rows`); encoding them, once each, is done here.
    """

    uses_gradient_cache: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        complete(cls)

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        bias: float,
        learn_bias: bool,
        scale: float | None = None,
        learn_scale: bool = True,
        max_scale: float = 100.0,
        relevance: Relevance = "mask",
        duplicates: Duplicates = "mask",
        known_positives: Pairs | None = None,
        similarity: Similarity | None = None,
        mini_batch_num_tokens: int | None = None,
        cache_gradients: CacheGradients = "auto",
        cache_frozen: CacheFrozen = False,
        gather_across_devices: bool = False,
    ) -> None:
        check_model(model)
        similarity = similarity_of(model, similarity)
        if scale is None:
            scale = 1 / 0.07 if similarity == "cosine" else 1.0
        super().__init__(scale, bias, learn_scale, learn_bias, max_scale)
        self.model = model
        self.similarity = similarity
        check_choice("relevance", relevance, get_args(Relevance))
        check_choice("duplicates", duplicates, get_args(Duplicates))
        if known_positives is not None and duplicates == "keep":
            raise ValueError("`known_positives` needs `duplicates='mask'`: 'keep' masks nothing.")
        if mini_batch_num_tokens is not None:
            mini_batch_num_tokens = positive_int("mini_batch_num_tokens", mini_batch_num_tokens)
        self.relevance = relevance
        self.duplicates = duplicates
        self.known_positives = None if known_positives is None else KnownPositives(model, known_positives)
        self.mini_batch_num_tokens = mini_batch_num_tokens
        check_cache_gradients(cache_gradients)
        self.cache_gradients = cache_gradients
        self.uses_gradient_cache = cache_gradients is not False  # read by MatryoshkaLoss
        self._memory_budget = MemoryBudget()
        check_cache_frozen(cache_frozen)
        self.cache_frozen = cache_frozen
        self._frozen_encoders: FrozenEncoderCache | None = None
        if cache_frozen is not False:
            self._frozen_encoders = FrozenEncoderCache(None if cache_frozen is True else Path(cache_frozen))
        self.gather_across_devices = gather_across_devices
        self.has_state_callback = False  # LossStateCallback sets it
        self.last_batch = None  # and looks at this, now and then
        self._warned_of_matryoshka = False
        self._routes_by_task = routes_by_task(model)

    @abstractmethod
    def objective(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """The loss (a scalar) of unique embeddings (A, dim) and (B, dim) under the clicks of a batch."""

    def check_batch(self, num_columns: int, labels: Tensor | None) -> None:
        """Raise a ValueError if the loss has nothing to learn from batches of this form."""

    def needed_rows(self, relevance: Tensor, columns: Sequence[TokenizedRows]) -> list[Tensor | None]:
        """For each column, the (M,) bool rows whose embeddings the loss uses; None for all."""
        return [None] * len(columns)

    def extra_candidates(self) -> list[TokenizedRows]:
        """Documents beside those of the batch, in columns of any number of rows."""
        return []

    def add_corrections(self, batch: ClickBatch) -> ClickBatch:
        """Add to a batch what the loss knows of its rows from elsewhere (known positives, log Q)."""
        if self.known_positives is None:
            return batch
        return replace(
            batch, known_positives=self.known_positives.among(batch.query_fingerprints, batch.document_fingerprints)
        )

    def share_over_ranks(self) -> None:
        """What ranks tell each other after a step, which every rank calls, whatever data set it drew from."""

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch as the trainer collates it.

        Args:
            sentence_features: one dictionary a column: query, document, negative documents.
            labels: (M,) relevance of each row, or None if every row is a click.

        Returns:
            Scalar loss.

        Raises:
            ValueError: If there are fewer than two columns, a column goes to the wrong tower, or the labels are not
                one finite number a row.
        """
        columns = [rows_of_column(features) for features in sentence_features]
        self._check_columns(columns)
        check_layers(extract_model_from_parallel(self.model, keep_torch_compile=False))
        self.check_batch(len(columns), labels)
        self._warn_without_callback()
        self._warn_of_matryoshka()
        self.clamp_()
        relevance = check_relevance(labels, len(columns[0]), columns[0].lengths.device, self._dtype)
        num_tokens = self._num_tokens(relevance.device)
        needed = self.needed_rows(relevance, columns)
        needed = [_at_least_one(rows) if number < 2 else rows for number, rows in enumerate(needed)]
        extra = self.extra_candidates()
        plan = BatchPlan.from_columns([*columns, *extra], [*needed, *[None] * len(extra)], num_tokens)
        if self._frozen_encoders is not None:
            plan = self._frozen_encoders.apply(self.model, plan, num_tokens)
        clicks = EncodedClicks.from_plan(plan, relevance, len(columns))
        if self._gathers:
            clicks = clicks.gathered()
        clicks = replace(clicks, batch=self.add_corrections(clicks.batch))
        if self.uses_gradient_cache and torch.is_grad_enabled():
            encoding = CachedEncoding(self.model, plan, self._graph_budget(num_tokens))
            return encoding.attach(self.calculate_loss([[encoding.embeddings]], clicks, with_backward=True))
        return self.calculate_loss([[encode(self.model, plan)]], clicks)

    def calculate_loss(self, reps: list[list[Tensor]], clicks: EncodedClicks, *, with_backward: bool = False) -> Tensor:
        """The loss of encoded rows; the seam at which sentence-transformers' MatryoshkaLoss truncates cached ones.

        Args:
            reps: the (N, dim) embeddings of the batch's distinct rows, in a list of one list.
            clicks: where each query and document finds its embedding, and who clicked what.
            with_backward: fill in the embeddings' ``.grad``, and return a loss whose graph holds α and β alone, so
                that whatever multiplies the loss multiplies their gradients.
        """
        ((embeddings,),) = reps
        queries, documents = embeddings[clicks.query_rows], embeddings[clicks.document_rows]
        loss = self._loss(queries, documents, clicks.batch, clicks.exchange)
        if not with_backward or not embeddings.requires_grad:
            return loss
        learned = [parameter for parameter in self.scale_and_bias.parameters() if parameter.requires_grad]
        embeddings.grad, *gradients = torch.autograd.grad(loss, [embeddings, *learned], allow_unused=True)
        return _WithGradients.apply(loss.detach(), gradients, *learned)

    def compute_loss_from_embeddings(
        self,
        embeddings: Sequence[Tensor],
        labels: Tensor | None = None,
        query_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        document_log_q: Tensor | None = None,
        query_log_q: Tensor | None = None,
    ) -> Tensor:
        """The loss of ready embeddings.

        Args:
            embeddings: (M, dim) tensors in the order of the columns: query, document, negative documents.
            labels: (M,) relevance r; None if every row is a click.
            query_ids: (M,) int64, equal for equal queries; None if all are different. Rows with one id share one
                embedding, that of the first, which receives the sum of their gradients.
            document_ids: (columns - 1, M) int64, likewise, over all document columns.
            document_log_q: (columns - 1, M) log probability that one draw of a column is this document. It is
                subtracted after α: pass it as it is, neither scaled nor negated.
            query_log_q: (M,) the same for queries.

        Returns:
            Scalar loss.

        Raises:
            ValueError: If there are fewer than two columns, or a shape does not fit.
        """
        check_embeddings(embeddings)
        self.check_batch(len(embeddings), labels)
        num_rows, num_documents = len(embeddings[0]), len(embeddings) - 1
        device = embeddings[0].device
        dtype = torch.promote_types(embeddings[0].dtype, torch.float32)
        relevance = check_relevance(labels, num_rows, device, dtype)
        queries, query, query_fingerprints = unique_by_id(embeddings[:1], query_ids, "query_ids")
        documents, document, document_fingerprints = unique_by_id(embeddings[1:], document_ids, "document_ids")
        check_shape("document_log_q", document_log_q, (num_documents, num_rows))
        check_shape("query_log_q", query_log_q, (num_rows,))
        batch = ClickBatch(
            query[0], document, relevance, query_fingerprints, document_fingerprints, query_log_q, document_log_q
        )
        if not self._gathers:
            return self._loss(queries, documents, batch)
        return self._loss(queries, documents, *gather_clicks(batch))

    def _loss(self, queries: Tensor, documents: Tensor, batch: ClickBatch, exchange: Exchange | None = None) -> Tensor:
        dtype = torch.promote_types(queries.dtype, batch.relevance.dtype)
        if dtype != batch.relevance.dtype:  # counts and weights are as precise as the embeddings
            batch = replace(batch, relevance=batch.relevance.to(dtype))
        if self.similarity == "cosine":
            queries, documents = normalize(queries, dim=-1), normalize(documents, dim=-1)
        if exchange is not None:
            queries, documents = exchange.gather(queries, documents)
        if self.training and torch.is_grad_enabled():
            self.last_batch = queries.detach(), documents.detach(), batch
        if exchange is None:
            return self.objective(queries, documents, batch)
        return self.objective(queries, documents, batch) * world_size()

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {
            **super().get_config_dict(),
            "relevance": self.relevance,
            "duplicates": self.duplicates,
            "similarity": self.similarity,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
            "cache_gradients": self.cache_gradients,
            "cache_frozen": self.cache_frozen if isinstance(self.cache_frozen, bool) else str(self.cache_frozen),
            "gather_across_devices": self.gather_across_devices,
        }

    def _graph_budget(self, mini_batch_num_tokens: int) -> GraphBudget:
        if self.cache_gradients == "auto":
            return self._memory_budget
        return TokenBudget(mini_batch_num_tokens if self.cache_gradients is True else self.cache_gradients)

    @property
    def _dtype(self) -> torch.dtype:
        """Of relevance, counts and log Q: float32, in a float64 model float64."""
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    def _num_tokens(self, device: torch.device) -> int:
        default = _NUM_TOKENS_CPU if device.type == "cpu" else _NUM_TOKENS_ACCELERATOR
        return self.mini_batch_num_tokens or default

    def _warn_without_callback(self) -> None:
        if self.training and self.logit_scale.requires_grad and not self.has_state_callback:
            self.has_state_callback = True  # warn once
            logger.warning(
                "α is learned, but nothing saves it: add `callbacks=[LossStateCallback(loss)]` to the trainer, or pass "
                "`learn_scale=False`. Without the callback a resumed run starts again from the first α, and with "
                "several processes each learns an α of its own."
            )

    def _warn_of_matryoshka(self) -> None:
        """MatryoshkaLoss normalises every embedding that it cuts, those of all dimensions too."""
        decorators = (vars(self).get("calculate_loss"), vars(self.model).get("forward"))
        if self._warned_of_matryoshka or self.similarity == "cosine":
            return
        if any(isinstance(one, (CachedLossDecorator, ForwardDecorator)) for one in decorators):
            self._warned_of_matryoshka = True
            logger.warning(
                "MatryoshkaLoss normalises embeddings, so that this loss with similarity='dot' trains a cosine, at α = "
                "%.3g, and the model ranks by the dot product. Build the model with similarity='cosine' (α then starts "
                "at 1/0.07), or train without MatryoshkaLoss.",
                self.alpha,
            )

    def _check_columns(self, columns: Sequence[TokenizedRows]) -> None:
        if len(columns) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least the columns query and document, but the data set has "
                f"{len(columns)} input column(s)."
            )
        sizes = [len(rows) for rows in columns]
        if len(set(sizes)) != 1:
            raise ValueError(f"All columns of a batch need the same number of rows, but they have {sizes}.")
        if not self._routes_by_task:
            return
        for number, rows in enumerate(columns):
            task, wanted = rows.metadata.get("task"), "document" if number else "query"
            if task != wanted:
                raise ValueError(
                    f"Input column {number + 1} goes to the tower {task!r}, but {type(self).__name__} takes it as a "
                    f"{wanted}. Set `router_mapping` in the training arguments so that the first column maps to "
                    '"query" and every other one to "document", and check the order of the columns.'
                )


def _at_least_one(needed: Tensor | None) -> Tensor | None:
    """No batch may skip a tower: DistributedDataParallel waits for every one, and a loss needs a graph to hang on."""
    if needed is None or bool(needed.any()):
        return needed
    needed = needed.clone()
    needed[0] = True
    return needed


class _WithGradients(torch.autograd.Function):
    """A loss with the gradients of its parameters ready: backward multiplies them by what comes in."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor | None], *parameters: nn.Parameter) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        scaled = (None if gradient is None else grad_output * gradient for gradient in ctx.gradients)
        return (None, None, *scaled)
