from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from st_fpsloss import FullSoftmaxLoss
from tests.losses.conftest import clicks, gradients, small_model

MODEL = small_model()
TEXTS = [["quick fox", "lazy dog", "quick fox"], ["seven wizards", "potent elixirs", "moonlit towers"]]
CORPUS = ["seven wizards", "brown fox jumps over a lazy dog", "potent elixirs", "moonlit towers", "brew"]


@pytest.mark.parametrize("options", [dict(), dict(cache_gradients=True, mini_batch_num_tokens=12)], ids=str)
def test_over_a_corpus_it_is_the_softmax_over_all_documents(options):
    model = small_model()
    features = [model.preprocess(texts, task=task) for texts, task in zip(TEXTS, ("query", "document"), strict=True)]
    model.zero_grad()
    u = model(dict(features[0]))["sentence_embedding"]
    w = model(model.preprocess(CORPUS, task="document"))["sentence_embedding"]
    expected = F.cross_entropy(u @ w.T, torch.tensor([0, 2, 3]))
    expected.backward()
    plain = gradients(model, None)
    model.zero_grad()
    loss = FullSoftmaxLoss(model, CORPUS, scale=1.0, **options)
    value = loss(features)
    value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(model, loss), plain, rtol=1e-4, atol=1e-6)


def test_each_document_of_the_corpus_is_encoded_once_a_step():
    model = small_model()
    encoded = []
    route = model[0].sub_modules["document"][0]
    route.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0]["input_ids"])))
    features = [model.preprocess(texts, task=task) for texts, task in zip(TEXTS, ("query", "document"), strict=True)]
    FullSoftmaxLoss(model, CORPUS)(features)
    assert sum(encoded) == len(CORPUS)


def test_a_corpus_with_the_trainers_prompt():
    model = small_model()
    features = [
        model.preprocess(texts, task=task, prompt="over ")
        for texts, task in zip(TEXTS, ("query", "document"), strict=True)
    ]
    value = FullSoftmaxLoss(model, CORPUS, corpus_prompt="over ")(features)
    assert torch.isfinite(value)
    with pytest.raises(ValueError, match="pass it as `corpus_prompt`"):
        FullSoftmaxLoss(model, CORPUS)(features)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FullSoftmaxLoss(MODEL, []), "`corpus` is empty"),
        (lambda: FullSoftmaxLoss(MODEL, ["brew"])(clicks(MODEL, 4)[0]()), "`corpus` lacks the document of row 0"),
    ],
)
def test_wrong_input_is_refused_with_its_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()
