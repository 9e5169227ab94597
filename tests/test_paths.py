"""Path methods against sums by loops, and the law of completeness."""

import functools

import pytest
import slow
import torch
from cases import BY_NAME, CASES
from torch.utils import _pytree as pytree

from pullback import integrated_gradients, params_of

FLOATING = [case for case in CASES if not case.integer]
SMOOTH = [case for case in FLOATING if case.smooth]


def target_of(case):
    return torch.tensor([1, 3]) if case.targets else None


def same(ours, theirs, rtol):
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12 + rtol * float(b.abs().max()))


def shifted(x):
    return pytree.tree_map(lambda part: 0.3 * part.flip(0) if part.is_floating_point() else part, x)


@pytest.mark.parametrize("case", FLOATING, ids=lambda case: case.name)
def test_integrated_gradients_is_the_gauss_sum(case):
    model = case.model()
    call = functools.partial(case.call, case.twin())
    zeros = pytree.tree_map(torch.zeros_like, case.x)
    expected = slow.integrated_gradients_gauss(call, case.x, target_of(case), zeros, 4)
    same(
        integrated_gradients(params_of(model), model, case.x, target_of(case), steps=4, **case.options), expected, 1e-9
    )
    start = shifted(case.x)
    expected = slow.integrated_gradients_gauss(call, case.x, target_of(case), start, 3)
    ours = integrated_gradients(
        params_of(model), model, case.x, target_of(case), baseline=start, steps=3, **case.options
    )
    same(ours, expected, 1e-9)


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.name)
def test_integrated_gradients_is_complete(case):
    model, twin, target = case.model(), case.twin(), target_of(case)
    start = shifted(case.x)
    attribution = integrated_gradients(
        params_of(model), model, case.x, target, baseline=start, steps=24, **case.options
    )
    with torch.no_grad():
        ends = (torch.stack(slow.scores(case.call(twin, x), target)) for x in (case.x, start))
        difference = next(ends) - next(ends)
    parts = [part.flatten(1).sum(1) for part in pytree.tree_leaves(attribution) if part is not None]
    torch.testing.assert_close(torch.stack(parts).sum(0), difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["gelu mlp", "attention", "depthwise"])
def test_integrated_gradients_is_the_integral(name):
    case = BY_NAME[name]
    model = case.model()
    expected = slow.integrated_gradients(
        functools.partial(case.call, case.twin()), case.x, target_of(case), shifted(case.x), 300
    )
    ours = integrated_gradients(
        params_of(model), model, case.x, target_of(case), baseline=shifted(case.x), steps=20, **case.options
    )
    same(ours, expected, 1e-4)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
def test_in_chunks_it_is_the_same(chunk_size):
    case = BY_NAME["residual"]
    model = case.model()
    whole, parts = (
        integrated_gradients(params_of(model), model, case.x, 1, steps=5, chunk_size=size)
        for size in (None, chunk_size)
    )
    same(parts, whole, 1e-9)


def test_baselines_are_broadcast():
    case = BY_NAME["residual"]
    model, x = case.model(), case.x
    params = params_of(model)
    for small in (x.new_full((2, 1, 1), 0.4), x.new_full((1, 2, 6, 6), 0.4), x.new_tensor(0.4), 0.4):
        ours = integrated_gradients(params, model, x, 1, baseline=small, steps=3)
        same(ours, integrated_gradients(params, model, x, 1, baseline=torch.full_like(x, 0.4), steps=3), 1e-12)


def test_a_path_of_no_length_attributes_nothing():
    case = BY_NAME["residual"]
    model = case.model()
    ours = integrated_gradients(params_of(model), model, case.x, 1, baseline=case.x, steps=3)
    assert torch.equal(ours, torch.zeros_like(case.x))


def test_errors():
    case = BY_NAME["residual"]
    model = case.model()
    params = params_of(model)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        integrated_gradients(params, model, case.x, 1, steps=0)
    with pytest.raises(ValueError, match="`chunk_size`"):
        integrated_gradients(params, model, case.x, 1, chunk_size=0)
    with pytest.raises(ValueError, match="`baseline`"):
        integrated_gradients(params, model, case.x, 1, baseline=torch.zeros(3, 7, dtype=torch.float64))
