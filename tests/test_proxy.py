"""Objects that stand for another one."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from chainer_dist._proxy import Proxy

# They know nothing of ranks.
pytestmark = pytest.mark.mpi_skip


class Front(Proxy, wraps="actual"):
    """Has two attributes of its own, one of which is a property."""

    actual: Any
    own: int

    def __init__(self, actual):
        self.actual = actual
        self.own = 1

    @property
    def twice(self):
        """Twice its own number."""
        return 2 * self.own

    @twice.setter
    def twice(self, value):
        self.own = value // 2


class Further(Front):
    """Declares one more."""

    more: int


@pytest.mark.parametrize("kind", [Front, Further])
def test_attributes(kind):
    """Its own are set on itself, and all others on the object, where they are read."""
    actual = SimpleNamespace(color="red", own=5)
    front = kind(actual)
    front.twice, front.color, front.size = 8, "blue", 3
    assert (front.own, front.twice, front.color, front.size) == (4, 8, "blue", 3)
    assert vars(actual) == {"color": "blue", "own": 5, "size": 3}
    with pytest.raises(AttributeError, match="weight"):
        _ = front.weight


def test_attributes_of_subclasses():
    """They are kept apart, too, and are none of the class above."""
    front, further = Front(SimpleNamespace()), Further(SimpleNamespace())
    front.more = further.more = 2
    assert vars(front.actual) == {"more": 2}
    assert vars(further.actual) == {}


@pytest.mark.parametrize("twin", [copy.copy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies(twin):
    """A copy, and what was pickled, has the same."""
    front = Front(SimpleNamespace(color="red"))
    assert twin(front).color == "red"
