"""The answers of captum 0.9, and the table that leads from its classes to our calls."""

import copy
import re
import warnings
from pathlib import Path

import captum_cases
import pytest
import torch
from torch.utils import _pytree as pytree

import pullback

CASES = captum_cases.stored()["cases"]
SATURATED = (5, 9)  # networks that end in a softmax of large values: in float64 its derivative is 0 to twelve digits


def leaves_of(result) -> list[torch.Tensor]:
    return [part for part in pytree.tree_leaves(result) if part is not None]


def size(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['method']}-{case['layer']}")
def test_values(case):
    """With the one thing changed that captum does otherwise; see `docs/from-captum.md`.

    2% are left to `LayerConductance`, whose differences `benchmarks/agreement.py` takes.
    """
    model = captum_cases.model_of(captum_cases.stored()["models"][case["model"]])
    theirs = pytree.tree_leaves(captum_cases.value(case["expected"]))
    tolerance = 0.02 if case["method"] == "LayerConductance" else 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rules tell of softmax in one of the networks
        exact = leaves_of(captum_cases.as_captum_sums(captum_cases.in_double(case), copy.deepcopy(model).double()))
        ours = leaves_of(captum_cases.as_captum_sums(case, model))
    assert len(ours) == len(theirs) > 0
    for a, b, value in zip(ours, theirs, exact):
        if case["model"] in SATURATED and size(value) < 1e-12:
            assert max(size(a), size(b)) < 1e-5  # the rounding of float32, which differs from processor to processor
        else:
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * (size(b) + 1e-6))


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
    names |= {"parts": torch.arange(192).reshape(3, 8, 8) // 48}
    names |= {name: getattr(pullback, name) for name in pullback.__all__} | {"pullback": pullback}
    result = eval(ours, names)
    assert torch.isfinite(result).all()
    at_layer = theirs.startswith(("Layer", "InternalInfluence"))
    shape = {"LayerGradCam": (2, 1, 4, 4), "Occlusion": (2, 1, 8, 8)}.get(
        theirs, (2, 4, 4, 4) if at_layer else (2, 3, 8, 8)
    )
    assert result.shape == shape


CLASSES = """
    InternalInfluence LayerActivation LayerConductance LayerDeepLift LayerDeepLiftShap LayerFeatureAblation
    LayerFeaturePermutation LayerGradCam LayerGradientShap LayerGradientXActivation LayerIntegratedGradients LayerLRP
    NeuronConductance NeuronDeconvolution NeuronDeepLift NeuronDeepLiftShap NeuronFeatureAblation NeuronGradient
    NeuronGradientShap NeuronGuidedBackprop NeuronIntegratedGradients
""".split()


def test_every_class_at_a_layer_or_a_neuron_has_its_row():
    assert set(CLASSES) <= {theirs for theirs, _ in ROWS}


def test_a_permuted_layer_is_ablated_to_another_example():
    """`LayerFeaturePermutation`: the score less that where one entry of the activation is another example's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    h = model[0](x).detach()
    ours = pullback.feature_ablation({}, model, x, 1, layer="0", baseline=h.flip(0))
    for entry in range(4):
        moved = h.clone()
        moved[:, entry] = h.flip(0)[:, entry]
        expected = (model[2](h.tanh()) - model[2](moved.tanh()))[:, 1].detach()
        torch.testing.assert_close(ours[:, entry], expected)
