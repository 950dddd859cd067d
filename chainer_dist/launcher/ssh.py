"""What ssh says, by which mpiexec starts ranks on other hosts."""

from __future__ import annotations

import re

# After these words mpiexec of MPICH 4.0 waits for ever.
_NO_WAY = re.compile(rb"ssh: (?:Could not resolve hostname|connect to host) .*[^\s]")


def last_words(line: bytes) -> str:
    """Return the reason why ssh cannot reach a host, if that is what a line says, or an empty string. Local."""
    found = _NO_WAY.search(line)
    return found[0].decode(errors="replace") if found else ""
