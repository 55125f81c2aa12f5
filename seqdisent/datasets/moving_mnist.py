"""Moving MNIST: digits that bounce inside a square, generated from the MNIST files and a seed."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from seqdisent.datasets._checks import check_choice, check_count
from seqdisent.datasets._draws import draw_positions
from seqdisent.datasets._mnist import BASE_URL, DIGIT_SIZE, SPLITS, find_mnist, read_digits
from seqdisent.datasets.clips import Clips

SPEED = 0.1
"""Of the way between the walls that a digit goes in a frame, as in the original data set."""

_FRAMES_AT_ONCE = 2048


class MovingMNISTRenderer:
    """The truth behind `moving_mnist`: any clip's digits on any clip's trajectories, for as long as wanted.

    Args:
        digits: What the clips show.
        start: Where a digit's upper left corner begins, 0 at the left or upper wall, 1 where it touches the other.
        velocity: How far it goes in a frame, in the same units; it bounces off the walls.
        num_steps: Frames of a clip as the data set has it.
        image_size: Height and width in pixels.

    Shape:
        - digits: (N, D, 28, 28), uint8
        - start, velocity: (N, D, 2), float64; x before y

    Example:
        A white square that goes to the right from the upper left corner, by an eighth of the way a frame.

        >>> square = torch.full((1, 1, 28, 28), 255, dtype=torch.uint8)
        >>> start, velocity = torch.zeros(1, 1, 2).double(), torch.tensor([[[0.125, 0.0]]]).double()
        >>> renderer = MovingMNISTRenderer(square, start, velocity, num_steps=16, image_size=36)
        >>> renderer.corner(torch.tensor([0]), 4)[0, :, 0].tolist()
        [[0, 0], [1, 0], [2, 0], [3, 0]]
        >>> renderer(torch.tensor([0]), torch.tensor([0])).shape
        torch.Size([1, 16, 1, 36, 36])
    """

    def __init__(self, digits: Tensor, start: Tensor, velocity: Tensor, *, num_steps: int, image_size: int) -> None:
        self.digits = digits
        self.start = start
        self.velocity = velocity
        self.num_steps = num_steps
        self.image_size = image_size

    def corner(self, motion: Tensor, num_steps: int | None = None) -> Tensor:
        """Where the digits are at steps 0 to `num_steps` - 1.

        Args:
            motion: Rows of the data set as it was made, (M,).
            num_steps: How many; by default as many as a clip has.

        Returns:
            Pixels of the upper left corners, x before y, int64 (M, num_steps, D, 2).
        """
        steps = torch.arange(self.num_steps if num_steps is None else num_steps, dtype=torch.float64)
        unfolded = self.start[motion, None] + steps[:, None, None] * self.velocity[motion, None]
        bounced = 1.0 - (unfolded.remainder(2.0) - 1.0).abs()
        return (bounced * (self.image_size - DIGIT_SIZE)).round().long()

    def __call__(self, content: Tensor, motion: Tensor, num_steps: int | None = None) -> Tensor:
        """Frames of the digits of rows `content` on the trajectories of rows `motion`, without a limit.

        Where digits overlap, the brighter pixel shows.
        """
        corner = self.corner(motion, num_steps)
        frames = torch.empty(*corner.shape[:2], 1, self.image_size, self.image_size, dtype=torch.uint8)
        per_chunk = max(1, _FRAMES_AT_ONCE // corner.shape[1])
        for rows in torch.arange(len(motion)).split(per_chunk):
            frames[rows] = _paint(self.digits[content[rows]], corner[rows], self.image_size)
        return frames


def _paint(digits: Tensor, corner: Tensor, image_size: int) -> Tensor:
    """Put digits (M, D, 28, 28) at corners (M, T, D, 2) of black frames, (M, T, 1, image_size, image_size)."""
    inside = torch.arange(DIGIT_SIZE)
    x, y = corner[..., 0, None, None] + inside, corner[..., 1, None, None] + inside[:, None]
    pixel = (y * image_size + x).flatten(-2)  # (M, T, D, 28 * 28)
    layers = torch.zeros(*corner.shape[:-1], image_size**2, dtype=torch.uint8)
    layers.scatter_(-1, pixel, digits[:, None].expand(*corner.shape[:-1], DIGIT_SIZE, DIGIT_SIZE).flatten(-2))
    frames: Tensor = layers.amax(2).unflatten(-1, (1, image_size, image_size))
    return frames


def moving_mnist(
    num_clips: int = 10_000,
    *,
    seed: int = 0,
    split: str = "train",
    num_digits: int = 1,
    num_steps: int = 16,
    image_size: int = 64,
    root: str | Path | None = None,
    download: bool = False,
    base_url: str = BASE_URL,
    timeout: float = 30.0,
) -> Clips:
    """Digits moving along straight lines that bounce off the walls (VDSM paper, section 4, reads it with one digit).

    Each clip shows one instance of a digit, or the two of the classic data set; its start and direction are uniform
    and come from the seed. The instance is the identity: the row of the digit in MNIST's file or, with several digits,
    the clip itself. Different clips show different instances while there are enough of them (60,000 to train, 10,000 to
    test). The same arguments give the same clips to the bit, so `split="test"` with a seed is a fixed test set. The
    motion goes on for ever: `Clips.true_clip` is the truth that a forecast is held against, `Clips.true_swap` that of
    a swap. 10,000 clips take 655 MB.

    Args:
        num_clips: How many clips.
        seed: Decides instances, starts and directions.
        split: "train" or "test", the MNIST files that the digits come from.
        num_digits: Digits in a clip, each on a trajectory of its own.
        num_steps: Frames of a clip.
        image_size: Height and width in pixels, more than a digit's 28.
        root: Folder with the four idx files, gzipped. Where it is None or lacks one, `$SEQDISENT_DATA/mnist` and the
            cache (`$SEQDISENT_CACHE`, `$XDG_CACHE_HOME/seqdisent` or `~/.cache/seqdisent`, there `mnist`) are tried.
        download: Fetch missing files (11 MB) into `root`, or into the cache where `root` is None.
        base_url: Where to download from.
        timeout: Seconds that a download may stall.

    Returns:
        The clips, grey; `renderer` is a `MovingMNISTRenderer`. Labels: the class of the digit, `digit`; with several,
        `digit_1`, `digit_2`, ...

    Raises:
        FileNotFoundError: A file is missing, and `download` is False.
        ConnectionError: A download failed; nothing half-written is left.
        TypeError: A count is not an int.
        ValueError: A count below 1, an image without room to move, another split, or a file whose SHA-256 is wrong.

    References:
        Srivastava, Mansimov, Salakhutdinov. Unsupervised learning of video representations using LSTMs, ICML 2015, for
        two digits, the speed and the bouncing. LeCun, Cortes, Burges. The MNIST database of handwritten digits.
    """
    check_count(num_clips=num_clips, num_digits=num_digits, num_steps=num_steps, image_size=image_size)
    if image_size <= DIGIT_SIZE:
        raise ValueError(f"image_size: got {image_size}, expected more than the {DIGIT_SIZE} pixels of a digit")
    check_choice("split", split, tuple(SPLITS))
    folder = find_mnist(root, split, download=download, base_url=base_url, timeout=timeout)
    images, classes = read_digits(folder, split)
    generator = torch.Generator().manual_seed(seed)
    rows = draw_positions(len(images), num_clips * num_digits, generator).reshape(num_clips, num_digits)
    start = torch.rand(num_clips, num_digits, 2, generator=generator, dtype=torch.float64)
    angle = 2.0 * math.pi * torch.rand(num_clips, num_digits, generator=generator, dtype=torch.float64)
    velocity = SPEED * torch.stack([angle.cos(), angle.sin()], -1)
    renderer = MovingMNISTRenderer(images[rows], start, velocity, num_steps=num_steps, image_size=image_size)
    clip = torch.arange(num_clips)
    names = ["digit"] if num_digits == 1 else [f"digit_{i + 1}" for i in range(num_digits)]
    return Clips(
        renderer(clip, clip),
        identity=rows[:, 0] if num_digits == 1 else clip,
        labels=dict(zip(names, classes[rows].unbind(1), strict=True)),
        factor_names={name: [str(value) for value in range(10)] for name in names},
        static_factors=names,
        names=[" ".join(str(c) for c in row) + f" {i}" for i, row in enumerate(classes[rows].tolist())],
        renderer=renderer,
    )
