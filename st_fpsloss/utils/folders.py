"""Folders that are replaced whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def replaced_folder(path: str | Path, belongs: Callable[[str], bool]) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``path`` when the block ends, and never where it fails.

    A kill leaves the old folder or the new one, whole. Where the system cannot exchange two folders in one step (Linux
    can), a kill between two renames leaves the old one beside ``path``, as ``.NAME.PID.old``. A mount point and the
    working folder cannot be renamed: there the entries are moved one by one, ``modules.json`` last.

    Args:
        path: the folder, which need not exist.
        belongs: whether an entry of the old folder, by its name, is part of what is replaced. The others stay.
    """
    path = Path(path).resolve()
    path.mkdir(parents=True, exist_ok=True)
    is_fixed = os.path.ismount(path) or Path.cwd().is_relative_to(path) or not os.access(path.parent, os.W_OK)
    parent = path if is_fixed else path.parent
    _remove_abandoned(parent, path.name)
    new = parent / f".{path.name}.{os.getpid()}.new"
    new.mkdir()
    try:
        yield new
        if is_fixed:
            _move_entries(new, path, belongs)
            return
        for entry in path.iterdir():
            if not belongs(entry.name) and not (new / entry.name).exists():
                _link(entry, new / entry.name)
        _exchange(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    if _exchange_at_once(new, old):
        return
    aside = new.with_suffix(".old")
    os.rename(old, aside)
    os.rename(new, old)
    shutil.rmtree(aside)


def _exchange_at_once(one: Path, other: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _link(source: Path, target: Path) -> None:
    """Have a file or a folder at a second place too: as links, which take no room, or as a copy."""
    try:
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True, copy_function=os.link)
        else:
            os.link(source, target, follow_symlinks=False)
    except (OSError, shutil.Error):  # a file system without links
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target, follow_symlinks=False)


def _move_entries(new: Path, path: Path, belongs: Callable[[str], bool]) -> None:
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name != "modules.json"):
        if entry != new and (belongs(entry.name) or (new / entry.name).exists()):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in sorted(new.iterdir(), key=lambda entry: entry.name == "modules.json"):
        os.rename(entry, path / entry.name)


def _remove_abandoned(parent: Path, name: str) -> None:
    """Remove what processes left that were killed while they wrote."""
    for entry in parent.iterdir():
        start, _, process = entry.stem.rpartition(".")
        if entry.suffix == ".new" and start == f".{name}" and process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(entry, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()
