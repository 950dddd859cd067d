"""The command ``chainer-dist``: starting jobs of many ranks, and saying what there is to run them with.

Nothing else in the package imports this one, and nothing here but :mod:`~chainer_dist.launcher.report`
imports Chainer, NumPy or MPI, so that a job starts, and a mistake is reported, at once. A job is
three kinds of process: the launcher (:mod:`~chainer_dist.launcher.job`), MPI's ``mpiexec``
(:mod:`~chainer_dist.launcher.mpi`), and for each rank a monitor (:mod:`~chainer_dist.launcher.rank`)
beside the user's script.
"""
