"""Command lines out of dataclasses: help of one screen, files of options, and refusals in one line."""

from __future__ import annotations

import difflib
import json
import sys
from argparse import SUPPRESS, Action, HelpFormatter, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

_OPTION_FILES = (".yaml", ".yml", ".json")
_AT_LEAST_1 = (
    "at", "batch_size", "document_layers", "document_max_seq_length", "embedding_dim", "gradient_accumulation_steps",
    "hardest", "k", "max_pairs", "max_queries", "mini_batch_num_tokens", "num_negatives", "num_train_epochs",
    "query_layers", "per_device_eval_batch_size", "per_device_train_batch_size", "query_max_seq_length",
)  # fmt: skip
_ABOVE_0 = ("learning_rate", "max_scale", "minutes", "scale")
# The training arguments of sentence-transformers that help shows first, in fewer words than theirs.
_TRAINING = {
    "output_dir": "receives model, model card, metrics and checkpoints",
    "num_train_epochs": "passes over the rows",
    "per_device_train_batch_size": "rows of a batch",
    "learning_rate": "of the encoders, at most",
    "eval_strategy": "evaluate while training too",
    "save_steps": "a checkpoint every so many steps",
    "resume_from_checkpoint": "a checkpoint, or last for the newest complete one in output_dir",
    "push_to_hub": "push the model to the Hub",
    "hub_model_id": "its name there",
}


class _Help(Action):
    """``--help``: the options that one needs first; ``--help-all``: all of them, with examples."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option: str | None = None) -> None:
        parser.print_help_of(everything=option == "--help-all")
        parser.exit()


class _Formatter(HelpFormatter):
    """One name and one line an option, as far as it fits."""

    used: Mapping[str, Any] = {}

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=120)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text  # examples stay as they are written

    def _format_action_invocation(self, action: Action) -> str:
        name = max(action.option_strings, key=lambda option: (option.startswith("--"), "_" in option))
        if action.nargs == 0 or action.nargs == "?":
            return name
        kind = getattr(action.type, "__name__", "str").upper()
        values = f"{{{','.join(map(str, action.choices))}}}" if action.choices else kind
        return f"{name} {values}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: Action) -> str | None:
        shown = action.help or ""
        if action.required:
            return f"{shown} (required)"
        default = action.default if action.default not in (None, SUPPRESS) else self.used.get(action.dest)
        if default in (None, False, "", [], ()) or "default" in shown:
            return shown
        text = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{shown} (default: {text})".replace("%", "%%") if "%" not in shown else shown


class _Parser(HfArgumentParser):
    """An ``HfArgumentParser`` that hides rare options until ``--help-all`` and reports an error in one line."""

    def __init__(
        self, kinds: Sequence[type], common: Sequence[str] | None, description: str | None, **options: Any
    ) -> None:
        super().__init__(kinds, add_help=False, allow_abbrev=False, description=description, **options)
        self.common = common
        self._text = description or ""
        self._optionals.title = (
            "training" if "learning_rate" in {action.dest for action in self._actions} else "options"
        )
        self._action_groups.append(self._action_groups.pop(1))
        self.add_argument("-h", "--help", action=_Help, nargs=0, default=SUPPRESS, help="show this and stop")
        everything = (
            "all options in groups, with examples" if common is not None else SUPPRESS
        )  # --help has all of them
        self.add_argument("--help-all", action=_Help, nargs=0, default=SUPPRESS, help=everything)

    def print_help_of(self, everything: bool) -> None:
        """Prints the common options, or all of them and the examples."""
        if self.common is not None and not everything:
            self.description = self._text.partition("\n\nExample")[0]
            for action in self._actions:
                action.help = _TRAINING.get(action.dest, action.help)
                if action.dest not in (*self.common, "help", "help_all"):
                    action.help = SUPPRESS
        self.usage = f"{self.prog} [options.yaml] [--option value ...]"
        self.print_help()

    def error(self, message: str) -> NoReturn:
        """Ends with the message alone: the usage of a hundred options would hide it."""
        print(f"{self.prog}: error: {' '.join(message.split())} (--help shows the options)", file=sys.stderr)
        sys.exit(2)


def parse(
    description: str | None,
    kinds: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    common: Sequence[str] | None = None,
    used: Mapping[str, Any] | None = None,
    **defaults: Any,
) -> tuple[Any, ...]:
    """Reads a command line, or a YAML or JSON file of options and the command line after it, which comes first.

    Args:
        description: What help says above the options: the docstring of a command. ``--help`` leaves out its examples.
        kinds: Dataclasses; each of their fields is an option, in a group by the dataclass's ``_argument_group_name``.
        argv: The words of the command line; None for those of the process. The first may name a file of options.
        prog: Name of the command.
        common: Names of the options that ``--help`` shows; None for all of them.
        used: What help shows for options whose default is None: the value that the library takes then.
        defaults: Other defaults than those of the dataclasses.

    Returns:
        One instance of each dataclass, in their order.

    Raises:
        ValueError: If there is an option that none of them has, a number is too small, or the file is unfit.
        SystemExit: After ``--help``, and where an option has a value that is none of its choices.
    """
    formatter = type("Formatter", (_Formatter,), {"used": used or {}})
    parser = _Parser(kinds, common, description, prog=prog, formatter_class=formatter)
    parser.set_defaults(**defaults)
    for action in parser._actions:  # argparse asks for a required option although it has a default
        action.required = action.required and action.dest not in defaults
    words = with_option_file(list(sys.argv[1:] if argv is None else argv))
    *parsed, unused = parser.parse_args_into_dataclasses(
        args=words, look_for_args_file=False, return_remaining_strings=True
    )
    if unused:
        raise ValueError(_unknown(unused, list(parser._option_string_actions)))
    for options in parsed:
        _check_numbers(options)
    return tuple(parsed)


def with_option_file(words: list[str]) -> list[str]:
    """Puts the options of the file that the first word names in the place of that word.

    Args:
        words: Those of a command line.

    Raises:
        ValueError: If the file is missing, or does not map names of options to values.

    Example:
        >>> with_option_file(["--k", "5"])
        ['--k', '5']
    """
    if not words or words[0].startswith("-") or Path(words[0]).suffix.lower() not in _OPTION_FILES:
        return words
    path = Path(words[0])
    if not path.is_file():
        raise ValueError(f"{words[0]} is no file: the first word names a YAML or JSON file of options.")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no options: write one a line, as in learning_rate: 1e-3.")
    return [word for name, value in options.items() for word in _words(str(name), value)] + words[1:]


def _words(name: str, value: Any) -> list[str]:
    """An option of a file, in the words of a command line; none for null."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *(one if isinstance(one, str) else json.dumps(one) for one in value)]
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]


def _check_numbers(options: Any) -> None:
    """Refuses sizes below 1, and rates and scales that are not above 0."""
    for name, value in vars(options).items():
        for number in value if isinstance(value, list) else [value]:
            if number is None or isinstance(number, str):
                continue
            if (name in _AT_LEAST_1 and not number > 0) or (name in _ABOVE_0 and not number > 0):
                least = "at least 1" if isinstance(number, int) else "above 0"
                raise ValueError(f"--{name} {number}: pass a number that is {least}.")


def _unknown(unused: Sequence[str], flags: Sequence[str]) -> str:
    """What to say of words that no option takes."""
    flag = next((word.partition("=")[0] for word in unused if word.startswith("-")), None)
    if flag is None:
        return f"{list(unused)} belong to no argument. Leave them out, or put a value with blanks into quotes."
    close = difflib.get_close_matches(flag, flags, n=1)
    cure = f"Did you mean {close[0]}?" if close else "Leave it out; --help shows those there are."
    return f"{flag} is no argument, in {list(unused)}. {cure}"
