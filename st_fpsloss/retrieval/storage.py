"""The folder of an index: generations that never change, and one manifest that names the current one.

::

    my-index/
      index.json                what the index is, its generation, a checksum of every file of it and of itself
      generation-1f3a.../       documents.arrow, vectors.npy, and index.faiss where the search is approximate
      generation-77b0.../       the one before, for readers that are opening it
      building/                 finished shards of a build that goes on, or was killed

A generation is written whole before the manifest is replaced, so every reader finds the old one or the new one.
"""

from __future__ import annotations

import importlib.metadata
import json
import mmap
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout

from st_fpsloss.utils.files import write_whole

MANIFEST, DOCUMENTS_FILE, VECTORS_FILE, FAISS_FILE = "index.json", "documents.arrow", "vectors.npy", "index.faiss"
BUILDING = "building"
OWN_KEYS = ("format", "version", "st_fpsloss_version", "generation", "previous", "files", "checksum")
"""What the manifest tells about itself and the folder, beside what it tells about the index."""
_FORMAT = "st_fpsloss.DocumentIndex"
_VERSION = 2
_LOCK = ".lock"
_GENERATION = re.compile(r"generation-[0-9a-f]{32}")
_SECONDS_FOR_THE_LOCK = 10.0
_CHUNK = 2**24


def check_target(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """Refuse a path whose content would be lost.

    Args:
        path: The folder of an index to be.
        overwrite: Whether an index of ours may be replaced.

    Returns:
        The folder, absolute. Nothing has been written.

    Raises:
        ValueError: If there is something that is no index, or an index and not ``overwrite``.
    """
    folder = Path(path).resolve()
    if not folder.exists():
        return folder
    if not folder.is_dir() or not (_is_ours(folder) or _has_nothing_else(folder)):
        raise ValueError(
            f"path={str(path)!r} exists and is no document index: it is not overwritten; choose another one."
        )
    if (folder / MANIFEST).exists() and not overwrite:
        raise ValueError(f"path={str(path)!r} exists: choose another one, or replace the index with overwrite=True.")
    return folder


def _is_ours(folder: Path) -> bool:
    """Whether the manifest is one of this package, be it damaged behind its first entry."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == _FORMAT


def _has_nothing_else(folder: Path) -> bool:
    """Whether a folder without a manifest holds nothing but what an unfinished build leaves."""
    leftovers = (path.name for path in folder.iterdir())
    return all(name in (_LOCK, BUILDING) or _GENERATION.fullmatch(name) for name in leftovers)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Be the only writer of an index; leftovers of killed writers are removed.

    Raises:
        RuntimeError: If another process is writing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / _LOCK, timeout=_SECONDS_FOR_THE_LOCK):
            _remove_unused(folder)
            yield
    except Timeout as error:
        raise RuntimeError(
            f"path={str(folder)!r} is being written by another process: wait until it is done."
        ) from error


def _remove_unused(folder: Path) -> None:
    """Remove generations that no manifest names. Without a readable manifest none is known to be unused."""
    used: set[str] = set()
    if (folder / MANIFEST).exists():
        try:
            manifest = read_manifest(folder)
        except ValueError:
            return
        used = {manifest["generation"], manifest["previous"]}
    for path in folder.iterdir():
        if _GENERATION.fullmatch(path.name) and path.name not in used:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(f".{MANIFEST}."):
            path.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of an index that was never published and has no finished shard."""
    if (folder / MANIFEST).exists():
        return
    with suppress(OSError):
        (folder / BUILDING).rmdir()
    if folder.is_dir() and all(path.name == _LOCK for path in folder.iterdir()):
        (folder / _LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def new_generation(folder: Path, info: dict[str, Any]) -> Iterator[Path]:
    """Make a generation, and publish it when the block ends without an error.

    Args:
        folder: The folder of the index, which this process is :func:`writing`.
        info: What the manifest tells about the index; may be filled in within the block.

    Yields:
        An empty folder for the files of the generation.
    """
    generation = folder / f"generation-{uuid.uuid4().hex}"
    generation.mkdir()
    try:
        yield generation
        previous = None
        with suppress(ValueError):
            previous = read_manifest(folder)["generation"]
        files = {path.name: _described(path) for path in sorted(generation.iterdir())}
        _write_manifest(folder, {**info, "generation": generation.name, "previous": previous, "files": files})
    except BaseException:
        shutil.rmtree(generation, ignore_errors=True)
        raise
    _remove_unused(folder)


def _described(path: Path) -> dict[str, Any]:
    """Flush a file to the disk, and return its size and checksum."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": checksum_of_file(path)}


def checksum_of_file(path: Path) -> str:
    """The checksum of a file's content."""
    digest = xxhash.xxh3_128()
    if path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for start in range(0, len(content), _CHUNK):
                digest.update(content[start : start + _CHUNK])
    return digest.hexdigest()


def _write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    manifest = {"format": _FORMAT, "version": _VERSION, "st_fpsloss_version": _package_version(), **content}
    manifest["checksum"] = _checksum_of_manifest(manifest)
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _checksum_of_manifest(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what an index is and where its files are.

    Args:
        folder: The folder of the index.

    Returns:
        The content of ``index.json``.

    Raises:
        ValueError: If there is no index, or it is broken, or of another version of this package.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        unfinished = (folder / BUILDING).is_dir()
        raise ValueError(
            f"path={str(folder)!r} is no document index: it has no {MANIFEST}; "
            + (
                "a build was stopped here: call DocumentIndex.build again with the same documents to finish it."
                if unfinished
                else "give the folder that DocumentIndex.build wrote, or build it again."
            )
        ) from None
    try:
        manifest = json.loads(content)
        known = manifest["format"] == _FORMAT
        version = manifest["version"]
        whole = manifest["checksum"] == _checksum_of_manifest(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise broken(folder, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if not known:
        raise ValueError(f"path={str(folder)!r} is no document index: its {MANIFEST} is of something else.")
    if not whole:
        raise broken(folder, f"{MANIFEST} is not as it was written")
    if version != _VERSION:
        raise ValueError(
            f"path={str(folder)!r} is an index of format {version}, this version reads {_VERSION}: build it again."
        )
    return manifest


def verified_generation(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Check every file of a generation against its checksum.

    Raises:
        FileNotFoundError: If a file is missing: another generation may have replaced this one meanwhile.
        ValueError: If a file is not as it was written.
    """
    generation = folder / manifest["generation"]
    for name, expected in manifest["files"].items():
        path = generation / name
        found = {"bytes": path.stat().st_size, "xxh3_128": checksum_of_file(path)}
        if found != expected:
            raise broken(folder, f"{generation.name}/{name} is not as it was written")
    return generation


def broken(folder: Path, reason: str) -> ValueError:
    """The error of an index that cannot be read."""
    return ValueError(f"path={str(folder)!r} holds a broken document index, build it again: {reason}.")


def _package_version() -> str | None:
    try:
        return importlib.metadata.version("st-fpsloss")
    except importlib.metadata.PackageNotFoundError:
        return None
