"""DeduplicatingCollator makes the batches of the trainer's own collator, and preprocesses less."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments

from st_fpsloss import Categorical, FPSLoss, History, Numerical, Tags, Tower, two_tower
from st_fpsloss.training.collator import DeduplicatingCollator, preprocess_distinct
from tests.losses.conftest import WORDS, gradients, plain_model, small_model, static_query_model
from tests.training.runs import trainer, weights

ROUTES = {"query": "query", "document": "document", "negative": "document"}
ROWS = [
    {"query": "quick fox", "document": "lazy dog", "negative": "seven wizards brew", "label": 1.0},
    {"query": "a", "document": "lazy dog", "negative": "", "label": 0.0},
    {"query": "quick fox", "document": "a", "negative": "lazy dog", "label": 2.0},
    {"query": "quick fox", "document": "a lazy dog jumps over the moonlit towers", "negative": "", "label": -1.0},
]


def feature_model(with_text: bool):
    """Dicts for both towers."""
    torch.manual_seed(0)
    text = small_model()[0].sub_modules["document"][0] if with_text else None
    user = Tower(features=[History("seen", vocabulary=WORDS, dim=8), Numerical("age", mean=40.0, std=10.0)])
    item = Tower(text, features=[Categorical("item", vocabulary=WORDS, dim=8), Tags("tags", vocabulary=WORDS, dim=8)])
    return two_tower(user, item, embedding_dim=8)


def dict_rows(with_text: bool) -> list[dict]:
    text = {"text": "a lazy dog"} if with_text else {}
    users = [
        {"seen": ["fox", "dog"], "age": 3.0},
        {"seen": ["dog", "fox"], "age": 3.0},
        {"seen": [], "age": None},
        {"seen": ["fox", "dog"], "age": 3.0},
    ]
    items = [{**text, "item": "fox", "tags": tags} for tags in (["a"], None, ["a"], ["a", "over"])]
    return [{"query": user, "document": item} for user, item in zip(users, items, strict=True)]


def collators(model, **options):
    """The trainer's own, and ours."""
    stock = trainer("unused", model=model, **options)
    return stock.data_collator, DeduplicatingCollator(model, stock.args)


def assert_same(ours: dict, stock: dict) -> None:
    assert list(ours) == list(stock)
    for name, value in stock.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name] == value


@pytest.mark.parametrize("prompts", [None, {"query": "over ", "document": "a lazy "}], ids=["bare", "prompts"])
@pytest.mark.parametrize("model_of", [small_model, static_query_model])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[:2], ROWS * 3], ids=len)
def test_batches_of_texts_are_those_of_the_stock_collator(model_of, prompts, rows):
    stock, ours = collators(model_of(), router_mapping=ROUTES, prompts=prompts)
    assert_same(ours(rows), stock(rows))


def test_a_model_without_towers_needs_no_router_mapping(minilm):
    stock, ours = collators(plain_model(minilm), router_mapping=None, prompts={"query": "over "})
    assert_same(ours(ROWS), stock(ROWS))


@pytest.mark.parametrize("with_text", [False, True])
def test_batches_of_dicts_are_those_of_the_stock_collator(with_text):
    rows = dict_rows(with_text)
    from_table = Dataset.from_list(rows)
    stock, ours = collators(feature_model(with_text), dataset=from_table)
    assert_same(ours(rows), stock(rows))
    assert_same(ours([from_table[n] for n in (0, 3, 1, 0)]), stock([from_table[n] for n in (0, 3, 1, 0)]))


def test_each_distinct_input_of_a_column_is_preprocessed_once():
    model = small_model()
    seen = []

    def counting(inputs, **options):
        seen.append(list(inputs))
        return model.preprocess(inputs, **options)

    preprocess_distinct(counting, ["fox", "dog", "fox", "fox"], task="query")
    assert seen == [["fox", "dog"]]


def test_inputs_that_differ_in_kind_or_in_one_number_are_different():
    arrays = [np.zeros(5000), np.ones(5000), np.zeros(5000)]
    arrays[2][2500] = 1e-9
    values = ["1", 1, 1.5, True, None, ["1"], {"a": 1}, {"a": "1"}, *arrays, "1", np.ones(5000)]
    seen = []

    def numbered(inputs):
        seen.append(len(inputs))
        return {"number": torch.arange(len(inputs))}

    numbers = preprocess_distinct(numbered, values)["number"].tolist()
    assert seen == [11]
    assert numbers == [*range(11), 0, 9]


def test_features_without_an_entry_a_row_come_from_all_inputs():
    def flattened(inputs):  # as for flash attention
        return {"input_ids": torch.arange(3 * len(inputs)), "cu_seq_lens_q": 3 * torch.arange(len(inputs) + 1)}

    assert_same(preprocess_distinct(flattened, ["fox", "dog", "fox"]), flattened(["fox", "dog", "fox"]))


@pytest.mark.parametrize("model_of", [small_model, static_query_model])
def test_loss_and_gradients_are_equal(model_of):
    model = model_of()
    found = []
    for collator in collators(model, router_mapping=ROUTES):
        model.zero_grad()
        loss = FPSLoss(model)
        features, labels = trainer("unused", model=model).collect_features(collator(ROWS * 2))
        value = loss(features, labels)
        value.backward()
        found.append((value.detach(), gradients(model, loss)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_the_stock_trainer_learns_the_same_with_it(tmp_path):
    ends = []
    for ours in (False, True):
        model = small_model(dropout=0.1)
        options = dict(model=model, loss=FPSLoss(model, log_q="corrected"), max_steps=3)
        training = trainer(tmp_path, **options)
        if ours:
            training = trainer(tmp_path, data_collator=DeduplicatingCollator(model, training.args), **options)
        training.train()
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_worker_processes_can_be_given_it():
    model = small_model()
    collator = pickle.loads(pickle.dumps(collators(model, router_mapping=ROUTES)[1]))
    assert_same(collator(ROWS), collators(model, router_mapping=ROUTES)[0](ROWS))


def test_without_a_router_mapping_it_is_refused():
    with pytest.raises(ValueError, match="no `router_mapping`"):
        DeduplicatingCollator(small_model(), SentenceTransformerTrainingArguments("unused", use_cpu=True))


def test_features_in_lists_are_repeated_too():
    def preprocess(inputs, **options):
        return {"n": [len(text) for text in inputs], "all": [len(inputs), len(inputs)], "x": torch.ones(len(inputs))}

    def one_entry_each(inputs, **options):
        return {"n": [len(text) for text in inputs], "x": torch.ones(len(inputs))}

    inputs = ["fox", "a", "fox", "lazy", "a"]
    for make in (preprocess, one_entry_each):
        found, expected = preprocess_distinct(make, inputs), make(inputs)
        assert torch.equal(found.pop("x"), expected.pop("x")) and found == expected
