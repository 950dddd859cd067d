"""The batch normalization link with the statistics of all ranks' samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import links as L

from chainer_dist.functions import batch_normalization

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase


class MultiNodeBatchNormalization(L.BatchNormalization):  # type: ignore[misc]  # Chainer has no types
    """Batch normalization with the mean and variance of all ranks' samples.

    In training the output, the running statistics and, once an optimizer has averaged them over
    the ranks, the gradients equal the ones of :class:`chainer.links.BatchNormalization` on the
    concatenation of all ranks' batches. The batches may be of different sizes, and of no samples
    on some ranks. All of Chainer's link is here: lazy sizes, ``axis``, fine-tuning, float16 and
    mixed precision, ``F.forget``, double backward; so are the names of its parameters and of what
    it saves, and the one can load what the other saved.

    For example, for vectors of 3 values::

        normalize = chainer_dist.links.MultiNodeBatchNormalization(3, comm)
        y = normalize(x)

    :func:`create_mnbn_model` replaces all of those of a model.

    With ``chainer.config.train`` true a call is collective, and so is its backward. Every rank
    calls the links of its model in the same order, and is in training with all others: a rank that
    alone is in test mode exchanges nothing, and the others wait for it. Where ranks differ in
    channels, dtype or eps, or the input of one is wrong, all of them raise. In test mode a call is
    local. Backward is called on all ranks or on none, so each rank's loss depends on the output.

    While ``chainer.config.chainer_dist_standing_by`` is true on a rank, that rank counts as one
    without samples: its ``x`` and its loss leave the statistics and other ranks' gradients
    as they are, and its output is ``x`` normalized by the others' statistics. So a rank that ran
    out of data can repeat a batch to stay in step.

    Copies use the same communicator, which cannot be pickled, and so neither can the link; save
    its state with :mod:`chainer.serializers`.

    Args:
        size: Number of channels, or their shape. None to take it from the first input, which needs
            ``axis``; the first call then raises on all ranks if they find different sizes.
        comm: Communicator.
        decay: Weight of the old running statistics at each call in training.
        eps: Added to the variance.
        dtype: dtype of parameters and running statistics; None for ``chainer.config.dtype``,
            mixed16 standing for float32. Statistics are computed in float32 at least.
        use_gamma: Whether there is a scale; the attribute ``gamma`` is None otherwise.
        use_beta: Whether there is a shift; the attribute ``beta`` is None otherwise.
        initial_gamma: Initializer of the scale; None for 1.
        initial_beta: Initializer of the shift; None for 0.
        communication_backend: ``auto`` or ``mpi``, which mean the same.
        axis: Axis, or ascending axes, over which the mean is taken. None for all but the axes of
            channels, which follow the first axis.

    Attributes:
        avg_mean: Running mean, of the shape of the channels, the same bits on every rank.
        avg_var: Running variance likewise, unbiased with the number of all ranks' samples. It
            starts from 1 as in Chainer (from 0 in ChainerMN).
        N: How many calls fine-tuning has averaged.

    Raises:
        ValueError: If ``communication_backend`` is another.

    The same as ChainerMN's ``MultiNodeBatchNormalization``, which takes all batches to be of equal
    size and loses the variance of data far from zero.
    """

    def __init__(  # noqa: PLR0917 - ChainerMN's positional parameters
        self,
        size: int | tuple[int, ...] | None,
        comm: CommunicatorBase,
        decay: float = 0.9,
        eps: float = 2e-5,
        dtype: Any = None,
        use_gamma: bool = True,
        use_beta: bool = True,
        initial_gamma: Any = None,
        initial_beta: Any = None,
        communication_backend: str = "auto",
        *,
        axis: int | Sequence[int] | None = None,
    ) -> None:
        batch_normalization.get_communication_backend(comm, communication_backend)
        super().__init__(
            size, decay, eps, dtype, use_gamma, use_beta, initial_gamma, initial_beta, axis
        )
        self.comm = comm

    def forward(self, x: Any, finetune: bool = False) -> chainer.Variable:
        """Normalize ``x``. Collective in training, local in test mode.

        Args:
            x: Array of floats, or a Variable of one, with the channels at the axes not in
                ``axis``: ``(batch, channels, ...)`` unless chosen otherwise. Its other axes may be
                of any lengths on each rank.
            finetune: Whether running statistics become the mean over all calls since
                ``start_finetuning``, rather than decay. The same on every rank.

        Returns:
            A new Variable of the shape and dtype of ``x``.

        Raises:
            TypeError, ValueError: On every rank, if a rank's ``x`` does not fit the link, or if
                there is not a single sample on all ranks.
            RankMismatchError: On every rank, if ranks differ in channels, dtypes or eps.
            RuntimeError: Inside :class:`~chainer_dist.Join`, outside of an optimizer's ``update``.
        """
        if not chainer.config.train:
            return super().forward(x)
        if getattr(chainer.config, "chainer_dist_joined", False):
            raise RuntimeError(
                "inside Join, ranks that stand by wait for updates: give the optimizer the loss "
                "function, optimizer.update(lossfun, ...), instead of computing the loss before"
            )
        try:
            gamma, beta = self._parameters(x)
            function = batch_normalization.MultiNodeBatchNormalization(
                self.comm, self.eps, self.axis
            )
            function.check(x, gamma, beta)
        except BaseException as error:  # noqa: BLE001 - initializers may raise anything
            batch_normalization.fail(self.comm, error)
        (y,) = function.apply((x, gamma, beta))
        if not chainer.config.in_recomputing:  # F.forget calls once more for the same batch
            decay = self.decay
            if finetune:
                self.N += 1
                decay = 1 - 1 / self.N
            unbiased = function.var * (function.count / max(function.count - 1, 1))
            _decay(self.avg_mean, decay, function.mean)
            _decay(self.avg_var, decay, unbiased)
        return y

    def _parameters(self, x: Any) -> tuple[Any, Any]:
        """Return gamma and beta, after initializing what waits for the first input. Local."""
        if self.avg_mean is None:
            if not hasattr(x, "shape"):
                raise TypeError(f"x is a {type(x).__name__}, expected an array or a Variable")
            self._initialize_params(tuple(d for i, d in enumerate(x.shape) if i not in self.axis))
        gamma = self._get_gamma()[0] if self.gamma is None else self.gamma
        beta = self._get_beta()[0] if self.beta is None else self.beta
        return gamma, beta


def _decay(average: Array, decay: float, value: Array) -> None:
    """Move a running average in place; computed in float64 and rounded once."""
    average[...] = decay * average.astype(np.float64) + (1 - decay) * value
