"""A link that delays and loses packets, for kernels without netem; see netns_cluster.py.

Runs in the network of the switch: makes a network device for a host and another for the switch, and passes
Ethernet frames from one to the other. What the host sends is late, or lost. As every frame goes
through this process, a link passes on some ten thousand a second at most.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import subprocess
import sys
import time

_TUNSETIFF = 0x400454CA
_TAP, _NO_HEADER = 0x0002, 0x1000
_LONGEST_FRAME = 65536


def open_device(name: str) -> int:
    """Create a network device and return the file descriptor that is its cable."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_HEADER))
    return device


def frames(device: int) -> list[bytes]:
    """Return what has come to a device."""
    found = []
    with contextlib.suppress(OSError):  # there is nothing more, or the device is down
        while True:
            found.append(os.read(device, _LONGEST_FRAME))
    return found


def send(device: int, frame: bytes) -> None:
    """Pass a frame on; a device that is down, or full, loses it, as a cable does."""
    with contextlib.suppress(OSError):
        os.write(device, frame)


def main(host: str, pid: str, properties: str) -> None:
    """Pass frames on until the input ends.

    Args:
        host: Number of the host.
        pid: Of a process in the host's network.
        properties: As JSON, ``delay`` in seconds and ``loss``, a share; a line of input changes them.
    """
    inner, outer = open_device(f"inner{host}"), open_device(f"port{host}")
    move = ["ip", "link", "set", f"inner{host}", "netns", pid, "name", "eth0"]
    subprocess.run(move, check=True)  # noqa: S603
    print("ready", flush=True)
    link = json.loads(properties)
    late: list[tuple[float, int, bytes]] = []
    numbers = itertools.count()  # frames do not overtake one another
    while True:
        wait = max(late[0][0] - time.monotonic(), 0) if late else None
        ready, _, _ = select.select([inner, outer, sys.stdin], [], [], wait)
        if sys.stdin in ready:
            line = sys.stdin.readline()
            if not line:
                return
            link = json.loads(line)
        now = time.monotonic()
        for frame in frames(inner):
            if random.random() >= link["loss"]:  # noqa: S311 - no secret
                heapq.heappush(late, (now + link["delay"], next(numbers), frame))
        for frame in frames(outer):
            send(inner, frame)
        while late and late[0][0] <= time.monotonic():
            send(outer, heapq.heappop(late)[2])


if __name__ == "__main__":
    main(*sys.argv[1:])
