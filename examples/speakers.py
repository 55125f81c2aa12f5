"""VDSM's idea on one-dimensional signals: who is speaking, and what, without a label.

    python examples/speakers.py                   train on signals that it generates itself, then measure swaps

A voice is a mixture of harmonics, what it says a contour of pitch and loudness. A step is a window of the signal, and
the decoder a bank of networks for windows, blended once per sequence by who is speaking. The truth of every swap is
known: the one voice with the other's contour. The command line is in `run_folder.py`, the measures in `videos.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from parts import lengths, mlp, of_real_steps, real_frames, standard_normal
from run_folder import EMISSION, Example, Plan, main, plan_from, single_stage
from torch import nn
from videos import VIDEOS, Data, every_identity_in_every_motion

from seqdisent import GatedTransition, MarkovChain, MixtureOfExperts, NormalHead, StaticEncoder, reconstruct, swap
from seqdisent.datasets import Clips

HARMONICS, WINDOW, STEPS = 6, 96, 20


class Speakers(nn.Module):
    """p(s) p(z_1) prod_t p(z_t | z_{t-1}) p(x_t | s, z_t): s blends the experts that turn z_t into a window."""

    def __init__(self, frame_shape, num_experts=8, latent_dim=4, hidden_dim=128, temperature=0.1):
        super().__init__()
        (window,) = frame_shape
        self.num_experts, self.latent_dim, self.temperature = num_experts, latent_dim, temperature
        self.encoder = nn.Sequential(mlp(window, 2 * hidden_dim, hidden_dim), nn.ReLU())
        self.static = StaticEncoder(hidden_dim, num_experts, initial_scale=0.1)
        self.pose = NormalHead(hidden_dim, latent_dim)
        self.transition = GatedTransition(latent_dim, hidden_dim)
        self.decoder = MixtureOfExperts(lambda: mlp(latent_dim, hidden_dim, 2 * hidden_dim, window), num_experts)
        self.noise = nn.Parameter(torch.tensor(-2.0))  # of a window; its softplus is a standard deviation

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None, ordered=True):
        num_sequences, num_steps = lengths(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            prior = dist.Normal(self.noise.new_zeros(self.num_experts), self.num_experts**-0.5).to_event(1)
            s = pyro.sample("s", prior)
            initial = standard_normal(s, num_sequences, self.latent_dim)
            step = self.transition if ordered else lambda z_prev: standard_normal(z_prev, *z_prev.shape)
            z = pyro.sample("z", MarkovChain(initial, step, num_steps, mask=mask))
            windows = self.decoder(z, torch.softmax(s / self.temperature, -1)).sigmoid()
            scale = nn.functional.softplus(self.noise) + 0.03
            window = dist.Normal(windows, scale, validate_args=False).to_event(1)
            pyro.sample("x", of_real_steps(window, mask), obs=real_frames(frames, mask))

    def guide(self, frames, mask=None):
        features = self.encoder(real_frames(frames, mask))
        with pyro.plate("sequences", len(frames)):
            pyro.sample("s", self.static(features, mask))
            # no step reads the one before, but the sequence is a chain all the same
            initial = self.pose(features[:, 0])
            chain = MarkovChain(initial, lambda _, x: self.pose(x), frames.shape[1], inputs=features, mask=mask)
            pyro.sample("z", chain)


# Training, as VDSM's: with every window on its own, a voice that is in z is paid for in each, in s once


def unordered(speakers, plan, clips, seed):
    speakers.transition.requires_grad_(False)
    draw = partial(clips.draw_groups, plan.batch_size, STEPS)
    return single_stage(speakers, plan, clips, seed, model=partial(speakers.model, ordered=False), draw=draw)


def dynamics(speakers, plan, clips, seed):
    speakers.requires_grad_(False)
    speakers.transition.requires_grad_(True)
    return single_stage(speakers, replace(plan, num_steps=(plan.num_steps + 2) // 3, annealed={}), clips, seed + 1)


# The signals


class Renderer:
    """The truth: harmonics of the voice of `content` at the pitch and loudness of `motion`, as bytes around 128."""

    def __init__(self, voice, contour):
        self.voice, self.contour = voice, contour  # (N, HARMONICS); (N, 4): pitch, depth and rate of its swing, phase

    def __call__(self, content, motion, num_steps=None):
        pitch, depth, rate, phase = self.contour[motion, :, None].unbind(1)
        angle = rate * torch.arange(STEPS if num_steps is None else num_steps) + phase
        cycles = pitch * (1 + depth * torch.sin(angle))  # in a window
        loudness = 0.6 + 0.4 * torch.cos(angle)
        time = torch.arange(WINDOW) / WINDOW
        order = torch.arange(1, HARMONICS + 1)[:, None]
        waves = torch.sin(2 * math.pi * order * time * cycles[..., None, None])  # (M, T, HARMONICS, WINDOW)
        signal = loudness[..., None] * torch.einsum("mh,mthw->mtw", self.voice[content], waves)
        return (127.5 * (1 + signal.clamp(-1, 1))).round().to(torch.uint8)


def signals(num_clips, num_voices, *, seed):
    """Clips of random voices, each saying several things."""
    generator = torch.Generator().manual_seed(seed)
    voices = torch.rand(num_voices, HARMONICS, generator=generator) ** 3
    voices = voices / voices.sum(1, keepdim=True)
    who, fast = torch.arange(num_clips) % num_voices, torch.arange(num_clips) // num_voices % 2
    low, high = torch.tensor([1.2, 0.1, 0.25, 0.0]), torch.tensor([2.4, 0.35, 0.35, 2 * math.pi])
    contour = low + (high - low) * torch.rand(num_clips, 4, generator=generator)
    contour[:, 2] *= 1 + fast
    renderer = Renderer(voices[who], contour)
    return Clips(
        renderer(torch.arange(num_clips), torch.arange(num_clips)), identity=who, labels={"voice": who, "speed": fast},
        static_factors=["voice"], motion_factors=["speed"], renderer=renderer,
    )  # fmt: skip


def load(config, *, download):
    train, held_out = signals(2400, 200, seed=config["seed"]), signals(120, 12, seed=config["seed"] + 1_000_003)
    return Data(train, held_out, every_identity_in_every_motion(held_out))  # voices held out are new ones


@torch.no_grad()
def draw(example, network, data, run, *, seed):
    """Draw a window of two clips, their reconstructions, and the swaps both ways, each over its truth."""
    rows = torch.tensor([0, 25])  # two voices
    frames, other = data.held_out.batch(rows).frames, data.held_out.batch(rows.flip(0)).frames
    shown = {
        "clip": (reconstruct(network.model, network.guide, frames)[EMISSION].mean, frames),
        "who from the other": (
            swap(network.model, network.guide, frames, other, sites=["s"])[EMISSION].mean,
            data.held_out.true_swap(rows.flip(0), rows).float() / 255,
        ),
        "what from the other": (
            swap(network.model, network.guide, frames, other, sites=["z"])[EMISSION].mean,
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


SIGNALS = VIDEOS._replace(
    options={"data": {"default": "signals", "help": "signals: the only data there is"}},
    load=load,
    draw=draw,
    commands={},
)
PRESETS = {
    "cpu": {
        "signals": Plan(
            {}, num_steps=6000, learning_rate=2e-3, batch_size=24, warm_up=200, clip_norm=200.0, betas=(0.9, 0.99),
            annealed={"z": (5.0, 3000), "s": (0.1, 2000)},
        )
    },
    "tiny": {
        "signals": Plan(
            {"num_experts": 3, "latent_dim": 2, "hidden_dim": 6},
            num_steps=6, learning_rate=1e-3, batch_size=2, checkpoint_every=2,
        )
    },
}  # fmt: skip

EXAMPLE = Example(
    __doc__,
    SIGNALS,
    lambda frame_shape, sizes: Speakers(frame_shape, **sizes),
    PRESETS,
    {"unordered": unordered, "dynamics": dynamics},
    plan_from,
    static=("s",),
    motion=("z",),
)

if __name__ == "__main__":
    main(EXAMPLE)
