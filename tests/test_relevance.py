"""Relevance methods: conservation on real architectures, TorchRay's and captum's answers, completeness of DeepLIFT."""

import json
import lzma
import operator
import warnings
from pathlib import Path
from typing import Any

import captum_cases
import pytest
import torch
from cases import CASES
from compat import NETWORKS, assert_equal, load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pullback import (
    Layer,
    PullbackWarning,
    contrastive_excitation_backprop,
    deep_lift,
    deep_lift_shap,
    excitation_backprop,
    lrp,
    over_targets,
    params_of,
    rules,
)
from pullback._core.targets import score
from pullback.attribution.relevance.lrp import relevance_flow

# ---- excitation backprop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_torchray_returns_the_same(name):
    vectors = load(name)
    model, compared = vectors.model(), 0
    params = params_of(model)
    for case in vectors.cases:
        options, function = case["options"], case["function"].rpartition(".")[2]
        if function not in ("excitation_backprop", "contrastive_excitation_backprop") or options.get("resize"):
            continue
        args, layer = (params, model, vectors.x, options["target"]), options["saliency_layer"]
        if function == "excitation_backprop":
            found = excitation_backprop(*args, layer=layer).sum(1, keepdim=True)
        else:
            where = {"contrast_layer": options["contrast_layer"], "classifier": options.get("classifier_layer")}
            found = contrastive_excitation_backprop(*args, layer=layer, **where).sum(1, keepdim=True).clamp(min=0)
        assert_equal(found, vectors.results(case)[0])
        compared += 1
    assert compared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "names"),
    [("resnet50", ("maxpool", "layer1", "layer3")), ("densenet121", ("features.pool0", "features.denseblock3"))],
)
def test_excitation_sums_to_one_on_networks_as_they_come(name, names):
    models = pytest.importorskip("torchvision.models")
    model, x = getattr(models, name)().eval(), torch.randn(1, 3, 128, 128)
    for layer in names:
        total = over_targets(excitation_backprop)(params_of(model), model, x, [3, 700], layer=layer).sum((1, 2, 3, 4))
        torch.testing.assert_close(total, torch.ones(2), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["plain", "weight norm", "spectral norm", "convolution"])
def test_contrastive_is_the_target_less_its_opposite(name):
    """Two passes, one with the classifier's weight negated; however that weight is made."""
    torch.manual_seed(0)
    head: nn.Module = nn.Conv2d(4, 3, 2) if name == "convolution" else nn.Linear(16, 3)
    if name.endswith("norm"):
        head = {"weight norm": nn.utils.weight_norm, "spectral norm": nn.utils.parametrizations.spectral_norm}[name](
            head
        )
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.ReLU()]
    layers += [head, nn.Flatten()] if name == "convolution" else [nn.Flatten(), head]
    model, x = nn.Sequential(*layers).double().eval(), torch.rand(2, 2, 5, 5, dtype=torch.float64)
    opposite = nn.Sequential(*layers).eval()
    index = 4 if name == "convolution" else 5
    opposite[index] = nn.Conv2d(4, 3, 2).double() if name == "convolution" else nn.Linear(16, 3).double()
    opposite[index].load_state_dict({"weight": -head.weight.detach(), "bias": head.bias.detach()})
    for layer in ("", "1"):
        target = excitation_backprop(params_of(model), model, x, 1, layer=layer)
        against = excitation_backprop(params_of(opposite), opposite, x, 1, layer=layer)
        found = contrastive_excitation_backprop(params_of(model), model, x, 1, layer=layer)
        torch.testing.assert_close(found, target - against)


def test_contrastive_errors():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    params, x = params_of(model), torch.rand(1, 3)
    with pytest.raises(ValueError, match=r"`classifier` must name a linear layer or a convolution that runs, got '1'"):
        contrastive_excitation_backprop(params, model, x, 0, contrast_layer="0", classifier="1")
    with pytest.raises(ValueError, match="No layer `2` in the model"):
        contrastive_excitation_backprop(params, model, x, 0, contrast_layer="2")
    with pytest.raises(ValueError, match="`classifier` must be named"):
        contrastive_excitation_backprop({}, nn.ReLU(), x, 0, contrast_layer="")
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module"):
        contrastive_excitation_backprop({}, lambda p, x: x, x, 0, contrast_layer="")


# ---- conservation -------------------------------------------------------------------------------------------------


def small(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """A small one of its kind, and layers that all of the score comes from."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    if name == "vgg":
        features = models.vgg.make_layers([8, "M", 8, "M"], batch_norm=True)
        model = models.VGG(features, 5)
        model.classifier = nn.Sequential(nn.Linear(392, 16), nn.ReLU(inplace=True), nn.Linear(16, 5))
        return model, ("", "features.3")
    if name == "resnet":
        return models.resnet18(num_classes=5), ("", "layer1", "layer2.0")
    if name == "densenet":
        return models.DenseNet(4, (2, 2), 8, num_classes=5), ("", "features.transition1")
    if name == "vit":
        model = models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
        nn.init.normal_(model.heads.head.weight)
        return model, ("encoder.dropout", "encoder.layers.encoder_layer_0")  # the class token has a share below
    return models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [2, 2], num_classes=5), ("", "features.1")


@pytest.mark.parametrize("composite", ["cp_lrp", "z_plus"])
@pytest.mark.parametrize("name", ["vgg", "resnet", "densenet", "vit", "swin"])
def test_conserved_on_vision_models(name, composite):
    model, names = small(name)
    model = model.double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    chosen = rules.cp_lrp(1e-14, bias=False)
    if composite == "z_plus":
        chosen |= {F.conv2d: rules.z_plus(1e-14, bias=False)}
    with torch.no_grad():
        expected = model(x)[:, 1]
    for layer in names:
        relevance = lrp(params_of(model), model, x, 1, layer=layer, rules=chosen)
        torch.testing.assert_close(relevance.flatten(1).sum(1), expected, rtol=1e-6, atol=1e-9)


ASKED = pytest.mark.skipif(torch.__version__.startswith("2.0."), reason="transformers takes this of torch 2.1.1 and on")


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=ASKED)])
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_conserved_on_language_models(name, attention):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": 30, "attn_implementation": attention}
    # without a mask, some look for padding in the values
    ids = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **sizes))
        names = ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1.attention.output")
        target: Any = 1
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **sizes))
        names = ("model.embed_tokens", "model.layers.0")
        target = lambda y: y[:, -1, 7]  # noqa: E731
    model = model.double().eval()
    logits = model(**ids).logits.detach()
    expected = logits[:, 1] if name == "bert" else logits[:, -1, 7]
    options = {"output": "logits", "rules": rules.cp_lrp(1e-14, bias=False)}
    for layer in names:
        relevance = lrp(params_of(model), model, ids, target, layer=layer, **options)
        torch.testing.assert_close(relevance.flatten(1).sum(1), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_positions_relative_to_each_other_are_constants():
    """DeBERTa takes logarithms of integers for them, and T5 like it."""
    transformers = pytest.importorskip("transformers")
    if hasattr(transformers.models.deberta_v2.modeling_deberta_v2, "XSoftmax"):
        pytest.skip("this transformers hides the softmax in an autograd.Function of its own: out of the rules' sight")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.DebertaV2Config(
        vocab_size=30, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"], **sizes
    )
    model = transformers.DebertaV2ForSequenceClassification(config).double().eval()
    ids, other = ({"input_ids": torch.tensor([tokens])} for tokens in ([1, 2, 3, 4], [1, 5, 5, 4]))
    score, start = (model(**given).logits[:, 1].detach() for given in (ids, other))
    where = {"layer": "deberta.embeddings", "output": "logits"}
    found = lrp(params_of(model), model, ids, 1, rules=rules.cp_lrp(1e-14, bias=False), **where)
    torch.testing.assert_close(found.sum((1, 2)), score, rtol=1e-6, atol=1e-9)
    found = deep_lift(params_of(model), model, ids, 1, baseline=other, **where)
    torch.testing.assert_close(found.sum((1, 2)), score - start, rtol=1e-6, atol=1e-12)


def test_flow_is_the_sum_at_each_layer():
    """All layers from one forward and one backward; calls of a reused layer are summed; targets together."""
    model = small("resnet")[0].double().eval()
    params, x, names = (
        params_of(model),
        torch.randn(2, 3, 32, 32, dtype=torch.float64),
        ("", "layer1", "layer2.0", "relu"),
    )
    flow = relevance_flow(params, model, x, 1, layers=names)
    assert list(flow) == list(names)
    for name, total in flow.items():
        torch.testing.assert_close(total, lrp(params, model, x, 1, layer=name).flatten(1).sum(1))
    together = torch.vmap(lambda t: relevance_flow(params, model, x, t, layers=names))(torch.arange(2))
    torch.testing.assert_close(together["layer1"][1], flow["layer1"])
    runs = []
    model.conv1.register_forward_hook(lambda *_: runs.append(1))
    relevance_flow(params, model, x, 1, layers=names)
    assert len(runs) == 1
    with pytest.raises(ValueError, match="No layer `layer9` in the model"):
        relevance_flow(params, model, x, 1, layers=("layer9",))


# ---- DeepLIFT -----------------------------------------------------------------------------------------------------

PAIRED = [case for case in CASES if case.targets and not case.integer and case.name not in ("lstm", "checkpoint")]


@pytest.mark.parametrize("case", PAIRED, ids=lambda case: case.name)
def test_differences_add_up(case):
    """Skips, functional activations, reuse, softmax, norms, gates: to rounding."""
    model, x = case.model(), case.x
    baseline = pytree.tree_map(lambda t: 0.5 * torch.randn_like(t) if t.is_floating_point() else t, x)
    one = lambda y: y[:, 1].flatten(1).sum(1) if y.ndim > 2 else y[:, 1]  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = deep_lift(params_of(model), model, x, one, baseline=baseline, **case.options)
    total = torch.stack([t.flatten(1).sum(1) for t in pytree.tree_flatten(found)[0] if isinstance(t, Tensor)]).sum(0)
    twin = case.twin()
    expected = one(case.call(twin, x)) - one(case.call(twin, baseline))
    torch.testing.assert_close(total, expected.detach(), rtol=1e-9, atol=1e-9)


FUNCTIONS: dict[str, Any] = {
    "2 / x": lambda x: 2 / x,
    "2**x": lambda x: 2**x,
    "x **= 2": lambda x: operator.ipow(x * 1, 2),
    "a @ x": lambda x: x.T.__rmatmul__(x),
    "log1p": torch.log1p,
    "expit": torch.special.expit,
    "special.softmax": lambda x: torch.special.softmax(x, -1),
    "linalg.matmul": lambda x: torch.linalg.matmul(x, x.T),
    "addmm": lambda x: torch.addmm(x[:, :2], x, x.T),
    "outer": lambda x: torch.outer(x[0], x[1]),
    "max_pool1d": lambda x: torch.max_pool1d(x, 2, 1, 1),
    "max_pool1d and places": lambda x: F.max_pool1d(x, 2, 1, 1, return_indices=True)[0],
    "adaptive_max_pool1d": lambda x: torch.adaptive_max_pool1d(x, 3)[0],
    "max_pool2d": lambda x: torch.max_pool2d(x[None], 2, 1)[0],
    "a weight that the network makes": lambda x: F.linear(x, x[:, :3].T @ x),
    "a kernel that the network makes": lambda x: F.conv1d(x[None], x[:, :, None].expand(2, 4, 2)[:, :2], x[:, 0])[0],
    "baddbmm": lambda x: torch.baddbmm(x[None, :, :2], batch1=x[None], batch2=x.T[None], beta=2, alpha=0.5)[0],
    "addmm, scaled": lambda x: torch.addmm(x[:, :2], x, x.T, beta=2, alpha=0.5),
    "operands by name": lambda x: torch.mul(input=F.gelu(input=x), other=F.softmax(input=x, dim=1)),
    "norm by name": lambda x: F.layer_norm(input=x, normalized_shape=(4,), eps=1e-3),
    "power by name": lambda x: torch.pow(input=x, exponent=3),
    "integers": lambda x: x * torch.arange(1, 5).pow(2).log().abs(),
    "a power of constants": lambda x: x * torch.tensor(2.0) ** torch.arange(4.0),
    "a norm of constants": lambda x: x / torch.arange(4.0).norm(),
}
TOLD: dict[str, Any] = {
    "x**x": lambda x: x**x,
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True) + x,
    "norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "sort": lambda x: x.sort(1)[0],
    "tensordot": lambda x: torch.tensordot(x, x.T, 1),
}


@pytest.mark.parametrize("name", [*FUNCTIONS, *TOLD])
def test_spellings_of_functions(name):
    """Each adds up, or is told by name; none is passed over in silence."""
    function = FUNCTIONS.get(name) or TOLD[name]
    x, b = torch.rand(2, 2, 4, dtype=torch.float64) + 0.2
    total = lambda y: y.flatten(1).sum(1)  # noqa: E731
    if name in TOLD:
        with pytest.raises(PullbackWarning, match="DeepLIFT's rules do not cover `"):
            deep_lift({}, lambda p, x: function(x), x, total, baseline=b)
        return
    found = deep_lift({}, lambda p, x: function(x), x, total, baseline=b)
    torch.testing.assert_close(found.sum(), function(x).sum() - function(b).sum())


BENT: dict[str, Any] = {
    "layer_norm": lambda h: F.layer_norm(h, (8,)),
    "group_norm": lambda h: F.group_norm(h, 2),
    "instance_norm": lambda h: F.instance_norm(h[:, None])[:, 0],
    "written with sqrt": lambda h: h / torch.sqrt(h.pow(2).mean(1, keepdim=True) + 1e-6),
    "written with rsqrt": lambda h: h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6),
    "written with a power": lambda h: h * (h.pow(2).mean(1, keepdim=True) + 1e-6) ** -0.5,
    "log": lambda h: torch.log(h.abs() + 1e-5),
    "divided": lambda h: h / (h.abs().sum(1, keepdim=True) + 1e-5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("name", list(BENT))
def test_small_activations_add_up(name, size, dtype):
    """What divides by a scale bends the more the smaller the scale is: no fixed distance is small beside it."""
    torch.manual_seed(0)
    into, out = (torch.randn(8, 8, dtype=dtype) / 3 for _ in range(2))
    x, b = torch.randn(2, 3, 8, dtype=dtype)
    model = lambda p, x: BENT[name](size * (x @ into)) @ out  # noqa: E731
    found, expected = deep_lift({}, model, x, 1, baseline=b / 3).sum(1), (model({}, x) - model({}, b / 3))[:, 1]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("name", ["log1p", "sinh", "erfc", "sin", "expit", "special.expm1"])
def test_functions_pass_relevance_on(name):
    function = {"expit": torch.special.expit, "special.expm1": torch.special.expm1}.get(name) or getattr(torch, name)
    x = torch.rand(2, 3, dtype=torch.float64)
    found = lrp({}, lambda p, x: function(x), x, 1)
    torch.testing.assert_close(found.sum(1), function(x)[:, 1])


def test_rescale_by_hand():
    """Eq. 3.5.1: the multiplier of a nonlinearity is the secant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, b = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    u, v = model[0](x), model[0](b)
    slope = (u.tanh() - v.tanh()) / (u - v)
    expected = (model[2].weight[1] * slope) @ model[0].weight * (x - b)
    torch.testing.assert_close(deep_lift(params_of(model), model, x, 1, baseline=b), expected.detach())
    at_layer = deep_lift(params_of(model), model, x, 1, baseline=b, layer="1")
    torch.testing.assert_close(at_layer, (model[2].weight[1] * (u.tanh() - v.tanh())).detach())


def test_many_baselines_are_the_mean():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.randn(2, 3).double()
    others = torch.randn(5, 3).double()
    each = [deep_lift(params_of(model), model, x, 1, baseline=b) for b in others]
    found = deep_lift_shap(params_of(model), model, x, 1, baselines=others)
    torch.testing.assert_close(found, torch.stack(each).mean(0))


def test_deep_lift_errors():
    model, x = nn.Linear(3, 2), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"`baseline` must broadcast to `x`, \[2, 3\], got \[4\]"):
        deep_lift({}, model, x, 0, baseline=torch.ones(4))
    with pytest.raises(ValueError, match=r"`baselines` must hold the same number of samples, at least 1, got \[0\]"):
        deep_lift_shap({}, model, x, 0, baselines=torch.ones(0, 3))

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() if x.sum() > 0 else x.exp()

    with pytest.raises(ValueError, match=r"`baseline` must take the model the way `x` does.*first at `tanh`"):
        deep_lift({}, Branching(), x, 0, baseline=-x)


# ---- captum -------------------------------------------------------------------------------------------------------

STORED = json.loads(lzma.decompress((Path(__file__).parent / "data" / "captum_relevance.json.xz").read_bytes()))
# Where captum's answer is not ours, why; ours is held to the sum that it must have. Left out are multipliers without
# the difference (`multiply_by_inputs=False`), which we do not give, and a layer that the stored graph has no call of.
DIFFERENT = {
    "test_softmax_classification_batch_zero_baseline": "takes a mean over the batch: examples change one another",
    "test_softmax_classification_zero_baseline": "saturated, as the next ones: scores differ by 0, theirs are rounding",
    **dict.fromkeys(
        "test_convnet_maxpool2d_classification test_convnet_maxpool3d_classification test_convnet_with_maxpool1d "
        "test_convnet_with_maxpool1d_large_baselines test_convnet_with_maxpool2d test_convnet_with_maxpool3d "
        "test_convnet_with_maxpool2d_large_baselines test_convnet_with_maxpool3d_large_baselines "
        "test_softmax_classification_batch_multi_baseline test_softmax_classification_multi_baseline".split(),
        "saturated: scores differ by 0, and what captum gives is rounding",
    ),
    "test_lrp_multi_inputs": "hands the whole relevance of a functional `+` to both summands",
    "test_lrp_ixg_equivalency": "dropout was active",
}
EPSILON, GAMMA, ALPHA = rules.epsilon(1e-9), rules.gamma(1.0, 1e-9), rules.z_plus(1e-9)
IDENTITY = rules.passing()  # each output to the input of the same place, where layers are square
RULES = {"EpsilonRule": EPSILON, "GammaRule": GAMMA, "Alpha1_Beta0_Rule": ALPHA, "IdentityRule": IDENTITY}


def more_of(options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Inputs that are not explained."""
    more = options.get("more", ())
    return tuple(torch.as_tensor(v) for v in (more if isinstance(more, tuple | list) else (more,)))


@pytest.mark.parametrize("case", STORED["cases"], ids=lambda case: f"{case['method']}-{case['name']}")
def test_captum_returns_the_same(case):
    options = captum_cases.value(case["options"])
    model = captum_cases.model_of(STORED["models"][case["model"]])
    x = captum_cases.value(case["inputs"])
    x = (x if isinstance(x, tuple) else (x,)) + more_of(options)
    target = captum_cases.chosen(options.get("target"))
    if target is None:
        target = lambda y: y.reshape(len(y), -1).sum(1)  # noqa: E731
    at = "input" if options.get("at_input") else "output"
    differs = case["name"] in DIFFERENT and "unit" not in options
    if differs or x[0].dtype == torch.float64:
        model, x = model.double(), tuple(t.double() for t in x)
    elsewhere: dict[str, Any] = (
        {"layer": Layer(case["layer"], at)} if isinstance(case["layer"], str) and case["layer"] else {}
    )
    if "unit" in options:
        target, elsewhere = captum_cases.chosen(options["unit"]), {"output": Layer(case["layer"], at)}
    baseline = options.get("baseline")
    baseline = baseline if isinstance(baseline, tuple) or baseline is None else (baseline,)
    if "Shap" in case["method"]:
        baseline = tuple(t.to(x[0].dtype) for t in baseline)
        found = deep_lift_shap(params_of(model), model, x, target, baselines=baseline, **elsewhere)
    elif "Lift" in case["method"]:
        found = deep_lift(params_of(model), model, x, target, baseline=baseline, **elsewhere)
    else:
        chosen: dict[Any, Any] = rules.composed(EPSILON)
        for name, rule in (options.get("rules") or {}).items():
            chosen |= {(name, operation): RULES[rule] for operation in (F.linear, F.conv2d)}
        names = case["layer"] if isinstance(case["layer"], list) else [case["layer"]]
        places = [{"layer": Layer(name, at)} for name in names if name] or [{}]
        found = [lrp(params_of(model), model, x, target, **place, rules=chosen) for place in places]
    found = [t for t in pytree.tree_flatten(found)[0] if t is not None]
    expected = pytree.tree_flatten(captum_cases.value(case["expected"]))[0]
    assert len(found) == len(expected)
    if case["name"] == "test_lrp_multi_inputs":  # what captum gives to each, ours shares between both
        torch.testing.assert_close(sum(found), expected[0].double())
        return
    if case["name"] == "test_lrp_ixg_equivalency":
        torch.testing.assert_close(sum(found).sum(1), score(model(*x), target).detach())
        return
    if differs:  # both runs are saturated
        assert max(float(t.abs().max()) for t in found) < 1e-10
        return
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-12)
