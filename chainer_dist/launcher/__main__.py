"""Start the launcher, or a rank's monitor, without importing Chainer.

To import a module of a package is to import the package first, here with Chainer and NumPy: a second or
more. So this file is run by its path, by the script ``chainer-dist`` and for each rank, and puts
a bare package in the place of chainer_dist, through which only the launcher's own modules are imported.
Followed by ``module`` and a name it runs a module of the package, with all that belongs to it.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType


def main() -> int:
    """Do what the command line says and return the exit status."""
    here = Path(__file__).resolve().parent
    if sys.path and Path(sys.path[0]).resolve() == here:
        del sys.path[0]  # modules of the launcher are not top-level ones
    if sys.argv[1:2] == ["module"]:
        # As python -m, but what lies in the current directory is not imported.
        sys.path.append(str(here.parent.parent))
        del sys.argv[:2]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return 0
    if "chainer_dist" not in sys.modules:
        package = ModuleType("chainer_dist")
        package.__path__ = [str(here.parent)]
        sys.modules["chainer_dist"] = package
    if sys.argv[1:2] == ["rank"]:
        from chainer_dist.launcher import rank

        return rank.main(sys.argv[2:])
    from chainer_dist.launcher import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
