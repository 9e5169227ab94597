"""A compiled method gives what the method gives, whatever the class, the model and the shape."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import pullback
from pullback import compiled, over_targets, params_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(width=4):
    layers = (nn.Conv2d(3, width, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16 * width, 12))
    return nn.Sequential(*layers).double().eval()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def image(batch=2):
    return torch.randn(batch, 3, 6, 6, dtype=torch.float64)


def test_one_graph_serves_all_classes():
    model, x, fast = network(), image(), compiled(pullback.gradient, backend="eager")
    params, before = params_of(model), graphs()
    for target in (*range(12), np.int64(3), [1, 2], torch.tensor([3, 4]), torch.tensor(5)):
        torch.testing.assert_close(fast(params, model, x, target), pullback.gradient(params, model, x, target))
    assert graphs() - before == 2  # one index for all examples, one for each


def test_parameters_are_arguments():
    model, x, fast = network(), image(), compiled(pullback.guided_backprop, backend="eager")
    params, before = params_of(model), graphs()
    for scale in (1.0, 0.5):
        scaled = {name: scale * tensor for name, tensor in params.items()}
        expected = pullback.guided_backprop(scaled, model, x, 1)
        torch.testing.assert_close(fast(scaled, model, x, 1), expected)
    assert graphs() - before == 1


def test_more_models_than_torch_allows_graphs_of_one_function():
    fast, x = compiled(pullback.gradient, backend="eager"), image()
    for width in range(2, 2 + torch._dynamo.config.recompile_limit + 2):
        model = network(width)
        torch.testing.assert_close(
            fast(params_of(model), model, x, 1), pullback.gradient(params_of(model), model, x, 1)
        )


@pytest.mark.parametrize("compile", [compiled, torch.compile])
def test_a_model_is_forgotten_with_its_function(compile):
    model, fast = network(), compile(pullback.gradient, backend="eager")
    fast(params_of(model), model, image(), 1)
    alive = weakref.ref(model)
    del model, fast
    gc.collect()
    assert alive() is None


def test_other_shapes_and_options_compile_anew():
    model, fast = network(), compiled(pullback.grad_cam, backend="eager")
    params, before = params_of(model), graphs()
    for batch, layer in ((1, "0"), (2, "0"), (3, "0"), (3, "1")):
        x = image(batch)
        expected = pullback.grad_cam(params, model, x, 1, layer=layer)
        torch.testing.assert_close(fast(params, model, x, 1, layer=layer), expected)
    assert graphs() - before == 4


def test_many_targets_compile_under_vmap():
    model, x = network(), image()
    params, targets = params_of(model), torch.arange(12)
    fast = compiled(torch.vmap(pullback.gradient, (None, None, None, 0)), backend="eager")
    expected = over_targets(pullback.gradient)(params, model, x, targets)
    torch.testing.assert_close(fast(params, model, x, targets), expected)


def test_an_index_that_is_no_class_gives_nan():
    model, x = network(), image()
    assert compiled(pullback.gradient, backend="eager")(params_of(model), model, x, 12).isnan().all()


def test_what_does_not_compile_raises():
    model, x = network(), image()
    features = torch.arange(3 * 6 * 6).reshape(3, 6, 6) % 3
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(pullback.feature_ablation, backend="eager")(params_of(model), model, x, 1, feature_mask=features)


def test_a_method_is_asked_for():
    with pytest.raises(TypeError, match=r"`method` must be a method of pullback"):
        compiled("gradient")  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize("method", [pullback.saliency, pullback.guided_backprop])
def test_compiles_to_code(method):
    model, x = network(), image()
    params = params_of(model)
    torch.testing.assert_close(compiled(method)(params, model, x, 3), method(params, model, x, 3))
