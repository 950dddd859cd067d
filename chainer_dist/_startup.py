"""Waits for the first import of Chainer in any interpreter, so that it is repaired without being asked.

With ``CHAINER_DIST_AS_CHAINERMN=1`` in the environment it waits for that of ChainerMN, too, in whose place
the package is imported; see ``chainer_dist.chainermn``.

This source is the content of ``chainer_dist.pth``, which ``setup.py`` writes into the wheel and which
Python runs at every start. So it is short, and imports nothing before the program imports ``chainer``.
"""

import os
import sys

TYPE_CHECKING = False  # typing would be one more import
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec


class ChainerFinder:
    """A meta-path finder that hands the first search for ``chainer`` over to ``chainer_dist._compat``."""

    @classmethod
    def find_spec(cls, name: str, *_: object) -> "ModuleSpec | None":
        """Load the shim and search again, now with the shim's own finder in front."""
        if name != "chainer":
            return None
        sys.meta_path.remove(cls)
        from importlib import machinery, util

        package = util.find_spec("chainer_dist")  # of a top-level package this imports nothing
        folders = package and package.submodule_search_locations
        # The package may have been removed under this finder; then Chainer is on its own.
        spec = folders and machinery.PathFinder.find_spec("chainer_dist._compat", folders)
        if spec and spec.loader and spec.name not in sys.modules:
            shim = util.module_from_spec(spec)
            try:
                spec.loader.exec_module(shim)
            except Exception as error:
                raise ImportError(
                    f"chainer_dist.pth could not repair Chainer, {spec.origin} failed with {error!r}: "
                    "reinstall chainer_dist, or uninstall it"
                ) from error
            sys.modules[spec.name] = shim
        return util.find_spec(name)


class ChainerMNFinder:
    """A meta-path finder that hands the first search for ``chainermn`` over to ``chainer_dist``."""

    @classmethod
    def find_spec(cls, name: str, *_: object) -> "ModuleSpec | None":
        """Import the package, which puts a finder of its own in front, and search again."""
        if name != "chainermn":
            return None
        sys.meta_path.remove(cls)
        from importlib import import_module, util

        import_module("chainer_dist")
        return util.find_spec(name)


sys.meta_path.insert(0, ChainerFinder)
if os.environ.get("CHAINER_DIST_AS_CHAINERMN", "0") not in ("0", ""):
    sys.meta_path.insert(0, ChainerMNFinder)
