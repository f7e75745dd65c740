"""Begins a worker, with the memory of its process kept first unless it is told otherwise.

``python -m experiments.speed.start MODULE ARGUMENTS`` runs a module as ``python -m`` does. Whatever
framework that imports, the C library has its setting before: that of `pockjax.keep_memory`, whose
file is run from its path, as most peers' environments have neither pockjax nor JAX.
"""

import runpy
import sys
from pathlib import Path

ALLOCATOR = Path(__file__).parents[2] / "pockjax" / "_allocator.py"


def main() -> None:
    """Set the options, and become the module."""
    runpy.run_path(str(ALLOCATOR))["set_options"]()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
