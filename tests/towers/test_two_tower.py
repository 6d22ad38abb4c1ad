from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding, Transformer
from transformers import (
    AutoModel,
    DistilBertConfig,
    GPT2Config,
    LongformerConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

from st_fpsloss.towers import Tower, freeze_unused_parameters, id_embedding, id_transformer, two_tower

TEXTS = ["a film about a train", "robots", "a quiet drama in a small town, long enough to be cut at ten tokens"]
IDS = [f"i{n}" for n in range(20)]
HISTORIES = ["i1 i2 i3", "i4", "", "i9 unknown i1"]

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
LAYOUTS: dict[str, PreTrainedConfig] = {
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=40),
    "mpnet": MPNetConfig(**SIZES, max_position_embeddings=40),
    "distilbert": DistilBertConfig(vocab_size=30, dim=16, n_layers=3, n_heads=2, hidden_dim=32),
    "modernbert": ModernBertConfig(**SIZES, pad_token_id=0, bos_token_id=2, eos_token_id=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    "t5": T5Config(vocab_size=30, d_model=16, num_layers=3, num_heads=2, d_ff=32, d_kv=8),
    "gpt2": GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=2, bos_token_id=2, eos_token_id=2),
    "longformer": LongformerConfig(**SIZES, attention_window=4, max_position_embeddings=40),
}


def tiny_encoder() -> Transformer:
    return id_transformer(IDS, hidden_size=16, num_hidden_layers=3, max_seq_length=12, dropout=0.0)


def tiny_model(**kwargs) -> SentenceTransformer:
    query = Tower(tiny_encoder(), hidden_dims=(24,))
    return two_tower(query, Tower(id_embedding(IDS, 16), hidden_dims=(24,)), embedding_dim=8, **kwargs)


def route(model: SentenceTransformer, name: str) -> list:
    return list(model[0].sub_modules[name])


def kinds(modules: list) -> list[str]:
    return [type(module).__name__ for module in modules]


def reloaded(model: SentenceTransformer, folder: Path) -> SentenceTransformer:
    model.save_pretrained(str(folder))
    return SentenceTransformer(str(folder))


def assert_same_embeddings(first: SentenceTransformer, second: SentenceTransformer, texts: list[str]) -> None:
    np.testing.assert_array_equal(first.encode_query(texts), second.encode_query(texts))
    np.testing.assert_array_equal(first.encode_document(texts), second.encode_document(texts))


def save_folder(config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    AutoModel.from_config(config).to(dtype).save_pretrained(folder)
    tiny_encoder().tokenizer.save_pretrained(folder)
    return str(folder)


# What the model is made of


def test_a_tower_is_a_transformer_its_pooling_and_an_mlp(minilm: str) -> None:
    query = Tower(minilm, num_hidden_layers=1, pooling="cls", hidden_dims=(32, 24), dropout=0.1)
    model = two_tower(query, Tower(minilm, num_hidden_layers=2, hidden_dims=()), embedding_dim=8)
    assert kinds(route(model, "query")) == ["Transformer", "Pooling", "Dense", "Dropout", "Dense", "Dropout", "Dense"]
    assert kinds(route(model, "document")) == ["Transformer", "Pooling", "Normalize", "Dense"]
    assert route(model, "query")[1].pooling_mode == "cls"
    dense = [module for module in route(model, "query") if type(module).__name__ == "Dense"]
    assert [(d.in_features, d.out_features) for d in dense] == [(384, 32), (32, 24), (24, 8)]
    assert kinds([d.activation_function for d in dense]) == ["ReLU", "ReLU", "Identity"]
    assert model.encode_query(TEXTS).shape == model.encode_document(TEXTS).shape == (3, 8)
    assert model.get_embedding_dimension() == 8


def test_without_hidden_layers_dropout_acts_on_the_encoders_embedding() -> None:
    model = two_tower(Tower(tiny_encoder(), hidden_dims=(), dropout=0.5), Tower(tiny_encoder()), embedding_dim=8)
    assert kinds(route(model, "query")) == ["Transformer", "Pooling", "Dropout", "Dense"]


def test_cosine_ends_in_unit_embeddings_and_dot_does_not() -> None:
    cosine, dot = tiny_model(similarity="cosine"), tiny_model(similarity="dot")
    assert (cosine.similarity_fn_name, dot.similarity_fn_name) == ("cosine", "dot")
    np.testing.assert_allclose(np.linalg.norm(cosine.encode_query(HISTORIES), axis=1), 1, rtol=1e-5)
    assert not np.allclose(np.linalg.norm(dot.encode_query(HISTORIES), axis=1), 1, rtol=1e-2)


def test_two_equal_descriptions_are_two_encoders(minilm: str) -> None:
    model = two_tower(Tower(minilm, num_hidden_layers=1), Tower(minilm, num_hidden_layers=1))
    assert route(model, "query")[0] is not route(model, "document")[0]


def test_the_same_tower_twice_is_one_encoder_with_one_copy_of_the_weights_saved(minilm: str, tmp_path: Path) -> None:
    tower = Tower(minilm, num_hidden_layers=1)
    model = two_tower(tower, tower, embedding_dim=8)
    np.testing.assert_array_equal(model.encode_query(TEXTS), model.encode_document(TEXTS))
    again = reloaded(model, tmp_path)
    for built in (model, again):
        assert all(q is d for q, d in zip(route(built, "query"), route(built, "document"), strict=True))
    assert len(list(tmp_path.rglob("*Transformer/model.safetensors"))) == 1
    assert_same_embeddings(model, again, TEXTS)


def test_a_ready_module_may_be_shared_under_different_mlps() -> None:
    encoder = tiny_encoder()
    model = two_tower(Tower(encoder, hidden_dims=(8,)), Tower(encoder, hidden_dims=()), embedding_dim=4)
    assert route(model, "query")[0] is route(model, "document")[0] is encoder
    assert not np.allclose(model.encode_query(HISTORIES), model.encode_document(HISTORIES))


def test_a_ready_module_is_left_as_it_was_when_the_tower_cuts_it() -> None:
    encoder = tiny_encoder()
    model = two_tower(Tower(encoder, num_hidden_layers=1, max_seq_length=4), Tower(encoder), embedding_dim=4)
    assert (len(encoder.model.encoder.layer), encoder.model.config.num_hidden_layers) == (3, 3)
    assert (encoder.max_seq_length, route(model, "query")[0].max_seq_length) == (12, 4)
    assert route(model, "document")[0] is encoder


# Cutting a transformer


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (4, [0, 2, 3, 5]), (6, range(6))])
def test_the_first_the_last_and_layers_between_them_are_kept(minilm: str, count: int, kept: list[int]) -> None:
    tower = Tower(minilm, num_hidden_layers=count)
    cut = route(two_tower(tower, tower), "query")[0].model
    full = SentenceTransformer(minilm, device="cpu")[0].model.encoder.layer
    assert cut.config.num_hidden_layers == len(cut.encoder.layer) == count
    for layer, number in zip(cut.encoder.layer, kept, strict=True):
        torch.testing.assert_close(dict(layer.named_parameters()), dict(full[number].named_parameters()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_are_cut_in_many_layouts_and_stay_so_after_loading(layout: str, tmp_path: Path) -> None:
    folder = save_folder(LAYOUTS[layout], tmp_path / "full")
    model = two_tower(Tower(folder, num_hidden_layers=2, max_seq_length=8), Tower(folder), embedding_dim=8)
    again = reloaded(model, tmp_path / "saved")
    assert [route(again, name)[0].model.config.num_hidden_layers for name in ("query", "document")] == [2, 3]
    assert route(again, "query")[0].max_seq_length == 8
    assert_same_embeddings(model, again, HISTORIES)
    two, three = (sum(p.numel() for p in route(again, name)[0].model.parameters()) for name in ("query", "document"))
    assert two < three


@pytest.mark.parametrize("max_seq_length", [None, 10])
def test_max_seq_length_survives_saving(minilm: str, tmp_path: Path, max_seq_length: int | None) -> None:
    model = two_tower(
        Tower(minilm, num_hidden_layers=1, max_seq_length=max_seq_length), Tower(id_embedding(IDS, 8)), embedding_dim=8
    )
    again = reloaded(model, tmp_path)
    # MiniLM's own limit is 256, kept in its sentence-transformers configuration.
    assert route(model, "query")[0].max_seq_length == route(again, "query")[0].max_seq_length == (max_seq_length or 256)
    width = again.preprocess(["word " * 400], task="query")["input_ids"].shape[1]
    assert width == (max_seq_length or 256)


def test_a_checkpoint_in_half_precision_becomes_float32(tmp_path: Path) -> None:
    folder = save_folder(LAYOUTS["roberta"], tmp_path / "half", torch.bfloat16)
    model = two_tower(Tower(folder), Tower(folder), embedding_dim=8)
    again = reloaded(model, tmp_path / "saved")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert_same_embeddings(model, again, HISTORIES)


# Saving, loading, prompts


def test_a_saved_text_model_loads_without_this_package_and_without_trust(minilm: str, tmp_path: Path) -> None:
    query = Tower(minilm, num_hidden_layers=1, max_seq_length=10, hidden_dims=(16,), dropout=0.2)
    prompts = {"query": "query: ", "document": "passage: "}
    model = two_tower(query, Tower(id_embedding(IDS, 16)), embedding_dim=8, similarity="cosine", prompts=prompts)
    model.save_pretrained(str(tmp_path / "model"))
    code = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "st_fpsloss":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
import numpy as np
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("model")
np.savez("out.npz", query=model.encode_query({TEXTS!r}), document=model.encode_document({HISTORIES!r}))
assert model.similarity_fn_name == "cosine" and "st_fpsloss" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    out = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(out["query"], model.encode_query(TEXTS))
    np.testing.assert_array_equal(out["document"], model.encode_document(HISTORIES))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_similarity_prompts_and_embeddings_survive_saving(similarity: str, tmp_path: Path) -> None:
    model = tiny_model(similarity=similarity, prompts={"query": "i7 ", "document": "i8 "})
    again = reloaded(model, tmp_path)
    assert again.similarity_fn_name == similarity
    assert again.prompts == {"query": "i7 ", "document": "i8 "}
    assert_same_embeddings(model, again, HISTORIES)


def test_a_saved_model_names_no_folder_of_the_machine_it_was_made_on(tmp_path: Path) -> None:
    tiny_model().save_pretrained(str(tmp_path / "out"))
    for file in tmp_path.rglob("*.*"):
        if file.suffix in (".json", ".md"):
            text = file.read_text()
            assert str(tmp_path) not in text and "/tmp" not in text, file


def test_each_side_gets_its_own_prompt() -> None:
    plain, prompted = tiny_model(), tiny_model(prompts={"query": "i7 ", "document": "i8 "})
    prompted.load_state_dict(plain.state_dict())
    np.testing.assert_allclose(
        prompted.encode_query(["i1 i2"]), plain.encode_query(["i7 i1 i2"], prompt=""), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(prompted.encode_document(["i1"]), plain.encode_document(["i8 i1"]), rtol=1e-5, atol=1e-6)
    assert not np.allclose(prompted.encode_query(["i1 i2"]), plain.encode_query(["i1 i2"]))


def test_a_folder_of_a_static_model_gives_its_embedding_table(tmp_path: Path) -> None:
    static = id_embedding(IDS, 16)
    SentenceTransformer(modules=[static]).save_pretrained(str(tmp_path))
    model = two_tower(Tower(str(tmp_path)), Tower(tmp_path), embedding_dim=8)
    loaded = route(model, "query")[0]
    assert isinstance(loaded, StaticEmbedding)
    torch.testing.assert_close(loaded.embedding.weight, static.embedding.weight)


# Training


def test_the_stock_trainer_trains_saves_and_resumes_both_towers(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    clicks = Dataset.from_dict({"query": ["i1 i2", "i3", "i4 i5", "i6"] * 3, "document": ["i3", "i4", "i6", "i7"] * 3})
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        router_mapping={"query": "query", "document": "document"},
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=args, train_dataset=clicks, loss=loss).train()
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("pooler" not in name), name
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = SentenceTransformer(checkpoint)
    freeze_unused_parameters(resumed)
    loss = MultipleNegativesRankingLoss(resumed)
    SentenceTransformerTrainer(model=resumed, args=args, train_dataset=clicks, loss=loss).train(checkpoint)
    np.testing.assert_allclose(resumed.encode_query(HISTORIES), model.encode_query(HISTORIES), rtol=1e-4, atol=1e-5)
    assert not np.allclose(model.encode_query(HISTORIES), SentenceTransformer(checkpoint).encode_query(HISTORIES))


@pytest.mark.parametrize("layout", ["roberta", "mpnet", "distilbert", "modernbert", "t5"])
def test_every_trainable_parameter_receives_a_gradient(layout: str, tmp_path: Path) -> None:
    folder = save_folder(LAYOUTS[layout], tmp_path)
    model = two_tower(Tower(folder, num_hidden_layers=2), Tower(tiny_encoder(), dropout=0.1), embedding_dim=8).train()
    for task in ("query", "document"):
        model(model.preprocess(HISTORIES, task=task), task=task)["sentence_embedding"].square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_poolers_are_frozen_again_after_loading(tmp_path: Path) -> None:
    tower = Tower(tiny_encoder())
    again = reloaded(two_tower(tower, Tower(tiny_encoder())), tmp_path)
    poolers = [name for name, _ in again.named_parameters() if ".pooler." in name]
    assert len(poolers) == 4
    assert freeze_unused_parameters(again) == poolers
    assert {name for name, p in again.named_parameters() if not p.requires_grad} == set(poolers)
    assert freeze_unused_parameters(again) == poolers


def test_a_pooler_whose_output_is_read_stays_trainable(tmp_path: Path) -> None:
    folder = save_folder(LAYOUTS["roberta"], tmp_path)
    reads_pooler = Transformer(
        folder,
        modality_config={"text": {"method": "forward", "method_output_name": "pooler_output"}},
        module_output_name="sentence_embedding",
    )
    model = two_tower(Tower(reads_pooler), Tower(id_embedding(IDS, 8)), embedding_dim=8)
    assert kinds(route(model, "query")) == ["Transformer", "Dense", "Dense"]
    assert freeze_unused_parameters(model) == []
    assert all(p.requires_grad for p in model.parameters())
    assert model.encode_query(HISTORIES).shape == (4, 8)


def test_the_modules_of_a_text_model_are_all_stock(tmp_path: Path) -> None:
    tiny_model(similarity="cosine").save_pretrained(str(tmp_path))
    types = [entry["type"] for entry in json.loads((tmp_path / "modules.json").read_text())]
    types += json.loads((tmp_path / "router_config.json").read_text())["types"].values()
    assert all(name.startswith("sentence_transformers.") for name in types)
