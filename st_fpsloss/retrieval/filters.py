"""Which rows a search may return: excluded ids of each query, and a filter by ids or by stored columns."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Filter: TypeAlias = "Iterable[Any] | pc.Expression | Callable[[pa.Table], Any]"
_ROW = "__row__"


def excluded_rows(
    exclude: Sequence[Iterable[Any] | None] | None,
    num_queries: int,
    row_of: Callable[[], Mapping[Any, int]],
    id_type: pa.DataType,
) -> list[np.ndarray]:
    """Turn the ids to leave out into row numbers.

    Args:
        exclude: For each query ids, or None.
        num_queries: Number of queries.
        row_of: Gives id -> row; only called where there are ids.
        id_type: The type of the index's ids.

    Returns:
        For each query the rows, sorted. Ids that the index does not have are ignored.

    Raises:
        ValueError: If it is no list with an entry a query, or has ids of another type.
    """
    if exclude is None:
        return [np.empty(0, np.int64)] * num_queries
    if isinstance(exclude, (str, Mapping)):
        raise ValueError(
            f"exclude={exclude!r:.200} is a {type(exclude).__name__}: give a list with the ids to leave out, or "
            "None, for each query, in the order of `queries`."
        )
    if len(exclude) != num_queries:
        raise ValueError(f"exclude has {len(exclude)} entries for {num_queries} queries: give one for each, or None.")
    return [_rows_of(ids, row_of, id_type, f"exclude[{number}]") for number, ids in enumerate(exclude)]


def allowed_rows(
    filter: Filter | None, columns: pa.Table, row_of: Callable[[], Mapping[Any, int]], id_type: pa.DataType
) -> np.ndarray | None:
    """Turn a filter into a mask of rows.

    Args:
        filter: Ids; an expression of ``pyarrow.compute`` over the stored columns and ``id``; or a function from the
            table of these columns to one bool a row. None: no filter.
        columns: The table of these columns, a row a document.
        row_of: Gives id -> row.
        id_type: The type of the index's ids.

    Returns:
        (rows,) bool, or None.

    Raises:
        ValueError: For a filter that is none of these, or fails.
    """
    if filter is None:
        return None
    if isinstance(filter, pc.Expression):
        rows = _rows_of_expression(filter, columns)
    elif callable(filter):
        return _mask_of_function(filter, columns)
    elif isinstance(filter, (str, bytes, Mapping)) or not isinstance(filter, Iterable):
        raise ValueError(
            f"filter={repr(filter)[:200]}: give a list of ids, an expression such as "
            "pyarrow.compute.field('year') > 1990, or a function from the table of stored columns to one bool a row."
        )
    else:
        rows = _rows_of(filter, row_of, id_type, "filter")
    mask = np.zeros(len(columns), dtype=bool)
    mask[rows] = True
    return mask


def _rows_of_expression(expression: pc.Expression, columns: pa.Table) -> np.ndarray:
    numbered = columns.append_column(_ROW, pa.array(np.arange(len(columns))))
    try:
        return numbered.filter(expression)[_ROW].to_numpy()
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(
            f"filter={str(expression)[:200]} cannot be applied to the stored columns {_described(columns)}: {error}"
        ) from error


def _mask_of_function(function: Callable[[pa.Table], Any], columns: pa.Table) -> np.ndarray:
    result = function(columns)
    if isinstance(result, (pa.Array, pa.ChunkedArray)):
        result = pc.fill_null(result, False)
    mask = np.asarray(result)
    if mask.shape != (len(columns),) or mask.dtype != bool:
        raise ValueError(
            f"filter returned {mask.dtype} of shape {mask.shape}: return one bool for each of the {len(columns)} rows "
            "of the table."
        )
    return mask


def _rows_of(
    ids: Iterable[Any] | None, row_of: Callable[[], Mapping[Any, int]], id_type: pa.DataType, argument: str
) -> np.ndarray:
    """The rows of ids, sorted."""
    ids = [] if ids is None else [ids] if isinstance(ids, str) else list(ids)
    if not ids:
        return np.empty(0, np.int64)
    check_ids(ids, id_type, argument)
    rows = row_of()
    return np.array(sorted({rows[document_id] for document_id in ids if document_id in rows}), dtype=np.int64)


def check_ids(ids: Iterable[Any], id_type: pa.DataType, argument: str) -> None:
    """Refuse ids of another type than the index's.

    Raises:
        ValueError: Naming the first.
    """
    integers = pa.types.is_integer(id_type)
    for document_id in ids:
        if not isinstance(document_id, numbers.Integral if integers else str):
            raise ValueError(
                f"{argument} has {document_id!r}, and the ids of this index are of type "
                f"{'int' if integers else 'str'}: 1 and '1' are different ids."
            )


def _described(columns: pa.Table) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in columns.schema)
