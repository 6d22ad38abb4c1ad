"""The evaluate module: loads from the package's folder, and gives the numbers of the evaluator."""

from __future__ import annotations

import logging

import evaluate
import numpy as np
import pytest

from st_fpsloss.evaluation.metrics import list_ranks, ranking_metrics
from st_fpsloss.metrics import metric_path
from tests.evaluation.test_evaluator import NUM_DOCUMENTS, RetrievalEvaluator, log


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory):
    return evaluate.load(metric_path(), cache_dir=str(tmp_path_factory.mktemp("metrics")))


def test_it_gives_the_same_numbers_as_the_package(retrieval):
    rng = np.random.default_rng(0)
    rankings = [rng.permutation(50)[:30].tolist() for _ in range(20)]
    references = [{int(d): int(rng.integers(1, 4)) for d in rng.permutation(50)[:5]} for _ in range(20)]
    ranks = np.concatenate([list_ranks(r, judged) for r, judged in zip(rankings, references, strict=True)])
    grades = np.array([grade for judged in references for grade in judged.values()], float)
    expected = ranking_metrics(ranks, grades, np.arange(0, 101, 5), at=(1, 10, 40))
    metrics = retrieval.compute(predictions=rankings, references=references, at=(1, 10, 40))
    assert metrics == pytest.approx({name: values.mean() for name, values in expected.items()}, abs=1e-12)


def test_it_gives_the_numbers_of_the_evaluator_for_the_evaluators_rankings(retrieval):
    queries, corpus, relevant_docs, seen_docs = log()
    scores = np.random.default_rng(1).random((len(queries), NUM_DOCUMENTS))
    evaluator = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs)
    top = evaluator.top_k(lambda ids: scores, 100)
    metrics = retrieval.compute(
        predictions=[[document_id for document_id, _ in top[query_id]] for query_id in queries],
        references=[relevant_docs[query_id] for query_id in queries],
    )
    assert metrics == pytest.approx(evaluator.evaluate_scores(lambda ids: scores), abs=1e-12)


@pytest.mark.parametrize("reference", [["b"], {"b"}, {"b": 1.0}, {"b": 2, "a": 0}])
def test_references_are_grades_or_ids(retrieval, reference):
    metrics = retrieval.compute(predictions=[["a", "b"]], references=[reference], at=[2])
    assert metrics == pytest.approx(
        {"hr@2": 1.0, "ndcg@2": 1 / np.log2(3), "recall@2": 1.0, "mrr@2": 0.5, "map@2": 0.5}
    )


def test_it_takes_one_query_at_a_time(retrieval):
    retrieval.add(prediction=[1, 2], reference=[1])
    retrieval.add(prediction=[1, 2], reference={2: 1})
    assert retrieval.compute(at=[1])["hr@1"] == 0.5


def test_an_empty_ranking_finds_nothing(retrieval):
    assert retrieval.compute(predictions=[[]], references=[["a"]], at=[5])["recall@5"] == 0.0


def test_queries_without_relevant_documents_are_left_out_with_a_warning(retrieval, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = retrieval.compute(predictions=[["a"], ["a"]], references=[["a"], {"a": 0}], at=[1])
    assert metrics["hr@1"] == 1.0 and "1 queries without relevant documents" in caplog.text


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([["a", "a"]], [["a"]], "'a' more than once"),
        (["a"], [["a"]], "a prediction is 'a'"),
        ([["a"]], ["a"], "a reference is 'a'"),
        ([["a"]], [{"a": float("nan")}], "grade nan"),
        ([["a"], ["b"]], [["a"]], "one length"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing_behind(retrieval, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        retrieval.compute(predictions=predictions, references=references)
    assert retrieval.compute(predictions=[["a"]], references=[["a"]], at=[1])["hr@1"] == 1.0


def test_nothing_to_average_over_is_refused(tmp_path):
    retrieval = evaluate.load(metric_path(), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="nothing to average over"):
        retrieval.compute(predictions=[["a"]], references=[[]])
