"""LossStateCallback: α, β and the other state of a loss, through everything that a training run does.

sentence-transformers trains the parameters of a loss and then forgets them: checkpoints lack them, ranks do not agree
on them, clipping does not reach them. This callback does the rest on the stock trainer.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from st_fpsloss.batch.distributed import world_size
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.model_card import record_losses, record_training, use_two_tower_card
from st_fpsloss.negatives.sampled import resample
from st_fpsloss.towers import freeze_unused_parameters
from st_fpsloss.training.checkpoints import files_of
from st_fpsloss.training.divergence import LossValues, check_weights, diverged
from st_fpsloss.training.encoder_check import EncoderCheck
from st_fpsloss.training.reporting import LossFigures, run_first, warn
from st_fpsloss.training.setting_checks import check_frequency_prompts, check_inputs, prompt_warnings

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
      Every ``report_to`` gets them.
    - Settings that cannot work are warned of when training begins, and what went wrong in it when it ends, with a
      summary at the level INFO.
    - A loss, an α or a weight that is not finite ends the run with an error, before it is saved or evaluated.
    - A run that is resumed after its last step trains no further.

    α uses the trainer's learning rate; ``learning_rate_mapping={"logit_scale": 1e-2}`` in the training arguments gives
    it one of its own. It is never weight-decayed.

    Args:
        loss: the loss given to the trainer, or the dictionary of losses by data set. Losses of other packages in the
            dictionary are left alone; so are those of the trainer's that the dictionary leaves out.
        max_grad_norm: clip the norm of the gradients of α and β together, which the trainer's own clipping does not
            reach; None does not clip.

    Raises:
        ValueError: If ``loss`` has no loss of this package, is not the trainer's or made for another model than the
            trainer's; if there is a second callback of this kind; if known positives or frequencies lack the prompts of
            the training arguments; or the run uses FSDP or DeepSpeed, or a checkpoint's state is of another loss.
        FloatingPointError: If training diverges.

    Example::

        loss = FPSLoss(model)
        trainer = SentenceTransformerTrainer(..., loss=loss, callbacks=[LossStateCallback(loss)])
    """

    def __init__(
        self, loss: nn.Module | Mapping[str, nn.Module] | None = None, max_grad_norm: float | None = None
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` must be above 0 or None, got {max_grad_norm!r}.")
        self._max_grad_norm = max_grad_norm
        self._losses = _click_losses(loss)
        for part in self._losses.values():
            part.has_state_callback = True
        self._figures = LossFigures(self._losses)
        self._values = LossValues(self._losses)
        self._encoder_check = EncoderCheck()
        self._folder: Path | None = None  # where a checkpoint of this step is saved
        self._finished: tuple[int, float | None] | None = None  # step and epoch of a run that is resumed after its end

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
        if isinstance(model, SentenceTransformer):
            use_two_tower_card(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Restore what the checkpoint holds that the run resumes from; refuse and warn of settings that cannot work."""
        run_first(self._figures)
        self._figures.reset()
        self._values.seen.clear()
        self._check_alone(state)
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        for name, loss in self._losses.items():
            loss.check_setting(model, args, dataset)
            check_frequency_prompts(getattr(loss, "frequencies", {}), args, kwargs.get("train_dataloader"))
            _check_optimized(name, loss, model, kwargs.get("optimizer"))
        check_inputs(dataset)
        if state.is_world_process_zero and isinstance(model, SentenceTransformer):
            for name, loss in self._losses.items():
                warn(name, loss.setting_warnings(model))
            warn("", prompt_warnings(args))
            if state.global_step == 0:
                warn("", self._encoder_check.before(model, dataset))
        self._finished = (state.global_step, state.epoch) if 0 < state.max_steps <= state.global_step else None
        if state.global_step > 0:
            self._resume(state)

    def _resume(self, state: TrainerState) -> None:
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
        """Average the gradients of α and β over ranks, end a run that diverged, then clip them."""
        if self._finished is not None:
            kwargs["optimizer"].zero_grad()  # a parameter without a gradient stays as it is
            return
        losses = list(dict.fromkeys(self._losses.values()))  # one loss may have several names
        for loss in losses:
            loss.share_over_ranks()
        parameters = [parameter for loss in losses for parameter in loss.scale_and_bias.parameters()]
        value = _average_gradients(parameters, self._values.take(parameters[0]))
        learned = {name: loss.logit_scale for name, loss in self._losses.items() if loss.logit_scale.grad is not None}
        gradients = [scale.grad for scale in learned.values() if scale.grad is not None]
        # Everything that is looked at in one tensor, and so one synchronisation with an accelerator.
        value, *read = torch.stack([value, *gradients, *learned.values()]).tolist()
        if not math.isfinite(value):
            raise diverged("the loss is not finite", args, state.global_step + 1)
        if not all(map(math.isfinite, read)) and not args.fp16:  # there the trainer leaves such a step out
            raise diverged("α or its gradient is not finite", args, state.global_step + 1)
        for name, gradient, log_alpha in zip(learned, read, read[len(learned) :], strict=False):
            self._figures.alpha_gradients[name] = gradient / math.exp(log_alpha)  # the optimizer's is by log α
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring α back to its bound."""
        for loss in self._losses.values():
            loss.clamp_()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the batches of early steps; prepare a checkpoint that is about to be written."""
        if self._finished is not None:
            # transformers takes a step before it looks whether it should: it changed no weight, and nobody hears of it.
            state.global_step, state.epoch = self._finished
            control.should_training_stop = True
            self._resume(state)
        else:
            self._figures.look(state.global_step)
        self._before_save(args, state, control, kwargs.get("model"))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare a checkpoint that is about to be written."""
        self._before_save(args, state, control, kwargs.get("model"))

    def _before_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None
    ) -> None:
        """Refuse to save or evaluate what diverged; mark a checkpoint that will be written over as incomplete."""
        if self._finished is not None:
            control.should_log = control.should_evaluate = control.should_save = False
        if model is not None and (control.should_save or control.should_evaluate):
            check_weights(model, self._losses, args, state.global_step)
        self._folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if control.should_save and args.should_save:
            # Left by an earlier run, it would vouch for a mixture of both runs' files if this one is killed.
            (self._folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            if isinstance(model, SentenceTransformer):
                record_losses(model, self._losses)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sum up, with warnings; after ``load_best_model_at_end``, give the loss the α of that step too."""
        if kwargs.get("model") is not None:
            check_weights(kwargs["model"], self._losses, args, state.global_step)
        trained = state.is_world_process_zero and bool(self._values.seen) and self._finished is None
        if trained:
            self._figures.sum_up()
            for name in sorted(set(self._losses) - self._values.seen):
                warn(
                    name, ["This loss has seen no batch. Is it the object that the trainer has, with rows to train on?"]
                )
            warn("", self._encoder_check.after(kwargs.get("model")))
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            path = Path(state.best_model_checkpoint) / TRAINER_STATE_NAME
            stored = json.loads(path.read_text(encoding="utf-8"))["stateful_callbacks"].get(type(self).__name__)
            if stored is not None:
                self._restore(stored)
        if trained:
            self._complete_card(kwargs)

    def _complete_card(self, kwargs: Mapping[str, Any]) -> None:
        model, loaders = kwargs.get("model"), [kwargs.get("train_dataloader"), kwargs.get("eval_dataloader")]
        if isinstance(model, SentenceTransformer):
            record_training(model, self._losses, *(getattr(loader, "dataset", None) for loader in loaders))

    def _check_alone(self, state: TrainerState) -> None:
        """Refuse a second callback: transformers stores both states as a list, which nothing can be restored from."""
        if isinstance(state.stateful_callbacks.get(type(self).__name__), list):
            raise ValueError(
                "`callbacks` has more than one LossStateCallback, or the checkpoint is of a run that had: such states "
                "cannot be restored. Pass one LossStateCallback with the dictionary of losses, "
                'LossStateCallback({"clicks": loss, "sales": other_loss}), the one that the trainer gets.'
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


def _click_losses(loss: nn.Module | Mapping[str, nn.Module] | None) -> dict[str, ClickLoss]:
    """The losses of this package by the names of their data sets."""
    given = dict(loss) if isinstance(loss, Mapping) else {"": loss}
    # MatryoshkaLoss and its like hold the loss that they modify.
    unwrapped = {name: getattr(part, "loss", part) for name, part in given.items()}
    found = {name: part for name, part in unwrapped.items() if isinstance(part, ClickLoss)}
    if not found:
        kinds = ", ".join(type(part).__name__ for part in unwrapped.values()) or "an empty dictionary"
        raise ValueError(
            f"`loss` must be a loss of st_fpsloss or a dictionary with one, got {kinds}. Pass the object that the "
            "trainer gets. (`restore_callback_states_from_checkpoint` rebuilds callbacks without it: leave it off, "
            "this callback restores the loss by itself.)"
        )
    return found


def _check_optimized(name: str, loss: ClickLoss, model: nn.Module | None, optimizer: Any) -> None:
    """Refuse a loss whose α the optimizer does not know: another object than the trainer's."""
    if model is None or optimizer is None:
        return
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    learned = [parameter for parameter in loss.scale_and_bias.parameters() if parameter.requires_grad]
    has_model = any(id(parameter) in known for parameter in model.parameters())  # layerwise optimizers hide theirs
    if has_model and learned and not any(id(parameter) in known for parameter in learned):
        raise ValueError(
            f"The `loss` of LossStateCallback{f', {name!r},' if name else ''} has an α that the optimizer does not "
            "have: it is another object than the trainer's loss, so that α would be neither learned nor saved. Make "
            "the loss once, and pass the same object to both: SentenceTransformerTrainer(..., loss=loss, "
            "callbacks=[LossStateCallback(loss)]). An optimizer of your own has to hold loss.parameters()."
        )


def _average_gradients(parameters: list[nn.Parameter], value: Tensor) -> Tensor:
    """Mean over ranks; a rank without a gradient counts as 0, a parameter that no rank has one for stays without.

    Returns:
        The sum of ``value`` () over ranks, which travels along.
    """
    if world_size() == 1:
        return value
    nothing = torch.zeros_like(parameters[0])
    gradients = [nothing if parameter.grad is None else parameter.grad for parameter in parameters]
    held = [nothing if parameter.grad is None else nothing + 1 for parameter in parameters]
    packed = torch.stack([*gradients, *held, value])
    dist.all_reduce(packed)
    sums, holders = packed[:-1].split(len(parameters))
    for parameter, total, holder in zip(parameters, sums, holders, strict=True):
        parameter.grad = total / world_size() if holder > 0 else None
    return packed[-1]
