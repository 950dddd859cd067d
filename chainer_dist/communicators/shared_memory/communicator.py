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
    from chainer_dist.communicators.shared_memory.layout import Tuning


class SharedMemoryCommunicator(CommunicatorBase):
    """Averages through shared memory on each node, and slice by slice between nodes.

    Takes 12 MiB of memory a rank (less on nodes of more than 21 ranks), whatever the size of the
    model. On a node the order of summation is that of the ranks, between up to eight nodes theirs,
    between more that of MPI's allreduce; so the same input gives the same bits each time. Between
    nodes every rank exchanges its own slice with the ranks of the same number on the other nodes,
    several blocks at a time.
    """

    name = "shared_memory"
    _patient = False

    @property
    def transport(self) -> Transport:
        """The way on which the ranks exchange blocks. Collective at first."""
        transport: Transport | None = self.__dict__.get("_transport")
        if transport is None:
            transport = self._transport = Transport(self, patient=self._patient)
        return transport

    def background(self) -> Self:
        """See :meth:`CommunicatorBase.background`."""
        twin = super().background()
        twin._patient = True  # noqa: SLF001 - of the same class
        return twin

    @collective("nbytes")
    def tune(self, nbytes: int = 16 << 20) -> Tuning:
        """Measure which block size is fastest, and use that from now on. Collective.

        Takes a hundred exchanges or so; rank 0 writes to standard error what was chosen. Call it before the
        first update: an update that is sharded keeps the blocks that it began with.

        Args:
            nbytes: Bytes of the model's parameters, the same on every rank.

        Returns:
            What was chosen, the same on every rank. One rank alone has nothing to choose.

        Raises:
            ValueError: If ``nbytes`` is not 1 or more.
            RankMismatchError: On every rank, if it differs.
        """
        nbytes = operator.index(nbytes)
        check_same(self, [("nbytes", str(nbytes))])
        if nbytes < 1:
            raise ValueError(f"nbytes is {nbytes}, expected 1 or more")
        return tune(self, self.transport, nbytes) if self.size > 1 else self.transport.tuning

    def mean_arrays(self, arrays: Sequence[Array], *, code: Codec | None = None) -> None:
        """See :meth:`CommunicatorBase.mean_arrays`.

        Args:
            arrays: See there.
            code: How numbers are sent between nodes, the same on every rank; None as they are.
        """
        if self.size == 1:
            return
        # Loops over many small arrays cost as much as their exchange: no work in them that can wait.
        distinct = list(dict(zip(map(id, arrays), arrays)).values())
        dtypes = dict.fromkeys([array.dtype for array in distinct])
        for dtype in dtypes:
            group = [array for array in distinct if len(dtypes) == 1 or array.dtype == dtype]
            self._mean(reduction.wire_dtype(dtype), group, code)

    def _mean(self, dtype: np.dtype[Any], arrays: list[Array], code: Codec | None) -> None:
        """Average arrays of one dtype, none of them twice there."""
        transport = self.transport
        # In C order, and a copy where that is not the layout.
        flat = [array if array.ndim == 1 else array.reshape(-1) for array in arrays]
        layout = transport.layout([array.size for array in flat], dtype)
        transport.run(Exchange(layout, dtype, flat, mean_to(layout, flat), flat, codec=code))
        for array, copy in zip(arrays, flat):
            if not array.flags.c_contiguous:
                array[...] = copy.reshape(array.shape)

    def finalize(self) -> None:
        """Give shared memory and MPI communicators back. Collective; a second call does nothing."""
        transport: Transport | None = self.__dict__.pop("_transport", None)
        if transport is not None:
            transport.free()
        super().finalize()
