"""An ordinary trainer, made data-parallel as it stands.

:mod:`~chainer_dist.training.trainers` has the two functions that a script calls. What they do to the parts of a
trainer is in :mod:`~chainer_dist.training.iterators`, :mod:`~chainer_dist.training.optimizers`,
:mod:`~chainer_dist.training.evaluators` and :mod:`~chainer_dist.training.reports`. :mod:`~chainer_dist.training.script`
does it to a script that does not call them.
"""

from __future__ import annotations

from chainer_dist.training.trainers import distribute, on_rank_zero

__all__ = ["distribute", "on_rank_zero"]
