"""Encoding a plan with its graph kept, or with gradients cached (GradCache).

With ``cache_gradients`` (Gao et al. 2021, https://arxiv.org/abs/2101.06983) only as many mini-batches as a budget
allows keep their graph; the others are embedded without one and once more in the backward pass, dropout replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from sentence_transformers.base.losses.gradcache import RandContext
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from st_fpsloss.encoding.histories import Reader, readers
from st_fpsloss.encoding.memory import GraphBudget
from st_fpsloss.encoding.plan import BatchPlan
from st_fpsloss.encoding.rows import Features, TokenizedRows

Encoder = Callable[[Features], Features]


def encode(model: Encoder, plan: BatchPlan) -> Tensor:
    """Embeddings (N, dim) of a plan, with the graph of all of them if gradients are on."""
    with _no_sync(model):
        parts = {
            number: _embed(model, plan.mini_batches[number]) for number in plan.order if number not in plan.readers
        }
        for number, reader in _readers(plan, parts).items():
            parts[number] = _embed(model, reader.rows, reader.documents)
        embeddings = _joined(parts)
    return _as_ddp_outputs(model, [embeddings])[0]


class CachedEncoding:
    """Embeddings as a leaf, and the second pass that carries its gradient into the encoders.

    Args:
        model: the encoders; wrapped in DistributedDataParallel or not.
        plan: what to encode.
        budget: mini-batches within this budget, and the first of each tower in any case, keep their graph and are not
            embedded a second time.

    Queries that read documents are embedded from leaves of their own, so that in the backward pass they come first, and
    what reaches these leaves joins the gradient of the documents' embeddings.

    Example::

        encoding = CachedEncoding(model, plan, TokenBudget(2048))
        loss = objective(encoding.embeddings)        # any scalar of the leaf that leaves its gradient in .grad
        loss = encoding.attach(loss)                       # loss.backward() now reaches the encoders
    """

    def __init__(self, model: nn.Module, plan: BatchPlan, budget: GraphBudget) -> None:
        self._model = model
        self._plan = plan
        self._autocast = _AutocastState(plan.index.device.type)
        self._kept: dict[int, Tensor] = {}  # number of the mini-batch -> embeddings with their graph
        self._to_replay: dict[int, RandContext] = {}
        self._readers: dict[int, Reader] = {}
        parts: dict[int, Tensor] = {}
        learns: dict[int, bool] = {}  # route -> whether its tower has anything to learn; its first mini-batch tells
        total = to_spare = budget.total(model, plan.index.device)
        for number in plan.order:
            if number in plan.readers and not self._readers:
                learned = any(learns.values())
                self._readers = {
                    number: replace(reader, documents=reader.documents.clone().requires_grad_(learned))
                    for number, reader in _readers(plan, parts).items()
                }
            rows, route = plan.mini_batches[number], plan.route_of[number]
            size, is_first = rows.num_tokens, route not in learns
            with_graph = is_first or (learns[route] and budget.cost(route, size) <= to_spare)
            random_state = RandContext(*rows.tensors.values())
            # Autocast caches a cast weight with or without its graph, whichever comes first: no pass without one may.
            with (
                _no_sync(model),
                torch.set_grad_enabled(with_graph),
                self._autocast.restored(cache=with_graph),
                budget.measured(model, route, size) if is_first else nullcontext(),
            ):
                embedded = self._embed(number)
            learns.setdefault(route, embedded.requires_grad)
            if embedded.requires_grad:
                self._kept[number] = embedded
                to_spare -= budget.cost(route, size)
            elif learns[route]:
                self._to_replay[number] = random_state
            parts[number] = embedded.detach()
        budget.log(len(self._kept), len(self._kept) + len(self._to_replay), total - to_spare)
        self._sizes = [len(parts[number]) for number in sorted(parts)]
        self.embeddings = _joined(parts).requires_grad_(any(learns.values()))

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
        gradient = grad_output * gradient
        gradients = gradient.split(self._sizes)  # views: they see what readers add
        others = [number for number in self._plan.order if number not in self._readers]
        if _ddp_of(self._model) is not None:
            # The reducer of DistributedDataParallel ends with the first backward that completes a bucket: what is
            # replayed accumulates without it, and what was kept, at least one mini-batch of each tower, comes last.
            self._peek_at_kept_readers(gradients)
            self._replay(self._readers, gradients)
            self._add_readers_gradients(gradient)
            self._replay(others, gradients)
            self._backward_kept(self._plan.order, gradients)
        else:  # kept mini-batches free their memory before others are replayed
            self._backward_kept(self._readers, gradients)
            self._replay(self._readers, gradients)
            self._add_readers_gradients(gradient)
            self._backward_kept(others, gradients)
            self._replay(others, gradients)
        self._readers.clear()

    def _backward_kept(self, numbers: Iterable[int], gradients: Sequence[Tensor]) -> None:
        numbers = [number for number in numbers if number in self._kept]
        if not numbers:
            return
        with torch.enable_grad():
            kept = _as_ddp_outputs(self._model, [self._kept.pop(number) for number in numbers])
        torch.autograd.backward(kept, [gradients[number] for number in numbers])

    def _peek_at_kept_readers(self, gradients: Sequence[Tensor]) -> None:
        """Carry gradients to the documents that kept mini-batches read, past the weights, whose turn comes later."""
        for number, reader in self._readers.items():
            if number in self._kept and reader.documents.requires_grad:
                (reader.documents.grad,) = torch.autograd.grad(
                    self._kept[number], reader.documents, gradients[number], retain_graph=True, allow_unused=True
                )

    def _add_readers_gradients(self, gradient: Tensor) -> None:
        for reader in self._readers.values():
            if reader.documents.grad is not None:
                gradient.index_add_(0, reader.positions, reader.documents.grad)
                reader.documents.grad = None

    def _replay(self, numbers: Iterable[int], gradients: Sequence[Tensor]) -> None:
        for number in numbers:
            if number not in self._to_replay:
                continue
            with (
                self._to_replay[number],
                _no_sync(self._model),
                torch.enable_grad(),
                self._autocast.restored(cache=True),
            ):
                embedded = self._embed(number)
            torch.autograd.backward(embedded, gradients[number])

    def _embed(self, number: int) -> Tensor:
        if number in self._readers:
            return _embed(self._model, self._readers[number].rows, self._readers[number].documents)
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
        """Autocast as it was; ``cache`` keeps the cast weights within the context."""
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._enabled, cache_enabled=cache)


class _Outputs(nn.Module):
    """Takes the place of a module whose outputs are there already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs


def _ddp_of(model: Encoder) -> DistributedDataParallel | None:
    """The model as DistributedDataParallel, around which ``torch_compile=True`` puts another wrapper."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def _no_sync(model: Encoder) -> AbstractContextManager[None]:
    ddp = _ddp_of(model)
    return nullcontext() if ddp is None else ddp.no_sync()


def _as_ddp_outputs(model: Encoder, embeddings: list[Tensor]) -> list[Tensor]:
    """Embeddings of several calls under ``no_sync`` as the outputs of one forward pass of DistributedDataParallel.

    At every call without ``no_sync``, DistributedDataParallel broadcasts buffers, which hangs where ranks differ in the
    number of mini-batches, and with ``find_unused_parameters=True``, the trainer's default, takes the other tower for
    unused, which crashes. Told of all mini-batches at once, it does neither.
    """
    ddp = _ddp_of(model)
    if ddp is None or not torch.is_grad_enabled():
        return embeddings
    module = ddp.module
    ddp.module = _Outputs(module)
    try:
        # Not ddp(...): MatryoshkaLoss puts a forward of its own into the model, for the calls with features.
        return DistributedDataParallel.forward(ddp, embeddings)
    finally:
        ddp.module = module


def _readers(plan: BatchPlan, parts: dict[int, Tensor]) -> dict[int, Reader]:
    """What each mini-batch that reads documents is embedded from, given the embeddings of all others."""
    if not plan.readers:
        return {}
    found = readers([plan.mini_batches[number] for number in plan.readers], _joined(parts))
    return dict(zip(plan.readers, found, strict=True))


def _joined(parts: dict[int, Tensor]) -> Tensor:
    return torch.cat([parts[number] for number in sorted(parts)])


def _embed(model: Encoder, rows: TokenizedRows, documents: Tensor | None = None) -> Tensor:
    embeddings = rows.embed(model, documents)
    # Else autocast hands one cast copy of a weight to all mini-batches, which sums their gradients in its precision.
    torch.clear_autocast_cache()
    return embeddings
