import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from st_fpsloss import Tower, two_tower
from st_fpsloss.serving import QueryEncoder, export_query_encoder
from st_fpsloss.towers import id_embedding
from tests.serving.models import FEATURES, ITEMS, WORDS, feature_model, text_model


def _queries(count):
    rng = random.Random(0)
    values = {
        "user": lambda: rng.choice(["u1", "u3", "somebody", None]),
        "embedding": lambda: rng.choice([1, 2, "three", None]),
        "age": lambda: rng.choice([17, 62.5, -1e9, None]),
        "likes": lambda: rng.sample(["a", "b", "c", "d"], rng.randrange(4)),
        "seen": lambda: rng.choices([*ITEMS, "new"], k=rng.randrange(9)),
        "recent": lambda: rng.choices(ITEMS, k=rng.randrange(9)),
        "text": lambda: " ".join(rng.choices([*WORDS, "zebra"], k=rng.randrange(20))),
    }
    return [{name: value() for name, value in values.items() if rng.random() < 0.7} for _ in range(count)]


def test_a_tower_of_text_and_every_kind_of_feature_embeds_as_the_model_does(feature_folder):
    encoder, model = QueryEncoder.load(feature_folder), feature_model()
    queries = ["red shoes", "", {}, *_queries(60)]
    expected = model.encode_query(queries)
    for batch_size in (1, 7, 63):
        np.testing.assert_allclose(encoder.encode(queries, batch_size), expected, atol=1e-5 * abs(expected).max())
    assert (encoder.dimension, encoder.similarity, len(FEATURES)) == (17, "dot", len(encoder.features))


def test_a_light_tower_of_text_embeds_as_the_model_does(query_folder):
    texts = ["red shoes", "", "a tent for the rain", "zebra", " ".join(WORDS * 40)]
    expected = text_model().encode_query(texts)
    queries = [*texts[:2], {"text": texts[2]}, *texts[3:]]
    for batch_size in (1, 5):
        np.testing.assert_allclose(QueryEncoder.load(query_folder).encode(queries, batch_size), expected, atol=1e-6)


def test_answers_in_a_few_times_what_its_imports_take_where_there_is_no_torch(feature_folder):
    code = (
        "import sys, time, numpy, onnxruntime, tokenizers\n"
        "imports = time.process_time()\n"
        "for name in ('torch', 'sentence_transformers', 'transformers', 'datasets'): sys.modules[name] = None\n"
        "from st_fpsloss.serving.query_encoder import QueryEncoder\n"
        f"found = QueryEncoder.load({str(feature_folder)!r}).encode(['red shoes', {{'text': 'tent', 'age': 3}}])\n"
        "print(imports, time.process_time(), found.sum())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    imports, seconds, total = map(float, done.stdout.split())
    assert seconds < 8 * imports  # of the processor, from the start of the interpreter: a second where they take .12
    assert total == pytest.approx(feature_model().encode_query(["red shoes", {"text": "tent", "age": 3}]).sum(), 1e-5)


def test_refuses_bad_queries_by_name(feature_folder, query_folder):
    encoder = QueryEncoder.load(feature_folder)
    for query, message in [
        ({"aeg": 3}, "Unknown key 'aeg' in an input: did you mean 'age'"),
        ({"age": "old"}, "'age' got 'old'"),
        ({"text": 3}, "'text' got 3"),
        (3, "The input 3 is a int: give a string or a dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            encoder.encode([query])
    with pytest.raises(ValueError, match="Unknown key 'age'"):
        QueryEncoder.load(query_folder).encode([{"age": 3}])
    with pytest.raises(ValueError, match="is one query: give a list"):
        encoder.encode("red shoes")
    assert encoder.encode([]).shape == (0, 17)


def test_refuses_folders_that_are_none_or_broken(query_folder, tmp_path):
    with pytest.raises(ValueError, match=r"no exported query tower: it has no query_encoder.json"):
        QueryEncoder.load(tmp_path)
    broken = shutil.copytree(query_folder, tmp_path / "broken")
    (broken / "model.onnx").write_bytes((broken / "model.onnx").read_bytes()[:100])
    with pytest.raises(ValueError, match="broken query tower, export it again"):
        QueryEncoder.load(broken)


class _Shouting(StaticEmbedding):
    def preprocess(self, inputs, **kwargs):
        return super().preprocess([text.upper() for text in inputs], **kwargs)


def test_refuses_to_write_what_would_differ_from_the_model(tmp_path):
    folder = tmp_path / "queries"
    plain = id_embedding([*WORDS, "RED"], embedding_dim=8)
    shouting = Tower(_Shouting(plain.tokenizer, plain.embedding.weight), hidden_dims=())
    with pytest.raises(ValueError, match="differs from the model"):
        export_query_encoder(two_tower(shouting, shouting, embedding_dim=8), folder)
    with pytest.raises(ValueError, match=r"torch.float16: call model.float\(\) first"):
        export_query_encoder(text_model().half(), folder)
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    with pytest.raises(ValueError, match="exists: choose another one"):
        export_query_encoder(text_model(), folder)
