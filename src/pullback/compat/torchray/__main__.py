"""Run a script, or a module by ``-m``, that was written for TorchRay: ``python -m pullback.compat.torchray SCRIPT``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from pullback.compat.torchray import install

USAGE = "usage: python -m pullback.compat.torchray (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main(arguments: list[str]) -> int:
    """Run what `arguments` name as ``__main__``, with ``import torchray`` resolving to this package."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    module = arguments[1:2] if arguments[:1] == ["-m"] else []
    script = [] if arguments[:1] == ["-m"] else arguments[:1]
    if not module and not script:
        print(USAGE, file=sys.stderr)
        return 2
    if script and not Path(script[0]).is_file():
        print(f"pullback.compat.torchray: error: no script {script[0]!r}", file=sys.stderr)
        return 2
    install()
    if module:
        sys.argv = arguments[1:]
        runpy.run_module(module[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(script[0]).resolve().parent)
        runpy.run_path(script[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
