"""One call of a model: what runs, on what, where it is explained, and by which rules.

A method binds its arguments once, to a `Call`, and writes its formula in terms of it: ``call.forward()`` runs the
model, ``call.pullback()`` runs it and is ready to pull cotangents back, ``call.at(points)`` is the same call at other
points, many copies of the batch at once, and ``call.like(tensors)`` gives a result the structure of `x`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import vjp

from pullback._core.forward import report, run_model, select
from pullback._core.inputs import repeated
from pullback._core.layers import Edit, LayerShape, LayerShapes
from pullback._core.many.pulls import SharedPull
from pullback._core.many.shortcuts import note_forward
from pullback._core.many.state import local, only_targets
from pullback._core.shapes import layer_shapes
from pullback._core.targets import cotangent, poisoned, score
from pullback._core.types import Back, Inputs, Layer, Model, Output, Params, Pull, Reduce, Target, Tensors
from pullback._ops.accounting import Account
from pullback._ops.dispatch import SAVED_TENSORS, OperationMode, RuleMode, Table
from pullback._torch.internals import bare, compiling, current_level, is_functorch_wrapped_tensor, outside_transforms

# Models that write to tensors which their graph saves: rules then save masks of their own.
_writers: weakref.WeakSet[Any] = weakref.WeakSet()


class InputTree:
    """The input of a model: a tensor, a tuple or a dict of tensors.

    Attributes:
        items: Keys and members.
        floating: Keys of the floating-point members, which are explained; the others pass through.
        tensors: These members.
    """

    def __init__(self, x: Inputs) -> None:
        self.x = x
        if isinstance(x, Tensor):
            items: list[tuple[Any, Any]] = [(None, x)]
        elif isinstance(x, Mapping):
            items = list(x.items())
        elif isinstance(x, tuple):
            items = list(enumerate(x))
        else:
            raise TypeError(
                f"`x` must be a tensor, a tuple of tensors or a dict of tensors, got {type(x).__name__}."
                + (" Make it a tuple." if isinstance(x, list) else "")
            )
        self.items = items
        self.floating: list[Any] = []
        found: list[Tensor] = []
        for key, value in items:
            if isinstance(value, Tensor):
                if value.is_floating_point() or value.is_complex():
                    self.floating.append(key)
                    found.append(value)
            elif value is not None:
                where = "" if key is None else f" at {key!r}"
                raise TypeError(f"`x` must hold tensors, got {type(value).__name__}{where}.")
        self.tensors: Tensors = tuple(found)

    @property
    def batch(self) -> int:
        """The number of examples: the length of the first axis of the first tensor."""
        return next(v.shape[0] for _, v in self.items if v is not None)

    @property
    def device(self) -> torch.device:
        return next(v.device for _, v in self.items if v is not None)

    def rebuild(self, tensors: Sequence[Tensor], others: Callable[[Any], Any]) -> Any:
        """Put `tensors` in the places of the floating-point ones, and `others(value)` in the rest."""
        if isinstance(self.x, Tensor):
            return tensors[0] if self.floating else others(self.x)
        new = dict(zip(self.floating, tensors, strict=True))
        values = {k: new[k] if k in new else others(v) for k, v in self.items}
        return tuple(values.values()) if isinstance(self.x, tuple) else values


@dataclass(frozen=True)
class Pulled:
    """A forward with its way back.

    Attributes:
        output: What is explained.
        activations: What the derivative is taken at: the tensors of `x`, or a layer's activation in each call of it.
        pull: From a cotangent of the output to those of the activations.
    """

    output: Tensor
    activations: Tensors
    pull: Pull


@dataclass(frozen=True)
class Call:
    """A model bound to its parameters and its input, at a place in it, under rules.

    Attributes:
        layer: Where the derivative is taken; None for the input.
        copies: How many copies of the batch of the caller are in the batch axis.
        activations_given: Take the place of the layer's activations.
    """

    params: Params
    model: Model
    x: InputTree
    layer: Layer | None = None
    rules: Table | None = None
    output: Output = None
    copies: int = 1
    activations_given: Tensors | None = field(default=None, repr=False)

    @staticmethod
    def bind(
        params: Params,
        model: Model,
        x: Inputs,
        layer: str | Layer = "",
        rules: Table | None = None,
        output: Output = None,
    ) -> Call:
        """Check the arguments of a method, and bind them."""
        if isinstance(params, nn.Module):
            raise TypeError(
                f"`params` must be a dict of tensors by name, got the module {type(params).__name__}. The order of "
                "arguments is (params, model, x, target), with `params = params_of(model)`."
            )
        if not callable(model):
            raise TypeError(f"`model` must be a torch.nn.Module or a function, got {type(model).__name__}.")
        tree = x if isinstance(x, InputTree) else InputTree(x)
        place = layer if isinstance(layer, Layer) else None if layer == "" else Layer(layer)
        return Call(params, model, tree, place if place is None or place.name else None, rules, output)

    # -- one forward

    def forward(
        self, edit: Edit | None = None, shapes: LayerShapes | None = None, account: Account | None = None
    ) -> Tensor:
        """Run the model once, and return the output that is explained. `edit` changes the activations of `shapes`."""
        return self._run(self.x.tensors, edit, shapes, account)

    def _run(
        self,
        tensors: Sequence[Tensor],
        edit: Edit | None = None,
        shapes: LayerShapes | None = None,
        account: Account | None = None,
    ) -> Tensor:
        layers: Sequence[Layer] = () if edit is None else tuple(shapes or ())
        read: list[Tensor] = []
        if isinstance(self.output, Layer):
            layers, edit = _reading(self.output, read, layers, edit)
        while True:
            x = self.x.rebuild([t.clone() for t in tensors], lambda v: None if v is None else v.clone())
            mode = OperationMode() if self.rules is None else RuleMode(self.rules)
            mode.account = account
            if isinstance(mode, RuleMode) and self._may_rely_on_the_graph():
                mode.memo[SAVED_TENSORS] = []
            result = run_model(self.params, self.model, x, mode, layers, edit, shapes)
            if not isinstance(mode, RuleMode) or not mode.overwritten():
                break
            _writers.add(self.model)
            read.clear()
        if self.rules is not None or mode.dropouts:
            report(mode)
        return _only_call(read, self.output) if isinstance(self.output, Layer) else select(result, self.output)

    def _may_rely_on_the_graph(self) -> bool:
        """Whether rules may use what the graph saves, which a model that writes to it makes worthless."""
        return isinstance(self.model, nn.Module) and not compiling() and self.model not in _writers

    def activations(self) -> Tensors:
        """Read what the derivative would be taken at: the tensors of `x`, or the layer's activation in each call."""
        if self.layer is None:
            if not self.x.floating:
                raise TypeError(
                    "`x` holds no floating-point tensor, so no path leads to it. Name a `layer`, or cast `x`."
                )
            return self.x.tensors
        read: list[Tensor] = []
        layers, edit = _reading(self.layer, read, (), None)
        x = self.x.rebuild([t.clone() for t in self.x.tensors], lambda v: None if v is None else v.clone())
        run_model(self.params, self.model, x, OperationMode(), layers, edit)
        return tuple(read)

    # -- one pullback

    def pullback(self) -> Pulled:
        """Run the model once, and be ready to pull cotangents of its output back to `x` or to the layer.

        At a layer the derivative is taken with respect to a zero added to its activation. The backward stops there,
        what comes before records no graph, and a layer that is called several times has a zero for each call.
        """
        if self.layer is not None:
            return self._pullback_to_layer(self.layer)
        if not self.x.floating:
            raise TypeError(
                "`x` holds no floating-point tensor to explain. Name a `layer`, such as the embedding, or cast `x`."
            )

        def forward(account: Account | None, *tensors: Tensor) -> tuple[Tensor, Tensors]:
            return self._run(tensors, account=account), ()

        outputs, pull, _ = self.linearise(forward, self.x.tensors)
        return Pulled(outputs[0], self.x.tensors, pull)

    def _pullback_to_layer(self, layer: Layer) -> Pulled:
        if not isinstance(self.model, nn.Module):
            raise ValueError("`layer` needs a torch.nn.Module, got a function as `model`: it has no named layers.")
        for real in (False, True):
            shapes = layer_shapes(self.params, self.model, self.x.x, layer, real)
            try:
                return self._pullback_to_zeros(layer, shapes)
            except _ShapeChanged:
                continue
        raise RuntimeError(f"`layer` names `{layer}`, whose activation changes its shape from run to run.")

    def _pullback_to_zeros(self, layer: Layer, shapes: tuple[LayerShape, ...]) -> Pulled:
        if not shapes or (layer.call is not None and layer.call >= len(shapes)):
            raise ValueError(f"`layer` names `{layer}`, but a forward calls `{layer.name}` {len(shapes)} times.")
        calls = [*range(len(shapes))] if layer.call is None else [layer.call]
        device = self.x.device
        # a zero takes no memory until something is added to it
        zeros = [torch.zeros((), dtype=shapes[i].dtype, device=device).expand(shapes[i].shape) for i in calls]
        given = self.activations_given

        def forward(account: Account | None, *deltas: Tensor) -> tuple[Tensor, Tensors]:
            activations: dict[int, Tensor] = {}

            def edit(layer: Layer, call: int, activation: Tensor) -> Tensor:
                if account is not None and call == 0:
                    account.restart(activation)
                if call not in calls:
                    if layer.call is None:
                        raise _ShapeChanged
                    return activation
                index = calls.index(call)
                if activation.shape != deltas[index].shape:
                    raise _ShapeChanged
                if not activation.is_floating_point() and not activation.is_complex():
                    raise TypeError(
                        f"`layer` names `{layer}`, whose activation is {activation.dtype}, not floating point."
                    )
                if given is not None:
                    activation = given[index].to(activation.device, activation.dtype)
                activations[call] = activation
                # rules do not see an overload of aten
                delta = deltas[index].to(activation.device, activation.dtype)
                return torch.ops.aten.add.Tensor(activation, delta)

            y = self._run(self.x.tensors, edit, {layer: shapes}, account)
            if len(activations) != len(calls):
                raise _ShapeChanged
            return y, tuple(activations[call] for call in calls)

        outputs, pull, activations = self.linearise(forward, zeros, given or ())
        if any(z.dtype != a.dtype for z, a in zip(zeros, activations, strict=True)):  # under autocast
            pull = partial(_in_dtypes, pull, [a.dtype for a in activations])
        return Pulled(outputs[0], activations, pull)

    def linearise(
        self, forward: Callable[..., tuple[Tensor, Tensors]], primals: Sequence[Tensor], given: Sequence[Tensor] = ()
    ) -> tuple[Tensors, Pull, Tensors]:
        """Return the outputs, the pull and the auxiliary tensors of a forward ``(account, *primals) -> y, auxiliary``.

        `given` are tensors beside the primals that the forward depends on.
        """
        many = None if compiling() else getattr(local, "many", None)
        account = None if many is None else many.account_on(primals[0].device)

        def function(*tensors: Tensor) -> tuple[Tensors, Tensors]:
            y, auxiliary = forward(account, *tensors)
            starts = () if many is None or account is None else note_forward(many, account, y, self.rules is None)
            return (y, *starts), auxiliary

        outputs, back, auxiliary = linearised(function, primals, self._is_plain([*primals, *given]))
        pull = partial(_pull_one, back) if many is None else SharedPull(many, back, outputs, primals)
        return outputs, pull, auxiliary

    def _is_plain(self, primals: Sequence[Tensor]) -> bool:
        """Whether nothing differentiates, batches or traces this call from outside.

        The `vmap` of `over_targets` does not count where the forward cannot depend on a target: it then runs outside.
        """
        if compiling() or forward_ad._current_level >= 0:
            return False
        parts = self.params if isinstance(self.params, tuple) else (self.params,)
        tensors = [t for part in parts for t in part.values()]
        tensors += (*(t for _, t in self.x.items if t is not None), *primals)
        if current_level() is not None:
            pure = isinstance(self.model, nn.Module) and not callable(self.output)
            if not (pure and only_targets()) or any(is_functorch_wrapped_tensor(t) for t in tensors):
                return False
        return not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))  # noqa: C419 (faster)

    # -- other inputs, and copies of the batch

    def on(self, x: Inputs | InputTree) -> Call:
        """Return the same call on another input of as many copies."""
        return replace(self, x=x if isinstance(x, InputTree) else InputTree(x))

    def at(self, points: Sequence[Tensor]) -> Call:
        """Return the same call at other points, ``[copy batch ...]`` for each tensor that is explained.

        The copies are folded into the batch axis. At a layer the points are its activations.
        """
        copies, given = len(points[0]), tuple(point.flatten(0, 1) for point in points)
        again = partial(repeated, copies=copies, batch=self.x.batch)
        if self.layer is None:
            return replace(self, x=InputTree(self.x.rebuild(given, again)), copies=copies)
        x = self.x.rebuild([again(t) for t in self.x.tensors], again)
        return replace(self, x=InputTree(x), copies=copies, activations_given=given)

    def to(self, layer: Layer | None) -> Call:
        """Return the same call with the derivative taken at a layer, or at the input."""
        return replace(self, layer=layer)

    def repeat(self, value: Any) -> Any:
        """Repeat what has one entry for each example, such as a target, for each copy of the batch."""
        if self.copies == 1 or type(value) is int:
            return value
        return repeated(value, self.copies, self.x.batch // self.copies)

    def gradients(self, target: Target, pulled: Pulled | None = None) -> list[Tensor]:
        """Return the gradients of the score, ``[copy batch ...]`` for each tensor that is explained."""
        pulled = self.pullback() if pulled is None else pulled
        gradients = pulled.pull(cotangent(pulled.output, self.repeat(target)))
        return [g.unflatten(0, (self.copies, -1)) for g in gradients]

    def scores_and_gradients(self, target: Target) -> tuple[Tensor, list[Tensor]]:
        """Return scores ``[copy batch]`` and gradients ``[copy batch ...]``."""
        pulled = self.pullback()
        scores = score(pulled.output, self.repeat(target)).unflatten(0, (self.copies, -1))
        return scores, self.gradients(target, pulled)

    def scores(self, target: Target) -> Tensor:
        """Return the scores, ``[copy batch]``."""
        output = self.forward() if self.activations_given is None else self.pullback().output
        return score(output, self.repeat(target)).unflatten(0, (self.copies, -1))

    # -- results

    def like(self, tensors: Sequence[Tensor]) -> Any:
        """Return tensors, one for each that is explained, in the structure of `x`; at a layer, their sum over calls."""
        if self.layer is None:
            return self.x.rebuild(tensors, lambda v: None)
        if any(t.shape != tensors[0].shape for t in tensors):
            raise ValueError(
                f"`layer` names `{self.layer}`, called {len(tensors)} times with activations of different shapes: "
                f"choose a call, `{self.layer}#0` to `{self.layer}#{len(tensors) - 1}`."
            )
        return sum(tensors[1:], tensors[0])


class _ShapeChanged(Exception):
    """A layer returned another shape than the probe had seen."""


def _reading(layer: Layer, read: list[Tensor], layers: Sequence[Layer], edit: Edit | None) -> tuple[Any, Edit]:
    """Add to the edits of a forward that `layer`'s activation is kept in `read`."""

    def edited(at: Layer, call: int, tensor: Tensor) -> Tensor:
        tensor = edit(at, call, tensor) if edit is not None and at in layers else tensor
        if at == layer and layer.call in (None, call):
            read.append(tensor.clone())  # later operations may write to it
        return tensor

    return (layers if layer in layers else (*layers, layer)), edited


def _only_call(read: Sequence[Tensor], layer: Layer) -> Tensor:
    if len(read) != 1:
        raise ValueError(
            f"`{layer}` is called {len(read)} times in a forward: choose a call, `{layer}#0` to "
            f"`{layer}#{len(read) - 1}`."
        )
    return select(read[0], None)


def _in_dtypes(pull: Pull, dtypes: Sequence[torch.dtype], cotangent: Tensor, reduce: Reduce | None = None) -> Tensors:
    """Pull back, and cast the gradients to the dtypes of the activations."""

    def cast(gradients: Tensors) -> Tensors:
        same = tuple(g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))
        return same if reduce is None else reduce(same)

    return pull(cotangent, cast)


# -- forwards with their way back


def _pull_one(back: Back, cotangent: Tensor, reduce: Reduce | None = None) -> Tensors:
    """Pull the cotangent of one target back."""
    gradients = back((cotangent,))
    result = gradients if reduce is None else reduce(gradients)
    if type(cotangent) is Tensor and not compiling() and not is_functorch_wrapped_tensor(cotangent):
        return result
    return tuple(poisoned(r, cotangent) for r in result)  # an index that cannot be read may be no class


def linearised(
    function: Callable[..., tuple[Tensors, Tensors]], primals: Sequence[Tensor], plain: bool
) -> tuple[Tensors, Back, Tensors]:
    """Return outputs, pull and auxiliary tensors: by `torch.autograd` where no transform is at work, else `torch.func`.

    They give the same; a call of torch.func costs some 10 microseconds an operation more. `None` is a cotangent of 0.
    """
    if not plain:
        return _by_vjp(function, primals)
    try:
        with nullcontext() if current_level() is None else outside_transforms(), torch.enable_grad():
            leaves = [(p.clone() if p.is_inference() else p.detach()).requires_grad_() for p in primals]
            outputs, auxiliary = function(*leaves)
    except RuntimeError as error:
        if current_level() is None or "vmap" not in str(error):
            raise
        return _by_vjp(function, primals)  # a rule holds the target: the forward depends on it

    def pull(cotangents: Sequence[Tensor | None]) -> Tensors:
        reached = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None and y.requires_grad]
        if not reached:  # nothing on the way to the output depends on the primals
            return tuple(torch.zeros_like(p) for p in leaves)
        ends, given = [y for y, _ in reached], [c for _, c in reached]
        keep = torch.is_grad_enabled() and any(
            [c.requires_grad or (is_functorch_wrapped_tensor(c) and bare(c).requires_grad) for c in given]  # noqa: C419 (faster)
        )
        gradients = torch.autograd.grad(ends, leaves, given, retain_graph=True, create_graph=keep, allow_unused=True)
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves, strict=True))

    return tuple(output.detach() for output in outputs), pull, tuple(a.detach() for a in auxiliary)


def _by_vjp(function: Callable[..., Any], primals: Sequence[Tensor]) -> tuple[Any, Back, Any]:
    outputs, back, auxiliary = vjp(function, *primals, has_aux=True)  # pyright: ignore[reportAssignmentType]

    def pull(cotangents: Sequence[Tensor | None]) -> Tensors:
        return back(tuple(torch.zeros_like(y) if c is None else c for y, c in zip(outputs, cotangents, strict=True)))

    return outputs, pull, auxiliary
