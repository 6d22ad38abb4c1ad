"""A model's folder is replaced whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from sentence_transformers import SentenceTransformer

from st_fpsloss.utils.folders import replaced_folder

MODULES_NAME = "modules.json"
_MODULE_FOLDER = re.compile(r"(\w+_)?\d+_[A-Z]\w*")  # 1_Pooling, query_0_Transformer
_MODEL_FILES = (
    MODULES_NAME, "*config.json", "*.safetensors*", "*.bin", "*.bin.index.json", "README.md", "*.jinja", "*.model",
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def save_model(model: SentenceTransformer, path: str | Path) -> None:
    """Save a model so that whoever loads ``path`` finds the old model or the new one, never parts of both.

    ``model.save_pretrained(path)`` writes file by file into a folder that may hold another model: killed in between,
    it leaves the new queries' tower beside the old documents' tower, and that loads.

    Args:
        model: the model.
        path: its folder. What it holds that is no part of a model (checkpoints, metrics, notes) stays.

    Example::

        save_model(model, "runs/shop/model")
    """
    with replaced_model(path) as folder:
        model.save_pretrained(str(folder))


@contextmanager
def replaced_model(path: str | Path) -> Iterator[Path]:
    """Give an empty folder to save a model to, which takes the place of the model in ``path`` when the block ends."""
    with replaced_folder(path, _is_part_of_model) as folder:
        yield folder


def holds_model(path: str | Path) -> bool:
    """Whether a folder holds a model of sentence-transformers."""
    return (Path(path) / MODULES_NAME).exists()


def _is_part_of_model(name: str) -> bool:
    return bool(_MODULE_FOLDER.fullmatch(name)) or any(fnmatch(name, pattern) for pattern in _MODEL_FILES)
