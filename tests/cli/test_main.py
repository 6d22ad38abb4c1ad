"""``st-fpsloss`` as one meets it: help, files of options, and wrong inputs in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from st_fpsloss.cli.main import COMMANDS, main
from tests.cli.conftest import QUIET, data_of, run, towers_of, write

OPTIONS = [
    ("pretrain", "--log_q"),
    ("finetune", "--grade_column"),
    ("evaluate", "--models"),
    ("benchmark", "--user_items"),
    ("search", "--queries"),
]


def test_help_names_the_commands_without_loading_torch() -> None:
    code = "import sys; from st_fpsloss.cli.main import main; main(['--help']); assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert all(f"  {command} " in shown for command in COMMANDS)
    assert main([]) == 0


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_help_is_one_screen_and_help_all_has_the_rest(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(flag: str) -> str:
        with pytest.raises(SystemExit) as end:
            main([command, flag])
        assert end.value.code == 0
        return capsys.readouterr().out

    first, everything = shown("--help"), shown("--help-all") if command != "search" else ""
    assert len(first.splitlines()) <= 60 and option in first and max(map(len, first.splitlines())) <= 120
    if command in ("pretrain", "finetune"):
        assert f"    st-fpsloss {command} " in everything and "    accelerate launch" in everything
        for rare in ("--hub_private_repo", "--learning_rate_mapping", "--query_prompt" * (command == "pretrain")):
            assert rare in everything and (not rare or rare not in first)
        assert everything.index("data:") < everything.index("loss:") < everything.index("training:")


def test_help_shows_the_values_that_are_used(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--help-all"])
    shown = " ".join(capsys.readouterr().out.split())
    card = (pretrained / "README.md").read_text()
    parameters = json.loads(
        card[card.index("FPSLoss</code> with these parameters") :].split("```")[1].removeprefix("json")
    )
    for flag in ("log_q", "max_scale", "relevance", "duplicates"):
        text = shown[shown.index(f"--{flag} ") :]
        value = text[text.index("(default: ") + 10 :].replace(";", " ").replace(",", " ").replace(")", " ").split()[0]
        assert value == f"{parameters[flag]:g}" if isinstance(parameters[flag], float) else parameters[flag], flag


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "'pretrian' is no command. Did you mean pretrain?"),
        (
            ["search", "--model", "m", "--index", "i", "--query", "a", "-k", "0"],
            "--k 0: pass a number that is at least 1.",
        ),
        (["search", "--model", "m", "--index", "i"], "--query and --queries are two ways to give queries: pass one."),
        (["evaluate", "--models", "m", "--dataset", "d.csv", "--batch_size", "0"], "--batch_size 0: pass a number"),
        (["finetune", "--dataset", "d.csv"], "the following arguments are required: --model"),
        (["finetune", "--model", "m", "--dataset", "d.csv", "--loss", "softmax"], "invalid choice: 'softmax'"),
        (["pretrain", "--dataset", "d.csv", "--query_model", "m", "--document_model", "m"], "'d.csv' is no file"),
        (["pretrain", "none.yaml"], "none.yaml is no file"),
    ],
)
def test_a_wrong_input_ends_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(words)
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    assert code == 2 and shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith(f"st-fpsloss{f' {words[0]}' if words[0] in COMMANDS else ''}: error: ") and message in line
    if "none.yaml" in words:
        with pytest.raises(ValueError, match="is no file"):
            main(["--traceback", *words])


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_options_come_from_a_file_and_the_command_line_comes_first(folder: Path, tmp_path: Path, suffix: str) -> None:
    words = [*data_of(folder), *towers_of(folder)]
    options = {word.removeprefix("--"): value for word, value in zip(words[::2], words[1::2], strict=True)}
    options = {name: value if isinstance(value, int) else str(value) for name, value in options.items()}
    options |= {"directions": ["query_to_doc", "doc_to_query"], "semi_hard": False, "max_scale": None, "max_steps": 9}
    options |= {"learning_rate": "1e-2", "learning_rate_mapping": {"logit_scale": 0.25}, "output_dir": str(tmp_path)}
    path = tmp_path / f"options.{suffix}"
    path.write_text(yaml.safe_dump(options) if suffix == "yaml" else json.dumps(options))
    run("pretrain", path, "--max_steps", 1, "--save_steps", 1, *QUIET)
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["max_steps"] == 1
    card = (tmp_path / "README.md").read_text()
    assert '"doc_to_query"' in card and "'logit_scale': 0.25" in card and "`learning_rate`: 0.01" in card


def test_a_file_without_options_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.json", [])
    with pytest.raises(ValueError, match="holds no options: write one a line"):
        run("pretrain", tmp_path / "rows.json")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is neither YAML nor JSON"):
        run("pretrain", tmp_path / "bad.yaml")
    (tmp_path / "typo.yaml").write_text("logq: none\ndataset: d.csv\nquery_model: m\ndocument_model: m\n")
    with pytest.raises(ValueError, match=r"--logq is no argument.*Did you mean --log_q"):
        run("pretrain", tmp_path / "typo.yaml")
