"""The model card of two-tower models with modules of this package: a usage snippet that runs as it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

_LABELS = ("label", "labels", "score", "scores")
_TEXTS = (
    "which film is about a botanist on the red planet",
    "A botanist is left behind on Mars and has to survive.",
    "A quiet drama in a small town by the sea.",
    "Four friends plan to rob a train.",
)
_MAX_LIST, _MAX_TEXT = 5, 200


@dataclass
class TwoTowerModelCardData(SentenceTransformerModelCardData):
    """Card data whose snippet shows side features, asks for this package and passes ``trust_remote_code=True``."""

    def set_widget_examples(self, dataset: Any) -> None:
        """Takes a query and three documents of the training data as examples.

        Where a tower reads side features there is no widget: the one of the hub takes texts alone.
        """
        if not any(_reads_features(module) for module in input_modules(self.model)):
            super().set_widget_examples(dataset)
        elif isinstance(dataset, Dataset) and len(dataset) > 0:
            rows = dataset.with_format(None)[: len(_TEXTS) - 1]
            columns = [name for name in rows if name not in (*_LABELS, "dataset_name")]
            if len(columns) > 1:  # a data set of whole histories has no column of documents
                self.usage_examples = [_short(rows[columns[0]][0]), *map(_short, rows[columns[1]])]

    def run_usage_snippet(self) -> None:
        """Scores the examples; where no data set gave any, they are made up from what the features know."""
        if self.usage_examples is None:
            query, document = input_modules(self.model)
            self.usage_examples = [_made_up(query, 0), *(_made_up(document, n) for n in range(1, len(_TEXTS)))]
        super().run_usage_snippet()

    def save_usage_example_assets(self) -> None:
        """Leaves examples in words: numbers and lists are side features here, not sounds and pictures."""

    def generate_usage_snippet(self) -> str:
        """Returns what an input may hold, and the code."""
        model_id = self.model_id or "sentence_transformers_model_id"
        code = super().generate_usage_snippet()
        code = code.replace(f'"{model_id}")', f'"{model_id}", trust_remote_code=True)')
        lines = ["The model has modules of its own in the package `st-fpsloss`:", "", "```bash"]
        lines += ["pip install -U st-fpsloss", "```"]
        for task, module in zip(("query", "document"), input_modules(self.model), strict=True):
            if _reads_features(module):
                lines += [f"A {task} is a dict with any of these keys; what is missing or None is legal:", ""]
                lines += [f"- `{key}`: {meaning}" for key, meaning in module.describe_input().items()]
                lines += [""]
        return "\n".join([*lines, code])


def use_two_tower_card(model: SentenceTransformer) -> None:
    """Gives a model this card, with all that its stock card knows; a card of another kind is left alone."""
    card = model.model_card_data
    if type(card) is SentenceTransformerModelCardData:
        model.model_card_data = TwoTowerModelCardData()
        vars(model.model_card_data).update(vars(card))


def input_modules(model: SentenceTransformer) -> tuple[Any, Any]:
    """Input modules of the towers of queries and of documents."""
    first = model[0]
    if not isinstance(first, Router):
        return first, first
    return first.sub_modules["query"][0], first.sub_modules["document"][0]


def _reads_features(module: Any) -> bool:
    return hasattr(module, "example_input")


def _made_up(module: Any, number: int) -> Any:
    return module.example_input(_TEXTS[number], number) if _reads_features(module) else _TEXTS[number]


def _short(value: Any) -> Any:
    """A value of the data in a form that fits into a snippet."""
    if isinstance(value, dict):
        return {key: _short(held) for key, held in value.items() if held is not None}
    return value[-_MAX_LIST:] if isinstance(value, list) else value[:_MAX_TEXT] if isinstance(value, str) else value
