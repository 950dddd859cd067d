"""Batch normalization with the mean and variance of all ranks' samples.

Each rank finds count, mean and sum of squared deviations of its own samples; these moments, some
numbers a channel, are what ranks exchange. They are merged pairwise by the formulas of Chan, Golub
and LeVeque (STAN-CS-79-773), in double precision. No large squares are ever subtracted, so
that data far from zero keep their variance.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import chainer
import numpy as np
from chainer import functions as F
from chainer.functions.normalization.batch_normalization import _compute_axis

from chainer_dist.collectives.agreement import digest, raise_mismatch
from chainer_dist.collectives.extremes import arrive
from chainer_dist.collectives.failures import raise_together
from chainer_dist.collectives.operation import collective
from chainer_dist.kernels import channels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase

_FAILED = "failed"  # takes the place of a description on a rank that has an error

# Moments in the first message of an exchange. Its length is the same whatever the ranks came for,
# so that they can find out that they came for different things.
_FIRST_MESSAGE = 256

_DIGEST_MASK = (1 << 32) - 1  # sums of them over the ranks are exact in float64

_cached_digest = functools.lru_cache(maxsize=1024)(digest)


def get_communication_backend(comm: CommunicatorBase, communication_backend: str = "auto") -> str:
    """Return what carries the statistics of batch normalization: always ``mpi``. Local.

    Args:
        comm: Communicator.
        communication_backend: ``auto`` or ``mpi``.

    Raises:
        ValueError: For ``nccl``, which needs GPUs, and for anything else.
    """
    del comm
    if communication_backend == "nccl":
        raise ValueError(
            "communication_backend is 'nccl', which needs GPUs; chainer_dist trains on CPUs: "
            "use 'auto' or 'mpi'"
        )
    if communication_backend not in ("auto", "mpi"):
        raise ValueError(f"communication_backend is 'auto' or 'mpi', got {communication_backend!r}")
    return "mpi"


class MultiNodeBatchNormalization(chainer.FunctionNode):  # type: ignore[misc]  # Chainer has no types
    """Normalize by the mean and variance of all ranks' samples. Collective, backward too.

    One small message forward and one backward, whatever the size of the batch; a second one for
    more channels than fit in it. Ranks may have different numbers of samples, or none.

    The gradient with respect to ``x`` is that of the sum of all ranks' losses, since every rank's
    samples shape the output of each rank. Those with respect to ``gamma`` and ``beta`` are of this
    rank's loss alone, as with any other parameter: it is the optimizer that averages parameters'
    gradients over the ranks. (ChainerMN's are averaged already; once more changes nothing.)

    It can be differentiated any number of times.

    While ``chainer.config.chainer_dist_standing_by`` is true on a rank, that rank counts as one
    without samples: its ``x`` and its loss count nothing for the statistics and their gradients, and
    its own output is ``x`` normalized by the statistics of the others.

    More than ten attributes: options, results, and what backward needs of forward.

    Args:
        comm: Communicator.
        eps: Added to the variance.
        axis: Ascending axes over which the mean is taken; None for all but the axes of channels,
            which follow the first axis.

    Attributes:
        mean: Mean over all ranks after forward, of the shape of ``gamma``, float64, the same bits
            on every rank.
        var: Biased variance likewise.
        count: How many values of each channel all ranks have together.
    """

    def __init__(
        self, comm: CommunicatorBase, eps: float = 2e-5, axis: Sequence[int] | None = None
    ) -> None:
        self.comm = comm
        self.eps = eps
        self.axis: tuple[int, ...] | None = None if axis is None else tuple(axis)
        self.standing_by = bool(getattr(chainer.config, "chainer_dist_standing_by", False))

    def check(self, x: Any, gamma: Any, beta: Any) -> None:
        """Raise what is wrong with the inputs. Local.

        Call it before ``apply``, so that :func:`fail` can raise the error on the other ranks.

        Raises:
            TypeError: If one is no NumPy array of floats, or a Variable of one.
            ValueError: If shapes or axes do not fit each other.
        """
        for name, value in (("x", x), ("gamma", gamma), ("beta", beta)):
            array = value.array if isinstance(value, chainer.Variable) else value
            if not isinstance(array, np.ndarray):
                raise TypeError(
                    f"{name} of batch normalization is a {type(array).__name__}, expected a NumPy "
                    "array or a Variable of one (call to_cpu() where it lies on a GPU)"
                )
            if array.dtype.kind != "f":
                raise TypeError(f"{name} of batch normalization is {array.dtype}, expected floats")
        axis = _compute_axis(x.ndim, gamma.ndim, self.axis)
        if sorted({i for i in axis if 0 <= i < x.ndim}) != list(axis):
            raise ValueError(
                f"axis of batch normalization is {axis}, expected ascending axes of x, which is "
                f"{x.shape}"
            )
        shape = tuple(x.shape[i] for i in range(x.ndim) if i not in axis)
        if shape != gamma.shape or shape != beta.shape:
            raise ValueError(
                f"x of batch normalization is {x.shape}, which with axis {axis} has channels "
                f"{shape}; gamma is {gamma.shape}, beta is {beta.shape}"
            )

    def forward(self, inputs: tuple[Array, Array, Array]) -> tuple[Array]:
        """Return the normalized ``x``, in its shape and dtype. Collective."""
        self.retain_inputs((0, 1))
        x, gamma, beta = inputs
        axis = self.axis = _compute_axis(x.ndim, gamma.ndim, self.axis)
        self._expand = tuple(None if i in self.axis else slice(None) for i in range(x.ndim))
        self._description = f"{gamma.shape} {gamma.dtype} (x {x.dtype}, eps {self.eps})"
        # Statistics and arithmetic are in float32 at least, whatever x and gamma are.
        self._dtype = np.result_type(x.dtype, gamma.dtype, np.float32)
        self._own_count = 0 if self.standing_by else math.prod(x.shape[i] for i in self.axis)

        moments = np.zeros((gamma.size, 3))
        self._channels = functools.partial(channels.of, axis=axis, dtype=self._dtype)
        own = self._channels(x)
        if self._own_count:
            moments = moments_of(self._own_count, *own.moments())
        counts, means, squares = self._merge(moments, "forward").T
        self.count = int(counts.max(initial=0))
        if self.count == 0 and gamma.size:
            raise ValueError(
                "no rank has a sample for batch normalization: all batches are empty, or all ranks "
                "are standing by"
            )
        if self.count == 1:
            warnings.warn(
                "all ranks together have one value a channel for batch normalization, whose "
                "output then is beta; was chainer.config.train meant to be False?",
                UserWarning,
                stacklevel=2,
            )
        self.mean = means.reshape(gamma.shape)
        self.var = squares.reshape(gamma.shape) / max(self.count, 1)
        self._inv_std = 1 / np.sqrt(self.var + self.eps)

        y = own.normalize(self.mean, gamma * self._inv_std, beta.astype(np.float64))
        return (y.astype(x.dtype, copy=False),)

    def backward(self, indexes: tuple[int, ...], grad_outputs: tuple[Any]) -> tuple[Any, ...]:
        """Return the gradients with respect to ``x``, ``gamma`` and ``beta``. Collective."""
        del indexes
        x, gamma = self.get_retained_inputs()
        (gy,) = grad_outputs
        if chainer.config.enable_backprop:
            return self._differentiable_gradients(x, gamma, gy)
        # A function of a user's own may return a gradient whose values are to be repeated.
        gradients = self._gradients(x.array, gamma.array, np.broadcast_to(gy.array, x.shape))
        return tuple(chainer.as_variable(gradient) for gradient in gradients)

    def _gradients(self, x: Array, gamma: Array, gy: Array) -> tuple[Array, Array, Array]:
        own = self._channels(x)
        scale = gamma * self._inv_std
        gx, gbeta, ggamma = own.products(gy, self.mean, scale)
        ggamma = ggamma * self._inv_std

        n = self._own_count
        moments = np.zeros((2 * gamma.size, 3))
        if n:
            moments = moments_of(n, np.concatenate([gbeta.ravel(), ggamma.ravel()]) / n)
        means = self._merge(moments, "backward")[:, 1]

        # gx = gamma / std * (gy - mean of gy - x_hat * mean of (gy * x_hat))
        if n:
            mean_gy, mean_gy_x_hat = means.reshape(2, *gamma.shape)
            own.add_normalized(
                gx, self.mean, -scale * mean_gy_x_hat * self._inv_std, -scale * mean_gy
            )
        return (
            gx.astype(x.dtype, copy=False),
            np.asarray(ggamma, gamma.dtype),
            np.asarray(gbeta, gamma.dtype),
        )

    def _differentiable_gradients(self, x: Any, gamma: Any, gy: Any) -> tuple[Any, Any, Any]:
        """Return the same gradients, made of functions that can be differentiated. Collective."""
        from chainer_dist.functions.collective_communication import allreduce

        x_dtype, gamma_dtype = x.dtype, gamma.dtype
        x, gamma, gy = (F.cast(variable, self._dtype) for variable in (x, gamma, gy))

        def mean(value: Any) -> Any:
            total = F.sum(value, axis=self.axis)
            if self.standing_by:
                total = _without_gradient(total, np.zeros(total.shape, total.dtype))
            total = allreduce(self.comm, total)
            if self.standing_by:
                total = _without_gradient(total, total.array)
            return (total / self.count)[self._expand]

        deviation = x - F.broadcast_to(mean(x), x.shape)
        inv_std = (mean(deviation**2) + self.eps) ** -0.5
        x_hat = deviation * F.broadcast_to(inv_std, x.shape)
        gy_x_hat = gy * x_hat
        inner = F.broadcast_to(mean(gy), x.shape) + x_hat * F.broadcast_to(mean(gy_x_hat), x.shape)
        if self.standing_by:
            inner = _without_gradient(inner, np.zeros(x.shape, self._dtype))
        gx = F.broadcast_to(gamma[self._expand] * inv_std, x.shape) * (gy - inner)
        return (
            F.cast(gx, x_dtype),
            F.cast(F.sum(gy_x_hat, axis=self.axis), gamma_dtype),
            F.cast(F.sum(gy, axis=self.axis), gamma_dtype),
        )

    def _merge(self, moments: Array, direction: str) -> Array:
        return merge_over_ranks(
            self.comm,
            moments,
            (
                ("the direction of batch normalization", direction),
                ("gamma of batch normalization", self._description),
            ),
        )


def _without_gradient(variable: Any, values: Array) -> Any:
    """Return constant values that hang on a variable, so that backward comes by with zeros."""
    return F.where(np.zeros(values.shape, np.bool_), variable, values)


def fail(comm: CommunicatorBase, error: BaseException) -> NoReturn:
    """Raise on every rank, in the place of the forward exchange. Collective.

    Args:
        comm: Communicator.
        error: The error because of which this rank cannot compute.

    Raises:
        Exception: The error of the lowest rank that has one.
    """
    merge_over_ranks(comm, np.zeros((0, 3)), (), error)
    raise AssertionError("every rank was to raise") from error


def moments_of(count: int, means: Array, squares: Array | float = 0.0) -> Array:
    """Return rows of count, mean and sum of squared deviations from it."""
    moments = np.empty((means.size, 3))
    moments[:, 0] = count
    moments[:, 1] = means.ravel()
    moments[:, 2] = np.ravel(squares)
    return moments


def merge_over_ranks(
    comm: CommunicatorBase,
    moments: Array,
    lines: Sequence[tuple[str, str]],
    error: BaseException | None = None,
) -> Array:
    """Return the moments of all ranks' values together. Collective.

    Args:
        comm: Communicator.
        moments: Rows of count, mean and sum of squared deviations, float64.
        lines: Descriptions that must be the same on every rank, as :func:`raise_mismatch` takes them.
        error: The error because of which this rank has no moments, or None.

    Returns:
        A new array of the shape of ``moments``, the same bits on every rank.

    Raises:
        Exception: On every rank, the error of the lowest rank that has one.
        RankMismatchError: On every rank, if the lines differ.
    """
    if comm.size == 1:
        if error is not None:
            raise error
        return moments
    # The first row is one value a rank, made of what must agree: it does if there is no variance.
    head = _cached_digest(_FAILED if error is not None else lines) & _DIGEST_MASK
    message = np.zeros((_FIRST_MESSAGE, 3))
    message[0] = 1, head, 0
    begun = min(len(moments), _FIRST_MESSAGE - 1)
    message[1 : begun + 1] = moments[:begun]
    _allreduce(comm, message)
    if error is not None or message[0, 2] != 0:
        raise_together(comm, error)
        raise_mismatch(comm, lines)
    merged = message[1 : begun + 1]
    if begun == len(moments):
        return merged
    rest = moments[begun:].copy()
    _allreduce(comm, rest)
    return np.concatenate([merged, rest])


@collective(name="batch normalization")
def _allreduce(comm: CommunicatorBase, moments: Array) -> None:
    from mpi4py import MPI

    arrive(comm)
    datatype, op = _mpi_type_and_op()
    comm.mpi_comm.Allreduce(MPI.IN_PLACE, [moments, len(moments), datatype], op)


@functools.cache
def _mpi_type_and_op() -> tuple[MPI.Datatype, MPI.Op]:
    """Return an MPI type of one row of moments, which MPI never cuts apart, and how two merge."""
    from mpi4py import MPI

    def merge(source: Any, target: Any, datatype: MPI.Datatype) -> None:
        del datatype
        na, mean_a, squares_a = np.frombuffer(source).reshape(-1, 3).T
        nb, mean_b, squares_b = b = np.frombuffer(target).reshape(-1, 3).T
        # Chan et al., in a form that gives the same bits for (a, b) and (b, a).
        with np.errstate(all="ignore"):  # an exception in here would abort the job
            n = na + nb
            divisor = np.maximum(n, 1)
            delta = mean_b - mean_a
            b[2] = (squares_a + squares_b) + delta * delta * (na * nb / divisor)
            b[1] = (na * mean_a + nb * mean_b) / divisor
            b[0] = n

    return MPI.DOUBLE.Create_contiguous(3).Commit(), MPI.Op.Create(merge, commute=True)
