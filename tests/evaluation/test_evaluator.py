"""RetrievalEvaluator: the protocol, the numbers, and its place in the trainer."""

from __future__ import annotations

import csv
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from st_fpsloss.evaluation import RetrievalEvaluator, bootstrap_interval, paired_difference
from st_fpsloss.evaluation import evaluator as evaluation

NUM_QUERIES, NUM_DOCUMENTS, DIM = 40, 70, 16


def static_module(words: list[str], vectors: np.ndarray) -> StaticEmbedding:
    """A module that embeds every word as its row of ``vectors``."""
    tokenizer = Tokenizer(WordLevel({word: row for row, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    return StaticEmbedding(tokenizer, embedding_weights=torch.tensor(np.asarray(vectors), dtype=torch.float32))


def static_model(words: list[str], vectors: np.ndarray, similarity: str = "dot") -> SentenceTransformer:
    return SentenceTransformer(modules=[static_module(words, vectors)], similarity_fn_name=similarity, device="cpu")


def log(seed: int = 0):
    """Queries, corpus, graded judgments and seen documents of a small log; every word is an id."""
    rng = np.random.default_rng(seed)
    queries = {f"u{i}": f"query{i}" for i in range(NUM_QUERIES)}
    corpus = {i: f"document{i}" for i in range(NUM_DOCUMENTS)}
    relevant_docs, seen_docs = {}, {}
    for query_id in queries:
        documents = rng.permutation(NUM_DOCUMENTS).tolist()
        num_relevant = int(rng.integers(1, 6))
        relevant_docs[query_id] = {d: int(rng.integers(1, 4)) for d in documents[:num_relevant]}
        seen_docs[query_id] = documents[num_relevant : num_relevant + int(rng.integers(0, 10))]
    return queries, corpus, relevant_docs, seen_docs


def model_of(queries, corpus, vectors, similarity="dot"):
    return static_model([*queries.values(), *corpus.values()], vectors, similarity)


def vectors(num: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)


def naive_ranking(scores, relevant, seen):
    """Document positions, best first: ties put documents without relevance, then low grades, first."""
    candidates = [d for d in range(len(scores)) if d not in seen or relevant.get(d, 0) > 0]
    return sorted(candidates, key=lambda d: (-scores[d], max(relevant.get(d, 0), 0), d))


def naive_metrics(ranking, relevant, k):
    grades = [max(relevant.get(d, 0), 0) for d in ranking[:k]]
    positive = sorted((grade for grade in relevant.values() if grade > 0), reverse=True)
    hits = [rank for rank, grade in enumerate(grades, start=1) if grade > 0]
    dcg = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, start=1))
    ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(positive[:k], start=1))
    return {
        "hr": float(bool(hits)),
        "ndcg": dcg / ideal,
        "recall": len(hits) / len(positive),
        "mrr": 1 / hits[0] if hits else 0.0,
        "map": sum(number / rank for number, rank in enumerate(hits, start=1)) / min(k, len(positive)),
    }


def naive_evaluation(scores, relevant_docs, seen_docs, at):
    values = {}
    for row, (query_id, relevant) in zip(scores, relevant_docs.items(), strict=True):
        ranking = naive_ranking(row, relevant, set(seen_docs.get(query_id, ())))
        for k in at:
            for name, value in naive_metrics(ranking, relevant, k).items():
                values.setdefault(f"{name}@{k}", []).append(value)
    return values


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("chunks", [(2**23, 8192), (1, 7)])
def test_metrics_are_those_of_the_models_own_similarity(monkeypatch, similarity, chunks):
    monkeypatch.setattr(evaluation, "CELLS_PER_CHUNK", chunks[0])
    monkeypatch.setattr(evaluation, "DOCUMENTS_PER_CHUNK", chunks[1])
    queries, corpus, relevant_docs, seen_docs = log()
    model = model_of(queries, corpus, vectors(NUM_QUERIES + NUM_DOCUMENTS), similarity)
    scores = model.similarity(
        model.encode_query(list(queries.values())), model.encode_document(list(corpus.values()))
    ).numpy()
    evaluator = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs, at=(1, 3, 10))
    expected = naive_evaluation(scores, relevant_docs, seen_docs, (1, 3, 10))
    per_query = evaluator.per_query(model)
    assert evaluator.query_ids == list(queries) and set(per_query) == set(expected)
    for metric, values in expected.items():
        np.testing.assert_allclose(per_query[metric], values, atol=1e-12, err_msg=metric)
    for metric, value in evaluator(model).items():
        assert type(value) is float and value == pytest.approx(np.mean(expected[metric]), abs=1e-12)


def test_queries_and_documents_go_through_their_own_towers():
    words = ["a", "b", "c"]
    query_tower = static_module(words, np.eye(3))
    document_tower = static_module(words, np.eye(3)[[1, 2, 0]])  # the query "a" looks for the document "c"
    router = Router.for_query_document(query_modules=[query_tower], document_modules=[document_tower])
    model = SentenceTransformer(modules=[router], similarity_fn_name="dot", device="cpu")
    evaluator = RetrievalEvaluator({1: "a"}, {w: w for w in words}, {1: ["c"]}, at=(1,))
    assert evaluator(model)["hr@1"] == 1.0


def test_real_model_with_text_dicts_finds_the_paraphrase(minilm):
    corpus = {
        "toys": {"text": "The toys of a boy come alive when he is away."},
        "heist": "A crew robs a bank in Los Angeles.",
        "snow": "A pregnant sheriff solves murders in the snow.",
    }
    queries = {"q1": {"text": "living toys"}, "q2": "bank robbery"}
    model = SentenceTransformer(minilm, device="cpu")
    evaluator = RetrievalEvaluator(queries, corpus, {"q1": {"toys": 2}, "q2": {"heist"}}, at=(1, 2))
    assert evaluator(model) == pytest.approx({metric: 1.0 for metric in evaluator(model)})
    assert [evaluator.top_k(model, 1)[q][0][0] for q in queries] == ["toys", "heist"]


def test_corpus_and_queries_are_embedded_once_a_call_and_in_chunks(monkeypatch):
    queries, corpus, relevant_docs, seen_docs = log()
    model = model_of(queries, corpus, vectors(NUM_QUERIES + NUM_DOCUMENTS))
    evaluator = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs)
    whole = evaluator(model)
    embedded = []
    preprocess = model.preprocess
    monkeypatch.setattr(model, "preprocess", lambda inputs, **kw: embedded.extend(inputs) or preprocess(inputs, **kw))
    monkeypatch.setattr("st_fpsloss.retrieval.encode.CHUNK_SIZE", 32)
    assert evaluator(model) == whole
    assert sorted(embedded) == sorted([*queries.values(), *corpus.values()])


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_collapsed_model_earns_nothing(similarity):
    queries = {i: f"query{i}" for i in range(77)}
    corpus = {i: f"document{i}" for i in range(1683)}
    model = model_of(queries, corpus, np.tile(vectors(1, dim=257), (77 + 1683, 1)), similarity)
    evaluator = RetrievalEvaluator(queries, corpus, {i: {i * 21} for i in queries}, at=(1, 1682, 1683))
    metrics = evaluator(model)
    assert metrics["hr@1682"] == 0.0
    assert metrics["hr@1683"] == 1.0 and metrics["mrr@1683"] == pytest.approx(1 / 1683)


def test_seen_documents_make_room_in_the_ranking():
    words = ["q", "d0", "d1", "d2"]
    model = static_model(words, np.array([[1.0], [3.0], [2.0], [1.0]]))
    corpus = {w: w for w in words[1:]}
    for seen, rank in [([], 3), (["d0"], 2), ({"d0", "d1"}, 1)]:
        evaluator = RetrievalEvaluator({"q": "q"}, corpus, {"q": ["d2"]}, {"q": seen}, at=(3,))
        assert evaluator(model)["mrr@3"] == pytest.approx(1 / rank)


def test_a_document_seen_and_relevant_stays_a_candidate_with_one_warning(caplog):
    seen_docs = {"q1": ["d0", "d1"], "q2": ["d0"]}
    with caplog.at_level(logging.WARNING):
        evaluator = RetrievalEvaluator(
            {"q1": "q", "q2": "q"}, {"d0": "d0", "d1": "d1"}, {"q1": ["d1"], "q2": ["d0"]}, seen_docs, at=(1,)
        )
    assert [record.message for record in caplog.records] == [
        "2 documents are both seen and relevant for a query: they stay candidates."
    ]
    scores = np.array([[2.0, 1.0], [2.0, 1.0]])
    assert evaluator.evaluate_scores(lambda ids: scores)["mrr@1"] == 1.0
    assert evaluator.top_k(lambda ids: scores, 2) == {"q1": [("d1", 1.0)], "q2": [("d0", 2.0), ("d1", 1.0)]}


def test_queries_without_relevant_documents_are_left_out_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        evaluator = RetrievalEvaluator(
            {"q1": "a", "q2": "b", "q3": "c", "q4": "d"},
            {"d0": "x", "d1": "y"},
            {"q1": {"d0": 0, "d1": -1}, "q2": [], "q3": {"d0": 1, "d1": 0}},
            at=(1,),
        )
    assert evaluator.query_ids == ["q3"]
    assert [record.message for record in caplog.records] == [
        "3 of 4 queries have no relevant documents: they are left out."
    ]
    # d1 has grade 0: a candidate like any other, and here the better one.
    assert evaluator.evaluate_scores(lambda ids: np.array([[1.0, 2.0]]))["hr@1"] == 0.0


@pytest.mark.parametrize("relevant", [["d1"], {"d1"}, ("d1",), {"d1": 1}, {"d1": 1.0, "d0": 0}, iter(["d1", "d1"])])
def test_judgments_come_as_dicts_or_as_ids(relevant):
    evaluator = RetrievalEvaluator({"q": "q"}, {"d0": "x", "d1": "y"}, {"q": relevant}, at=(2,))
    metrics = evaluator.evaluate_scores(lambda ids: np.array([[2.0, 1.0]]))
    assert metrics["recall@2"] == 1.0 and metrics["mrr@2"] == 0.5


def make(**changes):
    arguments = {
        "queries": {"q1": "a", "q2": "b"},
        "corpus": {"d1": "x", "d2": "y"},
        "relevant_docs": {"q1": {"d1": 1}, "q2": ["d2"]},
        **changes,
    }
    return RetrievalEvaluator(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": {}}, "queries={} has to be a dict"),
        ({"queries": ["a", "b"]}, "queries=.* has to be a dict"),
        ({"corpus": {}}, "corpus={} has to be a dict"),
        ({"relevant_docs": {}}, "relevant_docs={} has to be a dict"),
        ({"relevant_docs": {"q1": {"d1": 1, "d8": 1}, "q2": ["d9"]}}, "2 ids that are not in corpus, the first 'd8'"),
        ({"relevant_docs": {"q7": ["d1"]}}, "1 ids that are not in queries, the first 'q7'"),
        ({"corpus": {1: "x"}, "relevant_docs": {"q1": ["1"]}}, "the first '1'.*1 and '1' are different"),
        ({"relevant_docs": {"q1": {"d1": float("nan")}}}, r"relevant_docs\['q1'\] has the grade nan for document 'd1'"),
        ({"relevant_docs": {"q1": "d1"}}, r"relevant_docs\['q1'\] is 'd1'"),
        ({"relevant_docs": {"q1": {"d1": 0}}}, "no document of a grade above 0"),
        ({"seen_docs": {"q1": ["d1", "d7"]}}, "seen_docs names 1 ids that are not in corpus, the first 'd7'"),
        ({"seen_docs": {"q9": ["d1"]}}, "seen_docs names 1 ids that are not in queries, the first 'q9'"),
        ({"seen_docs": {"q1": "d1"}}, r"seen_docs\['q1'\] is 'd1'"),
        ({"seen_docs": ["d1"]}, "seen_docs=.* is no dict"),
        ({"at": ()}, "at is empty"),
        ({"at": (10, 0)}, "cutoff 0"),
    ],
)
def test_bad_arguments_say_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_model_that_gives_nan_is_an_error():
    words = ["q", "d0", "d1"]
    model = static_model(words, np.array([[1.0], [2.0], [np.nan]]))
    evaluator = RetrievalEvaluator({"q": "q"}, {"d0": "d0", "d1": "d1"}, {"q": ["d0"]})
    with pytest.raises(ValueError, match="NaN or infinite embeddings for 1 inputs, the first 'd1'"):
        evaluator(model)


def test_a_similarity_that_is_no_inner_product_is_an_error():
    model = static_model(["q", "d0"], np.ones((2, 1)), similarity="euclidean")
    with pytest.raises(ValueError, match="'euclidean'"):
        RetrievalEvaluator({"q": "q"}, {"d0": "d0"}, {"q": ["d0"]})(model)


def test_names_of_metrics():
    evaluator = make(name="val", at=(1, 10, 20))
    metrics = evaluator.evaluate_scores(lambda ids: np.zeros((len(ids), 2)))
    assert list(metrics) == [f"val_{m}@{k}" for m in ("hr", "ndcg", "recall", "mrr", "map") for k in (1, 10, 20)]
    assert evaluator.primary_metric == "val_ndcg@10" and evaluator.greater_is_better
    assert make(at=(5, 100, 20)).primary_metric == "ndcg@100"
    assert f"ndcg@{10}" in make().evaluate_scores(lambda ids: np.zeros((len(ids), 2)))


def test_popularity_is_evaluated_under_the_same_protocol():
    queries, corpus, relevant_docs, seen_docs = log()
    popularity = np.random.default_rng(3).integers(0, 9, NUM_DOCUMENTS)  # many ties
    evaluator = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs, at=(1, 5, 20))
    metrics = evaluator.evaluate_scores(lambda ids: np.broadcast_to(popularity, (len(ids), NUM_DOCUMENTS)))
    expected = naive_evaluation([popularity] * NUM_QUERIES, relevant_docs, seen_docs, (1, 5, 20))
    assert metrics == pytest.approx({metric: np.mean(values) for metric, values in expected.items()}, abs=1e-12)


def test_a_score_function_gets_the_ids_in_chunks_of_bounded_size(monkeypatch):
    monkeypatch.setattr(evaluation, "CELLS_PER_CHUNK", 20 * NUM_DOCUMENTS)
    queries, corpus, relevant_docs, _ = log()
    chunks = []
    evaluator = RetrievalEvaluator(queries, corpus, relevant_docs)
    evaluator.evaluate_scores(lambda ids: chunks.append(ids) or torch.zeros(len(ids), NUM_DOCUMENTS))
    assert [len(chunk) for chunk in chunks] == [20, 20]
    assert [*chunks[0], *chunks[1]] == evaluator.query_ids


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((2, 3)), r"shape \(2, 3\) for 2 queries and 2 documents"),
        ([[0, 1], [0, math.nan]], "NaN for query 'q2'"),
    ],
)
def test_unusable_scores_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        make().evaluate_scores(lambda ids: scores)


@pytest.mark.parametrize("ties", [False, True])
def test_top_k_is_the_ranking_that_the_metrics_are_read_from(ties):
    queries, corpus, relevant_docs, seen_docs = log()
    embeddings = vectors(NUM_QUERIES + NUM_DOCUMENTS)
    model = model_of(queries, corpus, np.sign(embeddings[:, :4]) if ties else embeddings)
    evaluator = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs, at=(1, 10))
    per_query = evaluator.per_query(model)
    best = evaluator.top_k(model, 10)
    assert list(best) == list(queries)
    for number, (query_id, ranking) in enumerate(best.items()):
        documents, scores = zip(*ranking, strict=True)
        assert len(set(documents) - set(seen_docs[query_id])) == 10 and sorted(scores, reverse=True) == list(scores)
        expected = naive_metrics(list(documents), relevant_docs[query_id], 10)
        assert {name: per_query[f"{name}@10"][number] for name in expected} == pytest.approx(expected)


def test_top_k_returns_what_there_is():
    evaluator = make(seen_docs={"q1": ["d2"]})
    best = evaluator.top_k(lambda ids: np.array([[1.0, 2.0], [1.0, 2.0]]), 100)
    assert best == {"q1": [("d1", 1.0)], "q2": [("d2", 2.0), ("d1", 1.0)]}
    with pytest.raises(ValueError, match="k=0"):
        evaluator.top_k(lambda ids: np.zeros((2, 2)), 0)


def test_per_query_values_carry_intervals_and_paired_comparisons():
    queries, corpus, relevant_docs, seen_docs = log()
    evaluator = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs, at=(10,))

    def oracle(query_ids):
        return [[relevant_docs[query_id].get(d, 0) for d in corpus] for query_id in query_ids]

    good = evaluator.per_query(oracle)["ndcg@10"]
    bad = evaluator.per_query(lambda ids: np.zeros((len(ids), NUM_DOCUMENTS)))["ndcg@10"]
    assert good.tolist() == [1.0] * NUM_QUERIES and bad.tolist() == [0.0] * NUM_QUERIES
    assert bootstrap_interval(good) == (1.0, 1.0)
    assert paired_difference(good, bad) == (1.0, 1.0, 1.0)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_every_call_appends_a_line_to_the_csv_file(tmp_path, caplog):
    model = static_model(["a", "b", "x", "y"], vectors(4))
    evaluator = make(name="movies/val", at=(1,))
    metrics = evaluator(model, str(tmp_path / "eval"), epoch=0.5, steps=10)
    evaluator(model, str(tmp_path / "eval"), epoch=1.0, steps=20)
    file = tmp_path / "eval" / "retrieval_evaluation_movies-val_results.csv"
    header, first, second = read_csv(file)
    assert header == ["epoch", "steps", *metrics] and first[:2] == ["0.5", "10"] and second[:2] == ["1.0", "20"]
    assert [float(value) for value in first[2:]] == list(metrics.values())
    make(name="movies/val", at=(2,))(model, str(tmp_path / "eval"))
    evaluator(model, str(tmp_path / "eval"))
    assert "other columns" in caplog.text
    assert [line[2] for line in read_csv(file) if line[0] == "epoch"] == [f"movies/val_hr@{k}" for k in (1, 2, 1)]


def test_no_file_is_written_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = static_model(["a", "b", "x", "y"], vectors(4))
    make()(model)
    assert list(tmp_path.iterdir()) == []


def test_the_model_card_shows_the_metrics(tmp_path):
    model = static_model(["a", "b", "x", "y"], vectors(4))
    make(name="val", at=(1, 10))(model)
    model.save(str(tmp_path))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "### Metrics" in card and "#### Retrieval" in card and "**ndcg@10**" in card and '"num_documents": 2' in card


def train(tmp_path, evaluator, model, train_dataset, **changes):
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=NUM_QUERIES // 2,
        num_train_epochs=3,
        learning_rate=0.3,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **changes,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        loss=MultipleNegativesRankingLoss(model),
        evaluator=evaluator,
    )
    trainer.train()
    return trainer


def clicks(queries, corpus, relevant_docs):
    best = [max(relevant, key=relevant.get) for relevant in relevant_docs.values()]
    return Dataset.from_dict({"query": list(queries.values()), "document": [corpus[d] for d in best]})


def test_it_is_the_trainers_evaluator_and_chooses_the_best_model(tmp_path):
    queries, corpus, relevant_docs, seen_docs = log()
    model = model_of(queries, corpus, vectors(NUM_QUERIES + NUM_DOCUMENTS))
    evaluator = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs, name="val")
    before = evaluator(model)["val_ndcg@10"]
    trainer = train(
        tmp_path,
        evaluator,
        model,
        clicks(queries, corpus, relevant_docs),
        load_best_model_at_end=True,
        metric_for_best_model="eval_val_ndcg@10",
    )
    history = [entry["eval_val_ndcg@10"] for entry in trainer.state.log_history if "eval_val_ndcg@10" in entry]
    assert len(history) == 3 and max(history) > before + 0.1
    assert trainer.state.best_metric == max(history) == pytest.approx(evaluator(trainer.model)["val_ndcg@10"])
    lines = read_csv(tmp_path / "eval" / "retrieval_evaluation_val_results.csv")
    assert [float(line[lines[0].index("val_ndcg@10")]) for line in lines[1:]] == history


TWO_RANKS = """
import sys
import torch
from tests.evaluation.test_evaluator import NUM_DOCUMENTS, NUM_QUERIES, clicks, log, model_of, train, vectors
from st_fpsloss.evaluation import RetrievalEvaluator

queries, corpus, relevant_docs, seen_docs = log()
model = model_of(queries, corpus, vectors(NUM_QUERIES + NUM_DOCUMENTS))
evaluator = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs)
trainer = train(sys.argv[1], evaluator, model, clicks(queries, corpus, relevant_docs), ddp_backend="gloo", max_steps=2)
shared = trainer.evaluate()["eval_ndcg@10"]
assert shared == evaluator(model)["ndcg@10"], shared
assert torch.distributed.get_world_size() == 2
"""


def test_two_ranks_share_the_evaluation(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]  # a port of its own
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
