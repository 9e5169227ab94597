"""Drawing maps: what the colours mean, what is taken, how a grid is laid out."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pullback import plot


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


GREY = np.full((8, 8, 3), 0.5)


def test_a_map_of_zeros_shows_the_photograph_in_grey():
    photograph = np.random.default_rng(0).random((8, 8, 3))
    got = plot.overlay(photograph, np.zeros((8, 8)))
    assert np.ptp(got, axis=-1).max() < 0.02
    grey = photograph @ [0.299, 0.587, 0.114]
    assert np.corrcoef(got[..., 0].ravel(), grey.ravel())[0, 1] > 0.999


def test_larger_values_are_brighter():
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    brightness = plot.overlay(GREY, ramp).sum(-1).ravel()
    assert (np.diff(brightness) >= 0).all()


def test_signed_maps_are_centred_at_zero():
    map = np.zeros((8, 8))
    map[0, 0], map[0, 1], map[0, 2] = 1.0, -1.0, 0.5
    colours = plot.overlay(GREY, map)
    red, blue = colours[..., 0], colours[..., 2]
    assert red[0, 0] > blue[0, 0]
    assert red[0, 1] < blue[0, 1]
    assert red[1, 1] == blue[1, 1]
    # without negative values the map is not signed, unless told
    assert not np.allclose(plot.overlay(GREY, abs(map)), plot.overlay(GREY, abs(map), signed=True))
    assert np.allclose(plot.overlay(GREY, -map, signed=True), plot.overlay(GREY, -map))


def test_the_limit_saturates():
    map = np.linspace(0, 2, 64).reshape(8, 8)
    assert np.allclose(plot.overlay(GREY, map, limit=1.0), plot.overlay(GREY, map.clip(max=1), limit=1.0))
    assert np.allclose(plot.overlay(GREY, map), plot.overlay(GREY, 10 * map))


def test_what_is_not_finite_stands_out():
    map = np.ones((8, 8))
    map[0, 0], map[0, 1] = np.nan, np.inf
    colours = plot.overlay(GREY, map)
    assert (colours[0, :2] == plot.NOT_FINITE).all()
    assert np.isfinite(colours).all()
    assert np.isfinite(plot.overlay(GREY, np.full((8, 8), np.nan))).all()


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(3, 6, 5),
        torch.rand(1, 3, 6, 5),
        torch.rand(1, 6, 5),
        torch.rand(6, 5),
        np.random.default_rng(0).random((6, 5, 3)),
        np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8),
        torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8),
    ],
)
@pytest.mark.parametrize(
    "map",
    [torch.rand(1, 1, 3, 2), torch.rand(6, 5, requires_grad=True), np.ones((1, 2, 2)), torch.rand(2, 2).bfloat16()],
)
def test_forms_of_image_and_map(image, map):
    colours = plot.overlay(image, map)
    assert colours.shape == (6, 5, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (8,), (0, 3)])
def test_maps_that_cannot_be_drawn(shape):
    with pytest.raises(ValueError, match=r"`map` must be \[height width\], got shape"):
        plot.overlay(GREY, np.zeros(shape))


@pytest.mark.parametrize("shape", [(5, 6, 7), (2, 3, 8, 8), (8,)])
def test_images_that_cannot_be_drawn(shape):
    with pytest.raises(ValueError, match=r"`image` must be .* with 1 or 3 channels, got shape"):
        plot.overlay(np.zeros(shape), np.zeros((8, 8)))


def test_limit_and_opacity_are_checked():
    for limit in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`limit` must be above 0"):
            plot.overlay(GREY, np.eye(8), limit=limit)
        with pytest.raises(ValueError, match="`limit` must be above 0"):
            plot.plot(np.eye(8), limit=limit)
    for opacity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="`opacity` must be from 0 to 1"):
            plot.overlay(GREY, np.eye(8), opacity=opacity)
    assert np.allclose(plot.overlay(GREY, np.eye(8), opacity=0), plot.overlay(GREY, np.zeros((8, 8)), opacity=0))


def test_one_scale_for_several_maps():
    _, (left, right) = plt.subplots(1, 2)
    for ax, map in ((left, np.eye(4)), (right, np.eye(4) / 2)):
        plot.plot(map, ax=ax, limit=1.0)
    one, half = (np.asarray(ax.images[0].get_array())[0, 0] for ax in (left, right))
    assert one[:3].sum() > half[:3].sum()
    signed = plot.plot(-np.eye(4), ax=left, signed=True).images[-1].get_array()
    assert signed[0, 0, 2] > signed[0, 0, 0]  # against: blue


def test_plot_draws_where_it_is_told():
    _, (left, right) = plt.subplots(1, 2)
    assert plot.plot(torch.rand(4, 4), ax=left, title="alone") is left
    assert left.get_title() == "alone"
    assert np.asarray(left.images[0].get_array()).shape == (4, 4, 4)
    assert plot.plot(torch.rand(4, 4), GREY, ax=right, colorbar=False) is right
    assert np.asarray(right.images[0].get_array()).shape == (8, 8, 3)
    plt.figure()
    assert plot.plot(np.eye(4)) is plt.gca()


def boxes(figure):
    """Where each text and each axes stands on the canvas, in pixels."""
    figure.canvas.draw()
    found = []
    for ax in figure.axes:
        found.append(ax.get_window_extent())
        found += [text.get_window_extent() for text in (ax.title, ax.yaxis.label) if text.get_text()]
        if ax.get_yticks().size:
            found += [label.get_window_extent() for label in ax.get_yticklabels()]
    return found


@pytest.mark.parametrize(("methods", "targets"), [(1, 1), (1, 3), (2, 1), (4, 5), (2, 10)])
def test_nothing_overlaps_or_leaves_the_canvas(methods, targets):
    names = ["integrated_gradients\nfeatures.denseblock4.denselayer16.conv2", "grad_cam", "rise", "lrp"]
    titles = ["oystercatcher, oyster catcher\n143 · 0.1%", "ox\n345 · <0.1%"] * 5
    rows = {name: np.random.default_rng(0).standard_normal((targets, 7, 7)) * 1e-7 for name in names[:methods]}
    predictions = [("a class with quite a long name indeed, and then some", 0.999), ("ox", 0.0)]
    figure = plot.grid(np.ones((50, 50, 3)), rows, titles[:targets], predictions=predictions, title="a_long_name" * 4)
    assert len(figure.axes) == 1 + methods * (targets + 1) + (methods > 1)
    found = boxes(figure)
    width, height = figure.canvas.get_width_height()
    for box in found:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    for i, one in enumerate(found):
        for other in found[:i]:
            across = min(one.x1, other.x1) - max(one.x0, other.x0)
            down = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert across < 1 or down < 1, (one, other)


def test_a_row_shares_one_scale():
    maps = np.stack([np.full((8, 8), 1.0), np.full((8, 8), 0.5)])
    figure = plot.grid(GREY, {"a": maps, "b": -maps}, ["one", "two"])
    one, two = (np.asarray(ax.images[0].get_array()) for ax in figure.axes[1:3])
    assert one.sum() > two.sum()
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["0", "1"]
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == ["-1", "0", "1"]


def test_grids_that_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"`rows\['a'\]` must hold a map for each of the 2 `columns`, got 1"):
        plot.grid(GREY, {"a": [np.eye(4)]}, ["one", "two"])
    with pytest.raises(ValueError, match="needs a row and a column"):
        plot.grid(GREY, {}, ["one"])


def test_inputs_are_left_alone():
    image, map = torch.rand(3, 8, 8), torch.rand(8, 8)
    copies = image.clone(), map.clone()
    plot.grid(image, {"a": [map]}, ["one"])
    assert torch.equal(image, copies[0])
    assert torch.equal(map, copies[1])


def test_missing_matplotlib_is_said(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pullback.plot")
    with pytest.raises(ImportError, match=r"pip install 'pullback\[plot\]'"):
        importlib.import_module("pullback.plot")
