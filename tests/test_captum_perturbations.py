"""Occlusion and ablation: the answers of captum 0.9 as cases. Integers and inputs without a batch are left out."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from captum_cases import chosen, model_of, value
from torch.utils import _pytree as pytree

import pullback
from pullback import Layer, params_of

DATA = Path(__file__).parent / "data" / "captum_perturbations.json.xz"
STORED = json.loads(lzma.decompress(DATA.read_bytes()))


def one_for_all(v: Any) -> Any:
    """Captum's masks and windows for one tensor, also where they come as a tuple of one."""
    return v[0] if isinstance(v, tuple) and len(v) == 1 else v


def ours(case: dict[str, Any], model: torch.nn.Module) -> Any:
    options, x = value(case["options"]), one_for_all(value(case["inputs"]))
    args = (params_of(model), model, x)
    if case["method"] == "Occlusion":
        parts = list(x) if isinstance(x, tuple) else [x]
        windows, strides, baselines = (options.get(n) for n in ("sliding_window_shapes", "strides", "baselines"))
        windows = windows if isinstance(windows[0], tuple) else (windows,)
        strides = strides if isinstance(strides, tuple) and isinstance(strides[0], tuple) else (strides,) * len(parts)
        baselines = baselines if isinstance(baselines, tuple) else (baselines,) * len(parts)
        found = []
        for i, part in enumerate(parts):  # ours slides over one tensor: the others stay as they are

            def alone(params: Any, moved: torch.Tensor, i: int = i) -> torch.Tensor:
                rest = [p.repeat(len(moved) // len(p), *[1] * (p.ndim - 1)) for p in parts]
                return model(*rest[:i], moved, *rest[i + 1 :])

            stride = 1 if strides[i] is None else strides[i]
            stride = (stride,) * len(windows[i]) if isinstance(stride, int) else stride
            covers = {"window": windows[i], "stride": stride, "baseline": baselines[i]}
            found.append(pullback.occlusion({}, alone, part, chosen(options.get("target")), **covers))
        return tuple(found)
    if case["method"] == "NeuronFeatureAblation":
        at = "input" if options["attribute_to_neuron_input"] else "output"
        features, cover = one_for_all(options.get("feature_mask")), one_for_all(options.get("baselines"))
        unit = chosen(options["neuron_selector"])
        return pullback.feature_ablation(
            *args, unit, output=Layer(case["layer"], at), feature_mask=features, baseline=cover
        )
    where = {}
    features, cover = options.get("feature_mask"), options.get("baselines")
    if case["method"] == "LayerFeatureAblation":
        where = {"layer": Layer(case["layer"], at="input" if options["attribute_to_layer_input"] else "output")}
        features, cover = options.get("layer_mask"), options.get("layer_baselines")
    target = chosen(options.get("target"))
    return pullback.feature_ablation(
        *args, target, feature_mask=one_for_all(features), baseline=one_for_all(cover), **where
    )


@pytest.mark.parametrize("case", STORED["cases"], ids=lambda case: case["method"])
def test_values(case):
    model = model_of(STORED["models"][case["model"]])
    found, expected = (pytree.tree_flatten(v)[0] for v in (ours(case, model), value(case["expected"])))
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        b = b.double().expand(len(a), *b.shape[1:])
        assert a.numel() == b.numel()  # our maps have a channel axis, also over features alone
        torch.testing.assert_close(a.double().reshape(b.shape), b, rtol=1e-4, atol=1e-4)
