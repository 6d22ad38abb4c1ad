"""The evaluator of held-out rows judges what the rows say."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from st_fpsloss.evaluation.from_clicks import clicks_evaluator

ROWS = Dataset.from_dict(
    {
        "query": ["red", "red", "red", "blue", "blue"],
        "document": ["rose", "fox", "rose", "sky", "fox"],
        "label": [1.0, 0.0, 3.0, 2.0, -1.0],
    }
)


def ndcg(evaluator, scores: dict[str, list[float]]) -> list[float]:
    return evaluator.per_query(lambda query_ids: [scores[query] for query in query_ids])["ndcg@3"].tolist()


def test_rows_of_a_query_are_judged_together_by_their_best_grade():
    evaluator = clicks_evaluator(ROWS, documents=["sea", "rose"], at=[3])
    assert evaluator.query_ids == ["red", "blue"]
    assert evaluator.corpus_ids == ["sea", "rose", "fox", "sky"]
    two_relevant = clicks_evaluator(
        Dataset.from_dict({"query": ["q"] * 3, "document": ["a", "b", "b"], "label": [2.0, 1.0, 3.0]}), at=[3]
    )
    assert ndcg(two_relevant, {"q": [2, 1]}) == pytest.approx([(2 + 3 / np.log2(3)) / (3 + 2 / np.log2(3))])
    second = {"red": [0, 1, 2, 0], "blue": [0, 0, 2, 1]}  # fox, which has no relevance, comes first
    assert ndcg(evaluator, second) == pytest.approx([1 / np.log2(3)] * 2)


def test_documents_that_were_clicked_before_are_left_out_where_they_are_not_asked_for():
    seen = Dataset.from_dict(
        {"query": ["red", "blue", "green"], "document": ["fox", "fox", "rose"], "label": [1, 0, 1]}
    )
    evaluator = clicks_evaluator(ROWS, seen=seen, at=[3])
    scores = {"red": [1, 2, 0], "blue": [0, 2, 1]}
    assert ndcg(evaluator, scores) == pytest.approx([1, 1 / np.log2(3)])  # blue was shown the fox and did not click


def test_dicts_are_one_document_whatever_is_missing():
    rows = Dataset.from_dict({"query": [{"user": "a"}], "document": [{"text": "d", "year": None}]})
    evaluator = clicks_evaluator(rows, documents=[{"text": "d"}, {"text": "d", "year": 3}], at=[3])
    assert len(evaluator.corpus_ids) == 2
    assert ndcg(evaluator, {evaluator.query_ids[0]: [2, 1]}) == [1.0]


def test_rows_without_columns_or_clicks_are_refused():
    with pytest.raises(ValueError, match="`clicks` has no column 'document'"):
        clicks_evaluator(ROWS.remove_columns("document"))
    with pytest.raises(ValueError, match="`seen` has no column 'query'"):
        clicks_evaluator(ROWS, seen=ROWS.remove_columns("query"))
    with pytest.raises(ValueError, match="no document of a grade above 0"):
        clicks_evaluator(ROWS.select([1]))
