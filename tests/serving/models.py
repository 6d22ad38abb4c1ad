"""Small models for the tests of serving, their weights large enough for wrong embeddings to show."""

import torch
from sentence_transformers import SentenceTransformer

from st_fpsloss import Categorical, History, Numerical, Tags, Tower, two_tower
from st_fpsloss.towers import id_embedding, id_transformer

WORDS = [
    "red",
    "blue",
    "green",
    "shoes",
    "tent",
    "boots",
    "lamp",
    "for",
    "a",
    "walk",
    "in",
    "the",
    "rain",
    "with",
    "42",
    "pieces",
    "and",
    "more",
]
ITEMS = [f"item {number}" for number in range(8)]
FEATURES = (
    Categorical("user", vocabulary=["u1", "u2", "u3"]),
    Categorical("embedding", buckets=5),
    Numerical("age", mean=30, std=10),
    Tags("likes", vocabulary=["a", "b", "c"], pooling="attention"),
    History("seen", vocabulary=ITEMS, dim=8, max_length=4, num_hidden_layers=1),
    History("recent", vocabulary=ITEMS, dim=8, max_length=6, num_hidden_layers=0),
)


def text_model(seed: int = 0, **arguments: object) -> SentenceTransformer:
    """Light towers of words."""
    torch.manual_seed(seed)
    towers = [Tower(id_embedding(WORDS, embedding_dim=16), hidden_dims=(16,)) for _ in range(2)]
    return _randomised(two_tower(*towers, embedding_dim=16, **{"similarity": "cosine", **arguments}))


def feature_model() -> SentenceTransformer:
    """A query tower with a transformer and every kind of feature, a prompt that pooling leaves out, and a bias."""
    torch.manual_seed(0)
    transformer = id_transformer(WORDS, hidden_size=16, num_hidden_layers=1, max_seq_length=12)
    model = two_tower(
        query=Tower(transformer, features=FEATURES, hidden_dims=(16,), dropout=0.1),
        document=Tower(id_embedding(WORDS, embedding_dim=16), hidden_dims=()),
        embedding_dim=16,
        document_bias=True,
        prompts={"query": "red tent "},
    )
    model[0].sub_modules["query"][1].include_prompt = False
    return _randomised(model)


def _randomised(model: SentenceTransformer) -> SentenceTransformer:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()
