"""The engine: features of a batch → unique rows → mini-batches sorted by length → embeddings.

A click log repeats its queries and documents, and its texts differ in length. Encoding every row in the order it came,
padded to its neighbours, is mostly repeated work and padding. Here each distinct row of a tower is encoded once, in
mini-batches of rows of about one length; the loss is then computed on unique rows (:mod:`st_fpsloss.objectives`).

With ``cache_gradients`` (Gao et al. 2021, https://arxiv.org/abs/2101.06983) only as many mini-batches as a budget
allows keep their graph; the others are embedded without one and once more in the backward pass, dropout replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from sentence_transformers.base.losses.gradcache import RandContext
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from st_fpsloss.prefix_rows import PrefixRows
from st_fpsloss.rows import Features, Rows

# A mini-batch is closed early where more than this share would be padding...
_MAX_PADDING = 0.05
# ... unless it is so small, as a share of the token budget, that the call costs more than the padding.
_MIN_FILL = 1 / 8

Encoder = Callable[[Features], Features]


@dataclass(frozen=True)
class BatchPlan:
    """What there is to encode, and where each row of the batch will find its embedding.

    Args:
        mini_batches: the distinct rows of the batch, all columns together, in mini-batches, which give N embeddings:
            one a row, or one an item of a whole history (:class:`st_fpsloss.prefix_rows.PrefixRows`).
        route_of: number of the tower of each mini-batch.
        index: (columns, M) position of each row's embedding among the N; -1 where it is not needed.
        keys: (N,) int64 identity of each embedding's row, the same in every batch and process.
    """

    mini_batches: list[Rows]
    route_of: list[int]
    index: Tensor
    keys: Tensor

    @classmethod
    def from_columns(
        cls, parts: Sequence[Rows], needed: Sequence[Tensor | None], mini_batch_num_tokens: int
    ) -> BatchPlan:
        """Plan the encoding of a batch.

        Args:
            parts: the rows of each column.
            needed: (M,) bool for each column, the rows that the loss will use; None for all.
            mini_batch_num_tokens: tokens, padding included, of one mini-batch.
        """
        sizes = [len(rows) for rows in parts]
        if len(set(sizes)) != 1:
            raise ValueError(f"All columns of a batch need the same number of rows, but they have {sizes}.")
        index = torch.full((len(parts), sizes[0]), -1, dtype=torch.int64, device=parts[0].lengths.device)
        mini_batches: list[Rows] = []
        route_of: list[int] = []
        keys: list[Tensor] = []
        num_rows = 0
        for route, numbers in enumerate(_by_route(parts)):
            wanted = [_positions(needed[number], sizes[0], index.device) for number in numbers]
            chosen = [
                parts[number] if len(rows) == sizes[0] else parts[number].select(rows)
                for number, rows in zip(numbers, wanted, strict=True)
            ]
            batches, position, row_keys = _plan_route(chosen, mini_batch_num_tokens)
            of_column = (position + num_rows).split([len(rows) for rows in wanted])
            for number, rows, found in zip(numbers, wanted, of_column, strict=True):
                index[number, rows] = found
            mini_batches += batches
            route_of += [route] * len(batches)
            keys.append(row_keys)
            num_rows += len(row_keys)
        return cls(mini_batches, route_of, index, torch.cat(keys))


def encode(model: Encoder, plan: BatchPlan) -> Tensor:
    """Embeddings (N, dim) of a plan, with the graph of all of them if gradients are on."""
    with _no_sync(model):
        embeddings = torch.cat([_embed(model, rows) for rows in plan.mini_batches])
    return _as_ddp_outputs(model, [embeddings])[0]


class CachedEncoding:
    """Embeddings as a leaf, and the second pass that carries its gradient into the encoders.

    Args:
        model: the encoders; wrapped in DistributedDataParallel or not.
        plan: what to encode.
        kept_num_tokens: mini-batches up to this many tokens, and the first of each tower in any case, keep their graph
            and are not embedded a second time.

    Example::

        encoding = CachedEncoding(model, plan, kept_num_tokens=2048)
        loss = objective(encoding.embeddings)        # any scalar of the leaf that leaves its gradient in .grad
        loss = encoding.attach(loss)                       # loss.backward() now reaches the encoders
    """

    def __init__(self, model: Encoder, plan: BatchPlan, kept_num_tokens: int) -> None:
        self._model = model
        self._plan = plan
        self._autocast = _AutocastState(plan.index.device.type)
        self._kept: dict[int, Tensor] = {}  # number of the mini-batch -> embeddings with their graph
        self._to_replay: dict[int, RandContext] = {}
        parts: list[Tensor] = []
        learns: dict[int, bool] = {}  # route -> whether its tower has anything to learn; its first mini-batch tells
        firsts = {plan.route_of.index(route) for route in plan.route_of}
        to_spare = kept_num_tokens - sum(_num_tokens(plan.mini_batches[number]) for number in firsts)
        for number, (rows, route) in enumerate(zip(plan.mini_batches, plan.route_of, strict=True)):
            size = 0 if number in firsts else _num_tokens(rows)
            with_graph = number in firsts or (learns[route] and size <= to_spare)
            random_state = RandContext(*rows.tensors.values())
            # Autocast caches a cast weight with or without its graph, whichever comes first: no pass without one may.
            with _no_sync(model), torch.set_grad_enabled(with_graph), self._autocast.restored(cache=with_graph):
                embedded = _embed(model, rows)
            learns.setdefault(route, embedded.requires_grad)
            if embedded.requires_grad:
                self._kept[number] = embedded
                to_spare -= size
            elif learns[route]:
                self._to_replay[number] = random_state
            parts.append(embedded.detach())
        self._sizes = [len(part) for part in parts]
        self.embeddings = torch.cat(parts).requires_grad_(any(learns.values()))

    def attach(self, loss: Tensor) -> Tensor:
        """The same loss, whose backward pass also sends the leaf's gradient through the encoders.

        Whatever the outer backward multiplies the loss by (gradient accumulation, a loss scaler) reaches them too.
        """
        if not self.embeddings.requires_grad:
            return loss
        return _Attached.apply(loss if loss.requires_grad else loss.detach().requires_grad_(), self)

    def backward(self, grad_output: Tensor) -> None:
        """Backpropagate ``grad_output`` times the leaf's gradient, a mini-batch at a time."""
        gradient = self.embeddings.grad
        if gradient is None:
            raise RuntimeError("The gradient cache is empty: a loss can be backpropagated once.")
        self.embeddings.grad = None
        gradients = (grad_output * gradient).split(self._sizes)
        distributed = isinstance(self._model, DistributedDataParallel)
        if not distributed:  # kept mini-batches free their memory before others are replayed
            self._backward_kept(gradients)
        for number in self._to_replay:
            torch.autograd.backward(self._replay(number), gradients[number])
        if distributed:
            # The reducer of DistributedDataParallel ends with the first backward that completes a bucket: what is
            # replayed accumulates without it, and what was kept, at least one mini-batch of each tower, comes last.
            self._backward_kept(gradients)

    def _backward_kept(self, gradients: Sequence[Tensor]) -> None:
        with torch.enable_grad():
            kept = _as_ddp_outputs(self._model, list(self._kept.values()))
        torch.autograd.backward(kept, [gradients[number] for number in self._kept])
        self._kept.clear()

    def _replay(self, number: int) -> Tensor:
        with (
            self._to_replay[number],
            _no_sync(self._model),
            torch.enable_grad(),
            self._autocast.restored(cache=True),
        ):
            return _embed(self._model, self._plan.mini_batches[number])


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, encoding: CachedEncoding) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.encoding = encoding
        return loss.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        ctx.encoding.backward(grad_output)
        return grad_output, None


class _AutocastState:
    """Autocast as it was at the forward pass, for a replay that runs in the backward pass, outside of it."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._enabled = torch.is_autocast_enabled(device_type)
        self._dtype = torch.get_autocast_dtype(device_type)

    def restored(self, cache: bool) -> AbstractContextManager[None]:
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._enabled, cache_enabled=cache)


class _Outputs(nn.Module):
    """Takes the place of a module whose outputs are there already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs


def _no_sync(model: Encoder) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _as_ddp_outputs(model: Encoder, embeddings: list[Tensor]) -> list[Tensor]:
    """Embeddings of several calls under ``no_sync`` as the outputs of one forward pass of DistributedDataParallel.

    At every call without ``no_sync``, DistributedDataParallel broadcasts buffers, which hangs where ranks differ in the
    number of mini-batches, and with ``find_unused_parameters=True``, the trainer's default, takes the other tower for
    unused, which crashes. Told of all mini-batches at once, it does neither.
    """
    if not isinstance(model, DistributedDataParallel) or not torch.is_grad_enabled():
        return embeddings
    module = model.module
    model.module = _Outputs(module)
    try:
        # Not model(...): MatryoshkaLoss puts a forward of its own into the model, for the calls with features.
        return DistributedDataParallel.forward(model, embeddings)
    finally:
        model.module = module


def _embed(model: Encoder, rows: Rows) -> Tensor:
    return model(rows.features())["sentence_embedding"]


def _num_tokens(rows: Rows) -> int:
    """Tokens, padding included, that have activations; a bag of tokens has those of one."""
    return len(rows) * (1 if rows.bag else max(1, int(rows.lengths.max())))


def _by_route(parts: Sequence[Rows]) -> Iterator[list[int]]:
    """Numbers of the columns that go through one tower, for each tower; a column of prefixes is always on its own."""
    routes: dict[Hashable, list[int]] = {}
    for number, rows in enumerate(parts):
        routes.setdefault(number if isinstance(rows, PrefixRows) else rows.route, []).append(number)
    yield from routes.values()


def _plan_route(columns: Sequence[Rows], num_tokens: int) -> tuple[list[Rows], Tensor, Tensor]:
    """Plan the encoding of columns that go through one tower.

    Returns:
        The mini-batches, the position of each row's embedding among all that they give, and (N,) the keys of those.
    """
    first, *others = columns
    if isinstance(first, PrefixRows) and not others:
        return _plan_prefixes(first, num_tokens)
    return _plan_rows(Rows.stack(columns), num_tokens)


def _plan_rows(rows: Rows, num_tokens: int) -> tuple[list[Rows], Tensor, Tensor]:
    first, inverse, keys = rows.unique()
    batches = _mini_batches(rows, first, num_tokens)
    order = torch.cat(batches) if batches else first
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    return [rows.select(first[batch]) for batch in batches], position[inverse], keys[order]


def _plan_prefixes(rows: PrefixRows, num_tokens: int) -> tuple[list[Rows], Tensor, Tensor]:
    first, inverse, keys = rows.unique()
    mini_batches, of_history, distinct = _plan_rows(rows.histories, num_tokens)
    # Each distinct history gives an embedding a prefix, one after the other.
    counts = torch.zeros_like(distinct)
    counts[of_history] = torch.bincount(rows.history, minlength=len(rows.histories))
    starts = counts.cumsum(0) - counts
    position = starts[of_history[rows.history]] + rows.place
    of_embedding = keys.new_empty(int(counts.sum()))
    of_embedding[position] = keys[inverse]
    # Prefixes that are equal, of different histories too, are one row with one embedding.
    return mini_batches, position[first[inverse]], of_embedding


def _positions(needed: Tensor | None, num_rows: int, device: torch.device) -> Tensor:
    return torch.arange(num_rows, device=device) if needed is None else needed.nonzero().flatten()


def _mini_batches(rows: Rows, distinct: Tensor, num_tokens: int) -> list[Tensor]:
    """Positions among the ``distinct`` rows of a tower, cut into mini-batches; none where there are no rows."""
    if rows.bag and len(distinct):
        # A bag of tokens has neither padding nor activations, and the gradient of each call is a whole table.
        return [torch.arange(len(distinct), device=distinct.device)]
    return _sorted_mini_batches(rows.lengths[distinct], num_tokens)


def _sorted_mini_batches(lengths: Tensor, num_tokens: int) -> list[Tensor]:
    """Cut rows, longest first (the most memory comes first), into mini-batches of at most ``num_tokens``."""
    order = torch.argsort(lengths, descending=True, stable=True)
    widths = lengths[order].clamp_min(1).tolist()
    cuts: list[int] = []
    begin, filled = 0, 0
    for end, length in enumerate(widths):
        padded = widths[begin] * (end + 1 - begin)
        wasteful = padded - filled - length > _MAX_PADDING * padded
        worth_a_call = padded - widths[begin] >= _MIN_FILL * num_tokens
        if end > begin and (padded > num_tokens or (wasteful and worth_a_call)):
            cuts.append(end)
            begin, filled = end, 0
        filled += length
    return list(order.tensor_split(cuts)) if widths else []
