"""The model of a script: loaded from a folder or the Hub, or built out of two towers."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_fpsloss.towers import Tower, two_tower
from st_fpsloss.towers.features.kinds import KINDS, Feature, feature_from_dict
from st_fpsloss.training import align_towers

logger = logging.getLogger(__name__)

_NUM_TEXTS = 5_000  # of documents, that a projection of their encoder is to suit


def load_model(model: str, trust_remote_code: bool = False) -> SentenceTransformer:
    """Loads a model from a folder or from the Hub.

    Raises:
        ValueError: If there is none.
    """
    try:
        return SentenceTransformer(model, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(f"{model!r} is neither the folder of a model nor the id of one on the Hub: {error}") from error


@dataclass
class TowerArguments:
    """The two towers to build; what is left out is what :class:`Tower` and :func:`two_tower` have by themselves."""

    _argument_group_name = "towers"

    query_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the queries' encoder; none: features alone"}
    )
    document_model: str | None = field(default=None, metadata={"help": "the same for documents"})
    shared_tower: bool = field(default=False, metadata={"help": "documents share the queries' tower"})
    query_layers: int | None = field(
        default=None, metadata={"help": "keep so many of the encoder's layers, evenly spaced"}
    )
    document_layers: int | None = field(default=None, metadata={"help": "the same for documents"})
    query_max_seq_length: int | None = field(default=None, metadata={"help": "cut queries at so many tokens"})
    document_max_seq_length: int | None = field(default=None, metadata={"help": "cut documents at so many tokens"})
    query_frozen: bool = field(default=False, metadata={"help": "fix the encoder; what stands on it learns"})
    document_frozen: bool = field(default=False, metadata={"help": "the same for documents"})
    align: bool = field(
        default=False, metadata={"help": "first teach the query tower the document tower's embeddings of the texts"}
    )
    query_features: list[str] = field(
        default_factory=list,
        metadata={"help": f"name=kind of side features; kinds: {', '.join(KINDS)}"},
    )
    document_features: list[str] = field(default_factory=list, metadata={"help": "the same for documents"})
    query_prompt: str | None = field(default=None, metadata={"help": "put before every query"})
    document_prompt: str | None = field(default=None, metadata={"help": "put before every document"})
    pooling: str | None = field(default=None, metadata={"help": "how token embeddings become one"})
    hidden_dims: list[int] | None = field(default=None, metadata={"help": "widths of the hidden layers; 0 for none"})
    dropout: float | None = field(default=None, metadata={"help": "of the hidden layers"})
    embedding_dim: int | None = field(default=None, metadata={"help": "size of the embeddings"})
    similarity: Literal["dot", "cosine"] | None = field(default=None, metadata={"help": "how embeddings are compared"})
    document_bias: bool = field(default=False, metadata={"help": "a learned score for each document"})

    def build(self, rows: Dataset) -> SentenceTransformer:
        """Builds the model, its features fitted on the training rows.

        Raises:
            ValueError: If an argument is unfit, or the rows lack a feature.
        """
        query = self._tower("query", rows)
        prompts = {"query": self.query_prompt, "document": self.document_prompt}
        return two_tower(
            query=query,
            document=query if self.shared_tower else self._tower("document", rows),
            document_bias=self.document_bias,
            prompts={name: prompt for name, prompt in prompts.items() if prompt} or None,
            texts=_texts(rows, "document")[:_NUM_TEXTS] or None,
            **self._given("embedding_dim", "similarity"),
        )

    def align_towers(self, model: SentenceTransformer, rows: Dataset, seed: int) -> None:
        """Teaches the query tower the document tower's embeddings of the rows' texts, where that is wanted.

        Raises:
            ValueError: As :func:`st_fpsloss.align_towers`, and with several processes.
        """
        if not self.align:
            return
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--align needs one process: align in a run of its own, then go on with finetune.")
        texts = [*_texts(rows, "query"), *_texts(rows, "document")]
        found = align_towers(model, list(dict.fromkeys(texts)), seed=seed)
        logger.info("Aligned: cosine %.3f, %.0f%% of ten neighbours", found["cosine"], 100 * found["neighbours@10"])

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _tower(self, side: str, rows: Dataset) -> Tower:
        model, features = getattr(self, f"{side}_model"), fitted_features(getattr(self, f"{side}_features"), rows, side)
        for column in ("query", "document") if self.shared_tower else (side,):
            check_keys(features, rows, column, side, reads_text=model is not None)
        hidden_dims: dict[str, Any] = {}
        if self.hidden_dims is not None:
            hidden_dims["hidden_dims"] = [width for width in self.hidden_dims if width]
        return Tower(
            model,
            num_hidden_layers=getattr(self, f"{side}_layers"),
            max_seq_length=getattr(self, f"{side}_max_seq_length"),
            features=features,
            frozen=getattr(self, f"{side}_frozen"),
            **self._given("pooling", "dropout"),
            **hidden_dims,
        )

    def __post_init__(self) -> None:
        of_documents = (
            "document_model",
            "document_layers",
            "document_max_seq_length",
            "document_features",
            "document_frozen",
        )
        given = [name for name in of_documents if getattr(self, name)]
        if self.shared_tower and given:
            raise ValueError(f"--{given[0]} and --shared_tower contradict each other: leave one out.")
        for side in ("query", "document")[: 1 if self.shared_tower else 2]:
            if getattr(self, f"{side}_model") is None and not getattr(self, f"{side}_features"):
                raise ValueError(f"Pass --{side}_model, a Hub id or a folder, or --{side}_features, or both.")


def tower_defaults() -> dict[str, Any]:
    """What towers take where the command line gives nothing."""
    return {
        name: one.default for kind in (Tower, two_tower) for name, one in inspect.signature(kind).parameters.items()
    }


def fitted_features(described: Sequence[str], rows: Dataset, column: str) -> list[Feature]:
    """Makes features out of their descriptions, fitted on the dicts of a column.

    Args:
        described: ``name=kind``, or a feature's JSON, as ``{"type": "Categorical", "name": "user", "buckets": 1000}``.
        rows: The training rows.
        column: ``"query"`` or ``"document"``.

    Raises:
        ValueError: If a description is none, the column holds texts, or its dicts lack a feature.
    """
    if not described:
        return []
    values = rows.with_format(None)[column][:]
    keys = _keys(values)
    features = [_feature(text, column) for text in described]
    for feature in features:
        if feature.name not in keys:
            held = f"dicts with the keys {keys}" if keys else "texts"
            raise ValueError(
                f"--{column}_features: the column of the {column} holds {held}, so there is no {feature.name!r}. "
                "Features are keys of JSON objects in a .jsonl file, or of structs in Parquet."
            )
    return [feature.fit(value.get(feature.name) for value in values) for feature in features]


def check_keys(features: Sequence[Feature], rows: Dataset, column: str, side: str, reads_text: bool) -> None:
    """Refuses dicts with a key that their tower would not know, before it is trained.

    Args:
        features: Those of the tower; without any, its encoder decides what it reads.
        rows: The training rows.
        column: ``"query"`` or ``"document"``, whose dicts go through the tower.
        side: The tower, ``"query"`` or ``"document"``.
        reads_text: Whether the tower has an encoder.

    Raises:
        ValueError: If there is such a key.
    """
    if not features:
        return
    known = {*(feature.name for feature in features), *(["text"] if reads_text else [])}
    unknown = [key for key in _keys(rows.with_format(None)[column][:]) if key not in known]
    if not unknown:
        return
    cure = f"add {' '.join(f'{key}=Categorical' for key in unknown if key != 'text')} (or another kind)"
    cures = [f"{cure} to --{side}_features"] if unknown != ["text"] else []
    if "text" in unknown:
        cures.append(f"pass --{side}_model, which reads the text")
    raise ValueError(
        f"--{side}_features: the dicts in the column of the {column} have the keys {unknown} too, which the tower "
        f"would not know: {', '.join(cures)}; or leave the keys out of the rows."
    )


def _texts(rows: Dataset, column: str) -> list[str]:
    """The distinct texts of a column, of dicts those under ``"text"``."""
    values = rows.with_format(None)[column][:]
    texts = (value.get("text") if isinstance(value, dict) else value for value in values)
    return list(dict.fromkeys(text for text in texts if text))


def _keys(values: Sequence[Any]) -> list[str]:
    """The keys of the dicts among the values."""
    return sorted(set().union(*(value for value in values if isinstance(value, dict))))


def _feature(text: str, column: str) -> Feature:
    name, _, kind = text.partition("=")
    try:
        if text.startswith("{"):
            return feature_from_dict(json.loads(text))
        return feature_from_dict({"type": kind, "name": name})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--{column}_features: {text!r} is no feature ({error!r}). Write name=kind with a kind of "
            f"{', '.join(KINDS)}, such as genres=Tags, or a feature's JSON."
        ) from error
