"""Whole histories give the loss and the gradients of their prefixes one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor

from st_fpsloss import (
    FPSLoss,
    FullSoftmaxLoss,
    LossStateCallback,
    PairCELoss,
    SampledSoftmaxLoss,
    SigmoidLoss,
    TripletLoss,
)
from st_fpsloss.batch.clicks import Direction
from st_fpsloss.encoding.plan import BatchPlan
from st_fpsloss.encoding.prefixes import rows_of_column
from st_fpsloss.encoding.rows import TokenizedRows
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.towers import Categorical, History, Numerical, Tower, id_embedding, id_transformer, two_tower
from st_fpsloss.training.prefix_collator import PrefixCollator

ITEMS = tuple(f"i{n}" for n in range(12))
DOCUMENTS = {item: {"item": item, "year": 1990 + number} for number, item in enumerate(ITEMS)}
# Two users begin alike, so that a query has two documents; one history is there twice; items repeat.
HISTORIES: list[dict[str, Any]] = [
    {"seen": ["i0", "i1", "i2", "i3", "i0", "i4"], "age": 20},
    {"seen": ["i0", "i1", "i5"], "age": 20},
    {"seen": ["i6", "i0"], "age": None},
    {"seen": ["i0", "i1", "i5"], "age": 20},
    {"seen": ["i7", "i7", "i8", "i2", "i1"], "age": 50},
]
BOTH: tuple[Direction, ...] = ("query_to_doc", "doc_to_query")


def make_model(
    words: Any = None, similarity: str = "dot", dropout: float = 0.0, shared: bool = False, num_hidden_layers: int = 2
) -> SentenceTransformer:
    """Users of a history and an age, and of words if given; items of an id and a year."""
    torch.manual_seed(0)
    ids: dict[str, Any] = {"shared_with": "item"} if shared else {"vocabulary": ITEMS}
    layers = num_hidden_layers
    seen = History("seen", max_length=5, dim=16, num_hidden_layers=layers, dropout=dropout, id_dropout=dropout, **ids)
    model = two_tower(
        Tower(words, features=[Numerical("age").fit([20, 30, 50]), seen], hidden_dims=(16,)),
        Tower(
            features=[Categorical("item", vocabulary=ITEMS, dim=16), Numerical("year").fit([1990, 2001])],
            hidden_dims=(16,),
        ),
        embedding_dim=8,
        similarity=similarity,
    )
    for module in model.modules():
        if hasattr(module, "gate"):
            torch.nn.init.normal_(module.gate.weight)
    return model.double()


def whole(model: SentenceTransformer, histories: list[dict[str, Any]] = HISTORIES) -> list[dict[str, Any]]:
    """The columns of a batch of whole histories, as the trainer finds them."""
    batch = PrefixCollator(model, "seen", DOCUMENTS)([{"query": row} for row in histories])
    features, labels = SentenceTransformerTrainer.collect_features(cast(Any, None), batch)
    assert labels is None
    return features


def one_by_one(model: SentenceTransformer, histories: list[dict[str, Any]] = HISTORIES) -> list[dict[str, Any]]:
    """The columns of a batch of all their prefixes."""
    queries, documents = [], []
    for row in histories:
        for place in range(1, len(row["seen"])):
            queries.append({**row, "seen": row["seen"][:place]})
            documents.append(DOCUMENTS[row["seen"][place]])
    return [model.preprocess(queries, task="query"), model.preprocess(documents, task="document")]


def loss_and_gradients(loss: Any, features: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and three times the gradients of all parameters."""
    loss.zero_grad()
    value = loss(features, None)
    (3 * value).backward()
    gradients = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    return value.detach(), gradients


def assert_equal(loss: Any, ours: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """Loss and every gradient agree as far as relevance, in float32, lets them."""
    value, gradients = loss_and_gradients(loss, ours)
    expected, expected_gradients = loss_and_gradients(loss, reference)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm()
        assert error <= 1e-6 * max(1.0, float(expected_gradients[name].norm())), name


def losses(model: SentenceTransformer) -> Iterator[tuple[str, ClickLoss]]:
    """All losses, in the forms that look at queries, documents and their identities."""
    known = [({"seen": ["i0", "i1"], "age": 20}, DOCUMENTS["i8"]), ({"seen": ["i7"], "age": 50}, DOCUMENTS["i2"])]
    yield "fps", FPSLoss(model)
    yield "keep", FPSLoss(model, duplicates="keep", directions=BOTH)
    yield "log_q", FPSLoss(model, log_q="corrected", directions=BOTH)
    yield "known", FPSLoss(model, known_positives=known)
    yield "cached", FPSLoss(model, cache_gradients=True, mini_batch_num_tokens=5)
    yield "full", FullSoftmaxLoss(model, list(DOCUMENTS.values()))
    yield "cached full", FullSoftmaxLoss(model, list(DOCUMENTS.values()), cache_gradients=True)
    yield "hardest", SampledSoftmaxLoss(model, hardest=3)
    yield "sigmoid", SigmoidLoss(model)
    yield "pairs", PairCELoss(model)
    yield "triplet", TripletLoss(model)


@pytest.mark.parametrize("name", [name for name, _ in losses(make_model())])
def test_loss_and_gradients_are_those_of_the_prefixes_one_by_one(name: str) -> None:
    model = make_model(shared=name == "fps", similarity="cosine" if name == "keep" else "dot")
    loss = dict(losses(model))[name].double()
    if loss.get_config_dict().get("log_q"):
        loss(one_by_one(model))  # fills the frequency tables...
    loss.eval()  # ... which then stay as they are
    assert_equal(loss, whole(model), one_by_one(model))


def test_a_sum_weighted_by_recency_has_prefixes_too() -> None:
    model = make_model(num_hidden_layers=0)
    assert_equal(FPSLoss(model).double(), whole(model), one_by_one(model))


@pytest.mark.parametrize("kind", ["transformer", "bag"])
@pytest.mark.parametrize("cache_gradients", [False, True])
def test_a_text_stands_beside_every_prefix(kind: str, cache_gradients: bool) -> None:
    words = ["young", "old", "man", "woman"]
    encoder = id_embedding(words, 16)
    if kind == "transformer":
        encoder = id_transformer(words, hidden_size=16, num_hidden_layers=1, dropout=0.0)
    model = make_model(encoder)
    texts = ["young man", "old woman man man", "", "old woman man man", "young"]
    rows = [{**row, "text": text} for row, text in zip(HISTORIES, texts, strict=True)]
    loss = FPSLoss(model, cache_gradients=cache_gradients, mini_batch_num_tokens=4).double()
    assert_equal(loss, whole(model, rows), one_by_one(model, rows))


@pytest.mark.parametrize("cache_gradients", [False, True])
def test_matryoshka_truncates_the_embeddings_of_prefixes(cache_gradients: bool) -> None:
    model = make_model()
    inner = FPSLoss(model, cache_gradients=cache_gradients, mini_batch_num_tokens=5).double()
    loss = MatryoshkaLoss(model, inner, matryoshka_dims=[8, 4])
    assert_equal(loss, whole(model), one_by_one(model))


def test_rows_without_relevance_ask_nothing() -> None:
    model = make_model()
    loss = FPSLoss(model).double()
    labels = torch.tensor([1.0, 0, 1, 2, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1])
    torch.testing.assert_close(loss(whole(model), labels), loss(one_by_one(model), labels), rtol=1e-6, atol=0)


def test_each_distinct_history_is_encoded_once() -> None:
    model = make_model()
    columns = [rows_of_column(features) for features in whole(model)]
    reference = [TokenizedRows.from_features(features) for features in one_by_one(model)]
    assert [len(rows) for rows in columns] == [len(rows) for rows in reference] == [14, 14]
    torch.testing.assert_close(columns[0].fingerprints(), reference[0].fingerprints(), rtol=0, atol=0)
    plan = BatchPlan.from_columns(columns, [None, None], 1000)
    assert [len(rows) for rows in plan.mini_batches] == [4, 8]
    assert [len(rows) for rows in BatchPlan.from_columns(reference, [None, None], 1000).mini_batches] == [10, 8]


@pytest.mark.parametrize("mini_batch_num_tokens", [1, 1000])
def test_dropout_is_replayed(mini_batch_num_tokens: int) -> None:
    model = make_model(dropout=0.3)
    histories = [HISTORIES[0], HISTORIES[4]]
    found = []
    for cache_gradients in (False, True):
        loss = FPSLoss(model, cache_gradients=cache_gradients, mini_batch_num_tokens=mini_batch_num_tokens).double()
        torch.manual_seed(1)
        found.append(loss_and_gradients(loss.train(), whole(model, histories)))
    (kept, kept_gradients), (cached, cached_gradients) = found
    torch.testing.assert_close(cached, kept, rtol=1e-12, atol=0)
    torch.testing.assert_close(cached_gradients, kept_gradients, rtol=1e-9, atol=1e-12)
    assert not torch.isclose(kept, loss.eval()(whole(model, histories)))


def train(model: SentenceTransformer, folder: Path, data: Dataset, **more: Any) -> tuple[list[float], float]:
    """The losses of three epochs of the stock trainer, and that of its evaluation."""
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=len(data),
        per_device_eval_batch_size=len(data),
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        router_mapping={"query": "query", "document": "document"},
    )
    loss = FPSLoss(model).double()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        loss=loss,
        callbacks=[LossStateCallback(loss)],
        **more,
    )
    trainer.train()
    learned = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return learned, trainer.evaluate()["eval_loss"]


def test_the_stock_trainer_learns_and_evaluates_the_same_from_whole_histories(tmp_path: Path) -> None:
    model = make_model()
    collator = PrefixCollator(model, "seen", DOCUMENTS)
    data = Dataset.from_dict({"query": HISTORIES})
    learned, evaluated = train(model, tmp_path / "whole", data, data_collator=collator)

    reference = make_model()
    clicks = [
        ({**row, "seen": row["seen"][:n]}, DOCUMENTS[row["seen"][n]])
        for row in HISTORIES
        for n in range(1, len(row["seen"]))
    ]
    pairs = Dataset.from_dict({"query": [query for query, _ in clicks], "document": [item for _, item in clicks]})
    expected, expected_evaluated = train(reference, tmp_path / "prefixes", pairs)
    assert len(learned) == 3 and learned[0] > learned[2]
    assert [*learned, evaluated] == pytest.approx([*expected, expected_evaluated], rel=1e-4)

    model.save_pretrained(str(tmp_path / "model"))
    again = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True)
    torch.testing.assert_close(
        again.encode_query(HISTORIES, convert_to_tensor=True).double(),
        model.encode_query(HISTORIES, convert_to_tensor=True).double(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_items_are_known_by_numbers_and_strings_and_prompts_stand_before_texts() -> None:
    words = id_transformer(["red", "blue", "film:"], hidden_size=16, num_hidden_layers=1)
    model = two_tower(
        Tower(features=[History("seen", vocabulary=("0", "1", "2"), max_length=5, dim=16)]),
        Tower(words),
        embedding_dim=8,
    )
    collator = PrefixCollator(model, "seen", {1: "red", 2: "blue"}, prompts={"document": "film: "})
    batch = collator([{"user": {"seen": [0, 1, 2]}}, {"user": {"seen": ["2", "1"]}}])
    expected = model.preprocess(["red", "blue", "red"], prompt="film: ", task="document")
    assert batch["document_input_ids"].tolist() == expected["input_ids"].tolist()
    assert batch["query_seen.values"].tolist() == [[2, 3], [4, 0]]
    assert (batch["query_task"], batch["document_task"]) == ("query", "document")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": {"seen": ["i0"], "age": 1}}, "has 1 items.*2 to 6.*next_item_windows"),
        ({"query": {"seen": ["i0"] * 7, "age": 1}}, "has 7 items.*2 to 6"),
        ({"query": {"age": 1}}, "has 0 items"),
        ({"query": "i0 i1"}, "'i0 i1' is no dict.*'seen'"),
        ({"query": {"seen": ["i0", "new"]}}, "`documents` lacks the item 'new'"),
        ({"query": {"seen": ["i0", "i1"], "agee": 3}}, "agee.*age"),
        ({"query": {"seen": ["i0", "i1"]}, "document": "i1"}, "one column.*'query', 'document'"),
    ],
)
def test_wrong_rows_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixCollator(make_model(), "seen", DOCUMENTS)([row])


def test_documents_in_a_list_are_refused() -> None:
    with pytest.raises(ValueError, match="is a list: give a dict from the ids of the histories to inputs"):
        PrefixCollator(make_model(), "seen", documents=list(DOCUMENTS))  # type: ignore[arg-type]


def test_a_tower_without_the_history_or_with_two_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"history='films'.*has 'seen'"):
        PrefixCollator(model, "films", DOCUMENTS)
    two = [History(name, vocabulary=ITEMS, dim=8) for name in ("seen", "bought")]
    with pytest.raises(ValueError, match=r"history='seen'.*'seen', 'bought'"):
        PrefixCollator(two_tower(Tower(features=two), Tower(id_embedding(ITEMS, 8))), "seen", DOCUMENTS)
    with pytest.raises(ValueError, match="has no features, but starts with a StaticEmbedding"):
        plain = Tower(id_embedding(ITEMS, 8))
        PrefixCollator(two_tower(plain, plain), "seen", DOCUMENTS)
