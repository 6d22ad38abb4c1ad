"""Command lines out of dataclasses."""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the description, with its examples, as it is written, and the default of each argument."""


def parse(
    description: str | None, kinds: Sequence[type], argv: Sequence[str] | None = None, **defaults: Any
) -> tuple[Any, ...]:
    """Reads a command line.

    Args:
        description: What ``--help`` says above the arguments: the script's docstring.
        kinds: Dataclasses; each of their fields is an argument.
        argv: The words of the command line; None for those of the process.
        defaults: Other defaults than those of the dataclasses.

    Returns:
        One instance of each dataclass, in their order.

    Raises:
        ValueError: If there is an argument that none of them has.
        SystemExit: After ``--help``, and where an argument has a value that is none of its choices.
    """
    parser = HfArgumentParser(kinds, description=description, formatter_class=_HelpFormatter)
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(
        args=None if argv is None else list(argv), look_for_args_file=False, return_remaining_strings=False
    )
