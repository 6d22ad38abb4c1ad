"""Small two-tower models and click logs for the tests of the losses."""

from __future__ import annotations

import random

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

from st_fpsloss.towers import Tower, freeze_unused_parameters, id_embedding, id_transformer, two_tower

WORDS = [
    "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "brew", "potent",
    "elixirs", "beneath", "moonlit", "towers",
]  # fmt: skip


def sentences(count: int, longest: int, seed: int) -> list[str]:
    """Different sentences of very different length."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choices(WORDS, k=rng.randint(1, longest)))] = None
    return list(found)


@pytest.fixture(scope="session")
def text_model(minilm: str) -> SentenceTransformer:
    """MiniLM documents and 2-layer MiniLM queries, without dropout."""
    model = two_tower(
        Tower(minilm, num_hidden_layers=2, hidden_dims=(64,)), Tower(minilm, hidden_dims=(64,)), embedding_dim=32
    )
    return model.eval()


def small_model(dropout: float = 0.0, similarity: str = "dot", shared: bool = False) -> SentenceTransformer:
    """One-layer transformers from scratch over the words: fast, and all that matters of a real one."""
    torch.manual_seed(0)
    tower = Tower(id_transformer(WORDS, 16, 1, 2, max_seq_length=50, dropout=dropout), hidden_dims=(16,))
    other = tower
    if not shared:
        other = Tower(id_transformer(WORDS, 16, 2, 2, max_seq_length=50, dropout=dropout), hidden_dims=(16,))
    return two_tower(tower, other, embedding_dim=8, similarity=similarity)


def static_query_model() -> SentenceTransformer:
    """A bag of words for queries, a transformer for documents."""
    torch.manual_seed(0)
    document = Tower(id_transformer(WORDS, 16, 1, 2, max_seq_length=50, dropout=0.0), hidden_dims=(16,))
    return two_tower(Tower(id_embedding(WORDS, 16), hidden_dims=(16,)), document, embedding_dim=8)


def plain_model(minilm: str) -> SentenceTransformer:
    """One stock encoder without a router."""
    transformer = Transformer(minilm)
    model = SentenceTransformer(modules=[transformer, Pooling(384), Dense(384, 16)]).eval()
    freeze_unused_parameters(model)
    return model


def clicks(model: SentenceTransformer, num_rows: int, num_negatives: int = 0, seed: int = 0, prompts: bool = False):
    """A function that gives the features of a batch with repeated queries and documents, and its ids (columns, M)."""
    rng = random.Random(seed)
    queries, documents = sentences(max(1, num_rows // 2), 8, seed), sentences(max(2, num_rows), 30, seed + 1)
    texts = [rng.choices(queries, k=num_rows)]
    texts += [rng.choices(documents, k=num_rows) for _ in range(1 + num_negatives)]
    routed = any(isinstance(module, Router) for module in model)

    def features() -> list[dict]:
        columns = []
        for number, column in enumerate(texts):
            task = ("document" if number else "query") if routed else None
            prompt = ("quick " if number == 0 else "lazy dog ") if prompts else None
            columns.append(model.preprocess(column, task=task, prompt=prompt))
        return columns

    known = {text: number for number, text in enumerate(queries + documents)}
    return features, torch.tensor([[known[text] for text in column] for column in texts])


def gradients(model: SentenceTransformer, loss: torch.nn.Module) -> torch.Tensor:
    """All gradients of the encoders as one vector."""
    parts = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]
    return torch.cat(parts)
