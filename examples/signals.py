"""Signals of voices: generated data of one dimension, whose every swap has a known truth.

A voice is a mixture of harmonics, what it says a contour of pitch and loudness. A step of a clip is a window.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from command_line import PACK
from jsonargparse import Namespace
from matplotlib.figure import Figure
from settings import Example
from torch import Tensor, nn
from videos import VIDEOS, Data, every_identity_in_every_motion, measure_videos

from seqdisent import reconstruct, swap
from seqdisent.datasets import Clips

HARMONICS, WINDOW, STEPS = 4, 96, 20


class Renderer:
    """The truth: harmonics of the voice of `content` at the pitch and loudness of `motion`, as bytes around 128."""

    def __init__(self, voice: Tensor, contour: Tensor) -> None:
        self.voice, self.contour = voice, contour  # (N, HARMONICS); (N, 4): pitch, depth and rate of its swing, phase

    def __call__(self, content: Tensor, motion: Tensor, num_steps: int | None = None) -> Tensor:
        pitch, depth, rate, phase = self.contour[motion, :, None].unbind(1)
        angle = rate * torch.arange(STEPS if num_steps is None else num_steps) + phase
        cycles = pitch * (1 + depth * torch.sin(angle))  # in a window
        loudness = 0.6 + 0.4 * torch.cos(angle)
        time = torch.arange(WINDOW) / WINDOW
        order = torch.arange(1, HARMONICS + 1)[:, None]
        waves = torch.sin(2 * math.pi * order * time * cycles[..., None, None])  # (M, T, HARMONICS, WINDOW)
        signal = loudness[..., None] * torch.einsum("mh,mthw->mtw", self.voice[content], waves)
        return (127.5 * (1 + signal.clamp(-1, 1))).round().to(torch.uint8)


def signals(num_clips: int, num_voices: int, *, seed: int) -> Clips:
    """Clips of random voices, each saying several things."""
    generator = torch.Generator().manual_seed(seed)
    # all equally loud, and none without its fundamental: else neither loudness nor octave would have one meaning
    voices = torch.rand(num_voices, HARMONICS, generator=generator)
    voices[:, 0] = 1.0
    voices = voices / (2 * voices.norm(dim=1, keepdim=True))
    who, fast = torch.arange(num_clips) % num_voices, torch.arange(num_clips) // num_voices % 2
    low, high = torch.tensor([0.8, 0.1, 0.25, 0.0]), torch.tensor([1.4, 0.35, 0.35, 2 * math.pi])
    contour = low + (high - low) * torch.rand(num_clips, 4, generator=generator)
    contour[:, 2] *= 1 + fast
    renderer = Renderer(voices[who], contour)
    return Clips(
        renderer(torch.arange(num_clips), torch.arange(num_clips)), identity=who, labels={"voice": who, "speed": fast},
        static_factors=["voice"], motion_factors=["speed"], renderer=renderer,
    )  # fmt: skip


def load_signals(settings: Namespace, *, download: bool) -> Data:
    train, held_out = signals(2400, 200, seed=settings.seed), signals(120, 12, seed=settings.seed + 1_000_003)
    return Data(train, held_out, every_identity_in_every_motion(held_out))  # voices held out are new ones


@torch.no_grad()
def draw_signals(network: nn.Module, data: Data, run: Path) -> list[Path]:
    """Draw a window of two clips, their reconstructions, and the swaps both ways, each over its truth."""
    rows = torch.tensor([0, 25])  # two voices
    frames, other = data.held_out.batch(rows).frames, data.held_out.batch(rows.flip(0)).frames
    shown = {
        "clip": (reconstruct(network.model, network.guide, frames)["x"].mean, frames),
        "who from the other": (
            swap(network.model, network.guide, frames, other, sites=["s"])["x"].mean,
            data.held_out.true_swap(rows.flip(0), rows).float() / 255,
        ),
        "what from the other": (
            swap(network.model, network.guide, frames, other, sites=["z"])["x"].mean,
            data.held_out.true_swap(rows, rows.flip(0)).float() / 255,
        ),
    }
    figure = Figure(figsize=(10, 6), layout="constrained")
    for line, (name, (found, truth)) in zip(
        figure.subplots(3, 2, sharex=True, sharey=True), shown.items(), strict=True
    ):
        for axis, clip, true in zip(line, found, truth, strict=True):
            axis.plot(true[:6].flatten(), color="0.7", linewidth=3, label="truth")
            axis.plot(clip[:6].flatten(), color="C0", linewidth=1, label="model")
            axis.set(title=name)
    line[-1].legend()
    figure.savefig(run / "swaps.png", dpi=100)
    return [run / "swaps.png"]


def measure(
    example: Example, network: nn.Module, data: Data, run: Path, settings: Namespace
) -> tuple[dict[str, Any], list[Path]]:
    numbers, written = measure_videos(example, network, data, run, settings)
    return numbers, written + draw_signals(network, data, run)


SIGNALS = VIDEOS._replace(
    options={"data": {"default": "signals", "help": "signals: the only data there is"}},
    load=load_signals,
    measure=measure,
    commands={"pack": PACK},
)
