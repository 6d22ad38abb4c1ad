"""Which checkpoints are complete: found by what the last written file says of the others."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from st_fpsloss.batch.distributed import world_size

STATE_NAME = "LossStateCallback"
"""What transformers calls the callback's state in a checkpoint: the name of its class."""


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in ``output_dir`` that is complete, or None.

    A run that is killed while it saves leaves a broken newest folder, on which ``resume_from_checkpoint=True`` fails;
    killed while it removes an older checkpoint, it leaves half of that.

    Args:
        output_dir: the training arguments' ``output_dir``.

    Returns:
        Path for ``trainer.train(resume_from_checkpoint=...)``: of the highest step whose folder has the trainer's
        state, which is written last, every file that :class:`LossStateCallback` saw there, no file that is cut off,
        and no α that is not finite.
    """
    numbered = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdecimal() and _is_complete(folder):
            numbered.append((int(step), folder))
    return str(max(numbered)[1]) if numbered else None


def files_of(folder: Path) -> list[str]:
    """Names of the files of a checkpoint as the trainer is about to complete it."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if "rng_state_0.pth" in names:  # every rank writes one, and nobody waits for the others
        names |= {f"rng_state_{rank}.pth" for rank in range(world_size())}
    return sorted(names)


def _is_complete(folder: Path) -> bool:
    if not (folder / TRAINER_STATE_NAME).is_file():  # a pipe would be waited for
        return False
    try:
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        callback = state.stateful_callbacks.get(STATE_NAME)
        names = callback["attributes"].get("files", []) if callback is not None else []
        is_whole = all((folder / name).is_file() for name in names) and all(map(_is_whole, folder.rglob("*")))
        return is_whole and (callback is None or _is_finite(callback["attributes"]["losses"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # JSON, but of something else
        return False


def _is_finite(losses: dict[str, dict[str, Any]]) -> bool:
    return all(math.isfinite(state[name]) for state in losses.values() for name in ("logit_scale", "logit_bias"))


def _is_whole(path: Path) -> bool:
    """Whether a file that resuming reads is not cut off, as far as its format tells without reading all of it."""
    if path.suffix not in (".json", ".safetensors", ".pt", ".pth"):
        return True
    if not path.is_file():
        return path.is_dir()
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        else:
            return zipfile.is_zipfile(path)
    except (OSError, ValueError, RecursionError, SafetensorError):
        return False
    return True
