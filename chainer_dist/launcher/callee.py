"""The rank's side of :func:`chainer_dist.launch`: fetches a function, calls it, and sends back what came of it."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from typing import TYPE_CHECKING

from chainer_dist import _environment
from chainer_dist._connections import reach
from chainer_dist.launcher import mpi
from chainer_dist.launcher.by_value import dumps
from chainer_dist.launcher.call import RANK, receive, send
from chainer_dist.launcher.errors import LaunchError

if TYPE_CHECKING:
    import socket


def _fetch() -> tuple[socket.socket, bytes]:
    """Return a connection to the process that called :func:`launch`, and the task."""
    place = mpi.rank_of(os.environ)
    where = os.environ.pop(_environment.CALL, "")
    if place is None or not where:
        raise LaunchError("this module is run by chainer_dist.launch")
    try:
        connection = reach(where)
    except OSError as error:
        raise LaunchError(f"the process that called launch cannot be reached: {error}") from None
    connection.sendall(RANK.pack(place[0]))
    return connection, receive(connection)


def main() -> int:
    """Be a rank: fetch the function, call it and send back what came of it. Local."""
    connection, task = _fetch()
    try:
        path, content = pickle.loads(task)
        sys.path[:] = [*path, *(each for each in sys.path if each not in path)]
        function, args, kwargs = pickle.loads(content)
        value = function(*args, **kwargs)
        try:
            answer = True, dumps(value), ""
        except Exception as error:
            raise TypeError(f"what {function!r} returned cannot be sent back: {error}") from error
    except Exception as error:
        answer = False, _pickled(error), traceback.format_exc()
        send(connection, pickle.dumps(answer))
        raise
    send(connection, pickle.dumps(answer))
    receive(connection)
    return 0


def _pickled(error: Exception) -> bytes:
    """Return an error as bytes, or one that says the same if it cannot be sent."""
    try:
        content: bytes = dumps(error)
        pickle.loads(content)
    except Exception:  # noqa: BLE001 - a user's class may do anything
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return content


if __name__ == "__main__":
    sys.exit(main())
