"""How the MLP over a pretrained encoder starts: linear, so that the model ranks as the encoder does.

A ReLU layer whose units come in pairs of opposite sign loses nothing: with the rows of P (rank, dim) orthonormal,

    hidden = relu([P; -P; random] x),    output = [I, -I, 0] hidden = relu(P x) - relu(-P x) = P x.

Further ReLU layers pass the pairs on, which are never negative. The random units have no effect until training gives
them output weights. With rank = dim all dot products are those of x; below it, P decides how much of them is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor

from st_fpsloss.towers.encoder import Encoder
from st_fpsloss.towers.tower import Tower

logger = logging.getLogger(__name__)

_SEED = 0
_TEMPERATURE = 0.07  # where the losses start for cosines


def start_linear(layers: Sequence[Dense], basis: Tensor) -> None:
    """Makes an MLP pass on the coordinates of its input in a basis, and nothing else.

    Args:
        layers: The ReLU layers and the linear layer to the embedding, in order; changed in place.
        basis: (dim, dim) orthogonal rows. As many of them are used as the narrowest layer has room for.
    """
    *hidden, output = (layer.linear for layer in layers)
    rank = min(len(basis), carried_rank([linear.out_features for linear in hidden], output.out_features))
    basis = basis[:rank].to(output.weight)
    with torch.no_grad():
        for number, linear in enumerate(hidden):
            if number == 0:
                linear.weight[: 2 * rank] = torch.cat([basis, -basis])
            else:
                linear.weight[: 2 * rank] = 0
                linear.weight[: 2 * rank, : 2 * rank].fill_diagonal_(1)
            linear.bias[: 2 * rank] = 0
        output.weight.zero_()
        output.bias.zero_()
        if hidden:
            output.weight[:rank, :rank].fill_diagonal_(1)
            output.weight[:rank, rank : 2 * rank].fill_diagonal_(-1)
        else:
            output.weight[:rank] = basis


def carried_rank(widths: Sequence[int], embedding_dim: int) -> int:
    """How many dimensions an MLP with these hidden widths passes on when it starts linear."""
    return min([embedding_dim, *(width // 2 for width in widths)])


def starting_bases(
    towers: Mapping[Tower, Encoder], embedding_dim: int, texts: Sequence[str] | None, similarity: str
) -> dict[Tower, Tensor]:
    """The basis that each tower with a pretrained encoder starts from.

    Towers whose encoders have embeddings of one size start from the same basis: the unit vectors where both have room
    for all of them; else the principal directions of ``texts`` in the embeddings of the last tower's encoder, that of
    the documents; without texts, a random rotation.

    Encoders that end in a normalisation have been trained for the cosine. Under the dot product the rows have a length
    with which it is cos / 0.07: the ranking is the encoder's, and a loss, whose α starts at 1, finds differences of a
    size that it learns from. Other encoders keep their dot products.

    Args:
        towers: The towers that start so, with their encoders, queries first.
        embedding_dim: Size of the model's embeddings.
        texts: What to keep the cosines of.
        similarity: ``"dot"`` or ``"cosine"``.

    Returns:
        (dim, dim) orthogonal rows for each tower.
    """
    bases: dict[int, Tensor] = {}
    for dim in {encoder.embedding_dim for encoder in towers.values()}:
        of_size = {tower: encoder for tower, encoder in towers.items() if encoder.embedding_dim == dim}
        ranks = [carried_rank(tower.widths(embedding_dim), embedding_dim) for tower in of_size]
        if min(ranks) >= dim:
            bases[dim] = torch.eye(dim)
        elif texts is not None:
            bases[dim] = _principal_directions(list(of_size.values())[-1], texts)
        else:
            logger.warning(
                "The towers have room for %d of the %d dimensions of their encoder: they start from a random "
                "projection, which costs quality. Pass `texts`, some thousand documents, for a projection that keeps "
                "their cosines; or leave `embedding_dim` and `hidden_dims` at None.",
                min(ranks),
                dim,
            )
            bases[dim] = _random_rotation(dim)
    return {
        tower: bases[encoder.embedding_dim]
        * (_TEMPERATURE**-0.5 if similarity == "dot" and encoder.is_normalised else 1.0)
        for tower, encoder in towers.items()
    }


def _principal_directions(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Directions (dim, dim) in which unit embeddings of texts extend most, the longest first.

    Of unit vectors and around 0, not around their mean: so the first k of them are those that keep the dot products of
    these vectors, their cosines, best among all projections to k dimensions (Eckart and Young, 1936).
    """
    model = SentenceTransformer(modules=encoder.modules)
    embeddings = model.encode(list(texts), normalize_embeddings=True, convert_to_tensor=True).double().cpu()
    _, directions = torch.linalg.eigh(embeddings.T @ embeddings)
    return directions.flip(1).T


def _random_rotation(dim: int) -> Tensor:
    """A rotation (dim, dim), always the same."""
    matrix = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
    return torch.linalg.qr(matrix).Q
