"""Two-tower models: out of sentence-transformers' own modules, and of ours where there are side features or a bias."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    Module,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
)
from torch import nn

from st_fpsloss.towers.checks import positive_int
from st_fpsloss.towers.modules.document_bias import BiasDimension, DocumentBias
from st_fpsloss.towers.modules.feature_encoders import FeatureFusion
from st_fpsloss.towers.modules.feature_input import FeatureInput
from st_fpsloss.towers.tower import Tower, freeze_unused_parameters, load_input_module

SIMILARITIES = ("dot", "cosine")


def two_tower(
    query: Tower,
    document: Tower,
    embedding_dim: int = 256,
    similarity: str = "dot",
    document_bias: bool = False,
    prompts: Mapping[str, str] | None = None,
) -> SentenceTransformer:
    """Builds a two-tower model: one encoder for queries, one for documents, compared in one embedding space.

    The model is a stock ``Router`` with the routes ``"query"`` and ``"document"``, followed by ``Normalize`` if the
    similarity is the cosine. The same :class:`Tower` object for both sides is one shared encoder, held and saved once.

    Without side features and document bias it holds modules of sentence-transformers alone, so what
    ``save_pretrained`` writes loads anywhere with ``SentenceTransformer(path)``. With them it takes modules of this
    package, and ``SentenceTransformer(path, trust_remote_code=True)`` where it is installed. An input then is a text,
    or a dict with ``"text"`` and the names of the features.

    Training needs to know which column goes to which tower, and takes prompts by column as well. Columns of negatives
    are named in both too: one that ``prompts`` does not name has none, and so gives itself away as a negative::

        towers = {"query": "query", "document": "document", "negative_1": "document"}
        SentenceTransformerTrainingArguments(
            router_mapping=towers,
            prompts={column: model.prompts[tower] for column, tower in towers.items()},
        )

    Args:
        query: The tower of ``encode_query``.
        document: The tower of ``encode_document``, and of ``encode`` without a task.
        embedding_dim: Size of the embeddings of both towers.
        similarity: ``"dot"`` or ``"cosine"``; saved with the model as its ``similarity_fn_name``.
        document_bias: Give every document a learned score of its own on top of the dot product, for instance for how
            popular it is (with in-batch negatives popularity cancels, unless the loss has ``log_q``). The embeddings
            have one more dimension for it, the last: the score, and 1 for queries. So the dot product is exact in any
            index; truncated embeddings lack it. Needs ``similarity="dot"``.
        prompts: What is put in front of a text, as ``{"query": "query: ", "document": "passage: "}``. ``encode_query``
            and ``encode_document`` put it there by themselves; for training see above.

    Returns:
        The model, ready for ``SentenceTransformerTrainer``. Parameters that no input reaches are frozen, see
        :func:`freeze_unused_parameters`.

    Raises:
        ValueError: An argument is of the wrong kind or out of range, or a transformer cannot be loaded or cut as asked.

    Example:
        >>> from st_fpsloss.towers import Tower, id_embedding, id_transformer, two_tower
        >>> films = ["f1", "f2", "f3"]
        >>> model = two_tower(
        ...     query=Tower(id_transformer(films, hidden_size=16), hidden_dims=(32,)),
        ...     document=Tower(id_embedding(films, embedding_dim=16), hidden_dims=()),
        ...     embedding_dim=8,
        ... )
        >>> histories, documents = model.encode_query(["f1 f2", ""]), model.encode_document(films)
        >>> model.similarity(histories, documents).shape
        torch.Size([2, 3])
    """
    for name, tower in (("query", query), ("document", document)):
        _check_tower(name, tower)
    embedding_dim = positive_int("embedding_dim", embedding_dim)
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity={similarity!r} is unknown: choose one of {', '.join(SIMILARITIES)}.")
    _check_document_bias(document_bias, similarity)
    _check_prompts(prompts)

    query_modules = _tower_modules(query, embedding_dim)
    document_modules = query_modules if document is query else _tower_modules(document, embedding_dim)
    if document_bias:
        document_modules = _with_bias(document_modules)
    modules: list[Module] = [Router.for_query_document(query_modules, document_modules)]
    if similarity == "cosine":
        modules.append(Normalize())
    if document_bias:
        modules.append(BiasDimension(embedding_dim))
    model = SentenceTransformer(
        modules=modules, prompts=None if prompts is None else dict(prompts), similarity_fn_name=similarity
    )
    freeze_unused_parameters(model)
    return model


def _tower_modules(tower: Tower, embedding_dim: int) -> list[Module]:
    """Returns the modules of one route: the encoder, then the MLP."""
    encoder = _encoder_modules(tower)
    return [*encoder, *_mlp_modules(encoder[-1].get_embedding_dimension(), tower, embedding_dim)]


def _encoder_modules(tower: Tower) -> list[Module]:
    """Returns what turns an input into one embedding; its last module knows the embedding's size."""
    if tower.transformer is None:
        return [FeatureInput(tower.features)]
    module = load_input_module(tower)
    pooled = isinstance(module, StaticEmbedding) or module.module_output_name == "sentence_embedding"
    pooling = [] if pooled else [Pooling(module.get_embedding_dimension(), pooling_mode=tower.pooling)]
    if not tower.features:
        return [module, *pooling]
    first = FeatureInput(tower.features, module)
    fusion = FeatureFusion(module.get_embedding_dimension(), first.feature_dim, tower.dropout)
    return [first, *pooling, fusion]


def _with_bias(modules: list[Module]) -> list[Module]:
    """Returns the modules of a tower with the document's score, read in front of the layer to the embedding."""
    feature_dim = modules[0].feature_dim if isinstance(modules[0], FeatureInput) else 0
    return [*modules[:-1], DocumentBias(modules[-1].in_features, feature_dim), modules[-1]]


def _mlp_modules(input_dim: int, tower: Tower, embedding_dim: int) -> list[Module]:
    """Returns the hidden layers with their dropout, and the linear layer to the embedding."""
    dims = (input_dim, *tower.hidden_dims)
    hidden = [Dense(dim_in, dim_out, activation_function=nn.ReLU()) for dim_in, dim_out in pairwise(dims)]
    output = Dense(dims[-1], embedding_dim, activation_function=nn.Identity())
    if tower.dropout == 0:
        return [*hidden, output]
    if not hidden:
        return [Dropout(tower.dropout), output]
    return [module for dense in hidden for module in (dense, Dropout(tower.dropout))] + [output]


def _check_tower(name: str, tower: object) -> None:
    if isinstance(tower, str):
        raise ValueError(f'{name}={tower!r} is a string: write {name}=Tower("{tower}").')
    if not isinstance(tower, Tower):
        raise ValueError(f"{name} is a {type(tower).__name__}: wrap it as {name}=Tower(...).")


def _check_document_bias(document_bias: bool, similarity: str) -> None:
    if document_bias and similarity == "cosine":
        raise ValueError(
            'document_bias=True needs similarity="dot": a cosine has no room for a score of the document\'s own.'
        )


def _check_prompts(prompts: object) -> None:
    if prompts is None:
        return
    if not isinstance(prompts, Mapping) or not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError(f'prompts={prompts!r} must map names to texts, such as {{"query": "query: "}}.')
    # SentenceTransformer always has a "document" prompt, empty by default, and encode_document looks no further: a
    # prompt under "passage" would be ignored without a word.
    unknown = [name for name in prompts if name not in ("query", "document")]
    if unknown:
        raise ValueError(f'prompts has the name {unknown[0]!r}: the towers are called "query" and "document".')
