"""Packages whose public names are imported when they are first used (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy(package: str, names: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the ``__getattr__`` and ``__dir__`` of a package that does not import its modules before they are used.

    So a part of the package that needs little is imported without the rest, torch above all. No public name may be
    that of a module of the package: importing the module would hide the name.

    Args:
        package: ``__name__`` of the package.
        names: Module, by its name within the package, to the public names that it holds.
    """
    module_of = {name: module for module, public in names.items() for name in public}

    def __getattr__(name: str) -> Any:
        if name in names:
            return import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, lambda: sorted({*vars(sys.modules[package]), *module_of, *names})
