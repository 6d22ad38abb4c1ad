"""The card data of two-tower models: a snippet that runs, and what the template shows beyond the stock card."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

from st_fpsloss.model_card.description import describe_tower, vocabularies
from st_fpsloss.model_card.pictures import can_draw, draw_curve, draw_softmax

_LABELS = ("label", "labels", "score", "scores")
_TEXTS = (
    "which film is about a botanist on the red planet",
    "A botanist is left behind on Mars and has to survive.",
    "A quiet drama in a small town by the sea.",
    "Four friends plan to rob a train.",
)
_MAX_LIST, _MAX_TEXT = 5, 200
_TAGS = ("two-tower", "dense-retrieval", "recommendation")


@dataclass
class TwoTowerModelCardData(SentenceTransformerModelCardData):
    """Card data of a two-tower model.

    Args:
        show_training_rows: show rows of the training data in the snippet, the widget and the tables. Off by
            default: rows of a click log may be private.
        index_recall: recall of the search index that was built with the model, such as ``{"HNSW, recall@10": 0.99}``.
    """

    show_training_rows: bool = False
    index_recall: dict[str, float] = field(default_factory=dict)
    learned: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    click_statistics: dict[str, str] = field(default_factory=dict, init=False)
    softmax: np.ndarray | None = field(default=None, init=False, repr=False)
    softmax_is_held_out: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.template_path = Path(__file__).parent / "template.md"
        self.add_tags(list(_TAGS))

    def get_default_model_name(self) -> str:
        """The title of a model that has no name."""
        return "Two-tower retrieval model"

    def set_widget_examples(self, dataset: Any) -> None:
        """Takes a query and three documents of the training data as examples, if ``show_training_rows``.

        Where a tower reads side features there is no widget: the one of the hub takes texts alone.
        """
        if not self.show_training_rows:
            return
        if not any(_reads_features(module) for module in input_modules(self.model)):
            super().set_widget_examples(dataset)
        elif isinstance(dataset, Dataset) and len(dataset) > 0:
            rows = dataset.with_format(None)[: len(_TEXTS) - 1]
            columns = [name for name in rows if name not in (*_LABELS, "dataset_name")]
            if len(columns) > 1:  # a data set of whole histories has no column of documents
                self.usage_examples = [_short(rows[columns[0]][0]), *map(_short, rows[columns[1]])]

    def run_usage_snippet(self) -> None:
        """Scores the examples; where no data set gave any, they are made up from what the features know."""
        self.ir_model = True  # queries and documents go through towers of their own
        if self.usage_examples is None:
            query, document = input_modules(self.model)
            self.usage_examples = [_made_up(query, 0), *(_made_up(document, n) for n in range(1, len(_TEXTS)))]
        super().run_usage_snippet()

    def save_usage_example_assets(self) -> None:
        """Draws the pictures. Examples stay in words: numbers and lists are side features here, not sounds."""
        if self.save_dir is None or not can_draw():
            return
        assets = Path(self.save_dir) / "assets"
        if curve := self._curve():
            draw_curve(*curve, assets / "learning_curve.png")
        if self.softmax is not None:
            draw_softmax(self.softmax, assets / "softmax.png")

    def _curve(self) -> tuple[list[int], list[float]] | None:
        logged = [line for line in self.training_logs if "Training Loss" in line]
        if len(logged) < 3:
            return None
        return [int(line["Step"]) for line in logged], [float(line["Training Loss"]) for line in logged]

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """What the template shows beyond the stock card."""
        drawn = can_draw() and self.save_dir is not None
        inputs = {
            task: module.describe_input()
            for task, module in zip(("query", "document"), input_modules(self.model), strict=True)
            if _reads_features(module)
        }
        return {
            **super().get_model_specific_metadata(),
            "towers": {task: describe_tower(self.model, task) for task in ("query", "document")},
            "inputs": inputs,
            "vocabularies": vocabularies(self.model),
            "needs_package": self._needs_package,
            "has_curve": drawn and self._curve() is not None,
            "has_softmax": drawn and self.softmax is not None,
        }

    @property
    def _needs_package(self) -> bool:
        return any(type(module).__module__.startswith("st_fpsloss.") for module in self.model.modules())

    def generate_usage_snippet(self) -> str:
        """Returns the code, which trusts this package where the model has modules of it."""
        code = super().generate_usage_snippet()
        if not self._needs_package:
            return code
        model_id = self.model_id or "sentence_transformers_model_id"
        return code.replace(f'"{model_id}")', f'"{model_id}", trust_remote_code=True)')


def use_two_tower_card(model: SentenceTransformer) -> None:
    """Gives a model this card, with all that its stock card knows; a card of another kind is left alone."""
    card = model.model_card_data
    if type(card) is not SentenceTransformerModelCardData:
        return
    model.model_card_data = TwoTowerModelCardData()
    ours = ("template_path", "tags")
    vars(model.model_card_data).update({name: value for name, value in vars(card).items() if name not in ours})
    model.model_card_data.add_tags([tag for tag in card.tags if tag not in model.model_card_data.tags])
    # The stock card has taken rows of the training data for examples already.
    model.model_card_data.widget = []
    model.model_card_data.usage_examples = None


def input_modules(model: SentenceTransformer) -> tuple[Any, Any]:
    """Input modules of the towers of queries and of documents."""
    first = model[0]
    if not isinstance(first, Router) or not {"query", "document"} <= set(first.sub_modules):
        return first, first
    return first.sub_modules["query"][0], first.sub_modules["document"][0]


def _reads_features(module: Any) -> bool:
    return hasattr(module, "example_input")


def _made_up(module: Any, number: int) -> Any:
    return module.example_input(_TEXTS[number], number) if _reads_features(module) else _TEXTS[number]


def _short(value: Any) -> Any:
    """A value of the data in a form that fits into a snippet."""
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items() if part is not None}
    return value[-_MAX_LIST:] if isinstance(value, list) else value[:_MAX_TEXT] if isinstance(value, str) else value
