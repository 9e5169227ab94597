"""The references are held to something simpler still, and the twins to the models that they stand for."""

import functools

import pytest
import slow
import torch
from cases import BY_NAME, CASES, Case, evaluated
from torch.nn import functional as F

TARGET = [1, 3]


def target_of(case: Case):
    return TARGET if case.targets else None


def called(case: Case, model: torch.nn.Module):
    return functools.partial(case.call, model)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_twin_computes_what_its_model_computes(case):
    model, twin = evaluated(case.model()), case.twin()
    with torch.no_grad():
        torch.testing.assert_close(case.call(model, case.x), case.call(twin, case.x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case", [case for case in CASES if isinstance(case.x, torch.Tensor)], ids=lambda case: case.name
)
def test_the_gradient_is_what_finite_differences_find(case):
    call = called(case, case.twin())
    for examples in (slice(0, 2), slice(0, 1)):
        x = case.x[examples]
        target = TARGET[examples] if case.targets else None
        g = slow.gradient(call, x, target)
        numeric = slow.finite_difference_gradient(call, x, target)
        torch.testing.assert_close(g, numeric, rtol=1e-6, atol=1e-6 * float(g.abs().max()))


@pytest.mark.parametrize("name", ["batch norm before tokens", "instance norm before tokens"])
def test_torch_itself_is_wrong_about_normalisation_at_batch_size_one(name):
    """When this fails, torch has mended it, and the case has lost its point."""
    case = BY_NAME[name]
    alone = case.x[:1]
    torch_says = slow.gradient(called(case, case.model()), alone, [1])
    right = slow.gradient(called(case, case.twin()), alone, [1])
    assert not torch.allclose(torch_says, right, rtol=1e-2)


@pytest.mark.parametrize("name", ["F.relu", "relu6 used twice", "residual", "transformer encoder, relu"])
def test_the_modified_rectifiers_change_something_and_not_the_output(name):
    case = BY_NAME[name]
    plain, guided, deconvnet = (
        slow.gradient(called(case, case.twin(rectify)), case.x, TARGET)
        for rectify in (lambda h, high: h.clamp(0, high), slow.guided, slow.deconvnet)
    )
    assert not torch.allclose(plain, guided)
    assert not torch.allclose(plain, deconvnet)
    assert not torch.allclose(guided, deconvnet)


def test_layer_gradients_agree_with_the_input_gradient():
    """Through a linear first layer, the chain rule by hand."""
    case = BY_NAME["gelu mlp"]
    model = case.twin()
    [(activation, g)] = slow.at_layer(model, case.call, case.x, TARGET, "net.0")
    torch.testing.assert_close(activation, model.net[0](case.x).detach())  # type: ignore[index]
    expected = g @ model.net[0].weight.detach()  # type: ignore[index]
    torch.testing.assert_close(slow.gradient(called(case, model), case.x, TARGET), expected)


def test_a_layer_called_twice_has_two_activations():
    case = BY_NAME["called twice"]
    pairs = slow.at_layer(case.twin(), case.call, case.x, TARGET, "conv")
    assert [tuple(activation.shape) for activation, _ in pairs] == [(2, 3, 4, 4), (2, 3, 2, 2)]
    assert slow.layer_shapes(case.twin(), case.call, case.x)["conv"] == ((2, 3, 4, 4), (2, 3, 2, 2))


def test_both_sums_of_integrated_gradients_agree():
    case = BY_NAME["gelu mlp"]
    call = called(case, case.twin())
    start = torch.full_like(case.x, 0.3)
    fine = slow.integrated_gradients(call, case.x, TARGET, start)
    torch.testing.assert_close(
        slow.integrated_gradients_gauss(call, case.x, TARGET, start, 20), fine, rtol=1e-5, atol=1e-7
    )
    complete = torch.stack(slow.scores(call(case.x), TARGET)) - torch.stack(slow.scores(call(start), TARGET))
    torch.testing.assert_close(fine.sum(1), complete.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [(3, 4), (9, 7), (5, 6), (13, 2)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_resizing_by_matrices_is_torch_resizing(size, mode):
    image = torch.randn(2, 1, 5, 6, dtype=torch.float64)
    options = {} if mode == "nearest" else {"align_corners": False}
    torch.testing.assert_close(slow.resize(image, size, mode), F.interpolate(image, size, mode=mode, **options))


def test_smoothing_keeps_a_constant_and_a_ramp():
    flat = torch.full((1, 1, 5, 6), 2.0, dtype=torch.float64)
    torch.testing.assert_close(slow.smooth(flat, 0.7), flat)
    ramp = torch.arange(40.0, dtype=torch.float64).expand(1, 1, 3, 40).contiguous()
    torch.testing.assert_close(slow.smooth(ramp, 1.0)[..., 8:-8], ramp[..., 8:-8])
