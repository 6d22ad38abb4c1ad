"""Counts of rows, exact and sketched: right against naive counting, forgetful on demand, equal after a resume."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset

from st_fpsloss import FPSLoss, SampledSoftmaxLoss, Tower, two_tower
from st_fpsloss.data.movielens import load_movielens_100k
from st_fpsloss.frequencies.sketch import FrequencySketch
from st_fpsloss.frequencies.table import Frequencies, FrequencyTable
from st_fpsloss.towers import Categorical, Numerical, id_embedding, id_transformer
from tests.losses.conftest import WORDS, small_model, static_query_model
from tests.training.runs import click_log, trainer

Batch = tuple[torch.Tensor, torch.Tensor]

KINDS: dict[str, Callable[..., Frequencies]] = {
    "table": FrequencyTable,
    "sketch": FrequencySketch,
    "narrow sketch": lambda **settings: FrequencySketch(width=64, **settings),
}


def batches(num_draws: int, num_keys: int, batch_size: int = 256, seed: int = 0) -> list[Batch]:
    """Distinct keys and their counts of batches drawn with p ∝ 1/rank; keys are any 64-bit numbers."""
    rng = np.random.default_rng(seed)
    key_of = rng.integers(-(2**63), 2**63 - 1, num_keys)
    p = 1 / np.arange(1, num_keys + 1)
    drawn = key_of[rng.choice(num_keys, num_draws, p=p / p.sum())]
    parts = [np.unique(drawn[n : n + batch_size], return_counts=True) for n in range(0, num_draws, batch_size)]
    return [(torch.from_numpy(keys), torch.from_numpy(counts)) for keys, counts in parts]


def counted(table: Frequencies, stream: list[Batch]) -> Frequencies:
    for keys, counts in stream:
        table.update(keys, counts)
    return table


def reference(stream: list[Batch], half_life: float | None = None) -> dict[int, float]:
    """Every draw by itself, with the weight that the draws after its batch leave it."""
    total = sum(int(counts.sum()) for _, counts in stream)
    found: Counter[int] = Counter()
    seen = 0
    for keys, counts in stream:
        seen += int(counts.sum())
        weight = 1.0 if half_life is None else 0.5 ** ((total - seen) / half_life)
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            found[key] += count * weight
    return dict(found)


def assert_log_q(table: Frequencies, counts: dict[int, float], prior: float, atol: float = 1e-6) -> None:
    keys = np.array(list(counts))
    values = np.array(list(counts.values()))
    expected = np.log((values + prior) / (values.sum() + prior * len(keys)))
    np.testing.assert_allclose(table.log_q(torch.from_numpy(keys)).numpy(), expected, atol=atol)


@pytest.mark.parametrize("kind", ["table", "sketch"])
@pytest.mark.parametrize("prior", [0.0, 1.0, 2.5])
def test_what_fits_is_counted_exactly(kind, prior):
    stream = batches(20_000, 3000)
    table = counted(KINDS[kind](prior=prior), stream)
    assert table.total == 20_000
    assert_log_q(table, reference(stream), prior)
    unseen = table.log_q(torch.tensor([12345]))
    rarest = min(reference(stream).values()) if prior == 0 else prior  # without a prior, as rare as what is rarest
    assert unseen.exp() <= (rarest + 1e-6) / 20_000
    assert unseen > -15


def test_a_table_from_a_checkpoint_without_counts_answers():
    table = FrequencyTable(prior=0.5)
    table.import_state(FrequencyTable().export_state())
    assert table.log_q(torch.tensor([3])).tolist() == [0.0]


@pytest.mark.parametrize("kind", ["table", "sketch"])
def test_a_draw_counts_half_after_the_half_life(kind):
    stream = batches(30_000, 40)  # all of them come often: nothing is forgotten
    table = counted(KINDS[kind](prior=1.0, half_life=1500.0), stream)
    expected = reference(stream, half_life=1500.0)
    assert table.total == pytest.approx(sum(expected.values()), rel=1e-6)
    assert_log_q(table, expected, prior=1.0, atol=2e-5)


@pytest.mark.parametrize("kind", ["table", "sketch"])
def test_a_batch_of_thousands_of_half_lives_forgets_all_before_it(kind):
    table = KINDS[kind](prior=0.0, half_life=1.0)
    table.update(torch.tensor([5]), torch.tensor([3000]))
    table.update(torch.tensor([7, 9]), torch.tensor([3000, 1000]))
    assert table.total == 4000 and table._num_distinct() == 2
    torch.testing.assert_close(table.log_q(torch.tensor([7, 9])).exp(), torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("kind", KINDS)
def test_q_follows_a_log_that_drifts(kind):
    before, after = batches(10_000, 30, seed=1), batches(10_000, 30, seed=2)
    keys = torch.cat([keys for keys, _ in after]).unique()

    def error(half_life: float | None) -> float:
        table = counted(KINDS[kind](prior=0.0, half_life=half_life), before + after)
        alone = counted(FrequencyTable(prior=0.0), after)
        return float((table.log_q(keys) - alone.log_q(keys)).abs().mean())

    assert error(half_life=2000) < 0.25  # what the last 2000 draws differ from the last 10,000
    assert error(half_life=None) > 0.6  # half of the mass is gone for good


@pytest.mark.parametrize("kind", ["table", "sketch"])
def test_rows_that_do_not_come_any_more_make_room(kind):
    table = KINDS[kind](half_life=1000.0)
    for number in range(200):
        keys = torch.arange(100) + 100 * number + 10**6
        table.update(keys, torch.ones(100))
    assert 4000 <= table._num_distinct() <= 5100  # 1/16 is what four half-lives leave, at 100 rows in 100 draws
    assert len(table.export_state().get("fingerprints", "")) < 40_000


@pytest.mark.parametrize("half_life", [None, 3000.0])
def test_a_sketch_is_right_where_rows_are_frequent_and_unbiased_over_draws(half_life):
    stream = batches(400_000, 200_000, batch_size=4096)
    sketch = counted(FrequencySketch(width=2**13, half_life=half_life), stream)
    table = counted(FrequencyTable(half_life=half_life), stream)
    recent = torch.cat([keys.repeat_interleave(counts) for keys, counts in stream[-3:]])
    error = sketch.log_q(recent) - table.log_q(recent)
    frequent = table.log_q(recent) > np.log(1 / 500)
    assert error[frequent].abs().max() < 0.05
    assert error.abs().mean() < 0.5
    assert abs(error.mean()) < 0.1
    assert sketch._num_distinct() == pytest.approx(table._num_distinct(), rel=0.05)
    assert sketch.total == table.total


def test_a_reading_is_never_too_small_and_the_sample_mends_what_is_too_large():
    stream = batches(100_000, 100_000, batch_size=1024)
    sketch = counted(FrequencySketch(width=2**11), stream)
    counts = reference(stream)
    keys = np.array(list(counts))
    truth = np.array(list(counts.values()))
    readings = sketch._readings(keys)
    assert (readings >= truth).all() and (readings > truth).mean() > 0.5
    corrected = np.log(sketch._counts_of(keys) / truth)
    uncorrected = np.log(readings / truth)
    assert np.average(np.abs(corrected), weights=truth) < 0.7 * np.average(uncorrected, weights=truth)


def test_memory_and_state_of_a_sketch_do_not_grow():
    sizes = []
    sketch = FrequencySketch(width=2**12, half_life=10_000.0)
    for seed in range(4):
        counted(sketch, batches(100_000, 200_000, batch_size=4096, seed=seed))
        sizes.append(len(json.dumps(sketch.export_state())))
    assert max(sizes) < 1.1 * (16 * 2**12 + 16 * 16_384) * 4 / 3  # 16 bytes of 4 lines, 16 of a sampled key; base64
    assert sizes[-1] < 1.1 * sizes[1]
    assert len(sketch._sample) <= 16_384


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half_life", [None, 700.0])
def test_straight_and_resumed_counting_end_bit_equal(kind, half_life):
    stream = batches(30_000, 20_000)
    straight = counted(KINDS[kind](half_life=half_life), stream)
    stopped = counted(KINDS[kind](half_life=half_life), stream[:50])
    resumed = KINDS[kind](half_life=half_life)
    resumed.import_state(json.loads(json.dumps(stopped.export_state())))
    counted(resumed, stream[50:])
    keys = torch.cat([keys for keys, _ in stream])
    assert resumed.export_state() == straight.export_state()
    assert torch.equal(resumed.log_q(keys), straight.log_q(keys))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_hear_of_keys_in_another_order_agree(kind):
    tables = [KINDS[kind](half_life=900.0) for _ in range(2)]
    for keys, counts in batches(20_000, 20_000):
        order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
        tables[0].update(keys, counts)
        tables[1].update(keys[order], counts[order])
        assert torch.equal(tables[0].log_q(keys), tables[1].log_q(keys))


def test_the_table_of_movielens_is_bit_equal_after_a_resume(tmp_path):
    ratings = load_movielens_100k().splits()["train"]
    columns = {"query": "user_id", "document": "item_id"}
    clicks = Dataset.from_dict({name: list(map(str, ratings[column][:])) for name, column in columns.items()})
    ids = [sorted(set(column[:])) for column in (clicks["query"], clicks["document"])]

    def run(folder, resume=None):
        torch.manual_seed(0)
        model = two_tower(*(Tower(id_embedding(names, 4), hidden_dims=()) for names in ids), embedding_dim=4)
        loss = FPSLoss(model, log_q="corrected", directions=("query_to_doc", "doc_to_query"))
        training = trainer(
            folder, model=model, loss=loss, dataset=clicks, per_device_train_batch_size=8192, max_steps=-1,
            num_train_epochs=1, save_strategy="steps", save_steps=6,
        )  # fmt: skip
        training.train(resume_from_checkpoint=resume)
        return model, loss

    model, straight = run(tmp_path / "straight")
    _, resumed = run(tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint-6"))
    assert resumed.export_state() == straight.export_state()
    for side in ("query", "document"):
        beforehand = FrequencyTable.from_inputs(model, clicks[side][:], side)
        keys = torch.from_numpy(beforehand._counts.fingerprints)
        assert resumed.frequencies[side].total == beforehand.total == 98_114
        assert len(resumed.frequencies[side]) == len(beforehand)
        assert torch.equal(resumed.frequencies[side].log_q(keys), beforehand.log_q(keys))


@pytest.mark.parametrize("half_life", [None, 20.0])
def test_a_training_run_with_a_sketch_ends_bit_equal_after_a_resume(tmp_path, half_life):
    def run(folder, resume=None):
        model = small_model(dropout=0.1)
        loss = FPSLoss(
            model, log_q="corrected", frequencies={"document": FrequencySketch(width=16, half_life=half_life)}
        )
        training = trainer(folder, model=model, loss=loss, save_strategy="steps", save_steps=4)
        training.train(resume_from_checkpoint=resume)
        return loss

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint-4"))
    assert straight.export_state() == resumed.export_state()
    assert 0 < straight.frequencies["document"].total <= 64


@pytest.mark.parametrize(
    ("stored", "given", "message"),
    [
        (FrequencyTable(), FrequencySketch(width=8), "counts of a FrequencyTable, but `frequencies` has a FrequencySk"),
        (FrequencySketch(width=8), FrequencyTable(), "counts of a FrequencySketch, but `frequencies` has a FrequencyT"),
        (FrequencySketch(width=8), FrequencySketch(width=9), "FrequencySketch with `width=8`, not 9"),
        (FrequencySketch(width=8), FrequencySketch(width=8, depth=2), "FrequencySketch with `depth=4`, not 2"),
    ],
)
def test_a_resume_with_another_kind_of_table_is_refused(stored, given, message):
    model = small_model()
    state = FPSLoss(model, log_q="corrected", frequencies={"document": stored}).export_state()
    with pytest.raises(ValueError, match=message):
        FPSLoss(model, log_q="corrected", frequencies={"document": given}).import_state(state)


def featured_model():
    torch.manual_seed(0)
    features = [Categorical("genre", vocabulary=["drama", "comedy"]), Numerical("year", mean=1990, std=10)]
    towers = [
        Tower(id_transformer(WORDS, 16, 1, 2, max_seq_length=20, dropout=0.0), features=own) for own in ([], features)
    ]
    return two_tower(*towers, embedding_dim=8)


def prompted_model():
    tower = Tower(id_transformer(WORDS, 16, 1, 2, max_seq_length=50, dropout=0.0), hidden_dims=(16,))
    return two_tower(tower, tower, embedding_dim=8, prompts={"query": "quick ", "document": "lazy dog "})


LOGS: dict[str, tuple[Callable, list]] = {
    "text": (small_model, ["quick brown fox", "a", "lazy dog", "brew"]),
    "one tower for both": (lambda: small_model(shared=True), ["quick brown fox", "a", "lazy dog", "brew"]),
    "bag of words": (static_query_model, ["quick brown fox", "a", "lazy dog", "brew"]),
    "prompts of the model": (prompted_model, ["quick brown fox", "a", "lazy dog", "brew"]),
    "dicts": (
        featured_model,
        [
            {"text": "quick brown fox", "genre": "drama", "year": 1994},
            {"text": "quick brown fox", "genre": "comedy", "year": None},
            {"text": "a", "year": 2001.0},
            {"genre": "drama"},
        ],
    ),
}


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("prompt", [None, "potent "])
def test_counts_of_a_whole_log_are_found_by_the_rows_of_a_batch(name, prompt):
    make, documents = LOGS[name]
    model = make()
    log = random.Random(0).choices(documents, weights=[8, 4, 2, 1], k=60)
    table = FrequencyTable.from_inputs(model, log, "document", prompt=prompt, prior=0.0)
    by_count = FrequencyTable.from_inputs(
        model, documents, "document", counts=[log.count(document) for document in documents], prompt=prompt, prior=0.0
    )
    loss = FPSLoss(model, log_q="corrected", frequencies={"document": table})
    seen = {}
    original = loss.objective
    loss.objective = lambda queries, rows, batch: seen.update(q=batch.document_log_q) or original(queries, rows, batch)
    batch = [documents[n] for n in (3, 0, 1, 1, 2)]
    loss(
        [
            model.preprocess(["quick", "a", "fox", "dog", "a"], task="query"),
            model.preprocess(batch, task="document", prompt=prompt),
        ]
    )
    expected = torch.tensor([[log.count(document) / 60 for document in batch]]).log()
    torch.testing.assert_close(seen["q"], expected)
    assert table.total == 60 and table.frozen
    assert by_count.total == table.total and dict(
        zip(by_count._counts.fingerprints, by_count._counts.values, strict=True)
    ) == {key: value for key, value in zip(table._counts.fingerprints, table._counts.values, strict=True)}


def test_counts_of_a_data_set_are_those_of_training_on_it_once(tmp_path):
    dataset = click_log()
    model = small_model(dropout=0.1)
    loss = FPSLoss(model, log_q="corrected")
    trainer(tmp_path, model=model, loss=loss, dataset=dataset, max_steps=-1, num_train_epochs=1).train()
    beforehand = FrequencyTable.from_inputs(model, dataset["document"], "document")
    keys = torch.from_numpy(beforehand._counts.fingerprints)
    assert beforehand.total == loss.frequencies["document"].total == 64
    assert torch.equal(beforehand.log_q(keys), loss.frequencies["document"].log_q(keys))
    sketch = FrequencySketch.from_inputs(model, dataset["document"], "document", width=1024)
    torch.testing.assert_close(sketch.log_q(keys), beforehand.log_q(keys))


def test_a_frozen_table_stays_and_another_counts_on(tmp_path):
    dataset = click_log()
    for frozen, total in ((True, 64), (False, 128)):
        model = small_model()
        table = FrequencyTable.from_inputs(model, dataset["document"], "document", frozen=frozen)
        loss = SampledSoftmaxLoss(model, negatives="in_batch", log_q="standard", frequencies={"document": table})
        trainer(tmp_path, model=model, loss=loss, dataset=dataset).train()
        assert table.total == total


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: FrequencyTable(prior=-1.0), "`prior` must not be negative, got -1.0"),
        (lambda model: FrequencyTable(prior=float("nan")), "`prior`"),
        (lambda model: FrequencyTable(half_life=0), "`half_life` must be a number of draws above 0, got 0"),
        (lambda model: FrequencySketch(half_life=float("inf")), "None never forgets"),
        (lambda model: FrequencySketch(width=0), "width=0 must be a whole number of at least 1"),
        (lambda model: FrequencySketch(depth=2.0), "depth=2.0 must"),
        (lambda model: FrequencyTable.from_inputs(model, [], "document"), "`inputs` is empty"),
        (lambda model: FrequencyTable.from_inputs(model, "a fox", "document"), "got a str: pass a list"),
        (lambda model: FrequencyTable.from_inputs(model, ["a"], "documents"), '`task` must be "query" or "document"'),
        (lambda model: FrequencyTable.from_inputs(model, ["a", "fox"], "query", counts=[1]), "fewer counts"),
        (lambda model: FrequencyTable.from_inputs(model, ["a"], "query", counts=[1, 2]), "more counts"),
        (lambda model: FrequencyTable.from_inputs(model, ["a"], "query", counts=[-1]), "not negative, got -1.0"),
        (
            lambda model: FPSLoss(model, log_q="standard", frequencies={"documents": FrequencyTable()}),
            r"goes by 'query' and 'document', got \['documents'\]",
        ),
        (lambda model: FPSLoss(model, log_q="standard", frequencies={"document": {3: 1.0}}), "FrequencySketch, got di"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_model())


def test_a_column_of_a_data_set_is_counted_as_it_is_read():
    model = featured_model()
    documents = LOGS["dicts"][1]
    dataset = Dataset.from_dict({"document": [{"genre": None, "text": "", "year": None} | d for d in documents * 2]})
    table = FrequencyTable.from_inputs(model, dataset["document"], "document")
    assert len(table) == 4 and table.total == 8
