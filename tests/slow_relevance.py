"""Relevance by explicit matrices, as the papers define it; no code shared with `src`."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

Linear = Callable[[Tensor], Tensor]


def matrix(function: Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix `[out in]` and the constant `[out]` of an affine function, one basis vector at a time."""
    zero = torch.zeros_like(x)
    constant = function(zero).flatten()
    columns = []
    for i in range(x.numel()):
        unit = zero.clone()
        unit.view(-1)[i] = 1
        columns.append(function(unit).flatten() - constant)
    return torch.stack(columns, 1), constant


def away(z: float, epsilon: float) -> float:
    return z + epsilon if z >= 0 else z - epsilon


def shared(contributions: Tensor, extra: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """R_i = sum_j q_ji / (sum_k q_jk + extra_j) R_j, by loops."""
    result = torch.zeros(contributions.shape[1], dtype=contributions.dtype)
    for j in range(contributions.shape[0]):
        total = away(float(contributions[j].sum() + extra[j]), epsilon)
        for i in range(contributions.shape[1]):
            result[i] += contributions[j, i] / total * relevance[j]
    return result


def up(t: Tensor) -> Tensor:
    return t.clamp(min=0)


def down(t: Tensor) -> Tensor:
    return t.clamp(max=0)


def epsilon(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    return shared(w * x, b, r, eps)


def z_plus(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    return shared(up(w * x), up(b), r, eps)


def alpha_beta(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    return 2 * shared(up(w * x), up(b), r, eps) - shared(down(w * x), down(b), r, eps)


def gamma(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    """What agrees with the sign of the output counts 1.25 times."""
    result = torch.zeros_like(x)
    for j in range(len(w)):
        q, y = w[j] * x, float((w[j] * x).sum() + b[j])
        agreeing = up if y > 0 else down
        one, extra = q + 0.25 * agreeing(q), b[j] + 0.25 * agreeing(b[j])
        if y != 0:
            result += shared(one[None], extra[None], r[j : j + 1], eps)
    return result


def z_box(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    """Between -3 and 3."""
    return shared(w * x + 3 * up(w) - 3 * down(w), torch.zeros_like(b), r, eps)


def w_square(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    return shared(w**2, b**2, r, eps)


def flat(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    """All inputs that a unit looks at, equally: those with a weight, which here is never 0 by chance."""
    return shared((w != 0).to(w.dtype), torch.zeros_like(b), r, eps)


def excitation(w: Tensor, b: Tensor, x: Tensor, r: Tensor) -> Tensor:
    return shared(up(w * x), torch.zeros_like(b), r, 1e-20)


def through(layers: list[nn.Module], x: Tensor, relevance: Tensor, rule: Callable[..., Tensor]) -> list[Tensor]:
    """Relevance of one example at the input of every layer of a sequence; what has no weight keeps or moves it."""
    inputs = [x]
    for layer in layers:
        inputs.append(layer(inputs[-1]).detach())
    found = [relevance]
    for layer, h in zip(reversed(layers), reversed(inputs[:-1])):
        if isinstance(layer, nn.ReLU | nn.GELU | nn.Tanh | nn.Flatten | nn.Identity):
            relevance = relevance.reshape(h.shape)
        elif isinstance(layer, nn.MaxPool2d):
            jacobian = torch.autograd.functional.jacobian(layer, h).reshape(-1, h.numel())  # type: ignore[arg-type]
            relevance = (relevance.flatten() @ jacobian).reshape(h.shape)
        else:
            w, b = matrix(layer, h)
            pooled = isinstance(layer, nn.AvgPool2d)  # no parameters: in proportion, whatever the rule
            way = functools.partial(epsilon, eps=0.0) if pooled else rule
            relevance = way(w.detach(), b.detach(), h.flatten(), relevance.flatten()).reshape(h.shape)
        found.append(relevance)
    return found[::-1]


# ---- any graph ----------------------------------------------------------------------------------------------------


def edges(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The matrices of a function that is linear in all of its inputs together, one for each of them."""
    found = []
    for k, own in enumerate(inputs):
        others = [torch.zeros_like(v) for v in inputs]

        def of_one(v: Tensor, k: int = k, others: list[Tensor] = others) -> Tensor:
            return function(*others[:k], v, *others[k + 1 :])

        found.append(matrix(of_one, own)[0])
    return found


def over_graph(model: nn.Module, x: Tensor, seed: Tensor, rule: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Relevance of one example at every node of a graph that `torch.fx` can trace, edge by edge: branches are seen.

    `seed` is the relevance of the output. Modules with a weight go by `rule`, batch norm together with what is before
    it; functions of one input that are not linear hand relevance on; maximum pooling gives it to the maximum; sums,
    concatenation and whatever else is linear share it in proportion.
    """
    traced = fx.symbolic_trace(model)
    values: dict[fx.Node, Tensor] = {}
    calls: dict[fx.Node, tuple[Callable[..., Tensor], list[fx.Node]]] = {}
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = x
            continue
        parents = list(node.all_input_nodes)
        if node.op == "call_module":
            function: Callable[..., Tensor] = modules[node.target]
        elif node.op == "output":
            function = torch.clone
        else:
            function = _replayed(node, parents)
        values[node] = function(*(values[p].clone() for p in parents)).detach()  # no edit in place reaches another node
        calls[node] = function, parents
    relevance = {node: torch.zeros_like(v) for node, v in values.items()}
    *nodes, last = traced.graph.nodes
    relevance[last] = seed
    for node in reversed([*nodes, last]):
        if node not in calls:
            continue
        (function, parents), r = calls[node], relevance[node].flatten()
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        inputs = [values[p] for p in parents]
        if isinstance(module, nn.BatchNorm2d) and calls[parents[0]][1]:  # one linear map with the one before
            before, parents = calls[parents[0]]
            inputs = [values[p] for p in parents]
            function = lambda v, f=before, g=module: g(f(v))  # noqa: E731
        if isinstance(module, nn.BatchNorm2d) or any(True for _ in (module or nn.Identity()).parameters()):
            w, b = matrix(function, inputs[0])
            shares = [rule(w.detach(), b.detach(), inputs[0].flatten(), r)]
        elif _name(node, module) in PASSING:
            shares = [r]
        elif "max_pool" in _name(node, module) or isinstance(module, nn.MaxPool2d):
            jacobian = torch.autograd.functional.jacobian(function, inputs[0])
            shares = [r @ jacobian.reshape(-1, inputs[0].numel())]  # type: ignore[union-attr]
        else:
            total = values[node].flatten()
            part = torch.where(total == 0, torch.zeros_like(r), r / torch.where(total == 0, 1.0, total))
            shares = [v.flatten() * (part @ m) for v, m in zip(inputs, edges(function, inputs))]
        for parent, share in zip(parents, shares):
            relevance[parent] = relevance[parent] + share.reshape(values[parent].shape)
    return {node.name: r for node, r in relevance.items()}


PASSING = {"relu", "relu_", "gelu", "silu", "tanh", "sigmoid", "ReLU", "GELU", "SiLU", "Tanh"}


def _name(node: fx.Node, module: nn.Module | None) -> str:
    return type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))


def _replayed(node: fx.Node, parents: list[fx.Node]) -> Callable[..., Tensor]:
    """A function or method call, of the nodes that go into it."""

    def function(*given: Tensor) -> Tensor:
        values = dict(zip(parents, given))
        args = fx.node.map_arg(node.args, lambda n: values[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)  # type: ignore[index]
        return node.target(*args, **kwargs)  # type: ignore[operator, misc]

    return function
