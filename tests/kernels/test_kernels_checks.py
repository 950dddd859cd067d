"""What Chainer asks of arrays, answered as Chainer itself does."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer import backend

from chainer_dist import kernels

pytestmark = pytest.mark.mpi_skip  # nothing here knows of ranks

ARRAY = np.ones(3, np.float32)
LISTS = [[], [None], [ARRAY], [ARRAY, None], [ARRAY, 1.0], [chainer.Variable(ARRAY)], ["a"]]


@pytest.mark.parametrize("arrays", LISTS, ids=str)
@pytest.mark.parametrize("kind", [tuple, list, iter])
def test_answers(arrays, kind):
    """For arrays of NumPy, others, and what is no array."""
    answers = []
    for name in ("chainer", "numpy"):
        with kernels.use(name):
            device = backend.get_device_from_array(*arrays)
            answers.append((chainer.is_arrays_compatible(kind(arrays)), device))
    assert answers[0] == answers[1]


def test_wrong_types_are_refused():
    """The message is Chainer's."""
    messages = []
    for name in ("chainer", "numpy"):
        with kernels.use(name):
            with pytest.raises(chainer.utils.type_check.InvalidType) as caught:
                F.linear(ARRAY[None], np.ones((2, 4), np.float32))
            messages.append(str(caught.value))
            with pytest.raises(TypeError) as other:
                F.relu([1.0])
            messages.append(str(other.value))
    assert messages[:2] == messages[2:]
