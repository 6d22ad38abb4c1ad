from __future__ import annotations

import json
import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from transformers import TrainerCallback, TrainerControl, TrainerState

from st_fpsloss import FPSLoss, LossStateCallback, last_complete_checkpoint
from st_fpsloss.data import load_clicks
from st_fpsloss.frequencies import FrequencyTable
from st_fpsloss.training.setting_checks import check_frequency_prompts
from tests.losses.conftest import small_model
from tests.training.runs import click_log, trainer, weights


class Recorder(TrainerCallback):
    """α after every step."""

    def __init__(self, loss: FPSLoss) -> None:
        self.loss, self.alphas = loss, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.alphas[state.global_step] = self.loss.alpha


def run(output_dir: Path, resume: str | None = None, **options):
    training = trainer(output_dir, **options)
    recorder = Recorder(training.loss)
    training.add_callback(recorder)
    training.train(resume_from_checkpoint=resume)
    return training, recorder


@pytest.mark.parametrize("cache_gradients", [False, True])
def test_straight_and_resumed_runs_end_bit_equal_with_log_q(tmp_path, cache_gradients):
    def loss_of(model):
        return FPSLoss(
            model, log_q="corrected", directions=("query_to_doc", "doc_to_query"), cache_gradients=cache_gradients,
            mini_batch_num_tokens=40,
        )  # fmt: skip

    def fresh(folder, **options):
        model = small_model(dropout=0.1)
        return run(folder, model=model, loss=loss_of(model), save_strategy="steps", save_steps=4, **options)

    straight, _ = fresh(tmp_path / "straight")
    moved = tmp_path / "elsewhere" / "checkpoint-4"  # a folder outside of output_dir
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", moved)
    resumed, _ = fresh(tmp_path / "resumed", resume=str(moved))
    assert torch.equal(straight.loss.logit_scale, resumed.loss.logit_scale)
    assert straight.loss.alpha != loss_of(straight.model).alpha
    assert torch.equal(weights(straight.model), weights(resumed.model))
    assert straight.loss.export_state() == resumed.loss.export_state()
    assert straight.loss.frequencies["document"].total > 0


def test_load_best_model_at_end_restores_the_alpha_of_that_step(tmp_path):
    class BestInTheMiddle(BaseEvaluator):
        def __call__(self, model, output_path=None, epoch=-1, steps=-1):
            return {"score": -abs(steps - 4)}

    training, recorder = run(
        tmp_path,
        evaluator=BestInTheMiddle(),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_score",
        greater_is_better=True,
    )
    assert training.loss.alpha == recorder.alphas[4] != recorder.alphas[8]


@pytest.mark.parametrize("callback", [True, False])
def test_alpha_and_beta_are_never_weight_decayed(tmp_path, callback):
    training = trainer(tmp_path, callback=callback)
    training.create_optimizer()
    decayed = {
        id(parameter)
        for group in training.optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    assert decayed and not decayed & {id(parameter) for parameter in training.loss.scale_and_bias.parameters()}


def test_alpha_takes_a_learning_rate_of_its_own_from_the_stock_mapping(tmp_path):
    _, slow = run(tmp_path / "slow", learning_rate_mapping={"logit_scale": 1e-6}, lr_scheduler_type="constant")
    _, fast = run(tmp_path / "fast", learning_rate_mapping={"logit_scale": 0.5}, lr_scheduler_type="constant")
    assert abs(slow.alphas[1] - 1) < 1e-5
    assert abs(fast.alphas[1] - 1) > 0.3


def test_alpha_stays_below_its_bound_after_every_step(tmp_path):
    model = small_model()
    loss = FPSLoss(model, scale=1.9, max_scale=2.0)
    _, recorder = run(tmp_path, model=model, loss=loss, learning_rate_mapping={"logit_scale": 1.0})
    assert max(recorder.alphas.values()) == pytest.approx(2.0)


def test_alpha_and_its_gradient_are_logged(tmp_path):
    training, recorder = run(tmp_path)
    entries = [entry for entry in training.state.log_history if "loss" in entry]
    assert [entry["loss/alpha"] for entry in entries] == list(recorder.alphas.values())
    assert all(entry["loss/temperature"] == 1 / entry["loss/alpha"] for entry in entries)
    assert any(entry["loss/alpha_grad"] != 0 for entry in entries)


def test_clipping_reaches_alpha(tmp_path):
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            norms.append(abs(training.loss.logit_scale.grad.item()))

    model = small_model()
    loss = FPSLoss(model)
    training = trainer(tmp_path, model=model, loss=loss, callback=False)
    training.add_callback(LossStateCallback(loss, max_grad_norm=1e-4))
    training.add_callback(Norm())
    training.train()
    assert norms and max(norms) <= 1.01e-4


def test_a_dictionary_of_losses_is_saved_by_name(tmp_path):
    model = small_model()
    losses = {"clicks": FPSLoss(model), "sales": FPSLoss(model, scale=3.0, learn_scale=False)}
    training = trainer(
        tmp_path,
        model=model,
        loss=losses,
        dataset={"clicks": click_log(), "sales": click_log(seed=5)},
        router_mapping={name: {"query": "query", "document": "document"} for name in losses},
        save_strategy="steps",
        save_steps=8,
    )
    training.train()
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["LossStateCallback"]["attributes"]["losses"]
    assert set(stored) == {"clicks", "sales"}
    assert "loss/sales/alpha" in training.state.log_history[0]


@pytest.mark.parametrize("form", ["bare", "matryoshka", "dictionary"])
def test_a_loss_of_another_model_is_refused(tmp_path, form):
    model, earlier = small_model(), small_model()

    def training_of(loss_model):
        loss, options = FPSLoss(loss_model, cache_gradients=form == "matryoshka"), {}
        if form == "matryoshka":
            loss = MatryoshkaLoss(loss_model, loss, matryoshka_dims=[4])
        if form == "dictionary":
            loss, options["dataset"] = {"clicks": loss}, {"clicks": click_log()}
            options["router_mapping"] = {"clicks": {"query": "query", "document": "document"}}
        return trainer(tmp_path, model=model, loss=loss, max_steps=2, **options)

    with pytest.raises(ValueError, match="made for another model object than the trainer's"):
        training_of(earlier).train()
    before = weights(model)
    training_of(model).train()
    assert not torch.equal(before, weights(model))


def test_wrappers_do_not_make_a_model_another_one(tmp_path):
    model = small_model()
    loss = FPSLoss(model)
    args = trainer(tmp_path, model=model, loss=loss).args
    loss.model = torch.compile(torch.nn.DataParallel(model))
    loss.check_setting(model, args)
    loss.check_setting(torch.compile(model), args)


def test_two_callbacks_are_refused(tmp_path):
    model = small_model()
    losses = {"clicks": FPSLoss(model), "sales": FPSLoss(model)}
    training = trainer(
        tmp_path, model=model, loss=losses, dataset={"clicks": click_log(), "sales": click_log(seed=5)},
        router_mapping={name: {"query": "query", "document": "document"} for name in losses}, callback=False,
    )  # fmt: skip
    for name, loss in losses.items():
        training.add_callback(LossStateCallback({name: loss}))
    with pytest.raises(ValueError, match="Pass one LossStateCallback with the dictionary of losses"):
        training.train()


def test_a_callback_of_another_loss_object_is_refused(tmp_path):
    model = small_model()
    training = trainer(tmp_path, model=model, loss=FPSLoss(model), callback=False)
    training.add_callback(LossStateCallback(FPSLoss(model)))
    with pytest.raises(ValueError, match="another object than the trainer's loss"):
        training.train()
    assert training.state.global_step == 0


@pytest.mark.parametrize("given", ["the one", "the trainer's dictionary"])
def test_losses_of_others_in_the_dictionary_are_left_alone(tmp_path, given):
    model = small_model()
    losses = {"a": FPSLoss(model), "b": MultipleNegativesRankingLoss(model)}
    training = trainer(
        tmp_path, model=model, loss=losses, callback=False,
        dataset={"a": click_log(16, seed=3), "b": click_log(64, seed=5)},
        router_mapping={name: {"query": "query", "document": "document"} for name in losses}, max_steps=10,
    )  # fmt: skip
    training.add_callback(LossStateCallback({"a": losses["a"]} if given == "the one" else losses))
    first = []
    losses["b"].register_forward_hook(lambda *_: first.append("b"))
    losses["a"].register_forward_hook(lambda *_: first.append("a"))
    training.train()
    assert first[0] == "b" and first.count("a") == 2
    assert "loss/a/alpha" in training.state.log_history[0] and losses["a"].alpha != 1.0


def test_a_loss_that_never_saw_a_batch_is_warned_of(tmp_path, caplog):
    model = small_model()
    loss = FPSLoss(model, learn_scale=False, learn_bias=False)
    training = trainer(tmp_path, model=model, loss=loss, callback=False, max_steps=1)
    other = FPSLoss(model, learn_scale=False, learn_bias=False)
    training.add_callback(LossStateCallback({"used": loss, "unused": other}))
    training.train()
    assert next(r.message for r in caplog.records if "has seen no batch" in r.message).startswith("unused: This loss")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    def state_of(training):
        entries = [entry for entry in training.state.log_history if "loss" in entry]
        return training.state.global_step, training.state.epoch, entries, training.loss.export_state()

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}  # an epoch has 8
    finished, _ = run(tmp_path, **options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    resumed, _ = run(tmp_path, resume=str(tmp_path / "checkpoint-6"), **options)
    assert state_of(resumed) == state_of(finished)
    assert torch.equal(weights(resumed.model), weights(finished.model))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    longer, _ = run(tmp_path, resume=str(tmp_path / "checkpoint-6"), **{**options, "max_steps": 7})
    assert longer.state.global_step == 7


def test_tensorboard_receives_alpha_and_the_figures_of_batches(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training, recorder = run(tmp_path, report_to=["tensorboard"], max_steps=3)
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss/alpha")] == pytest.approx(
        list(recorder.alphas.values())
    )
    assert {"train/loss/alpha_grad", "train/loss/masked_share"} <= set(events.Tags()["scalars"])
    training.train()  # the same trainer again: once a step, no more
    assert len([entry for entry in training.state.log_history if "loss/alpha" in entry]) == 3


def test_a_column_of_times_is_refused_with_the_cure(tmp_path):
    log = click_log().to_dict() | {"when": [0.5] * 64}
    clicks = load_clicks(Dataset.from_dict(log), time="when")
    for dataset in (clicks, {"a": clicks}, clicks.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"column 'time' holds float64.*remove_columns\('time'\)"):
            trainer(tmp_path, dataset=dataset).train()
    trainer(tmp_path, dataset=clicks.remove_columns("time"), max_steps=1).train()


def test_known_positives_with_prompts_are_refused(tmp_path):
    model = small_model()
    loss = FPSLoss(model, known_positives={"quick fox": ["lazy dog"]})
    with pytest.raises(ValueError, match="`known_positives` are known by their inputs without prompts"):
        trainer(tmp_path, model=model, loss=loss, prompts={"query": "over "}).train()
    trainer(tmp_path, model=model, loss=loss, prompts=model.prompts, max_steps=1).train()  # they are empty


@pytest.mark.parametrize(
    ("table_prompt", "prompts", "side", "recognised"),
    [
        (None, None, "document", True),
        ("over ", None, "document", False),
        (None, {"query": "over "}, "document", True),
        (None, {"query": "over "}, "query", False),
        ("over ", {"query": "over "}, "query", True),
        (None, "over ", "document", False),
        ("over ", {"document": "under "}, "document", False),
    ],
)
def test_frequencies_without_the_prompts_of_training_are_refused(tmp_path, table_prompt, prompts, side, recognised):
    model = small_model()
    table = FrequencyTable.from_inputs(model, click_log()[side], side, prompt=table_prompt)
    loss = FPSLoss(model, log_q="corrected", frequencies={side: table})
    training = trainer(tmp_path, model=model, loss=loss, prompts=prompts, max_steps=1)
    if recognised:
        training.train()
    else:
        with pytest.raises(ValueError, match=rf"`frequencies\['{side}'\]` was counted with prompt="):
            training.train()


def test_frequencies_are_checked_by_the_prompts_of_each_data_set():
    def check(prompt, router_mapping, prompts):
        table = FrequencyTable.from_inputs(small_model(), ["brew"], "document", prompt=prompt)
        args = SimpleNamespace(router_mapping=router_mapping, prompts=prompts)
        check_frequency_prompts({"document": table}, args, SimpleNamespace(dataset=click_log()))

    columns = {"query": "query", "document": "document"}
    check("a: ", columns, {"clicks": "a: ", "sales": "b: "})
    check("b: ", {"clicks": columns, "sales": columns}, {"clicks": {"document": "a: "}, "sales": {"document": "b: "}})
    check("a: ", None, {"document": "a: "})  # one encoder: the first column is the query
    with pytest.raises(ValueError, match=r"prompt='c: '.*training puts 'a: ' or 'b: '"):
        check("c: ", columns, {"clicks": "a: ", "sales": "b: "})


def test_a_loss_with_two_names_is_clipped_and_averaged_once():
    model = small_model()
    loss = FPSLoss(model)
    callback = LossStateCallback({"clicks": loss, "sales": loss}, max_grad_norm=1.0)
    loss.logit_scale.grad = torch.tensor(4.0)
    callback.on_pre_optimizer_step(SimpleNamespace(fp16=False), TrainerState(), TrainerControl())
    assert loss.logit_scale.grad == pytest.approx(1.0, rel=1e-5)


def test_a_checkpoint_without_the_state_resumes_with_a_warning(tmp_path, caplog):
    run(tmp_path, callback=False, save_strategy="steps", save_steps=4)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert any("saved without LossStateCallback" in record.message for record in caplog.records)


def test_the_state_of_another_loss_is_refused(tmp_path):
    class OtherLoss(FPSLoss):
        """Not the loss that the checkpoint was saved with."""

    run(tmp_path, save_strategy="steps", save_steps=4)
    model = small_model(dropout=0.1)
    with pytest.raises(ValueError, match="state of a FPSLoss, not of a OtherLoss"):
        run(tmp_path, model=model, loss=OtherLoss(model), resume=str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match="Resume with the losses that the run was started with"):
        run(
            tmp_path, model=model, loss={"clicks": FPSLoss(model)}, dataset={"clicks": click_log()},
            router_mapping={"clicks": {"query": "query", "document": "document"}},
            resume=str(tmp_path / "checkpoint-4"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LossStateCallback(MultipleNegativesRankingLoss(small_model())), "got MultipleNegativesRankingLoss"),
        (lambda: LossStateCallback({}), "got an empty dictionary"),
        (lambda: LossStateCallback(), "restore_callback_states_from_checkpoint"),
        (lambda: LossStateCallback(FPSLoss(small_model()), max_grad_norm=0), "`max_grad_norm`"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fsdp_is_refused_before_training(tmp_path):
    training = trainer(tmp_path, callback=False)
    training.args.fsdp = "full_shard"
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        LossStateCallback(training.loss).on_init_end(training.args, training.state, training.control)


def test_fsdp_of_accelerate_launch_is_refused_before_training(tmp_path, monkeypatch):
    training = trainer(tmp_path, callback=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate launch"):
        LossStateCallback(training.loss).on_init_end(training.args, training.state, training.control)


def test_a_pushed_checkpoint_carries_alpha(tmp_path, monkeypatch):
    """The hub cannot be reached here: what would be uploaded is copied aside when it would be."""
    import transformers.trainer as trainer_module

    pushed = tmp_path / "hub"

    def upload_folder(folder_path, path_in_repo=None, **_):
        if Path(folder_path).name.startswith("checkpoint-"):
            shutil.copytree(folder_path, pushed / Path(folder_path).name, dirs_exist_ok=True)
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(trainer_module, "hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    monkeypatch.setattr(
        trainer_module.Trainer, "init_hf_repo", lambda self, **_: setattr(self, "push_in_progress", None)
    )
    monkeypatch.setattr(trainer_module.Trainer, "push_to_hub", lambda self, *args, **kwargs: None)
    training = trainer(
        tmp_path / "run", save_strategy="steps", save_steps=4, save_total_limit=1, push_to_hub=True,
        hub_strategy="checkpoint", hub_model_id="me/model",
    )  # fmt: skip
    training.hub_model_id, training.push_in_progress = "me/model", None  # what init_hf_repo sets
    recorder = Recorder(training.loss)
    training.add_callback(recorder)
    training.train()
    state = json.loads((pushed / "checkpoint-4" / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["LossStateCallback"]["attributes"]["losses"][""]
    assert torch.tensor(stored["logit_scale"]).exp().item() == recorder.alphas[4]


def test_last_complete_checkpoint_passes_over_broken_ones(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for step, content in ((2, "{}"), (10, "{}"), (30, '{"epoch": '), (40, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-final").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(
    "content",
    [
        "null", "[]", "1", '"text"', "[" * 100_000, '{"a": ' * 100_000, '{"unknown": 1}', '{"stateful_callbacks": [1]}',
        '{"stateful_callbacks": {"LossStateCallback": [1]}}', '{"stateful_callbacks": {"LossStateCallback": {}}}',
        '{"stateful_callbacks": {"LossStateCallback": {"attributes": {"files": [1], "losses": {}}}}}',
        '{"stateful_callbacks": {"LossStateCallback": {"attributes": {"losses": {"": null}}}}}', b"\xff\xfe", None,
    ],
)  # fmt: skip
def test_a_state_that_is_none_is_passed_over(tmp_path, content):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    if content is None:
        os.mkfifo(state)
    else:
        state.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    state.unlink()
    state.write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    os.mkfifo(state.with_name("config.json"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
