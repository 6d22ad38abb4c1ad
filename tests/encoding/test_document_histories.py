"""Documents in histories and candidates are one set: each encoded once, with the gradients of plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor

from st_fpsloss import DocumentHistory, FPSLoss, FullSoftmaxLoss, Numerical, Tower, two_tower
from st_fpsloss.encoding.rows import DOCUMENTS, HISTORIES
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.towers import Categorical, id_transformer
from st_fpsloss.training.collator import preprocess_distinct
from st_fpsloss.training.prefix_collator import PrefixCollator
from tests.losses.conftest import gradients

WORDS = [f"w{n}" for n in range(9)]
ITEMS = [{"text": " ".join(WORDS[: 1 + n % 5]), "year": 1990 + n} for n in range(8)]
# Two queries are equal; one document is in a history alone (4, 7), one among the candidates alone (3); two are empty.
HISTORIES_OF = [[0, 1, 4], [1], [], [0, 1, 4], [7, 7, 0, 2], [5, 6], None]
CLICKED = [2, 3, 0, 5, 6, 2, 1]


def make_model(words: bool = False, dropout: float = 0.0, **options: Any) -> SentenceTransformer:
    """Users of a history of documents, of an age, and of words if given; documents of words and a year."""
    torch.manual_seed(0)
    seen = DocumentHistory("seen", max_length=3, num_hidden_layers=1, dropout=dropout, **options)
    year = Numerical("year").fit([1990, 1999])
    query, document = (
        id_transformer(WORDS, 16, 1, 2, max_seq_length=12, dropout=dropout) if given else None
        for given in (words, True)
    )
    model = two_tower(
        Tower(query, features=[Numerical("age").fit([20, 50]), seen], hidden_dims=(16,)),
        Tower(document, features=[year, Categorical("shop", vocabulary=["s"], dim=2)], hidden_dims=(16,)),
        embedding_dim=8,
        similarity="cosine",
    )
    for module in model.modules():
        if hasattr(module, "gate"):
            torch.nn.init.normal_(module.gate.weight)
    return model.double()


def queries(histories: list[list[int] | None] = HISTORIES_OF) -> list[dict[str, Any]]:
    return [{"seen": history and [ITEMS[n] for n in history], "age": 30} for history in histories]


def columns(model: SentenceTransformer) -> list[dict[str, Any]]:
    documents = [ITEMS[n] for n in CLICKED]
    return [model.preprocess(queries(), task="query"), model.preprocess(documents, task="document")]


def plain_loss(loss: ClickLoss, model: SentenceTransformer) -> Tensor:
    """The loss with every row, and every document of every history, encoded by a call of its own."""

    def document(number: int) -> Tensor:
        return model(model.preprocess([ITEMS[number]], task="document"))["sentence_embedding"]

    encoded = []
    for history, query in zip(HISTORIES_OF, queries(), strict=True):
        read = (history or [])[-3:]
        features = model.preprocess([{**query, "seen": []}], task="query")
        features["seen.values"] = torch.tensor([list(range(1, len(read) + 1)) or [0]])
        features[DOCUMENTS] = torch.cat([document(number) for number in read]) if read else None
        encoded.append(model(features)["sentence_embedding"])
    seen = [history or [] for history in HISTORIES_OF]
    ids = torch.tensor([seen.index(history) for history in seen])
    rows = [torch.cat(encoded), torch.cat([document(number) for number in CLICKED])]
    return loss.compute_loss_from_embeddings(rows, query_ids=ids, document_ids=torch.tensor([CLICKED]))


@contextmanager
def counted(model: SentenceTransformer) -> Iterator[list[int]]:
    """Rows of each call of the document tower."""
    calls: list[int] = []
    tower = model[0].sub_modules["document"][0]
    hook = tower.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0]["input_ids"])))
    yield calls
    hook.remove()


MODES = {
    "kept": {"cache_gradients": False},
    "kept, small": {"cache_gradients": False, "mini_batch_num_tokens": 6},
    "as memory allows": {"mini_batch_num_tokens": 6},
    "cached": {"cache_gradients": True, "mini_batch_num_tokens": 6},
}


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_plain_pytorch_and_each_distinct_document_is_encoded_once(
    mode: str, words: bool
) -> None:
    model = make_model(words, pooling="recency")
    loss = FPSLoss(model, directions=("query_to_doc", "doc_to_query"), **MODES[mode])
    expected = plain_loss(loss, model)
    (3 * expected).backward()
    reference = gradients(model, loss)
    model.zero_grad()
    loss.zero_grad()
    with counted(model) as calls:
        value = loss(columns(model))
        assert sum(calls) == len({*CLICKED, 0, 1, 2, 4, 5, 6, 7}) == 8
    (3 * value).backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert (gradients(model, loss) - reference).norm() < 1e-6 * reference.norm()


@pytest.mark.parametrize("pooling", ["last", "mean", "recency"])
def test_a_document_in_a_history_alone_receives_its_gradient_unless_detached(pooling: str) -> None:
    for detach in (False, True):
        found = []
        for cache_gradients in (False, True):
            model = make_model(pooling=pooling, detach=detach)
            # The year of a document that no row clicked: only the history leads to it.
            features = [
                model.preprocess([{"seen": [{"text": "w1", "shop": "s"}]}, {}], task="query"),
                model.preprocess([ITEMS[0], ITEMS[1]], task="document"),
            ]
            FPSLoss(model, cache_gradients=cache_gradients, mini_batch_num_tokens=3)(features).backward()
            found.append(model[0].sub_modules["document"][0].encoders[1].table.weight.grad[2].norm().item())
        assert found[0] == pytest.approx(found[1], rel=1e-6) and (found[0] == 0) == detach


def test_kept_and_cached_gradients_are_equal_with_dropout() -> None:
    found = []
    for cache_gradients in (False, True):
        model = make_model(words=True, dropout=0.3).train()
        loss = FPSLoss(model, cache_gradients=cache_gradients, mini_batch_num_tokens=6)
        torch.manual_seed(1)
        loss(columns(model)).backward()
        found.append(gradients(model, loss))
    assert (found[0] - found[1]).norm() < 1e-6 * found[0].norm()


@pytest.mark.parametrize("cache_gradients", [False, True])
def test_whole_histories_are_their_prefixes_one_by_one(cache_gradients: bool) -> None:
    model = make_model(pooling="mean")
    documents = {f"i{number}": item for number, item in enumerate(ITEMS)}
    histories = [["i0", "i1", "i4", "i2"], ["i0", "i1", "i3"], ["i7", "i7"]]
    batch = PrefixCollator(model, "seen", documents)([{"query": {"seen": items, "age": 30}} for items in histories])
    whole = [
        {name.removeprefix(f"{column}_"): value for name, value in batch.items() if name.startswith(f"{column}_")}
        for column in ("query", "document")
    ]
    prefixes = [(items[:place], items[place]) for items in histories for place in range(1, len(items))]
    one_by_one = [
        model.preprocess([{"seen": [documents[i] for i in seen], "age": 30} for seen, _ in prefixes], task="query"),
        model.preprocess([documents[target] for _, target in prefixes], task="document"),
    ]
    found = []
    loss = FPSLoss(model, cache_gradients=cache_gradients, mini_batch_num_tokens=6)
    for features in (whole, one_by_one):
        loss.zero_grad()
        value = loss(features)
        value.backward()
        found.append((value.item(), gradients(model, loss)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert (found[0][1] - found[1][1]).norm() < 1e-6 * found[1][1].norm()


def test_a_corpus_beside_the_batch_and_rows_without_click_add_no_second_encoding() -> None:
    model = make_model()
    with counted(model) as calls:
        FullSoftmaxLoss(model, ITEMS)(columns(model)).backward()
    assert sum(calls) == len(ITEMS)
    with counted(model) as calls:  # the query of the row r=0 is not needed, and so not its history
        FPSLoss(model, cache_gradients=False)(columns(model), torch.tensor([1.0, 1, 1, 1, 0, 1, 1]))
    assert sum(calls) == len({*CLICKED, 0, 1, 4})


def test_frozen_documents_go_through_their_encoder_once_a_run() -> None:
    model = make_model()
    model[0].sub_modules["document"][0].text_encoder.requires_grad_(False)
    values = {}
    for cache_frozen in (False, True):
        loss = FPSLoss(model.eval(), cache_frozen=cache_frozen)
        values[cache_frozen] = [loss(columns(model)).item() for _ in range(2)]
    calls: list[int] = []
    encoder = model[0].sub_modules["document"][0].text_encoder.model
    encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    assert loss(columns(model)).item() == values[True][0] and not calls
    assert values[True] == pytest.approx(values[False])


def test_matryoshka_truncates_the_embeddings_but_not_the_documents_of_histories() -> None:
    model = make_model()
    matryoshka = MatryoshkaLoss(model, FPSLoss(model, mini_batch_num_tokens=6), [8, 4])
    matryoshka(columns(model), None).backward()
    found = gradients(model, matryoshka.loss)
    model.zero_grad()
    loss = FPSLoss(model)
    queries_, documents = (model(features)["sentence_embedding"] for features in columns(model))
    seen = [history or [] for history in HISTORIES_OF]
    ids = {"query_ids": torch.tensor([seen.index(one) for one in seen]), "document_ids": torch.tensor([CLICKED])}
    for dim in (8, 4):
        loss.compute_loss_from_embeddings([queries_[:, :dim], documents[:, :dim]], **ids).backward(retain_graph=True)
    assert (gradients(model, loss) - found).norm() < 1e-6 * found.norm()
    kept = MatryoshkaLoss(model, FPSLoss(model, cache_gradients=False), [4])
    with pytest.raises(ValueError, match="MatryoshkaLoss needs cache_gradients"):
        kept(columns(model), None)


def test_batches_without_documents_and_repeated_inputs() -> None:
    model = make_model()
    clicked = model.preprocess([ITEMS[0], ITEMS[1]], task="document")
    FPSLoss(model)([model.preprocess([{"seen": []}, {"seen": None, "age": 3}], task="query"), clicked]).backward()
    distinct = preprocess_distinct(model.preprocess, queries(), task="query")
    loss, every = FPSLoss(model), columns(model)
    torch.testing.assert_close(loss([distinct, every[1]]), loss(every))
    assert distinct[HISTORIES] == ("seen.values",)
