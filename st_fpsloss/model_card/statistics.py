"""What a click log is like, in a few numbers for the model card."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset

from st_fpsloss.data.inputs import canonical_strings, is_positive

MAX_ROWS = 1_000_000
"""Rows that are looked at; a longer log is described by its first rows."""


def click_statistics(clicks: Any) -> dict[str, str]:
    """Numbers of a data set of clicks whose first two columns are query and document.

    Args:
        clicks: the training data. A stream, or a data set without these columns, has no statistics.

    Returns:
        What is counted -> number, in words; empty where nothing can be counted.

    Example:
        >>> from datasets import Dataset
        >>> clicks = Dataset.from_dict({"query": ["a", "a", "b"], "document": ["x", "y", "x"]})
        >>> click_statistics(clicks)["distinct documents"]
        '2'
    """
    if not isinstance(clicks, Dataset) or len(clicks) == 0 or len(clicks.column_names) < 2:
        return {}
    looked_at = clicks.select(range(min(len(clicks), MAX_ROWS)))
    query, document = looked_at.column_names[:2]
    queries, documents = canonical_strings(looked_at, query), canonical_strings(looked_at, document)
    clicks_of = np.array(sorted(Counter(documents).values(), reverse=True))
    head = max(1, len(clicks_of) // 100)
    numbers = {
        "rows": f"{len(clicks):,}",
        "distinct queries": f"{len(set(queries)):,}",
        "distinct documents": f"{len(clicks_of):,}",
        "clicks of the median document": f"{int(np.median(clicks_of)):,}",
        "share of the most frequent document": f"{clicks_of[0] / len(documents):.1%}",
        "share of the most frequent 1% of the documents": f"{clicks_of[:head].sum() / len(documents):.1%}",
    }
    positive = is_positive(looked_at)
    if not positive.all():
        numbers["share of positive rows"] = f"{positive.mean():.1%}"
    if len(looked_at) < len(clicks):
        numbers["counted on the first"] = f"{len(looked_at):,} rows"
    return numbers
