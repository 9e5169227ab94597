"""Explain by covering: run the model on many perturbed inputs, and account for the change of its score.

Costs are quoted in forwards. The perturbations do not depend on the target, so that under `vmap` over targets one
forward of each perturbed input serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback import maps
from pullback import masks as drawn
from pullback._batch import Progress, Together, report
from pullback._call import Inputs, Model, Params, Select, Target, public
from pullback._cover import Scene, Squash, axis_sizes, canvas_of, wide
from pullback._random import Seed, uniform
from pullback._torch import eye

Keep = Callable[[range], "list[Tensor]"]


def _positive(name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


# -- windows and masks over an image


@public
def occlusion(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    baseline: drawn.Cover = None,
    tokens: bool = False,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
) -> Tensor:
    r"""Slide a window over the input, and note by how much the score falls where it covers.

    .. math:: m_p = \frac{1}{|W_p|} \sum_{w \in W_p} \big( f_t(x) - f_t(x \text{ covered in } w) \big)

    with :math:`W_p` the windows that cover p. Costs a forward for each place of the window, and one.

    Args:
        params, model, x, target, layer, at, output, strict: See `gradient`.
        window: Size, one number or one a spatial axis; an eighth of each axis if omitted. A window with a size for
            the channels too slides over them as well.
        stride: From place to place; half the window if omitted.
        baseline: What is shown in the window: see `pullback.masks.covering`. Zeros if omitted.
        tokens: What is covered is ``[batch token channel]``: the window slides over tokens.
        chunk_size: Places evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (places done, places in all).

    Returns:
        Map ``[batch 1 height width]`` (or as many axes as there are), signed, in units of the score; shaped like `x`
        where the window has a size for the channels.

    Raises:
        ValueError: If `window` or `stride` is not positive or does not fit the axes.

    Example:
        >>> model = lambda params, x: x.sum((1, 2, 3))
        >>> x = torch.rand(2, 3, 6, 6)
        >>> m = occlusion({}, model, x, None, window=2, stride=2)
        >>> torch.allclose(m.sum((1, 2, 3)) / 4, x.sum((1, 2, 3)), atol=1e-4)  # each pixel is in one window
        True

    Reference:
        Zeiler & Fergus, Visualizing and Understanding Convolutional Networks, 2014, sec. 4.2.
    """
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)
    canvas = canvas_of(scene, tokens)
    example = tuple(scene.shapes[0][1:])
    everywhere = window is not None and not isinstance(window, int) and len(window) == len(example) > len(canvas.sizes)
    sizes = example if everywhere else canvas.sizes
    window = axis_sizes("window", window, sizes, lambda n: math.ceil(n / 8))
    half = tuple(-(-w // 2) for w in window)
    stride = half if stride is None else axis_sizes("stride", stride, sizes, int)
    rows = [drawn.windows(n, min(w, n), s, scene.device) for n, w, s in zip(sizes, window, stride, strict=True)]
    count = math.prod(map(len, rows))
    whole = scene.scores(1, lambda _, values: values)
    found = []
    for part in scene.parts(count, chunk_size):
        covered = _windows_at(rows, torch.arange(part.start, part.stop, device=scene.device)).unsqueeze(1)

        def cover(_: int, values: Tensor) -> Tensor:
            if everywhere:
                return torch.where(covered, drawn.covering(values[0], baseline), values)  # noqa: B023
            shown = canvas.lay(values)
            return canvas.restore(torch.where(covered.unsqueeze(1), drawn.covering(shown[0], baseline), shown))  # noqa: B023

        found.append(whole - scene.scores(len(part), cover))
        report(progress, part.stop, count)
    map_ = _mean_of_windows(rows, torch.cat(found).to(wide(scene.dtype)).T)
    return (map_ if everywhere else map_.unsqueeze(1)).to(scene.dtype)


def _windows_at(rows: Sequence[Tensor], index: Tensor) -> Tensor:
    """Give the windows at some places, ``[index *size]``, from those along each axis; the last axis moves first."""
    covered = torch.ones(len(index), *[1] * len(rows), dtype=torch.bool, device=index.device)
    for axis, row in enumerate(rows):
        along = row[index // math.prod(map(len, rows[axis + 1 :])) % len(row)]
        covered = covered & along.reshape(len(index), *[1] * axis, -1, *[1] * (len(rows) - axis - 1))
    return covered


def _mean_of_windows(rows: Sequence[Tensor], values: Tensor) -> Tensor:
    """Give each place the mean over the windows that cover it: ``[batch window]`` -> ``[batch *size]``."""
    values = values.unflatten(1, [len(row) for row in rows])
    for axis, row in enumerate(rows):
        weight = row.to(values.dtype) / row.sum(0).clamp(min=1).to(values.dtype)
        values = torch.matmul(values.movedim(1 + axis, -1), weight).movedim(-1, 1 + axis)
    return values


@public
def rise(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    samples: int = 4000,
    cells: int | Sequence[int] = 7,
    p: float = 0.5,
    squash: Squash = "softmax",
    normalise: bool = True,
    seed: Seed = 0,
    tokens: bool = False,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
) -> Tensor:
    r"""Show the model random parts of the input, and average the masks by the scores that they reach.

    .. math:: m = \frac{1}{p \, n} \sum_{s=1}^n f_t(x \odot M_s) \, M_s

    The masks are grids of cells, each shown with probability p, enlarged linearly and shifted: see
    `pullback.masks.grid_masks`. They are the same for all examples. Costs `samples` forwards, shared by all targets
    under `vmap`.

    Args:
        params, model, x, target, layer, at, output, strict: See `gradient`.
        samples: Number of masks.
        cells: Of the grid, along each axis.
        p: Probability that a cell is shown.
        squash: What the output goes through before it is scored: ``"softmax"`` over classes, as in the paper (an
            output of one number, and a function as target, is taken as it is); ``"sigmoid"``, as TorchRay does; a
            function; `None` for the score itself.
        normalise: Divide by p, as the paper does and TorchRay does not.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        tokens: What is covered is ``[batch token channel]``.
        chunk_size: Masks evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (masks done, masks in all).

    Returns:
        Map ``[batch 1 height width]``, in units of the score.

    Raises:
        ValueError: If `samples` is less than 1, or p not a probability above 0.

    Example:
        >>> model = lambda params, x: x.mean((2, 3))
        >>> m = rise({}, model, torch.rand(2, 3, 16, 16), 0, samples=8)
        >>> m.shape == (2, 1, 16, 16) and bool((m >= 0).all())
        True

    Reference:
        Petsiuk, Das & Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018, sec. 3.
    """
    _positive("samples", samples)
    if not 0 < p <= 1:
        raise ValueError(f"`p` must be a probability above 0, got {p}.")
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict, squash=squash)
    canvas = canvas_of(scene, tokens)
    cells = axis_sizes("cells", cells, canvas.sizes, lambda n: n)
    cell = torch.tensor([math.ceil(n / c) for n, c in zip(canvas.sizes, cells, strict=True)], device=scene.device)
    dtype = wide(scene.dtype)

    def scored() -> Iterator[tuple[Tensor, Tensor]]:
        for part in scene.parts(samples, chunk_size):
            index = torch.arange(part.start, part.stop, device=scene.device)
            grids = (uniform(seed, index, cells, dtype) < p).to(dtype)
            shifts = (uniform(seed, index, (len(cells),), torch.float32, stream=1) * cell).long()
            masks = drawn.grid_masks(grids, shifts, canvas.sizes)  # [mask 1 *size]

            def cover(_: int, values: Tensor) -> Tensor:
                return canvas.restore(canvas.lay(values) * masks.unsqueeze(1).to(values.dtype))  # noqa: B023

            yield scene.scores(len(part), cover).to(dtype), masks.flatten(1)
            report(progress, part.stop, samples)

    total = _weighted_sum(scored())
    return (total / (samples * (p if normalise else 1))).unflatten(1, (1, *canvas.sizes)).to(scene.dtype)


HELD = 32 * 2**20  # bytes of masks that wait to be summed


def _weighted_sum(pairs: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum masks ``[mask pixel]`` by scores ``[mask batch]``: ``[batch pixel]``.

    Many at once: for many targets a sum is larger than all that is summed.
    """
    total: Any = 0
    held: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        held.append(pair)
        if sum(masks.numel() * masks.element_size() for _, masks in held) >= HELD:
            total, held = total + _product(held), []
    return total + _product(held) if held else total


def _product(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    scores, masks = (torch.cat(column) for column in zip(*pairs, strict=True))
    return torch.matmul(scores.T, masks)


def _cell_maps(values: Tensor, cells: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Enlarge ``[batch cell]`` to maps ``[batch 1 *size]``."""
    return maps.resize(values.unflatten(1, (1, *cells)), sizes)


def _on_cells(
    scene: Scene,
    tokens: bool,
    cells: int | Sequence[int],
    baseline: drawn.Cover,
    draw: Callable[[int], tuple[int, Callable[[Tensor], Tensor]]],
    chunk_size: Together,
    progress: Progress,
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Score the input blended with its cover by masks on a grid: ``[mask batch]``.

    `draw` gives, for a number of cells, how many masks there are and the function from indices to ``[mask cell]``.
    """
    canvas = canvas_of(scene, tokens)
    cells = tuple(
        min(c, n) for c, n in zip(axis_sizes("cells", cells, canvas.sizes, lambda n: n), canvas.sizes, strict=True)
    )
    count, masks_at = draw(math.prod(cells))
    found = []
    for part in scene.parts(count, chunk_size):
        small = masks_at(torch.arange(part.start, part.stop, device=scene.device)).to(wide(scene.dtype))
        masks = _cell_maps(small, cells, canvas.sizes).unsqueeze(1)

        def cover(_: int, values: Tensor) -> Tensor:
            shown, masks_ = canvas.lay(values), masks.to(values.dtype)  # noqa: B023
            under = drawn.covering(shown[0], baseline)
            return canvas.restore(under + masks_ * (shown - under))

        found.append(scene.scores(len(part), cover).to(wide(scene.dtype)))
        report(progress, part.stop, count)
    return torch.cat(found), cells, canvas.sizes


@public
def sobol_attribution(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    samples: int = 32,
    cells: int | Sequence[int] = 8,
    baseline: drawn.Cover = None,
    seed: Seed = 0,
    tokens: bool = False,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
) -> Tensor:
    r"""Ascribe the variance of the score under random masks to the cells of the mask, interactions included.

    .. math:: m_i = \frac{\tfrac{1}{2 n} \sum_s \big( f_t(A_s) - f_t(A_s^{(i)}) \big)^2}{\operatorname{Var} f_t}

    the total Sobol index by Jansen's estimator: :math:`A^{(i)}` has cell i from a second draw B. The draws are a
    Latin hypercube (in the paper a quasi-random sequence). Costs ``samples (cells + 2)`` forwards, shared by all
    targets under `vmap`.

    Args:
        params, model, x, target, layer, at, output, strict: See `gradient`.
        samples: Number of draws.
        cells: Of the grid of the mask, along each axis.
        baseline: What masks blend into: see `pullback.masks.covering`. Zeros if omitted.
        seed, tokens, chunk_size, progress: See `rise`.

    Returns:
        Map ``[batch 1 height width]``, not negative: the share of the variance that is lost with a cell's value. Shares
        add up to more than 1 where cells interact.

    Raises:
        ValueError: If `samples` is less than 2.

    Example:
        >>> model = lambda params, x: x[:, 0, :4, :4].sum((1, 2))
        >>> m = sobol_attribution({}, model, torch.ones(1, 1, 8, 8), None, cells=2, samples=16)
        >>> bool(m[0, 0, 0, 0] > m[0, 0, -1, -1])
        True

    Reference:
        Fel, Cadène, Chalvidal, Cord, Vigouroux & Serre, Look at the Variance!, 2021, sec. 3.
    """
    _positive("samples", samples, 2)
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)

    def draw(count: int) -> tuple[int, Callable[[Tensor], Tensor]]:
        index = torch.arange(samples, device=scene.device)
        drawn_ = uniform(seed, index, (2 * count,), wide(scene.dtype))
        stratum = uniform(seed, index, (2 * count,), torch.float32, stream=1).argsort(0)
        a, b = ((stratum + drawn_) / samples).chunk(2, 1)

        def masks_at(index: Tensor) -> Tensor:
            sample, which = index % samples, index // samples  # A, B, then A with each cell from B
            fresh = (which[:, None] - 2 == torch.arange(count, device=scene.device)) | (which[:, None] == 1)
            return torch.where(fresh, b[sample], a[sample])

        return samples * (count + 2), masks_at

    scores, cells, sizes = _on_cells(scene, tokens, cells, baseline, draw, chunk_size, progress)
    scores = scores.unflatten(0, (-1, samples))  # [draw sample batch]
    variance = scores[:2].flatten(0, 1).var(0, unbiased=False)
    unexplained = (scores[2:] - scores[0]).square().mean(1) / 2  # [cell batch]
    shares = torch.where(variance == 0, torch.zeros_like(unexplained), unexplained / variance)
    return _cell_maps(shares.T, cells, sizes).to(scene.dtype)


@public
def hsic_attribution(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    samples: int = 500,
    cells: int | Sequence[int] = 7,
    p: float = 0.5,
    baseline: drawn.Cover = None,
    seed: Seed = 0,
    tokens: bool = False,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
) -> Tensor:
    r"""Measure how far the score depends on whether a cell is shown, by the Hilbert-Schmidt independence criterion.

    .. math:: m_i = \frac{\operatorname{tr}(K_i H L H)}{(n - 1)^2}

    with the kernels :math:`K_i` (1 where cell i is shown or covered in both samples) and L (a Gaussian of the score,
    as wide as the median distance), and H that centres. Catches any dependence, and costs `samples` forwards for all
    cells, shared by all targets under `vmap`.

    Args:
        params, model, x, target, layer, at, output, strict: See `gradient`.
        samples: Number of random masks.
        cells: Of the grid of the mask, along each axis.
        p: Probability that a cell is shown.
        baseline: What covered cells show: see `pullback.masks.covering`. Zeros if omitted.
        seed, tokens, chunk_size, progress: See `rise`.

    Returns:
        Map ``[batch 1 height width]``, not negative; 0 where the score does not depend on the cell.

    Raises:
        ValueError: If `samples` is less than 2.

    Example:
        >>> model = lambda params, x: x[:, 0, :4, :4].sum((1, 2))
        >>> m = hsic_attribution({}, model, torch.ones(1, 1, 8, 8), None, cells=2, samples=64)
        >>> bool(m[0, 0, 0, 0] > m[0, 0, -1, -1])
        True

    Reference:
        Novello, Fel & Vigouroux, Making Sense of Dependence, 2022, sec. 3.
    """
    _positive("samples", samples, 2)
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)

    def draw(count: int) -> tuple[int, Callable[[Tensor], Tensor]]:
        return samples, lambda index: uniform(seed, index, (count,), torch.float32) < p

    scores, cells, sizes = _on_cells(scene, tokens, cells, baseline, draw, chunk_size, progress)
    shown = draw(math.prod(cells))[1](torch.arange(samples, device=scene.device)).to(scores.dtype)
    square = (scores.T[:, :, None] - scores.T[:, None]).square()  # [batch sample sample]
    width = square.flatten(1).median(1).values[:, None, None]
    like = torch.exp(-square / (2 * torch.where(width == 0, torch.ones_like(width), width)))
    centred = like - like.mean(1, keepdim=True)
    centred = centred - centred.mean(2, keepdim=True)
    dependence = 2 * ((centred @ shown) * shown).sum(1) / (samples - 1) ** 2  # K = z z' + (1 - z)(1 - z)', H 1 = 0
    return _cell_maps(dependence, cells, sizes).to(scene.dtype)


# -- features and coalitions of them


class _Features:
    """Features of the input: groups of numbers that are shown or covered together.

    `ids`: for each covered tensor the group of each number, ``[1 *example]`` or ``[batch *example]``.
    """

    def __init__(self, scene: Scene, features: Any, baseline: Any) -> None:
        self.scene = scene
        self.keys = [None] if scene.site.name else scene.leaves.floating
        given = [self._of(features, key) for key in self.keys]
        if features is None:
            sizes = [math.prod(shape[1:]) for shape in scene.shapes]
            starts = [sum(sizes[:k]) for k in range(len(sizes))]
            self.count = sum(sizes)
            self.ids = [
                torch.arange(start, start + size, device=scene.device).reshape(1, *shape[1:])
                for start, size, shape in zip(starts, sizes, scene.shapes, strict=True)
            ]
        else:
            self.ids = [self._laid(ids, shape) for ids, shape in zip(given, scene.shapes, strict=True)]
            if min(int(ids.min()) for ids in self.ids) < 0:
                raise ValueError("`features` must number groups from 0, got a negative number.")
            self.count = 1 + max(int(ids.max()) for ids in self.ids)
        self.baselines = [self._of(baseline, key) for key in self.keys]

    @staticmethod
    def _of(tree: Any, key: Any) -> Any:
        if key is None or not isinstance(tree, dict | tuple | list):
            return tree
        return tree.get(key) if isinstance(tree, dict) else tree[key]

    def _laid(self, ids: Any, shape: Sequence[int]) -> Tensor:
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
            what = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"`features` must be an integer tensor for each tensor that is covered, got {what}.")
        ids = ids.long().to(self.scene.device)
        for whole in (tuple(shape[1:]), tuple(shape)):
            if ids.ndim <= len(whole):
                try:
                    ids = ids.expand(whole)
                except RuntimeError:
                    continue
                return ids if whole == tuple(shape) else ids.unsqueeze(0)
        raise ValueError(f"`features` must broadcast to {list(shape[1:])} or {list(shape)}, got {list(ids.shape)}.")

    def kept(self, coalitions: Tensor) -> list[Tensor]:
        """Lay coalitions ``[copy group]`` out over the tensors, ``[copy (1 or batch) *example]``."""
        return [coalitions[:, ids] for ids in self.ids]

    def scores(self, count: int, keep: Keep, chunk_size: Together, progress: Progress) -> Tensor:
        """Score the input with all covered that `keep` does not keep: ``[copy batch]``."""
        found = []
        for part in self.scene.parts(count, chunk_size):
            kept = keep(part)

            def cover(place: int, values: Tensor) -> Tensor:
                under = drawn.covering(values[0], self.baselines[place])
                return torch.where(kept[place], values, under)  # noqa: B023

            found.append(self.scene.scores(len(part), cover))
            report(progress, part.stop, count)
        return torch.cat(found).to(wide(self.scene.dtype))

    def laid_out(self, values: Tensor) -> Any:
        """Give each number the value of its group: ``[batch group]`` -> the structure of what is covered."""
        spread = []
        for ids, shape in zip(self.ids, self.scene.shapes, strict=True):
            flat = torch.gather(values, 1, ids.flatten(1).expand(len(values), -1))
            spread.append(flat.reshape(len(values), *shape[1:]).to(self.scene.dtype))
        return spread[0] if self.scene.site.name else self.scene.leaves.rebuild(spread, lambda v: None)


@public
def feature_ablation(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    features: Any = None,
    baseline: Any = None,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
) -> Any:
    r"""Cover one feature at a time, and note by how much the score falls.

    .. math:: a_i = f_t(x) - f_t(x \text{ without } i)

    Costs a forward for each feature, and one, shared by all targets under `vmap`.

    Args:
        params, model, x, target, layer, at, output, strict: See `gradient`.
        features: Integers from 0 with the structure of `x`, ``[...]`` for all examples or ``[batch ...]``: numbers of
            one group (a superpixel, a word) are covered together, also across tensors. Each number by itself if
            omitted.
        baseline: What is shown instead, with the structure of `x`: see `pullback.masks.covering`. Zeros if omitted.
        chunk_size: Features evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (features done, features in all).

    Returns:
        Signed, with the structure and shape of `x` or of the layer's activation, in units of the score: each number has
        what its group has.

    Raises:
        ValueError: If `features` are negative or do not broadcast to `x`.
        TypeError: If they are not integers.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> params, x = {}, torch.rand(4, 3)
        >>> torch.allclose(feature_ablation(params, model, x, 1), x * model.weight[1], atol=1e-6)
        True
    """
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)
    groups = _Features(scene, features, baseline)

    def keep(part: range) -> list[Tensor]:
        index = torch.arange(part.start, part.stop, device=scene.device)
        return [index.reshape(-1, *[1] * ids.ndim) != ids for ids in groups.ids]

    whole = scene.scores(1, lambda _, values: values).to(wide(scene.dtype))
    return groups.laid_out((whole - groups.scores(groups.count, keep, chunk_size, progress)).T)


@public
def feature_permutation(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    background: Inputs,
    features: Any = None,
    samples: int | None = None,
    seed: Seed = 0,
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
) -> Any:
    r"""Replace one feature at a time by its values in other examples, and note by how much the score falls.

    .. math:: a_i = f_t(x) - \tfrac{1}{n} \sum_{s=1}^n f_t(x \text{ with } i \text{ from } b_s)

    The other examples are an argument, so that an example's result does not depend on its batch. Costs ``n features``
    forwards, and one.

    Args:
        params, model, x, target, output, strict: See `gradient`.
        background: Examples with the structure of `x`, as many as there are.
        features: See `feature_ablation`.
        samples: Number of examples drawn from the background; each of them once if omitted.
        seed: Integer, or an integer tensor ``[]``.
        chunk_size: Replacements evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (replacements done, replacements in all).

    Returns:
        Signed, with the structure and shape of `x`, in units of the score.

    Raises:
        ValueError: If `background` does not have the shape of `x`, or `samples` is less than 1.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> x, b = torch.rand(4, 3), torch.rand(5, 3)
        >>> a = feature_permutation({}, model, x, 1, background=b)
        >>> torch.allclose(a, (x - b.mean(0)) * model.weight[1], atol=1e-6)
        True

    Reference:
        Fisher, Rudin & Dominici, All Models are Wrong, but Many are Useful, 2019, sec. 3.
    """
    scene = Scene(params, model, x, target, output=output, strict=strict)
    groups = _Features(scene, features, None)
    others = [_Features._of(background, key) for key in groups.keys]
    for other, shape in zip(others, scene.shapes, strict=True):
        if not isinstance(other, Tensor) or other.shape[1:] != shape[1:] or not len(other):
            got = list(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise ValueError(f"`background` must be examples {list(shape[1:])}, as in `x`, got {got}.")
    available = len(others[0])
    count = available if samples is None else samples
    _positive("samples", count)
    index = torch.arange(count, device=scene.device)
    rows = index if samples is None else (uniform(seed, index, (), torch.float32) * available).long()
    whole = scene.scores(1, lambda _, values: values).to(wide(scene.dtype))
    found = []
    for part in scene.parts(count * groups.count, chunk_size):
        place = torch.arange(part.start, part.stop, device=scene.device)
        group, row = place // count, rows[place % count]

        def cover(which: int, values: Tensor) -> Tensor:
            ids = groups.ids[which]
            replaced = group.reshape(-1, *[1] * ids.ndim) == ids  # noqa: B023
            return torch.where(replaced, others[which][row].unsqueeze(1).to(values.dtype), values)  # noqa: B023

        found.append(scene.scores(len(part), cover))
        report(progress, part.stop, count * groups.count)
    total = torch.cat(found).to(whole.dtype).unflatten(0, (groups.count, count)).mean(1)  # [group batch]
    return groups.laid_out((whole - total).T)


@public
def shapley_values(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    features: Any = None,
    baseline: Any = None,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
) -> Any:
    r"""Give Shapley values exactly, by all coalitions of features.

    .. math:: a_i = \sum_{S \not\ni i} \frac{|S|! \, (n - |S| - 1)!}{n!} \big( v(S \cup i) - v(S) \big)

    with v(S) the score of x where all but the features in S are covered. Attributions add up to the difference in score
    between x and the baseline. Costs :math:`2^n` forwards for n features, shared by all targets under `vmap`.

    Args:
        params, model, x, target, features, baseline, layer, at, output, strict: See `feature_ablation`.
        chunk_size: Coalitions evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (coalitions done, coalitions in all).

    Returns:
        Signed, with the structure and shape of `x` or of the layer's activation, in units of the score: each number has
        what its group has.

    Raises:
        ValueError: If there are more than 20 features.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.rand(4, 3)
        >>> a = shapley_values({}, model, x, 0)
        >>> torch.allclose(a.sum(1), model(x)[:, 0] - model(0 * x)[:, 0], atol=1e-5)
        True

    Reference:
        Shapley, A Value for n-Person Games, 1953.
    """
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)
    groups = _Features(scene, features, baseline)
    n = groups.count
    if n > 20:
        raise ValueError(
            f"`shapley_values` runs 2^n coalitions of n features, at most 20, got {n}. Group them by `features`, "
            "or use `shapley_sampling`."
        )
    every = _every_coalition(range(2**n), n, scene.device)
    values = groups.scores(2**n, lambda part: groups.kept(every[part.start : part.stop]), chunk_size, progress)
    size = every.sum(1)
    share = torch.tensor([1 / (n * math.comb(n - 1, s)) if s < n else 0.0 for s in range(n + 1)], dtype=torch.float64)
    weight = share.to(values)[size]
    found = []
    for i in range(n):
        without, with_ = (k.flatten() for k in torch.arange(2**n, device=scene.device).reshape(-1, 2, 2**i).unbind(1))
        found.append(((values[with_] - values[without]) * weight[without, None]).sum(0))
    return groups.laid_out(torch.stack(found, 1))


def _every_coalition(numbers: range, count: int, device: torch.device) -> Tensor:
    """Give the coalitions whose features are the bits of numbers, ``[number feature]``."""
    number = torch.arange(numbers.start, numbers.stop, device=device)
    return (number[:, None] >> torch.arange(count, device=device)) & 1 == 1


@public
def shapley_sampling(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    features: Any = None,
    baseline: Any = None,
    samples: int = 25,
    antithetic: bool = False,
    seed: Seed = 0,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Estimate Shapley values by showing the features one after another, in random orders.

    .. math:: a_i = \tfrac{1}{m} \sum_{\pi} \big( v(\pi_{<i} \cup i) - v(\pi_{<i}) \big)

    Unbiased; in any number of orders attributions add up to the difference in score between x and the baseline. The
    orders are the same for all examples. Costs ``samples (features - 1) + 2`` forwards, shared by all targets under
    `vmap`.

    Args:
        params, model, x, target, features, baseline, layer, at, output, strict: See `feature_ablation`.
        samples: Number of orders.
        antithetic: Make every second order the reverse of the one before, which cancels much of the error.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Coalitions evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (coalitions done, coalitions in all).
        return_info: Return ``(attribution, info)``; ``info["error"]``, shaped like the attribution, is its standard
            error, estimated from the orders (or pairs of them).

    Returns:
        Signed, with the structure and shape of `x` or of the layer's activation, in units of the score.

    Raises:
        ValueError: If `samples` is less than 1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.rand(4, 3)
        >>> a = shapley_sampling({}, model, x, 0, samples=2)
        >>> torch.allclose(a.sum(1), model(x)[:, 0] - model(0 * x)[:, 0], atol=1e-5)
        True

    Reference:
        Castro, Gómez & Tejada, Polynomial Calculation of the Shapley Value Based on Sampling, 2009.
    """
    _positive("samples", samples)
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)
    groups = _Features(scene, features, baseline)
    n = groups.count
    sample = torch.arange(samples, device=scene.device)
    ranks = _ranks(seed, sample // 2 if antithetic else sample, n)  # [sample group]
    if antithetic:
        ranks = torch.where(sample[:, None] % 2 == 1, n - 1 - ranks, ranks)

    def keep(part: range) -> list[Tensor]:
        index = torch.arange(part.start, part.stop, device=scene.device)
        inner = (index - 2).clamp(min=0)  # none, all, then all proper prefixes of each order
        prefix = ranks[inner // max(1, n - 1)] <= (inner % max(1, n - 1))[:, None]
        return groups.kept(torch.where(index[:, None] < 2, index[:, None] == 1, prefix))

    values = groups.scores(2 + samples * (n - 1), keep, chunk_size, progress)  # [coalition batch]
    ends = values[:2].unsqueeze(0).expand(samples, 2, -1)
    steps = torch.cat([ends[:, :1], values[2:].unflatten(0, (samples, n - 1)), ends[:, 1:]], 1).diff(dim=1)
    gains = torch.gather(steps, 1, ranks.unsqueeze(-1).expand(-1, -1, steps.shape[-1]))  # [sample group batch]
    attribution = groups.laid_out(gains.mean(0).T)
    if not return_info:
        return attribution
    if antithetic:
        gains = gains[: samples // 2 * 2].unflatten(0, (-1, 2)).mean(1)
    error = gains.std(0) / math.sqrt(len(gains)) if len(gains) > 1 else torch.full_like(gains[0], math.nan)
    return attribution, {"error": groups.laid_out(error.T)}


def _ranks(seed: Seed, samples: Tensor, count: int, stream: int = 0) -> Tensor:
    """Give random orders as the rank of each feature, ``[sample feature]``."""
    return uniform(seed, samples, (count,), torch.float32, stream).argsort(dim=1, stable=True).argsort(1)


@public
def kernel_shap(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    features: Any = None,
    baseline: Any = None,
    samples: int = 200,
    coalitions: Tensor | None = None,
    seed: Seed = 0,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
) -> Any:
    r"""Estimate Shapley values as the best additive model of the score over coalitions.

    .. math:: \min_a \sum_S \pi(S) \Big( v(S) - v(\emptyset) - \sum_{i \in S} a_i \Big)^2, \quad
              \pi(S) = \frac{n - 1}{\binom{n}{|S|} |S| (n - |S|)}

    under the condition that attributions add up to the difference in score between x and the baseline. With as many
    samples as there are coalitions, all are run, and the values are exact; otherwise coalitions are drawn by
    :math:`\pi`, each with its complement, and count alike. Costs `samples` forwards at most, and two.

    Args:
        params, model, x, target, features, baseline, layer, at, output, strict: See `feature_ablation`.
        samples: Number of coalitions.
        coalitions: ``[sample feature]``, boolean, to be used instead: drawn by :math:`\pi`.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Coalitions evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (coalitions done, coalitions in all).

    Returns:
        Signed, with the structure and shape of `x` or of the layer's activation, in units of the score.

    Raises:
        ValueError: If `samples` is less than 1, or `coalitions` do not fit the features.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.rand(4, 3)
        >>> torch.allclose(kernel_shap({}, model, x, 0), shapley_values({}, model, x, 0), atol=1e-5)
        True

    Reference:
        Lundberg & Lee, A Unified Approach to Interpreting Model Predictions, 2017, sec. 4.1. Covert & Lee, Improving
        KernelSHAP, 2021, for the complements.
    """
    _positive("samples", samples)
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)
    groups = _Features(scene, features, baseline)
    n = groups.count
    if coalitions is None:
        shown, weight = _weighted_coalitions(n, samples, seed, scene.device)
    else:
        shown = _checked_coalitions(coalitions, n, scene.device)
        weight = torch.ones(len(shown), dtype=torch.float64, device=scene.device)
    ends = torch.tensor([[False], [True]], device=scene.device).expand(2, n)
    run = torch.cat([ends, shown])
    values = groups.scores(len(run), lambda part: groups.kept(run[part.start : part.stop]), chunk_size, progress)
    none, whole, v, z = values[0].double(), values[1].double(), values[2:].double(), shown.double()
    # the last feature has what the others leave of the difference
    rows = z[:, :-1] - z[:, -1:]
    first = _least_squares(rows, v - none - z[:, -1:] * (whole - none), weight)  # [feature batch]
    last = whole - none - first.sum(0)
    return groups.laid_out(torch.cat([first, last[None]]).to(values.dtype).T)


def _weighted_coalitions(count: int, samples: int, seed: Seed, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give all coalitions but the first and the last with their weights, where they are few, or draw some by weight."""
    if count < 30 and 2**count - 2 <= samples:
        shown = _every_coalition(range(1, 2**count - 1), count, device)
        kernel = [0.0, *((count - 1) / (math.comb(count, s) * s * (count - s)) for s in range(1, count))]
        return shown, torch.tensor(kernel, dtype=torch.float64, device=device)[shown.sum(1)]
    sizes = torch.tensor([1 / (s * (count - s)) for s in range(1, count)], dtype=torch.float64, device=device)
    sample = torch.arange(samples, device=device)
    drawn_ = uniform(seed, sample // 2, (1,), torch.float64, stream=1)
    size = 1 + (drawn_ > sizes.cumsum(0) / sizes.sum()).sum(1, keepdim=True).clamp(max=count - 2)
    shown = (_ranks(seed, sample // 2, count) < size) ^ (sample[:, None] % 2 == 1)
    return shown, torch.ones(samples, dtype=torch.float64, device=device)


def _least_squares(rows: Tensor, values: Tensor, weight: Tensor, ridge: float = 0.0) -> Tensor:
    """Solve weighted least squares ``[sample feature]``, ``[sample batch]`` -> ``[feature batch]``."""
    weighted = rows * weight[:, None]
    gram = weighted.T @ rows
    if ridge:
        gram = gram + ridge * eye(len(gram), gram)
    return torch.linalg.pinv(gram, hermitian=True) @ (weighted.T @ values)


def _checked_coalitions(coalitions: Tensor, count: int, device: torch.device) -> Tensor:
    if coalitions.ndim != 2 or coalitions.shape[1] != count:
        raise ValueError(f"`coalitions` must be [sample {count}], a column a feature, got {list(coalitions.shape)}.")
    return coalitions.to(device) != 0


@public
def lime(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    features: Any = None,
    baseline: Any = None,
    samples: int = 200,
    width: float = 0.25,
    ridge: float = 1.0,
    coalitions: Tensor | None = None,
    seed: Seed = 0,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Fit a linear model to the score over coalitions of features, those near the whole input counting most.

    .. math:: \min_{a, c} \sum_s w_s \Big( v(z_s) - c - z_s \cdot a \Big)^2 + \lambda \|a\|^2, \quad
              w_s = e^{-d(z_s)^2 / 2 \omega^2}

    where each feature is shown with probability 1/2, and d is the cosine distance between z and the coalition of all,
    :math:`1 - \sqrt{|z| / n}`. Costs `samples` forwards, shared by all targets under `vmap`.

    Args:
        params, model, x, target, features, baseline, layer, at, output, strict: See `feature_ablation`.
        samples: Number of coalitions.
        width: Of the kernel :math:`\omega`; infinite for equal weights.
        ridge: Weight of the penalty :math:`\lambda`; 0 for least squares.
        coalitions: ``[sample feature]``, boolean, to be used instead of random ones.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Coalitions evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (coalitions done, coalitions in all).
        return_info: Return ``(attribution, info)``; ``info["intercept"]`` and ``info["fit"]``, the weighted share of
            variance explained, are ``[batch]``.

    Returns:
        The coefficient of each feature, with the structure and shape of `x` or of the layer's activation, in units of
        the score.

    Raises:
        ValueError: If `samples` is less than 1, `width` not positive, `ridge` negative, or `coalitions` do not fit.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> x = torch.rand(4, 3)
        >>> torch.allclose(lime({}, model, x, 0, ridge=0.0), x * model.weight[0], atol=1e-5)
        True

    Reference:
        Ribeiro, Singh & Guestrin, "Why Should I Trust You?", 2016, sec. 3. The width and the penalty are those of the
        authors' code for images.
    """
    _positive("samples", samples)
    if not width > 0:
        raise ValueError(f"`width` must be positive, got {width}.")
    if not ridge >= 0:
        raise ValueError(f"`ridge` must be at least 0, got {ridge}.")
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)
    groups = _Features(scene, features, baseline)
    n = groups.count
    if coalitions is None:
        sample = torch.arange(samples, device=scene.device)
        shown = uniform(seed, sample, (n,), torch.float32) < 0.5
    else:
        shown = _checked_coalitions(coalitions, n, scene.device)
    values = groups.scores(len(shown), lambda part: groups.kept(shown[part.start : part.stop]), chunk_size, progress)
    z, v = shown.double(), values.double()
    weight = torch.exp(-((1 - (z.sum(1) / n).sqrt()) ** 2) / (2 * width**2))
    share = weight / weight.sum()
    middle, mean = share @ z, share @ v
    a = _least_squares(z - middle, v - mean, weight, ridge)  # [feature batch]
    attribution = groups.laid_out(a.to(values.dtype).T)
    if not return_info:
        return attribution
    left = share @ (v - mean - (z - middle) @ a).square()
    spread = share @ (v - mean).square()
    fit = 1 - left / torch.where(spread == 0, torch.ones_like(spread), spread)
    return attribution, {"intercept": (mean - middle @ a).to(scene.dtype), "fit": fit.to(scene.dtype)}


# -- detections


def similar_detections(box: Tensor, probabilities: Tensor, *, objectness: bool = True) -> Callable[[Tensor], Tensor]:
    r"""Make a target of one detection: how well the best of the model's proposals matches it.

    .. math:: s = \max_j \, \mathrm{IoU}(b, b_j) \cdot \cos(p, p_j) \cdot o_j

    With `rise` this is D-RISE.

    Args:
        box: ``[4]``: left, top, right, bottom; or ``[batch 4]``.
        probabilities: Of the classes, ``[class]`` or ``[batch class]``.
        objectness: The proposals have it.

    Returns:
        A function from proposals ``[batch proposal 4 + 1 + class]`` (without the 1 if not `objectness`) to scores
        ``[batch]`` in [0, 1], to be given as `target`. Where the batch is repeated, so are the detections.

    Example:
        >>> proposals = torch.tensor([[[0.0, 0, 2, 2, 1, 0, 1], [1.0, 0, 3, 2, 1, 0, 1]]])
        >>> score = similar_detections(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 1.0]))
        >>> score(proposals).tolist()
        [1.0]

    Reference:
        Petsiuk et al., Black-box Explanation of Object Detectors via Saliency Maps, 2021, sec. 3.2.
    """
    if box.shape[-1:] != (4,):
        raise ValueError(f"`box` must be [4] or [batch 4], got {list(box.shape)}.")

    def best_match(proposals: Tensor) -> Tensor:
        def rows(v: Tensor) -> Tensor:
            v = v.to(proposals).reshape(-1, 1, v.shape[-1])
            return v.repeat(len(proposals) // len(v), 1, 1)

        wanted, classes = rows(box), rows(probabilities)
        boxes, found = proposals[..., :4], proposals[..., 4 + objectness :]
        low, high = torch.maximum(boxes[..., :2], wanted[..., :2]), torch.minimum(boxes[..., 2:], wanted[..., 2:])
        common = (high - low).clamp(min=0).prod(-1)
        areas = [(b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (boxes, wanted)]
        overlap = common / (areas[0] + areas[1] - common).clamp(min=1e-12)
        likeness = torch.cosine_similarity(found, classes, dim=-1)
        certainty = proposals[..., 4] if objectness else torch.ones_like(overlap)
        return (overlap * likeness * certainty).amax(1)

    return best_match
