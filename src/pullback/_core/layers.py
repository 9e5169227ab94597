"""Read and edit what layers return (or receive) during one call of a model copy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pullback._core.module_copy import ModuleCopy
from pullback._core.modules import nearest, set_plainly
from pullback._core.types import Layer

Edit: TypeAlias = "Callable[[Layer, int, Tensor], Tensor]"  # from layer, number of the call, activation


@dataclass(frozen=True)
class LayerShape:
    """The shape of a layer's activation in one call of it.

    `aliases_input`: the layer works in place, or its result is written to later, so that an edit must be written into
    the layer's own input tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    aliases_input: bool = False


LayerShapes: TypeAlias = "Mapping[Layer, Sequence[LayerShape]]"


def find_part(value: Any, layer: Layer) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Find the tensor that `layer` means in what a module returned; return it, and how to put another in its place."""
    if isinstance(value, Tensor):
        if layer.part not in (None, 0):
            raise ValueError(f"`layer` asks for part {layer.part!r} of `{layer.name}`, which gives a single tensor.")
        return value, lambda new: new
    if isinstance(value, Mapping):
        keys = [k for k, v in value.items() if isinstance(v, Tensor)]
        if isinstance(layer.part, int) and layer.part < len(keys):
            key = keys[layer.part]
        else:
            key = keys[0] if layer.part is None and keys else layer.part
        if key not in keys:
            raise ValueError(f"`layer` asks for part {layer.part!r} of `{layer.name}`; it gives {keys}.")

        def put(new: Tensor) -> Any:
            if type(value) is dict:
                return {**value, key: new}
            return type(value)(**{**value, key: new})

        return value[key], put
    if isinstance(value, Sequence) and not isinstance(value, str):
        places = [i for i, v in enumerate(value) if isinstance(v, Tensor)]
        nested = [i for i, v in enumerate(value) if isinstance(v, list | tuple)]
        index = places[0] if layer.part is None and places else layer.part
        if not isinstance(index, int) or index not in places + nested:
            raise ValueError(f"`layer` asks for part {layer.part!r} of `{layer.name}`; it has tensors at {places}.")
        inner, put_inner = find_part(value[index], replace(layer, part=None))

        def put_item(new: Tensor) -> Any:
            items = [*value[:index], put_inner(new), *value[index + 1 :]]
            if hasattr(value, "_fields"):
                return type(value)(*items)  # a named tuple
            return type(value)(items)  # pyright: ignore[reportCallIssue]

        return inner, put_item
    raise ValueError(f"`layer` names `{layer.name}`, which gives {type(value).__name__}, not a tensor.")


class attach:
    """Hook `edit` to the copies of `layers`.

    `edit` runs outside of the rules: it must use aten overloads, which no table of rules names.

    Attributes:
        calls: How often each layer was called.
        undo: What removes the hooks.
    """

    def __init__(self, model_copy: ModuleCopy, layers: Sequence[Layer], edit: Edit, shapes: LayerShapes) -> None:
        self.calls = dict.fromkeys(layers, 0)
        self.edit, self.shapes = edit, shapes
        self.undo: list[Callable[[], None]] = []
        for layer in layers:
            aliases = any([shape.aliases_input for shape in shapes.get(layer, ())])  # noqa: C419 (faster)
            if layer.at == "input":
                before, after = self._before, None
            else:
                before, after = (self._before_in_place, self._after_in_place) if aliases else (None, self._after)
            self.undo.append(around(find_module(model_copy, layer), layer, before, after))

    def _edited(self, layer: Layer, tensor: Tensor) -> Tensor:
        call = self.calls[layer]
        self.calls[layer] = call + 1
        return self.edit(layer, call, tensor)

    def _aliases_input(self, layer: Layer) -> bool:
        shapes = self.shapes.get(layer, ())
        return self.calls[layer] < len(shapes) and shapes[self.calls[layer]].aliases_input

    def _after(self, layer: Layer, args: tuple[Any, ...], result: Any) -> Any:
        tensor, put = find_part(result, layer)
        call = self.calls[layer]
        self.calls[layer] = call + 1
        return put(self.edit(layer, call, tensor))

    def _before(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Edit what the layer receives. Where the layer writes to it, edit the tensor itself, which others share."""
        aliases_input = self._aliases_input(layer)
        tensor, put = find_part(args or kwargs, layer)
        if aliases_input:
            tensor.copy_(self._edited(layer, tensor.clone()))
            return args, kwargs
        edited = put(self._edited(layer, tensor))
        return (edited, kwargs) if args else (args, edited)

    def _before_in_place(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let a layer that works in place work on a clone: `_after_in_place` writes the result to the original."""
        if not self._aliases_input(layer):
            return args, kwargs
        tensor, put = find_part(args, replace(layer, part=None))
        return put(tensor.clone()), kwargs

    def _after_in_place(self, layer: Layer, args: tuple[Any, ...], result: Any) -> Any:
        if not self._aliases_input(layer):
            return self._after(layer, args, result)
        tensor, put = find_part(result, layer)
        original, _ = find_part(args, replace(layer, part=None))
        return put(original.copy_(self._edited(layer, tensor)))


def around(
    module: nn.Module, layer: Layer, before: Callable[..., Any] | None, after: Callable[..., Any] | None
) -> Callable[[], None]:
    """Run `before(layer, args, kwargs)` and `after(layer, args, result)` around a module's call and its hooks.

    Returns what undoes it.
    """
    call = module.forward
    if module._forward_hooks or module._forward_pre_hooks:
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        call = twin

    def forward(*args: Any, **kwargs: Any) -> Any:
        args_, kwargs_ = (args, kwargs) if before is None else before(layer, args, kwargs)
        result = call(*args_, **kwargs_)
        return result if after is None else after(layer, args, result)

    def undo() -> None:
        set_plainly(module, "forward", call)

    set_plainly(module, "forward", forward)
    return undo


def find_module(model_copy: ModuleCopy, layer: Layer) -> nn.Module:
    """Return the copy of the module that a layer names."""
    module = model_copy.submodule(layer.name)
    if module is None:
        near = nearest(layer.name, [name for name, _ in model_copy.named_modules() if name])
        raise ValueError(f"No layer `{layer.name}` in the model. {near}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"`layer` names `{layer.name}`, a scripted module, whose inside cannot be reached. "
            "Explain the module before `torch.jit.script`."
        )
    return module
