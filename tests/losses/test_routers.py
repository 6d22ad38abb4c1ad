"""Two towers of a hand-made Router, whose routes have names of their own."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router

from st_fpsloss import FPSLoss
from st_fpsloss.frequencies.table import FrequencyTable
from tests.losses.conftest import small_model
from tests.training.runs import click_log, trainer

TASKS = {("query", None): "user", ("document", None): "item"}


def user_item_model(**options) -> SentenceTransformer:
    routes = small_model()[0].sub_modules
    towers = {"user": list(routes["query"]), "item": list(routes["document"])}
    return SentenceTransformer(modules=[Router(towers, **options)], similarity_fn_name="dot")


def test_routes_that_do_not_tell_queries_from_documents_are_refused():
    with pytest.raises(ValueError, match=r"routes \['user', 'item'\].*route_mappings"):
        FPSLoss(user_item_model(), known_positives={"quick fox": ["towers"]})


def test_route_mappings_tell_queries_from_documents(tmp_path):
    model, named = user_item_model(route_mappings=TASKS), small_model()
    table = FrequencyTable.from_inputs(model, ["brew", "brew", "towers"], "document", prior=0.0)

    def value(loss, query="query", document="document"):
        columns = [["quick fox"], ["brew"], ["towers"]]
        tasks = [query, document, document]
        return loss([loss.model.preprocess(*column, task=task) for *column, task in zip(columns, tasks, strict=True)])

    assert value(FPSLoss(model, known_positives={"quick fox": ["towers"]})) == 0
    assert value(FPSLoss(model)) == value(FPSLoss(named)) > 0
    known = FPSLoss(model, log_q="standard", frequencies={"document": table})
    value(known)
    torch.testing.assert_close(known.last_batch[2].document_log_q.exp(), torch.tensor([[2 / 3], [1 / 3]]))
    with pytest.raises(ValueError, match="Input column 2 goes to the tower 'user'"):
        value(FPSLoss(model), document="user")

    log = click_log().map(lambda row: {**row, "negative": "moonlit brew"})
    columns = {"query": "query", "document": "document", "negative": "query"}
    with pytest.raises(ValueError, match="Input column 3 goes to the tower 'query'"):
        trainer(tmp_path, model=model, loss=FPSLoss(model), dataset=log, router_mapping=columns).train()
    columns["negative"] = "document"
    trainer(tmp_path, model=model, loss=FPSLoss(model), dataset=log, router_mapping=columns, max_steps=1).train()
