"""Save a model to a folder and load it: its config as JSON, its weights in safetensors. Loading executes no code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Pretrained"]

Model = TypeVar("Model", bound="Pretrained")

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Pretrained(nn.Module):
    """A model that is made from one `config` and can be saved. Its `head` may share the weight of an embedding."""

    config: Any
    config_class: type[Any]
    head: nn.Linear

    def _output_embedding(self) -> nn.Embedding:
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into `folder`; create the folder if it does not exist.

        Raises:
            ImportError: the package safetensors is missing.
        """
        save_file = _safetensors().save_file
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(self).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Model:
        """The model that `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: with `config.json` and `model.safetensors`.
            device: of the model.
            dtype: of the model; None: as saved.

        Raises:
            ImportError: without the package safetensors.
            FileNotFoundError: a file is missing.
            TypeError, ValueError: the description is of another class, or the weights are not those of the model.
        """
        load_file = _safetensors().load_file
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"folder: expected {name} in it, got {folder}")
        config = cls.config_class.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        with torch.device("meta"):
            model = cls(config)
        tensors = load_file(folder / WEIGHTS, device=str(device))
        _check_tensors(_tensors(model), tensors)
        model.load_state_dict(tensors, strict=False, assign=True)
        return model.to(device=device, dtype=dtype).eval()

    # torch may replace parameters one by one: keep a tied head tied.

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        tied = self.head.weight is self._output_embedding().weight
        super()._apply(fn, recurse)
        if tied:
            self.head.weight = self._output_embedding().weight
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        tied = self.head.weight is self._output_embedding().weight
        keys = super().load_state_dict(*args, **kwargs)
        if tied:
            self.head.weight = self._output_embedding().weight
        return keys


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name. A parameter with two names appears under its first."""
    persistent = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    return {name: t for name, t in persistent.items() if id(t) not in seen and not seen.add(id(t))}


def _check_tensors(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    shapes = [
        f"{name} of shape {tuple(got[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected.keys() & got.keys()
        if expected[name].shape != got[name].shape
    ]
    problems = [f"{what} {', '.join(names)}" for what, names in (("no", missing), ("also", unexpected)) if names]
    if problems or shapes:
        raise ValueError(f"weights: expected exactly those of the model, got {'; '.join(problems + shapes)}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("save_pretrained and from_pretrained need safetensors: pip install safetensors") from error
    return safetensors.torch
