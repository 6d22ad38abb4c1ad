"""Settings of the trainer that cannot work, looked at before training begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainingArguments

from st_fpsloss.data.inputs import LABEL_COLUMNS
from st_fpsloss.frequencies.table import Frequencies
from st_fpsloss.losses.diagnostics import has_text


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


def check_frequency_prompts(tables: Mapping[str, Frequencies], args: TrainingArguments, dataloader: Any) -> None:
    """Refuse tables of rows without the prompt that training puts before them: none of them would be recognised.

    Args:
        tables: by side, ``"query"`` and ``"document"``.
        args: the training arguments.
        dataloader: the trainer's; a collator may have prompts of its own.

    Raises:
        ValueError: If there is one.
    """
    prompts = getattr(getattr(dataloader, "collate_fn", None), "prompts", args.prompts)
    dataset = getattr(dataloader, "dataset", None)
    for side, table in tables.items():
        trained = _prompts_of(side, args.router_mapping, prompts, dataset)
        if table.prompt is not None and trained and table.prompt not in trained:
            given = " or ".join(map(repr, sorted(trained)))
            raise ValueError(
                f"`frequencies[{side!r}]` was counted with prompt={table.prompt!r}, and training puts {given} before "
                "these rows: none would be recognised, and all would count as never drawn. Pass the same `prompt` "
                "where the table is made (FrequencyTable.from_inputs, mixture_frequencies)."
            )


def _prompts_of(side: str, router_mapping: Any, prompts: Any, dataset: Any) -> set[str]:
    """What training puts before the rows of a side; nothing where the columns are not known."""
    if not has_text(prompts):
        return {""}
    if isinstance(prompts, str):
        return {prompts}
    if not router_mapping:  # without towers the first column is the query
        columns = [name for name in getattr(dataset, "column_names", None) or () if name not in LABEL_COLUMNS]
        router_mapping = {name: "document" if number else "query" for number, name in enumerate(columns)}
    found: set[str] = set()
    for routes, given in _routes_and_prompts(router_mapping, prompts):
        columns = [column for column, route in routes.items() if route == side]
        found.update([given] if isinstance(given, str) else [given.get(column) or "" for column in columns])
    return found


def prompt_warnings(args: TrainingArguments) -> list[str]:
    """A sentence for each tower whose columns are trained with different prompts."""
    found = []
    for routes, prompts in _routes_and_prompts(getattr(args, "router_mapping", None), getattr(args, "prompts", None)):
        if isinstance(prompts, str):
            continue
        for tower in dict.fromkeys(routes.values()):
            given = {column: prompts.get(column) or "" for column, route in routes.items() if route == tower}
            if len(set(given.values())) > 1:
                found.append(
                    f"The columns of the tower {tower!r} have different prompts, {given}: `prompts` in the training "
                    "arguments go by the name of the column. Give all columns of the tower, negatives among them, the "
                    "prompt that the model puts there by itself when it encodes."
                )
    return found


def _routes_and_prompts(router_mapping: Any, prompts: Any) -> Iterator[tuple[dict[str, str], dict[str, str] | str]]:
    """Tower of the columns of each data set, and prompt, by column or one for all columns."""
    if not isinstance(router_mapping, Mapping) or not isinstance(prompts, Mapping):
        return
    # Either may be one for all data sets, or one for each by its name.
    by_data_set = [setting for setting in (router_mapping, prompts) if _is_nested(setting)]
    if (
        not by_data_set and not prompts.keys() & router_mapping.keys()
    ):  # a prompt for each data set, for all its columns
        by_data_set = [prompts]
    for name in by_data_set[0] if by_data_set else [None]:
        routes = router_mapping.get(name) if _is_nested(router_mapping) else router_mapping
        given = prompts.get(name, {} if _is_nested(prompts) else prompts)
        if isinstance(routes, Mapping) and isinstance(given, (Mapping, str)):
            yield dict(routes), given if isinstance(given, str) else dict(given)


def _is_nested(setting: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in setting.values())
