"""Ways in which a file of arrays can be damaged."""

from __future__ import annotations

import struct
import zipfile

DAMAGES = ["truncated", "empty", "flipped"]


def damage(path, how):
    """Damage a file that ``numpy.savez`` wrote."""
    content = bytearray(path.read_bytes())
    if how == "flipped":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda info: info.compress_size)
        name_and_extra = struct.unpack_from("<HH", content, largest.header_offset + 26)
        start = largest.header_offset + 30 + sum(name_and_extra)
        content[start + largest.compress_size // 2] ^= 1
    else:
        del content[len(content) // 2 if how == "truncated" else 0 :]
    path.write_bytes(content)


class Attack:
    """What creates a file when it is unpickled."""

    def __init__(self, marker) -> None:
        """Keep which one."""
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")
