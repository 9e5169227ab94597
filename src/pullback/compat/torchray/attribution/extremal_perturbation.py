r"""Extremal perturbations: the smooth mask of a given area that raises the score most.

    masks, history = extremal_perturbation(model, x, target, areas=[0.1, 0.2])

The pure function is `pullback.extremal_perturbation`, for any number of images and targets at once.

.. math:: m_a = \arg\max_{m \,:\, |m| = a} f_t(m \otimes x)

Reference:
    Fong, Patrick & Vedaldi, Understanding Deep Networks via Extremal Perturbations and Smooth Masks, 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback._core.call import Call
from pullback._core.entry import public
from pullback._core.modules import params_of
from pullback.attribution.perturbation._optimise import optimised_masks
from pullback.compat.torchray._arguments import ArgumentError
from pullback.compat.torchray.attribution.common import resize_saliency
from pullback.compat.torchray.utils import imsmooth
from pullback.masks import blended, pyramid, smooth_grid, smooth_masks
from pullback.rules._coordinates import stop_gradient

__all__ = [
    "BLUR_PERTURBATION",
    "contrastive_reward",
    "DELETE_VARIANT",
    "DUAL_VARIANT",
    "extremal_perturbation",
    "FADE_PERTURBATION",
    "Perturbation",
    "PRESERVE_VARIANT",
    "simple_reward",
]

BLUR_PERTURBATION = "blur"
FADE_PERTURBATION = "fade"
PRESERVE_VARIANT = "preserve"
DELETE_VARIANT = "delete"
DUAL_VARIANT = "dual"

_VARIANTS = (PRESERVE_VARIANT, DELETE_VARIANT, DUAL_VARIANT)


# -- perturbations and masks


class Perturbation:
    """Steps from a perturbed image to the image itself, and masks that choose among them.

    Args:
        input: ``[1 channel height width]``.
        num_levels: Number of steps.
        max_blur: Standard deviation of the strongest blur, in pixels.
        type: ``"blur"``, with zeros beyond the border, or ``"fade"`` to zero.

    Attributes:
        pyramid: ``[level channel height width]``, the strongest first, the image last.
    """

    def __init__(self, input: Tensor, num_levels: int = 8, max_blur: float = 20, type: str = BLUR_PERTURBATION) -> None:
        if input.ndim != 4 or input.shape[0] != 1:
            raise ArgumentError(f"`input` must be one image, [1 channel height width], got {list(input.shape)}.")
        if type not in (BLUR_PERTURBATION, FADE_PERTURBATION):
            raise ArgumentError(f"`type` must be 'blur' or 'fade', got {type!r}.")
        self.type, self.num_levels, self.max_blur = type, num_levels, max_blur
        self.pyramid = pyramid(input.detach(), type, levels=num_levels, max_blur=max_blur)[:, 0]

    def apply(self, mask: Tensor) -> Tensor:
        """Show the image through masks ``[mask 1 height width]``, 1 showing it: ``[mask channel height width]``."""
        return blended(self.pyramid.unsqueeze(1), mask)

    def to(self, dev: Any) -> Perturbation:
        """Move the steps to a device or type."""
        self.pyramid = self.pyramid.to(dev)
        return self

    def __str__(self) -> str:
        return f"Perturbation(type={self.type!r}, num_levels={self.num_levels}, max_blur={self.max_blur})"


class MaskGenerator:
    """Draw smooth masks from a coarse grid of parameters: see `pullback.masks.smooth_masks`.

    Args:
        shape: (height, width) of the masks.
        step: Pixels from parameter to parameter.
        sigma: Width of the kernel in pixels.
        clamp: To [0, 1].
        pooling_method: ``"softmax"``, ``"sum"`` or ``"sigmoid"``.
    """

    def __init__(
        self, shape: Sequence[int], step: int, sigma: float, clamp: bool = True, pooling_method: str = "softmax"
    ) -> None:
        self.shape, self.step, self.sigma = tuple(shape), int(step), sigma
        self.clamp, self.pooling_method, self.coldness = clamp, pooling_method, 20.0
        self.margin = sigma
        self.padding, self.radius = 1 + math.ceil(2 * sigma / step), 1 + math.ceil(sigma / step)
        self.shape_in = smooth_grid(self.shape, self.step)
        self.shape_mid = tuple(n + 2 * self.padding - 2 * self.radius for n in self.shape_in)
        self.shape_up = tuple(self.step * n for n in self.shape_mid)
        self.shape_out = tuple(n - self.step + 1 for n in self.shape_up)

    def generate(self, mask_in: Tensor) -> tuple[Tensor, Tensor]:
        """Give the masks of parameters ``[mask 1 *shape_in]``, and the larger ones that they are cut from."""
        return smooth_masks(
            mask_in,
            self.shape,
            step=self.step,
            sigma=self.sigma,
            pooling=self.pooling_method,
            coldness=self.coldness,
            clamp=self.clamp,
        )

    def to(self, dev: Any) -> MaskGenerator:
        """Do nothing: masks are drawn where their parameters are."""
        return self


# -- rewards


def _by_variant(reward: Tensor, variant: str) -> Tensor:
    if variant not in _VARIANTS:
        raise ArgumentError(f"`variant` must be one of {', '.join(map(repr, _VARIANTS))}, got {variant!r}.")
    if variant == DUAL_VARIANT:
        half = len(reward) // 2
        return reward[:half] - reward[half:]
    return -reward if variant == DELETE_VARIANT else reward


def simple_reward(activation: Tensor, target: Any, variant: str) -> Tensor:
    """Give the score of a class; less for ``"delete"``; the first half less the second half for ``"dual"``."""
    return _by_variant(activation[:, int(target)], variant)


def contrastive_reward(activation: Tensor, target: Any, variant: str) -> Tensor:
    """Give the score of a class less the highest of the others.

    As in TorchRay every score meets the highest of every sample, ``[mask mask ...]``: the sum of its means over rows,
    which is what is climbed, is right; a single row, as the history keeps it, has the mean score of all masks.
    """
    if variant == DUAL_VARIANT:
        shown, rest = activation.chunk(2)
        return contrastive_reward(shown, target, PRESERVE_VARIANT) - contrastive_reward(rest, target, PRESERVE_VARIANT)
    target = int(target)
    others = torch.cat((activation[:, :target], activation[:, target + 1 :]), 1)
    return _by_variant(activation[:, target] - others.amax(1, keepdim=True), variant)


# -- the method


@public
def extremal_perturbation(
    model: nn.Module,
    input: Tensor,
    target: Any,
    areas: float | Sequence[float] = (0.1,),
    perturbation: str = BLUR_PERTURBATION,
    max_iter: int = 800,
    num_levels: int = 8,
    step: int = 7,
    sigma: float = 21,
    jitter: bool = True,
    variant: str = PRESERVE_VARIANT,
    print_iter: int | None = None,
    debug: bool = False,
    reward_func: Callable[..., Tensor] = simple_reward,
    resize: Any = False,
    resize_mode: str = "bilinear",
    smooth: float = 0,
) -> tuple[Tensor, Tensor]:
    """Find the masks of given areas that raise the score most.

    The model is run in eval mode on a copy of its structure; its parameters stay as they are.

    Args:
        model: A module.
        input: One image, ``[1 channel height width]``.
        target: Class index.
        areas: Fractions of the image.
        perturbation: ``"blur"`` or ``"fade"``.
        max_iter: Steps of gradient ascent.
        num_levels: Steps from the strongest perturbation to the image.
        step, sigma: Of the masks: see `MaskGenerator`.
        jitter: Mirror the perturbed image in every other iteration.
        variant: ``"preserve"`` shows what the mask covers, ``"delete"`` all but that, ``"dual"`` compares the two.
        print_iter: Print iteration and rewards every so often.
        debug: Print the settings.
        reward_func: ``reward_func(output, target, variant=variant)`` gives a reward for each mask.
        resize, resize_mode: Of the masks: see `common.resize_saliency`.
        smooth: Standard deviation of a Gaussian, as a fraction of the shorter side, with zeros beyond the border.

    Returns:
        Masks ``[area 1 height width]``, and the history ``[area 2 iteration]`` on the CPU: reward, area's term.
    """
    if variant not in _VARIANTS:
        raise ArgumentError(f"`variant` must be one of {', '.join(map(repr, _VARIANTS))}, got {variant!r}.")
    if max_iter < 1:
        raise ArgumentError(f"`max_iter` must be at least 1, got {max_iter}.")
    fractions = torch.as_tensor([areas] if isinstance(areas, int | float) else areas, dtype=input.dtype)
    steps = Perturbation(input, num_levels, type=perturbation)
    params = params_of(model)
    if isinstance(target, Tensor | list | tuple) and len(torch.as_tensor(target).reshape(-1)) == 1:
        target = int(torch.as_tensor(target))
    if debug:
        print(f"extremal_perturbation: {steps}, areas {fractions.tolist()}, variant {variant!r}, {max_iter} iterations")

    def reward(masks: Tensor, iteration: int) -> Tensor:
        shown = {PRESERVE_VARIANT: [masks], DELETE_VARIANT: [1 - masks], DUAL_VARIANT: [masks, 1 - masks]}[variant]
        x = torch.cat([steps.apply(mask) for mask in shown])
        y = Call.bind(params, model, x.flip(-1) if jitter and iteration % 2 == 0 else x).forward()
        rewards = reward_func(y, target, variant=variant).reshape(len(masks), -1).mean(1)
        if print_iter is not None and iteration % print_iter == 0:
            print(
                f"[{iteration + 1:04d}/{max_iter:04d}] reward {[one.item() for one in stop_gradient(rewards.detach())]}"
            )
        return rewards

    masks, history = optimised_masks(
        reward,
        input.shape[2:],
        fractions.to(input.device),
        step=int(step),
        sigma=sigma,
        iterations=max_iter,
    )
    masks = resize_saliency(input, masks.detach(), resize, resize_mode)
    if smooth > 0:
        masks = imsmooth(masks, sigma=smooth * min(masks.shape[2:]))
    return masks, history.detach().cpu()
