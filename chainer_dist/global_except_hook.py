"""Ending the whole job when one rank fails.

A rank that dies of an exception leaves the others waiting for it, for ever: mpi4py finalizes MPI on
the way out, and that waits for the others in turn. So an uncaught exception, an interrupt, or an
exit with a status other than zero on any rank calls ``MPI_Abort``. This is on from
``import chainer_dist``; ``CHAINER_DIST_ABORT_ON_EXCEPTION=0`` in the environment, or
:func:`remove_hook`, turns it off. ChainerMN's module of this name is off unless asked for.

Whatever ``sys.excepthook`` the script or a library has set, before or afterwards, prints the exception as
ever, once; the job ends when it returns, raises or leaves, and a minute later if it does none of these. The
hook that was there before need not be called: Python itself reports an exception that nothing has caught, as the
audit event ``sys.excepthook``.

Nothing happens in processes that have not started MPI, in children of a rank, in threads beside the
main one, at an interactive prompt, or in a job of one rank: there Python does what it always does.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import gc
import json
import os
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from chainer_dist import _environment

if TYPE_CHECKING:
    from types import ModuleType, TracebackType

__all__ = ["add_hook", "remove_hook"]


# Launchers may drop what they have not read when the job ends; and ranks often fail together, where
# the first to leave should not silence the one that says why.
SECONDS_TO_SPEAK = 0.5

SECONDS_TO_REPORT = 60.0  # for the script's own exception hook, which may send a report somewhere

_pid: int | None = None  # of the process that added the hook
_listens = False  # to audit events, which nothing ends
_cause: dict[str, Any] = {}  # the facts that were reported
_python_exit = sys.exit
_python_code: Any = SystemExit.__dict__["code"]


def add_hook() -> None:
    """End the job when this rank fails, from now on. Local; a second call does nothing.

    ``sys.excepthook`` stays what it is, and still prints the traceback. ChainerMN has a function of
    this name.
    """
    global _pid, _listens  # noqa: PLW0603 - hooks are global to a process
    if _pid is not None:
        return
    _pid = os.getpid()
    if not _listens:
        _listens = True
        sys.addaudithook(_notice)
    _set_exit_code(property(_read_code, _python_code.__set__, _python_code.__delete__))
    if sys.version_info < (3, 12):
        _replace_exit(_python_exit, _exit)


def remove_hook() -> None:
    """Undo :func:`add_hook`. Local; without a hook it does nothing."""
    global _pid  # noqa: PLW0603 - hooks are global to a process
    if _pid is None:
        return
    _pid = None
    _set_exit_code(_python_code)
    _replace_exit(_exit, _python_exit)


def add_hook_if_enabled() -> None:
    """Call :func:`add_hook` unless ``CHAINER_DIST_ABORT_ON_EXCEPTION`` is ``0`` or empty. Local."""
    if os.environ.get(_environment.ABORT_ON_EXCEPTION, "1") not in ("0", ""):
        add_hook()


def _notice(event: str, arguments: tuple[Any, ...]) -> None:
    """End the job if the interpreter is about to call ``sys.excepthook`` because it ends."""
    if event != "sys.excepthook" or _has_callers():
        return
    mpi = _running_job()
    if mpi is None:
        return
    hook, kind, error, trace = arguments
    status = 130 if issubclass(kind, KeyboardInterrupt) else 1
    reason = f"uncaught {kind.__name__}"
    report_cause(status=status, exception=_first_line(kind, error))  # the hook may leave by itself
    has_returned = threading.Event()

    def abort_later() -> None:
        if not has_returned.wait(SECONDS_TO_REPORT):
            _abort(mpi, f"{reason}, and an exception hook that does not return,", status)

    try:
        if not _is_terminal(sys.stdin):  # where a debugger may be in use
            _thread.start_new_thread(abort_later, ())  # threading wants sys.excepthook to be there
        status = _call_hook(hook, kind, error, trace) or status
    finally:  # also when it is interrupted
        has_returned.set()
        _abort(mpi, reason, status)


def _has_callers() -> bool:
    """Return whether there is Python code above the function that called this one."""
    try:
        sys._getframe(2)  # noqa: SLF001 - Python's
    except ValueError:
        return False
    return True


def _call_hook(
    hook: Any, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> int:
    """Let the script's hook print an exception, as Python would; return the status it leaves with, or 0."""
    try:
        (hook or sys.__excepthook__)(kind, error, trace)
    except SystemExit as left:
        return left.code & 0xFF if isinstance(left.code, int) else 0
    except BaseException as another:  # noqa: BLE001 - whatever it is, the job ends
        with contextlib.suppress(Exception):
            sys.stderr.write("Error in sys.excepthook:\n")
            sys.__excepthook__(type(another), another, another.__traceback__)
            sys.stderr.write("\nOriginal exception was:\n")
            sys.__excepthook__(kind, error, trace)
    return 0


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


# SystemExit does not pass sys.excepthook, and atexit does not say why the process ends. But the
# interpreter reads the exception's `code`, as the only reader with no Python code above it.
# Simpler ways do less. A sys.exit of our own misses `raise SystemExit`. A SystemExit of our own in builtins
# is not the class that C code raises, and `except SystemExit` would miss that. The C library's on_exit
# has the status, but comes when MPI's finalization has waited for the other ranks already.


def _read_code(error: SystemExit) -> Any:
    code = _python_code.__get__(error, SystemExit)
    if not _has_callers():
        _leave(error, code)
    return code


def _set_exit_code(descriptor: Any) -> None:
    # Classes written in C refuse assignment to their attributes; their dict takes it.
    (attributes,) = gc.get_referents(SystemExit.__dict__)
    attributes["code"] = descriptor
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(SystemExit))


@functools.wraps(_python_exit)
def _exit(*args: Any) -> None:
    # Before Python 3.12 sys.exit leaves no exception for the interpreter to read, only its code,
    # unless Python code handles the exception on the way.
    try:
        _python_exit(*args)
    except SystemExit:  # noqa: TRY203 - looking at it is the purpose
        raise


def _replace_exit(old: Any, new: Any) -> None:
    # In sys and in every module with `from sys import exit`.
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if names.get("exit") is old:
            names["exit"] = new


def _leave(error: SystemExit, code: Any) -> None:
    mpi = _running_job()
    if mpi is None or code is None or (isinstance(code, int) and code == 0):
        return
    status = code & 0xFF if isinstance(code, int) else 1
    message = f"exit with status {status}"
    with contextlib.suppress(Exception):
        sys.stderr.write(_stack(error))
        if not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
    report_cause(exception="")
    _abort(mpi, message, status)


def _stack(error: SystemExit) -> str:
    """Return where an exception was raised, as far as that is known."""
    trace = error.__traceback__
    if trace is None:
        return ""
    # Before Python 3.12 a traceback may begin in the innermost frame.
    outer = trace.tb_frame.f_back
    lines = [*(traceback.extract_stack(outer) if outer else []), *traceback.extract_tb(trace)]
    listed = traceback.format_list([line for line in lines if line.filename != __file__])
    return "".join(["Traceback (most recent call last):\n", *listed])


def _first_line(kind: type[BaseException], error: BaseException) -> str:
    with contextlib.suppress(Exception):
        lines = traceback.format_exception_only(kind, error)
        return next(line for line in lines if not line[:1].isspace()).splitlines()[0][:1000]
    return kind.__name__


def report_cause(**facts: Any) -> None:
    """Report to ``chainer-dist run``, if it has started this process, why the process ends. Local.

    The report is a file: what is printed may say anything.

    Args:
        facts: ``status`` of this rank, ``exception`` in one line, ``stall`` for which it ends the job.
    """
    file = os.environ.get(_environment.CAUSE)
    _cause.update(facts, pid=os.getpid())
    if file:
        with contextlib.suppress(OSError), open(file, "w", encoding="ascii") as report:  # noqa: PTH123 - quick
            json.dump(_cause, report)


def _abort(mpi: ModuleType, reason: str, status: int) -> None:
    world = mpi.COMM_WORLD
    status = status or 1  # of 256, say
    report_cause(status=status)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(
            f"chainer_dist: {reason} on rank {world.rank} of {world.size} "
            f"({mpi.Get_processor_name()}); ending the job with status {status}.\n"
        )
        sys.stderr.flush()
    try:
        time.sleep(SECONDS_TO_SPEAK)
    finally:  # also when it is interrupted
        try:
            world.Abort(status)
        finally:
            os._exit(status)


def _running_job() -> ModuleType | None:
    """Return mpi4py.MPI if this is the main thread of a rank of a running job of several."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or os.getpid() != _pid or hasattr(sys, "ps1"):
        return None
    if threading.current_thread() is not threading.main_thread():
        return None
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        return None
    if not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.size == 1:
        return None
    return mpi
