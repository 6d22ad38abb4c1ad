"""Two-tower models: out of sentence-transformers' own modules, and of ours where there are side features or a bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    Module,
    Normalize,
    Router,
)
from torch import nn

from st_fpsloss.towers.encoder import Encoder, embedding_size, freeze_unused_parameters, load_encoder
from st_fpsloss.towers.features.kinds import DocumentHistory, Feature
from st_fpsloss.towers.modules.document_bias import BiasDimension, DocumentBias
from st_fpsloss.towers.modules.feature_encoders import FeatureFusion
from st_fpsloss.towers.modules.feature_input import FeatureInput
from st_fpsloss.towers.start import start_linear, starting_bases
from st_fpsloss.towers.tower import Tower
from st_fpsloss.utils.checks import positive_int

SIMILARITIES = ("dot", "cosine")


def two_tower(
    query: Tower,
    document: Tower,
    embedding_dim: int | None = None,
    similarity: str = "dot",
    document_bias: bool = False,
    prompts: Mapping[str, str] | None = None,
    texts: Sequence[str] | None = None,
) -> SentenceTransformer:
    """Builds a two-tower model: one encoder for queries, one for documents, compared in one embedding space.

    The model is a stock ``Router`` with the routes ``"query"`` and ``"document"``, followed by ``Normalize`` if the
    similarity is the cosine. The same :class:`Tower` object for both sides is one shared encoder, held and saved once.

    Over pretrained encoders the towers start as their encoders: untrained, with the default sizes, the cosines of the
    embeddings are those of the encoders. (Over an encoder that ends in a normalisation the dot product starts as the
    cosine over 0.07, so that it ranks as the encoder too.) Where both are one encoder the model therefore ranks before
    any training as that encoder does; a query encoder with fewer layers, or another one, first has to learn the
    documents' embeddings: :func:`~st_fpsloss.align_towers`. Where the embeddings are smaller than the encoder's, both
    towers start from one projection of them: give ``texts``, and it is the one that keeps their cosines best.

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
        embedding_dim: Size of the embeddings of both towers. None is the size that their encoders have.
        similarity: ``"dot"`` or ``"cosine"``; saved with the model as its ``similarity_fn_name``.
        document_bias: Give every document a learned score of its own on top of the dot product, for instance for how
            popular it is (with in-batch negatives popularity cancels, unless the loss has ``log_q``). The embeddings
            have one more dimension for it, the last: the score, and 1 for queries. So the dot product is exact in any
            index; truncated embeddings lack it. Needs ``similarity="dot"``.
        prompts: What is put in front of a text, as ``{"query": "query: ", "document": "passage: "}``. ``encode_query``
            and ``encode_document`` put it there by themselves; for training see above.
        texts: A sample of the documents' texts, some thousand of them, that the projection is to suit (by their
            principal directions). Read only where the towers have less room than their encoders; without them the
            projection is a random rotation, cut.

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
    if embedding_dim is not None:
        embedding_dim = positive_int("embedding_dim", embedding_dim)
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity={similarity!r} is unknown: choose one of {', '.join(SIMILARITIES)}.")
    _check_document_bias(document_bias, similarity)
    _check_histories(document)
    _check_prompts(prompts)
    _check_texts(texts)

    towers = dict.fromkeys([query, document])
    encoders = {tower: load_encoder(tower) for tower in towers if tower.transformer is not None}
    if embedding_dim is None:
        embedding_dim = _common_size([encoder.embedding_dim for encoder in encoders.values()])
    routes = {tower: _front(tower, encoders.get(tower), embedding_dim) for tower in towers}
    heads = {tower: _mlp(embedding_size(routes[tower]), tower, embedding_dim) for tower in towers}
    pretrained = {tower: encoder for tower, encoder in encoders.items() if encoder.pretrained}
    for tower, basis in starting_bases(pretrained, embedding_dim, texts, similarity).items():
        start_linear(heads[tower], basis)
    for tower in towers:
        routes[tower] += _with_dropout(heads[tower], tower.dropout)
    document_modules = _with_bias(routes[document]) if document_bias else routes[document]
    modules: list[Module] = [Router.for_query_document(routes[query], document_modules)]
    if similarity == "cosine":
        modules.append(Normalize())
    if document_bias:
        modules.append(BiasDimension(embedding_dim))
    model = SentenceTransformer(
        modules=modules, prompts=None if prompts is None else dict(prompts), similarity_fn_name=similarity
    )
    freeze_unused_parameters(model)
    return model


def _common_size(sizes: Sequence[int]) -> int:
    """The size of embeddings that all encoders have."""
    if len(set(sizes)) == 1:
        return sizes[0]
    found = f"the encoders have the sizes {sizes[0]} and {sizes[1]}" if sizes else "no tower has an encoder"
    raise ValueError(
        f"embedding_dim=None, and {found}: give the size of the embeddings, embedding_dim={max([64, *sizes])}."
    )


def _front(tower: Tower, encoder: Encoder | None, embedding_dim: int) -> list[Module]:
    """Returns what turns an input into one embedding; its last module knows the embedding's size."""
    features: list[Feature] = [
        replace(feature, dim=embedding_dim) if isinstance(feature, DocumentHistory) else feature
        for feature in tower.features
    ]
    if encoder is None:
        return [FeatureInput(features)]
    if not features:
        return list(encoder.modules)
    first = FeatureInput(features, encoder.modules[0])
    fusion = FeatureFusion(encoder.embedding_dim, first.feature_dim, tower.dropout)
    return [first, *encoder.modules[1:], fusion]


def _with_bias(modules: list[Module]) -> list[Module]:
    """Returns the modules of a tower with the document's score, read in front of the layer to the embedding."""
    feature_dim = modules[0].feature_dim if isinstance(modules[0], FeatureInput) else 0
    return [*modules[:-1], DocumentBias(modules[-1].in_features, feature_dim), modules[-1]]


def _mlp(input_dim: int, tower: Tower, embedding_dim: int) -> list[Dense]:
    """Returns the hidden layers and the linear layer to the embedding, at random."""
    dims = (input_dim, *tower.widths(embedding_dim))
    hidden = [Dense(dim_in, dim_out, activation_function=nn.ReLU()) for dim_in, dim_out in pairwise(dims)]
    return [*hidden, Dense(dims[-1], embedding_dim, activation_function=nn.Identity())]


def _with_dropout(layers: list[Dense], dropout: float) -> list[Module]:
    """Returns the MLP with dropout behind each hidden layer, or in front of the only layer."""
    *hidden, output = layers
    if dropout == 0:
        return [*hidden, output]
    if not hidden:
        return [Dropout(dropout), output]
    return [module for dense in hidden for module in (dense, Dropout(dropout))] + [output]


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


def _check_histories(document: Tower) -> None:
    histories = [feature.name for feature in document.features if isinstance(feature, DocumentHistory)]
    if histories:
        raise ValueError(
            f"The document tower has the DocumentHistory {histories[0]!r}, whose documents it would have to encode "
            "itself: only a query tower of its own can have one."
        )


def _check_texts(texts: object) -> None:
    if texts is None:
        return
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise ValueError(f"texts={texts!r:.100} must be a list of texts, such as a sample of the documents.")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError('texts must be strings alone; of documents with side features give their "text".')


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
