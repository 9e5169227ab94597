r"""What the gradient-like methods share: the driver `saliency`, probes, and contexts that change the backward.

In simple style one call gives the map::

    map = saliency(model, x, target, "features.29", context_builder=GuidedBackpropContext)

In manual style the forward and the backward are the caller's own, on ordinary autograd::

    probe = Probe(model.features[29], target="output")
    with GuidedBackpropContext():
        y = model(x)
    y[0, target].backward()
    map = gradient_to_saliency(probe.data[0])

Both start from a cotangent :math:`p` of the output and reduce what arrives at the layer, by default

.. math:: m = \max_c \Big| \frac{\partial \langle p, y \rangle}{\partial x_c} \Big|

A context is a function mode: local to the thread and to the ``with`` block, it catches every spelling of the operation
and patches nothing. `Patch`, global by nature, is here for code that uses it; nothing in this package does.

Reference:
    Simonyan, Vedaldi & Zisserman, Deep Inside Convolutional Networks, 2014.
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback import maps
from pullback._core.call import Call
from pullback._core.entry import public
from pullback._core.layers import attach
from pullback._core.module_copy import ModuleCopy
from pullback._core.modules import nearest, params_of, unwrapped
from pullback._core.shapes import layer_shapes
from pullback._core.targets import cotangent
from pullback._core.types import Layer, PullbackWarning
from pullback._ops.dispatch import OperationMode, Rule, RuleMode, Table
from pullback._ops.spellings import Operation, activations
from pullback.compat.torchray._arguments import ArgumentError

__all__ = [
    "attach_debug_probes",
    "get_backward_gradient",
    "get_module",
    "get_pointing_gradient",
    "gradient_to_saliency",
    "NullContext",
    "Patch",
    "Probe",
    "ReLUContext",
    "resize_saliency",
    "saliency",
]


# -- cotangents


def get_backward_gradient(pred_y: Tensor, y: Any) -> Tensor:
    """Give the cotangent of an output that a target means.

    Args:
        pred_y: Output of the model, ``[batch class ...]``.
        y: Class index, one for all examples or one each (int, list, array or tensor): 1 at the class, at every
            position, 0 elsewhere. A tensor of the shape of `pred_y` is the cotangent itself.

    Returns:
        Cotangent of the shape of `pred_y`.

    Example:
        >>> y = torch.randn(2, 3)
        >>> bool((get_backward_gradient(y, [2, 0]) * y).sum() == y[0, 2] + y[1, 0])
        True
    """
    if isinstance(y, Tensor) and y.shape == pred_y.shape:
        return y
    index = torch.as_tensor(y, device=pred_y.device)
    if index.is_floating_point():
        raise ArgumentError(
            f"`y` must be class indices, or a cotangent of the shape of the output, {list(pred_y.shape)}, got "
            f"{index.dtype} of shape {list(index.shape)}."
        )
    index = index.reshape(-1)
    return cotangent(pred_y, index[0] if len(index) == 1 else index).clone()


def get_pointing_gradient(pred_y: Tensor, y: int, normalize: bool = True) -> Tensor:
    r"""Give the cotangent that points at where one class is strong: :math:`e^{y_c}` over positions.

    Args:
        pred_y: Output for one example, ``[1 class]`` or ``[1 class height width]``.
        y: Class index.
        normalize: Scale it to a sum of 1.

    Returns:
        Cotangent of the shape of `pred_y`, 0 at the other classes.

    Example:
        >>> g = get_pointing_gradient(torch.randn(1, 3, 4, 4), 1)
        >>> torch.allclose(g[:, 1].sum(), torch.ones(())) and not g[:, [0, 2]].any()
        True
    """
    if pred_y.ndim not in (2, 4) or pred_y.shape[0] != 1:
        raise ArgumentError(f"`pred_y` must be [1 class] or [1 class height width], got {list(pred_y.shape)}.")
    if not isinstance(y, int):
        raise ArgumentError(f"`y` must be a class index, an int, got {type(y).__name__}.")
    if not 0 <= y < pred_y.shape[1]:
        raise ArgumentError(f"`y` must be a class from 0 to {pred_y.shape[1] - 1}, got {y}.")
    logits = pred_y[:, y].detach()
    strength = logits.flatten().softmax(0).reshape(logits.shape) if normalize else logits.exp()
    pointing = torch.zeros_like(pred_y, requires_grad=False)
    pointing[:, y] = strength
    return pointing


# -- maps


def gradient_to_saliency(x: Tensor) -> Tensor:
    """Take the largest absolute value of ``x.grad`` over channels, ``[batch 1 ...]``."""
    return maps.channel_peak(gradient_of(x))


def gradient_of(x: Tensor) -> Tensor:
    if x.grad is None:
        raise ArgumentError("`x` has no `grad`: call `backward()` first, on an output that depends on `x`.")
    return x.grad


def resize_saliency(tensor: Tensor, saliency: Tensor, size: Any, mode: str) -> Tensor:
    """Resize a map.

    Args:
        tensor: The input that the map explains.
        saliency: Map, ``[batch 1 height width]``.
        size: False for no change, True for the size of `tensor`, or a pair. A pair is **(width, height)**, and so is a
            `torch.Size`: ``x.shape[2:]`` gives a transposed map, which is told. The pure functions take
            (height, width).
        mode: As in `torch.nn.functional.interpolate`; also those without corners to align, such as ``"nearest"``.

    Returns:
        Map of that size.
    """
    if size is False:
        return saliency
    if size is True:
        return maps.resize(saliency, tensor.shape[2:], mode)
    if not isinstance(size, tuple | list):
        raise ArgumentError(f"`resize` must be a bool or a pair (width, height), got {size!r}.")
    if isinstance(size, torch.Size) and len(set(size)) > 1:
        warnings.warn(
            f"`resize` got {size} and reads it as (width, height), as TorchRay does. Write `resize=True` for the "
            "size of the input, or a plain tuple (width, height).",
            PullbackWarning,
            stacklevel=2,
        )
    return maps.resize(saliency, tuple(size)[::-1], mode)


# -- modules


def get_module(model: nn.Module, module: str | nn.Module) -> nn.Module | None:
    """Find a module by its name in `named_modules`, ``""`` being the model; `None` where there is none.

    A module is returned as it is.
    """
    if isinstance(module, nn.Module):
        return module
    if module == "":
        return model
    return dict(model.named_modules()).get(module)


class Probe:
    """Keep what passes into or out of a module, with its gradient after ``backward()``.

    On each call of the module its inputs or outputs become `data`, a list of tensors that record gradients in
    ``data[i].grad``; of several calls it keeps the last (`saliency` sees them all). The model goes on with copies, so
    that an in-place operation behind the module works and leaves `data` as it was. What is no floating-point tensor
    stays in the list as it is.

    Set `contrast`, a list of tensors, before a forward to subtract them from the gradients that its backward brings;
    with `non_negative_contrast` the difference is clamped at 0.

    A module that works in place does not while it is probed. `remove`, or the end of the probe's life, takes the hook
    away and restores that.

    Args:
        module: A module.
        target: ``"input"`` or ``"output"``.
    """

    def __init__(self, module: nn.Module, target: str = "input") -> None:
        self.hook: Any = None  # `remove` runs also where what follows raises
        if not isinstance(module, nn.Module):
            raise ArgumentError(f"`module` must be a torch.nn.Module, got {type(module).__name__}.")
        if target not in ("input", "output"):
            raise ArgumentError(f"`target` must be 'input' or 'output', got {target!r}.")
        self.module = module
        self.data: list[Any] = []
        self.target = target
        self.contrast: list[Tensor] = []
        self.non_negative_contrast = False
        self.inplace = getattr(module, "inplace", None)
        if self.inplace is not None:
            self._set_inplace(False)
        if target == "input":
            self.hook = module.register_forward_pre_hook(_InputHook(self))
        else:
            self.hook = module.register_forward_hook(_OutputHook(self))

    def __del__(self) -> None:
        self.remove()

    def remove(self) -> None:
        """Detach the probe from the module. `data` stays."""
        if self.hook is None:
            return
        self.hook.remove()
        self.hook = None
        if self.inplace is not None:
            self._set_inplace(self.inplace)

    def _set_inplace(self, inplace: Any) -> None:
        self.module.inplace = inplace

    def _watch(self, value: Any) -> Any:
        """Take the tensors of `value` into `data`, and give it with copies of them."""
        several = isinstance(value, list | tuple)
        items = value.values() if isinstance(value, Mapping) else value if several else [value]
        self.data = []
        copies = [self._watch_tensor(i, item) for i, item in enumerate(items)]
        if isinstance(value, Mapping):
            named = dict(zip(value, copies, strict=True))
            return named if type(value) is dict else type(value)(**named)
        if several:
            return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
        return copies[0]

    def _watch_tensor(self, i: int, item: Any) -> Any:
        self.data.append(item)
        if not isinstance(item, Tensor) or not (item.is_floating_point() or item.is_complex()):
            return item
        if not item.requires_grad:
            if item.is_inference():
                return item
            item.requires_grad_(True)
        item.retain_grad()
        if i < len(self.contrast):
            contrast, clamp = self.contrast[i], self.non_negative_contrast
            item.register_hook(lambda gradient: _contrasted(gradient, contrast, clamp))
        return item.clone()


def _contrasted(gradient: Tensor, contrast: Tensor, clamp: bool) -> Tensor:
    if gradient.shape != contrast.shape:
        raise ArgumentError(
            f"`contrast` must have the shape of the gradient, {list(gradient.shape)}, got {list(contrast.shape)}."
        )
    difference = gradient - contrast
    return difference.clamp(min=0) if clamp else difference


class _InputHook:
    """A pre-hook that knows its probe weakly: a probe that nobody holds any more goes, and takes the hook with it."""

    def __init__(self, probe: Probe) -> None:
        self.probe = weakref.ref(probe)

    def __call__(self, module: nn.Module, inputs: Any) -> Any:
        probe = self.probe()
        return None if probe is None else probe._watch(inputs)


class _OutputHook(_InputHook):
    def __call__(self, module: nn.Module, inputs: Any, outputs: Any = None) -> Any:
        probe = self.probe()
        return None if probe is None else probe._watch(outputs)


def attach_debug_probes(model: nn.Module, debug: bool = False) -> OrderedDict[str, Probe] | None:
    """Probe every module at its output, and the model at its input, by name; `None` unless `debug`."""
    if not debug:
        return None
    return OrderedDict((name, Probe(module, "output" if name else "input")) for name, module in model.named_modules())


# -- patches and contexts


class _Layer:
    """A patch as the list of patches of its name knows it: a patch that nobody holds any more goes."""

    def __init__(self, callable: Callable[..., Any]) -> None:
        self.callable = callable


_patches: dict[tuple[int, str], list[_Layer]] = {}
_patches_lock = threading.RLock()


class Patch:
    """Replace a function of a module, for all callers in the process, until `remove`.

    Several patches of one name can be removed in any order: what is left is the latest of those that remain, and the
    original in the end. No function of this package patches anything; prefer the contexts, which are local.

    Args:
        target: ``"package.module.name"``.
        new_callable: What takes its place.

    Raises:
        AttributeError: If there is no such name.
    """

    def __init__(self, target: str, new_callable: Callable[..., Any]) -> None:
        self._layer: _Layer | None = None  # `remove` runs also where what follows raises
        self.target, self.attribute = Patch.resolve(target)
        self.orig_callable = getattr(self.target, self.attribute)
        layer = _Layer(new_callable)
        with _patches_lock:
            stack = _patches.setdefault((id(self.target), self.attribute), [_Layer(self.orig_callable)])
            stack.append(layer)
            setattr(self.target, self.attribute, new_callable)
        self._layer = layer

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not finalizing():
            self.remove()

    def remove(self) -> None:
        """Undo the patch. Doing it again does nothing."""
        layer, self._layer = self._layer, None
        if layer is None:
            return
        with _patches_lock:
            stack = _patches[id(self.target), self.attribute]
            was_in_force = stack[-1] is layer
            stack.remove(layer)
            if was_in_force:
                setattr(self.target, self.attribute, stack[-1].callable)
            if len(stack) == 1:
                del _patches[id(self.target), self.attribute]

    @staticmethod
    def resolve(target: str) -> tuple[Any, str]:
        """Split ``"package.module.name"`` into the module, imported, and the name."""
        path, _, attribute = target.rpartition(".")
        if not path:
            raise ArgumentError(f"`target` must read 'package.module.name', got {target!r}.")
        first, *rest = path.split(".")
        found: Any = importlib.import_module(first)
        name = first
        for part in rest:
            name = f"{name}.{part}"
            if not hasattr(found, part):
                importlib.import_module(name)
            found = getattr(found, part)
        return found, attribute


class _Mode(RuleMode):
    """Operations by the rules of a table, all others untouched: the model is the caller's own, perhaps in training."""

    def __torch_function__(
        self, func: Operation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._by_rule(func, args, kwargs)
        result = func(*args, **kwargs) if result is NotImplemented else result
        if self.table.on_operation is not None:
            self.table.on_operation(self.memo, func, args, kwargs, result)
        return result


class RuleContext(AbstractContextManager[Any]):
    """A context in which operations run by a table of rules, in this thread.

    `saliency` hands the table of a context built by this package to the functional core; entered by hand, it works on
    the caller's ordinary autograd graph.
    """

    def __init__(self) -> None:
        self.patches: list[Patch] = []  # always empty: nothing is patched
        self._entered: list[_Mode] = []

    def table(self) -> Table | None:
        """Give the rules, or `None` where they cannot be handed to `torch.func`."""
        return None

    def _rules(self) -> Table:
        """Give the rules for ordinary autograd."""
        table = self.table()
        assert table is not None
        return table

    def __enter__(self) -> Any:
        mode = _Mode(self._rules())
        mode.__enter__()
        self._entered.append(mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        mode = self._entered.pop()
        mode.__exit__(kind, error, trace)
        if mode.uncovered and error is None:
            uncovered = ", ".join(f"`{operation}`" for operation in mode.uncovered)
            warnings.warn(
                f"{self._rules().name} do not cover {uncovered}: what they do not cover keeps its own derivative.",
                PullbackWarning,
                stacklevel=2,
            )
        return False


class NullContext(RuleContext):
    """A context that changes nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> Literal[False]:
        return False


class ReLUContext(RuleContext):
    """A context in which an `autograd.Function` stands for ReLU, however the model spells it.

    As in TorchRay only ReLU itself: `relu6` and other activations keep their own derivative, which is told. An
    in-place ReLU still writes to its input.

    Args:
        relu_func: An `autograd.Function`, of the old form ``forward(ctx, x)`` or the new one.
    """

    def __init__(self, relu_func: type[torch.autograd.Function]) -> None:
        super().__init__()
        if not (isinstance(relu_func, type) and issubclass(relu_func, torch.autograd.Function)):
            raise ArgumentError(f"`relu_func` must be a torch.autograd.Function, a class, got {relu_func!r}.")
        self.relu_func = relu_func

    def _rules(self) -> Table:
        def rule(operation: Operation, input: Tensor) -> Any:
            return self.relu_func.apply(input)

        return relu_table(rule, f"The rules by {self.relu_func.__name__}")


def relu_table(rule: Rule, name: str) -> Table:
    """Give the table that runs ReLU, and nothing else, by a rule, and tells of other activations."""
    return Table.of({torch.relu: rule}, must_cover=activations(), name=name)


# -- the driver


@public
def saliency(
    model: nn.Module,
    input: Tensor,
    target: Any,
    saliency_layer: str | nn.Module = "",
    resize: Any = False,
    resize_mode: str = "bilinear",
    smooth: float = 0,
    context_builder: Callable[[], Any] = NullContext,
    gradient_to_saliency: Callable[[Tensor], Tensor] = gradient_to_saliency,
    get_backward_gradient: Callable[[Tensor, Any], Tensor] = get_backward_gradient,
    debug: bool = False,
) -> Any:
    """Carry a cotangent of the output back to the input or a layer, and reduce it to a map.

    The model is run in eval mode on a copy of its structure: neither it nor its parameters, flags or hooks change, also
    where something raises. Of the caller's tensors only ``input.grad`` is set, to a new tensor, where the gradient at
    the input is computed. The pure function is `pullback.saliency`, whose `rules` and `reduce` stand for
    `context_builder` and `gradient_to_saliency`.

    Args:
        model: A module.
        input: ``[batch channel height width]``.
        target: Class index, one for all or one each; or a cotangent shaped like the output.
        saliency_layer: Name of a layer, or the layer, explained at its output. ``""`` is the model's input. The maps of
            a layer that is called several times are summed.
        resize, resize_mode: See `resize_saliency`.
        smooth: Standard deviation of a Gaussian, as a fraction of the longer side of the (resized) map.
        context_builder: Gives the context in which forward and backward run: one of this package, or any other.
        gradient_to_saliency: From a tensor with `grad`, the activation, to a map.
        get_backward_gradient: From the output and `target` to the cotangent.
        debug: Give also a probe of each module, by name, detached but with its data.

    Returns:
        Map ``[batch 1 height width]`` without a graph; with `debug` a pair of it and the dict of probes.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    name = name_of(model, saliency_layer)
    context = context_builder()
    table = context.table() if isinstance(context, RuleContext) else None
    functional = table is not None or type(context) is NullContext
    at_root = name == "" and isinstance(saliency_layer, nn.Module)
    also_input = name != "" and input.requires_grad
    if functional and not (debug or at_root or also_input or _is_hooked(model)):
        probes = None
        pulled = Call.bind(params_of(model), model, input.detach(), name, table).pullback()
        gradients = pulled.pull(get_backward_gradient(pulled.output, target))
        calls = [_with_grad(a, g) for a, g in zip(pulled.activations, gradients, strict=True)]
    else:
        # A foreign context may hold an autograd.Function of the old form, or look at tensors in hooks: torch.func runs
        # neither, so this is ordinary autograd.
        layer = Layer(name)
        calls, probes = _on_autograd(
            model, input, layer if name or at_root else None, context, lambda y: get_backward_gradient(y, target), debug
        )
    if not name and not at_root:
        _fill_grad(input, calls[0].grad)
    with torch.no_grad():
        found = [gradient_to_saliency(call) for call in calls]
        map = sum(found[1:], found[0]).detach()
    map = resize_saliency(input, map, resize, resize_mode)
    if smooth > 0:
        map = maps.smooth(map, smooth * max(map.shape[2:]))
    return (map, probes) if debug else map


def name_of(model: nn.Module, layer: str | nn.Module) -> str:
    """Give the name of a layer, ``""`` for the model itself."""
    if isinstance(layer, str):
        if get_module(model, layer) is None and get_module(unwrapped(model), layer) is None:
            near = nearest(layer, [name for name, _ in model.named_modules() if name])
            raise ArgumentError(f"No layer `{layer}` in the model. {near}")
        return layer
    for name, module in model.named_modules():
        if module is layer:
            return name
    raise ArgumentError(f"A layer must be one of the model's, or a name of one, got {type(layer).__name__}.")


def _is_hooked(model: nn.Module) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in model.modules()
    )


def _with_grad(activation: Tensor, gradient: Tensor | None) -> Tensor:
    """Give the activation as the caller's reduction reads it: without a graph, its gradient in `grad`."""
    leaf = activation.detach()
    leaf.grad = torch.zeros_like(leaf) if gradient is None else gradient.detach()
    return leaf


def _fill_grad(input: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None and input.is_leaf and not input.is_inference():
        input.grad = gradient.clone()


def _on_autograd(
    model: nn.Module,
    input: Tensor,
    layer: Layer | None,
    context: AbstractContextManager[Any],
    cotangent_of: Callable[[Tensor], Tensor],
    debug: bool,
) -> tuple[list[Tensor], OrderedDict[str, Probe] | None]:
    """Run forward and backward on a shell within `context`; give each call's activation, with `grad`, and probes."""
    params = params_of(model)
    x = input.detach().clone()
    wanted = layer is None or debug or input.requires_grad
    x.requires_grad_(wanted and (x.is_floating_point() or x.is_complex()))
    kept: list[Tensor] = [x] if layer is None else []

    def edit(layer: Layer, call: int, activation: Tensor) -> Tensor:
        leaf = activation if activation.requires_grad else activation.detach().requires_grad_()
        leaf.retain_grad()
        kept.append(leaf)
        return leaf.clone()

    layers: Sequence[Layer] = [] if layer is None else [layer]
    seen = {} if layer is None else {layer: layer_shapes(params, model, input, layer)}
    with torch.enable_grad(), OperationMode(), context:
        model_copy = ModuleCopy(model, backward_hooks=True)  # made within the context, which may have hooked the model
        model_copy.install(params)
        probes = attach_debug_probes(model_copy.root, debug)
        attach(model_copy, layers, edit, seen)
        output = model_copy.root(x.clone())
        output.backward(cotangent_of(output))
    originals = dict(unwrapped(model).named_modules())
    for name, probe in (probes or {}).items():
        probe.remove()
        probe.module = originals[name]
    if layer is not None and input.requires_grad:
        _fill_grad(input, x.grad)
    return [_with_grad(a, a.grad) for a in kept], probes
