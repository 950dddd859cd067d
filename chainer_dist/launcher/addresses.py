"""Addresses of this host at which ranks on other hosts can reach the launcher."""

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

# An address that no host has (RFC 5737): packets to it leave by the interface of the default route.
SOMEWHERE = "198.51.100.1"


def addresses(hosts: Sequence[Host], given: str | None = None) -> list[str]:
    """Return addresses at which ranks on these hosts may reach this host. Local.

    Args:
        hosts: Hosts of the ranks; none is this host only.
        given: Address or name that the user gave; None for the ones that are found.

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
