"""From a method to its result in few steps: what a reader meets is what a call enters."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pullback

HOME = str(Path(pullback.__file__).parent)
MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
PARAMS, X = pullback.params_of(MODEL), torch.randn(1, 3, 8, 8)


def entered(call) -> tuple[set[tuple[str, str]], set[str]]:
    """The functions of the package that a call enters, comprehensions aside, and their files."""
    call()  # the first call imports, and remembers shapes
    functions: set[tuple[str, str]] = set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(HOME) and not code.co_name.startswith("<"):
            functions.add((code.co_filename.removeprefix(HOME + "/"), code.co_qualname))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return functions, {file for file, _ in functions}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="qualified names of code are newer")
@pytest.mark.parametrize(
    ("call", "functions", "files"),
    [
        (lambda: pullback.gradient(PARAMS, MODEL, X, 1), 30, 7),
        (lambda: pullback.integrated_gradients(PARAMS, MODEL, X, 1, steps=4), 45, 12),
        (lambda: pullback.grad_cam(PARAMS, MODEL, X, 1, layer="1"), 50, 15),
    ],
    ids=["gradient", "integrated_gradients", "grad_cam"],
)
def test_a_call_enters_few_functions(call, functions, files):
    found, where = entered(call)
    assert len(found) <= functions, sorted(found)
    assert len(where) <= files, sorted(where)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="qualified names of code are newer")
def test_the_walk_of_a_gradient_is_the_one_that_architecture_describes():
    """ARCHITECTURE.md names the functions on the way from `gradient` to `torch.autograd.grad`, in their order."""
    text = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    walk = text.split("## A reader's walk")[1].split("\n## ")[0]
    found, _ = entered(lambda: pullback.gradient(PARAMS, MODEL, X, 1))
    names = {name.split(".")[-1] for _, name in found}
    told = [part for part in walk.split("`")[1::2] if part.rstrip("()").split(".")[-1] in names]
    assert {"gradient", "bind", "pullback", "run_model", "cotangent", "like"} <= {t.split(".")[-1] for t in told}
    for file, name in found:
        if not name.split(".")[-1].startswith("_"):
            assert name.split(".")[-1] in walk, (
                f"{file}: `{name}` is met on the way, and ARCHITECTURE.md does not say so"
            )
