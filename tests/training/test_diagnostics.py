from __future__ import annotations

import itertools
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from st_fpsloss import FPSLoss, PairCELoss, SampledSoftmaxLoss, SigmoidLoss, TripletLoss
from st_fpsloss.training.setting_checks import prompt_warnings
from tests.losses.conftest import sentences, small_model
from tests.training.runs import trainer

LOGGERS = ("st_fpsloss.training.reporting", "st_fpsloss.training.diagnostics")


def said(caplog, tmp_path, loss, **options) -> list[str]:
    """What the guard says in a real training."""
    with caplog.at_level(logging.INFO, logger="st_fpsloss"):
        training = trainer(tmp_path, model=loss.model, loss=loss, **options)
        training.train()
    said.log_history = training.state.log_history
    return [
        record.getMessage() for record in caplog.records if record.name in LOGGERS and record.levelno == logging.WARNING
    ]


def different_clicks(rows: int = 64) -> Dataset:
    return Dataset.from_dict({"query": sentences(rows, 6, seed=0), "document": sentences(rows, 20, seed=1)})


def test_a_healthy_training_is_summed_up_without_a_warning(caplog, tmp_path):
    loss = FPSLoss(small_model(similarity="cosine"), log_q="corrected", directions=("query_to_doc", "doc_to_query"))
    assert said(caplog, tmp_path, loss, per_device_train_batch_size=32, learning_rate=1e-3) == []
    summaries = [record.getMessage() for record in caplog.records if record.getMessage().startswith("FPSLoss: α 14")]
    assert len(summaries) == 1
    assert "(learned, at most 100)" in summaries[0]
    assert "effective of" in summaries[0] and "masked" in summaries[0] and "repeated" in summaries[0]
    names = {"alpha_at_bound", "masked_share", "repeated_rows", "distinct_negatives", "effective_negatives"}
    entry = said.log_history[0]
    assert names <= {name.removeprefix("loss/") for name in entry}
    assert 0 < entry["loss/masked_share"] < 0.3 and 0 < entry["loss/repeated_rows"] < 1
    assert 2 < entry["loss/effective_negatives"] <= entry["loss/distinct_negatives"]


@pytest.mark.parametrize("make", [PairCELoss, SigmoidLoss])
def test_other_losses_are_summed_up_too(caplog, tmp_path, make):
    assert said(caplog, tmp_path, make(small_model(similarity="cosine"))) == []
    assert any(record.getMessage().startswith(f"{make.__name__}: α ") for record in caplog.records)


def test_the_other_similarity_is_no_matter_where_embeddings_have_length_one(caplog, tmp_path):
    model = small_model(similarity="cosine")
    loss = FPSLoss(model)
    model.similarity_fn_name = "dot"
    assert said(caplog, tmp_path, loss, learning_rate=1e-3) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FPSLoss(small_model(), bias=-6.0), "bias=-6 has no effect"),
        (
            lambda: FPSLoss(small_model(similarity="cosine"), scale=1.0, learn_scale=False),
            "α = 1 is fixed and the similarity is a cosine: .* above 0.10",  # DESIGN.md: 0.105
        ),
        (
            lambda: FPSLoss(small_model(), similarity="cosine"),
            "trains with the similarity 'cosine', and model.similarity_fn_name is 'dot'",
        ),
    ],
)
def test_settings_that_cannot_work_are_warned_of_at_the_start(caplog, tmp_path, make, message):
    (warning,) = said(caplog, tmp_path, make(), learning_rate=1e-3)
    assert re.search(message, warning)


def test_a_fixed_alpha_of_1_is_no_matter_without_a_softmax(caplog, tmp_path):
    assert said(caplog, tmp_path, TripletLoss(small_model(similarity="cosine")), learning_rate=1e-3) == []


@pytest.mark.parametrize(
    ("prompts", "warned"),
    [
        ({"query": "quick ", "document": "lazy "}, True),
        ({"query": "quick ", "document": "lazy ", "negative": "lazy "}, False),
        ("quick ", False),
    ],
)
def test_columns_of_one_tower_with_different_prompts(caplog, tmp_path, prompts, warned):
    clicks = different_clicks().add_column("negative", sentences(64, 20, seed=2))
    routes = {"query": "query", "document": "document", "negative": "document"}
    options = dict(dataset=clicks, router_mapping=routes, prompts=prompts, learning_rate=1e-3)
    warnings = said(caplog, tmp_path, FPSLoss(small_model(similarity="cosine")), **options)
    assert ["The columns of the tower 'document' have different prompts" in warning for warning in warnings] == (
        [True] if warned else []
    )


def test_prompts_by_data_set_are_compared_within_each():
    routes = {"query": "query", "document": "document", "negative": "document"}
    of_all, by_name = {"query": "q ", "document": "d "}, {"clicks": {"document": "d "}, "sales": "one "}
    for mapping, prompts, expected in (
        ({"clicks": routes, "sales": routes}, by_name, 1),
        ({"clicks": routes, "sales": routes}, of_all, 2),
        (routes, by_name, 1),
        (None, of_all, 0),
        (routes, None, 0),
    ):
        assert len(prompt_warnings(SimpleNamespace(router_mapping=mapping, prompts=prompts))) == expected


@pytest.mark.parametrize("make", [FPSLoss, PairCELoss, SampledSoftmaxLoss])
def test_a_log_without_a_label_above_0(caplog, tmp_path, make):
    shown = different_clicks().add_column("label", [0.0] * 64)
    (warning,) = said(caplog, tmp_path, make(small_model(similarity="cosine")), dataset=shown)
    assert "100% of the batches have no row with a label above 0" in warning


@pytest.mark.parametrize("make", [FPSLoss, PairCELoss, SampledSoftmaxLoss])
def test_batches_of_one_row(caplog, tmp_path, make):
    loss = make(small_model(similarity="cosine"))
    (warning,) = said(caplog, tmp_path, loss, per_device_train_batch_size=1)
    assert "100% of the batches have no negative for any row" in warning and "per_device_train_batch_size" in warning


def test_sigmoid_loss_learns_from_rows_without_a_label_above_0(caplog, tmp_path):
    shown = different_clicks().add_column("label", [0.0] * 64)
    assert said(caplog, tmp_path, SigmoidLoss(small_model(similarity="cosine")), dataset=shown) == []


@pytest.mark.parametrize(
    ("loss_of", "documents", "labels", "has"),
    [
        (lambda model: FPSLoss(model), [[0, 0]], None, False),
        (lambda model: FPSLoss(model, duplicates="keep"), [[0, 0]], None, False),
        (lambda model: FPSLoss(model, directions=("doc_to_query",)), [[0, 0]], None, False),  # both are positives
        (lambda model: FPSLoss(model, directions=("doc_to_query",)), [[0, 1]], None, True),
        (lambda model: FPSLoss(model), [[0, 0]], [1.0, 0.0], False),
        (lambda model: FPSLoss(model), [[0, 1]], [1.0, 0.0], True),
        (lambda model: PairCELoss(model), [[0, 0], [0, 0]], None, False),
        (lambda model: PairCELoss(model), [[0, 0], [1, 1]], None, True),
        (lambda model: SampledSoftmaxLoss(model, negatives="in_batch"), [[0, 0], [0, 1]], None, True),
    ],
)
def test_batches_without_negatives_are_told_from_those_with(loss_of, documents, labels, has):
    loss = loss_of(small_model())
    embeddings = [torch.ones(2, 4, requires_grad=True)] * (1 + len(documents))
    labels = None if labels is None else torch.tensor(labels)
    loss.compute_loss_from_embeddings(embeddings, labels, document_ids=torch.tensor(documents))
    assert loss.batch_statistics()["without_negatives"] == (not has)


def test_a_run_that_ends_before_it_logs_is_judged_by_its_early_steps(caplog, tmp_path):
    loss = FPSLoss(small_model(similarity="cosine"))
    one_query = Dataset.from_dict({"query": ["quick fox"] * 64, "document": sentences(64, 20, seed=1)})
    (warning,) = said(caplog, tmp_path, loss, dataset=one_query, learning_rate=1e-3, logging_steps=500)
    assert "100% of the columns are masked" in warning
    assert any("of columns masked" in record.getMessage() for record in caplog.records)


def test_alpha_at_its_bound(caplog, tmp_path):
    loss = FPSLoss(small_model(similarity="cosine"), max_scale=15.0)
    (warning,) = said(
        caplog,
        tmp_path,
        loss,
        dataset=different_clicks(8),
        max_steps=60,
        lr_scheduler_type="constant",
        learning_rate_mapping={"logit_scale": 0.05},
    )
    assert "α stood at its bound max_scale=15" in warning and "learning_rate_mapping" in warning


def test_a_log_of_one_query_after_the_other(caplog, tmp_path):
    loss = FPSLoss(small_model(similarity="cosine"))
    one_query = Dataset.from_dict({"query": ["quick fox"] * 64, "document": sentences(64, 20, seed=1)})
    (warning,) = said(caplog, tmp_path, loss, dataset=one_query, learning_rate=1e-3)
    assert "100% of the columns are masked" in warning and "Shuffle" in warning


def test_a_softmax_that_looks_at_one_negative_alone(caplog, tmp_path):
    loss = FPSLoss(small_model(), scale=1e4, max_scale=1e4, learn_scale=False)
    (warning,) = said(
        caplog, tmp_path, loss, dataset=different_clicks(), per_device_train_batch_size=32, learning_rate=1e-3
    )
    assert "A row learns from 1." in warning and "of its 31" in warning and "Lower α (it is 1e+04)" in warning


@pytest.mark.parametrize(
    ("direction", "duplicates", "log_q"),
    [
        ("query_to_doc", "mask", None),
        ("query_to_doc", "mask", "corrected"),
        ("query_to_doc", "keep", "standard"),
        ("doc_to_query", "mask", "corrected"),
    ],
)
def test_figures_equal_the_naive_ones(direction, duplicates, log_q):
    generator = torch.Generator().manual_seed(0)
    rows, num_negatives = 40, 1
    query = torch.randint(15, (rows,), generator=generator)
    document = torch.randint(25, (1 + num_negatives, rows), generator=generator)
    r = torch.randint(0, 3, (rows,), generator=generator).double()
    U = torch.randn(15, 6, generator=generator).double().requires_grad_()
    W = torch.randn(25, 6, generator=generator).double()
    query_log_q, document_log_q = torch.randn(15, generator=generator).double(), torch.randn(25, generator=generator)
    given = {"query_log_q": query_log_q[query], "document_log_q": document_log_q.double()[document]}
    loss = FPSLoss(
        small_model(), scale=1.5, directions=(direction,), duplicates=duplicates, log_q=log_q, similarity="dot"
    )
    loss.compute_loss_from_embeddings(
        [U[query], *W[document]], labels=r, query_ids=query, document_ids=document, **(given if log_q else {})
    )
    figures = loss.batch_statistics()

    clicked = {(int(query[i]), int(document[0, i])) for i in range(rows) if r[i] > 0}
    columns = document.flatten().tolist()
    shares = [
        sum((int(query[i]), column) in clicked for column in columns) - 1 for i in range(rows) if r[i] > 0
    ]  # fmt: skip
    if duplicates == "mask":
        assert figures["masked_share"] == pytest.approx(np.mean(shares) / (len(columns) - 1))
    distinct = len(set(query.tolist())) + len(set(columns))
    assert figures["repeated_rows"] == pytest.approx(1 - distinct / (rows + len(columns)))

    if direction == "query_to_doc":
        asking = sorted({q for q, _ in clicked})
        columns_of, is_local, q_of = columns, lambda a, c: (a, c) in clicked, given["document_log_q"].flatten()
    else:
        asking = sorted({d for _, d in clicked})
        columns_of, is_local, q_of = query.tolist(), lambda a, c: (c, a) in clicked, given["query_log_q"]
    distincts, effectives = [], []
    for a in asking:
        weight: dict[int, float] = {}
        for number, column in enumerate(columns_of):
            if is_local(a, column):
                continue
            similarity = U[a] @ W[column] if direction == "query_to_doc" else W[a] @ U[column]
            logit = 1.5 * similarity - (q_of[number] if log_q else 0.0)
            weight[column] = weight.get(column, 0.0) + logit.exp().item()
        p = np.array(list(weight.values())) / sum(weight.values())
        distincts.append(len(p))
        effectives.append(np.exp(-(p * np.log(p)).sum()))
    assert figures["distinct_negatives"] == pytest.approx(np.mean(distincts))
    assert figures["effective_negatives"] == pytest.approx(np.mean(effectives), rel=1e-6)

    if log_q:
        held = sorted(set(columns))
        norm, popularity = W[held].norm(dim=1).tolist(), document_log_q[held].tolist()
        concordant = np.corrcoef(np.argsort(np.argsort(norm)), np.argsort(np.argsort(popularity)))[0, 1]
        assert figures["norm_popularity"] == pytest.approx(concordant, abs=1e-5)
    else:
        assert "norm_popularity" not in figures


def test_equal_popularities_share_their_rank():
    loss = FPSLoss(small_model(), log_q="standard", duplicates="keep", similarity="dot")
    norms, log_q = [1.0, 2.0, 3.0, 4.0], [-2.0, -1.0, -1.0, -3.0]
    W = torch.tensor([[norm, 0.0] for norm in norms], requires_grad=True)
    loss.compute_loss_from_embeddings([torch.ones(4, 2), W], document_log_q=torch.tensor([log_q]))
    expected = np.corrcoef([0, 1, 2, 3], [1, 2.5, 2.5, 0])[0, 1]
    assert loss.batch_statistics()["norm_popularity"] == pytest.approx(expected, abs=1e-6)


def test_there_is_nothing_to_say_of_evaluation_and_of_batches_without_negatives():
    model = small_model()
    loss = FPSLoss(model)
    with torch.no_grad():
        loss.compute_loss_from_embeddings([torch.ones(3, 4), torch.ones(3, 4)])
    assert loss.batch_statistics() == {}
    for labels in (None, torch.zeros(1)):
        loss.compute_loss_from_embeddings([torch.ones(1, 4), torch.ones(1, 4)], labels=labels)
        figures = loss.batch_statistics()
        missing = {"without_positives": float(labels is not None), "without_negatives": float(labels is None)}
        assert figures == {"alpha_at_bound": 0.0, "repeated_rows": 0.0, "masked_share": 0.0, **missing}


def test_logging_does_not_change_the_training(tmp_path):
    def weights_after(logging_steps, folder):
        loss = FPSLoss(small_model(dropout=0.1, similarity="cosine"), log_q="corrected")
        trainer(tmp_path / folder, model=loss.model, loss=loss, logging_steps=logging_steps).train()
        return torch.cat([p.detach().flatten() for p in itertools.chain(loss.parameters(), loss.model.parameters())])

    assert torch.equal(weights_after(1, "often"), weights_after(8, "once"))
