"""TorchRay's import tree on top of `pullback`: old code runs unchanged, without process-wide patches.

Stateful where TorchRay's interface is (probes and contexts around a user's own forward and backward), pure where it is
not. Three ways in:

- change the import: ``from pullback.compat.torchray.attribution.grad_cam import grad_cam``;
- one line at the start of a program: ``from pullback.compat import torchray; torchray.install()``. From then on
  ``import torchray`` and every name below it resolve to this package;
- no line at all: ``python -m pullback.compat.torchray script.py ...``.

Written from a description of what TorchRay 1.0.0.2 does, not from its source. What is kept, what is mended and why is
told beside each function.

Reference:
    Fong, Patrick & Vedaldi, Understanding Deep Networks via Extremal Perturbations and Smooth Masks, 2019.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_ALIAS = "torchray"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Give the modules of this package under TorchRay's names: one module, two names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{_ALIAS}."):
            return None
        own = __name__ + fullname[len(_ALIAS) :]
        if importlib.util.find_spec(own) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=own)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(spec.origin))
        self._specs = {**getattr(self, "_specs", {}), spec.name: module.__spec__}
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = self._specs.pop(module.__spec__.name)  # the import system has put the alias's own there


def install() -> None:
    """Make ``import torchray``, and everything below it, resolve to this package, for the rest of the process.

    Doing it twice does nothing more. A TorchRay that is installed but not imported is left where it is, unused.

    Raises:
        ImportError: If the real TorchRay has been imported before: its classes would then mix with these.
    """
    for name, module in list(sys.modules.items()):
        real = name == _ALIAS or name.startswith(f"{_ALIAS}.")
        if real and module is not None and not getattr(module, "__name__", "").startswith(__name__):
            raise ImportError(
                f"The real TorchRay is imported already (`{name}`), and its classes would mix with those of "
                f"`{__name__}`. Call `install()` before the first `import torchray`."
            )
    sys.modules[_ALIAS] = sys.modules[__name__]
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
