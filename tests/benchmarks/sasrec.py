"""SASRec with a softmax over all films on MovieLens-100K: the peer that the two-tower models are measured against.

Kang and McAuley 2018, plain PyTorch: learned positions, causal transformer blocks, scores by the dot product with the
table of embeddings that the input has. The loss is cross-entropy over all films at every place, which ranks better than
the original's one negative. Protocol, windows and evaluation are those of ``training_scripts/movielens.py``.

    python -m tests.benchmarks.sasrec --output sasrec.jsonl --seeds 0 1 2

appends a line for each seed: settings, metrics, and each user's NDCG@10 on the test, for paired comparisons. The
defaults were the best of three settings on validation.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from st_fpsloss.data.movielens import load_movielens_100k
from st_fpsloss.evaluation import RetrievalEvaluator
from st_fpsloss.utils.files import append_json_line
from training_scripts.movielens_task import Task, make_task


class SASRec(nn.Module):
    """Scores of all films after every film of a history."""

    def __init__(self, num_films: int, dim: int, num_layers: int, num_heads: int, max_length: int, dropout: float):
        super().__init__()
        self.table = nn.Embedding(num_films + 1, dim, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(max_length, dim))
        nn.init.normal_(self.table.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        block = nn.TransformerEncoderLayer(
            dim, num_heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def states(self, films: Tensor) -> Tensor:
        """States (N, width, dim) at films (N, width), 0 behind them."""
        width = films.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(width)
        embeddings = self.dropout(self.table(films) + self.positions[:width])
        return self.norm(self.blocks(embeddings, mask=mask, is_causal=True))

    def scores(self, states: Tensor) -> Tensor:
        """Scores of all films, without the padding."""
        return states @ self.table.weight[1:].T


def padded(histories: list[list[int]]) -> Tensor:
    """(N, width), 0 behind the films."""
    return nn.utils.rnn.pad_sequence([torch.tensor(films) for films in histories], batch_first=True)


def evaluate(model: SASRec, evaluator: RetrievalEvaluator, histories: dict[int, list[int]]) -> dict[str, np.ndarray]:
    """Metrics of each user."""

    @torch.no_grad()
    def score(users: list[int]) -> np.ndarray:
        films = padded([histories[user] for user in users])
        newest = (films > 0).sum(dim=1) - 1
        return model.scores(model.states(films)[torch.arange(len(users)), newest]).numpy()

    model.eval()
    return evaluator.per_query(score)


def train(task: Task, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train with one seed, keep the best epoch on validation, and test that one once."""
    torch.manual_seed(seed)
    number = {film: place for place, film in enumerate(task.documents, start=1)}
    windows = [[number[int(film)] for film in query["seen"]] for query in task.rows["query"]]
    known = {user: [number[int(film)] for film in query["seen"]] for user, query in task.queries.items()}
    before = {user: films[-options.max_history - 1 : -1] for user, films in train_histories(task, number).items()}
    model = SASRec(len(number), options.dim, options.layers, options.heads, options.max_history, options.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    num_batches = -(-len(windows) // options.batch_size)
    total = num_batches * options.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 10 * step / total, 1 - step / total))
    best, best_epoch, weights, started = -1.0, 0, model.state_dict(), time.time()
    for epoch in range(1, options.epochs + 1):
        model.train()
        for batch in torch.randperm(len(windows)).split(options.batch_size):
            rows = [windows[index] for index in batch.tolist()]
            films, targets = padded([row[:-1] for row in rows]), padded([row[1:] for row in rows])
            held = films > 0
            loss = cross_entropy(model.scores(model.states(films)[held]), targets[held] - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        value = float(evaluate(model, task.validation, before)["ndcg@10"].mean())
        print(f"epoch {epoch}: validation NDCG@10 {value:.4f}", flush=True)
        if value > best:
            best, best_epoch, weights = value, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    test = evaluate(model, task.test, known)
    return {
        "model": "SASRec, full softmax",
        "seed": seed,
        "validation_ndcg@10": best,
        "epoch": best_epoch,
        **{name: float(values.mean()) for name, values in test.items() if name in ("hr@10", "ndcg@10", "hr@20")},
        "seconds": round(time.time() - started),
        "settings": {k: v for k, v in vars(options).items() if k not in ("output", "seeds")},
        "test_ndcg@10_by_user": [round(float(value), 6) for value in test["ndcg@10"]],
    }


def train_histories(task: Task, number: dict[int, int]) -> dict[int, list[int]]:
    """User -> films in training and validation, in order; the last is the validation film."""
    return {user: [number[film] for film in films] for user, films in task.seen.items()}


def main() -> None:
    """Train with each seed, and append the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=35)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--max_history", type=int, default=50)
    parser.add_argument("--dropout", type=float, default=0.35)
    parser.add_argument("--batch_size", type=int, default=16, help="windows of a history")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    options = parser.parse_args()
    task = make_task(load_movielens_100k(), options.max_history)
    for seed in options.seeds:
        append_json_line(options.output, train(task, options, seed))


if __name__ == "__main__":
    main()
