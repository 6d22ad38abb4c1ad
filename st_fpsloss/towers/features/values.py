"""Raw values of side features: what may be written in an input, turned into plain Python or refused by name."""

from __future__ import annotations

import difflib
import hashlib
import math
import reprlib
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any


def plain(value: Any) -> Any:
    """Returns the Python number or string in a numpy scalar, or in an array or tensor without axes."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def category(name: str, value: Any) -> str | None:
    """Returns a category as the string that vocabularies hold, None where it is missing.

    Raises:
        ValueError: It is neither a string, a whole number nor a boolean.
    """
    if type(value) is str:
        return value
    value = plain(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    need = "a category is a string or a whole number"
    if isinstance(value, float):
        need += " (None where it is missing; a measure belongs into a Numerical)"
    elif isinstance(value, (list, tuple, set)):
        need += " (several of them belong into Tags, a sequence into a History)"
    raise _wrong(name, value, need)


def number(name: str, value: Any) -> float:
    """Returns a number as a float, NaN where it is missing.

    Raises:
        ValueError: It is no number, or not finite.
    """
    value = plain(value)
    if value is None:
        return math.nan
    if not isinstance(value, Real):
        raise _wrong(name, value, "a Numerical needs a number, or None where it is missing")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise _wrong(name, value, "a Numerical needs a finite number, or None where it is missing")
    return result


def categories(name: str, value: Any, ordered: bool = False) -> list[str]:
    """Returns several categories; none where the value is missing. An element that is None is left out.

    Raises:
        ValueError: It is no collection, or an element is no category, or the order matters and a set has none.
    """
    value = plain(value)
    if value is None:
        return []
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        value = value.tolist()
    allowed = (list, tuple) if ordered else (list, tuple, set, frozenset)
    if not isinstance(value, allowed):
        kind = "a History needs a list of ids, the newest last" if ordered else "Tags need a list of categories"
        raise _wrong(name, value, f"{kind}, or None where it is missing")
    return [found for found in (category(name, element) for element in value) if found is not None]


def bucket(value: str, buckets: int) -> int:
    """Returns the hash bucket of a category, the same in every process and on every machine."""
    digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % buckets


def check_keys(row: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses an input with a key that its tower does not know."""
    for key in row:
        if key not in known:
            closest = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)
            raise ValueError(
                f"Unknown key {key!r} in an input: did you mean {closest[0]!r}? This tower reads "
                f"{', '.join(map(repr, known))}."
            )


def input_row(item: Any, known: Collection[str]) -> Mapping[str, Any]:
    """Returns an input as a mapping of ``known`` names, ``"text"`` among them in a tower that reads text.

    Raises:
        ValueError: It is neither a text for such a tower nor a dict, or has a key that is not known.
    """
    if isinstance(item, Mapping):
        check_keys(item, known)
        return item
    if isinstance(item, str) and "text" in known:
        return {"text": item}
    kinds = "a string or a dict" if "text" in known else "a dict"
    raise ValueError(f"The input {item!r:.100} is a {type(item).__name__}: give {kinds} with some of {list(known)}.")


def input_text(text: Any) -> str:
    """Returns the text of an input, an empty one where it is missing.

    Raises:
        ValueError: It is no string.
    """
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"'text' got {text!r:.100} (a {type(text).__name__}): give a string, or None.")
    return text


def _wrong(name: str, value: Any, need: str) -> ValueError:
    return ValueError(f"{name!r} got {reprlib.repr(value)} (a {type(value).__name__}): {need}.")
