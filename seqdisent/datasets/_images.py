"""Pictures read by Pillow, which is imported here alone and only when a picture is read."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]


def _pillow() -> Any:  # noqa: ANN401 - a module has no better type
    try:
        import PIL.Image
        import PIL.ImageOps
        import PIL.ImageSequence
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install seqdisent[data]") from error
    return PIL


def read_rgba(path: Path) -> Pixels:
    """The pixels (H, W, 4) of a picture with alpha, not premultiplied; ValueError if the file is no picture."""
    with _open(path) as picture:
        return np.asarray(picture.convert("RGBA"))


def read_frames(path: Path, image_size: int, *, first_only: bool = False) -> list[Pixels]:
    """The frames of a picture or an animation, resized to a square.

    Transparent parts show black. Grey pictures stay grey, (image_size, image_size, 1).

    Raises:
        ImportError: Pillow is missing.
        ValueError: The file is not a picture, is damaged, or has more than 8 bits a channel.
    """
    pillow = _pillow()
    with _open(path) as picture:
        try:
            frames = [picture] if first_only else pillow.ImageSequence.Iterator(picture)
            return [_flatten(frame, image_size, path) for frame in frames]
        except (OSError, SyntaxError, EOFError, struct.error) as error:
            raise ValueError(f"{path}: the picture is damaged ({error}); replace the file or remove it") from error


def resize(pixels: Pixels, image_size: int) -> Pixels:
    """One frame, (H, W, 1) or (H, W, 3), resized to a square; one that fits comes back as it is, without Pillow."""
    if pixels.shape[:2] == (image_size, image_size):
        return pixels
    picture = _pillow().Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return _pixels(_square(picture, image_size))


def _open(path: Path) -> Image:
    pillow = _pillow()
    try:
        picture: Image = pillow.Image.open(io.BytesIO(path.read_bytes()))
    except pillow.UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a picture that Pillow can read; remove it or convert it to PNG") from error
    except (OSError, SyntaxError, EOFError, ValueError, pillow.Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: the picture is damaged ({error}); replace the file or remove it") from error
    return picture


def _flatten(picture: Image, image_size: int, path: Path) -> Pixels:
    if picture.mode.startswith(("I", "F")):
        raise ValueError(
            f"{path}: mode is {picture.mode} (more than 8 bits a channel), expected 8 bits; convert it first"
        )
    pillow = _pillow()
    upright = pillow.ImageOps.exif_transpose(picture)
    mode: Literal["L", "RGB"] = "L" if upright.mode in ("1", "L", "LA", "La") else "RGB"
    if upright.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = pillow.Image.alpha_composite(pillow.Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
    return _pixels(_square(upright.convert(mode), image_size))


def _square(picture: Image, image_size: int) -> Image:
    if picture.size == (image_size, image_size):
        return picture
    return picture.resize((image_size, image_size), _pillow().Image.Resampling.BICUBIC)


def _pixels(picture: Image) -> Pixels:
    pixels = np.array(picture, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
