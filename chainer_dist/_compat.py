"""What Chainer 7.8.1 needs on today's Python and NumPy, and not to hang, before and after its import.

Importing this module is enough, before or after Chainer, and imports neither Chainer nor NumPy nor MPI:
it leaves an :class:`ImportHook` that acts when Chainer is imported. It knows nothing of the package around
it, because ``chainer_dist.pth`` loads it by its location (see ``_startup.py``).
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib
import json
import os
import sys
from copy import copy
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec

_MULTI_NODE_ITERATOR = "chainermn.iterators.multi_node_iterator"
_STARTUP = "chainer_dist._startup"


class ImportHook:
    """A meta-path finder that acts around the first successful import of one module, then leaves.

    Args:
        name: Full name of the module.
        before: Called with no argument just before the module's code runs.
        after: Called with the module when its code has run.
    """

    def __init__(
        self, name: str, before: Callable[[], None], after: Callable[[ModuleType], None]
    ) -> None:
        self.name = name
        self.before = before
        self.after = after

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders return, with its loader's ``exec_module`` wrapped."""
        if name != self.name:
            return None
        for finder in [other for other in sys.meta_path if other is not self]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                spec.loader = self._wrapped(spec.loader)
                return spec
        return None

    def _wrapped(self, loader: Any) -> Any:
        # A copy with one attribute replaced stays what it was to inspect and importlib.resources, and
        # a loader that serves other modules too (of a zip file) is left alone.
        loader = copy(loader)
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if self not in sys.meta_path:  # done already: an old spec is executed once more
                execute(module)
                return
            self._run(self.before)
            execute(module)
            self._run(self.after, module)
            sys.meta_path[:] = [it for it in sys.meta_path if it is not self]

        loader.exec_module = exec_module
        return loader

    def _run(self, step: Callable[..., None], *args: ModuleType) -> None:
        try:
            step(*args)
        except Exception as error:
            raise ImportError(
                f"chainer_dist could not adapt {self.name} to this Python and NumPy: {error!r}",
                name=self.name,
            ) from error


def prepare_chainer() -> None:
    """Put in place what Chainer's import needs; called while ``chainer`` itself is still empty."""
    _forget_failed_import()
    # The real one wants pkg_resources and numpy.distutils, both gone, to warn about cupy and old macOS.
    stub = ModuleType("chainer._environment_check", "Replaced by chainer_dist: nothing is checked.")
    stub.check = lambda: None  # type: ignore[attr-defined]
    sys.modules[stub.__name__] = stub
    restore_numpy_names()
    _import_scipy_later()


def _forget_failed_import() -> None:
    """Drop the submodules that an earlier, failed import of Chainer left: they hang on a lost parent."""
    for name in [name for name in sys.modules if name.startswith("chainer.")]:
        del sys.modules[name]


def restore_numpy_names() -> None:
    """Give NumPy the two removed names that Chainer's running code uses, where they are missing."""
    import numpy as np

    if _numpy_version() >= (1, 24):  # until then numpy.float exists, and asking for it warns
        vars(np).setdefault("float", float)  # F.resize_images
    vars(np).setdefault(
        "sctypes",  # F.as_strided
        {
            "int": [np.int8, np.int16, np.int32, np.int64],
            "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
            "float": [np.float16, np.float32, np.float64, np.longdouble],
            "complex": [np.complex64, np.complex128, np.clongdouble],
            "others": [bool, object, bytes, str, np.void],
        },
    )


class _Later(ModuleType):
    """SciPy or a module of it, in Chainer's modules, which is imported when one of its names is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ == "scipy":
            return _Later(f"scipy.{name}")
        return getattr(importlib.import_module(self.__name__), name)


def _import_scipy_later() -> None:
    """Leave SciPy, which few programs use, out of Chainer's import, of whose time it takes a third."""
    from importlib import util

    python = builtins.__import__
    if "scipy" in sys.modules or not util.find_spec("scipy") or python.__module__ == __name__:
        return

    def import_but_scipy(name: str, globals: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: A002 - its name
        importer = globals.get("__name__") if globals else None
        if name.partition(".")[0] == "scipy" and str(importer).startswith("chainer."):
            return _Later("scipy")
        return python(name, globals, *args, **kwargs)

    import_but_scipy.__wrapped__ = python  # type: ignore[attr-defined]
    builtins.__import__ = import_but_scipy


def _import_at_once() -> None:
    if builtins.__import__.__module__ == __name__:
        builtins.__import__ = builtins.__import__.__wrapped__  # type: ignore[attr-defined]


def patch_chainer(chainer: Any) -> None:
    """Replace what imports but does not run (``Categorical.log_prob`` on NumPy 2), or does not end."""
    _import_at_once()
    if _numpy_version() >= (2, 0):
        chainer.distributions.Categorical.log_prob = _categorical_log_prob
    _raise_errors_of_workers(chainer.iterators.multiprocess_iterator)
    notes = os.environ.get("CHAINER_DIST_NOTES")
    if notes:
        _take_notes(chainer, notes)
    distribute = os.environ.get("CHAINER_DIST_DISTRIBUTE", "0") not in ("0", "")
    if distribute and "chainer_dist" not in sys.modules:  # otherwise it does so itself
        importlib.import_module("chainer_dist")


def _take_notes(chainer: Any, file: str) -> None:
    """Note for ``chainer-dist run`` which reports a script writes, and whether it has not begun to communicate.

    The reader knows which process is the script: each has a file of its own.
    """
    pid = os.getpid()
    notes: dict[str, Any] = {"files": [], "alone": False}
    kind = chainer.training.Trainer
    run = kind.run
    if run.__module__ == __name__:
        return

    def write() -> None:
        with contextlib.suppress(OSError), open(f"{file}.{pid}", "w", encoding="ascii") as told:  # noqa: PTH123 - quick
            json.dump(notes, told)

    def note_and_run(self: Any, *args: Any, **kwargs: Any) -> None:
        found = _files_of(chainer, self)
        if found and os.getpid() == pid:
            notes["files"] = sorted({*notes["files"], *found})
            write()
        run(self, *args, **kwargs)

    def note_end() -> None:
        notes["alone"] = "mpi4py.MPI" not in sys.modules
        if os.getpid() == pid:
            write()

    kind.run = note_and_run
    atexit.register(note_end)


def _files_of(chainer: Any, trainer: Any) -> list[str]:
    """Return the paths to which the logs and snapshots of a trainer go, as far as they are said by name."""
    extensions = chainer.training.extensions
    found = []
    for entry in trainer._extensions.values():
        own = entry.extension
        if isinstance(own, extensions.LogReport):
            found.append(own._log_name)
        elif isinstance(own, extensions._snapshot._Snapshot):
            found.append(own.filename)
    named = [name for name in found if isinstance(name, str)]
    return [os.path.realpath(os.path.join(trainer.out, name)) for name in named]  # noqa: PTH118 - quick


def _raise_errors_of_workers(module: Any) -> None:
    """Let ``MultiprocessIterator`` raise what its workers raise, or that one died, where it would wait for ever.

    The thread that fetches batches from the workers ended with the error, which was lost. A pool replaces
    workers that die, but does not repeat their work.
    """
    loop, queue = module._PrefetchLoop, module._Communicator
    run, get = loop._run, queue.get
    if run.__module__ == __name__:
        return

    def run_and_tell(self: Any) -> None:
        try:
            run(self)
        except Exception as error:  # noqa: BLE001 - a dataset may raise anything
            with self._comm._lock:
                self._comm._error = error
                self._comm._batch_queue.append((None, None))
                self._comm._not_empty_cond.notify()

    def get_or_raise(self: Any) -> Any:
        error = getattr(self, "_error", None)
        batch, state = (None, None) if error and not self._batch_queue else get(self)
        if state is None:  # of a batch, and of the end of the data, there is one
            raise self._error
        return batch, state

    loop._run, queue.get = run_and_tell, get_or_raise
    wrapped = ModuleType(
        module.multiprocessing.__name__, "As it is, with pools that report dead workers."
    )
    vars(wrapped).update(vars(module.multiprocessing), Pool=_make_pool)
    module.multiprocessing = wrapped


def _make_pool(*args: Any, **kwargs: Any) -> Any:
    """Return a ``multiprocessing.Pool`` whose results raise an error if a worker has died."""
    import multiprocessing
    from multiprocessing.pool import Pool

    pool: Any = Pool.__new__(Pool)
    workers: list[Any] = []

    def add_worker(context: Any, *args: Any, **kwargs: Any) -> Any:
        worker = context.Process(*args, **kwargs)
        workers.append(worker)
        return worker

    pool.Process = add_worker
    pool.__init__(*args, context=multiprocessing.get_context(), **kwargs)
    submit = pool.map_async

    def map_async(function: Any, iterable: Any) -> Any:
        items = [*iterable]
        # As the pool has it, but by the workers that it is to have: when one ends, it may have none for a moment.
        result = submit(function, items, -(-len(items) // (4 * pool._processes)))
        get = result.get

        def get_or_raise(timeout: float) -> Any:
            try:
                return get(timeout)
            except multiprocessing.TimeoutError:
                for worker in [*workers]:
                    # As the pool has found it: asking the process would take the answer from the pool.
                    status = getattr(worker._popen, "returncode", None)
                    if status == 0:  # it is replaced, as planned
                        workers.remove(worker)
                    elif status:
                        pool.terminate()
                        raise RuntimeError(_death(status)) from None
                raise

        result.get = get_or_raise
        return result

    pool.map_async = map_async
    return pool


def _death(status: int) -> str:
    how = f"was killed by signal {-status}" if status < 0 else f"has ended with status {status}"
    return (
        f"a worker process of MultiprocessIterator {how}, and its batch is lost: see above what it said. Signal 9 is "
        "often a lack of memory. A worker that could not import the script says so: that must have "
        'if __name__ == "__main__" around what it does'
    )


def _categorical_log_prob(self: Any, x: Any) -> Any:
    """Chainer's method, with the tuple that ``meshgrid`` returns since NumPy 2 where it was a list."""
    import chainer
    import numpy as np

    array = x.data if isinstance(x, chainer.Variable) else x
    batch = np.meshgrid(*(range(size) for size in self.batch_shape), indexing="ij")
    index = (*batch, array.astype(np.int32))
    return self.log_p[index]


def patch_multi_node_iterator(module: ModuleType) -> None:
    """Let ChainerMN's iterator take ``int()`` of a one-element array, which NumPy 2.4 refuses."""
    vars(module)["int"] = lambda value: int(value.item() if hasattr(value, "item") else value)


def _numpy_version() -> tuple[int, int]:
    import numpy as np

    major, minor = np.__version__.split(".")[:2]
    return int(major), int(minor)


def _is_startup_finder(finder: Any) -> bool:
    own = getattr(finder, "__module__", "") == _STARTUP
    return own and getattr(finder, "__name__", "") == "ChainerFinder"


def install() -> None:
    """Act on what is imported already, and wait for what is not. Idempotent."""
    # The finder of chainer_dist.pth, if it is there, has nothing left to wait for.
    sys.meta_path[:] = [it for it in sys.meta_path if not _is_startup_finder(it)]
    waiting = {it.name for it in sys.meta_path if isinstance(it, ImportHook)}
    if "chainer" in sys.modules:
        restore_numpy_names()
        patch_chainer(sys.modules["chainer"])
    elif "chainer" not in waiting:
        sys.meta_path.insert(0, ImportHook("chainer", prepare_chainer, patch_chainer))
    if _MULTI_NODE_ITERATOR in sys.modules:
        patch_multi_node_iterator(sys.modules[_MULTI_NODE_ITERATOR])
    elif _MULTI_NODE_ITERATOR not in waiting:
        hook = ImportHook(_MULTI_NODE_ITERATOR, lambda: None, patch_multi_node_iterator)
        sys.meta_path.insert(0, hook)


install()
