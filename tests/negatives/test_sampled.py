"""Negative columns of a data set, in the stock trainer."""

from __future__ import annotations

import copy
import logging
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers.base.sampler import BatchSamplers
from torch.utils.data import DataLoader

from st_fpsloss import FPSLoss, LossStateCallback, PairCELoss, SampledSoftmaxLoss
from st_fpsloss.negatives.hard import HARD_NEGATIVES
from st_fpsloss.negatives.sampled import ResampleNegatives, mixture_frequencies, resample, with_negatives
from tests.losses.conftest import sentences, small_model
from tests.training.runs import trainer, weights

QUERIES, DOCUMENTS = sentences(12, 5, 0), sentences(20, 8, 1)


def log(rows: int = 60, seed: int = 0, **columns) -> Dataset:
    rng = random.Random(seed)
    popular = [DOCUMENTS[min(int(rng.expovariate(0.25)), 19)] for _ in range(rows)]
    return Dataset.from_dict({"query": rng.choices(QUERIES, k=rows), "document": popular, **columns})


def by_number() -> dict[int, str]:
    return dict(enumerate(DOCUMENTS))


def negatives_of(dataset: Dataset) -> list[list[str]]:
    rows = dataset[:]
    columns = [values for name, values in rows.items() if name.startswith("negative_")]
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_a_known_positive_of_the_query_is_never_among_the_negatives(seed):
    clicks = log(150, seed)
    known = [(QUERIES[0], DOCUMENTS[0]), (QUERIES[1], DOCUMENTS[5])]
    positives = {*zip(clicks["query"], clicks["document"], strict=True), *known}
    dataset = with_negatives(clicks, 8, documents=DOCUMENTS, power=seed / 4, known_positives=known, seed=seed)
    for epoch in range(4):
        resample(dataset, epoch)
        drawn = {(q, d) for q, row in zip(clicks["query"], negatives_of(dataset), strict=True) for d in row}
        assert not drawn & positives
        assert {d for _, d in drawn} <= set(DOCUMENTS)


def test_rows_keep_their_columns_and_get_negatives_at_their_end():
    clicks = log(rows=10, label=[1.0] * 10)
    dataset = with_negatives(clicks, 3)
    assert dataset.column_names == ["query", "document", "label", "negative_1", "negative_2", "negative_3"]
    assert list(dataset[0]) == dataset.column_names
    assert dataset[:]["query"] == clicks["query"][:]
    assert dataset["negative_2"][4] == dataset[4]["negative_2"]  # one column alone
    again = with_negatives(clicks.add_column("negative_1", ["brew"] * 10), 2)
    assert again.column_names[-3:] == ["negative_1", "negative_2", "negative_3"]
    assert again[5]["negative_1"] == "brew"


def test_an_impression_without_a_click_is_no_positive():
    clicks = Dataset.from_dict(
        {"query": ["q"] * 3, "document": ["clicked", "shown", "other"], "label": [1.0, 0.0, -1.0]}
    )
    assert {d for row in negatives_of(with_negatives(clicks, 20, power=0)) for d in row} == {"shown", "other"}


def test_popularity_is_counted_from_the_clicks_to_the_power():
    clicks = Dataset.from_dict({"query": [f"q{n}" for n in range(9000)], "document": ["a"] * 8000 + ["b"] * 1000})
    clicks = Dataset.from_dict(
        {"query": ["own"] * 500 + clicks["query"][:], "document": ["c"] * 500 + clicks["document"][:]}
    )
    dataset = with_negatives(clicks, 10, power=0.75)
    drawn = np.array(negatives_of(dataset.select(range(500)))).ravel()
    assert abs(np.mean(drawn == "a") - 8**0.75 / (8**0.75 + 1)) < 4 * np.sqrt(0.14 / 5000)


def test_every_epoch_has_other_negatives_and_the_same_ones_when_it_comes_again():
    dataset = with_negatives(log(), 4)
    first = negatives_of(dataset)
    resample(dataset, 1)
    second = negatives_of(dataset)
    resample(dataset, 0)
    assert first == negatives_of(dataset) != second
    assert negatives_of(with_negatives(log(), 4, seed=1)) != first


def test_shuffle_select_and_copies_keep_each_rows_negatives():
    clicks = Dataset.from_dict({"query": [f"query {n}" for n in range(60)], "document": log()["document"][:]})
    dataset = with_negatives(clicks, 4)
    known = dict(zip(clicks["query"], negatives_of(dataset), strict=True))
    for other in (dataset.shuffle(seed=3), dataset.select(range(30, 50)), copy.deepcopy(dataset)):
        assert [known[query] for query in other[:]["query"]] == negatives_of(other)
    positives = dict(zip(clicks["query"], clicks["document"], strict=True))
    assert all(positives[row["query"]] == row["document"] for row in with_negatives(clicks.shuffle(seed=3), 4))


def test_workers_of_a_data_loader_see_the_epoch_change():
    dataset = with_negatives(log(rows=16), 2)
    loader = DataLoader(dataset, batch_size=8, num_workers=1, persistent_workers=True, collate_fn=list)
    read = lambda: [row["negative_1"] for batch in loader for row in batch]  # noqa: E731
    before = read()
    resample(dataset, 1)
    assert read() == dataset[:]["negative_1"] != before


def test_inputs_may_be_dicts():
    clicks = Dataset.from_dict(
        {
            "query": [{"text": "a", "age": 3}, {"text": "a", "age": 4}, {"text": "a", "age": 3}],
            "document": [{"text": "d", "year": 1999.0}, {"text": "e", "year": None}, {"text": "e", "year": None}],
        }
    )
    documents = {7: {"text": "d", "year": 1999}, 8: {"text": "e"}, 9: {"year": 1980, "text": "f"}}
    dataset = with_negatives(clicks, 12, documents=documents, power=0)
    own = negatives_of(dataset)
    assert all(negative == documents[9] for negative in own[0] + own[2])  # both documents are its positives
    assert {negative["text"] for negative in own[1]} == {"d", "f"}


def test_hard_negatives_come_first_and_sampled_ones_fill_up():
    documents = by_number()
    clicks = Dataset.from_dict({"query": ["q", "r", "s"], "document": DOCUMENTS[:3]})
    clicks = clicks.add_column(HARD_NEGATIVES, [[5, 6, 7, 0], [8], []])
    dataset = with_negatives(clicks, 4, documents=documents, power=0, num_hard=2)
    assert HARD_NEGATIVES not in dataset.column_names
    seen = set()
    for epoch in range(30):
        resample(dataset, epoch)
        full, short, empty = negatives_of(dataset)
        assert set(full[:2]) <= {DOCUMENTS[5], DOCUMENTS[6], DOCUMENTS[7]} and full[0] != full[1]  # 0 is its positive
        assert short[0] == DOCUMENTS[8]
        assert len(empty) == 4 and DOCUMENTS[2] not in empty
        seen |= set(full[:2])
    assert len(seen) == 3


@pytest.mark.parametrize("in_batch", [False, True])
def test_q_is_how_often_columns_hold_a_document_over_many_epochs(in_batch):
    clicks = log(40, label=[1.0, 1.0, 0.0, 1.0] * 10)
    ids = by_number()
    rng = random.Random(0)
    clicks = clicks.add_column(HARD_NEGATIVES, [rng.sample(range(20), k=number % 4) for number in range(40)])
    dataset = with_negatives(clicks, 4, documents=ids, power=0.5, num_hard=2)
    draws = dataset.format["format_kwargs"]["transform"]
    number_of = {text: number for number, text in ids.items()}
    counts = np.zeros(20)
    epochs = 3000
    rows = np.arange(40) if in_batch else np.flatnonzero(np.array(clicks["label"]) > 0)
    for epoch in range(epochs):
        draws.set_epoch(epoch)
        counts += np.bincount(draws.numbers(rows).ravel(), minlength=20)
    if in_batch:
        counts += epochs * np.bincount([number_of[text] for text in clicks["document"]], minlength=20)
    np.testing.assert_allclose(draws.q(in_batch), counts / counts.sum(), atol=1.5e-3)


def test_the_frequencies_of_a_loss_are_those_of_the_mixture():
    model = small_model()
    dataset = with_negatives(log(), 3, power=0)
    loss = FPSLoss(model, log_q="corrected", frequencies=mixture_frequencies(dataset, model, in_batch=True))
    rows = dataset[:16]
    features = [model.preprocess(values, task="document" if n else "query") for n, values in enumerate(rows.values())]
    seen = {}
    original = loss.objective
    loss.objective = lambda queries, documents, batch: (
        seen.update(log_q=batch.document_log_q) or original(queries, documents, batch)
    )
    loss(features)
    draws = dataset.format["format_kwargs"]["transform"]
    q = dict(zip(draws._inputs.tolist(), draws.q(in_batch=True), strict=True))
    expected = torch.tensor([[q[text] for text in rows[name]] for name in list(rows)[1:]]).log()
    torch.testing.assert_close(seen["log_q"], expected.float())
    with pytest.raises(ValueError, match="Pass what `with_negatives` returned"):
        mixture_frequencies(log(), model, in_batch=True)


def test_in_batch_and_uniform_negatives_with_the_q_of_their_mixture_learn_the_softmax_over_all_documents():
    num_rows, catalogue = 3000, torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).double()
    popular = [DOCUMENTS[min(int(random.Random(n).expovariate(0.25)), 19)] for n in range(num_rows)]
    clicks = Dataset.from_dict({"query": [f"query {n}" for n in range(num_rows)], "document": popular})
    draws = with_negatives(clicks, 1, documents=DOCUMENTS, power=0).format["format_kwargs"]["transform"]
    positive = torch.tensor([DOCUMENTS.index(text) for text in popular])
    columns = torch.stack([positive, torch.from_numpy(draws.numbers(np.arange(num_rows))[:, 0])])
    queries = torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.arange(num_rows) < 10  # ten rows ask, the others are context

    def gradient(q):
        u = queries.clone().requires_grad_()
        loss = FPSLoss(small_model(), log_q="corrected", scale=1.0)
        log_q = torch.from_numpy(q).log()[columns]
        value = loss.compute_loss_from_embeddings(
            [u, *catalogue[columns]], labels.double(), document_ids=columns, document_log_q=log_q
        )
        return torch.autograd.grad(value, u)[0][:10]

    u = queries[:10].clone().requires_grad_()
    exact = torch.autograd.grad(torch.nn.functional.cross_entropy(u @ catalogue.T, positive[:10]), u)[0]
    by_clicks = np.bincount(positive.numpy(), minlength=20) / num_rows
    error, of_clicks_alone = ((gradient(q) - exact).norm() / exact.norm() for q in (draws.q(True), by_clicks + 1e-9))
    assert error < 0.03
    assert of_clicks_alone > 5 * error


def seen_by_the_loss(kind, tmp_path, resume=None, callback=True, **arguments):
    """Texts of every batch that a training run hands to its loss, and the model that it ends with."""
    model = small_model()
    loss = kind(model)
    job = trainer(tmp_path, model, loss, dataset=with_negatives(log(rows=24), 3), callback=callback, **arguments)
    batches = []
    collate = job.data_collator

    def noting(rows):
        batches.append([tuple(row.values()) for row in rows])
        return collate(rows)

    job.data_collator = noting
    noting.valid_label_columns = collate.valid_label_columns
    job.train(resume_from_checkpoint=resume)
    return batches, model


MAPPING = {"query": "query", **{name: "document" for name in ("document", "negative_1", "negative_2", "negative_3")}}
ARGUMENTS = {"max_steps": 9, "router_mapping": MAPPING}


@pytest.mark.parametrize("batch_sampler", [BatchSamplers.BATCH_SAMPLER, BatchSamplers.NO_DUPLICATES])
def test_the_stock_trainer_redraws_every_epoch_and_resumes_in_the_middle_of_one(tmp_path, batch_sampler):
    options = {**ARGUMENTS, "batch_sampler": batch_sampler}
    straight, model = seen_by_the_loss(PairCELoss, tmp_path / "a", save_strategy="steps", save_steps=4, **options)
    per_epoch = len(straight) // 3  # NO_DUPLICATES reads one batch more than it uses
    epochs = [
        {row for batch in straight[start : start + 3] for row in batch} for start in range(0, len(straight), per_epoch)
    ]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert {row[:2] for row in epochs[0]} & {row[:2] for row in epochs[1]}
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    resumed, other = seen_by_the_loss(PairCELoss, tmp_path / "b", resume=checkpoint, **options)
    assert resumed == straight[per_epoch + 1 :]
    torch.testing.assert_close(weights(other), weights(model), rtol=0, atol=0)


def test_a_dictionary_of_data_sets_and_other_losses_are_redrawn_by_the_callback(tmp_path):
    model = small_model()
    parts = DatasetDict({"a": with_negatives(log(16), 2), "b": with_negatives(log(16, seed=1), 2)})
    losses = {"a": PairCELoss(model, learn_scale=False), "b": SampledSoftmaxLoss(model, learn_scale=False)}
    job = trainer(tmp_path, model, losses, False, parts, max_steps=6, router_mapping=MAPPING)
    job.add_callback(ResampleNegatives())
    job.train()
    draws = [part.format["format_kwargs"]["transform"] for part in parts.values()]
    assert [transform.keywords["transform"].epoch for transform in draws] == [1, 1]


def test_without_a_callback_it_warns_once_that_every_epoch_is_the_same(caplog):
    dataset = with_negatives(log(rows=10), 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(1100):
            dataset[:]
    assert sum("ResampleNegatives()" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: with_negatives(log().to_dict()), "must be a datasets.Dataset, got dict"),
        (lambda: with_negatives(log(), document="doc"), "no column 'doc'; its columns are"),
        (lambda: with_negatives(log().select([])), "is empty"),
        (lambda: with_negatives(log(), 0), "num_negatives=0 must be a whole number of at least 1"),
        (lambda: with_negatives(log(), power=-1), "`power` must not be negative"),
        (lambda: with_negatives(log(), seed=-1), "`seed`"),
        (lambda: with_negatives(log(), num_hard=1), "no column 'hard_negatives'"),
        (lambda: with_negatives(log(), 2, num_hard=3), "`num_hard` must be a whole number from 0 to `num_negatives`"),
        (lambda: with_negatives(log(), documents=[]), "`documents` must be"),
        (lambda: with_negatives(log(), documents=["brew"]), "`documents` lacks the document of row 0"),
        (
            lambda: with_negatives(log().add_column(HARD_NEGATIVES, [[99]] * 60), 2, by_number(), num_hard=1),
            "`documents` lacks the id 99",
        ),
        (
            lambda: with_negatives(Dataset.from_dict({"query": ["q", "q"], "document": ["a", "b"]})),
            "The query 'q' has every document that can be drawn for a positive",
        ),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_with_its_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_loss_state_callback_needs_no_negatives(tmp_path):
    model = small_model()
    loss = FPSLoss(model)
    job = trainer(tmp_path, model, loss, max_steps=2)
    assert any(isinstance(callback, LossStateCallback) for callback in job.callback_handler.callbacks)
    job.train()
