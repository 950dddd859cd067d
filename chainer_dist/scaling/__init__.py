"""Scaling efficiency: how much faster a training is on more ranks, measured beside its peers.

``chainer-dist scale`` is the door (:mod:`~chainer_dist.scaling.cli`). It starts a job for each number of
ranks, workload and contender (:mod:`~chainer_dist.scaling.experiment`), in which every rank times real
training steps (:mod:`~chainer_dist.scaling.worker`), and makes tables and a page of the results
(:mod:`~chainer_dist.scaling.results`, :mod:`~chainer_dist.scaling.page`).
"""
