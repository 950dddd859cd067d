"""Ways to change parameters by gradients of all ranks, one file for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainer_dist.updates.delayed import Delayed
from chainer_dist.updates.local import Local
from chainer_dist.updates.replicated import Replicated
from chainer_dist.updates.sharded import Sharded

if TYPE_CHECKING:
    from chainer_dist.updates.base import Update

__all__ = ["UPDATES"]

UPDATES: dict[str, type[Update]] = {
    kind.name: kind for kind in (Replicated, Sharded, Delayed, Local)
}
