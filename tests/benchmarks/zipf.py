"""A click log with the repetition and the lengths of a real one, for measuring speed."""

from __future__ import annotations

import numpy as np

from tests.losses.conftest import WORDS

NUM_DISTINCT = 20_000


def zipf_clicks(num_rows: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Queries and documents of ``num_rows`` clicks.

    20,000 queries and 20,000 documents are drawn with p ∝ rank^-0.7 and rank^-1.0; lengths in words are log-normal,
    with a mean of 8 (at most 30) and of 42 (at most 126).
    """
    rng = np.random.default_rng(seed)
    queries = _draw(rng, num_rows, exponent=0.7, mean_length=8, max_length=30, kind=0)
    documents = _draw(rng, num_rows, exponent=1.0, mean_length=42, max_length=126, kind=1)
    return queries, documents


def equal_length_clicks(num_rows: int, num_words: int = 32, seed: int = 0) -> tuple[list[str], list[str]]:
    """The worst case for deduplication and sorting: nothing repeats, and all texts are of one length in tokens."""
    rng = np.random.default_rng(seed)
    words = np.array([word for word in WORDS if word not in ("elixirs", "moonlit")])  # those are several tokens
    texts = [" ".join(row) for row in words[rng.integers(len(words), size=(2 * num_rows, num_words))]]
    return texts[:num_rows], texts[num_rows:]


def _draw(
    rng: np.random.Generator, num_rows: int, exponent: float, mean_length: float, max_length: int, kind: int
) -> list[str]:
    weights = np.arange(1, NUM_DISTINCT + 1) ** -exponent
    drawn = rng.choice(NUM_DISTINCT, size=num_rows, p=weights / weights.sum())
    return [_text(number, mean_length, max_length, kind) for number in drawn]


def _text(number: int, mean_length: float, max_length: int, kind: int) -> str:
    """The text of one query or document: the same whenever it is drawn."""
    rng = np.random.default_rng((kind, number))
    sigma = 0.6
    length = int(np.clip(rng.lognormal(np.log(mean_length) - sigma**2 / 2, sigma), 1, max_length))
    return " ".join(rng.choice(WORDS, size=length))
