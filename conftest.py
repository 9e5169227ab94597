"""What every test stands on: one thread, fixed seeds, and a torchvision that imports on any build of torch."""

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would fetch weights must fail, not fetch

import numpy as np
import pytest
import torch

import pullback

torch.set_num_threads(1)

if find_spec("zarr") is None:  # it needs a later Python than this package does
    collect_ignore = ["src/pullback/dataset/_run.py"]


def _let_torchvision_import() -> None:
    # torchvision registers fake kernels for its own operators on import. Where its compiled half is missing or was
    # built for another torch, the operators do not exist and the import fails; declared, they need no kernel.
    global _library
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _library = torch.library.Library("torchvision", "DEF")
        _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:
        pass


_let_torchvision_import()

OLD = torch.__version__.startswith("2.0.")  # the oldest torch: `make test-oldest`
OLD_WARNINGS = [  # of torch and torchvision of that time about themselves
    "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
    "ignore:Lazy modules are a new feature:UserWarning",
    "ignore:\\s*The torchvision.datapoints and torchvision.transforms.v2 namespaces are still Beta:UserWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    for line in OLD_WARNINGS if OLD else ():
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if OLD else ():
        if "compile" in item.nodeid and "test_laws" not in item.nodeid:  # which asserts that it raises
            item.add_marker(pytest.mark.skip(reason="torch 2.0 compiles no function mode, so no method as one graph"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (other packages draw from it)


@pytest.fixture(autouse=True)
def _names_for_doctests(doctest_namespace: dict[str, object]) -> None:
    """Examples in docstrings may use `torch` and the public names without importing them."""
    doctest_namespace["torch"] = torch
    doctest_namespace.update((name, getattr(pullback, name)) for name in pullback.__all__)
