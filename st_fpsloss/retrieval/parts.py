"""Search in an index that lies in parts, on several machines or in several folders."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Any


def merge_results(parts: Sequence[Sequence[Sequence[tuple[Any, float]]]], k: int) -> list[list[tuple[Any, float]]]:
    """Join what the parts of a corpus found for the same queries.

    Args:
        parts: For each part the result of its :meth:`st_fpsloss.DocumentIndex.search` for all queries, with this k
            or more. No document may be in two parts.
        k: Documents a query.

    Returns:
        For each query the best (id, score) of all parts, best first: what one index of all documents finds.

    Raises:
        ValueError: If the parts have results of different numbers of queries.

    Example:
        >>> merge_results([[[("a", 0.9), ("b", 0.1)]], [[("c", 0.5)]]], k=2)
        [[('a', 0.9), ('c', 0.5)]]
    """
    lengths = {len(part) for part in parts}
    if len(lengths) != 1:
        raise ValueError(f"parts has results for {sorted(lengths)} queries: search every part with the same ones.")
    queries = zip(*parts, strict=True)
    return [heapq.nlargest(k, itertools.chain(*results), key=_score) for results in queries]


def _score(pair: tuple[Any, float]) -> float:
    return pair[1]
