"""Start the MongoDB server that `logging` writes to: ``python -m pullback.compat.torchray.benchmark.server``."""

from __future__ import annotations

import shutil
import subprocess

from pullback.compat.torchray.utils import get_config, xmkdir

__all__ = ["run_server"]


def run_server() -> None:
    """Run MongoDB with the settings of `get_config`, until it ends."""
    config = get_config()["mongo"]
    program = shutil.which(config["server"])
    if program is None:
        raise FileNotFoundError(
            f"No program `{config['server']}` to run MongoDB by: install it, or set `server` in the section `mongo` of "
            "`.torchrayrc`."
        )
    xmkdir(config["database"])
    subprocess.run([program, "--dbpath", config["database"], "--port", str(config["port"])], check=True)


if __name__ == "__main__":
    run_server()
