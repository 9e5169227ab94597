"""Extremal perturbations against TorchRay's results, batch against loop, and meaningful perturbations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pullback import extremal_perturbation, meaningful_perturbation, over_targets, params_of
from pullback.attribution.perturbation._optimise import optimised_masks

DATA = Path(__file__).parent / "data" / "torchray"
SMALL = {"iterations": 4, "step": 3, "sigma": 4.0, "levels": 4, "max_blur": 3.0}


def net() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * 25, 4))
        return nn.Sequential(*layers).double().eval(), torch.rand(3, 2, 12, 12, dtype=torch.float64)


def averaging() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[2].weight.copy_(torch.linspace(-1, 1, 48).view(3, 16))  # type: ignore[union-attr]
        model[2].bias.zero_()  # type: ignore[union-attr]
    return model, torch.linspace(0, 1, 256).view(1, 1, 16, 16)


# ---- TorchRay -----------------------------------------------------------------------------------------------------


def test_numbers_of_torchray():
    model, x = averaging()
    how = {"areas": 0.2, "iterations": 20, "step": 4, "sigma": 4.0, "levels": 4}
    mask, info = extremal_perturbation(params_of(model), model, x, 2, return_info=True, **how)
    history = info["history"][0]
    assert float(mask.mean()) == pytest.approx(0.375094, abs=1e-5)
    torch.testing.assert_close(history[:, 0], torch.tensor([5.66613, -177.5642]), rtol=1e-5, atol=0)
    torch.testing.assert_close(history[:, -1], torch.tensor([2.09394, -7.90647]), rtol=1e-4, atol=0)


def stored(name: str) -> list:
    described = json.loads((DATA / f"{name}.json").read_text())
    return [case for case in described["cases"] if case["function"].endswith("extremal_perturbation")]


@pytest.mark.parametrize("name", ["bn", "vgg"])
def test_masks_of_torchray(name):
    described, arrays = json.loads((DATA / f"{name}.json").read_text()), np.load(DATA / f"{name}.npz")
    model = nn.Sequential(*(getattr(nn, kind)(**options) for kind, options in described["layers"])).eval()
    model.load_state_dict({key[6:]: torch.tensor(arrays[key]) for key in arrays.files if key.startswith("state/")})
    x, cases = torch.tensor(arrays["x"]), stored(name)
    assert cases
    for case in cases:
        options = case["options"]
        ours = extremal_perturbation(
            params_of(model),
            model,
            x,
            options["target"],
            areas=options["areas"],
            variant=options["variant"],
            perturbation=options["perturbation"],
            reward="contrastive" if "reward_func" in options else "simple",
            levels=options["num_levels"],
            iterations=options["max_iter"],
            step=options["step"],
            sigma=options["sigma"],
        )
        theirs = torch.tensor(arrays[case["results"][0]])
        torch.testing.assert_close(ours[:, 0], theirs, rtol=0, atol=1e-6 + 1e-4 * float(theirs.abs().max()))


# ---- batch is loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["preserve", "delete", "dual"])
@pytest.mark.parametrize("reward", ["simple", "contrastive"])
def test_images_targets_and_areas_in_one_run_are_the_loop(variant, reward):
    model, x = net()
    params, areas, targets = params_of(model), [0.1, 0.4], [[0, 1, 2], [3, 3, 1]]
    how = {"variant": variant, "reward": reward, **SMALL}
    many = over_targets(extremal_perturbation)(params, model, x, targets, areas=areas, **how)
    assert many.shape == (2, 2, 3, 1, 12, 12)
    for k, target in enumerate(targets):
        for j, area in enumerate(areas):
            for i in range(3):
                alone = extremal_perturbation(params, model, x[i : i + 1], target[i], areas=area, **how)
                torch.testing.assert_close(many[k, j, i : i + 1], alone)


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_chunks_change_nothing(chunk_size):
    model, x = net()
    args, how = (params_of(model), model, x, [0, 1, 2]), {"areas": [0.1, 0.4], **SMALL, "return_info": True}
    whole, info = extremal_perturbation(*args, **how)
    parts, in_parts = extremal_perturbation(*args, chunk_size=chunk_size, **how)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(in_parts["history"], info["history"])


def test_a_reward_of_ones_own_and_a_layer():
    model, x = net()
    args = (params_of(model), model, x, 1)
    simple = extremal_perturbation(*args, **SMALL)
    own = extremal_perturbation(
        *args, reward=lambda y, t: y.gather(1, torch.full_like(y[:, :1], t).long())[:, 0], **SMALL
    )
    torch.testing.assert_close(own, simple)
    at_layer = extremal_perturbation(*args, layer="1", **SMALL)
    above = extremal_perturbation(params_of(model[2:]), model[2:], model[:2](x).detach(), 1, jitter=False, **SMALL)
    torch.testing.assert_close(at_layer, above)


def test_the_preserved_area_raises_the_score_and_is_held():
    """The score lives in one corner; the mask finds it, at about the area asked for."""
    model = lambda params, x: 40 * x[:, 0, :8, :8].mean((1, 2))  # noqa: E731
    x = torch.ones(1, 1, 24, 24)
    how = {"areas": 0.11, "iterations": 300, "step": 3, "sigma": 4.0, "perturbation": "fade", "jitter": False}
    for variant in ("preserve", "delete", "dual"):
        mask = extremal_perturbation({}, model, x, None, variant=variant, **how)[0, 0]
        assert mask[:8, :8].mean() > 0.8
        assert mask[12:, 12:].mean() < 0.1
        assert 0.05 < float(mask.mean()) < 0.2


def test_an_early_stop_rests_each_row_by_itself():
    model, x = net()
    how = {"areas": 0.3, **SMALL, "iterations": 200, "tolerance": 0.05, "return_info": True}
    together, info = extremal_perturbation(params_of(model), model, x, [0, 1, 2], **how)
    assert info["history"].shape[2] < 200
    for i in range(3):
        alone, _ = extremal_perturbation(params_of(model), model, x[i : i + 1], i, **how)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_the_update_is_momentum_with_dampening():
    """Against torch's own optimiser on the plain objective."""
    target = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def reward(mask: Tensor, iteration: int) -> Tensor:
        return 5 * (mask * target).flatten(1).sum(1)

    from pullback import masks

    area = torch.tensor([0.5], dtype=torch.float64)
    ours, history = optimised_masks(reward, (6, 6), area, step=2, sigma=2.0, iterations=9)
    p = torch.ones(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.SGD([p], lr=0.01, momentum=0.9, dampening=0.9)
    first = masks.plain_smooth_masks(torch.ones(1, 1, 3, 3), (6, 6), step=2, sigma=2.0).flatten().argsort()
    for t in range(9):
        mask, whole = masks.smooth_masks(p, (6, 6), step=2, sigma=2.0)
        ranked = whole.flatten()[first] if t == 0 else whole.flatten().sort().values
        wanted = torch.arange(len(ranked)) >= int(len(ranked) * 0.5)
        term = -300 * 1.0035**t * (ranked - wanted.double()).square().mean()
        torch.testing.assert_close(history[0, :, t], torch.stack([reward(mask, t)[0], term]).detach())
        descent.zero_grad()
        (-reward(mask, t).sum() - term).backward()
        descent.step()
        p.data.clamp_(0, 1)
    torch.testing.assert_close(ours, mask.detach())


def test_progress_and_interruption():
    model, x = net()
    args = (params_of(model), model, x, 1)
    told: list[tuple[int, int]] = []
    how = {"areas": [0.1, 0.3], **SMALL, "chunk_size": 3}
    whole = extremal_perturbation(*args, progress=lambda *now: told.append(now), **how)
    assert told == [(3 * k, 24) for k in range(1, 9)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for method in (extremal_perturbation, meaningful_perturbation):
        with pytest.raises(KeyboardInterrupt):
            method(*args, progress=stop)
    assert torch.equal(extremal_perturbation(*args, **how), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"areas": 1.5}, "`areas` must be fractions"),
        ({"areas": []}, "`areas` must be fractions"),
        ({"variant": "keep"}, "`variant` must be"),
        ({"reward": "none"}, "`reward` must be"),
        ({"iterations": 0}, "`iterations` must be at least 1"),
        ({"perturbation": "noise"}, "`perturbation` must be"),
        ({"step": 0}, "`step`"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1"),
    ],
)
def test_what_is_refused(options, message):
    model, x = net()
    with pytest.raises(ValueError, match=message):
        extremal_perturbation(params_of(model), model, x, 1, **{**SMALL, **options})


def test_contrast_needs_a_class():
    with pytest.raises(ValueError, match="`target` must be a class index"):
        extremal_perturbation(
            {}, lambda p, x: x.sum((1, 2, 3)), torch.ones(1, 1, 6, 6), None, reward="contrastive", **SMALL
        )


# ---- meaningful perturbation --------------------------------------------------------------------------------------


def test_the_meaningful_part_is_deleted():
    model = lambda params, x: x[:, 0, :6, :6].mean((1, 2))  # noqa: E731
    how = {"baseline": 0.0, "grid": 6, "iterations": 80, "jitter": 0, "area": 0.02}
    map, info = meaningful_perturbation({}, model, torch.ones(2, 1, 18, 18), None, return_info=True, **how)
    assert bool((map[:, 0, :5, :5].mean((1, 2)) > 0.7).all())
    assert bool((map[:, 0, 9:, 9:].mean((1, 2)) < 0.1).all())
    assert info["history"].shape == (2, 3, 80)
    assert bool((info["history"][:, 0, -1] < 0.4).all())


def test_meaningful_images_and_targets_in_one_run_are_the_loop():
    model, x = net()
    how = {"grid": 4, "iterations": 5, "seed": 3}
    many = over_targets(meaningful_perturbation)(params_of(model), model, x, [0, 2], **how)
    chunked = meaningful_perturbation(params_of(model), model, x, 2, chunk_size=2, **how)
    torch.testing.assert_close(many[1], chunked)
    for i in range(3):
        alone = meaningful_perturbation(params_of(model), model, x[i : i + 1], 0, **how)
        torch.testing.assert_close(many[0, i : i + 1], alone)
    with pytest.raises(ValueError, match="`iterations` must be at least 1"):
        meaningful_perturbation(params_of(model), model, x, 0, iterations=0)
