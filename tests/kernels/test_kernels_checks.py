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


class Checked(chainer.FunctionNode):
    """Counts its checks, and refuses what is not as long as its inputs' first one."""

    def __init__(self):
        self.checks = []

    def check_type_forward(self, in_types):
        """Look at the shapes, as sums of arrays do."""
        self.checks.append(type(in_types))
        chainer.utils.type_check.expect(in_types[0].dtype.kind == "f")
        chainer.utils.type_check.expect_broadcast_shapes(*[each.shape for each in in_types])

    def forward(self, inputs):
        """Return the first input."""
        return inputs[:1]


@pytest.mark.parametrize(
    "shapes",
    [
        [()],
        [(3,)],
        [(3,), (3,)],
        [(2, 3), (3,)],
        [(3,), (4,)],
        [(0,), (0,), (1,)],
        [(3,), (3,), (4,)],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_checks_of_types(shapes, dtype):
    """A check is made as often as by Chainer, and what it refuses is named in the same words."""
    outcomes = []
    for name in ("chainer", "numpy"):
        function, message = Checked(), None
        with kernels.use(name):
            try:
                function.apply([np.ones(shape, dtype) for shape in shapes])
            except chainer.utils.type_check.InvalidType as error:
                message = str(error)
        assert not chainer.utils.type_check.in_light_mode()
        outcomes.append((function.checks, message))
    assert outcomes[0] == outcomes[1]


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
