from __future__ import annotations

import inspect
import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import CrossEncoder, SparseEncoder
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, Matryoshka2dLoss, MatryoshkaLoss
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from st_fpsloss import FPSLoss
from st_fpsloss.frequencies.table import FrequencyTable
from st_fpsloss.objectives import naive
from tests.losses.agreement import random_batch
from tests.losses.conftest import clicks, gradients, plain_model, small_model

MODEL = small_model()
TABLE = FrequencyTable()


def ours(loss: FPSLoss, dtype: torch.dtype, U, W, query, document, r, query_log_q, document_log_q):
    """Value and gradients with respect to the distinct rows and α."""
    U, W = (tensor.to(dtype).requires_grad_() for tensor in (U, W))
    log_q = {"query_log_q": query_log_q, "document_log_q": document_log_q} if loss.log_q else {}
    value = loss.compute_loss_from_embeddings(
        [U[query], *W[document]], labels=r, query_ids=query, document_ids=document, **log_q
    )
    d_u, d_w, d_log_alpha = torch.autograd.grad(value, [U, W, loss.logit_scale])
    return value.detach(), d_u, d_w, d_log_alpha


def plain(loss: FPSLoss, dtype: torch.dtype, U, W, query, document, r, query_log_q, document_log_q):
    U, W = (tensor.to(dtype).requires_grad_() for tensor in (U, W))
    log_alpha = loss.logit_scale.detach().to(dtype).requires_grad_()
    rows_u, rows_w = U[query], W[document]
    if loss.similarity == "cosine":
        rows_u, rows_w = F.normalize(rows_u, dim=-1), F.normalize(rows_w, dim=-1)
    values = [
        naive.full_product_softmax(
            rows_u, rows_w, log_alpha.exp(), query, document, r, direction, loss.duplicates, loss.relevance,
            loss.log_q, document_log_q.to(dtype), query_log_q.to(dtype),
        )
        for direction in loss.directions
    ]  # fmt: skip
    value = torch.stack(values).mean()
    d_u, d_w, d_log_alpha = torch.autograd.grad(value, [U, W, log_alpha], materialize_grads=True)
    return value.detach(), d_u, d_w, d_log_alpha


DIRECTIONS = [("query_to_doc",), ("doc_to_query",), ("query_to_doc", "doc_to_query")]


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize(
    ("duplicates", "log_q"),
    [("keep", None), ("mask", None), ("keep", "standard"), ("mask", "standard"), ("mask", "corrected")],
)
def test_value_and_gradients_equal_the_float64_formula(similarity, directions, duplicates, log_q):
    for rows, negatives, relevance, seed in itertools.product([1, 6, 13], [0, 1, 3], ["mask", "weight"], [0, 1]):
        loss = FPSLoss(
            MODEL, scale=2.0, similarity=similarity, directions=directions, duplicates=duplicates, log_q=log_q,
            relevance=relevance,
        )  # fmt: skip
        batch = random_batch(rows, negatives, seed)
        truth = plain(loss, torch.float64, *batch)
        for dtype, tolerance in ((torch.float64, 2e-7), (torch.float32, 2e-5)):  # log α itself is a float32 parameter
            simple = plain(loss, dtype, *batch)
            for true, simply, mine in zip(truth, simple, ours(loss, dtype, *batch), strict=True):
                allowed = tolerance * true.norm() + (simply - true).norm() + 1e-7
                assert (mine - true).norm() <= allowed, (rows, negatives, relevance, seed, dtype)


def test_keep_on_a_query_with_several_positives_is_the_multi_positive_softmax():
    torch.manual_seed(0)
    U, W = torch.randn(1, 4), torch.randn(3, 4)
    document = torch.tensor([0, 0, 1, 2])  # one query, its documents clicked 2, 1 and 1 times
    value = FPSLoss(MODEL, scale=1.0, similarity="dot", duplicates="keep").compute_loss_from_embeddings(
        [U.expand(4, 4), W[document]], query_ids=torch.zeros(4, dtype=torch.int64), document_ids=document[None]
    )
    counts = torch.tensor([2.0, 1.0, 1.0])
    logits = U @ W.T + counts.log()  # a document that is two columns has two shares of the softmax
    expected = F.cross_entropy(logits, (counts / 4)[None]) + (counts / 4 * counts.log()).sum()
    torch.testing.assert_close(value, expected)


def test_a_batch_of_one_has_loss_zero_and_finite_gradients():
    U, W = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    loss = FPSLoss(MODEL)
    value = loss.compute_loss_from_embeddings([U, W])
    value.backward()
    assert value.item() == 0
    assert torch.equal(U.grad, torch.zeros(1, 4)) and loss.logit_scale.grad == 0


@pytest.mark.parametrize("cache_gradients", [False, True])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_a_batch_without_positives_has_loss_zero_connected_to_the_graph(directions, cache_gradients):
    model = small_model()
    loss = FPSLoss(model, directions=directions, cache_gradients=cache_gradients)
    features, _ = clicks(model, 5)
    value = loss(features(), torch.tensor([0.0, -1.0, 0.0, 0.0, -2.0]))
    value.backward()
    assert value.item() == 0
    assert torch.equal(gradients(model, loss), torch.zeros_like(gradients(model, loss)))


def test_a_row_that_is_no_positive_still_is_a_negative_of_the_others():
    torch.manual_seed(0)
    U, W = torch.randn(3, 4), torch.randn(3, 4)
    value = FPSLoss(MODEL, scale=1.0, similarity="dot").compute_loss_from_embeddings(
        [U, W], labels=torch.tensor([1.0, 0.0, 1.0])
    )
    torch.testing.assert_close(value, F.cross_entropy((U @ W.T)[[0, 2]], torch.tensor([0, 2])))


@pytest.mark.parametrize("cache_gradients", [False, True])
def test_a_batch_is_counted_once_however_many_dimensions_matryoshka_has(cache_gradients):
    model = small_model()
    loss = FPSLoss(model, log_q="standard", cache_gradients=cache_gradients)
    features, _ = clicks(model, 5)
    of_all_dimensions = MatryoshkaLoss(model, loss, [4, 2])
    for step in (1, 2):
        of_all_dimensions(features(), None)
        assert loss.frequencies["document"].total == 5 * step


def test_before_anything_is_counted_log_q_is_uniform():
    model = small_model()
    features, _ = clicks(model, 5)
    with torch.no_grad():
        plain, corrected = (FPSLoss(model, log_q=log_q, scale=1.0)(features()) for log_q in (None, "corrected"))
    torch.testing.assert_close(corrected, plain, rtol=0.1, atol=0)


def test_known_positives_of_the_whole_log_are_no_negatives():
    model = small_model(similarity="cosine")
    queries, documents = ["quick fox", "lazy dog"], ["seven wizards", "potent elixirs"]
    columns = lambda: [model.preprocess(queries, task="query"), model.preprocess(documents, task="document")]  # noqa: E731
    loss = FPSLoss(model, known_positives={"quick fox": ["potent elixirs", "moonlit towers"]})
    u, w = model.encode_query(queries, convert_to_tensor=True), model.encode_document(documents, convert_to_tensor=True)
    expected = F.cross_entropy((u @ w.T)[1:] / 0.07, torch.tensor([1])) / 2  # the first query has no negative left
    torch.testing.assert_close(loss(columns()), expected)
    as_pairs = FPSLoss(model, known_positives=[("quick fox", "potent elixirs")])
    torch.testing.assert_close(as_pairs(columns()), expected)


def test_bias_starts_and_stays_where_it_is_put():
    model = small_model()
    loss = FPSLoss(model, bias=-6.0)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.01, weight_decay=0.1)
    features, _ = clicks(model, 6)
    for _ in range(50):
        optimizer.zero_grad()
        loss(features()).backward()
        assert loss.logit_bias.grad is None
        optimizer.step()
    assert loss.beta == -6.0
    assert loss.alpha != FPSLoss(model).alpha  # the scale did learn


def test_scale_starts_by_similarity_and_is_clamped():
    assert FPSLoss(small_model()).alpha == pytest.approx(1.0)
    cosine = small_model(similarity="cosine")
    loss = FPSLoss(cosine, max_scale=20.0)
    assert loss.alpha == pytest.approx(1 / 0.07)
    assert loss.temperature == pytest.approx(0.07)
    with torch.no_grad():
        loss.logit_scale.fill_(10.0)  # an optimizer step too far
    features, _ = clicks(cosine, 4)
    loss(features())
    assert loss.alpha == pytest.approx(20.0)


def test_log_q_is_counted_from_the_batches():
    model = small_model()
    loss = FPSLoss(model, log_q="standard", duplicates="keep", similarity="dot", scale=1.0)
    features, ids = clicks(model, 12, num_negatives=1)
    value = loss(features())
    # The reference takes the table's own prior: one more than counted.
    _, inverse, counts = ids[1:].unique(return_inverse=True, return_counts=True)
    log_q = torch.log((counts + 1) / (counts.sum() + len(counts)))[inverse]
    embeddings = [model(column)["sentence_embedding"] for column in features()]
    expected = loss.compute_loss_from_embeddings(
        embeddings, query_ids=ids[0], document_ids=ids[1:], document_log_q=log_q
    )
    torch.testing.assert_close(value, expected)


def test_log_q_does_not_count_in_evaluation():
    model = small_model()
    loss = FPSLoss(model, log_q="corrected")
    features, _ = clicks(model, 6)
    loss(features())
    counted = loss.frequencies["document"].total
    loss.eval()
    loss(features())
    assert loss.frequencies["document"].total == counted


def test_learned_scale_without_callback_warns_once(caplog):
    model = small_model()
    loss = FPSLoss(model)
    features, _ = clicks(model, 4)
    with caplog.at_level(logging.WARNING):
        loss(features())
        loss(features())
    assert sum("LossStateCallback(loss)" in record.message for record in caplog.records) == 1


def wrong_batch(columns=None, labels=None):
    features, _ = clicks(MODEL, 4)
    return FPSLoss(MODEL)(features() if columns is None else columns(features()), labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FPSLoss(MODEL, directions=("sideways",)), "`directions` must be.*query_to_doc.*sideways"),
        (lambda: FPSLoss(MODEL, directions="query_to_doc"), r'for one direction write \("query_to_doc",\)'),
        (lambda: FPSLoss(MODEL, directions=()), "`directions`"),
        (lambda: FPSLoss(MODEL, relevance="graded"), "`relevance` must be one of 'mask', 'weight', got 'graded'"),
        (lambda: FPSLoss(MODEL, duplicates="drop"), "`duplicates`"),
        (lambda: FPSLoss(MODEL, log_q="yes"), "`log_q`"),
        (lambda: FPSLoss(MODEL, log_q="corrected", duplicates="keep"), "use `log_q='standard'`"),
        (lambda: FPSLoss(MODEL, known_positives={"a": ["b"]}, duplicates="keep"), "`known_positives` needs"),
        (lambda: FPSLoss(MODEL, known_positives={}), "`known_positives` is empty"),
        (lambda: FPSLoss(MODEL, known_positives={"a": "b"}), r"`known_positives\['a'\]` must be the documents"),
        (lambda: FPSLoss(MODEL, known_positives=["ab"]), "must hold pairs"),
        (lambda: FPSLoss(MODEL, log_q="standard", frequencies=FrequencyTable()), "goes by side, got a FrequencyTable"),
        (lambda: FPSLoss(MODEL, frequencies={"document": FrequencyTable()}), "has a use with `log_q` alone"),
        (
            lambda: FPSLoss(MODEL, log_q="standard", frequencies=dict.fromkeys(["query", "document"], TABLE)),
            "one table for both sides",
        ),
        (lambda: FPSLoss(MODEL, similarity="manhattan"), "'dot' or 'cosine', got 'manhattan'"),
        (lambda: FPSLoss(MODEL, scale=0.0), "`scale` must be above 0"),
        (lambda: FPSLoss(MODEL, scale=200.0), "`max_scale` = 100.0"),
        (lambda: FPSLoss(MODEL, mini_batch_num_tokens=0), "mini_batch_num_tokens=0 must"),
        (lambda: wrong_batch(labels=torch.tensor([1.0, float("nan"), 1.0, 1.0])), "row 1 of the batch has nan"),
        (lambda: wrong_batch(labels=torch.ones(3)), r"shape \(4,\)"),
        (lambda: wrong_batch(columns=lambda c: c[:1]), "needs at least the columns query and document"),
        (lambda: wrong_batch(columns=lambda c: [c[1], c[0]]), "Set `router_mapping`"),
        (lambda: wrong_batch(columns=lambda c: [c[0], {**c[1], "task": None}]), "Set `router_mapping`"),
        (
            lambda: FPSLoss(MODEL).compute_loss_from_embeddings([torch.ones(2, 3), torch.ones(3, 3)]),
            "must all have one shape",
        ),
        (
            lambda: FPSLoss(MODEL).compute_loss_from_embeddings([torch.ones(2, 3)] * 2, query_ids=torch.arange(3)),
            "`query_ids` must have the shape",
        ),
        (
            lambda: FPSLoss(MODEL, log_q="standard").compute_loss_from_embeddings([torch.ones(2, 3)] * 2),
            "`document_log_q`",
        ),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_with_its_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("cached", [True, False])
def test_matryoshka_loss_on_a_model_of_dot_products_is_warned_of_once(cached, caplog):
    for similarity in ("cosine", "dot"):
        model = small_model(similarity=similarity)
        loss = MatryoshkaLoss(model, FPSLoss(model, cache_gradients=cached), [8, 4])
        caplog.clear()
        for _ in range(2):
            loss(clicks(model, 4)[0](), None)
        found = [record.message for record in caplog.records if "trains a cosine, at α = 1" in record.message]
        assert len(found) == (similarity == "dot")


@pytest.mark.parametrize("wrapper", [AdaptiveLayerLoss, Matryoshka2dLoss])
def test_losses_that_cut_layers_are_refused(wrapper, minilm):
    model = plain_model(minilm)
    arguments = [FPSLoss(model, scale=1.0), *([[16, 8]] if wrapper is Matryoshka2dLoss else [])]
    with pytest.raises(ValueError, match="MatryoshkaLoss works around it"):
        wrapper(model, *arguments)(clicks(model, 3)[0](), None)


def test_a_model_of_another_kind_is_refused(minilm, tmp_path):
    with pytest.raises(ValueError, match=r"`model` must be a SentenceTransformer.*got a Linear"):
        FPSLoss(torch.nn.Linear(2, 2))
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=1)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for model in (CrossEncoder(str(tmp_path)), SparseEncoder(modules=[SparseStaticEmbedding(tokenizer)])):
        with pytest.raises(ValueError, match=f"got a {type(model).__name__}.*take those of sentence-transformers"):
            FPSLoss(model)


@pytest.mark.parametrize("options", [dict(scale=float("inf")), dict(max_scale=float("inf")), dict(bias=float("nan"))])
def test_what_is_not_finite_is_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
        FPSLoss(MODEL, **options)


def test_the_signature_has_all_arguments_in_the_order_of_the_contract_and_the_help_explains_each():
    names = list(inspect.signature(FPSLoss).parameters)
    expected = [
        "model", "scale", "bias", "learn_scale", "learn_bias", "max_scale", "directions", "relevance", "duplicates",
        "log_q", "frequencies", "known_positives", "similarity", "mini_batch_num_tokens", "cache_gradients",
    ]  # fmt: skip
    assert [name for name in names if name in expected] == expected
    assert all(f"\n    {name}: " in FPSLoss.__doc__ for name in names)
    assert FPSLoss(MODEL, 3.0).alpha == pytest.approx(3.0)
    with pytest.raises(TypeError, match="hardest"):
        FPSLoss(MODEL, hardest=3)


def test_log_q_that_leaves_out_much_of_q_is_warned_of():
    loss = FPSLoss(MODEL, log_q="corrected")
    query, document = torch.zeros(4, dtype=torch.int64), torch.tensor([[0, 1, 2, 3]])
    embeddings = [torch.randn(1, 4).expand(4, 4), torch.randn(4, 4, requires_grad=True)]
    loss.compute_loss_from_embeddings(embeddings, None, query, document, torch.full((1, 4), 0.2).log())
    figures = loss.batch_statistics()
    assert figures["masked_q"] == pytest.approx(0.6)
    assert any("have 60% of all draws" in warning for warning in loss.training_warnings(figures))


def test_float64_stays_float64():
    model = small_model().double()
    loss = FPSLoss(model, scale=1.0, similarity="dot").double()
    features, ids = clicks(model, 12)
    U, W = (model(column)["sentence_embedding"] for column in features())
    r, alpha = torch.ones(12, dtype=torch.float64), loss.logit_scale.exp()
    expected = naive.full_product_softmax(U, W[None], alpha, ids[0], ids[1:], r, duplicates="mask")
    assert abs(loss(features()) - expected) < 1e-13
