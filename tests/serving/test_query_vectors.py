import threading

import numpy as np
import pytest

from st_fpsloss.serving.query_vectors import Overloaded, QueryVectors


class Encoder:
    """Embeds a text as its length, and waits for the gate before it does."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.batches = []

    def __call__(self, queries):
        self.started.set()
        assert self.gate.wait(30)
        self.batches.append([query["text"] for query in queries])
        if "bad" in self.batches[-1]:
            raise ValueError("bad is no query")
        return np.array([[float(len(query["text"]))] for query in queries])


@pytest.fixture
def encoder():
    return Encoder()


def test_queries_that_come_while_another_is_embedded_go_together_each_once(encoder):
    vectors = QueryVectors(encoder, max_batch_size=3)
    encoder.gate.clear()
    first = vectors.submit("first")
    assert encoder.started.wait(30)
    rest = [vectors.submit(text) for text in ("a", "bb", "a", "ccc", "dddd", {"text": "bb", "age": None})]
    encoder.gate.set()
    assert [future.result(30)[0] for future in [first, *rest]] == [5, 1, 2, 1, 3, 4, 2]
    assert encoder.batches == [["first"], ["a", "bb", "ccc"], ["dddd"]]
    assert (vectors.hits, vectors.misses, vectors.batches) == (2, 5, 3)
    vectors.close()


def test_the_latest_vectors_are_kept(encoder):
    vectors = QueryVectors(encoder, cache_size=2)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        assert vectors.submit(text).result(30)[0] == len(text)
    assert encoder.batches == [["a"], ["bb"], ["ccc"], ["bb"]]
    assert len(vectors) == 2
    vectors.close()


def test_a_query_that_cannot_be_embedded_fails_alone_and_is_not_kept(encoder):
    vectors = QueryVectors(encoder)
    encoder.gate.clear()
    vectors.submit("first")
    assert encoder.started.wait(30)
    good, bad, other = (vectors.submit(text) for text in ("good", "bad", "other"))
    encoder.gate.set()
    assert (good.result(30)[0], other.result(30)[0]) == (4, 5)
    for future in (bad, vectors.submit("bad")):
        with pytest.raises(ValueError, match="bad is no query"):
            future.result(30)
    vectors.close()


def test_refuses_more_than_may_wait_and_finishes_what_waits(encoder):
    vectors = QueryVectors(encoder, max_waiting=2)
    encoder.gate.clear()
    first = vectors.submit("first")
    assert encoder.started.wait(30)
    waiting = [vectors.submit(text) for text in ("a", "bb")]
    with pytest.raises(Overloaded, match="2 queries wait"):
        vectors.submit("ccc")
    encoder.gate.set()
    vectors.close()
    assert [future.result(0)[0] for future in [first, *waiting]] == [5, 1, 2]
    with pytest.raises(RuntimeError, match="has stopped"):
        vectors.submit("a")


def test_many_threads_get_their_vectors(encoder):
    vectors, wrong = QueryVectors(encoder, cache_size=7), []

    def client(number):
        for turn in range(200):
            text = "x" * ((number * 31 + turn * 7) % 40)
            if vectors.submit(text).result(30)[0] != len(text):
                wrong.append(text)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert vectors.hits + vectors.misses == 1600
    vectors.close()
