"""Training runs for processes that are killed, or watched at every moment at which they could be."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from st_fpsloss import last_complete_checkpoint
from tests.training.runs import trainer, weights

# Imports once, then forks: a process that trains starts at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

# What a process does to files, as sys.addaudithook tells it.
_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def start(function: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """A process of its own; ``kill()`` sends it SIGKILL."""
    process = PROCESSES.Process(target=function, args=arguments)
    process.start()
    return process


def finish(function: Callable[..., None], *arguments: Any) -> None:
    """Run in a process of its own, to the end."""
    process = start(function, *arguments)
    process.join()
    assert process.exitcode == 0


def train(output_dir: Path, resume: bool = False, result: Path | None = None, **options: Any) -> None:
    """Train 8 steps, saving every second one; leave α and the weights in ``result``."""
    torch.set_num_threads(1)
    checkpoint = last_complete_checkpoint(output_dir) if resume else None
    assert checkpoint is not None or not resume
    training = trainer(output_dir, **{"save_strategy": "steps", "save_steps": 2, **options})
    training.train(resume_from_checkpoint=checkpoint)
    if result is not None:
        torch.save({"alpha": training.loss.alpha, "weights": weights(training.model)}, result)


def train_watched(output_dir: Path, watched: Path, **options: Any) -> None:
    """Train, and leave what a SIGKILL would have left, at every moment, in folders ``watched``/moment/number.

    Before each operation on a file of ``output_dir`` all of it is copied. Complete checkpoints are copied to
    ``watched``/complete/number/checkpoint-step.
    """
    torch.set_num_threads(1)
    number = len(list((watched / "moment").glob("*")))
    copying = False

    def copy_before(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number, copying
        if copying or event not in _FILE_EVENTS or not _changes(event, arguments, output_dir):
            return
        copying = True
        shutil.copytree(output_dir, watched / "moment" / f"{number:04}")
        number += 1
        copying = False

    class Keep(TrainerCallback):
        """A copy of each checkpoint when it is complete."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal copying
            copying = True
            name = f"checkpoint-{state.global_step}"
            shutil.copytree(output_dir / name, watched / "complete" / str(number) / name)
            copying = False

    resume = options.pop("resume", None)
    training = trainer(output_dir, **{"save_strategy": "steps", "save_steps": 2, **options})
    training.add_callback(Keep())
    sys.addaudithook(copy_before)
    training.train(resume_from_checkpoint=resume)
    copying = True
    shutil.copytree(output_dir, watched / "moment" / f"{number:04}")


def _changes(event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
    path, *more = arguments
    if not isinstance(path, (str, os.PathLike)):
        return event in ("os.remove", "os.rmdir")  # shutil.rmtree names files relative to an open folder
    if event == "open" and not more[1] & (os.O_WRONLY | os.O_RDWR):
        return False
    relative = not os.path.isabs(path) and event in ("os.remove", "os.rmdir")
    return relative or Path(path).is_relative_to(folder)
