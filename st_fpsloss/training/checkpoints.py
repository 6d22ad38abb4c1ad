"""Which checkpoints are complete: found by what the last written file says of the others."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
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
        state, which is written last, every file that :class:`LossStateCallback` saw there, and no file that is cut off.
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
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    callback = state.get("stateful_callbacks", {}).get(STATE_NAME)
    names = callback["attributes"].get("files", []) if callback else []
    return all((folder / name).is_file() for name in names) and all(_is_whole(path) for path in folder.rglob("*"))


def _is_whole(path: Path) -> bool:
    """Whether a file that resuming reads is not cut off, as far as its format tells without reading all of it."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth"):
            return zipfile.is_zipfile(path)
    except (OSError, ValueError, SafetensorError):
        return False
    return True
