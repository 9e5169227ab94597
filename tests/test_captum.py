"""The answers of captum 0.9, and the table that leads from its classes to our calls."""

import inspect
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
    """With the one thing changed that captum does otherwise; see `docs/from-captum.md`."""
    model = captum_cases.model_of(captum_cases.stored()["models"][case["model"]])
    theirs = pytree.tree_flatten(captum_cases.value(case["expected"]))[0]
    if saturated := case.get("saturated", False):
        case, model = captum_cases.in_double(case), model.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rules tell of softmax in one of the networks
        ours = [part for part in pytree.tree_flatten(captum_cases.as_captum_sums(case, model))[0] if part is not None]
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        expected = torch.zeros_like(b) if saturated else b
        atol = 1e-10 if saturated else 2e-5 * float(b.abs().max())
        torch.testing.assert_close(a.double().reshape(b.shape), expected.double(), rtol=0, atol=atol + 1e-30)


TABLE = (Path(__file__).parents[1] / "docs" / "from-captum.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| `(.+)` \|", TABLE, flags=re.MULTILINE)


class Network(torch.nn.Module):
    """Captum's LRP has no rule for `nn.Flatten`."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1, self.conv2 = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3)
        self.relu2, self.head = torch.nn.ReLU(), torch.nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.relu2(self.conv2(self.relu1(self.conv1(x)))).flatten(1))


def by_the_table(ours):
    """The network, what the row's names stand for, and the result of its call."""
    torch.manual_seed(0)
    model, x = Network().double(), torch.randn(2, 3, 8, 8).double()
    names = {"model": model, "params": pullback.params_of(model), "x": x, "t": 1, "name": "conv2"}
    names |= {"unit": lambda y: y[:, 1, 2, 2], "place": (1, 2, 2), "weigh": captum_cases.signed_grad_cam}
    names |= {"parts": torch.arange(192).reshape(3, 8, 8) // 48, "data": torch.randn(3, 3, 8, 8).double()}
    names |= {name: getattr(pullback, name) for name in pullback.__all__} | {"pullback": pullback}
    return names, eval(ours, names)


@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=lambda text: text[:24])
def test_calls_of_the_table_run(theirs, ours):
    result = by_the_table(ours)[1]
    assert torch.isfinite(result).all()
    at_layer = theirs.startswith(("Layer", "InternalInfluence"))
    shape = {"LayerGradCam": (2, 1, 4, 4), "Occlusion": (2, 1, 8, 8)}.get(
        theirs, (2, 4, 4, 4) if at_layer else (2, 3, 8, 8)
    )
    assert result.shape == shape


# random draws; and the sum over differences, which `test_values` takes
DIFFERENT = "Lime|KernelShap|ShapleyValueSampling|NoiseTunnel|.*Permutation|.*GradientShap|LayerConductance"
SETTINGS = {"Occlusion": {"sliding_window_shapes": (3, 3, 3)}, "NeuronConductance": {"method": "gausslegendre"}}
TOLERANCE = {"LRP": 1e-4, "LayerLRP": 1e-4}  # captum's epsilon is 1e-9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("theirs", "ours"), [row for row in ROWS if not re.fullmatch(DIFFERENT, row[0])], ids=lambda text: text[:24]
)
def test_calls_of_the_table_give_what_captum_gives(theirs, ours):
    attr = pytest.importorskip("captum.attr")
    names, result = by_the_table(ours)
    model, of_neuron = names["model"], theirs.startswith("Neuron")
    at_layer = of_neuron or theirs.startswith(("Layer", "Internal", "GuidedGradCam"))
    method = getattr(attr, theirs)(*((model, model.conv2) if at_layer else (model,)))
    taken = inspect.signature(method.attribute).parameters
    settings = {"target": 1, "baselines": names["data"], "feature_mask": names["parts"][None]}
    wanted = {"baselines": theirs.endswith("Shap"), "feature_mask": theirs == "ShapleyValues", "target": True}
    settings = {name: item for name, item in settings.items() if wanted[name] and name in taken}
    expected = method.attribute(
        names["x"], *(((1, 2, 2),) if of_neuron else ()), **settings, **SETTINGS.get(theirs, {})
    )
    expected = expected.detach()[:, : result.shape[1]]  # a map is the same for all channels
    limit = TOLERANCE.get(theirs, 1e-6) * float(expected.abs().max())
    torch.testing.assert_close(result.to(expected), expected, rtol=0, atol=limit)


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
