"""At which addresses of this host the ranks on other hosts can reach the launcher."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from chainer_dist._connections import LOOPBACK, is_loopback, own_address
from chainer_dist.launcher import mpi
from chainer_dist.launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.launcher.hostfiles import Host

__all__ = ["SOMEWHERE", "addresses"]

# An address that is nobody's: the way to it begins at the interface that most ways begin at.
SOMEWHERE = "198.51.100.1"


def addresses(hosts: Sequence[Host], given: str | None = None) -> list[str]:
    """Return at which addresses ranks on these hosts may reach this host. Local.

    Args:
        hosts: Where ranks run; none is this host only.
        given: What the user says.

    Raises:
        LaunchError: If there is none.
    """
    if given:
        return [given]
    others = [host.name for host in hosts if not mpi.is_here(host.name)]
    if not others:
        return [LOOPBACK]
    ways = map(own_address, (*others[:9], socket.gethostname(), SOMEWHERE))
    found = [each for each in dict.fromkeys(ways) if each and not is_loopback(each)]
    if not found:
        raise LaunchError(
            f"no address of this host is known that {others[0]} could reach it at; "
            "name one: chainer-dist run --address NAME"
        )
    return found
