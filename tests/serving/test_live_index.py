import logging
import threading

import pytest

from st_fpsloss import DocumentIndex
from st_fpsloss.serving.live_index import LiveIndex
from tests.serving.conftest import corpus
from tests.serving.models import text_model


def test_takes_new_generations_and_keeps_the_old_where_the_new_is_of_no_use(served_model, index_folder, caplog):
    live = LiveIndex(index_folder, lambda index: index.check_model(served_model))
    before = live.current
    live.refresh()
    assert live.current is before

    DocumentIndex.build(served_model, corpus(1, 50), index_folder, overwrite=True)
    live.refresh()
    assert (len(live.current), live.loads, len(before)) == (50, 2, 300)

    DocumentIndex.build(text_model(seed=1), corpus(2, 20), index_folder, overwrite=True)
    with caplog.at_level(logging.ERROR):
        live.refresh()
        live.refresh()
    assert len(live.current) == 50
    assert "another model" in live.problem
    assert len(caplog.records) == 1

    DocumentIndex.build(served_model, corpus(3, 10), index_folder, overwrite=True)
    live.refresh()
    assert (len(live.current), live.problem) == (10, None)


def test_changes_survive_another_writer(served_model, index_folder):
    live = LiveIndex(index_folder, lambda index: None)
    writers = [DocumentIndex.load(index_folder)]

    def apply(index):
        if writers:  # somebody publishes between load and save
            other = writers.pop()
            other.remove(["d0"])
            other.save()
        index.remove(["d1"])

    live.change(apply)
    assert len(live.current) == len(DocumentIndex.load(index_folder)) == 298
    with pytest.raises(ValueError, match="'d1', which is not among the 298"):
        live.change(lambda index: index.remove(["d1"]))
    assert len(live.current) == 298


def test_watches(served_model, index_folder):
    live = LiveIndex(index_folder, lambda index: None)
    live.watch(0.02)
    DocumentIndex.build(served_model, corpus(1, 40), index_folder, overwrite=True)
    waited = threading.Event()
    for _ in range(500):
        if len(live.current) == 40:
            break
        waited.wait(0.02)
    assert len(live.current) == 40
    live.close()
