"""The addresses of this node, and at which of them another node reaches it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

from chainer_dist import _environment
from chainer_dist._connections import LOOPBACK, is_loopback, own_address

if TYPE_CHECKING:
    from collections.abc import Sequence


_SIOCGIFADDR = 0x8915


def own_hosts() -> tuple[str, ...]:
    """Return addresses and name of this node, as far as the system knows them. Local."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                packed = struct.pack("256s", name.encode()[:15])
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, packed)
                found.append(socket.inet_ntoa(reply[20:24]))
    return (*(each for each in found if not is_loopback(each)), socket.gethostname())


def address_towards(others: Sequence[str]) -> str:
    """Return the one address of this node that ranks of another node reach it at.

    Args:
        others: What :func:`own_hosts` returns there.

    Raises:
        OSError: If there is none.
    """
    given = os.environ.get(_environment.ADDRESS)
    if given:
        return given
    own = own_hosts()
    if {*others} <= {*own}:  # one machine that is said to be several
        return LOOPBACK
    for other in others:
        if other not in own:  # bridges of containers have the same address everywhere
            address = own_address(other)
            if address and not is_loopback(address):
                return address
    raise OSError(
        f"no address of this host is known that others reach it at; set {_environment.ADDRESS}"
    )
