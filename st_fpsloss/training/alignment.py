"""align_towers: a light query tower learns the embeddings of the document tower, on texts alone, before any click."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, normalize, softmax

from st_fpsloss.towers.encoder import stay_in_eval_mode
from st_fpsloss.towers.modules.document_bias import BiasDimension
from st_fpsloss.towers.start import carried_rank, start_linear
from st_fpsloss.utils.checks import positive_int

logger = logging.getLogger(__name__)

_SCALE = 20.0  # of the cosines in the softmax of AlignmentLoss
_MIN_TEXTS = 20
_MAX_HELD_OUT = 500
_NEIGHBOURS = 10
_EVALUATIONS = 5
_TRANSFORMER_RATE, _STATIC_RATE = 5e-4, 5e-3
_STRANGERS = 3.0  # a StaticEmbedding that finds so many times the neighbours that chance finds has learned them


def align_towers(
    model: SentenceTransformer,
    texts: Sequence[str],
    teacher: SentenceTransformer | None = None,
    epochs: int = 3,
    batch_size: int = 128,
    learning_rate: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Teaches the query tower the embeddings that the document tower, or a teacher model, gives to texts.

    A query tower with fewer layers than the document tower, a StaticEmbedding or another encoder has embeddings of its
    own: untrained, it ranks badly or at chance, and clicks would have to teach it from nothing what the document tower
    knows. On texts, which need no clicks, that is minutes of work: the stock trainer brings its embeddings to the
    others' by :class:`AlignmentLoss`. The document tower stays as it is, and so does a frozen query encoder.

    A StaticEmbedding that has the embeddings' size and agrees with them no better than chance starts from the embedding
    of each word of its vocabulary, which is encoded for that.

    A tenth of the texts, at most 500, is held out: how well both agree on these is logged as training goes on.

    Args:
        model: A model of :func:`~st_fpsloss.two_tower`. Its query tower is changed in place.
        texts: What the model will read: the queries of the log, and documents; some thousand and more. The prompt for
            queries is put before them on both sides.
        teacher: Takes the place of the document tower: a model whose embeddings are of the same size and in the same
            space, such as the encoder that the document tower started from. It reads the texts by ``encode_query``.
        epochs: Passes over the texts.
        batch_size: Texts of a step.
        learning_rate: At the first step; it falls to 0 at the last. None is 5e-4, and 5e-3 for a StaticEmbedding.
        seed: Of the order of the texts, and of which are held out.

    Returns:
        On the texts held out, ``cosine``, the mean cosine of a text's two embeddings, and ``neighbours@10``, the share
        of the ten texts nearest to a query that are the same for both.

    Raises:
        ValueError: The towers share weights, ``teacher`` has embeddings of another size, or ``texts`` are no strings or
            fewer than 20 different ones.

    Example::

        model = two_tower(Tower("me/encoder", num_hidden_layers=2), Tower("me/encoder"), similarity="cosine")
        align_towers(model, [*clicks["query"], *clicks["document"]])
    """
    tower = _query_tower(model, teacher)
    texts = _shuffled(texts, seed)
    epochs, batch_size = positive_int("epochs", epochs), positive_int("batch_size", batch_size)
    targets = _targets(model, texts, teacher)
    num_held_out = min(_MAX_HELD_OUT, max(2, len(texts) // 10))
    evaluator = AgreementEvaluator(texts[:num_held_out], targets[:num_held_out])
    before = evaluator(model)
    by_chance = _NEIGHBOURS / num_held_out
    if isinstance(tower[0], StaticEmbedding) and before[f"neighbours@{_NEIGHBOURS}"] < _STRANGERS * by_chance:
        _start_from_words(tower, model, teacher)
    pairs = Dataset.from_dict({"text": texts[num_held_out:], "label": targets[num_held_out:].numpy()})
    if learning_rate is None:
        learning_rate = _STATIC_RATE if isinstance(tower[0], StaticEmbedding) else _TRANSFORMER_RATE
    prompt = model.prompts.get("query")
    with tempfile.TemporaryDirectory() as folder, _without_dropout(tower):
        args = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            router_mapping={"text": "query"},
            prompts={"text": prompt} if prompt else None,
            eval_strategy="steps",
            eval_steps=1 / _EVALUATIONS,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=False,
            seed=seed,
        )
        SentenceTransformerTrainer(
            model=model, args=args, train_dataset=pairs, loss=AlignmentLoss(model), evaluator=evaluator
        ).train()
    after = evaluator.last
    logger.info("Query tower aligned on %d texts: %s, before it %s.", len(pairs), _in_words(after), _in_words(before))
    return after


class AlignmentLoss(nn.Module):
    """Distance to given embeddings, and to the similarities that they have among each other.

    With s_i the model's embedding of the text i of a batch and t_i the given one,

        loss = mean |s_i - t_i|² / mean |t_i|²  +  mean KL( softmax_j 20 cos(t_i, t_j) ‖ softmax_j 20 cos(s_i, t_j) ).

    The first term is 2 - 2 cos for unit embeddings. The second asks for what ranking needs: which of the batch's texts
    are near, with the others' embeddings as they are, those that the index will have.

    Args:
        model: The model. Its inputs go to the query tower by the training argument ``router_mapping``.

    Inputs: a column of texts, and ``label``, the embedding (dim,) of each; further dimensions of the model's, that of a
    document bias, are not looked at.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Returns the loss of a batch of texts, ``labels`` (M, dim)."""
        target = labels.float()
        found = self.model(sentence_features[0])["sentence_embedding"].float()[:, : target.shape[1]]
        distance = (found - target).square().sum(dim=1).mean() / target.square().sum(dim=1).mean()
        directions = normalize(target, dim=1)
        expected = softmax(_SCALE * directions @ directions.T, dim=1)
        similar = log_softmax(_SCALE * normalize(found, dim=1) @ directions.T, dim=1)
        return distance + kl_div(similar, expected, reduction="batchmean")


class AgreementEvaluator(BaseEvaluator):
    """How well the embeddings of queries agree with given ones, as :func:`align_towers` returns it.

    Args:
        texts: N texts.
        targets: (N, dim) their embeddings.
    """

    def __init__(self, texts: Sequence[str], targets: Tensor) -> None:
        super().__init__()
        self.primary_metric = "cosine"
        self.texts = list(texts)
        self.targets = normalize(targets.float(), dim=1)
        self.last: dict[str, float] = {}

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Returns the figures, and logs them."""
        found = model.encode_query(self.texts, convert_to_tensor=True, show_progress_bar=False)
        found = normalize(found[:, : self.targets.shape[1]].float().cpu(), dim=1)
        near = [_nearest(embeddings @ self.targets.T) for embeddings in (found, self.targets)]
        shared = (near[0][:, :, None] == near[1][:, None, :]).any(dim=2).float().mean()
        cosine = (found * self.targets).sum(dim=1).mean()
        self.last = {"cosine": float(cosine), f"neighbours@{_NEIGHBOURS}": float(shared)}
        logger.info("Agreement of the query tower after step %d: %s.", max(0, steps), _in_words(self.last))
        return dict(self.last)  # the trainer prefixes the names in what it is given


def _nearest(similarity: Tensor) -> Tensor:
    """Columns (N, 10) of the nearest other texts."""
    similarity = similarity.clone().fill_diagonal_(-torch.inf)
    return similarity.topk(min(_NEIGHBOURS, len(similarity) - 1), dim=1).indices


def _in_words(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


def _query_tower(model: SentenceTransformer, teacher: SentenceTransformer | None) -> nn.Sequential:
    """The modules of the query tower, seen to be ones that can be aligned."""
    router = model[0]
    if not isinstance(router, Router) or not {"query", "document"} <= router.sub_modules.keys():
        raise ValueError("model has no towers to align: build it with two_tower.")
    tower, document = router.sub_modules["query"], router.sub_modules["document"]
    weights = {id(parameter) for parameter in document.parameters()}
    if teacher is None and any(id(parameter) in weights for parameter in tower.parameters()):
        raise ValueError("The towers of model share weights: teaching one the embeddings of the other changes both.")
    if teacher is not None and _dim(teacher) != _dim(model):
        raise ValueError(
            f"teacher has embeddings of {_dim(teacher)} dimensions, model of {_dim(model)}: leave teacher=None, or "
            f"build the model with embedding_dim={_dim(teacher)}."
        )
    return tower


def _dim(model: SentenceTransformer) -> int:
    """Size of a model's embeddings without the dimension of a document bias."""
    return model.get_embedding_dimension() - any(isinstance(module, BiasDimension) for module in model)


def _shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """The different texts in a random order."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError('texts must be a list of strings; of inputs with side features give their "text".')
    different = list(dict.fromkeys(texts))
    if len(different) < _MIN_TEXTS:
        raise ValueError(f"texts has {len(different)} different texts: give at least {_MIN_TEXTS}, better thousands.")
    return [different[number] for number in np.random.default_rng(seed).permutation(len(different))]


def _targets(model: SentenceTransformer, texts: list[str], teacher: SentenceTransformer | None) -> Tensor:
    """The embeddings (N, dim) to learn, without the dimension of a document bias; float32 on the CPU."""
    arguments: dict[str, Any] = {
        "convert_to_tensor": True,
        "show_progress_bar": True,
        "normalize_embeddings": model.similarity_fn_name == "cosine",
    }
    if teacher is not None:
        targets = teacher.encode_query(texts, **arguments)
    else:
        targets = model.encode_document(texts, prompt=model.prompts.get("query") or "", **arguments)
    return targets[:, : _dim(model)].float().cpu()


@torch.no_grad()
def _start_from_words(tower: nn.Sequential, model: SentenceTransformer, teacher: SentenceTransformer | None) -> None:
    """Gives a StaticEmbedding the embedding to learn of each word of its vocabulary, and an MLP that passes it on."""
    static: Any = tower[0]
    table, dim = static.embedding.weight, _dim(model)
    layers = [module for module in tower if isinstance(module, Dense)]
    has_room = carried_rank([layer.out_features for layer in layers[:-1]], dim) == dim
    if not table.requires_grad or table.shape[1] != dim or not has_room:
        return
    words = [static.tokenizer.decode([number]).removeprefix("##").strip() for number in range(len(table))]
    known = [number for number, word in enumerate(words) if word]
    table[known] = _targets(model, [words[number] for number in known], teacher).to(table)
    start_linear(layers, torch.eye(dim))


@contextlib.contextmanager
def _without_dropout(tower: nn.Sequential) -> Iterator[None]:
    """Keeps the encoder and the MLP in eval mode while the trainer trains them: the targets have no noise either."""
    changed = [module for module in tower if "train" not in vars(module)]
    for module in changed:
        stay_in_eval_mode(module)
    try:
        yield
    finally:
        for module in changed:
            del module.train
