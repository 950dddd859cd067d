"""NCCL as CuPy offers it, under the names that ChainerMN has here.

chainer_dist trains on CPU cores and uses none of this. The module is for scripts that ask
``chainermn.nccl._available`` before they choose a communicator.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = (
    "NCCL_FLOAT",
    "NCCL_FLOAT16",
    "NCCL_FLOAT32",
    "NCCL_FLOAT64",
    "NCCL_SUM",
    "NcclCommunicator",
    "NcclError",
    "get_build_version",
    "get_unique_id",
    "get_version",
)

try:
    _nccl: Any = importlib.import_module("cupy.cuda.nccl")
except Exception:  # noqa: BLE001 - a CuPy without its libraries fails in many ways
    _nccl = None

_available = all(hasattr(_nccl, name) for name in _NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _available:
        raise AttributeError(
            f"{__name__}.{name} needs a CuPy that was built with NCCL, which is not here "
            f"({__name__}._available is False); chainer_dist itself trains on CPU cores"
        )
    return getattr(_nccl, name)
