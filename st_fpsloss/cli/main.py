"""``st-fpsloss``: finds the command, and ends a wrong input in one line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "pretrain": "train two towers on a click log with FPSLoss",
    "finetune": "train a model further: on grades, impressions, sampled or hard negatives",
    "evaluate": "rank the documents for held-out queries; compare models, with intervals",
    "benchmark": "find out whether training is worth it on a log, beside popularity, ItemKNN, EASE, BM25",
    "index": "embed the documents into a search index",
    "search": "search an index",
    "serve": "search an index over HTTP: JSON, and a page",
    "movielens": "write MovieLens-100K as files to try the other commands on",
}
"""Command -> what it does; each is the module of this package with that name."""

_HELP = """usage: st-fpsloss COMMAND [options.yaml] [--option value ...]

Two-tower retrieval models from click logs.

{commands}

st-fpsloss COMMAND --help       the options that one needs first
st-fpsloss COMMAND --help-all   all options, and examples
st-fpsloss --traceback COMMAND  where an error comes from
st-fpsloss --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The words of the command line; None for those of the process.

    Returns:
        The exit code: 0, or 2 for a wrong input.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP.format(commands="\n".join(f"  {name:10} {help}" for name, help in COMMANDS.items())))
        return 0
    if words[0] == "--version":
        print(f"st-fpsloss {version('st-fpsloss')}")
        return 0
    with_traceback = words[0] == "--traceback"
    command, *words = words[1:] if with_traceback else words
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        cure = f"Did you mean {close[0]}?" if close else f"The commands are {', '.join(COMMANDS)}."
        return _refuse("st-fpsloss", f"{command!r} is no command. {cure}")
    run = import_module(f"st_fpsloss.cli.{command}").main
    try:
        run(words)
    except (ValueError, OSError, ImportError) as error:
        if with_traceback:
            raise
        return _refuse(f"st-fpsloss {command}", str(error))
    return 0


def _refuse(program: str, message: str) -> int:
    """Says in one line what is wrong."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
