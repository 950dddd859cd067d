"""Types that many modules name."""

from __future__ import annotations

from typing import Any, Union

import numpy as np

__all__ = ["Array", "ArrayOrTuple"]

Array = np.ndarray[Any, np.dtype[Any]]
ArrayOrTuple = Union[Array, tuple[Array, ...]]
