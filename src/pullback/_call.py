"""Call a model as a pure function, and pull cotangents back through the call.

`pullback` is the one wrapper on `torch.func.vjp`: every gradient-like method is `pull(cotangent(output, target))`.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vjp

from pullback import _native
from pullback._direct import run_directly
from pullback._ops import KEPT, Table, swapped
from pullback._probe import described, known, probe, remember, shapes
from pullback._shell import Params, Shell, is_scripted, named_layers
from pullback._taps import Layer, Seen, Site, around, attach
from pullback._targets import (
    Back,
    Pull,
    check_indices,
    check_range,
    clean,
    measuring,
    note_forward,
    only_targets,
    readable,
    shared_pull,
    shortcuts,
)
from pullback._torch import compiling, current_level, is_functorch_wrapped_tensor, outside_transforms, pulled_back

Model: TypeAlias = "nn.Module | Callable[[Any, Any], Any]"
Inputs: TypeAlias = "Tensor | tuple[Tensor, ...] | dict[str, Tensor]"
Target: TypeAlias = "int | Sequence[int] | np.ndarray | Tensor | Callable[[Tensor], Tensor] | None"
Select: TypeAlias = "str | int | Layer | Callable[[Any], Tensor] | None"


class PullbackWarning(UserWarning):
    """Something in the model is explained otherwise than the caller may expect."""


def params_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect parameters and floating-point buffers by name, detached.

    Wrappers (`torch.compile`, `DataParallel`) leave no trace in the names. Integer buffers stay with the model, so that
    `torch.func.grad` over the dict works.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> list(params_of(model))
        ['0.weight', '0.bias', '1.weight', '1.bias', '1.running_mean', '1.running_var']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for kind in ("_parameters", "_buffers"):
        for prefix, module in named_layers(model):
            if is_scripted(module):
                named = module.named_parameters() if kind == "_parameters" else module.named_buffers()
            else:
                named = getattr(module, kind).items()
            for name, tensor in named:
                if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
                    continue
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return found


# -- inputs


class Leaves:
    """The floating-point tensors of `x`, apart from the rest, and the way back to the structure of `x`."""

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
        for key, value in items:
            if value is not None and not isinstance(value, Tensor):
                where = "" if key is None else f" at {key!r}"
                raise TypeError(f"`x` must hold tensors, got {type(value).__name__}{where}.")
        self.items = items
        self.floating = [k for k, v in items if v is not None and (v.is_floating_point() or v.is_complex())]

    @property
    def batch(self) -> int:
        """The number of examples: the length of the first axis of the first tensor."""
        return next(v.shape[0] for _, v in self.items if v is not None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(v for k, v in self.items if k in self.floating)

    def rebuild(self, tensors: Sequence[Tensor], others: Callable[[Any], Any]) -> Any:
        """Put `tensors` in the places of the floating-point ones, and `others(value)` in the rest."""
        if isinstance(self.x, Tensor):
            return tensors[0] if self.floating else others(self.x)
        new = dict(zip(self.floating, tensors, strict=True))
        values = {k: new[k] if k in new else others(v) for k, v in self.items}
        return tuple(values.values()) if isinstance(self.x, tuple) else values


# -- the door


F = TypeVar("F", bound=Callable[..., Any])
_scope = threading.local()


def public(function: F) -> F:
    """Make a public method of a function: it leaves inference mode, and tells what it has to tell once a call."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if compiling():
            return function(*args, **kwargs)
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if getattr(_scope, "told", None) is not None:  # inside another method
                return function(*args, **kwargs)
            told: dict[str, dict[str, None]] = {}
            _scope.told = told
            try:
                result = function(*args, **kwargs)
            finally:
                _scope.told = None
            for message in told:
                warnings.warn(message, PullbackWarning, stacklevel=2)
            return result

    return called  # pyright: ignore[reportReturnType]


def tell(message: str) -> None:
    """Warn at the end of the call of the method that is running, once."""
    if compiling():
        return
    told = getattr(_scope, "told", None)
    if told is None:
        warnings.warn(message, PullbackWarning, stacklevel=3)
    else:
        told[message] = {}


def _report(mode: swapped, strict: bool) -> None:
    if not mode.told or (compiling() and not strict):
        return
    dropped = mode.told.pop(_native.DROPOUT, None)
    if dropped is not None:
        tell(f"Dropout hard-coded with training=True{_where(dropped)} is left out: an explanation is not random.")
    if not mode.told:
        return
    assert mode.table is not None
    uncovered = ", ".join(f"`{operation}`{_where(layers)}" for operation, layers in mode.told.items())
    message = f"{mode.table.name} do not cover {uncovered}: what they do not cover keeps its own derivative."
    if strict:
        raise ValueError(f"{message} Give `rules` that cover it, or `strict=False`.")
    tell(message)


def _where(layers: Mapping[str, None]) -> str:
    named = [f"`{layer}`" for layer in layers if layer]
    return f" in {', '.join(named[:5])}{' ...' if len(named) > 5 else ''}" if named else ""


# -- one forward


def run(
    params: Params,
    model: Model,
    x: Inputs,
    *,
    output: Select = None,
    table: Table | None = None,
    strict: bool = False,
    sites: Sequence[Site] = (),
    edit: Callable[[Site, int, Tensor], Tensor] | None = None,
    seen: Mapping[Site, Sequence[Seen]] | None = None,
) -> Tensor:
    """Run the model once, in eval mode, on a shell, with the operations of `table` traded and layers edited.

    Rules may rely on what the graph keeps; a model that writes to it is run again without, and known from then on.
    """
    read: list[Tensor] = []
    if isinstance(output, Layer):
        sites, edit = _reading(Site.parse(output.name, output.at), read, sites, edit)
    leaves = Leaves(x)
    mode, result = _forward(params, model, leaves, table, sites, edit, seen or {})
    if mode.overwritten():
        _writers.add(model)
        read.clear()
        mode, result = _forward(params, model, leaves, table, sites, edit, seen or {})
    _report(mode, strict)
    if isinstance(output, Layer):
        y = select(_only_call(read, Site.parse(output.name, output.at)), None)
    else:
        y = select(result, output)
    note_forward(mode, y)
    return y


_writers: weakref.WeakSet[Any] = weakref.WeakSet()


def _forward(
    params: Params,
    model: Model,
    leaves: Leaves,
    table: Table | None,
    sites: Sequence[Site],
    edit: Callable[[Site, int, Tensor], Tensor] | None,
    seen: Mapping[Site, Sequence[Seen]],
) -> tuple[swapped, Any]:
    x = leaves.rebuild([t.clone() for t in leaves.tensors], lambda v: None if v is None else v.clone())
    mode = swapped(table)
    mode.measures, mode.narrow = measuring(leaves.tensors)
    if isinstance(model, nn.Module):
        if table is not None and not compiling() and model not in _writers:
            mode.memo[KEPT] = []
        return mode, _run_module(params, model, x, mode, sites, edit, seen)
    if not callable(model):
        raise TypeError(f"`model` must be a torch.nn.Module or a function, got {type(model).__name__}.")
    if sites:
        raise ValueError("`layer` needs a torch.nn.Module, got a function as `model`: it has no named layers.")
    _note_constants(mode, params)
    with mode:
        return mode, model(params, x)


def _reading(
    site: Site, read: list[Tensor], sites: Sequence[Site], edit: Callable[[Site, int, Tensor], Tensor] | None
) -> tuple[Sequence[Site], Callable[[Site, int, Tensor], Tensor]]:
    """Add to the edits of a forward that what passes `site` is kept in `read`."""

    def edited(at: Site, call: int, tensor: Tensor) -> Tensor:
        tensor = edit(at, call, tensor) if edit is not None and at in sites else tensor
        if at == site and site.call in (None, call):
            read.append(tensor.clone())  # what comes after may write to it
        return tensor

    return (sites if site in sites else (*sites, site)), edited


def activations(params: Params, model: Model, x: Inputs, layer: str = "", at: str = "output") -> tuple[Tensor, ...]:
    """Give what `pullback` takes the derivative at, without a derivative: one tensor a call of the layer."""
    site = Site.parse(layer, at)
    if not site.name:
        return Leaves(x).tensors
    read: list[Tensor] = []
    sites, edit = _reading(site, read, (), None)
    run(params, model, x, output=lambda result: torch.zeros(()), sites=sites, edit=edit)
    return tuple(read)


def _only_call(read: Sequence[Tensor], site: Site) -> Tensor:
    if len(read) != 1:
        raise ValueError(
            f"`{site}` is called {len(read)} times in a forward: choose a call, `{site}#0` to `{site}#{len(read) - 1}`."
        )
    return read[0]


def activation(params: Params, model: Model, x: Inputs, *, layer: str, at: str = "output") -> Tensor:
    """Read a layer's activation, ``[batch ...]``. Costs 1 forward.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(inplace=True))
        >>> params, x = params_of(model), torch.randn(2, 3)
        >>> torch.equal(activation(params, model, x, layer="0"), model[0](x))
        True
    """
    return run(params, model, x, output=Layer(layer, at))


def _run_module(
    params: Params,
    model: nn.Module,
    x: Any,
    mode: swapped,
    sites: Sequence[Site],
    edit: Callable[[Site, int, Tensor], Tensor] | None,
    seen: Mapping[Site, Sequence[Seen]],
) -> Any:
    args = (x,) if isinstance(x, Tensor) else x if isinstance(x, tuple) else ()
    kwargs = dict(x) if isinstance(x, Mapping) else {}
    if compiling():
        shell = _SHELLS[_prepare(model)]
    else:
        shell = Shell(model)
        shell.install(params)
        _check_scripted(shell, mode.table)
    undo: list[Callable[[], None]] = []
    if mode.table is None and not compiling():
        undo.append(run_directly(shell.copies(), mode))
    tap = None if edit is None else attach(shell, sites, _measured(edit, mode), seen)
    if tap is not None:
        undo.append(tap.detach)
    if mode.table is not None and mode.table.wants_layers:
        undo += _follow_layers(shell, mode)
    _note_constants(mode, params if compiling() else shell.root)
    with mode:
        if compiling():
            result = functional_call(shell.root, params, args, kwargs)  # pyright: ignore[reportArgumentType]
        else:
            result = shell.root(*args, **kwargs)
    for step in reversed(undo):  # a shell that compiled code runs on is kept
        step()
    if tap is not None:
        for site, calls in tap.calls.items():
            if calls <= (site.call or 0):
                raise ValueError(f"`layer` names `{site}`, but this forward calls `{site.name}` {calls} times.")
    return result


def _note_constants(mode: swapped, params: Any) -> None:
    """Note the tensors that a model holds, for rules that keep account of what depends on the input."""
    if mode.table is None or mode.table.watch is None:
        return
    if isinstance(params, nn.Module):
        held = [t for layer in params.modules() for own in (layer._parameters, layer._buffers) for t in own.values()]
    else:
        held = [t for part in (params if isinstance(params, tuple) else (params,)) for t in part.values()]
    mode.table.watch(mode.memo, None, (), {}, [t for t in held if isinstance(t, Tensor)])


def _measured(edit: Callable[[Site, int, Tensor], Tensor], mode: swapped) -> Callable[[Site, int, Tensor], Tensor]:
    """Let the account of sizes start anew at a layer: nothing is pulled back further than there."""

    def edited(site: Site, call: int, tensor: Tensor) -> Tensor:
        if call == 0:
            mode.start_account(tensor)
        return edit(site, call, tensor)

    return edited if mode.measures else edit


def _follow_layers(shell: Shell, mode: swapped) -> list[Callable[[], None]]:
    """Keep `mode.layers` the stack of names of the layers that are running."""

    def enter(site: Site, args: Any, kwargs: Any) -> Any:
        mode.layers.append(site.name)
        return args, kwargs

    def leave(site: Site, args: Any, result: Any) -> Any:
        mode.layers.pop()
        return result

    return [around(layer, Site(name), enter, leave) for name, layer in shell.layers() if not is_scripted(layer)]


def _check_scripted(shell: Shell, table: Table | None) -> None:
    if shell.unheard:
        where = ", ".join(f"`{name}`" for name in dict.fromkeys(shell.unheard))
        tell(f"Backward hooks on {where} are left out: torch.func cannot run them.")
    if table is None or not shell.has_scripted:
        return
    for name, layer in shell.layers():
        if is_scripted(layer):
            raise TypeError(
                f"`rules` cannot reach into `{name or 'model'}`, a scripted module: its operations run out of sight. "
                "Explain the module before `torch.jit.script` or `torch.jit.trace`."
            )


# Dynamo cannot trace the making of a shell, nor call a module that a constant function returns, but it traces a look-up
# in a global dict. So a compiled call makes its shell once, while tracing, and keeps it here while the model lives.
_SHELLS: dict[int, Shell] = {}


def _prepare(model: nn.Module) -> int:
    key = id(model)
    _SHELLS[key] = shell = Shell(model)
    shell.own_buffers(1)  # counters; others may change between calls, and are looked up in each
    for _, layer in shell.layers():  # what wraps a layer's call puts back what it found, so that no guard fails
        if not is_scripted(layer):
            layer.forward = layer.forward
    weakref.finalize(model, _SHELLS.pop, key, None)
    return key


_prepare._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # torch._dynamo's decorator, without its import


def select(result: Any, output: Select) -> Tensor:
    """Give the tensor that `output` names in what the model returned."""
    if callable(output):
        chosen = output(result)
    elif output is None:
        chosen = result
    elif isinstance(output, str):
        chosen = result.get(output) if isinstance(result, Mapping) else getattr(result, output, None)
    elif isinstance(output, int) and isinstance(result, Sequence | Mapping):
        values = list(result.values()) if isinstance(result, Mapping) else result
        chosen = values[output] if -len(values) <= output < len(values) else None
    else:
        chosen = None
    if isinstance(chosen, Tensor):
        if not chosen.is_floating_point() and not chosen.is_complex():
            raise TypeError(f"The model's output must be floating point to be explained, got {chosen.dtype}.")
        return chosen
    if output is None:
        raise TypeError(f"The model returns {_described(result)}, not a tensor: name the part to explain by `output`.")
    raise ValueError(f"`output` must name a tensor in what the model returns, got {output!r} for {_described(result)}.")


def _described(result: Any) -> str:
    if isinstance(result, Mapping):
        return f"{type(result).__name__} with keys {', '.join(repr(k) for k in result)}"
    if hasattr(result, "__dataclass_fields__"):
        return f"{type(result).__name__} with fields {', '.join(map(repr, result.__dataclass_fields__))}"
    if isinstance(result, tuple | list):
        return f"{type(result).__name__} of {len(result)}"
    return type(result).__name__


# -- one pullback


class Pulled(NamedTuple):
    """A forward with its way back.

    `activations`: what the derivative is taken at: the tensors of `x`, or the layer's activation, one a call.
    `pull(cotangent, reduce)`: their cotangents, as a tuple, or what `reduce` makes of them.
    `rebuild`: gives a tuple of such tensors the structure of `x`, or of the activation.
    """

    output: Tensor
    activations: tuple[Tensor, ...]
    pull: Pull
    rebuild: Callable[[Sequence[Tensor]], Any]


def pullback(
    params: Params,
    model: Model,
    x: Inputs,
    *,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    table: Table | None = None,
    strict: bool = False,
    given: Sequence[Tensor] | None = None,
) -> Pulled:
    """Run the model once, and be ready to pull cotangents of its output back to `x` or to a layer.

    For a layer, the derivative is taken with respect to a zero added to its activation: the backward pass stops there,
    what comes before records no graph, and each call of a layer that is called several times has its own zero.
    `given` takes the place of the tensors of `x`, or of the layer's activations.
    """
    site = Site.parse(layer, at)
    if site.name:
        return _pullback_to_layer(params, model, x, site, output, table, strict, given)
    leaves = Leaves(x)
    if not leaves.floating:
        raise TypeError(
            "`x` holds no floating-point tensor to explain. Name a `layer`, such as the embedding, or cast `x`."
        )

    def forward(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[()]]:
        y = run(params, model, leaves.rebuild(tensors, lambda v: v), output=output, table=table, strict=strict)
        return (y, *shortcuts()), ()

    tensors = leaves.tensors if given is None else tuple(given)
    outputs, back, _ = linearised(forward, tensors, _is_plain(params, model, leaves, tensors, output))
    return Pulled(
        outputs[0],
        tensors,
        shared_pull(back, outputs, tensors),
        lambda tensors: leaves.rebuild(tensors, lambda v: None),
    )


def _is_plain(params: Params, model: Model, leaves: Leaves, primals: Sequence[Tensor], output: Select) -> bool:
    """Say whether nothing differentiates, batches or traces this call from outside.

    The `vmap` of `over_targets` does not count where the forward cannot depend on a target: it then runs outside.
    """
    if compiling() or forward_ad._current_level >= 0:
        return False
    parts = params if isinstance(params, tuple) else (params,)
    tensors = [t for part in parts for t in part.values()]
    tensors += (*(t for _, t in leaves.items if t is not None), *primals)
    if current_level() is not None:
        pure = isinstance(model, nn.Module) and not callable(output)
        if not (pure and only_targets()) or any(is_functorch_wrapped_tensor(t) for t in tensors):
            return False
    return not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))  # noqa: C419 (faster)


def linearised(
    function: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]], primals: Sequence[Tensor], plain: bool
) -> tuple[tuple[Tensor, ...], Back, tuple[Tensor, ...]]:
    """Give outputs, pull and auxiliary tensors: `torch.func.vjp`, or `torch.autograd` where no transform is at work.

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
        return _by_vjp(function, primals)  # a rule holds the target

    def pull(cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        reached = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None and y.requires_grad]
        if not reached:  # nothing on the way to the output depends on the primals
            return tuple(torch.zeros_like(p) for p in leaves)
        gradients = pulled_back([y for y, _ in reached], leaves, [c for _, c in reached])
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves, strict=True))

    return tuple(output.detach() for output in outputs), pull, tuple(a.detach() for a in auxiliary)


def _by_vjp(function: Callable[..., Any], primals: Sequence[Tensor]) -> tuple[Any, Back, Any]:
    outputs, back, auxiliary = vjp(function, *primals, has_aux=True)  # pyright: ignore[reportAssignmentType]

    def pull(cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return back(tuple(torch.zeros_like(y) if c is None else c for y, c in zip(outputs, cotangents, strict=True)))

    return outputs, pull, auxiliary


class _Surprise(Exception):
    """A layer put out something else than the probe had seen."""


def _pullback_to_layer(
    params: Params,
    model: Model,
    x: Inputs,
    site: Site,
    output: Select,
    table: Table | None,
    strict: bool,
    given: Sequence[Tensor] | None,
) -> Pulled:
    if not isinstance(model, nn.Module):
        raise ValueError("`layer` needs a torch.nn.Module, got a function as `model`: it has no named layers.")
    seen = activations_at(params, model, x, site)
    try:
        return _pullback_to_seen(params, model, x, site, seen, output, table, strict, given)
    except _Surprise:
        seen = activations_at(params, model, x, site, real=True)
    try:
        return _pullback_to_seen(params, model, x, site, seen, output, table, strict, given)
    except _Surprise:
        raise RuntimeError(f"`layer` names `{site}`, whose activation changes its shape from run to run.") from None


def _pullback_to_seen(
    params: Params,
    model: nn.Module,
    x: Inputs,
    site: Site,
    seen: tuple[Seen, ...],
    output: Select,
    table: Table | None,
    strict: bool,
    given: Sequence[Tensor] | None = None,
) -> Pulled:
    chosen = range(len(seen)) if site.call is None else [site.call]
    if not seen or (site.call is not None and site.call >= len(seen)):
        raise ValueError(f"`layer` names `{site}`, but a forward calls `{site.name}` {len(seen)} times.")
    device = next(t for _, t in Leaves(x).items if t is not None).device
    # a zero takes no memory until something is added to it
    zeros = [torch.zeros((), dtype=seen[i].dtype, device=device).expand(seen[i].shape) for i in chosen]

    def forward(*deltas: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        activations: dict[int, Tensor] = {}

        def edit(site: Site, call: int, activation: Tensor) -> Tensor:
            if call not in chosen:
                if site.call is None:
                    raise _Surprise
                return activation
            delta = deltas[list(chosen).index(call)]
            if activation.shape != delta.shape:
                raise _Surprise
            if not activation.is_floating_point() and not activation.is_complex():
                raise TypeError(f"`layer` names `{site}`, whose activation is {activation.dtype}, not floating point.")
            if given is not None:
                activation = given[list(chosen).index(call)].to(activation.device, activation.dtype)
            activations[call] = activation
            # an overload of aten: the rules do not see it
            return torch.ops.aten.add.Tensor(activation, delta.to(activation.device, activation.dtype))

        y = run(
            params, model, x, output=output, table=table, strict=strict, sites=(site,), edit=edit, seen={site: seen}
        )
        if len(activations) != len(chosen):
            raise _Surprise
        return (y, *shortcuts()), tuple(activations[call] for call in chosen)

    plain = _is_plain(params, model, Leaves(x), (*zeros, *(given or ())), output)
    outputs, back, activations = linearised(forward, zeros, plain)

    def pull(cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return tuple(g.to(a.dtype) for g, a in zip(back(cotangents), activations, strict=True))

    return Pulled(
        outputs[0], activations, shared_pull(pull, outputs, activations), lambda tensors: _sum_calls(tensors, site)
    )


def _sum_calls(tensors: Sequence[Tensor], site: Site) -> Tensor:
    """Sum over the calls of a layer: the derivative with respect to a change that all of them share."""
    if any(t.shape != tensors[0].shape for t in tensors):
        raise ValueError(
            f"`layer` names `{site}`, called {len(tensors)} times with activations of different shapes: "
            f"choose a call, `{site}#0` to `{site}#{len(tensors) - 1}`."
        )
    return sum(tensors[1:], tensors[0])


def activations_at(params: Params, model: nn.Module, x: Inputs, site: Site, real: bool = False) -> tuple[Seen, ...]:
    if compiling():
        plan = _plan(model, site.name, site.at, site.part, described(x))
        return tuple(Seen(torch.Size(shape), dtype, through) for shape, dtype, through in plan)
    seen = None if real else known(model, x, site)
    if seen is None:
        found, real = probe(params, model, x, (site,), real)
        seen = found[site]
        remember(model, x, site, seen)
        if real:
            tell(
                f"The shape of `{site.name}` took one more forward: the model does not run on the meta device or on "
                "fake tensors. It is remembered for this input shape."
            )
    return seen


def _plan(model: nn.Module, name: str, at: str, part: int | str | None, shapes: Any) -> tuple[Any, ...]:
    """Probe while a compiled call is traced."""
    site = Site(name, at, part)

    def example(shape: Any) -> Any:
        if shape is None:
            return None
        if isinstance(shape[0], torch.Size):
            return torch.empty(shape[0], dtype=shape[1], device="meta")
        if isinstance(shape[0][0], str):
            return {key: example(value) for key, value in shape}
        return tuple(map(example, shape))

    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        found, _ = probe({}, model, example(shapes), (site,))
    return tuple((tuple(seen.shape), seen.dtype, seen.through) for seen in found[site])


_plan._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def layers(params: Params, model: nn.Module, x: Inputs) -> dict[str, tuple[torch.Size, ...]]:
    """List the layers that a forward calls: name -> shape of what it puts out, one a call, in the order they finish.

    Costs no compute where the model runs on the meta device. Layers that put out no tensor are left out.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> layers(params_of(model), model, torch.zeros(2, 3))
        {'0': (torch.Size([2, 4]),), '1': (torch.Size([2, 4]),)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module to have layers, got {type(model).__name__}.")
    Leaves(x)
    return shapes(params, model, x)


# -- targets


def cotangent(output: Tensor, target: Target) -> Tensor:
    """Give the cotangent of `output` that `target` means: the derivative of the sum of all scores.

    An index that cannot be read (under `vmap` or `torch.compile`) and is out of range gives NaN.
    """
    if callable(target):
        scores, back = vjp(lambda y: _checked_scores(target(y), output), output)  # pyright: ignore[reportAssignmentType]
        return back(torch.ones_like(scores))[0]
    if target is None:
        _checked_scores(output.reshape(output.shape[:1]) if output.shape[1:] == (1,) else output, output, given=False)
        return torch.ones_like(output)
    if type(target) is int and output.ndim > 1:  # what follows does the same, in more operations
        check_range(target, output.shape[1])
        hot = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        hot.select(1, target).fill_(1)
        return hot
    target = _as_tensor(target, output)
    if target.is_floating_point() or target.is_complex():
        return target.to(output.dtype).expand_as(output)
    return _one_hot(target, output).expand_as(output)


def score(output: Tensor, target: Target) -> Tensor:
    """Give the score of each example, ``[batch]``; at spatial outputs the sum over positions."""
    if callable(target):
        return _checked_scores(target(output), output)
    if target is None:
        scores = output.reshape(output.shape[:1]) if output.shape[1:] == (1,) else output
        return _checked_scores(scores, output, given=False)
    target = _as_tensor(target, output)
    if target.is_floating_point() or target.is_complex():
        weighted = target.to(output.dtype) * output
        return weighted.flatten(1).sum(1) if weighted.ndim > 1 else weighted
    index = target.long().reshape(-1, 1, *[1] * (output.ndim - 2)).expand(output.shape[0], 1, *output.shape[2:])
    known = (index >= 0) & (index < output.shape[1])
    picked = output.gather(1, index.clamp(0, output.shape[1] - 1))
    # by a product, so that the derivative is NaN as well
    return (picked * torch.ones_like(picked).masked_fill(~known, float("nan"))).flatten(1).sum(1)


def _checked_scores(scores: Tensor, output: Tensor, given: bool = True) -> Tensor:
    if isinstance(scores, Tensor) and scores.shape == output.shape[:1]:
        return scores
    shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if given:
        raise ValueError(f"`target` must give one score per example, shape {list(output.shape[:1])}, got {shape}.")
    raise ValueError(
        f"`target` may be None only where the output is one score per example, [batch] or [batch 1], got {shape}. "
        "Give a class index."
    )


def _as_tensor(target: Any, output: Tensor) -> Tensor:
    if isinstance(target, bool):
        raise TypeError("`target` must be a class index, got a bool.")
    given = target  # what is made of it under a transform cannot be read
    if not isinstance(target, Tensor):
        try:
            target = torch.as_tensor(np.asarray(target) if isinstance(target, list | tuple) else target)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                "`target` must be an index, one index per example, a cotangent shaped like the output, a function of "
                f"the output, or None, got {type(target).__name__}."
            ) from error
    if target.device != output.device:  # under a transform, `to` gives a tensor whose values cannot be read
        target = target.to(output.device)
    if target.is_floating_point() or target.is_complex():
        if target.shape != output.shape:
            raise ValueError(
                f"`target` of floating point is a cotangent and must have the shape of the output, "
                f"{list(output.shape)}, got {list(target.shape)}. For class indices give integers."
            )
        return target
    if target.dtype == torch.bool:
        raise TypeError("`target` must be integer indices or a floating-point cotangent, got bool.")
    if output.ndim < 2:
        raise ValueError(
            f"`target` is a class index, but the output {list(output.shape)} has no class axis. Give `target=None`."
        )
    if target.ndim > 1 or (target.ndim == 1 and target.shape[0] != output.shape[0]):
        raise ValueError(
            f"`target` must be one index, or one per example, shape [{output.shape[0]}], got {list(target.shape)}. "
            "For many targets of each example: `torch.vmap` over `target`, or `over_targets`."
        )
    if not isinstance(given, Tensor) and not compiling():
        check_range(np.asarray(given), output.shape[1])
    elif isinstance(given, Tensor) and readable(given):
        check_range(given, output.shape[1])
    else:
        check_indices(given, output.shape[1])
    return target


def _one_hot(index: Tensor, output: Tensor) -> Tensor:
    """Give ``[batch class 1 ...]``, or ``[1 class 1 ...]`` for one index: 1 at the index, NaN where it is no class."""
    classes, rest = output.shape[1], [1] * (output.ndim - 2)
    index = index.long().reshape(-1, 1)
    hot = (torch.arange(classes, device=output.device) == index).to(output.dtype)
    if clean():
        return hot.reshape(*hot.shape, *rest)
    hot = torch.where((index < 0) | (index >= classes), torch.full_like(hot, float("nan")), hot)
    return hot.reshape(*hot.shape, *rest)
