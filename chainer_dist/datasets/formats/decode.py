"""What the bytes of a file in a tar shard are, by the ending of its name."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["decode_member"]


def decode_member(extension: str, data: bytes) -> Any:
    """Decode a file of a sample by the last ending of its name. Local.

    ====================================  =========================================================
    ``cls`` ``id`` ``index``              int32 scalar, from decimal digits
    ``txt`` ``text`` ``json``             a text in UTF-8; what the text says in JSON
    ``npy`` ``npz``                       an array; a dict of arrays. Arrays of objects are refused
    ``png`` ``jpg`` ``jpeg`` ``bmp``      array of shape ``(channels, height, width)``, of the dtype of
    ``gif`` ``pgm`` ``ppm`` ``tiff``      the pixels (uint8 for most); Pillow must be installed
    ``webp``
    ``pkl`` ``pickle`` ``pth`` ``pt``     refused, as loading them can run any code
    everything else                       bytes
    ====================================  =========================================================

    Args:
        extension: What follows the first dot of the name in lower case, such as ``"seg.png"``.
        data: What is in the file.

    Raises:
        ValueError, OSError: If the file has something else in it, or is refused.
        ImportError: If it is an image, and Pillow is not installed.
    """
    decoder = _DECODERS.get(extension.rpartition(".")[2])
    return data if decoder is None else decoder(data)


def _integer(data: bytes) -> Any:
    return np.int32(int(data))


def _text(data: bytes) -> str:
    return data.decode("utf-8")


def _array(data: bytes) -> Any:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _arrays(data: bytes) -> Any:
    with np.load(io.BytesIO(data), allow_pickle=False) as loaded:
        return {name: loaded[name] for name in loaded.files}


def _image(data: bytes) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "images are decoded by Pillow, which is not installed: pip install pillow"
        ) from error
    with Image.open(io.BytesIO(data)) as image:
        converted = image.convert("RGB") if image.mode in {"P", "CMYK", "YCbCr"} else image
        array = np.array(converted)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()  # noqa: PLR2004


def _refuse(_: bytes) -> Any:
    raise ValueError("it is a pickle, and loading one can run any code: pass a decode function")


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("cls", "id", "index"), _integer),
    **dict.fromkeys(("txt", "text"), _text),
    "json": json.loads,
    "npy": _array,
    "npz": _arrays,
    **dict.fromkeys(
        ("png", "jpg", "jpeg", "bmp", "gif", "pgm", "ppm", "tif", "tiff", "webp"), _image
    ),
    **dict.fromkeys(("pkl", "pickle", "pth", "pt"), _refuse),
}
