"""Push and load through the real ``huggingface_hub`` client, against a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.hub.loopback import TOKEN, Hub, loopback_hub

ROOT = Path(__file__).parents[2]


def run(hub: Hub, folder: Path, role: str) -> None:
    """A process with a cache of its own; the offline switches of the test run do not reach it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / f"cache-of-{role}"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.hub.client", role, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """The Hub after an author pushed and a reader loaded, and the folder that both wrote to."""
    folder = tmp_path_factory.mktemp("hub")
    with loopback_hub() as hub:
        hub.refuse_commits_to = "tester/broken"
        run(hub, folder, "author")
        run(hub, folder, "reader")
        yield hub, folder


@pytest.mark.parametrize("kind", ["text", "feature", "history"])
def test_a_pushed_model_gives_equal_embeddings_in_a_fresh_cache(visit, kind):
    hub, folder = visit
    tree = hub.repositories[f"tester/{kind}"].commits[-1][1]
    assert "README.md" in tree and any(path.endswith(".safetensors") for path in tree)
    assert not any(path.endswith((".bin", ".pkl", ".pt")) for path in tree)
    np.testing.assert_array_equal(np.load(folder / f"{kind}-pushed.npy"), np.load(folder / f"{kind}-loaded.npy"))


def test_a_private_model_is_refused_without_a_token(visit):
    hub, folder = visit
    assert hub.repositories["tester/text"].private
    assert "tester/text" in (folder / "private.txt").read_text()


def test_a_push_that_fails_before_its_commit_leaves_nothing_visible(visit):
    hub, folder = visit
    assert "500" in (folder / "broken.txt").read_text()
    uploaded = hub.requests.index("POST /tester/broken.git/info/lfs/objects/batch")
    assert "POST /api/models/tester/broken/commit/main" in hub.requests[uploaded:]
    assert hub.repositories["tester/broken"].commits[-1][1] == {}


def test_checkpoints_that_are_pushed_during_training_hold_the_learned_alpha(visit):
    hub, folder = visit
    commits = [tree for _, tree in hub.repositories["tester/trained"].commits]
    assert any(
        "checkpoint-2/trainer_state.json" in tree and "checkpoint-4/trainer_state.json" not in tree for tree in commits
    )
    state = json.loads(commits[-1]["checkpoint-4/trainer_state.json"])
    stored = state["stateful_callbacks"]["LossStateCallback"]["attributes"]["losses"][""]["logit_scale"]
    assert stored == json.loads((folder / "logit_scale.json").read_text())
