"""Clients, good and bad, while the index is replaced: no crash, no wrong answer, bounded memory."""

import itertools
import random
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")

from st_fpsloss import DocumentIndex
from tests.serving.conftest import TOKEN, corpus
from tests.serving.malformed import MALFORMED, raw_answer
from tests.serving.models import WORDS
from tests.serving.running import get, post, serving

QUERIES = [" ".join(words) for words in itertools.combinations(WORDS[:8], 2)]
K = 5
_LEAST = 30  # searches of a client, however slow the machine
_LONG = "red shoes " * 20_000  # of a search that is within the limits, if only just


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_under_load_while_the_index_is_replaced_ten_times(served_model, query_folder, tmp_path, seconds):
    folder = tmp_path / "index"
    (tmp_path / "token").write_text(TOKEN)
    expected = {}

    def replace(number):
        documents = corpus(number, 2000)
        index = DocumentIndex.build(served_model, documents, folder, columns=["year", "colour"], overwrite=True)
        found = index.search(served_model, QUERIES, K)
        texts = {document_id: text for document_id, text, _ in documents}
        best = [[(one, pytest.approx(score, abs=1e-4), texts[one]) for one, score in results] for results in found]
        expected[index.info["generation"]] = dict(zip(QUERIES, best, strict=True))

    replace(0)
    options = ["--query_encoder", query_folder, "--index", folder, "--token_file", tmp_path / "token"]
    with serving(*options, log=tmp_path / "log") as (process, port):
        end = time.monotonic() + seconds
        answers, refusals, errors = [], [], []

        def client(seed):
            rng = random.Random(seed)
            for turn in itertools.count():
                if turn >= _LEAST and time.monotonic() > end:
                    return
                query = rng.choice(QUERIES)
                answers.append((query, post(port, "/search", {"query": query, "k": K})))
                if rng.random() < 0.02:
                    errors.extend(_unless(200, post(port, "/search", {"query": f"{rng.random()} {_LONG}"})))

        def bad_client(seed):
            rng = random.Random(seed)
            for turn in itertools.count(seed):
                if turn >= seed + len(MALFORMED) and time.monotonic() > end:
                    return
                path, body, headers, status, reason = MALFORMED[turn % len(MALFORMED)]
                found, answer = post(port, path, body, headers)
                refusals.append((found, status, answer["error"], reason))
                if not raw_answer(port, rng.randbytes(100) + b"\r\n\r\n").startswith(b"HTTP/1.1 400"):
                    errors.append("bytes that are no HTTP got no 400")

        clients = [_noting(work, errors) for work in (client, bad_client)] * 6
        threads = [threading.Thread(target=work, args=(number,)) for number, work in enumerate(clients)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 20)
        memory = [_megabytes(process)]
        for number in range(1, 11):
            replace(number)
            time.sleep(max(0.0, end - time.monotonic()) / (12 - number))
            memory.append(_megabytes(process))
        for thread in threads:
            thread.join()
        assert process.poll() is None
        _wait_for(port, DocumentIndex.current_generation(folder))
        answers.append((QUERIES[0], post(port, "/search", {"query": QUERIES[0], "k": K})))

    assert not errors
    assert [one for one in refusals if one[0] != one[1] or one[3] not in one[2]] == []
    assert [answer for query, (status, answer) in answers if status != 200] == []
    for query, (_, answer) in answers:
        found = [(one["id"], one["score"], one["document"]) for one in answer["results"]]
        assert found == expected[answer["generation"]][query]
    generations = {answer["generation"] for _, (_, answer) in answers}
    assert len(generations) > 3
    assert max(memory) - memory[0] < 150, memory
    assert len({reason for *_, reason in refusals}) == len({reason for *_, reason in MALFORMED})


def _noting(work, errors):
    def noted(seed):
        try:
            work(seed)
        except Exception as error:
            errors.append(repr(error))

    return noted


def _unless(status, answer):
    return [] if answer[0] == status else [answer]


def _megabytes(process):
    """Resident memory of the server, without pages of mapped files."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _wait_for(port, generation):
    for _ in range(1000):
        if generation in get(port, "/health")[1]:
            return
        time.sleep(0.01)
    raise AssertionError("the server does not take the last generation")
