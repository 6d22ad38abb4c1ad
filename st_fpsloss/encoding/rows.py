"""Tokenized rows of one tower: which are equal, how long they are, and the features of any selection of them.

The trainer hands a loss one dictionary of tensors a column, padded to the column's longest row (or in one of the flat
forms of :mod:`st_fpsloss.encoding.flat`). :class:`TokenizedRows` stacks the columns that go through the
same tower and gives every row a fingerprint of its content alone, whatever the padding or the batch around it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from torch import Tensor
from torch.nn.functional import pad
from tqdm.autonotebook import tqdm

from st_fpsloss.encoding.flat import Features, cut_bags, cut_packed, join_bags, join_packed

Layout = Literal["padded", "bag", "packed"]
_CUT: dict[Layout, Callable[[Features], Features]] = {"padded": dict, "bag": cut_bags, "packed": cut_packed}
_JOIN: dict[Layout, Callable[[Features], Features]] = {"padded": dict, "bag": join_bags, "packed": join_packed}

# Tensors with one entry a token. Only these are trimmed: a side feature may by chance be as wide as the text is long.
TOKEN_TENSORS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")

DOCUMENTS = "history_documents"
"""Key of a column's features: those of the documents in its rows' histories, or their (D, dim) vectors."""
HISTORIES = "history_tensors"
"""Key of a column's features: names of the (N, width) tensors with numbers of these documents, from 1; 0 for none."""


@dataclass(frozen=True)
class TokenizedRows:
    """N rows for one tower.

    Args:
        tensors: name -> (N, ...) tensor; those of ``TOKEN_TENSORS`` are (N, width).
        lengths: (N,) position after each row's last token; its first is at 0, whatever side the tokenizer pads on.
        metadata: what holds for all rows (task, modality, prompt_length): the tower they go through.
        layout: how the tower takes its tokens: as a padded matrix, in a bag (StaticEmbedding), or packed one row
            after the other (flash attention); here they are always padded on the right.
        documents: the documents in the rows' histories, where these hold documents; the histories' tensors then are
            the documents' fingerprints. Selections and stacks of rows leave them out.
    """

    tensors: dict[str, Tensor]
    lengths: Tensor
    metadata: dict[str, Hashable]
    layout: Layout
    documents: TokenizedRows | None = field(default=None, kw_only=True)

    @classmethod
    def from_features(cls, features: Features) -> TokenizedRows:
        """Rows of one column, as a sentence-transformers input module preprocessed it.

        Raises:
            ValueError: If the features hold something that is not one entry a row.
        """
        features, documents = _documents_of(features)
        layout: Layout = "bag" if "offsets" in features else "packed" if "cu_seq_lens_q" in features else "padded"
        features = _CUT[layout](features)
        tensors = {name: value for name, value in features.items() if isinstance(value, Tensor) and value.ndim > 0}
        metadata = {name: _metadata(name, value) for name, value in features.items() if name not in tensors}
        if "prompt_length" in tensors:  # one number for the whole column, whatever form it comes in
            metadata["prompt_length"] = int(tensors.pop("prompt_length").flatten()[0])
        rows = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"Every tensor of a column needs one entry a row, but their first dimensions are {rows}.")
        tensors = _without_left_padding(tensors)
        return cls(tensors, _lengths(tensors), metadata, layout, documents=documents)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def route(self) -> Hashable:
        """Rows of one route go through the same tower and can be stacked."""
        names = tuple(sorted((name, str(tensor.dtype), tensor.ndim) for name, tensor in self.tensors.items()))
        return tuple(sorted(self.metadata.items())), self.layout, names

    @staticmethod
    def stack(parts: Sequence[TokenizedRows]) -> TokenizedRows:
        """All rows of several columns of one route, in order."""
        first = parts[0]
        tensors = {
            name: torch.cat(_padded([part.tensors[name] for part in parts])) if len(parts) > 1 else tensor
            for name, tensor in first.tensors.items()
        }
        return TokenizedRows(tensors, torch.cat([part.lengths for part in parts]), first.metadata, first.layout)

    @property
    def num_tokens(self) -> int:
        """Tokens that have activations when the rows are one mini-batch; a bag of tokens has those of one."""
        if self.layout == "padded":
            return len(self) * max(1, int(self.lengths.max()))
        return len(self) if self.layout == "bag" else int(self.lengths.sum())

    def to(self, device: torch.device) -> TokenizedRows:
        """The rows on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return TokenizedRows(tensors, self.lengths.to(device), self.metadata, self.layout)

    def select(self, index: Tensor) -> TokenizedRows:
        """The rows at ``index``, trimmed to the longest among them."""
        lengths = self.lengths[index]
        width = int(lengths.max()) if len(lengths) else 0
        tensors = {
            name: tensor[index, :width] if name in TOKEN_TENSORS and tensor.ndim > 1 else tensor[index]
            for name, tensor in self.tensors.items()
        }
        return TokenizedRows(tensors, lengths, self.metadata, self.layout)

    def features(self) -> Features:
        """The dictionary that the tower's modules take; fresh, since modules write into it."""
        return _JOIN[self.layout]({**self.metadata, **self.tensors})

    def embed(self, model: Callable[[Features], Features], documents: Tensor | None = None) -> Tensor:
        """Embeddings (N, dim) of the rows; ``documents`` are the vectors that their histories read, if they do."""
        features = self.features()
        if documents is not None:
            features[DOCUMENTS] = documents
        return model(features)["sentence_embedding"]

    def fingerprints(self) -> Tensor:
        """Identity (N,) int64 of each row: equal rows have equal fingerprints, in every batch and every process.

        Unequal rows share a key with probability 2^-64; :meth:`unique` confirms equality where it matters.
        """
        return self._fingerprints_of(self._contents())

    def _fingerprints_of(self, contents: Iterable[tuple[str, Tensor]]) -> Tensor:
        total = torch.full((len(self),), _salt(repr(self.route)), dtype=torch.int64, device=self.lengths.device)
        for name, values in contents:
            position = torch.arange(values.shape[1], device=values.device)[None]
            total += (_mix(values) * _mix(position + _salt(name))).sum(dim=1)
        return _mix(total)

    def unique(self) -> tuple[Tensor, Tensor, Tensor]:
        """Group equal rows.

        Returns:
            (first, inverse, fingerprints): (U,) the row that stands for each group, (N,) each row's group, (U,) int64.
        """
        contents = list(self._contents())
        fingerprints = self._fingerprints_of(contents)
        _, inverse = torch.unique(fingerprints, return_inverse=True)
        first = first_of_each(inverse)
        stand_in = first[inverse]
        if not all(torch.equal(values, values[stand_in]) for _, values in contents):  # two different rows with one key
            packed = torch.cat([values for _, values in contents], dim=1)
            _, inverse = torch.unique(packed, dim=0, return_inverse=True)
            first = first_of_each(inverse)
        return first, inverse, fingerprints[first]

    def _contents(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor as an (N, values) int64 matrix in which padding, whatever the tokenizer fills it with, is 0."""
        mask = self.tensors.get("attention_mask")
        for name, tensor in sorted(self.tensors.items()):
            values = _bits(tensor)
            # Token id 0 is a token, unless the mask says otherwise.
            yield name, (values + 1) * mask if mask is not None and name in TOKEN_TENSORS else values


def row_fingerprints(
    model: SentenceTransformer, inputs: Sequence[Any], task: str | None, prompt: str | None = None
) -> Tensor:
    """Identity (N,) int64 of raw inputs, as :meth:`TokenizedRows.fingerprints` will give it for them in training.

    Args:
        model: the model whose input module preprocesses them.
        inputs: strings, or dicts with text and features.
        task: the tower, ``"query"`` or ``"document"``; of no account in a model without towers.
        prompt: what the trainer's ``prompts`` puts before them.
    """
    return torch.cat([rows.fingerprints() for rows in preprocessed_rows(model, inputs, task, prompt)])


def preprocessed_rows(
    model: SentenceTransformer, inputs: Sequence[Any], task: str | None, prompt: str | None = None
) -> Iterator[TokenizedRows]:
    """Raw inputs, in chunks, as the trainer's collator would tokenize them; see :func:`row_fingerprints`."""
    chunk = 4096
    task = task if routes_by_task(model) else None
    starts = tqdm(range(0, len(inputs), chunk), desc=f"Preprocess {task} rows", disable=len(inputs) <= chunk)
    for start in starts:
        yield TokenizedRows.from_features(
            model.preprocess(list(inputs[start : start + chunk]), prompt=prompt, task=task)
        )


def routes_by_task(model: SentenceTransformer) -> bool:
    """Whether a model has a tower for the task "query" and one for "document", by name or by ``route_mappings``."""
    return any({"query", "document"} <= _tasks(module) for module in model.children() if isinstance(module, Router))


def _tasks(router: Router) -> set[str]:
    return {*router.sub_modules, *(task for task, _ in router.route_mappings if task)}


def _documents_of(features: Features) -> tuple[Features, TokenizedRows | None]:
    """A column's features with fingerprints in the place of the documents' numbers in histories, and the documents."""
    names = features.get(HISTORIES, ())
    if not names:
        return features, None
    features = dict(features)
    given = features.pop(DOCUMENTS)
    if isinstance(given, Tensor):
        raise ValueError(
            "The histories were preprocessed to stored vectors, from which nothing can be trained: use "
            "`history_documents(model, index)` around encode_query alone; for training give it a dict of documents."
        )
    documents = None if given is None else TokenizedRows.from_features(given)
    fingerprints = features[names[0]].new_zeros(1)
    if documents is not None:
        fingerprints = torch.cat([fingerprints, documents.fingerprints()])
    return {**features, **{name: fingerprints[features[name]] for name in names}}, documents


def _metadata(name: str, value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.item()
    if value is None or isinstance(value, (str, int, float, bool, tuple)):
        return value
    raise ValueError(
        f"Feature {name!r} is a {type(value).__name__}, which cannot be cut into mini-batches. "
        "An input module has to return tensors with one entry a row, or one plain value for all rows."
    )


def _without_left_padding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The canonical form of rows, each rolled so that its first token stands at position 0.

    Decoders pad on the left. Models whose positions are relative (rotary), counted from the attention mask, or given as
    ``position_ids``, and every pooling of sentence-transformers, give a rolled row the same embedding. Models that
    count absolute positions over the padding (BERT) give it the embedding of the row alone, not one of its neighbours.
    """
    mask = tensors.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.numel() == 0 or bool(mask[:, 0].all()):
        return tensors
    position = torch.arange(mask.shape[1], device=mask.device) + mask.long().argmax(dim=1, keepdim=True)
    source = position % mask.shape[1]
    return {
        name: tensor.gather(1, source) if name in TOKEN_TENSORS and tensor.shape == mask.shape else tensor
        for name, tensor in tensors.items()
    }


def _lengths(tensors: dict[str, Tensor]) -> Tensor:
    mask = tensors.get("attention_mask")
    if mask is None:
        tokens = tensors.get("input_ids")
        any_tensor = next(iter(tensors.values()))
        width = tokens.shape[1] if tokens is not None and tokens.ndim > 1 else 1
        return torch.full((len(any_tensor),), width, device=any_tensor.device)
    if mask.shape[1] == 0:  # every text is empty
        return torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
    return (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors with zeros behind their second axis, up to the widest."""
    if tensors[0].ndim < 2:
        return tensors
    width = max(tensor.shape[1] for tensor in tensors)
    return [
        tensor if tensor.shape[1] == width else pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, width - tensor.shape[1]])
        for tensor in tensors
    ]


def first_of_each(inverse: Tensor) -> Tensor:
    """Position of the first entry of each group, given each entry's group."""
    groups = int(inverse.max()) + 1 if len(inverse) else 0
    rows = torch.arange(len(inverse), device=inverse.device)
    start = torch.full((groups,), len(inverse), dtype=torch.int64, device=inverse.device)
    return start.scatter_reduce_(0, inverse, rows, "amin")


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as an (N, values) int64 matrix; floats by their bits, so that NaN equals itself."""
    if tensor.is_floating_point():
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        tensor = tensor.contiguous().view(width)
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:])).long()


def _signed(value: int) -> int:
    """The 64-bit pattern of ``value`` as Python's signed integer, the only kind that torch takes."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


@lru_cache(maxsize=1024)
def _salt(text: str) -> int:
    return _signed(zlib.crc32(text.encode()) * 0x9E3779B97F4A7C15)


def _mix(values: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that maps 0 to 0."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ _shift_right(values, shift)) * _signed(factor)
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own copies the sign bit."""
    return (values >> bits) & (2 ** (64 - bits) - 1)
