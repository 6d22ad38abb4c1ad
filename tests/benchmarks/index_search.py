"""Search in a million vectors: DocumentIndex beside plain FAISS and hnswlib, one thread, one query at a time.

python -m tests.benchmarks.index_search --count 1000000 --dim 128

Times are CPU time a query. Vectors are clustered, as embeddings are; queries are not among them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
import pyarrow as pa

from st_fpsloss.retrieval import storage
from st_fpsloss.retrieval.generation import Kind, write_shards_as_generation
from st_fpsloss.retrieval.index import DocumentIndex

K = 10


def clustered(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors around 2,000 centres."""
    centres = np.random.default_rng(0).standard_normal((2000, dim)).astype(np.float32)
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, len(centres), count)] + 0.8 * rng.standard_normal((count, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def index_of(vectors: np.ndarray, folder: Path, factory: str | None) -> DocumentIndex:
    """An index of vectors that no model has to embed, with a column to filter by."""
    count, dim = vectors.shape
    numbers = np.arange(count)
    fingerprints = pa.nulls(count, pa.binary(16))
    inputs = pa.nulls(count, pa.large_string())
    share = pa.array(np.random.default_rng(1).permutation(count) / count)
    table = pa.table({"id": pa.array(numbers), "input": inputs, "fingerprint": fingerprints, "share": share})
    info: dict[str, Any] = {"similarity": "dot", "metric": "inner_product", "model": {}, "bias_dimension": False}
    info |= {"wanted_factory": factory, "wanted_recall": 0.98}
    with storage.writing(folder), storage.new_generation(folder, info) as generation:
        info |= write_shards_as_generation(generation, [table], [vectors], dim, Kind(factory, 0.98))
    return DocumentIndex.load(folder)


def measured(name: str, search: Callable[[np.ndarray], Any], queries: np.ndarray, exact: np.ndarray) -> None:
    """Print the recall and the CPU time of one query at a time."""
    search(queries[:1])
    times, hits = [], 0
    for query, best in zip(queries, exact, strict=True):
        begin = time.process_time()
        found = search(query[None])
        times.append(time.process_time() - begin)
        hits += len(set(found) & set(best.tolist()))
    p50, p99 = 1000 * np.percentile(times, [50, 99])
    print(f"{name:44s} recall@10 {hits / exact.size:.4f}   {p50:7.3f} ms p50   {p99:7.3f} ms p99", flush=True)


def ids(results: list) -> list[int]:
    return [document_id for document_id, _ in results[0]]


def filtered(index: DocumentIndex, vectors: np.ndarray, queries: np.ndarray) -> None:
    """Filters of 10%, 1% and .1%."""
    import pyarrow.compute as pc

    share = np.random.default_rng(1).permutation(len(vectors)) / len(vectors)
    for selectivity in (0.1, 0.01, 0.001):
        rows = np.flatnonzero(share < selectivity)
        best = rows[faiss.knn(queries, vectors[rows], K, metric=faiss.METRIC_INNER_PRODUCT)[1]]
        expression = pc.field("share") < selectivity
        name = f"DocumentIndex {index.info['factory']}, filter of {selectivity:.1%}"
        measured(name, lambda q, e=expression: ids(index.search_vectors(q, K, filter=e)), queries, best)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    vectors, queries = clustered(options.count, options.dim, 1), clustered(options.queries, options.dim, 2)
    exact = faiss.knn(queries, vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    print(f"{options.count:,} x {options.dim}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        flat = index_of(vectors, Path(folder) / "flat", "Flat")
        measured("DocumentIndex Flat", lambda q: ids(flat.search_vectors(q, K)), queries[:50], exact[:50])
        plain = faiss.IndexFlatIP(options.dim)
        plain.add(vectors)
        measured("faiss Flat", lambda q: plain.search(q, K)[1][0].tolist(), queries[:50], exact[:50])
        start = time.process_time()
        graph = index_of(vectors, Path(folder) / "graph", "HNSW32")
        effort = graph.info["effort"]
        print(
            f"built in {time.process_time() - start:.0f} s of CPU time; recall measured {graph.info['recall']}",
            flush=True,
        )
        start = time.perf_counter()
        DocumentIndex.load(Path(folder) / "graph")
        print(f"checked and loaded in {time.perf_counter() - start:.2f} s", flush=True)
        measured(f"DocumentIndex HNSW32 ef={effort}", lambda q: ids(graph.search_vectors(q, K)), queries, exact)
        filtered(graph, vectors, queries)
        hnsw = graph._snapshot.approximate.index
        parameters = faiss.SearchParametersHNSW(efSearch=effort)
        measured(
            f"faiss HNSW32 ef={effort}",
            lambda q: hnsw.search(q, K, params=parameters)[1][0].tolist(),
            queries,
            exact,
        )
    beside_hnswlib(vectors, queries, exact, effort)


def beside_hnswlib(vectors: np.ndarray, queries: np.ndarray, exact: np.ndarray, effort: int) -> None:
    """The same graph in hnswlib, where it is installed."""
    try:
        import hnswlib
    except ImportError:
        print("hnswlib is not installed")
        return
    start = time.process_time()
    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=32, ef_construction=40)
    index.set_num_threads(1)
    index.add_items(vectors, num_threads=1)
    index.set_ef(effort)
    print(f"hnswlib built in {time.process_time() - start:.0f} s of CPU time", flush=True)
    measured(f"hnswlib M=32 ef={effort}", lambda q: index.knn_query(q, K)[0][0].tolist(), queries, exact)


if __name__ == "__main__":
    main()
