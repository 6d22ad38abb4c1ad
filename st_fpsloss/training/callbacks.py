"""LossStateCallback: α, β and the other state of a loss, through everything that a training run does.

sentence-transformers trains the parameters of a loss and then forgets them: checkpoints lack them, ranks do not agree
on them, clipping does not reach them. This callback does the rest on the stock trainer.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from st_fpsloss.batch.distributed import world_size
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.negatives.sampled import resample
from st_fpsloss.towers import freeze_unused_parameters
from st_fpsloss.training.checkpoints import files_of
from st_fpsloss.training.diagnostics import LossDiagnostics
from st_fpsloss.training.encoder_check import EncoderCheck
from st_fpsloss.training.setting_checks import check_inputs, prompt_warnings

logger = logging.getLogger(__name__)

# How `accelerate launch` asks for it; the training arguments do not say.
_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


class LossStateCallback(TrainerCallback, ExportableState):
    """Saves, restores, clamps, averages over ranks and logs what a loss has learned.

    - α, β and frequency tables are part of every checkpoint (in ``trainer_state.json``, which is written before a
      checkpoint is pushed and before older ones are removed), are restored on resume, and by
      ``load_best_model_at_end``.
    - After each step α is brought back to at most ``max_scale``.
    - With several processes, the gradients of α and β are averaged over ranks, as DistributedDataParallel does it for
      the encoders. Without this callback, ranks learn different α.
    - A trainable pooler that nobody reads (a saved model has one, once it is loaded again) is frozen: with
      ``ddp_find_unused_parameters=False`` it would stop DistributedDataParallel.
    - ``loss/alpha``, ``loss/temperature``, ``loss/beta`` and ``loss/alpha_grad`` are logged beside the training loss,
      and figures of the batch at hand: ``loss/masked_share``, ``loss/effective_negatives`` and the others that
      :class:`st_fpsloss.training.diagnostics.LossDiagnostics` explains.
    - Settings that cannot work are warned of when training begins, and what went wrong in it when it ends, with a
      summary at the level INFO.

    α uses the trainer's learning rate; ``learning_rate_mapping={"logit_scale": 1e-2}`` in the training arguments gives
    it one of its own. It is never weight-decayed.

    Args:
        loss: the loss given to the trainer, or the dictionary of losses by data set.
        max_grad_norm: clip the norm of the gradients of α and β together, which the trainer's own clipping does not
            reach; None does not clip.

    Raises:
        ValueError: If ``loss`` is no loss of this package, not the trainer's or made for another model than the
            trainer's; if there is a second callback of this kind, or known positives meet prompts; or the run uses FSDP
            or DeepSpeed, or a checkpoint's state belongs to another loss.

    Example::

        loss = FPSLoss(model)
        trainer = SentenceTransformerTrainer(..., loss=loss, callbacks=[LossStateCallback(loss)])
    """

    def __init__(
        self, loss: ClickLoss | Mapping[str, ClickLoss] | None = None, max_grad_norm: float | None = None
    ) -> None:
        losses = dict(loss) if isinstance(loss, Mapping) else {"": loss}
        self._losses: dict[str, ClickLoss] = {}
        for name, part in losses.items():
            part = getattr(part, "loss", part)  # MatryoshkaLoss and its like hold the loss that they modify
            if not isinstance(part, ClickLoss):
                raise ValueError(
                    f"`loss` must be a loss of st_fpsloss or a dictionary of them, got {type(part).__name__}. Pass the "
                    "object that the trainer gets. (`restore_callback_states_from_checkpoint` rebuilds callbacks "
                    "without it: leave it off, this callback restores the loss by itself.)"
                )
            part.has_state_callback = True
            self._losses[name] = part
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` must be above 0 or None, got {max_grad_norm!r}.")
        self._max_grad_norm = max_grad_norm
        self._last_gradient: dict[str, float] = {}
        self._encoder_check = EncoderCheck()
        self._forget_figures()
        self._folder: Path | None = None  # where a checkpoint of this step is saved

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint's ``trainer_state.json``, the last file that the trainer writes."""
        return {
            "args": {},
            "attributes": {
                "losses": {name: loss.export_state() for name, loss in self._losses.items()},
                "files": [] if self._folder is None else files_of(self._folder),
            },
        }

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the setting, and freeze what no gradient reaches."""
        if args.deepspeed or args.fsdp or any(os.environ.get(name, "").lower() == "true" for name in _SHARDING):
            raise ValueError(
                "The losses of st_fpsloss support one process and DistributedDataParallel. FSDP and DeepSpeed shard "
                "the encoders that a loss replays and do not reduce the loss's own parameters; train without `fsdp` "
                "and `deepspeed`, in the training arguments as in the configuration of `accelerate launch`."
            )
        frozen = [] if model is None else freeze_unused_parameters(model)
        if frozen:
            logger.info("No output depends on %s: frozen.", ", ".join(frozen))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Restore what the checkpoint holds that the run resumes from; refuse and warn of settings that cannot work."""
        self._forget_figures()
        self._check_alone(state)
        for loss in self._losses.values():
            loss.check_setting(model, args)
        check_inputs(getattr(kwargs.get("train_dataloader"), "dataset", None))
        if state.is_world_process_zero and isinstance(model, SentenceTransformer):
            for name, loss in self._losses.items():
                _warn(name, loss.setting_warnings(model))
            _warn("", prompt_warnings(args))
            if state.global_step == 0:
                log = getattr(kwargs.get("train_dataloader"), "dataset", None)
                _warn("", self._encoder_check.before(model, log))
        if state.global_step == 0:
            return
        stored = state.stateful_callbacks.get(type(self).__name__)
        if stored is None:
            logger.warning(
                "The checkpoint has no state of the loss: it was saved without LossStateCallback. α starts again at "
                "%s, and frequencies are counted anew.",
                ", ".join(f"{loss.alpha:.4g}" for loss in self._losses.values()),
            )
            return
        self._restore(stored)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the negatives of :func:`st_fpsloss.negatives.sampled.with_negatives` anew."""
        if kwargs.get("train_dataloader") is not None:
            resample(kwargs["train_dataloader"].dataset, int(state.epoch or 0))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average the gradients of α and β over ranks, then clip them."""
        parameters = [parameter for loss in self._losses.values() for parameter in loss.scale_and_bias.parameters()]
        _average_gradients(parameters)
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        for name, loss in self._losses.items():
            gradient = loss.logit_scale.grad
            if gradient is not None:  # by α, not by log α that the optimizer sees
                self._last_gradient[name] = gradient.item() / loss.alpha

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring α back to its bound."""
        for loss in self._losses.values():
            loss.clamp_()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the batches of early steps; mark a checkpoint that is about to be written over as incomplete."""
        self._check_batch_seen()
        if state.global_step & (state.global_step - 1) == 0:
            for name, loss in self._losses.items():
                self._early[name].add(loss.batch_statistics())
        self._mark_checkpoint(args, state, control)

    def _mark_checkpoint(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        self._folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if control.should_save and args.should_save:
            # Left by an earlier run, it would vouch for a mixture of both runs' files if this one is killed.
            (self._folder / TRAINER_STATE_NAME).unlink(missing_ok=True)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark a checkpoint that is about to be written over as incomplete."""
        self._mark_checkpoint(args, state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add α, β and the figures of the last batch to the entries of the training loss."""
        if logs is None or "loss" not in logs:
            return
        for name, loss in self._losses.items():
            prefix = f"loss/{name}/" if name else "loss/"
            values = {"alpha": loss.alpha, "temperature": loss.temperature, "beta": loss.beta}
            if name in self._last_gradient:
                values["alpha_grad"] = self._last_gradient[name]
            figures = loss.batch_statistics()
            self._diagnostics[name].add(figures)
            loss.last_batch = None
            values |= figures
            entries = {prefix + key: value for key, value in values.items()}
            logs.update(entries)
            if state.log_history:
                state.log_history[-1].update(entries)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sum up, with warnings; after ``load_best_model_at_end``, give the loss the α of that step too."""
        if state.is_world_process_zero:
            for name, loss in self._losses.items():
                means = self._diagnostics[name].means() or self._early[name].means()
                logger.info("%s%s", f"{name}: " if name else "", loss.summary(means))
                _warn(name, loss.training_warnings(means))
            _warn("", self._encoder_check.after(kwargs.get("model")))
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        path = Path(state.best_model_checkpoint) / TRAINER_STATE_NAME
        stored = json.loads(path.read_text(encoding="utf-8"))["stateful_callbacks"].get(type(self).__name__)
        if stored is not None:
            self._restore(stored)

    def _forget_figures(self) -> None:
        self._diagnostics = {name: LossDiagnostics() for name in self._losses}
        # Of the steps 1, 2, 4, 8, ...: for a run that ends before it logs.
        self._early = {name: LossDiagnostics() for name in self._losses}
        self._batch_seen = False
        for loss in self._losses.values():
            loss.last_batch = None

    def _check_alone(self, state: TrainerState) -> None:
        """Refuse a second callback: transformers stores both states as a list, which nothing can be restored from."""
        if isinstance(state.stateful_callbacks.get(type(self).__name__), list):
            raise ValueError(
                "`callbacks` has more than one LossStateCallback, or the checkpoint is of a run that had: such states "
                "cannot be restored. Pass one LossStateCallback with the dictionary of losses, "
                'LossStateCallback({"clicks": loss, "sales": other_loss}), the one that the trainer gets.'
            )

    def _check_batch_seen(self) -> None:
        """Refuse, after the first step, a loss that is not the trainer's."""
        if self._batch_seen:
            return
        self._batch_seen = True
        if all(loss.training and loss.last_batch is None for loss in self._losses.values()):
            raise ValueError(
                "The `loss` of LossStateCallback has seen no batch of the first step: it is another object than the "
                "trainer's loss, so that α would be neither saved nor logged. Make the loss once, and pass the same "
                "object to both: SentenceTransformerTrainer(..., loss=loss, callbacks=[LossStateCallback(loss)])."
            )

    def _restore(self, stored: dict[str, Any]) -> None:
        states = stored["attributes"]["losses"]
        if set(states) != set(self._losses):
            raise ValueError(
                f"The checkpoint holds the state of the losses {sorted(states)}, `loss` has {sorted(self._losses)}. "
                "Resume with the losses that the run was started with."
            )
        for name, loss in self._losses.items():
            loss.import_state(states[name])


def _warn(name: str, sentences: list[str]) -> None:
    for sentence in sentences:
        logger.warning("%s%s", f"{name}: " if name else "", sentence)


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Mean over ranks; a rank without a gradient counts as 0, a parameter that no rank has one for stays without."""
    if world_size() == 1:
        return
    nothing = torch.zeros_like(parameters[0])
    gradients = [nothing if parameter.grad is None else parameter.grad for parameter in parameters]
    held = [nothing if parameter.grad is None else nothing + 1 for parameter in parameters]
    packed = torch.stack([*gradients, *held])
    dist.all_reduce(packed)
    sums, holders = packed.split(len(parameters))
    for parameter, total, holder in zip(parameters, sums, holders, strict=True):
        parameter.grad = total / world_size() if holder > 0 else None
