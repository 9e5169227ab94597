r"""Excitation backprop: a probability shared out backwards in proportion to positive contributions.

    map = excitation_backprop(model, x, target, saliency_layer="features.9")

or, around a forward and backward of one's own, `ExcitationBackpropContext`. The pure functions are
`pullback.excitation_backprop` and `pullback.contrastive_excitation_backprop`.

.. math:: R_i = x_i \sum_j \frac{w_{ji}^+}{\sum_k w_{jk}^+ x_k} R_j

**At a skip** TorchRay leaves `+` its derivative: relevance is doubled, which is told once a call. `EltwiseSum` shares
it out in proportion instead; `update_resnet` puts it into a ResNet of torchvision's. The pure functions share relevance
out at every `+` of any model.

Reference:
    Zhang, Lin, Brandt, Shen & Sclaroff, Top-down Neural Attention by Excitation Backprop, 2016.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from pullback import maps, rules
from pullback._core.call import Call
from pullback._core.entry import public, warn_once
from pullback._core.modules import named_layers, params_of, unwrapped
from pullback._core.types import Layer
from pullback._ops.constants import Remembering, is_constant
from pullback._ops.dispatch import Table
from pullback._ops.reading import LINEAR, LinearMap, linear_map
from pullback._ops.spellings import Operation, canonical
from pullback.compat.torchray._arguments import ArgumentError
from pullback.compat.torchray.attribution.common import (
    RuleContext,
    get_backward_gradient,
    get_module,
    gradient_of,
    name_of,
    resize_saliency,
    saliency,
)
from pullback.rules._coordinates import stop_gradient
from pullback.rules._linear import LinearRule, Share
from pullback.rules._rectifiers import RECTIFIERS

__all__ = [
    "contrastive_excitation_backprop",
    "eltwise_sum",
    "EltwiseSum",
    "EltwiseSumFunction",
    "excitation_backprop",
    "ExcitationBackpropContext",
    "gradient_to_contrastive_excitation_backprop_saliency",
    "gradient_to_excitation_backprop_saliency",
    "update_resnet",
]


# -- sums


class EltwiseSumFunction(torch.autograd.Function):
    """The sum of tensors of one shape, with its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return sum(inputs[1:], inputs[0]).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return grad_outputs * ctx.count


def eltwise_sum(*inputs: Tensor) -> Tensor:
    """Add tensors of one shape. In excitation backprop relevance is shared out among them in proportion.

    Example:
        >>> x = torch.rand(2)
        >>> torch.allclose(eltwise_sum(x, x, x), 3 * x)
        True
    """
    if has_torch_function(inputs):
        return handle_torch_function(eltwise_sum, inputs, *inputs)
    return sum(inputs[1:], inputs[0])


class EltwiseSum(nn.Module):
    """`eltwise_sum` as a module."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return eltwise_sum(*inputs)


def _basic_block(self: Any, x: Tensor) -> Tensor:
    skipped = x if self.downsample is None else self.downsample(x)
    h = self.relu(self.bn1(self.conv1(x)))
    return self.relu(self.skip(self.bn2(self.conv2(h)), skipped))


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    skipped = x if self.downsample is None else self.downsample(x)
    h = self.relu(self.bn1(self.conv1(x)))
    h = self.relu(self.bn2(self.conv2(h)))
    return self.relu(self.skip(self.bn3(self.conv3(h)), skipped))


_FORWARDS = {"BasicBlock": _basic_block, "Bottleneck": _bottleneck}


def update_resnet(model: nn.Module, debug: bool = False) -> nn.Module:
    """Make the skips of a ResNet of torchvision's into `EltwiseSum`, for good.

    Its outputs stay what they are. The pure functions need no such preparation.

    Args:
        model: The network, which is changed.
        debug: Print the names of the blocks that are changed.

    Returns:
        The network.
    """
    blocks = [
        (name, block)
        for name, block in model.named_modules()
        if type(block).__name__ in _FORWARDS and type(block).__module__ == "torchvision.models.resnet"
    ]
    if not blocks:
        raise ArgumentError(
            f"`model` must be a ResNet of torchvision's, got {type(model).__name__} without its blocks."
        )
    for name, block in blocks:
        block.skip = EltwiseSum()
        block.forward = types.MethodType(_FORWARDS[type(block).__name__], block)
        if debug:
            print(f"{name}: sum of branch and skip is an EltwiseSum")
    return model


# -- rules


def _share_sum(operation: Operation, *inputs: Tensor) -> Tensor:
    """Share relevance in proportion to what is positive of the inputs: none to any where there is nothing."""
    fixed = [stop_gradient(x) for x in inputs]
    total = operation(*fixed)
    excited = [x.clamp(min=0) for x in fixed]
    whole = operation(*excited)
    shares = [torch.where(whole > 0, x / torch.where(whole > 0, whole, 1), 0) for x in excited]
    return operation(total, *(share * (x - x_) for share, x, x_ in zip(shares, inputs, fixed, strict=True)))


def _told_sum(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
    """Leave `+` its derivative, and let that be told where both sides depend on the input."""
    varying = [a for a in (*args, *kwargs.values()) if not is_constant(a, memo)]
    return NotImplemented if len(varying) > 1 else operation(*args, **kwargs)


def _told_negative(rule: Callable[..., Any]) -> Callable[..., Any]:
    def told(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        # what records no gradient lies before the layer that is explained
        if not memo.get("negative") and x.requires_grad and bool((x < 0).any()):
            memo["negative"] = True
            warn_once(
                f"Excitation backprop takes inputs to be at least 0, and `{operation.__name__}` has negative ones: "
                "before it relevance can be negative. Explain a layer behind a ReLU."
            )
        return rule(operation, *args, memo=memo, **kwargs)

    return Remembering(told)


class _Late(torch.autograd.Function):
    """The rule of linear maps by the weight as it is when the backward comes, on ordinary autograd.

    The usual contrastive example negates the classifier's weight between a forward and its backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, map: LinearMap) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        ctx.map = map._replace(input=None)
        return map.biased(map.apply(x, map.weight), map.bias)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            excited = ctx.map.apply(leaf, ctx.map.weight.detach().clamp(min=0))
        (back,) = torch.autograd.grad(excited, leaf, relevance / (excited.detach() + 1e-20))
        return x * back, None


def _late(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
    map = linear_map(operation, args, kwargs, memo)
    return NotImplemented if map is None else _Late.apply(map.input, map)


_RULED = tuple(operation for operation in LINEAR if operation in rules.excitation_torchray())


def _table(negated: str | None = None) -> Table:
    """Give TorchRay's rules; those of the layer `negated` as if its weight were of the other sign."""
    table = rules.table_of("excitation_torchray")
    assert table is not None
    linear = {operation: _told_negative(table.rules[operation]) for operation in _RULED}
    add = canonical(torch.add)
    by_layer = list(table.by_layer)
    if negated is not None:
        opposite = LinearRule(
            "excitation", lambda x, w, b, y: [Share(1.0, [(None, (-w).clamp(min=0))], None)], 1e-20, False, True
        )
        by_layer += [(negated, operation, opposite) for operation in linear]
    return replace(
        table,
        rules={**table.rules, **linear, eltwise_sum: _share_sum, add: Remembering(_told_sum)},
        by_layer=by_layer,
        must_cover=table.must_cover - set(RECTIFIERS) | {add},  # rectifiers keep their derivative, as ReLU does
        name="The rules of ExcitationBackpropContext",
    )


class ExcitationBackpropContext(RuleContext):
    """A context in which the backward is that of excitation backprop: gradients are relevance.

    Args:
        enable: If not, it changes nothing.
        debug: Taken for compatibility.
    """

    def __init__(self, enable: bool = True, debug: bool = False) -> None:
        super().__init__()
        self.enable, self.debug = enable, debug

    def table(self) -> Table:
        return _table() if self.enable else Table()

    def _rules(self) -> Table:
        table = self.table()
        late = {operation: _told_negative(_late) for operation in _RULED if operation in table.rules}
        return replace(table, rules={**table.rules, **late})


# -- maps


def gradient_to_excitation_backprop_saliency(x: Tensor) -> Tensor:
    """Sum ``x.grad``, the relevance, over channels. Not clamped."""
    return maps.channel_sum(gradient_of(x))


def gradient_to_contrastive_excitation_backprop_saliency(x: Tensor) -> Tensor:
    """Sum ``x.grad``, the relevance, over channels, and clamp at 0."""
    return maps.channel_sum(gradient_of(x)).clamp(min=0)


def excitation_backprop(
    *args: Any,
    context_builder: Callable[[], Any] = ExcitationBackpropContext,
    gradient_to_saliency: Callable[[Tensor], Tensor] = gradient_to_excitation_backprop_saliency,
    **kwargs: Any,
) -> Any:
    """Give the relevance map. Takes what `common.saliency` takes, but for `context_builder`.

    On a network without skips whose activations are not negative it sums to 1.
    """
    if context_builder is not ExcitationBackpropContext:
        raise ArgumentError("`context_builder` must be left out: the method has its own, ExcitationBackpropContext.")
    return saliency(*args, context_builder=context_builder, gradient_to_saliency=gradient_to_saliency, **kwargs)


@public
def contrastive_excitation_backprop(
    model: nn.Module,
    input: Tensor,
    target: Any,
    saliency_layer: str | nn.Module,
    contrast_layer: str | nn.Module,
    classifier_layer: str | nn.Module | None = None,
    resize: Any = False,
    resize_mode: str = "bilinear",
    get_backward_gradient: Callable[[Tensor, Any], Tensor] = get_backward_gradient,
    debug: bool = False,
) -> Any:
    r"""Give the relevance of the target less that of its opposite, where the target wins.

    .. math:: m = \max\Big(0, \sum_c T (P - \bar P)\Big)

    with relevance P of the target and :math:`\bar P` of a classifier with negated weights, both at the contrast layer,
    and T the way from there to `saliency_layer`. No weight is touched: it is the rule that negates.

    Args:
        model, input, target, saliency_layer, resize, resize_mode, get_backward_gradient: See `common.saliency`.
        contrast_layer: Where target and opposite are compared.
        classifier_layer: The layer whose weight counts as negated. The last linear layer or convolution if omitted.
        debug: Give also probes of each module, in a pass of excitation backprop without contrast.

    Returns:
        Map ``[batch 1 height width]``, not negative; with `debug` a pair of it and the probes.
    """
    layer, contrast = name_of(model, saliency_layer), name_of(model, contrast_layer)
    params, x = params_of(model), input.detach()
    above = Call.bind(params, model, x, contrast, _table(_classifier(model, classifier_layer)))
    opposite = above.pullback()
    seed = get_backward_gradient(opposite.output, target)
    against = above.like(opposite.pull(seed))
    call = Call.bind(params, model, x, layer, _table())
    lower = replace(call, output=Layer(contrast)).pullback()
    relevance = [a - b for a, b in zip(call.pullback().pull(seed), lower.pull(against), strict=True)]
    map = maps.channel_sum(call.like(relevance)).clamp(min=0)
    map = resize_saliency(input, map, resize, resize_mode)
    if not debug:
        return map
    _, probes = excitation_backprop(model, input, target, get_backward_gradient=get_backward_gradient, debug=True)
    return map, probes


def _classifier(model: nn.Module, layer: str | nn.Module | None) -> str:
    """Give the name of the classifier as the core has it: without the names of wrappers."""
    known = list(named_layers(model))
    if layer is None:
        names = [n for n, m in known if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
        if not names:
            raise ArgumentError("`classifier_layer` must be given: the model has no linear layer or convolution.")
        return names[-1]
    module = get_module(model, name_of(model, layer))
    return next(n for n, m in known if module is not None and m is unwrapped(module))
