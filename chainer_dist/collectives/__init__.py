"""How ranks talk: collective operations on arrays and Python objects, and agreement between ranks.

Nothing here knows of parameters, gradients or models; :mod:`chainer_dist.communicators` builds on it.
"""
