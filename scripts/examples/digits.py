"""What the examples take from ``scripts/train_digits.py``, one folder up: its networks, and the digits."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from train_digits import CNN, MLP, get_digits

__all__ = ["CNN", "MLP", "get_digits"]
