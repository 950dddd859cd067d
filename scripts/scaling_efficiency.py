#!/usr/bin/env python
"""Measure how training scales over ranks; the same as ``chainer-dist scale``. See ``--help``."""

from __future__ import annotations

import sys

from chainer_dist.scaling.cli import main

if __name__ == "__main__":
    sys.exit(main())
