"""Look at maps: over the photograph they explain, one at a time or methods against targets.

Two kinds of map read differently, and are drawn so that neither can be taken for the other:

- a map that is nowhere negative (Grad-CAM, the size of a gradient) runs from transparent to bright on one perceptual
  colour map, whose lightness rises with the value;
- a signed map (integrated gradients) is centred at zero: red speaks for the target, blue against it.

The photograph, in grey, stays legible where the map is small. Tensors and NumPy arrays are
taken alike, with or without leading axes of size one. Needs matplotlib: ``pip install 'pullback[plot]'``.

Example:
    >>> import numpy as np
    >>> image, map = np.full((8, 8, 3), 0.5), np.eye(4)
    >>> overlay(image, map).shape == image.shape  # the map is resized to the image
    True
    >>> figure = grid(image, {"a method": [map, -map]}, ["one class", "another class"])
    >>> len(figure.axes) == 1 + 2 + 1  # the photograph, a panel for each class, a colour bar
    True
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from pullback import maps as _maps

try:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
except ImportError as error:
    raise ImportError("`pullback.plot` needs matplotlib: pip install 'pullback[plot]'") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["grid", "overlay", "plot"]

Array: TypeAlias = "torch.Tensor | np.ndarray"

SEQUENTIAL = "inferno"
DIVERGING = "coolwarm"
NOT_FINITE = (1.0, 0.0, 1.0)


def overlay(
    image: Array, map: Array, *, signed: bool | None = None, limit: float | None = None, opacity: float = 1.0
) -> np.ndarray:
    """Lay a map over an image.

    Args:
        image: ``[height width channel]`` or ``[channel height width]``, 1 or 3 channels, or ``[height width]``;
            integers from 0 to 255 or floats from 0 to 1.
        map: ``[height width]``, resized to the image.
        signed: Centre the colours at zero. If omitted, when the map has negative values.
        limit: Value at the end of the colours; larger ones are drawn as this one. If omitted, the largest
            magnitude, or the 99.5th percentile of many, so that a few outliers do not take all the contrast.
        opacity: Of the map where it reaches `limit`, from 0 to 1.

    Returns:
        Colours ``[height width 3]`` from 0 to 1. Values that are not finite come out in magenta.

    Raises:
        ValueError: If the shapes are not those above, `limit` is not above 0 or `opacity` not from 0 to 1.

    Example:
        >>> image, map = np.full((8, 8, 3), 0.5), np.eye(8)
        >>> colours = overlay(image, map - np.eye(8)[::-1])  # one diagonal for, the other against
        >>> bool(colours[0, 0, 0] > colours[0, 0, 2] and colours[0, 7, 0] < colours[0, 7, 2])  # red, blue
        True
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"`opacity` must be from 0 to 1, got {opacity}.")
    photograph = _image(image)
    values = _resized(_map(map), photograph.shape[:2])
    signed = _is_signed(values) if signed is None else signed
    limit = _limit(values) if limit is None else _checked(limit)
    finite = np.where(np.isfinite(values), values, 0.0)
    colour = _colours(signed, limit).to_rgba(finite)[..., :3]
    grey = photograph @ np.array([0.299, 0.587, 0.114])
    if signed:  # colours on a pale photograph
        paper = (0.35 + 0.6 * grey)[..., None]
        strength = np.clip(np.abs(finite) / limit, 0, 1)[..., None]
        mixed = paper + opacity * np.sqrt(strength) * (colour - paper)
    else:  # light on a dark one: black, where the colours start, adds nothing
        mixed = 1 - (1 - 0.5 * grey[..., None]) * (1 - opacity * colour)
    return np.where(np.isfinite(values)[..., None], mixed, NOT_FINITE)


def plot(
    map: Array,
    image: Array | None = None,
    *,
    ax: Axes | None = None,
    title: str = "",
    signed: bool | None = None,
    limit: float | None = None,
    colorbar: bool = True,
) -> Axes:
    """Draw one map, over an image where one is given.

    Maps are drawn on one scale where they are given one `limit`, and otherwise each on its own.

    Args:
        map: ``[height width]``; axes of size one before these are dropped.
        image: See `overlay`. If omitted, the map is drawn on its own.
        ax: Where to draw. Matplotlib's current axes if omitted.
        title: Above the map.
        signed, limit: See `overlay`.
        colorbar: Draw the scale beside it.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: See `overlay`.

    Example:
        >>> from matplotlib.figure import Figure
        >>> left, right = Figure().subplots(1, 2)
        >>> plot(np.eye(4), ax=left, title="alone") is left
        True
        >>> plot(np.eye(4), np.ones((8, 8, 3)), ax=right).images[0].get_array().shape == (8, 8, 3)
        True
    """
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.gca()
    values = _map(map)
    signed = _is_signed(values) if signed is None else signed
    limit = _limit(values) if limit is None else _checked(limit)
    colours = _colours(signed, limit)
    if image is None:
        ax.imshow(colours.to_rgba(values), interpolation="nearest")
    else:
        ax.imshow(overlay(image, values, signed=signed, limit=limit))
    _bare(ax)
    ax.set_title(title)
    if colorbar:
        ax.figure.colorbar(colours, ax=ax, fraction=0.046, pad=0.04)
    return ax


def grid(
    image: Array,
    rows: Mapping[str, Sequence[Array] | Array],
    columns: Sequence[str],
    *,
    predictions: Sequence[tuple[str, float]] = (),
    title: str = "",
    size: float = 2.1,
    figure: Figure | None = None,
) -> Figure:
    """Draw methods against targets: the photograph, then a row for each method with a panel for each target.

    All panels of a row share one scale, shown at its right end, so that targets can be compared. Rows cannot be, as
    methods differ in unit.

    Args:
        image: See `overlay`.
        rows: From the name of a method to its maps ``[target height width]``.
        columns: Titles of the targets.
        predictions: Classes and their probabilities, drawn as bars under the photograph when there is a second row.
        title: Of the photograph.
        size: Width of a panel in inches.
        figure: Where to draw; it is resized to fit. A new pyplot figure if omitted.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no row or no column, a row has not one map for each column, or the shapes are not those
            of `overlay`.

    Example:
        >>> rows = {"gradient": torch.randn(3, 8, 8), "grad_cam": torch.rand(3, 4, 4)}
        >>> figure = grid(np.ones((8, 8, 3)), rows, ["cat", "dog", "fox"])
        >>> len(figure.axes) == 1 + 2 * (3 + 1)
        True
    """
    photograph = _image(image)
    table = {name: [_map(map) for map in maps] for name, maps in rows.items()}
    if not table or not columns:
        raise ValueError(f"A grid needs a row and a column, got {len(table)} rows and {len(columns)} `columns`.")
    for name, maps in table.items():
        if len(maps) != len(columns):
            raise ValueError(
                f"`rows[{name!r}]` must hold a map for each of the {len(columns)} `columns`, got {len(maps)}."
            )
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure()

    # Everything is placed in inches from the top left corner, so that no number of rows or columns makes text collide.
    headings = [_wrapped(column, width=int(size * 11), lines=3) for column in columns]
    head = 0.12 + 0.17 * max(2, *(heading.count("\n") + 1 for heading in headings))
    label, gap, bar, ticks, margin = 0.5, 0.08, 0.1, 0.62, 0.12
    height = size * photograph.shape[0] / photograph.shape[1]
    left = margin + size + label
    total_width = left + len(columns) * (size + gap) + bar + ticks
    total_height = head + len(table) * (height + gap) + margin
    figure.set_size_inches(total_width, total_height)

    def axes(x: float, y: float, width: float, height: float) -> Axes:
        box = (x / total_width, 1 - (y + height) / total_height, width / total_width, height / total_height)
        return figure.add_axes(box)

    photo = axes(margin, head, size, height)
    photo.imshow(photograph)
    photo.set_title(_wrapped(title, width=int(size * 11), lines=2), fontsize=9)
    _bare(photo)
    if predictions and len(table) > 1:
        _bars(axes(margin, head + height + gap, size, height), predictions)
    for i, (name, maps) in enumerate(table.items()):
        top = head + i * (height + gap)
        everything = np.concatenate([map.ravel() for map in maps])
        signed, limit = _is_signed(everything), _limit(everything)
        for j, map in enumerate(maps):
            ax = axes(left + j * (size + gap), top, size, height)
            ax.imshow(overlay(photograph, map, signed=signed, limit=limit))
            _bare(ax)
            if i == 0:
                ax.set_title(headings[j], fontsize=9)
            if j == 0:
                ax.set_ylabel(_wrapped(name, width=int(height * 12), lines=2), fontsize=9)
        scale = axes(left + len(maps) * (size + gap), top + 0.06 * height, bar, 0.88 * height)
        _scale(figure, scale, signed, limit)
    return figure


def _bars(ax: Axes, predictions: Sequence[tuple[str, float]]) -> None:
    """Horizontal bars of probability, the name above each."""
    places = range(len(predictions))
    ax.barh(places, [p for _, p in predictions], height=0.28, color="0.45")
    for place, (name, p) in zip(places, predictions, strict=True):
        ax.text(0, place - 0.24, _shortened(name, 30), fontsize=7.5, va="bottom")
        ax.text(p + 0.015, place, f"{p:.1%}", fontsize=7, va="center", color="0.3")
    ax.set_xlim(0, 1.16)
    ax.set_ylim(max(len(predictions), 5) - 0.5, -0.9)
    _bare(ax)


def _scale(figure: Figure, ax: Axes, signed: bool, limit: float) -> None:
    ticks = [-limit, 0, limit] if signed else [0, limit]
    bar = figure.colorbar(_colours(signed, limit), cax=ax, ticks=ticks)
    bar.set_ticklabels([f"{tick:.2g}" for tick in ticks])
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _colours(signed: bool, limit: float) -> ScalarMappable:
    name = DIVERGING if signed else SEQUENTIAL
    return ScalarMappable(Normalize(-limit if signed else 0.0, limit), matplotlib.colormaps[name])


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _wrapped(text: str, width: int, lines: int) -> str:
    """At most so many lines, of at most so many characters; a line break in the text stays one."""
    parts = text.split("\n")
    spare = lines - len(parts)
    wrapped = []
    for part in parts:
        pieces = textwrap.wrap(part, width) if spare > 0 else [part]
        pieces = pieces if len(pieces) - 1 <= spare else [*pieces[:spare], " ".join(pieces[spare:])]
        spare -= max(len(pieces) - 1, 0)
        wrapped += [_shortened(piece, width) for piece in pieces]
    return "\n".join(wrapped[:lines])


def _shortened(text: str, width: int) -> str:
    """With the middle left out: what tells long names apart often stands at the end."""
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - half].rstrip()}…{text[-half:].lstrip()}"


def _numpy(array: Array) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().to("cpu", torch.float64 if array.is_floating_point() else array.dtype).numpy()
    return np.asarray(array)


def _map(map: Array) -> np.ndarray:
    """Values ``[height width]`` in float64."""
    values = _numpy(map)
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(
            f"`map` must be [height width], got shape {tuple(_numpy(map).shape)}. "
            "Reduce channels first, with `pullback.maps.channel_sum` or `channel_peak`; choose one example and target."
        )
    return values.astype(np.float64)


def _image(image: Array) -> np.ndarray:
    """Colours ``[height width 3]`` from 0 to 1."""
    values = _numpy(image)
    while values.ndim > 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3 and values.shape[-1] not in (1, 3) and values.shape[0] in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[-1] not in (1, 3):
        raise ValueError(
            f"`image` must be [height width channel] or [channel height width] with 1 or 3 channels, "
            f"got shape {tuple(_numpy(image).shape)}."
        )
    values = values / 255 if np.issubdtype(values.dtype, np.integer) else values.astype(np.float64)
    return np.broadcast_to(np.clip(values, 0, 1), (*values.shape[:2], 3))


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if values.shape == size:
        return values
    return _maps.resize(torch.from_numpy(values)[None, None], size)[0, 0].numpy()


def _is_signed(values: np.ndarray) -> bool:
    return bool((values < 0).any())


def _checked(limit: float) -> float:
    if not (np.isfinite(limit) and limit > 0):
        raise ValueError(f"`limit` must be above 0: it is the value at the end of the colours; got {limit}.")
    return float(limit)


def _limit(values: np.ndarray) -> float:
    magnitudes = np.abs(values[np.isfinite(values)])
    if not magnitudes.size:
        return 1.0
    outliers = 0.5 if magnitudes.size >= 64 * 64 else 0.0
    return float(np.percentile(magnitudes, 100 - outliers) or magnitudes.max() or 1.0)
