"""Names of all optimizers of Chainer; ``test_optimizers.py`` makes sure that they are."""

from __future__ import annotations

OPTIMIZERS = [
    "AdaBound",
    "AdaDelta",
    "AdaGrad",
    "Adam",
    "AdamW",
    "AMSBound",
    "AMSGrad",
    "CorrectedMomentumSGD",
    "MomentumSGD",
    "MSVAG",
    "NesterovAG",
    "RMSprop",
    "RMSpropGraves",
    "SGD",
    "SMORMS3",
]
