"""What TorchRay 1.0.0.2 returned on small networks (torch 2.13, CPU, float32): `tests/data/torchray`.

``NAME.json`` has the layers of an `nn.Sequential` and the cases: a function, its first argument (`x`, ``x[:1]`` or
`z`), its options ("@name" stands for an array, or for a function of the same module) and the arrays of ``NAME.npz``
that it returned. The arrays `state/*` are the network's state.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data" / "torchray"
NETWORKS = ("vgg", "bn", "fcn")


@dataclass
class Vectors:
    """A network with its cases."""

    name: str
    arrays: dict[str, Tensor]
    layers: list[Any]
    cases: list[dict[str, Any]]

    def model(self) -> nn.Sequential:
        model = nn.Sequential(*(getattr(nn, kind)(**options) for kind, options in self.layers))
        model.load_state_dict({k.removeprefix("state/"): v for k, v in self.arrays.items() if k.startswith("state/")})
        return model.eval()

    @property
    def x(self) -> Tensor:
        return self.arrays["x"].clone()

    def first(self, case: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments before the options."""
        if case["first"] == "z":
            return (self.arrays["z"].clone(),)
        return self.model(), self.x[:1] if case["first"] == "x[:1]" else self.x

    def options(self, case: dict[str, Any], module: Any) -> dict[str, Any]:
        def value(v: Any) -> Any:
            if not (isinstance(v, str) and v.startswith("@")):
                return v
            return self.arrays[v[1:]] if v[1:] in self.arrays else getattr(module, v[1:])

        return {k: value(v) for k, v in case["options"].items()}

    def results(self, case: dict[str, Any]) -> list[Tensor]:
        return [self.arrays[name] for name in case["results"]]


def load(name: str) -> Vectors:
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    return Vectors(name, arrays, **json.loads((DATA / f"{name}.json").read_text()))


def all_cases() -> list[Any]:
    import pytest

    return [
        pytest.param(name, i, id=f"{name}-{i}-{case['function']}")
        for name in NETWORKS
        for i, case in enumerate(json.loads((DATA / f"{name}.json").read_text())["cases"])
    ]


def module_of(case: dict[str, Any]) -> Any:
    name = case["function"].rpartition(".")[0]
    return importlib.import_module("pullback.compat.torchray." + (name if name == "utils" else f"attribution.{name}"))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert not found.requires_grad
    bound = 1e-8 + 1e-4 * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound
