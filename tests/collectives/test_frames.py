"""Lines of users: which line of a script a frame belongs to, and whether code of a user runs in it."""

from __future__ import annotations

import sys
import threading

import pytest

from chainer_dist.collectives.frames import calls_user_code, user_line

pytestmark = pytest.mark.mpi_skip  # nothing here knows of ranks


def test_the_source_line_is_the_users():
    """Not one of chainer_dist, Chainer or mpi4py."""
    line = sys._getframe().f_lineno + 1
    assert user_line(sys._getframe()) == (f"{__file__}:{line} in test_the_source_line_is_the_users")
    code = "def inside(call):\n    return call()\n"
    for package in ("chainer_dist.collectives.arrays", "chainer.link", "mpi4py.util.pkl5"):
        namespace = {"__name__": package}
        exec(code, namespace)  # noqa: S102 - a function of that module
        line = sys._getframe().f_lineno + 1
        found = namespace["inside"](lambda: user_line(sys._getframe(1)))
        assert found == f"{__file__}:{line} in test_the_source_line_is_the_users"


def test_code_of_the_user_within_an_operation():
    """Is what chainer_dist calls; what calls chainer_dist, and the standard library that it waits by, are not."""
    namespace = {"__name__": "chainer_dist.collectives.objects"}
    exec("def inside(call):\n    return call()\n", namespace)  # noqa: S102 - a function of that module
    inside = namespace["inside"]
    assert not inside(lambda: calls_user_code(sys._getframe(1)))
    assert inside(lambda: calls_user_code(sys._getframe()))
    frames = []
    library = {"__name__": "threading", "call": lambda: frames.append(sys._getframe(1))}
    exec(compile("def wait():\n    call()\n", threading.__file__, "exec"), library)  # noqa: S102 - the same
    inside(library["wait"])
    assert not calls_user_code(frames[0])
    assert not calls_user_code(sys._getframe())
