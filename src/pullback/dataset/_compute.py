"""Explain one batch by several methods, for several targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pullback import maps
from pullback._core.call import Call
from pullback._core.many.over_targets import over_targets
from pullback._core.many.state import check_range
from pullback._core.types import Inputs, Model, Output, Params
from pullback.dataset._feed import Batch, each_tensor, told

Method: TypeAlias = "Callable[..., Any]"
Reduce: TypeAlias = "str | Callable[[Tensor], Tensor] | None"
Targets: TypeAlias = "str | Sequence[int] | Callable[[Tensor, Tensor], Tensor] | None"

REDUCTIONS = {"sum": maps.channel_sum, "peak": maps.channel_peak}
RESERVED = frozenset("ids labels targets scores status errors".split())  # names of other arrays
RESERVED |= frozenset("example target channel height width depth token value".split())  # and of axes
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Recipe:
    """What is done to each batch."""

    methods: Mapping[str, Method]
    params: Params
    model: Model
    targets: Targets
    chunk_size: int | Literal["auto"] | None = "auto"
    output: Output = None
    reduce: Mapping[str, Reduce] | None = None
    dtype: str = "float32"
    scores: bool = True
    device: torch.device | None = None

    def explain(self, x: Inputs, labels: Tensor) -> dict[str, Tensor]:
        """Give targets and scores ``[batch target]`` and, for each method, ``[batch target ...]``, on the CPU."""
        if self.device is not None:
            x = each_tensor(lambda t: t.to(self.device, non_blocking=True), x)
        output = self._output(x)
        targets = self._targets(output, labels, next(iter(_tensors(x))).device)
        found: dict[str, Tensor] = {}
        if targets is not None:
            found["targets"] = targets
        if self.scores and output is not None:
            found["scores"] = (
                output.reshape(len(output), -1)[:, :1] if targets is None else _at(output, targets)
            ).float()
        options = {} if self.output is None else {"output": self.output}
        for name, method in self.methods.items():
            if targets is None:
                result = each_part(lambda a: a.unsqueeze(0), method(self.params, self.model, x, None, **options))
            elif targets.shape[1] == 1:  # without the cost of a transform
                one = method(self.params, self.model, x, targets[:, 0], **options)
                result = each_part(lambda a: a.unsqueeze(0), one)
            else:
                over = over_targets(method, chunk_size=self.chunk_size)
                result = over(self.params, self.model, x, targets.T.contiguous(), **options)
            for part, attribution in _parts(name, result).items():
                found |= self._stored(name, part, attribution, len(labels))
        return {name: tensor.cpu() for name, tensor in found.items()}

    def _output(self, x: Inputs) -> Tensor | None:
        """Run the model, where scores or targets ask for it."""
        if (
            not self.scores
            and not (isinstance(self.targets, str) and self.targets != "label")
            and not callable(self.targets)
        ):
            return None
        with torch.no_grad():
            return Call.bind(self.params, self.model, x, output=self.output).forward()

    def _targets(self, output: Tensor | None, labels: Tensor, device: torch.device) -> Tensor | None:
        labels = labels.to(device)
        if self.targets is None:
            return None
        if self.targets == "label":
            return labels[:, None]
        if isinstance(self.targets, str):
            assert output is not None
            count = int(self.targets.removeprefix("top"))
            if output.ndim != 2 or output.shape[1] < count:
                raise ValueError(
                    f"`targets` {self.targets!r} needs an output [batch class] of at least {count} classes, got "
                    f"{list(output.shape)}. Give targets as a function of the output."
                )
            return output.topk(count, dim=1).indices
        if callable(self.targets):
            chosen = self.targets(output, labels)  # pyright: ignore[reportArgumentType]
            if (
                not isinstance(chosen, Tensor)
                or chosen.ndim != 2
                or len(chosen) != len(labels)
                or chosen.is_floating_point()
            ):
                got = list(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__
                raise ValueError(f"`targets` must return classes [batch target], integers, got {got}.")
            return chosen.to(device)
        return torch.tensor(list(self.targets), device=device).expand(len(labels), -1)

    def _stored(self, name: str, part: str, attribution: Any, length: int) -> dict[str, Tensor]:
        """Reduce ``[target batch ...]`` and turn it to the dtype of the store, with its scale where that is float16."""
        if not isinstance(attribution, Tensor) or attribution.ndim < 2 or attribution.shape[1] != length:
            got = list(attribution.shape[1:]) if isinstance(attribution, Tensor) else type(attribution).__name__
            raise ValueError(f"`{name}` must give a tensor [batch ...], here of {length} examples, got {got}.")
        a = attribution.detach().transpose(0, 1)
        reduce = (self.reduce or {}).get(name)
        if reduce is not None and a.ndim > 3 and (callable(reduce) or a.shape[2] > 1):
            reduced = (reduce if callable(reduce) else REDUCTIONS[reduce])(a.flatten(0, 1))
            a = reduced.unflatten(0, a.shape[:2])
        if self.dtype == "float32":
            return {part: a.float()}
        scale = power_of_two_above(a)
        shape = (*scale.shape, *[1] * (a.ndim - 2))
        return {part: (a / scale.reshape(shape)).half(), f"{part}_scale": scale}


def power_of_two_above(a: Tensor) -> Tensor:
    """Give the power of two next above the largest magnitude of each ``[batch target]``; 1 where all are 0.

    Division by it is exact, so that half precision keeps 11 bits of the largest values, however small they are.
    """
    peak = _largest(a)
    if not peak.isfinite().all():
        peak = _largest(a.nan_to_num(0, 0, 0))
    exponent = torch.frexp(peak)[1].float().clamp(-120, 127)
    return torch.where(peak == 0, torch.ones_like(peak), torch.exp2(exponent))


def _largest(a: Tensor) -> Tensor:
    flat = a.flatten(2)
    return torch.maximum(flat.amax(2), -flat.amin(2)).float()


def _at(output: Tensor, targets: Tensor) -> Tensor:
    """Give the scores of classes ``[batch target]``; over all positions, where the output has some, their sum."""
    if output.ndim < 2:
        raise ValueError(
            f"`targets` needs an output [batch class ...], got {list(output.shape)}: give None for a score."
        )
    check_range(targets, output.shape[1])
    flat = output.reshape(*output.shape[:2], -1).sum(2)
    return flat.gather(1, targets)


def _tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x.values() if isinstance(x, Mapping) else x)


def each_part(function: Callable[[Tensor], Tensor], result: Any) -> Any:
    """Apply a function to each tensor of an attribution; inputs that are not explained have none."""
    if isinstance(result, Mapping):
        return {k: each_part(function, v) for k, v in result.items()}
    if isinstance(result, tuple):
        return tuple(each_part(function, v) for v in result)
    return function(result) if isinstance(result, Tensor) else result


def _parts(name: str, result: Any) -> dict[str, Any]:
    """Name the parts of the attribution of several inputs: ``method.0``, ``method.image``."""
    if isinstance(result, Mapping):
        return {f"{name}.{key}": value for key, value in result.items() if value is not None}
    if isinstance(result, tuple):
        return {f"{name}.{i}": value for i, value in enumerate(result) if value is not None}
    return {name: result}


# -- one batch, some of whose examples may be broken


def explained(recipe: Recipe, batch: Batch, on_error: str) -> tuple[dict[str, Tensor] | None, dict[int, str]]:
    """Explain what can be explained of a batch: results of its whole length, and what is wrong with some places.

    Where a method fails on the batch, each example is tried in a batch of copies of itself: the same length, so the
    same bits as beside others.
    """
    errors = dict(batch.errors)
    places = batch.places
    if recipe.targets == "label":
        unlabelled = [p for p, label in zip(places, batch.labels.tolist(), strict=True) if label < 0]
        errors |= dict.fromkeys(unlabelled, "ValueError: the example has no label, and `targets` is 'label'")
        places = [p for p in places if p not in unlabelled]
    if on_error == "raise" and errors:
        place = min(errors)
        raise RuntimeError(f"Example {batch.ids[place]!r} (position {batch.start + place}): {errors[place]}")
    if not places:
        return None, errors
    try:
        return recipe.explain(*batch.full(places)), errors
    except Exception as error:
        check_is_of_an_example(error)
        if on_error == "raise":
            first, last = batch.start, batch.start + len(batch.ids) - 1
            raise RuntimeError(f"Examples at positions {first} to {last}: {told(error)}") from error
    results: dict[str, Tensor] | None = None
    for place in places:
        try:
            alone = recipe.explain(*batch.full([place]))
        except Exception as error:
            check_is_of_an_example(error)
            errors[place] = told(error)
            continue
        results = {name: torch.zeros_like(t) for name, t in alone.items()} if results is None else results
        for name, tensor in alone.items():
            results[name][place] = tensor[place]
    return results, errors


def check_is_of_an_example(error: Exception) -> None:
    """Stop at errors that the next example would meet as well."""
    text = str(error)
    if isinstance(error, MemoryError) or re.search(r"out of memory|not enough memory", text, re.IGNORECASE):
        raise RuntimeError(f"Out of memory: take a smaller `batch_size` or `chunk_size`. {told(error)}") from error
    if "CUDA error" in text or type(error).__name__ == "AcceleratorError":
        raise RuntimeError(
            f"The device failed, and can do no more in this process: run again. {told(error)}"
        ) from error
