"""The input module of a tower that knows more than text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import InputModule, StaticEmbedding, Transformer
from torch import Tensor, nn

from st_fpsloss.encoding.prefixes import PREFIXES
from st_fpsloss.encoding.rows import DOCUMENTS, HISTORIES
from st_fpsloss.towers.features.ids import MISSING_ID
from st_fpsloss.towers.features.kinds import (
    Categorical,
    DocumentHistory,
    Feature,
    History,
    checked_features,
    feature_from_dict,
)
from st_fpsloss.towers.features.values import input_row, input_text
from st_fpsloss.towers.modules.base import PackageModule
from st_fpsloss.towers.modules.document_reader import DocumentReader
from st_fpsloss.towers.modules.feature_encoders import SequenceEncoder
from st_fpsloss.towers.modules.kinds import encoder_of

_TEXT_ENCODERS = {"Transformer": Transformer, "StaticEmbedding": StaticEmbedding}


class FeatureInput(PackageModule, InputModule):
    """Reads inputs of text and side features.

    An input is a string, or a dict with ``"text"`` and the names of the features; what is missing or None counts as
    missing (a missing text as an empty one), and any other key is refused. The text goes through a module of
    sentence-transformers, which this one holds; the vectors of the features are put side by side under
    ``feature_embedding``, for a :class:`FeatureFusion` that follows. Without a text encoder they are the embedding.

    Args:
        features: Fitted features.
        text_encoder: The ``Transformer`` or ``StaticEmbedding`` for the text; None for a tower of features alone,
            whose inputs have no text.
        shared_text_encoder: Name in the model of the module that is this one's text encoder as well; known to a saved
            model, and looked up once the model is complete.
    """

    config_file_name = "feature_input.json"

    def __init__(
        self,
        features: Sequence[Feature],
        text_encoder: InputModule | None = None,
        shared_text_encoder: str | None = None,
    ) -> None:
        super().__init__()
        self.features = checked_features(features)
        self.text_encoder = text_encoder
        self.shared_text_encoder = shared_text_encoder
        encoders = [encoder_of(feature) for feature in self.features]
        self.encoders = nn.ModuleList(encoders)
        # How values are read; a history that shares another feature's vocabulary learns it from the model.
        self._readers = list(self.features)
        self.document_reader: DocumentReader | None = None  # of histories of documents; once the model is complete
        self.feature_dim = sum(encoder.output_dim for encoder in encoders)
        self.register_buffer("_precision", torch.zeros(0), persistent=False)

    @property
    def _reads_text(self) -> bool:
        return self.text_encoder is not None or self.shared_text_encoder is not None

    # What goes in

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Turns inputs into tensors with one entry an input.

        Args:
            inputs: N strings or dicts.
            prompt: What is put before every text; of no effect in a tower of features alone.
            kwargs: Passed on to the text encoder.

        Raises:
            ValueError: An input has a key that is unknown, or a value of the wrong kind.
        """
        rows = [self._row(item) for item in inputs]
        documents = self._documents(rows)
        tensors = {
            reader.tensor_name: reader.tensor([row.get(reader.name) for row in rows])
            for reader in self._readers
            if not isinstance(reader, DocumentHistory)
        } | {name: documents[name] for name in documents.get(HISTORIES, ())}
        if self.text_encoder is None:
            return {"modality": "text", **self._lengths(tensors, len(rows)), **tensors, **documents}
        texts = [input_text(row.get("text")) for row in rows]
        text = self.text_encoder.preprocess(texts, prompt=prompt, **kwargs)
        return {"modality": "text", **text, **tensors, **documents}

    def _documents(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What histories of documents add to the features: their tensors, and the documents of all of them."""
        histories = [feature for feature in self._readers if isinstance(feature, DocumentHistory)]
        if not histories:
            return {}
        if self.document_reader is None:
            raise ValueError("Histories of documents need the document tower: make the module part of a model first.")
        names = tuple(feature.tensor_name for feature in histories)
        values = [feature.documents(row.get(feature.name)) for feature in histories for row in rows]
        numbers, documents = self.document_reader.preprocess(values)
        tensors = zip(names, torch.from_numpy(numbers).split(len(rows)), strict=True)
        return {HISTORIES: names, DOCUMENTS: documents, **dict(tensors)}

    def _row(self, item: Any) -> Mapping[str, Any]:
        return input_row(item, [*(["text"] if self._reads_text else []), *(feature.name for feature in self.features)])

    def _lengths(self, tensors: Mapping[str, Tensor], num_rows: int) -> dict[str, Tensor]:
        """Places of the longest history as if they were tokens.

        The trainer knows the columns of a batch by ``input_ids``; the encoding engine sorts rows by their length.
        """
        lengths = torch.ones(num_rows, dtype=torch.int64)
        for reader in self._readers:
            if isinstance(reader, (History, DocumentHistory)):
                lengths = lengths.maximum((tensors[reader.tensor_name] != MISSING_ID).sum(dim=1))
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return {"input_ids": mask, "attention_mask": mask}

    # What comes out

    @property
    def forward_kwargs(self) -> set[str]:
        """Arguments of ``encode`` that the text encoder takes."""
        return set() if self.text_encoder is None else self.text_encoder.forward_kwargs

    def tensors_of_a_prefix(self, history: str) -> tuple[str, ...]:
        """Names of the tensors that are shorter for a prefix of a history; that of the history comes first.

        Under the key ``prefixes`` among the features they make :meth:`forward` give an embedding for every prefix.

        Raises:
            ValueError: There is no such history, or another one, of which no prefix is known.
        """
        names = [feature.name for feature in self.features if isinstance(feature, (History, DocumentHistory))]
        if names != [history]:
            raise ValueError(
                f"history={history!r} has to name the one history of the query tower, which has "
                f"{', '.join(map(repr, names)) or 'none'}."
            )
        own = next(feature.tensor_name for feature in self.features if feature.name == history)
        return (own,) if self._reads_text else (own, "input_ids", "attention_mask")

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds ``feature_embedding`` (N, feature_dim), and what the text encoder adds.

        With the key ``prefixes`` (see :meth:`tensors_of_a_prefix`) ``feature_embedding`` has a row for every prefix of
        the N histories, those of the first history first, and ``prefix_of`` the number of each one's history.
        """
        features = dict(features)
        cut = features.pop(PREFIXES, None)
        read: list[Tensor | None] = []
        if self.document_reader is not None:
            features.pop(HISTORIES, None)
            read = [self.document_reader.vectors(features.pop(DOCUMENTS, None), self._precision.device)]
        inputs = [
            (features.pop(feature.tensor_name), *(read if isinstance(feature, DocumentHistory) else ()))
            for feature in self.features
        ]
        added: dict[str, Tensor] = {}
        if cut is None:
            vectors = [encoder(*given) for encoder, given in zip(self.encoders, inputs, strict=True)]
        else:
            vectors, added["prefix_of"] = self._of_prefixes(inputs, cut[0])
        added["feature_embedding"] = torch.cat([vector.to(self._precision.dtype) for vector in vectors], dim=1)
        if self.text_encoder is None:
            return {**features, "sentence_embedding": added["feature_embedding"], **added}
        # It gets none of these, nor the tensors: many transformers hand what they do not know on to their layers.
        return {**self.text_encoder(features, **kwargs), **added}

    def _of_prefixes(self, inputs: Sequence[tuple[Any, ...]], history: str) -> tuple[list[Tensor], Tensor]:
        """The features' vectors for every prefix of a history, and which row each is a prefix of."""
        names = [feature.tensor_name for feature in self.features]
        row = (inputs[names.index(history)][0] != MISSING_ID).nonzero()[:, 0]
        vectors = [
            encoder.prefixes(*given) if isinstance(encoder, SequenceEncoder) else encoder(*given)[row]
            for encoder, given in zip(self.encoders, inputs, strict=True)
        ]
        return vectors, row

    def get_embedding_dimension(self) -> int:
        """Size of the text's embedding, or of the features' where there is no text."""
        return self.feature_dim if self.text_encoder is None else self.text_encoder.get_embedding_dimension()

    @property
    def tokenizer(self) -> Any:
        """The text encoder's tokenizer."""
        return getattr(self.text_encoder, "tokenizer", None)

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text at most."""
        return getattr(self.text_encoder, "max_seq_length", None)

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        if self.text_encoder is not None:
            self.text_encoder.max_seq_length = length

    def describe_input(self) -> dict[str, str]:
        """What each key of an input means, for documentation."""
        text = {"text": "a string"} if self._reads_text else {}
        return {**text, **{reader.name: str(reader) for reader in self._readers}}

    def example_input(self, text: str, number: int) -> dict[str, Any]:
        """An input that the tower takes, for documentation."""
        texts = {"text": text} if self._reads_text else {}
        values = {reader.name: reader.example(number) for reader in self._readers}
        if self.document_reader is not None:
            seen = self.document_reader.examples(text, number)
            values |= {reader.name: seen for reader in self._readers if isinstance(reader, DocumentHistory)}
        return {**texts, **values}

    def __repr__(self) -> str:
        features = "; ".join(f"{reader.name}: {reader}" for reader in self._readers)
        return f"FeatureInput(features=({features}), text_encoder={self.text_encoder!r})"

    # Sharing, saving and loading

    def on_model_ready(self, model: SentenceTransformer) -> None:
        """Finds what this module shares with others of the model.

        Raises:
            ValueError: A history shares the embeddings of a feature that the model does not have exactly once.
        """
        super().on_model_ready(model)
        if any(isinstance(feature, DocumentHistory) for feature in self.features):
            self.document_reader = DocumentReader(model)
        if self.text_encoder is None and self.shared_text_encoder is not None:
            self.text_encoder = model.get_submodule(self.shared_text_encoder)
        if self.text_encoder is not None:
            self.shared_text_encoder = self._owner_of_text_encoder(model)
        for number, feature in enumerate(self.features):
            if isinstance(feature, History) and feature.shared_with is not None:
                owner, encoder = _categorical(model, feature.shared_with)
                self._readers[number] = feature.reading(owner)
                self.encoders[number].table = encoder.table

    def _owner_of_text_encoder(self, model: nn.Module) -> str | None:
        """Name of the module that saves the text encoder, None if it is this one."""
        names = list(model.named_modules(remove_duplicate=False))
        own = {f"{name}.text_encoder" for name, module in names if module is self}
        holders = [name for name, module in names if module is self.text_encoder]
        plain = [name for name in holders if not name.endswith(".text_encoder")]
        owner = (plain or holders)[0]
        return None if owner in own else owner

    def own_weights(self) -> dict[str, Tensor]:
        """The weights of the encoders, without tables that another feature holds."""
        shared = [
            f"encoders.{number}.table."
            for number, feature in enumerate(self.features)
            if isinstance(feature, History) and feature.shared_with is not None
        ]
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith(("text_encoder.", *shared))
        }

    def get_config_dict(self) -> dict[str, Any]:
        """The features, and the kind of text encoder, or the name of the module to share it with."""
        return {
            "features": [feature.to_dict() for feature in self.features],
            "text_encoder": None if self.text_encoder is None else type(self.text_encoder).__name__,
            "shared_text_encoder": self.shared_text_encoder,
        }

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes features and weights, and the text encoder into a folder in the folder."""
        super().save(output_path, *args, safe_serialization=safe_serialization, **kwargs)
        if self.text_encoder is not None and self.shared_text_encoder is None:
            folder = os.path.join(output_path, "text_encoder")
            os.makedirs(folder, exist_ok=True)
            self.text_encoder.save(folder, safe_serialization=safe_serialization)

    @classmethod
    def from_config(cls, config: dict[str, Any], model_name_or_path: str, place: dict[str, Any]) -> FeatureInput:
        """Makes the module from its configuration, its text encoder loaded."""
        features = [feature_from_dict(held) for held in config["features"]]
        kind, shared = config["text_encoder"], config["shared_text_encoder"]
        if kind is None or shared is not None:
            return cls(features, shared_text_encoder=shared)
        place = {**place, "subfolder": f"{place['subfolder']}/text_encoder"}
        return cls(features, _TEXT_ENCODERS[kind].load(model_name_or_path, **place))


def _categorical(model: nn.Module, name: str) -> tuple[Categorical, nn.Module]:
    """Returns the one Categorical of that name in a model, and its encoder."""
    found = {id(encoder): (feature, encoder) for feature, encoder in _features(model) if feature.name == name}
    held = [(feature, encoder) for feature, encoder in found.values() if isinstance(feature, Categorical)]
    if len(held) != 1:
        known = sorted({feature.name for feature, _ in _features(model) if isinstance(feature, Categorical)})
        raise ValueError(
            f"shared_with={name!r} must name one Categorical of the model, but {len(held)} are called so. "
            f"Categorical features there are: {', '.join(map(repr, known)) or 'none'}."
        )
    return held[0]


def _features(model: nn.Module) -> Iterator[tuple[Feature, nn.Module]]:
    for module in model.modules():
        if isinstance(module, FeatureInput):
            yield from zip(module.features, module.encoders, strict=True)
