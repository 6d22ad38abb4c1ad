"""What the modules of this package do beyond those of sentence-transformers when a model is saved and loaded."""

from __future__ import annotations

import json
import logging
import os
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from packaging.version import Version
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Module
from torch import Tensor

from st_fpsloss.model_card import use_two_tower_card
from st_fpsloss.utils.files import write_whole

logger = logging.getLogger(__name__)

DISTRIBUTION = "st-fpsloss"

SomeModule = TypeVar("SomeModule", bound="PackageModule")


class PackageModule(Module):
    """A module that a model can only be loaded with where this package is installed.

    It is saved as any other, readable JSON and safetensors in a folder of its own. The model's
    ``config_sentence_transformers.json`` then asks for this package, so that loading without it fails with a message
    that says what to install, and the model card's snippet passes ``trust_remote_code=True``.
    """

    save_in_root = False

    def on_model_ready(self, model: SentenceTransformer) -> None:
        """Gives the model the card of two-tower models."""
        use_two_tower_card(model)

    def own_weights(self) -> dict[str, Tensor]:
        """The weights that are saved with this module."""
        return self.state_dict()

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes configuration and weights, and what the model as a whole requires."""
        self.save_config(output_path)
        weights = {name: tensor.detach().contiguous() for name, tensor in self.own_weights().items()}
        if safe_serialization:
            save_file(weights, os.path.join(output_path, "model.safetensors"), metadata={"format": "pt"})
        else:
            torch.save(weights, os.path.join(output_path, "pytorch_model.bin"))
        _require_this_package(Path(output_path).parent / "config_sentence_transformers.json")

    @classmethod
    def load(
        cls: type[SomeModule],
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> SomeModule:
        """Loads the module from a folder or a hub repository."""
        place = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        module = cls.from_config(cls.load_config(model_name_or_path, **place), model_name_or_path, {**place, **kwargs})
        weights = cls.load_torch_weights(model_name_or_path, **place)
        if weights.keys() != module.own_weights().keys():
            raise ValueError(
                f"The weights of {cls.__name__} in {model_name_or_path}/{subfolder} do not fit its configuration: "
                f"{sorted(weights.keys() ^ module.own_weights().keys())} are in one of them alone."
            )
        module.load_state_dict(weights, strict=False)
        return module

    @classmethod
    def from_config(
        cls: type[SomeModule], config: dict[str, Any], model_name_or_path: str, place: dict[str, Any]
    ) -> SomeModule:
        """Makes the module from its configuration; ``place`` are the arguments of :meth:`load`."""
        return cls(**config)


@cache
def installed_version() -> str | None:
    """Version of this package; None, with a warning, where it runs without being installed."""
    try:
        return Version(metadata.version(DISTRIBUTION)).public
    except metadata.PackageNotFoundError:
        logger.warning("%s is not installed, so saved models cannot say which version they require.", DISTRIBUTION)
        return None


def _require_this_package(config_path: Path) -> None:
    """Writes the requirement into a model's configuration, where that is what stands at the path."""
    if not config_path.is_file():
        return
    version = installed_version()
    if version is None:
        return
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.setdefault("requirements", {})[DISTRIBUTION] = f">={version}"
    write_whole(config_path, json.dumps(config, indent=2, sort_keys=True))
