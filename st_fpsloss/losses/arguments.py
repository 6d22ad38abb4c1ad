"""The arguments that losses share, stated once: their types, what they mean, and how they enter signature and help.

A loss names its own arguments and takes the others as ``**shared: Unpack[...]`` of one of the classes below. From both,
:func:`complete` makes the signature and the docstring that a user sees.
"""

from __future__ import annotations

import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Literal, TypedDict, get_type_hints

from st_fpsloss.batch.clicks import Duplicates, LogQ, Relevance
from st_fpsloss.frequencies.table import Frequencies

Similarity = Literal["dot", "cosine"]
CacheGradients = Literal["auto"] | bool | int
CacheFrozen = bool | str | os.PathLike[str]
Pairs = Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]]


class EncodingArguments(TypedDict, total=False):
    """Arguments of every loss."""

    max_scale: float
    relevance: Relevance
    similarity: Similarity | None
    mini_batch_num_tokens: int | None
    cache_gradients: CacheGradients
    cache_frozen: CacheFrozen
    gather_across_devices: bool


class ScaleArguments(EncodingArguments, total=False):
    """... that learns α by default."""

    scale: float | None
    learn_scale: bool


class MaskArguments(EncodingArguments, total=False):
    """... whose negatives may be positives of the query."""

    duplicates: Duplicates
    known_positives: Pairs | None


class ClickArguments(ScaleArguments, MaskArguments, total=False):
    """Arguments of nearly every loss."""


class LogQArguments(ClickArguments, total=False):
    """Arguments of the losses that correct for how negatives are drawn."""

    log_q: LogQ | None
    frequencies: Mapping[str, Frequencies] | None


ARGUMENTS: dict[str, str] = {
    "model": "a two-tower model, as :func:`st_fpsloss.two_tower` makes it, or any SentenceTransformer.",
    "corpus": "",
    "corpus_prompt": "",
    "margin": "",
    "scale": "start of α; None for 1/0.07 with cosine and 1 with dot product.",
    "bias": "",
    "learn_scale": """learn α, at the trainer's learning rate: Adam moves log α by at most that much a step, so at the
        2e-5 of a transformer α stays where it starts for thousands of steps. What ranked as well as the best fixed α
        from every start (``results/comparisons.md``) was a rate of its own,
        ``learning_rate_mapping={"logit_scale": 2e-2}``, with ``max_scale=30``, since on a small log α grows past what
        ranks best. Fix it where a run is too short to learn it.""",
    "learn_bias": "",
    "max_scale": "bound of α, as in CLIP.",
    "directions": "",
    "negatives": """``"explicit"``: the negative columns of the row itself; ``"in_batch"``: every document column of
        every row of the batch; None: explicit where the batch has negative columns, else in-batch. Either way a
        document that was shown to the query and not clicked (a row with r ≤ 0) is a negative of that query.""",
    "hardest": """take only this many in-batch negatives of a row, those most similar to its query; None for all.""",
    "semi_hard": "",
    "relevance": """``"mask"``: every row with r > 0 counts the same; ``"weight"``: its loss is weighted by r. A row
        with r ≤ 0 is no positive; its document is a negative.""",
    "duplicates": """``"mask"``: a document that is a positive of the row's query anywhere in the batch is no negative
        of that row; ``"keep"``: it is one, the formula to the letter.""",
    "log_q": """correct for negatives being drawn by popularity: ``"standard"`` subtracts log Q from every column (Yi et
        al. 2019), ``"corrected"`` from the negatives alone (arXiv 2507.09331; needs ``duplicates="mask"``; a positive
        competes with all documents but the query's other positives of the batch: where few queries have most of the
        documents, as 12 queries have of 30, that is another softmax than the one over all, which ``"standard"`` with
        ``duplicates="keep"`` estimates), None does not correct. On a log where
        a few documents have most of the clicks, this decides about the quality of the ranking. With explicit negatives
        Q is the distribution of the negative columns.""",
    "frequencies": """what counts how often rows occur, by ``"document"``, and ``"query"`` for the direction document to
        query: a :class:`st_fpsloss.frequencies.FrequencyTable`, or a :class:`st_fpsloss.frequencies.FrequencySketch`
        for many millions of distinct rows. None counts exactly, during training.""",
    "known_positives": """query -> documents of the whole log (or an iterable of such pairs, for inputs that are dicts),
        no negatives of that query in any batch; needs ``duplicates="mask"``.""",
    "similarity": """``"dot"`` or ``"cosine"``; None takes the model's ``similarity_fn_name``. With cosine the loss
        normalises the embeddings itself.""",
    "mini_batch_num_tokens": """padded tokens encoded at a time; None for 2048 on a CPU and 32768 on an accelerator.""",
    "cache_gradients": """which mini-batches are embedded without a graph first and once more in the backward pass, so
        that memory does not grow with the batch (GradCache), with the same gradients. ``"auto"``: those whose graphs do
        not fit into the memory that is free at the first step; what was chosen is logged. True: all but about one a
        tower. A whole number as 16384: all but mini-batches of so many tokens in all, padding included. False: none. A
        kept token takes .2 to .3 MiB in MiniLM (6 layers, with dropout), in other encoders about in proportion to
        layers times width.""",
    "cache_frozen": """what a frozen encoder (see ``Tower(frozen=True)``) gives for a row is computed once and kept,
        with True in memory, up to a quarter of what is free, with a folder there, for later runs too. What learns above
        it runs as usual. Embeddings are kept by the encoder's weights and never taken for those of others.""",
    "gather_across_devices": "with several processes, let the documents of all of them be negatives of each query.",
}
"""What each argument means, in the order of signatures; empty where only one loss has it, or each its own meaning."""

_COLUMNS = """
Requirements:
    1. Columns query, document and, if any, negative documents, in this order; with a two-tower model
       ``router_mapping`` says which is which.
    2. :class:`st_fpsloss.LossStateCallback` in the trainer, so that α is saved, resumed and logged.

Inputs:
    +-------------------------------------------------+---------------------+
    | Inputs                                          | Labels              |
    +=================================================+=====================+
    | (query, document) clicks                        | none, or relevance  |
    +-------------------------------------------------+---------------------+
    | (query, document, negative_1, ..., negative_n)  | none, or relevance  |
    +-------------------------------------------------+---------------------+
"""


def complete(loss: type) -> None:
    """Give a loss that names its arguments the whole signature, by keyword and position, and the docstring for it."""
    init: Callable[..., None] | None = loss.__dict__.get("__init__")
    if init is None or not str([*inspect.signature(init).parameters.values()][-1].annotation).startswith("Unpack["):
        return
    signature = _signature(loss, init)
    names = list(signature.parameters)[1:]

    @wraps(init)
    def by_contract(self: object, *args: Any, **kwargs: Any) -> None:
        signature.bind(self, *args, **kwargs)  # raises the TypeError that names what is wrong
        init(self, **dict(zip(names, args, strict=False)), **kwargs)

    by_contract.__signature__ = signature  # type: ignore[attr-defined]
    loss.__init__ = by_contract  # type: ignore[misc]
    if loss.__doc__ and "\nArgs:\n" in (doc := inspect.cleandoc(loss.__doc__)):
        loss.__doc__ = _docstring(doc, names)


def _signature(loss: type, init: Callable[..., None]) -> inspect.Signature:
    """That of ``__init__``, with the arguments behind its ``**`` in place, as base classes declare them."""
    bare = inspect.signature(init)
    *named, last = bare.parameters.values()
    (typed_dict,) = get_type_hints(init)[last.name].__args__
    parameters = {one.name: one for one in named}
    for base in loss.__mro__[1:]:
        declared = inspect.signature(base.__init__).parameters if "__init__" in base.__dict__ else {}  # type: ignore[misc]
        for name in get_type_hints(typed_dict).keys() & declared.keys():
            parameters.setdefault(name, declared[name])
    by_position = [
        one if one.default is one.empty else one.replace(kind=one.POSITIONAL_OR_KEYWORD) for one in parameters.values()
    ]
    order = {name: number for number, name in enumerate(ARGUMENTS)}
    return bare.replace(
        parameters=sorted(by_position, key=lambda one: (one.kind, order.get(one.name, -(one.name == "self"))))
    )


def _docstring(doc: str, names: list[str]) -> str:
    """The docstring with all arguments, in the order of the signature, and what all losses require."""
    head, rest = doc.split("\nArgs:\n", 1)
    args, rest = rest.split("\n\n", 1)
    explained = dict(ARGUMENTS)
    for item in re.split(r"\n(?=    \S)", args):
        name, text = item.strip().split(":", 1)
        explained[name] = text
    filled = (
        textwrap.fill(f"{name}: {' '.join(explained[name].split())}", 116, initial_indent=" " * 4,
                      subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)
        for name in names
    )  # fmt: skip
    return "\n".join([f"{head}\nArgs:", *filled, f"{_COLUMNS}\n{rest}"])
