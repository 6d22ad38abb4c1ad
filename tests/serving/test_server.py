import http.client
import json
import shutil
import signal
import time

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")

from st_fpsloss import DocumentIndex
from tests.serving.conftest import TOKEN, corpus
from tests.serving.malformed import MALFORMED, raw_answer
from tests.serving.running import get, post, serving

AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def place(served_model, query_folder, tmp_path_factory):
    """Index, token and a running server that has the query tower without torch."""
    folder = tmp_path_factory.mktemp("server")
    DocumentIndex.build(served_model, corpus(), folder / "index", columns=["year", "colour"])
    (folder / "token").write_text(TOKEN)
    options = ["--query_encoder", query_folder, "--index", folder / "index", "--token_file", folder / "token"]
    with serving(*options, log=folder / "log") as (_, port):
        yield folder / "index", port


def _results(answer):
    assert answer[0] == 200, answer
    return answer[1]["results"]


def test_answers_as_the_index_does(served_model, place):
    folder, port = place
    index = DocumentIndex.load(folder)
    for query in ("red shoes", "", "zebra", "a walk in the rain"):
        (expected,) = index.search(served_model, [query], 7)
        found = _results(post(port, "/search", {"query": query, "k": 7}))
        assert [one["id"] for one in found] == [document_id for document_id, _ in expected]
        assert [one["score"] for one in found] == pytest.approx([score for _, score in expected], abs=1e-5)
        assert all(index.document(one["id"]) == one["document"] for one in found)
        assert all(index.fields(one["id"]) == one["fields"] for one in found)
    assert len(_results(post(port, "/search", {"query": {"text": "red shoes"}}))) == 10


def test_filters_and_leaves_out(place):
    _, port = place
    best = _results(post(port, "/search", {"query": "red", "k": 300}))

    def red(year):
        return {"year": year, "colour": "red"}

    for wanted, fits in [
        ({"colour": "red"}, lambda one: one["fields"]["colour"] == "red"),
        ({"colour": ["blue", "green"]}, lambda one: one["fields"]["colour"] != "red"),
        ({"year": {"min": 1995, "max": 1999}}, lambda one: 1995 <= one["fields"]["year"] <= 1999),
        (
            {"year": {"max": 1993}, "colour": "blue"},
            lambda o: o["fields"]["year"] < 1994 and o["fields"]["colour"] == "blue",
        ),
        ({"id": ["d3", "d5", "d999"]}, lambda one: one["id"] in ("d3", "d5")),
    ]:
        expected = [one for one in best if fits(one)]
        assert expected
        assert _results(post(port, "/search", {"query": "red", "k": 300, "filter": wanted})) == expected
    left = _results(post(port, "/search", {"query": "red", "k": 3, "exclude": [best[0]["id"], best[2]["id"], "d999"]}))
    assert left == [best[1], *best[3:5]]


@pytest.mark.parametrize(("path", "body", "headers", "status", "reason"), MALFORMED)
def test_refuses_a_malformed_request_with_the_reason(place, path, body, headers, status, reason):
    found, answer = post(place[1], path, body, headers)
    assert (found, reason in answer["error"]) == (status, True), answer


def test_refuses_what_is_no_http_and_other_names(place):
    assert raw_answer(place[1], b"\x00\x01nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert b"Invalid host" in raw_answer(place[1], b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")


def test_health_metrics_and_schema(place):
    folder, port = place
    post(port, "/search", {"query": "counted"})
    post(port, "/search", {"query": "counted"})
    health = json.loads(get(port, "/health")[1])
    assert health == {"status": "ok", "documents": 300, "generation": DocumentIndex.load(folder).info["generation"]}
    lines = dict(line.rsplit(" ", 1) for line in get(port, "/metrics")[1].splitlines() if not line.startswith("#"))
    assert float(lines["st_fpsloss_index_documents"]) == 300
    assert float(lines["st_fpsloss_query_cache_hits_total"]) >= 1
    assert float(lines['st_fpsloss_requests_total{path="/search",status="200"}']) >= 2
    schema = json.loads(get(port, "/schema")[1])
    assert (schema["text"], schema["features"], schema["columns"]) == (True, [], ["year", "colour"])


def test_removes_with_the_token_and_takes_new_generations(served_model, place, tmp_path):
    folder, port = place
    kept = shutil.copytree(folder, tmp_path / "kept")
    [best, *_] = _results(post(port, "/search", {"query": "blue"}))
    assert post(port, "/remove", {"ids": [best["id"]]}, AUTHORISED) == (200, {"removed": 1, "documents": 299})
    assert best not in _results(post(port, "/search", {"query": "blue"}))
    assert len(DocumentIndex.load(folder)) == 299
    assert "is not among the 299" in post(port, "/remove", {"ids": [best["id"]]}, AUTHORISED)[1]["error"]
    assert post(port, "/add", {"documents": []}, AUTHORISED)[0] == 403
    DocumentIndex.build(served_model, corpus(), folder, columns=["year", "colour"], overwrite=True)
    generation = DocumentIndex.current_generation(folder)
    deadline = time.monotonic() + 120
    while json.loads(get(port, "/health")[1])["generation"] != generation:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert _results(post(port, "/search", {"query": "blue"}))[0] == best
    assert len(DocumentIndex.load(kept)) == 300


def test_a_whole_model_adds_documents_and_a_stop_lets_it_finish(served_model, index_folder, token_file, tmp_path):
    served_model.save_pretrained(str(tmp_path / "model"))
    options = ["--model", tmp_path / "model", "--index", index_folder, "--token_file", token_file]
    with serving(*options, log=tmp_path / "log") as (process, port):
        new = {"id": "new", "document": "zebra lamp lamp", "fields": {"year": 2020, "colour": "red"}}
        old = {"id": "d0", "document": corpus()[0][1], "fields": corpus()[0][2]}
        found = post(port, "/add", {"documents": [new, old]}, AUTHORISED)
        assert found == (200, {"added": 1, "changed": 0, "unchanged": 1, "documents": 301})
        [best, *_] = _results(post(port, "/search", {"query": "lamp", "filter": {"year": 2020}}))
        assert {name: best[name] for name in new} == new
        for wrong, reason in [
            ({}, "documents must be a list of"),
            ([{"id": 3}], "documents[0] must have id, document"),
            ([new, {**new, "id": 3}], "ids of type int, str"),
            ([{**new, "id": 3}], "ids of type int64, and those of the index are of"),
        ]:
            status, answer = post(port, "/add", {"documents": wrong}, AUTHORISED)
            assert (status, reason in answer["error"]) == (400, True), answer

        body = json.dumps({"query": "red shoes"}).encode()
        slow = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        slow.putrequest("POST", "/search")
        slow.putheader("Content-Type", "application/json")
        slow.putheader("Content-Length", str(len(body)))
        slow.endheaders(body[:5])
        get(port, "/health")  # the server has seen the start of the request by now
        process.send_signal(signal.SIGTERM)
        slow.send(body[5:])
        assert slow.getresponse().status == 200
        slow.close()
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
        assert (tmp_path / "log").read_text().endswith("Stopped.\n")


def test_refuses_to_start_with_another_model_or_a_short_token(query_folder, index_folder, served_model, tmp_path):
    from st_fpsloss.cli.serve import main
    from tests.serving.models import text_model

    with pytest.raises(ValueError, match="two ways to embed queries"):
        main(["--index", str(index_folder)])
    (tmp_path / "short").write_text("secret")
    options = ["--query_encoder", str(query_folder), "--index", str(index_folder)]
    with pytest.raises(ValueError, match="use at least 16"):
        main([*options, "--token_file", str(tmp_path / "short")])
    DocumentIndex.build(text_model(seed=1), corpus(), index_folder, overwrite=True)
    with pytest.raises(ValueError, match="another model"):
        main(options)
