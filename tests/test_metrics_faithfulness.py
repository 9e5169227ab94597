"""Faithfulness and information, against their definitions in loops."""

import math

import pytest
import slow_metrics as slow
import torch
from torch import nn

from pullback import gradient, input_x_gradient, integrated_gradients, maps, metrics, params_of

TARGET = torch.tensor([2, 0])
SHARES = (0.1, 0.25, 0.5, 0.8)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = (nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4 * 5, 4))
    return nn.Sequential(*layers).double().eval().requires_grad_(False)


def masked() -> tuple[dict[str, torch.Tensor], nn.Module, torch.Tensor, torch.Tensor]:
    model = network()
    x, map = torch.rand(2, 3, 6, 7, dtype=torch.float64), torch.randn(2, 1, 6, 7, dtype=torch.float64)
    map[1] = (2 * map[1]).round()  # with ties
    return params_of(model), model, x, map


def probability(model: nn.Module, target: int) -> slow.Score:
    return lambda image: float(model(image).softmax(1)[0, target])


def logit(model: nn.Module, target: int) -> slow.Score:
    return lambda image: float(model(image)[0, target])


def each(function, *tensors: torch.Tensor) -> torch.Tensor:
    """Call `function(index, *examples)` for one example after the other."""
    return torch.tensor([function(i, *(t[i : i + 1] for t in tensors)) for i in range(2)], dtype=torch.float64)


MAPS = {
    "deletion": (metrics.deletion, {"steps": 9}),
    "insertion": (metrics.insertion, {"steps": 9}),
    "irof": (metrics.irof, {"segments": torch.arange(42).reshape(1, 1, 6, 7) // 4}),
    "road": (metrics.road, {"shares": SHARES}),
    "softmax_information": (metrics.softmax_information, {"shares": SHARES}),
    "accuracy_information": (metrics.accuracy_information, {"shares": SHARES}),
    "average_drop": (metrics.average_drop, {}),
    "average_increase": (metrics.average_increase, {}),
}


# -- definitions


@pytest.mark.parametrize("steps", [1, 5, 42, 1000])
def test_deletion_and_insertion(steps):
    params, model, x, map = masked()
    blurred = maps.smooth(x, 10.0)
    for metric, start, end in ((metrics.deletion, x, 0 * x), (metrics.insertion, blurred, x)):

        def area(i, start, end, map):
            shares, scores = slow.way(probability(model, int(TARGET[i])), start, end, map[0, 0], steps)
            return slow.trapezoids(shares, scores)

        found, info = metric(params, model, x, TARGET, map, steps=steps, return_info=True)
        torch.testing.assert_close(found, each(area, start, end, map))
        shares, scores = slow.way(probability(model, 2), start[:1], end[:1], map[0, 0], steps)
        assert info["share"].tolist() == pytest.approx(shares)
        assert info["curve"][0].tolist() == pytest.approx(scores)


def test_baselines_and_scores():
    params, model, x, map = masked()
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    given = torch.rand_like(x)
    for baseline, paint in (("mean", mean), (0.3, torch.full_like(x, 0.3)), (given, given), (torch.sqrt, x.sqrt())):

        def area(i, x, paint, map):
            return slow.trapezoids(*slow.way(logit(model, int(TARGET[i])), x, paint, map[0, 0], 6))

        found = metrics.deletion(params, model, x, TARGET, map, steps=6, baseline=baseline, link=None)
        torch.testing.assert_close(found, each(area, x, paint, map))


def test_noise_has_the_spread_of_the_image():
    seen = []

    def model(params, x):
        seen.append(x)
        return x.sum((1, 2, 3))

    x = torch.rand(2, 3, 64, 64) * torch.tensor([1.0, 2.0, 5.0]).reshape(3, 1, 1) + 7
    draws = []
    for seed in (0, 0, 1):
        metrics.insertion({}, model, x, None, x[:, :1], steps=1, baseline="noise", link=None, seed=seed)
        draws.append(seen[-1][:2])
    torch.testing.assert_close(draws[0].mean((2, 3)), x.mean((2, 3)), rtol=0.03, atol=0)
    torch.testing.assert_close(draws[0].std((2, 3)), x.std((2, 3)), rtol=0.05, atol=0)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_irof():
    params, model, x, map = masked()
    segments = torch.stack([torch.arange(42) // 5, torch.arange(42) % 4]).reshape(2, 1, 6, 7)  # 9 and 4 of them
    paint = x.mean((2, 3), keepdim=True).expand_as(x)

    def area(i, x, paint, map, segments):
        return slow.irof(probability(model, int(TARGET[i])), x, paint, map[0, 0], segments[0, 0])

    found = metrics.irof(params, model, x, TARGET, map, segments=segments)
    torch.testing.assert_close(found, each(area, x, paint, map, segments))
    one = metrics.irof(params, model, x[1:], TARGET[1:], map[1:], segments=segments[1:])
    torch.testing.assert_close(one, found[1:])


def test_irof_finds_superpixels():
    pytest.importorskip("skimage")
    from pullback.masks._grids import superpixels

    params, model, x, map = masked()
    expected = metrics.irof(params, model, x, TARGET, map, segments=superpixels(x))
    assert torch.equal(metrics.irof(params, model, x, TARGET, map), expected)


@pytest.mark.parametrize("least_first", [False, True])
def test_road(least_first):
    params, model, x, map = masked()

    def mean(i, x, map):
        return slow.road(probability(model, int(TARGET[i])), x, map[0, 0], SHARES, least_first)

    how = {"shares": SHARES, "least_first": least_first, "noise": 0.0}
    found = metrics.road(params, model, x, TARGET, map, **how)
    torch.testing.assert_close(found, each(mean, x, map), rtol=1e-3, atol=0)
    noisy = metrics.road(params, model, x, TARGET, map, **{**how, "noise": 0.1})
    assert 0 < (noisy - found).abs().max() < 0.1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (8, 8), (13, 9), (17, 32)])
def test_filling_in(height, width):
    from pullback.metrics._inpainting import filled_in

    images = torch.rand(6, 2, height, width, dtype=torch.float64)
    gone = torch.rand(6, 1, height, width) < torch.linspace(0, 1, 6).reshape(6, 1, 1, 1)
    gone[:, 0, 0, 0] = False  # something is left
    found = filled_in(images, gone, tolerance=1e-9)
    for image, missing, whole in zip(images, gone, found):
        expected = slow.filled_in(image, {tuple(p) for p in missing[0].nonzero().tolist()})
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)
    near = filled_in(images.float(), gone)  # as `road` calls it
    torch.testing.assert_close(near.double(), found, rtol=0, atol=2e-3)


def test_information():
    params, model, x, map = masked()
    blurred = maps.smooth(x, 10.0)

    def softmax(i, x, blurred, map):
        score = probability(model, int(TARGET[i]))
        return slow.information(lambda image: min(score(image) / score(x), 1.0), x, blurred, map[0, 0], SHARES)

    def accuracy(i, x, blurred, map):
        def hit(image):
            return float(model(image)[0].argmax() == target)

        return slow.information(hit, x, blurred, map[0, 0], SHARES)

    found = metrics.softmax_information(params, model, x, TARGET, map, shares=SHARES)
    torch.testing.assert_close(found, each(softmax, x, blurred, map))
    for target in range(4):
        found = metrics.accuracy_information(params, model, x, target, map, shares=SHARES)
        torch.testing.assert_close(found, each(accuracy, x, blurred, map))


def test_bits():
    images = torch.rand(3, 2, 5, 6, dtype=torch.float64)
    images[1] = images[1].round(decimals=1)
    found = metrics.residual_entropy(images)
    assert found.tolist() == pytest.approx(
        [slow.bits(image, float(image.min()), float(image.max())) for image in images]
    )
    found = metrics.residual_entropy(images, like=3 * images[:1] - 1)
    low, high = float(images[0].min()), float(images[0].max())
    assert found.tolist() == pytest.approx([slow.bits(image, 3 * low - 1, 3 * high - 1) for image in images])


def test_information_of_ones_own():
    """A count of the pixels in view, which makes the axis of information one of shares."""
    params, model, x, map = masked()
    how = {"baseline": -1.0, "link": None, "shares": [step / 42 for step in range(1, 42)], "return_info": True}
    _, info = metrics.softmax_information(
        params, model, x, TARGET, map, information=lambda images: (images[:, 0] > -1).sum((1, 2)).double(), **how
    )
    torch.testing.assert_close(info["information"], torch.linspace(0, 1, 43, dtype=torch.float64).expand(2, 43))


def test_drop_and_increase():
    params, model, x, map = masked()
    drops, rises = (
        metrics.average_drop(params, model, x, TARGET, map),
        metrics.average_increase(params, model, x, TARGET, map),
    )
    for i in range(2):
        score = probability(model, int(TARGET[i]))
        mask = (map[i] - map[i].min()) / (map[i].max() - map[i].min())
        whole, through = score(x[i : i + 1]), score(mask * x[i : i + 1])
        assert drops[i].item() == pytest.approx(max(0.0, whole - through) / whole)
        assert bool(rises[i]) == (through > whole)
    assert not (rises & (drops > 0)).any()


def test_completeness():
    params, model, x, map = masked()
    attribution, baseline = torch.randn_like(x), torch.rand_like(x)
    found = metrics.completeness(params, model, x, TARGET, attribution, baseline=baseline)
    expected = []
    for i in range(2):
        score = logit(model, int(TARGET[i]))
        expected.append(abs(float(attribution[i].sum()) - (score(x[i : i + 1]) - score(baseline[i : i + 1]))))
    assert found.tolist() == pytest.approx(expected)
    complete = integrated_gradients(params, model, x, TARGET, baseline=baseline)
    assert (metrics.completeness(params, model, x, TARGET, complete, baseline=baseline) < 1e-6).all()
    pair = nn.Bilinear(3, 4, 2).double()
    inputs = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    whole = integrated_gradients(params_of(pair), pair, inputs, 1, baseline=tuple(torch.zeros_like(t) for t in inputs))
    assert (metrics.completeness(params_of(pair), pair, inputs, 1, whole) < 1e-6).all()
    ones = tuple(torch.ones_like(t) for t in inputs)
    whole = integrated_gradients(params_of(pair), pair, inputs, 1, baseline=ones)
    assert (metrics.completeness(params_of(pair), pair, inputs, 1, whole, baseline=(1.0, 1.0)) < 1e-6).all()


def test_infidelity():
    params, model, x, map = masked()
    attribution = gradient(params, model, x, TARGET)
    draws = torch.randn(7, *x.shape, dtype=torch.float64)

    def mean(i, x, attribution):
        score, total = logit(model, int(TARGET[i])), 0.0
        for draw in draws[:, i : i + 1]:
            total += (float((draw * attribution).sum()) - (score(x) - score(x - draw))) ** 2
        return total / 7

    how = {"samples": 7, "perturbation": lambda x, index: draws[index]}
    found = metrics.infidelity(params, model, x, TARGET, attribution, **how)
    torch.testing.assert_close(found, each(mean, x, attribution))
    torch.testing.assert_close(metrics.infidelity(params, model, x, TARGET, attribution, chunk_size=3, **how), found)
    best = metrics.infidelity(params, model, x, TARGET, attribution, rescale=True, **how)
    assert (best <= found).all()
    for factor in (0.1, -40.0):
        scaled = metrics.infidelity(params, model, x, TARGET, factor * attribution, rescale=True, **how)
        torch.testing.assert_close(scaled, best)


def test_perturbations_of_infidelity():
    """What a model that adds up its input sees of a perturbation is the perturbation itself."""
    seen = []

    def model(params, x):
        seen.append(x)
        return x.sum((1, 2, 3))

    x = torch.rand(2, 3, 12, 16, dtype=torch.float64) + 1
    zero = torch.zeros_like(x)
    found = metrics.infidelity({}, model, x, None, zero, samples=400, window=(3, 4), baseline=0.5, chunk_size=None)
    covered = (seen[-1].unflatten(0, (400, 2)) != x).all(2)  # [sample batch height width]
    assert torch.equal(covered[:, 0], covered[:, 1])  # the same for all examples
    assert (covered[:, 0].sum((1, 2)) == 12).all()
    assert covered[:, 0].any(2).sum(1).unique().tolist() == [3]
    assert covered[:, 0].any(0).all()  # every pixel has its turn
    fall = (covered.unsqueeze(2) * (x - 0.5)).sum((2, 3, 4))
    torch.testing.assert_close(found, fall.square().mean(0))
    noise = metrics.infidelity({}, model, x, None, zero, samples=4000, perturbation="noise", noise=0.2)
    torch.testing.assert_close(noise, torch.full_like(noise, 0.2**2 * x[0].numel()), rtol=0.1, atol=0)
    exact = metrics.infidelity({}, model, x, None, torch.ones_like(x), samples=9)
    torch.testing.assert_close(exact, torch.zeros_like(exact))


# -- laws


@pytest.mark.parametrize("name", MAPS)
def test_each_example_on_its_own(name):
    metric, how = MAPS[name]
    params, model, x, map = masked()
    whole = metric(params, model, x, TARGET, map, **how)
    assert whole.shape == (2,)
    alone = torch.cat([metric(params, model, x[i : i + 1], TARGET[i : i + 1], map[i : i + 1], **how) for i in range(2)])
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-7)
    if "average" not in name:
        in_parts = metric(params, model, x, TARGET, map, chunk_size=2, **how)
        torch.testing.assert_close(in_parts, whole, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", MAPS)
def test_many_maps_at_once(name):
    metric, how = MAPS[name]
    params, model, x, map = masked()
    many = torch.stack([map, -map, map.exp()])
    together = torch.vmap(lambda m: metric(params, model, x, TARGET, m, **how))(many)
    in_turn = torch.stack([metric(params, model, x, TARGET, m, **how) for m in many])
    torch.testing.assert_close(together, in_turn, rtol=1e-3, atol=1e-7)
    if "average" not in name:  # the order of the map is all that is read
        torch.testing.assert_close(in_turn[0], in_turn[2] if name != "irof" else in_turn[0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["deletion", "insertion", "road", "softmax_information"])
def test_many_seeds_at_once(name):
    metric, how = MAPS[name]
    params, model, x, map = masked()
    how = how if name == "road" else {**how, "baseline": "noise"}
    how |= {"information": lambda images: images.square().sum((1, 2, 3))} if name == "softmax_information" else {}
    together = torch.vmap(lambda seed: metric(params, model, x, TARGET, map, seed=seed, **how))(torch.arange(3))
    in_turn = torch.stack([metric(params, model, x, TARGET, map, seed=seed, **how) for seed in range(3)])
    torch.testing.assert_close(together, in_turn, rtol=1e-3, atol=1e-7)
    assert not torch.equal(in_turn[0], in_turn[1])


@pytest.mark.parametrize("name", MAPS)
def test_bounds_and_nan(name):
    metric, how = MAPS[name]
    params, model, x, map = masked()
    found = metric(params, model, x, TARGET, map, **how).double()
    low, high = metrics.METRICS[name].range
    assert ((found >= low) & (found <= high)).all()
    map[0, 0, 2, 2] = float("nan")
    with_nan = metric(params, model, x, TARGET, map, **how)
    assert with_nan[0].isnan() if with_nan.is_floating_point() else not with_nan[0]
    assert with_nan[1].item() == pytest.approx(found[1].item(), rel=1e-3)


@pytest.mark.parametrize("name", MAPS)
def test_the_inputs_stay_as_they_are(name):
    metric, how = MAPS[name]
    params, model, x, map = masked()
    before = [t.clone() for t in (x, map, *params.values())]
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        metric(params, model, x, TARGET, map, **how)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, map, *params.values())))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_better_map_is_judged_better():
    """The score is the sum of one corner, which the right map points to."""

    def model(params, x):
        return x[:, :, :4, :4].mean((1, 2, 3))

    x = torch.rand(1, 3, 12, 12)
    x[..., :4, :4] += 1
    right = torch.zeros(1, 1, 12, 12)
    right[..., :4, :4] = 1
    right += 0.1 * torch.rand_like(right)
    cells = (torch.arange(12) // 4)[:, None] * 3 + torch.arange(12) // 4
    for name, (metric, _) in MAPS.items():
        if name.startswith(("accuracy", "average")):
            continue
        how = {"segments": cells.reshape(1, 1, 12, 12)} if name == "irof" else {}
        how |= {} if name == "road" else {"baseline": 0.0}
        good, bad = (float(metric({}, model, x, None, m, link=None, **how)) for m in (right, -right))
        assert good > bad if metrics.METRICS[name].higher else good < bad, name
    drops = [float(metrics.average_drop({}, model, x, None, m, link=None)) for m in (right, -right)]
    assert drops[0] < drops[1]


def test_features_and_tokens():
    linear = nn.Linear(9, 3).double()
    x = torch.rand(4, 9).double()
    a = input_x_gradient(params_of(linear), linear, x, 0)
    best, worst = (metrics.deletion(params_of(linear), linear, x, 0, s * a, link=None) for s in (1, -1))
    assert (best <= worst).all()

    def tokens(params, x):
        return x.mean(1)

    x, map = torch.rand(2, 5, 3), torch.rand(2, 1, 5)
    _, info = metrics.insertion({}, tokens, x, 0, map, tokens=True, baseline=None, link=None, return_info=True)
    first = map.flatten(1).argmax(1)
    torch.testing.assert_close(info["curve"][:, 1], x[torch.arange(2), first, 0] / 5)


# -- errors


@pytest.mark.parametrize("name", MAPS)
def test_maps_that_do_not_fit(name):
    metric, how = MAPS[name]
    params, model, x, map = masked()
    for wrong in (map[:1], map[..., :-1], map.expand(2, 3, 6, 7)):
        with pytest.raises(ValueError, match="`map` must be"):
            metric(params, model, x, TARGET, wrong, **how)
    with pytest.raises(TypeError, match="`map` must be a floating-point tensor"):
        metric(params, model, x, TARGET, map.long(), **how)
    with pytest.raises(ValueError, match="`target` must lie in"):
        metric(params, model, x, 4, map, **how)
    with pytest.raises(ValueError, match="`baseline` must be") if name != "road" else pytest.raises(TypeError):
        metric(params, model, x, TARGET, map, baseline="grey", **how)


def test_options_out_of_range():
    params, model, x, map = masked()
    call = params, model, x, TARGET, map
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        metrics.deletion(*call, steps=0)
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1"):
        metrics.insertion(*call, chunk_size=0)
    for shares in ((), (0.0,), (0.5, 1.0)):
        for metric in (metrics.road, metrics.softmax_information):
            with pytest.raises(ValueError, match="`shares` must be numbers above 0"):
                metric(*call, shares=shares)
    with pytest.raises(ValueError, match="`segments` must be integers"):
        metrics.irof(*call, segments=torch.zeros(2, 1, 6, 6, dtype=torch.long))
    with pytest.raises(TypeError, match="`target` must be a class index"):
        metrics.accuracy_information(params, model, x, lambda y: y[:, 0], map)
    line, of_line = (lambda params, x: x.mean(2)), (torch.rand(2, 3, 9), 0, torch.rand(2, 1, 9))
    for metric in (metrics.road, metrics.softmax_information):
        with pytest.raises(ValueError, match=r"`x` must be \[batch channel height width\]"):
            metric({}, line, *of_line)
    attribution = torch.randn_like(x)
    call = params, model, x, TARGET
    with pytest.raises(ValueError, match="`attribution` must have the shape of `x`"):
        metrics.infidelity(*call, map)
    with pytest.raises(ValueError, match="`samples` must be at least 1"):
        metrics.infidelity(*call, attribution, samples=0)
    with pytest.raises(ValueError, match="`window` must fit"):
        metrics.infidelity(*call, attribution, window=7)
    with pytest.raises(ValueError, match="`perturbation` must be 'square', 'noise' or a function"):
        metrics.infidelity(*call, attribution, perturbation="round")
    with pytest.raises(ValueError, match="`attribution` must be"):
        metrics.completeness(*call, attribution[:1])
    assert metrics.completeness(*call, attribution * math.nan).isnan().all()
    assert metrics.infidelity(*call, attribution * math.nan).isnan().all()


def test_progress_is_told():
    params, model, x, map = masked()
    told = []
    metrics.deletion(params, model, x, TARGET, map, steps=9, chunk_size=4, progress=lambda *done: told.append(done))
    assert told == [(4, 10), (8, 10), (10, 10)]
