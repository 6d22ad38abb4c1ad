"""Command lines out of dataclasses."""

from __future__ import annotations

import difflib
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
    *parsed, unused = parser.parse_args_into_dataclasses(
        args=None if argv is None else list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unused:
        raise ValueError(_unknown(unused, list(parser._option_string_actions)))
    return tuple(parsed)


def _unknown(unused: Sequence[str], flags: Sequence[str]) -> str:
    """What to say of words that no argument takes."""
    flag = next((word.partition("=")[0] for word in unused if word.startswith("-")), None)
    if flag is None:
        return f"{list(unused)} belong to no argument. Leave them out, or put a value with blanks into quotes."
    close = difflib.get_close_matches(flag, flags, n=1)
    cure = f"Did you mean {close[0]}?" if close else "Leave it out; --help shows those there are."
    return f"{flag} is no argument, in {list(unused)}. {cure}"
