"""An index that is searched while it changes on disk."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from st_fpsloss.retrieval import DocumentIndex

logger = logging.getLogger(__name__)

_ATTEMPTS = 5

Result = TypeVar("Result")


class LiveIndex:
    """Holds the newest usable generation of an index, in memory, for any number of threads.

    A search takes :attr:`current` once and goes on with it: what is in it does not change. A new generation that is
    broken, or of another model, is not taken: the one before goes on answering, and :attr:`problem` says why.

    Args:
        path: The folder of the index.
        check: Raises ValueError where the index does not fit the query tower.

    Attributes:
        current: The index to search.
        loads: Generations that were loaded.
        problem: Why the newest generation is not in use; None where it is.
    """

    def __init__(self, path: str | os.PathLike[str], check: Callable[[DocumentIndex], None]) -> None:
        self._path = path
        self._check = check
        self._loading = threading.Lock()
        self._refused: str | None = None
        self._stopped = threading.Event()
        self._watcher: threading.Thread | None = None
        self.loads = 0
        self.problem: str | None = None
        self.current = self._loaded()

    def _loaded(self) -> DocumentIndex:
        index = DocumentIndex.load(self._path)
        self._check(index)
        self.loads += 1
        return index

    def refresh(self) -> None:
        """Takes the newest generation, if it is another one than the current."""
        with self._loading:
            generation = None
            try:
                generation = DocumentIndex.current_generation(self._path)
                if generation == self.current.info["generation"]:
                    self.problem = None
                elif generation != self._refused:
                    self.current, self.problem = self._loaded(), None
                    logger.info("Searching generation %s, %d documents.", generation, len(self.current))
            except (ValueError, RuntimeError, OSError) as error:
                self._refused = generation
                if str(error) != self.problem:
                    logger.error("Going on with generation %s: %s", self.current.info["generation"], error)
                self.problem = str(error)

    def change(self, apply: Callable[[DocumentIndex], Result]) -> Result:
        """Changes the index on disk, and searches it from then on.

        Args:
            apply: Changes the index that it is given, in memory; called again where another process wrote meanwhile.

        Returns:
            What ``apply`` returned.

        Raises:
            RuntimeError: Another process is writing, or has written again and again.
            ValueError: From ``apply``; nothing has changed.
        """
        with self._loading:
            for attempt in range(_ATTEMPTS):
                index = self._loaded()
                result = apply(index)
                try:
                    index.save()
                except RuntimeError:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    continue
                self.current, self.problem = index, None
                return result
        raise AssertionError("the last attempt returns or raises")

    def watch(self, seconds: float) -> None:
        """Refreshes every so many seconds, in a thread, until :meth:`close`."""

        def work() -> None:
            while not self._stopped.wait(seconds):
                self.refresh()

        self._watcher = threading.Thread(target=work, name="index-watcher", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Stops watching."""
        self._stopped.set()
        if self._watcher is not None:
            self._watcher.join()
