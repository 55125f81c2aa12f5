"""Grids of frames, and files of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqdisent.masks import check_mask, expand_observed
from seqdisent.plotting._figures import write_file


def film_strip(
    clips: Tensor,
    *,
    mask: Tensor | None = None,
    observed: Tensor | None = None,
    gap: int = 2,
    background: float = 1.0,
) -> Tensor:
    """Arrange clips in one picture: one row per clip, frames from left to right.

    Padding is blank, as the gaps are. Frames and pixels that were not observed are chequered in two greys.

    Args:
        clips: pixels in [0, 1]; anything in padding and in holes.
        mask: True where a frame is real; None for all.
        observed: True where a frame or pixel was measured; None for all.
        gap: number of pixels between frames.
        background: brightness of the gaps and of padding.

    Shape:
        - clips: (N, T, C, H, W)
        - mask: (N, T) bool
        - observed: (N, T) bool, or of the clips' shape
        - output: (C, N * (H + gap) - gap, T * (W + gap) - gap)

    Raises:
        TypeError: `mask` or `observed` is not bool.
        ValueError: another number of dimensions, or `mask` or `observed` does not fit the clips.

    Example:
        >>> film_strip(torch.zeros(2, 3, 1, 4, 4)).shape
        torch.Size([1, 10, 16])
        >>> clips = torch.tensor([[[[[0.2]]], [[[torch.nan]]]], [[[[0.5]]], [[[torch.nan]]]]])
        >>> mask, observed = torch.tensor([[True, True], [True, False]]), ~clips.isnan()
        >>> film_strip(clips, mask=mask, observed=observed, gap=1)
        tensor([[[0.2000, 1.0000, 0.3500],
                 [1.0000, 1.0000, 1.0000],
                 [0.5000, 1.0000, 1.0000]]])
    """
    if clips.ndim != 5:
        raise ValueError(f"clips: has shape {tuple(clips.shape)}, expected (N, T, C, H, W)")
    clips = clips.float()
    if observed is not None:
        seen = expand_observed(observed, clips.shape[:2], clips.shape[2:], clips.device)
        seen = seen if seen.ndim == 5 else seen[..., None, None, None]
        clips = torch.where(seen, clips, _chequers(clips))
    if mask is not None:
        real = check_mask(mask, clips.shape[:1], clips.shape[1], clips.device)
        clips = torch.where(real[..., None, None, None], clips, background)
    return _grid(clips, gap, background)


def _grid(frames: Tensor, gap: int, background: float = 1.0) -> Tensor:
    """Return frames (N, T, C, H, W) as one picture of N rows and T columns."""
    padded = torch.nn.functional.pad(frames, (0, gap, 0, gap), value=background)
    rows, columns, channels, height, width = padded.shape
    picture = padded.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return picture[:, : picture.shape[1] - gap, : picture.shape[2] - gap]


def _chequers(clips: Tensor) -> Tensor:
    """Return a frame (H, W) of squares of two pixels, in two greys."""
    row, column = (torch.arange(size, device=clips.device) // 2 for size in clips.shape[-2:])
    return 0.35 + 0.3 * ((row[:, None] + column) % 2)


def swap_table(static: Tensor, motion: Tensor, swapped: Tensor, *, gap: int = 4) -> Tensor:
    """Arrange swapped clips in a table, with identities in rows and motions in columns (paper, Figures 1 and 5).

    The left column shows the clips that provide the identity, the top row those that provide the motion, and cell
    (i, j) the swap with identity i and motion j. The corner is empty.

    Args:
        static: R clips that provide the identity, pixels in [0, 1].
        motion: Q clips that provide the motion.
        swapped: R x Q swapped clips.
        gap: number of pixels between cells.

    Shape:
        - static: (R, T, C, H, W), motion: (Q, T, C, H, W), swapped: (R, Q, T, C, H, W)
        - output: (T, C, (R + 1) * (H + gap) - gap, (Q + 1) * (W + gap) - gap)

    Raises:
        ValueError: inconsistent shapes.

    Example:
        >>> clip = torch.zeros(2, 5, 3, 8, 8)
        >>> swap_table(clip, clip, torch.zeros(2, 2, 5, 3, 8, 8)).shape
        torch.Size([5, 3, 32, 32])
    """
    if swapped.shape != (static.shape[0], *motion.shape) or static.shape[1:] != motion.shape[1:]:
        raise ValueError(
            f"swapped: has shape {tuple(swapped.shape)}, expected (R, Q, T, C, H, W) from static "
            f"{tuple(static.shape)} and motion {tuple(motion.shape)}"
        )
    corner = torch.ones_like(motion[:1])
    rows = [torch.cat([corner, motion]), *(torch.cat([s[None], row]) for s, row in zip(static, swapped, strict=True))]
    table = torch.stack(rows)  # (R + 1, Q + 1, T, C, H, W)
    return torch.stack([_grid(frames.float(), gap) for frames in table.unbind(2)])


def save_png(picture: Tensor, path: str | Path, *, scale: int = 1) -> Path:
    """Write a picture as a PNG file and return the path.

    Args:
        picture: pixels in [0, 1]; other values are clipped.
        path: the file to write, whole or not at all; missing folders are made.
        scale: enlargement factor, an integer.

    Shape:
        - picture: (C, H, W) with 1 or 3 colours

    Raises:
        ValueError: a picture of another shape.
        ImportError: Pillow is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_png(torch.zeros(3, 8, 8), Path(folder) / "black.png", scale=4).name
        'black.png'
    """
    image = _image(picture, scale)
    return write_file(path, lambda file: image.save(file, "PNG"))


def save_gif(pictures: Tensor, path: str | Path, *, frames_per_second: float = 8.0, scale: int = 1) -> Path:
    """Write pictures as an animated GIF that repeats, and return the path.

    Args:
        pictures: pixels in [0, 1]; other values are clipped.
        path: the file to write, whole or not at all; missing folders are made.
        frames_per_second: playback speed; GIF stores durations in hundredths of a second.
        scale: enlargement factor, an integer.

    Shape:
        - pictures: (T, C, H, W) with 1 or 3 colours

    Raises:
        ValueError: pictures of another shape.
        ImportError: Pillow is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_gif(torch.rand(5, 1, 8, 8), Path(folder) / "noise.gif").name
        'noise.gif'
    """
    first, *others = [_image(picture, scale) for picture in pictures]
    how: dict[str, Any] = {"duration": round(1000 / frames_per_second), "loop": 0}
    return write_file(path, lambda file: first.save(file, "GIF", save_all=True, append_images=others, **how))


def _image(picture: Tensor, scale: int) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow; install it with: pip install 'seqdisent[plot]'") from error
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"picture: has shape {tuple(picture.shape)}, expected (C, H, W) with 1 or 3 colours")
    bytes_ = (picture.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    bytes_ = bytes_.repeat_interleave(scale, 1).repeat_interleave(scale, 2).expand(3, -1, -1)
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())
