"""What the README says is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_drop_in_and_the_two_towers_of_the_readme_run_and_load_without_this_package(tmp_path, minilm):
    scripts = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(scripts) == 2 and "two_tower(" in scripts[1]
    for script in scripts:
        script = script.replace("sentence-transformers/all-MiniLM-L6-v2", minilm)  # the hub cannot be reached in tests
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    load = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "st_fpsloss":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from sentence_transformers import SentenceTransformer
print(SentenceTransformer("runs/shop/model").encode_query("red shoes").shape)
"""
    loaded = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert loaded.stdout.strip() == "(384,)"


@pytest.fixture(scope="module")
def movielens(tmp_path_factory):
    """The README's first command, for one epoch of large batches."""
    folder = tmp_path_factory.mktemp("movielens")
    assert "python training_scripts/movielens.py" in README
    command = [sys.executable, "training_scripts/movielens.py", "--output_dir", str(folder)]
    command += ["--epochs", "1", "--batch_size", "2048"]
    finished = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=600)
    return folder, finished.stdout


def test_movielens_prints_what_it_writes(movielens):
    folder, printed = movielens
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["popularity", "in-batch softmax, no log_q", "FPSLoss, log_q"]
    for row in rows:
        assert f"{row['ndcg@10']:.4f}" in printed
    assert rows[0]["ndcg@10"] == pytest.approx(0.0432, abs=5e-5)  # as other libraries have it under this protocol
    assert rows[2]["ndcg@10"] > rows[1]["ndcg@10"]
    assert "User 1 saw last" in printed
    assert {"model", "index", "learning_curve.png"} <= {path.name for path in folder.iterdir()}


def test_movielens_top_k_gives_the_metrics_of_the_table(movielens):
    from st_fpsloss.data.movielens import load_movielens_100k

    folder, _ = movielens
    header, *lines = (folder / "topk.tsv").read_text().splitlines()
    assert header == "user_id\titem_id\trank"
    ranked = {}
    for line in lines:
        user, film, rank = map(int, line.split("\t"))
        ranked.setdefault(user, []).append(film)
        assert rank == len(ranked[user])
    splits = load_movielens_100k().splits()
    seen = {(row["user_id"], row["item_id"]) for name in ("train", "validation") for row in splits[name]}
    assert all(len(films) == 100 for films in ranked.values())
    assert not any((user, film) in seen for user, films in ranked.items() for film in films)
    hits = [row["item_id"] in ranked[row["user_id"]][:10] for row in splits["test"]]
    hit_rate = json.loads((folder / "metrics.json").read_text())["rows"][2]["hr@10"]
    assert sum(hits) / len(hits) == pytest.approx(hit_rate, abs=0.003)  # ties count against the model in the table
