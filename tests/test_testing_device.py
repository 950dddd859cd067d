"""Naming devices for tests, against Chainer's own names."""

from __future__ import annotations

import chainer
import numpy as np
import pytest

from chainer_dist.testing import get_device

pytestmark = pytest.mark.mpi_skip  # nothing here knows of ranks


def test_the_cpu_is_the_default():
    """Without arguments it is the device that chainer_dist trains on."""
    device = get_device()
    assert device == chainer.get_device("@numpy")
    assert device.xp is np


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((), "@numpy"), ((1,), "@cupy:1"), ((None, True), "native:0"), ((2, True), "cuda:2")],
)
def test_names(monkeypatch, arguments, name):
    """Each pair of options stands for one of Chainer's names."""
    monkeypatch.setattr(chainer, "get_device", lambda asked: ("device", asked))
    assert get_device(*arguments) == ("device", name)


@pytest.mark.skipif(chainer.backends.cuda.available, reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    """Chainer says what is missing."""
    with pytest.raises(RuntimeError, match="CUDA"):
        get_device(0)
