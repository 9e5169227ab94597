"""The same for Ray Data: a callable over batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from pullback._core.types import Model, Output, Params
from pullback.dataset._compute import Method, Recipe, Reduce, Targets, explained
from pullback.dataset._feed import Batch
from pullback.dataset._run import as_asked, placed


class Explainer:
    """Explain batches of a `ray.data.Dataset`; each actor holds the model once.

        data.map_batches(
            Explainer,
            fn_constructor_args=({"gradient": gradient}, params, model),
            fn_constructor_kwargs={"targets": "top5", "device": "cuda"},
            batch_size=16, concurrency=(1, 8), num_gpus=1,
        ).write_parquet("maps")

    Ray decides which examples meet in a batch, so results equal those of `explain_dataset` to the precision of the
    dtype, not to the bit. What an actor had in hand when it died, Ray gives to another.

    Args:
        method, params, model, targets, chunk_size, output, reduce, scores, device, on_error: See `explain_dataset`.
        column: The input, ``[batch ...]``; or several columns, for a model of several inputs by name.
        label: Column of labels, for ``targets="label"``.

    Example:
        >>> model = torch.nn.Linear(3, 4).eval()
        >>> explain = Explainer(gradient, {}, model, targets=[2, 0], column="x")
        >>> batch = explain({"x": torch.randn(5, 3).numpy()})
        >>> {name: values.shape for name, values in batch.items()}["gradient"]  # [example target 3]
        (5, 2, 3)
    """

    def __init__(
        self,
        method: Method | Mapping[str, Method],
        params: Params,
        model: Model,
        *,
        targets: Targets,
        column: str | Sequence[str] = "image",
        label: str = "label",
        chunk_size: int | Literal["auto"] | None = "auto",
        output: Output = None,
        reduce: Reduce | Mapping[str, Reduce] = None,
        scores: bool = True,
        device: str | torch.device | None = None,
        on_error: Literal["record", "raise"] = "record",
    ) -> None:
        methods, reductions = as_asked(method, reduce, targets=targets, chunk_size=chunk_size, on_error=on_error)
        device, params, model = placed(device, params, model)
        self.recipe = Recipe(methods, params, model, targets, chunk_size, output, reductions, "float32", scores, device)
        self.column, self.label, self.on_error = column, label, on_error

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add targets, scores, attributions, and ``errors``, empty where there is none, to the columns of a batch."""
        if isinstance(self.column, str):
            x: Any = _tensor(batch, self.column)
            size = len(x)
        else:
            x = {name: _tensor(batch, name) for name in self.column}
            size = len(batch[self.column[0]])
        labels = torch.full((size,), -1)
        if self.label in batch:
            labels = torch.as_tensor(np.array(batch[self.label])).long()
        places = list(range(size))
        results, errors = explained(
            self.recipe, Batch(0, 0, [str(p) for p in places], x, labels, places, {}), self.on_error
        )
        if results is None:
            raise RuntimeError(f"None of {size} examples could be explained. The first one: {errors[0]}")
        found = {name: tensor.numpy() for name, tensor in results.items()}
        for values in found.values():
            values[sorted(errors)] = np.nan if values.dtype.kind == "f" else -1
        return {**batch, **found, "errors": np.array([errors.get(p, "") for p in places])}


def _tensor(batch: Mapping[str, np.ndarray], name: str) -> torch.Tensor:
    if name not in batch:
        raise ValueError(f"`column` must be one of {', '.join(map(repr, batch))}, got {name!r}.")
    return torch.as_tensor(np.array(batch[name]))  # Ray's arrays may not be written to
