"""``python -m chainer_dist.scaling`` is ``chainer-dist scale``."""

from __future__ import annotations

import sys

from chainer_dist.scaling.cli import main

if __name__ == "__main__":
    sys.exit(main())
