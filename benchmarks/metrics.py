"""Metrics against the loops that other libraries run.

- Model parameter randomisation, of one image and of several: all draws of a layer in one call under `vmap`, against a
  loop over draws, with a deep copy of the model for each, and layers; and Quantus, where it is installed, on as many
  models. The loop is given its weights, and so is ours; ours that draws them is listed as well.
- Insertion and deletion: steps of the whole batch in chunks, against one image and one step at a time; and Quantus,
  which takes one step of the batch at a time.

The same values on either side, or the script stops; of Quantus, which draws other weights, the time alone is taken. The
network is a small one for digits of 28 x 28 pixels by default: there a step has little to compute, and a loop costs its
calls. ``--network resnet18 --images 1 --steps 50 --samples 2`` shows the other end, where one image keeps a CPU busy.

    pip install quantus
    python benchmarks/metrics.py --threads 2
"""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
from _measure import agree, arguments, finish, milliseconds, network, ratio, seconds, table, with_spread
from scipy.stats import rankdata
from torch import Tensor, nn

from pullback import gradient, metrics, params_of
from pullback._torch.random import uniform

Run = Callable[[], Any]


def digits(device: str) -> tuple[nn.Module, int, int]:
    """Give a network for handwritten digits, with its input's channels and size."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten())
    head = (nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    return nn.Sequential(*layers, *head).eval().requires_grad_(False).to(device), 1, 28


def plain_gradient(model: nn.Module, x: Tensor, target: int) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x)[:, target].sum(), x)[0]


def spearman(a: Tensor, b: Tensor) -> Tensor:
    ranks = (torch.from_numpy(rankdata(v.flatten(1).cpu().numpy(), axis=1)) for v in (a, b))
    a, b = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def randomisation(model: nn.Module, x: Tensor, samples: int, modern: bool) -> dict[str, Run]:
    params = params_of(model)
    weights = dict(model.named_parameters())
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in reversed(weights)))
    index = torch.arange(samples, device=x.device)
    drawn = {
        name: p.std() * (uniform(0, index, p.shape, p.dtype, k) - 0.5) for k, (name, p) in enumerate(weights.items())
    }

    def ours() -> Tensor:
        """Given the weights, as the loop is."""
        how = {"samples": samples, "draw": lambda name, _, index: drawn[name][index]}
        return metrics.parameter_randomisation(params, model, x, 0, gradient, **how)

    def drawing() -> Tensor:
        return metrics.parameter_randomisation(params, model, x, 0, gradient, samples=samples)

    def loop() -> Tensor:
        original, found = plain_gradient(model, x, 0), []
        for s in range(samples):
            changed = copy.deepcopy(model)
            for layer in layers:
                for name, p in changed.named_parameters():
                    if name.rpartition(".")[0] == layer:
                        p.data.copy_(drawn[name][s])
                found.append(spearman(plain_gradient(changed, x, 0), original))
        return torch.stack(found).mean(0)

    agree(ours().double().cpu(), loop(), tolerance=0.02)  # one rounding in the gradient changes ranks
    cases: dict[str, Run] = {"ours, weights given": ours, "ours": drawing, "loop, deep copies": loop}
    peer = found_quantus() if modern else None
    if peer is not None:
        cases["quantus"] = lambda: quantus_randomisation(peer, model, x, samples)
    return cases


def found_quantus() -> Any:
    from pullback._networks.models import import_torchvision

    try:
        import_torchvision()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("quantus")
    except Exception:
        return None


def quantus_randomisation(quantus: Any, model: nn.Module, x: Tensor, samples: int) -> None:
    """Run Quantus' test once a seed: it takes one."""

    def explain(model: Any, inputs: Any, targets: Any, **_: Any) -> Any:
        model = model if isinstance(model, nn.Module) else model.get_model()
        return plain_gradient(model, torch.as_tensor(inputs, dtype=x.dtype), int(targets[0])).numpy()

    pixels, target = x.numpy(), torch.zeros(len(x), dtype=torch.long).numpy()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for seed in range(samples):
            metric = quantus.MPRT(seed=seed, disable_warnings=True, normalise=False, abs=False)
            call = {"x_batch": pixels, "y_batch": target, "a_batch": None, "explain_func": explain}
            metric(model=model, channel_first=True, device="cpu", **call)


def curves(model: nn.Module, x: Tensor, steps: int, modern: bool) -> dict[str, Run]:
    params, map = params_of(model), torch.rand(len(x), 1, *x.shape[2:], device=x.device)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)
    count = map[0].numel()

    def ours() -> Tensor:
        return metrics.deletion(params, model, x, target, map, steps=steps, baseline=0.0)

    def both() -> Tensor:
        return metrics.insertion(params, model, x, target, map, steps=steps)

    def loop() -> Tensor:
        """One image at a time, one step at a time."""
        found = []
        for image, one, t in zip(x, map, target, strict=True):
            order, current, scores = one.flatten().argsort(descending=True), image.clone(), []
            for step in range(steps + 1):
                current.flatten(1)[:, order[: step * count // steps]] = 0
                with torch.no_grad():
                    scores.append(model(current[None]).softmax(1)[0, t])
            found.append(torch.trapezoid(torch.stack(scores), dx=1 / steps))
        return torch.stack(found)

    agree(ours(), loop())
    cases: dict[str, Run] = {"deletion, ours": ours, "insertion, ours": both, "deletion, loop": loop}
    peer = found_quantus() if modern and x.shape[1] == 1 and count % steps == 0 else None
    if peer is not None:
        cases["deletion, quantus"] = lambda: quantus_flipping(peer, model, x, map, count // steps)
    return cases


def quantus_flipping(quantus: Any, model: nn.Module, x: Tensor, map: Tensor, together: int) -> None:
    metric = quantus.PixelFlipping(
        features_in_step=together, perturb_baseline=0.0, disable_warnings=True, normalise=False, abs=False
    )
    target = torch.zeros(len(x), dtype=torch.long).numpy()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        call = {"x_batch": x.numpy(), "y_batch": target, "a_batch": map.numpy()}
        metric(model=model, channel_first=True, softmax=True, device="cpu", **call)


def main() -> None:
    options = arguments(__doc__ or "", network="digits", samples=20, images=8, steps=784)
    if options.smoke:
        options.samples, options.images, options.steps = 2, 2, 7
    if options.network == "digits":
        model, channels, size = digits(options.device)
    else:
        (model, size), channels = network(options.network, options.device), 3
    torch.manual_seed(1)
    x = torch.rand(options.images, channels, size, size, device=options.device)
    modern = options.device == "cpu" and not options.smoke
    rows, results = [], {}
    groups = [
        (
            f", {count} image{'s' * (count > 1)}",
            "ours, weights given",
            randomisation(model, x[:count], options.samples, modern),
        )
        for count in sorted({1, options.images})
    ]
    groups.append(("", "deletion, ours", curves(model, x, options.steps, modern)))
    for about, reference, runs in groups:
        times = seconds(runs, options.rounds, options.device)
        for name, taken in times.items():
            times_ours = ratio(taken, times[reference])
            rows.append((name + about, milliseconds(taken), with_spread(times_ours)))
            results[name + about] = {"seconds": taken, "of ours": times_ours}
    layers = len({name.rpartition(".")[0] for name, _ in model.named_parameters()})
    about = (
        f"{options.network}, {options.images} images of {size} px. Randomisation, the first rows: {layers} layers, "
        f"{options.samples} draws. Deletion and insertion: {options.steps} steps."
    )
    finish(options, "metrics", f"{about}\n\n{table(('case', 'ms', 'of ours'), rows)}", results)


if __name__ == "__main__":
    main()
