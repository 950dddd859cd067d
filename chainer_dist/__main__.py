"""``python -m chainer_dist``: the same as ``chainer-dist``, a second later."""

import sys

from chainer_dist.launcher import cli

if __name__ == "__main__":
    sys.exit(cli.main())
