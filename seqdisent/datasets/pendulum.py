"""Coloured pendula: clips generated from a seed, with a renderer that knows every true swap and continuation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seqdisent.datasets._checks import check_count, check_tensor
from seqdisent.datasets.clips import Clips

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 0.9, 0.2),
    "blue": (0.25, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "magenta": (1.0, 0.25, 0.9),
    "cyan": (0.1, 0.9, 0.95),
    "white": (1.0, 1.0, 1.0),
}
"""The identities, RGB in [0, 1]."""

PERIODS: dict[str, float] = {"slow": 24.0, "fast": 12.0}
"""Frames that one swing takes, there and back."""

# In units of half the image's side, y downwards from the centre: the whole arc of an angle up to 0.75 stays inside.
_PIVOT_Y = -0.75
_ROD_LENGTH = 1.2
_ROD_HALF_WIDTH = 0.035
_BOB_RADIUS = 0.17
_ROD_BRIGHTNESS = 0.55
_AMPLITUDES = (0.35, 0.7)
_FRAMES_AT_ONCE = 64  # what a processor's cache holds: eight times faster than all at once


def render_pendulum(angle: Tensor, colour: Tensor, image_size: int = 64) -> Tensor:
    r"""Draws pendula on black: a thin, darker rod and a bright bob, antialiased.

    Args:
        angle: Radians from hanging straight down, to the right where positive; up to 0.75 stays inside the image.
        colour: RGB in [0, 1].
        image_size: Height and width in pixels.

    Shape:
        - angle: (\*B)
        - colour: (\*B, 3), or what broadcasts to it
        - Output: (\*B, 3, image_size, image_size)

    Returns:
        uint8 frames.

    Raises:
        TypeError: `angle` or `colour` is not floating point.
        ValueError: `colour` does not fit `angle` or leaves [0, 1]; an angle is not finite; `image_size` is below 1.

    Example:
        >>> frame = render_pendulum(torch.tensor(0.0), torch.tensor([1.0, 0.0, 0.0]), image_size=16)
        >>> frame.shape, frame[:, 11, 8].tolist()
        (torch.Size([3, 16, 16]), [255, 0, 0])
    """
    check_count(image_size=image_size)
    check_tensor("angle", angle, "floating")
    check_tensor("colour", colour, "floating")
    shape = (*angle.shape, 3)
    try:
        colours = colour.expand(shape)
    except RuntimeError:
        colours = None
    if colours is None or colour.shape[-1:] != (3,):
        raise ValueError(f"colour: shape is {tuple(colour.shape)}, expected {shape} or what broadcasts to it")
    if not bool(torch.isfinite(angle).all()):
        raise ValueError("angle: got a value that is not finite")
    if not bool(((colour >= 0.0) & (colour <= 1.0)).all()):
        raise ValueError("colour: got a value outside [0, 1]")
    angles, colours = angle.reshape(-1), colours.reshape(-1, 3).float()
    frames = torch.empty(len(angles), 3, image_size, image_size, dtype=torch.uint8, device=angle.device)
    for frame, some, rgb in zip(*(x.split(_FRAMES_AT_ONCE) for x in (frames, angles, colours)), strict=True):
        light = _intensity(some, image_size)
        frame.copy_((light[:, None] * (255.0 * rgb[:, :, None, None])).add_(0.5))
    return frames.reshape(*angle.shape, 3, image_size, image_size)


def _intensity(angles: Tensor, image_size: int) -> Tensor:
    """How bright each pixel is, (M, image_size, image_size) in [0, 1], from its distance to the rod and to the bob."""
    # In float64, so that a frame comes out the same to the bit whether it is drawn alone or among thousands.
    right = angles.double().sin().float()[:, None, None]
    down = angles.double().cos().float()[:, None, None]
    centres = (torch.arange(image_size, dtype=torch.float32, device=angles.device) + 0.5) * (2.0 / image_size) - 1.0
    x, y = centres[None, None, :], centres[None, :, None] - _PIVOT_Y
    along = (x * right + y * down).clamp(0.0, _ROD_LENGTH)
    rod = ((x - along * right).square() + (y - along * down).square()).sqrt() - _ROD_HALF_WIDTH
    bob = ((x - _ROD_LENGTH * right).square() + (y - _ROD_LENGTH * down).square()).sqrt() - _BOB_RADIUS
    pixels = image_size / 2.0
    coverage_of_rod = (0.5 - rod * pixels).clamp(0.0, 1.0)
    coverage_of_bob = (0.5 - bob * pixels).clamp(0.0, 1.0)
    return torch.maximum(coverage_of_bob, _ROD_BRIGHTNESS * coverage_of_rod)


class PendulumRenderer:
    """The truth behind `pendulum`: every clip's colour and its trajectory, angle(t) = A cos(2 pi t / period + phase).

    Args:
        colour: RGB in [0, 1] of each clip.
        amplitude: A, in radians.
        period: In frames.
        phase: In radians.
        num_steps: Frames of a clip as the data set has it.
        image_size: Height and width in pixels.

    Shape:
        - colour: (N, 3)
        - amplitude, period, phase: (N,), float64

    Example:
        >>> amplitude, period, phase = (torch.tensor([x]).double() for x in (0.5, 4.0, 0.0))
        >>> renderer = PendulumRenderer(torch.ones(1, 3), amplitude, period, phase, num_steps=4, image_size=16)
        >>> (renderer.angle(torch.tensor([0])) + 0.0).round(decimals=3).tolist()
        [[0.5, 0.0, -0.5, -0.0]]
        >>> renderer(torch.tensor([0]), torch.tensor([0]), 9).shape
        torch.Size([1, 9, 3, 16, 16])
    """

    def __init__(
        self, colour: Tensor, amplitude: Tensor, period: Tensor, phase: Tensor, *, num_steps: int, image_size: int
    ) -> None:
        self.colour = colour
        self.amplitude = amplitude
        self.period = period
        self.phase = phase
        self.num_steps = num_steps
        self.image_size = image_size

    def angle(self, motion: Tensor, num_steps: int | None = None) -> Tensor:
        """Angles of the clips at steps 0 to `num_steps` - 1.

        Args:
            motion: Rows of the data set as it was made, (M,).
            num_steps: How many; by default as many as a clip has.

        Returns:
            Radians, (M, num_steps), float64.
        """
        steps = torch.arange(self.num_steps if num_steps is None else num_steps, dtype=torch.float64)
        turn = 2.0 * math.pi / self.period[motion, None]
        return self.amplitude[motion, None] * torch.cos(turn * steps + self.phase[motion, None])

    def __call__(self, content: Tensor, motion: Tensor, num_steps: int | None = None) -> Tensor:
        """Pendula with the colours of rows `content` on the trajectories of rows `motion`, without a limit."""
        return render_pendulum(self.angle(motion, num_steps), self.colour[content, None, :], self.image_size)


def pendulum(num_clips: int = 1400, *, seed: int, num_steps: int = 16, image_size: int = 64) -> Clips:
    """Swinging pendula of seven colours and two speeds (paper, section 4).

    The colour is the identity and the static factor; the speed is the motion factor. Clip i has colour i mod 7 and
    speed floor(i / 7) mod 2, so that every 14 clips hold each pair once; amplitude and phase come from the seed. The
    swing is the harmonic one of a small, undamped pendulum, so it goes on for ever: `Clips.true_clip(index, 40)` is the
    truth that a forecast of 40 frames is held against, and `Clips.true_swap` that of a swap.

    Args:
        num_clips: How many clips.
        seed: Decides amplitudes and phases.
        num_steps: Frames of a clip.
        image_size: Height and width in pixels.

    Returns:
        The clips, all of one length, in RGB; `renderer` is a `PendulumRenderer`.

    Raises:
        TypeError: An argument is not an int.
        ValueError: `num_clips`, `num_steps` or `image_size` is below 1.

    Example:
        >>> clips = pendulum(14, seed=0, num_steps=4, image_size=16)
        >>> clips
        Clips(14 clips of 4 frames, 3x16x16, 7 identities)
        >>> clips.names[8], clips.true_clip(8, 40).shape
        ('green fast 8', torch.Size([40, 3, 16, 16]))

    References:
        Vowels, Camgoz, Bowden. VDSM, CVPR 2021: seven colours, two speeds, trained on 16 frames, forecast to 40.
    """
    check_count(num_clips=num_clips, num_steps=num_steps, image_size=image_size)
    position = torch.arange(num_clips)
    colour = position % len(COLOURS)
    speed = position // len(COLOURS) % len(PERIODS)
    uniform = torch.rand(num_clips, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    renderer = PendulumRenderer(
        torch.tensor(list(COLOURS.values()))[colour],
        _AMPLITUDES[0] + (_AMPLITUDES[1] - _AMPLITUDES[0]) * uniform[:, 0],
        torch.tensor(list(PERIODS.values()), dtype=torch.float64)[speed],
        2.0 * math.pi * uniform[:, 1],
        num_steps=num_steps,
        image_size=image_size,
    )
    colours, speeds = tuple(COLOURS), tuple(PERIODS)
    return Clips(
        renderer(position, position),
        identity=colour,
        labels={"colour": colour, "speed": speed},
        factor_names={"colour": colours, "speed": speeds},
        static_factors=("colour",),
        motion_factors=("speed",),
        names=[
            f"{colours[c]} {speeds[s]} {i}"
            for i, (c, s) in enumerate(zip(colour.tolist(), speed.tolist(), strict=True))
        ],
        renderer=renderer,
    )
