"""The communicator whose ranks exchange through shared memory: no messages within a node."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from chainer_dist.collectives import reduction
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.operation import collective
from chainer_dist.communicators.communicator_base import CommunicatorBase
from chainer_dist.communicators.shared_memory.exchange import Exchange, mean_to
from chainer_dist.communicators.shared_memory.transport import Transport
from chainer_dist.communicators.shared_memory.tuning import tune

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from typing_extensions import Self

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.between_nodes import Codec
    from chainer_dist.communicators.shared_memory.comparison import Comparison
    from chainer_dist.communicators.shared_memory.layout import Tuning


class SharedMemoryCommunicator(CommunicatorBase):
    """Averages through shared memory on each node, and slice by slice between nodes.

    It takes 12 MiB of memory per rank (less on nodes of more than 21 ranks), for models of any size.
    On a node, ranks are added in the order of rank. Up to eight nodes are added in their order, and
    more nodes in the order of MPI's allreduce, so the same input always gives the same bits. Between
    nodes, every rank exchanges its own slice with the ranks of the same number on the other nodes,
    several blocks at a time.
    """

    name = "shared_memory"
    _patient = False

    @property
    def transport(self) -> Transport:
        """The transport by which the ranks exchange blocks. Collective at first."""
        transport: Transport | None = self.__dict__.get("_transport")
        if transport is None:
            transport = self._transport = Transport(self, patient=self._patient)
        return transport

    @property
    def _comparison(self) -> Comparison | None:
        """The way to compare numbers without messages: on one node, once an exchange has made shared memory."""
        transport: Transport | None = self.__dict__.get("_transport")
        return None if transport is None else transport.comparison

    @property
    def compares_freely(self) -> bool:
        """See :attr:`Group.compares_freely`."""
        return self._comparison is not None

    def extremes(self, numbers: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """See :meth:`Group.extremes`."""
        comparison = self._comparison
        return super().extremes(numbers) if comparison is None else comparison.extremes(numbers)

    def background(self) -> Self:
        """See :meth:`CommunicatorBase.background`."""
        twin = super().background()
        twin._patient = True  # noqa: SLF001 - of the same class
        return twin

    @collective("nbytes")
    def tune(self, nbytes: int = 16 << 20) -> Tuning:
        """Measure which block size is fastest, and use that from now on. Collective.

        It takes about a hundred exchanges, and rank 0 writes the choice to standard error. Call it before the
        first update, as a sharded update keeps the blocks with which it began.

        Args:
            nbytes: Number of bytes of the model's parameters, the same on every rank.

        Returns:
            The choice, the same on every rank. A single rank has nothing to choose.

        Raises:
            ValueError: If ``nbytes`` is not 1 or more.
            RankMismatchError: On every rank, if ``nbytes`` differs between ranks.
        """
        nbytes = operator.index(nbytes)
        check_same(self, [("nbytes", str(nbytes))])
        if nbytes < 1:
            raise ValueError(f"nbytes is {nbytes}, expected 1 or more")
        return tune(self, self.transport, nbytes) if self.size > 1 else self.transport.tuning

    def mean_arrays(self, arrays: Sequence[Array], *, code: Codec | None = None) -> None:
        """See :meth:`CommunicatorBase.mean_arrays`.

        Args:
            arrays: Arrays to average; see there.
            code: Codec of the numbers between nodes, the same on every rank; None for none.
        """
        if self.size == 1:
            return
        # Loops over many small arrays cost as much as their exchange, so they do as little as possible.
        distinct = list(dict(zip(map(id, arrays), arrays)).values())
        dtypes = dict.fromkeys([array.dtype for array in distinct])
        for dtype in dtypes:
            group = [array for array in distinct if len(dtypes) == 1 or array.dtype == dtype]
            self._mean(reduction.wire_dtype(dtype), group, code)

    def _mean(self, dtype: np.dtype[Any], arrays: list[Array], code: Codec | None) -> None:
        """Average distinct arrays of one dtype. Collective."""
        transport = self.transport
        # Arrays that are not C-contiguous are copied, and the copies are copied back at the end.
        flat = [array if array.ndim == 1 else array.reshape(-1) for array in arrays]
        layout = transport.layout([array.size for array in flat], dtype)
        transport.run(Exchange(layout, dtype, flat, mean_to(layout, flat), flat, codec=code))
        for array, copy in zip(arrays, flat):
            if not array.flags.c_contiguous:
                array[...] = copy.reshape(array.shape)

    def finalize(self) -> None:
        """Give shared memory and MPI communicators back. Collective; a second call does nothing."""
        super().finalize()  # where checked mode compares, as other operations do, through shared memory
        transport: Transport | None = self.__dict__.pop("_transport", None)
        if transport is not None:
            transport.free()
