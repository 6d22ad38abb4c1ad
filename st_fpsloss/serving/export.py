"""The query tower of a model as a folder that answers without torch."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Pooling, Router, StaticEmbedding, Transformer
from tokenizers import Tokenizer
from torch import Tensor, nn

from st_fpsloss.retrieval.model_fingerprint import document_fingerprint
from st_fpsloss.serving.query_encoder import CONFIG_FILE, INPUT_PREFIX, MODEL_FILE, TOKENIZER_FILE, QueryEncoder
from st_fpsloss.towers.features.ids import Categorical
from st_fpsloss.towers.features.kinds import DocumentHistory, Feature
from st_fpsloss.towers.modules.feature_input import FeatureInput

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-5  # of an embedding's largest entry, or of 1 where that is smaller
_TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_WORDS = "red shoes for a walk in the rain, 42 pieces; Füße"
_TEXTS = (_WORDS, "", "tent", f"{_WORDS} " * 60)


def export_query_encoder(model: SentenceTransformer, folder: str | os.PathLike[str]) -> QueryEncoder:
    """Writes the query tower to a folder that onnxruntime, tokenizers and numpy answer from.

    The folder holds ``model.onnx`` (with any number of queries of any length), ``tokenizer.json`` where the tower reads
    text, and ``query_encoder.json`` (the query prompt, and the features with their vocabularies and statistics). The
    modules behind the towers, ``Normalize`` and the dimension of ``document_bias``, are part of the graph. The written
    tower is compared with the model on queries of different lengths before the folder appears.

    Args:
        model: The model, in float32, trained and set up as it is going to be searched with: its query prompt,
            ``max_seq_length`` and ``truncate_dim`` are written down. It is not changed.
        folder: The folder to write; it must not exist.

    Returns:
        The tower, loaded from the folder.

    Raises:
        ImportError: If onnx, onnxscript or onnxruntime is not installed.
        ValueError: The folder exists, the model is not in float32, its query tower does not begin with a
            ``Transformer``, ``StaticEmbedding`` or the features of this package, or it does something that the graph
            does not hold, so that the embeddings differ.

    Example:
        ::

            encoder = export_query_encoder(model, "shop-queries")
            encoder.encode(["red shoes"])  # as model.encode_query(["red shoes"])
    """
    _check_packages()
    target = Path(folder).resolve()
    if target.exists():
        raise ValueError(f"folder={str(folder)!r} exists: choose another one, or remove it.")
    modules = _query_modules(model)
    first = modules[0]
    features = list(first._readers) if isinstance(first, FeatureInput) else []
    if histories := [feature.name for feature in features if isinstance(feature, DocumentHistory)]:
        raise ValueError(
            f"The query tower has the DocumentHistory {histories[0]!r}, which reads what the document tower gives: "
            "encode such queries with model.encode_query, or serve the model itself."
        )
    text_encoder = first.text_encoder if isinstance(first, FeatureInput) else first
    _check(model, modules, text_encoder)
    prompt = model.prompts.get("query" if "query" in model.prompts else model.default_prompt_name or "") or ""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        token_inputs = _write_tokenizer(text_encoder, prompt, temporary / TOKENIZER_FILE)
        graph = _QueryGraph(modules, _constants(model, prompt), model.truncate_dim)
        dimension = _write_graph(graph, features, token_inputs, temporary / MODEL_FILE)
        config = {
            "dimension": dimension,
            "similarity": str(model.similarity_fn_name),
            "model": document_fingerprint(model),
            "prompt": prompt,
            "special_tokens": isinstance(text_encoder, Transformer),
            "token_inputs": token_inputs,
            "features": [feature.to_dict() for feature in features],
        }
        (temporary / CONFIG_FILE).write_text(json.dumps(config, ensure_ascii=False) + "\n", encoding="utf-8")
        _compare(model, QueryEncoder.load(temporary), features)
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    logger.info("Wrote the query tower to %s.", target)
    return QueryEncoder.load(target)


class _QueryGraph(nn.Module):
    """The modules that a query goes through, from tensors to its embedding."""

    def __init__(self, modules: Sequence[nn.Module], constants: Mapping[str, Any], truncate_dim: int | None) -> None:
        super().__init__()
        # Copies, on the CPU: the model stays as it is.
        self.steps = nn.ModuleList(map(_exportable, copy.deepcopy(nn.ModuleList(modules)))).cpu().eval()
        self.constants = dict(constants)
        self.truncate_dim = truncate_dim

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        """Returns the embeddings (N, dim)."""
        features = {**self.constants, **tensors}
        for step in self.steps:
            features = step(features)
        return features["sentence_embedding"][:, : self.truncate_dim].float()


class _PaddedStaticEmbedding(nn.Module):
    """What a StaticEmbedding does, the mean of the tokens' rows, on tokens with an axis for the texts."""

    def __init__(self, static: StaticEmbedding) -> None:
        super().__init__()
        self.weight = static.embedding.weight

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds ``sentence_embedding``."""
        mask = features["attention_mask"].to(self.weight.dtype)
        total = (nn.functional.embedding(features["input_ids"], self.weight) * mask[..., None]).sum(dim=1)
        return {**features, "sentence_embedding": total / mask.sum(dim=1, keepdim=True).clamp_min(1)}


class _PoolingBehindPrompt(nn.Module):
    """What a Pooling does that leaves the prompt out, without asking whether there is padding on the left."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds ``sentence_embedding``."""
        features = dict(features)
        mask, length = features["attention_mask"], features.pop("prompt_length", 0)
        positions = torch.arange(mask.shape[1], device=mask.device)
        text = positions >= mask.argmax(dim=1, keepdim=True) + length
        return self.pooling({**features, "attention_mask": mask * text})


def _exportable(module: nn.Module) -> nn.Module:
    """A module that does the same and can be exported."""
    if isinstance(module, Pooling) and not module.include_prompt:
        return _PoolingBehindPrompt(module)
    if isinstance(module, StaticEmbedding):
        return _PaddedStaticEmbedding(module)
    if isinstance(module, FeatureInput) and isinstance(module.text_encoder, StaticEmbedding):
        module.text_encoder = _PaddedStaticEmbedding(module.text_encoder)
    return module


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('The export of a query tower needs: pip install "st-fpsloss[export]"') from error


def _query_modules(model: SentenceTransformer) -> list[nn.Module]:
    """The modules that a query goes through, one after the other."""
    modules: list[nn.Module] = []
    for module in model:
        modules += module.sub_modules["query"] if isinstance(module, Router) else [module]
    return modules


def _check(model: SentenceTransformer, modules: Sequence[nn.Module], text_encoder: Any) -> None:
    """Refuses what cannot be exported."""
    if text_encoder is not None and not isinstance(text_encoder, (Transformer, StaticEmbedding)):
        raise ValueError(
            f"The query tower begins with a {type(text_encoder).__name__}, which has no form without torch: export "
            "towers of a Transformer, a StaticEmbedding, or features of this package."
        )
    wrong = {p.dtype for m in modules for p in m.parameters() if p.is_floating_point()} - {torch.float32}
    if wrong:
        raise ValueError(f"model holds weights in {wrong.pop()}: call model.float() first.")


def _constants(model: SentenceTransformer, prompt: str) -> dict[str, Any]:
    """What preprocessing tells the modules besides tensors, such as how many tokens the prompt has."""
    example: Any = {} if _reads_features_alone(model) else "a"
    found = model.preprocess([example], prompt=prompt or None, task="query")
    return {name: value for name, value in found.items() if not isinstance(value, Tensor)}


def _reads_features_alone(model: SentenceTransformer) -> bool:
    first = _query_modules(model)[0]
    return isinstance(first, FeatureInput) and first.text_encoder is None


def _write_tokenizer(text_encoder: Any, prompt: str, path: Path) -> list[str]:
    """Writes the tokenizer with its truncation and padding, and returns the names of the tensors that it makes."""
    if text_encoder is None:
        return []
    if isinstance(text_encoder, StaticEmbedding):
        tokenizer = Tokenizer.from_str(text_encoder.tokenizer.to_str())
        tokenizer.enable_padding()
        names = ["input_ids", "attention_mask"]
    else:
        slow = text_encoder.tokenizer
        if not getattr(slow, "is_fast", False):
            raise ValueError(f"The tokenizer of the query tower is a {type(slow).__name__}, none of `tokenizers`.")
        tokenizer = Tokenizer.from_str(slow.backend_tokenizer.to_str())
        tokenizer.enable_padding(
            direction=slow.padding_side,
            pad_id=slow.pad_token_id,
            pad_type_id=slow.pad_token_type_id,
            pad_token=slow.pad_token,
        )
        longest = getattr(text_encoder, "query_length", None) or text_encoder.max_seq_length
        tokenizer.no_truncation()
        if longest is not None and longest < 10**9:  # what stands there for "no limit" is larger
            tokenizer.enable_truncation(int(longest), direction=slow.truncation_side)
        made = text_encoder.preprocess(["a"], prompt=prompt or None, task="query")
        names = [name for name in _TOKEN_INPUTS if name in made]
    tokenizer.save(str(path))
    return names


def _write_graph(graph: _QueryGraph, features: Sequence[Feature], token_inputs: Sequence[str], path: Path) -> int:
    """Writes the graph, and returns the size of the embeddings."""
    # No axis of length 1: the exporter would take it for a constant.
    inputs = {name: torch.ones(2, 5, dtype=torch.int64) for name in token_inputs}
    inputs |= {feature.tensor_name: torch.from_numpy(_wide(feature)) for feature in features}
    dynamic = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs}
    for name in [*token_inputs, *(f.tensor_name for f in features if _is_list(f))]:
        if inputs[name].shape[1] > 1:  # a history of one id at most never is wider
            dynamic[name][1] = torch.export.Dim.DYNAMIC
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            graph,
            kwargs={"tensors": inputs},
            f=str(path),
            input_names=[INPUT_PREFIX + name for name in inputs],
            output_names=["query_vector"],  # "embedding" is what the exporter calls a node
            dynamic_shapes={"tensors": dynamic},
            dynamo=True,
            verbose=False,
        )
        return graph(inputs).shape[1]


def _is_list(feature: Feature) -> bool:
    return isinstance(feature.example(0), list)


def _wide(feature: Feature) -> np.ndarray:
    """The array of two values of a feature; of lists, with room for three ids where the feature has room."""
    if not _is_list(feature):
        return feature.array([feature.example(0), None])
    width = min(3, getattr(feature, "max_length", 3))
    return np.array([[1] * width, [1] + [0] * (width - 1)], dtype=np.int64)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own and on transformers' code, of which a user can change nothing."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _compare(model: SentenceTransformer, encoder: QueryEncoder, features: Sequence[Feature]) -> None:
    """Refuses a graph that does not give the embeddings of the model."""
    reads_text = bool(encoder.config["token_inputs"])
    rows: list[Any] = list(_TEXTS) if reads_text else []
    for number in range(5) if features else ():
        row = {f.name: f.example(number) for f in features if number % 2 or isinstance(f, Categorical)}
        rows.append({**row, **({"text": _TEXTS[number % len(_TEXTS)]} if reads_text else {})})
    expected = model.encode_query(rows, convert_to_tensor=True, show_progress_bar=False).cpu().float().numpy()
    for batch_size in (len(rows), 1):
        found = encoder.encode(rows, batch_size=batch_size)
        error = float(np.abs(found - expected).max())
        if not error <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise ValueError(
                f"The exported query tower differs from the model by up to {error:.1e}: one of its modules does "
                "something that the graph does not hold. Nothing was written."
            )
