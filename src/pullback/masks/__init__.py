"""Masks: where to cover an input, and with what. 1 keeps, 0 covers.

*Where*: windows that slide (`windows`), random grids that are shifted (`grid_masks`), smooth masks that few parameters
draw (`smooth_masks`), superpixels (`superpixels`, `cells`). *With what*: a constant, the mean of each channel, a blur
(`fill`), or a pyramid from the blurred or faded image to the image itself (`pyramid`, `blended`).

Masks over images ``[batch channel height width]`` are ``[mask 1 height width]``; one and three spatial axes likewise.
"""

from __future__ import annotations

from pullback.masks._covering import Fill as Fill
from pullback.masks._covering import blended as blended
from pullback.masks._covering import fill as fill
from pullback.masks._covering import pyramid as pyramid
from pullback.masks._grids import cells as cells
from pullback.masks._grids import grid_masks as grid_masks
from pullback.masks._grids import smooth_grid as smooth_grid
from pullback.masks._grids import superpixels as superpixels
from pullback.masks._grids import windows as windows
from pullback.masks._smooth import plain_smooth_masks as plain_smooth_masks
from pullback.masks._smooth import smooth_masks as smooth_masks

__all__ = [
    # where to cover
    "windows",
    "cells",
    "superpixels",
    "grid_masks",
    "smooth_grid",
    "smooth_masks",
    "plain_smooth_masks",
    # what to show there
    "Fill",
    "fill",
    "pyramid",
    "blended",
]
