"""Settings of the trainer that cannot work, looked at before training begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainingArguments

from st_fpsloss.data.inputs import LABEL_COLUMNS


def check_inputs(dataset: Any) -> None:
    """Refuse a training data set with a column of floats or dates that is no label: it would be taken for documents.

    Raises:
        ValueError: If there is one, such as the ``time`` of :func:`st_fpsloss.data.load_clicks`.
    """
    for part in getattr(dataset, "datasets", [dataset]):  # of a dictionary of data sets the trainer makes one
        for name, feature in (getattr(part, "features", None) or {}).items():
            kind = getattr(feature, "dtype", "")
            if name not in LABEL_COLUMNS and kind.startswith(("float", "timestamp", "date")):
                raise ValueError(
                    f"The training data set's column {name!r} holds {kind}, and every column that is no label is taken "
                    f"for queries or documents: remove it before training, dataset.remove_columns({name!r})."
                )


def prompt_warnings(args: TrainingArguments) -> list[str]:
    """A sentence for each tower whose columns are trained with different prompts."""
    found = []
    for routes, prompts in _routes_and_prompts(getattr(args, "router_mapping", None), getattr(args, "prompts", None)):
        for tower in dict.fromkeys(routes.values()):
            given = {column: prompts.get(column) or "" for column, route in routes.items() if route == tower}
            if len(set(given.values())) > 1:
                found.append(
                    f"The columns of the tower {tower!r} have different prompts, {given}: `prompts` in the training "
                    "arguments go by the name of the column. Give all columns of the tower, negatives among them, the "
                    "prompt that the model puts there by itself when it encodes."
                )
    return found


def _routes_and_prompts(router_mapping: Any, prompts: Any) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Tower and prompt of the columns of each data set, where the prompts go by column."""
    if not isinstance(router_mapping, Mapping) or not isinstance(prompts, Mapping):
        return
    # Either may be one for all data sets, or one for each by its name.
    by_data_set = [setting for setting in (router_mapping, prompts) if _is_nested(setting)]
    for name in by_data_set[0] if by_data_set else [None]:
        routes = router_mapping[name] if _is_nested(router_mapping) else router_mapping
        given = prompts.get(name, {} if _is_nested(prompts) else prompts)
        if isinstance(routes, Mapping) and isinstance(given, Mapping):
            yield dict(routes), dict(given)


def _is_nested(setting: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in setting.values())
