"""Evaluate models with intervals, build an index of all documents, and search it.

python training_scripts/evaluate_and_index.py --models sentence-transformers/all-MiniLM-L6-v2 runs/docstrings/model
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from docstrings import docstring_clicks
from sentence_transformers import SentenceTransformer

from st_fpsloss import DocumentIndex, RetrievalEvaluator
from st_fpsloss.data import hold_out
from st_fpsloss.evaluation import bootstrap_interval, paired_difference


def main(argv: Sequence[str] | None = None) -> list[list[tuple[int, float]]]:
    """Evaluate, index and search; returns what was found."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["sentence-transformers/all-MiniLM-L6-v2"], help="Hub ids or folders"
    )
    parser.add_argument("--index", default="runs/docstrings/index", help="folder of the index of the last model")
    parser.add_argument("--packages", nargs="+", default=["numpy", "pandas"], help="whose docstrings to read")
    parser.add_argument("--queries", nargs="+", default=["sort values by key", "open a file"])
    options = parser.parse_args(argv)

    # 1. What is judged: ids of queries and documents, and which documents are relevant to which query.
    log = docstring_clicks(options.packages)
    held_out = hold_out(log, fraction=0.02)["test"]
    number_of = {text: number for number, text in enumerate(dict.fromkeys(log["document"]))}
    corpus = {number: text for text, number in number_of.items()}
    relevant: dict[str, set[int]] = {}
    for query, document in zip(held_out["query"], held_out["document"], strict=True):
        relevant.setdefault(query, set()).add(number_of[document])
    evaluator = RetrievalEvaluator({query: query for query in relevant}, corpus, relevant, at=(1, 10, 100))

    # 2. The metrics of each query, so that an interval says how sure a mean or a difference is.
    models = {name: SentenceTransformer(name) for name in options.models}
    values = {name: evaluator.per_query(model)["ndcg@10"] for name, model in models.items()}
    for name, of_query in values.items():
        low, high = bootstrap_interval(of_query)
        print(f"NDCG@10 {of_query.mean():.3f} ({low:.3f} to {high:.3f})  {name}")
    first, *others = options.models
    for name in others:
        mean, low, high = paired_difference(values[name], values[first])
        print(f"  {name} less {first}: {mean:+.3f} ({low:+.3f} to {high:+.3f})")

    # 3. The index: documents are encoded once, offline; load it where the queries come in.
    model = models[options.models[-1]]
    DocumentIndex.build(model, corpus, options.index, overwrite=True)
    index = DocumentIndex.load(options.index)
    found = index.search(model, options.queries, k=3)
    for query, documents in zip(options.queries, found, strict=True):
        print(f"\n{query}")
        for document_id, score in documents:
            print(f"  {score:.3f}  {index.document(document_id)}")
    return found


if __name__ == "__main__":
    main()
