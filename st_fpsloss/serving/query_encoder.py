"""Query embeddings from an exported folder, with onnxruntime, tokenizers and numpy alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from st_fpsloss.towers.features.kinds import feature_from_dict
from st_fpsloss.towers.features.values import input_row, input_text

if TYPE_CHECKING:
    from st_fpsloss.retrieval import DocumentIndex

MODEL_FILE, TOKENIZER_FILE, CONFIG_FILE = "model.onnx", "tokenizer.json", "query_encoder.json"
INPUT_PREFIX = "input."
"""What stands before a tensor's name among the inputs of the graph: a feature may have the name of a node."""


class QueryEncoder:
    """The query tower of a model that :func:`~st_fpsloss.serving.export_query_encoder` wrote to a folder.

    Needs neither torch nor sentence-transformers. An environment without them::

        pip install --no-deps st-fpsloss
        pip install numpy onnxruntime tokenizers

    Create one with :meth:`load`. It is safe to encode from several threads.

    Attributes:
        config: The content of ``query_encoder.json``.
        dimension: Size of the embeddings.
        similarity: ``"dot"`` or ``"cosine"``: how the model compares embeddings.
        features: The side features of the tower.
        reads_text: Whether the tower reads text.

    Example:
        ::

            from st_fpsloss.serving.query_encoder import QueryEncoder

            encoder = QueryEncoder.load("shop-queries")
            vectors = encoder.encode(["red shoes", {"text": "tent", "age": 30}])  # (2, dimension)
    """

    def __init__(self, session: Any, tokenizer: Any, config: dict[str, Any]) -> None:
        self.config = config
        self.dimension: int = config["dimension"]
        self.similarity: str = config["similarity"]
        self.features = [feature_from_dict(described) for described in config["features"]]
        self.reads_text = tokenizer is not None
        self._session = session
        self._tokenizer = tokenizer
        self._known = [*(["text"] if self.reads_text else []), *(feature.name for feature in self.features)]

    @classmethod
    def load(cls, folder: str | os.PathLike[str], num_threads: int = 0) -> QueryEncoder:
        """Loads an exported query tower.

        Args:
            folder: The folder that :func:`~st_fpsloss.serving.export_query_encoder` wrote.
            num_threads: Threads of one forward pass; 0 for one a core.

        Raises:
            ImportError: If onnxruntime or tokenizers is not installed.
            ValueError: If the folder is none of an exported query tower, or a file in it is broken.
        """
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError("QueryEncoder needs two packages: pip install onnxruntime tokenizers") from error
        place = Path(folder)
        missing = [name for name in (CONFIG_FILE, MODEL_FILE) if not (place / name).is_file()]
        if missing:
            raise ValueError(
                f"folder={str(folder)!r} is no exported query tower: it has no {', no '.join(missing)}; write one "
                "with st_fpsloss.serving.export_query_encoder(model, folder)."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        try:
            config = json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))
            session = onnxruntime.InferenceSession(place / MODEL_FILE, options, providers=["CPUExecutionProvider"])
            tokenizer = Tokenizer.from_file(str(place / TOKENIZER_FILE)) if config["token_inputs"] else None
            return cls(session, tokenizer, config)
        except Exception as error:  # of the JSON, onnxruntime or tokenizers, which raise types of their own
            raise ValueError(f"folder={str(folder)!r} holds a broken query tower, export it again: {error}") from error

    def encode(self, inputs: Sequence[Any], batch_size: int = 32) -> np.ndarray:
        """Embeds queries, as ``encode_query`` of the model does.

        Args:
            inputs: Strings, or dicts with ``"text"`` and the names of the features; what is missing or None counts as
                missing.
            batch_size: Queries in one forward pass.

        Returns:
            (N, dimension) float32 embeddings.

        Raises:
            ValueError: ``inputs`` is a lone query, or a query has a key that is unknown or a value of the wrong kind.
        """
        if isinstance(inputs, (str, dict)):
            raise ValueError(f"inputs={inputs!r:.100} is one query: give a list of them, [query].")
        rows = [input_row(item, self._known) for item in inputs]
        batches = [self._tensors(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        found = [self._session.run(None, tensors)[0] for tensors in batches]
        return np.concatenate(found) if found else np.empty((0, self.dimension), dtype=np.float32)

    def check_index(self, index: DocumentIndex) -> None:
        """Refuses an index whose documents another model embedded.

        Raises:
            ValueError: The model that the tower was exported from has another document tower than the index's.
        """
        if index.info["model"] != self.config["model"]:
            raise ValueError(
                "the index was built with another model than the query tower was exported from, or with that model "
                "before it was trained on: export the query tower of the model that built the index."
            )

    def _tensors(self, rows: Sequence[Any]) -> dict[str, np.ndarray]:
        """The inputs of the graph."""
        tensors = {f.tensor_name: f.array([row.get(f.name) for row in rows]) for f in self.features}
        if self._tokenizer is not None:
            texts = [self.config["prompt"] + input_text(row.get("text")) for row in rows]
            encoded = self._tokenizer.encode_batch(texts, add_special_tokens=self.config["special_tokens"])
            parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
            for name in self.config["token_inputs"]:
                values = np.array([getattr(one, parts[name]) for one in encoded], dtype=np.int64)
                # A graph needs a place to look at, though no text has a token.
                tensors[name] = values if values.shape[1] else np.zeros((len(rows), 1), dtype=np.int64)
        return {INPUT_PREFIX + name: values for name, values in tensors.items()}
