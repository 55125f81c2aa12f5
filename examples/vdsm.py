"""VDSM: who is in a video, and what they do, without a label (Vowels, Camgoz and Bowden, CVPR 2021).

    python examples/vdsm.py                                   train on pendula that it generates itself
    python examples/vdsm.py --data sprites --preset cpu       train on Sprites
    python examples/vdsm.py --data moving_mnist               train on bouncing digits
    python examples/vdsm.py --data sprites --preset ablation  the same with a single decoder (paper, appendix G)
    python examples/vdsm.py --data FOLDER_OR_NPZ              train on your own clips
    python examples/vdsm.py evaluate RUN                      judge, swaps, probes: tables beside the paper's numbers
    python examples/vdsm.py generate RUN                      draw new clips from the prior
    python examples/vdsm.py swap RUN --content CLIP --motion CLIP
    python examples/vdsm.py forecast RUN --from FRAMES

The first half of this file is the model as the paper has it, the second half its hyperparameters and stages. The
command line is in `run_folder.py`, data and pictures are in `videos.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from parts import bernoulli, factor, lengths, of_real_steps, real_frames
from pyro.distributions import TorchDistribution
from run_folder import Example, main, tuples
from torch import Tensor, nn
from torch.distributions import kl_divergence
from videos import VIDEOS, calibrate

from seqdisent import (
    AnnealingSchedule,
    Combiner,
    ConvEncoder,
    GatedTransition,
    MarkovChain,
    MixtureOfExpertsConvDecoder,
    Seq2SeqDynamicsEncoder,
    StaticEncoder,
)
from seqdisent.datasets import Clips
from seqdisent.training import ELBOTraining


class VDSM(nn.Module):
    """Static factors s choose a decoder, dynamics d drive the poses z_1 ... z_T, decoder and pose make each frame x_t.

    `model` and `guide` are equations 1 and 2; `pretraining_model` and `pretraining_guide` treat frames as an unordered
    group of one identity (equation 7), and are of use by themselves on still images (paper, Figure 8).
    """

    def __init__(self, frame_shape: tuple[int, int, int], sizes: Sizes) -> None:
        super().__init__()
        colours, image_size, _ = frame_shape
        self.sizes = sizes
        self.encoder = ConvEncoder(
            sizes.feature_dim, in_channels=colours, image_size=image_size, channels=sizes.encoder_channels
        )
        self.static = StaticEncoder(sizes.feature_dim, sizes.num_experts, initial_scale=sizes.static_scale)
        self.pose = nn.Linear(sizes.feature_dim, 2 * sizes.pose_dim)
        self.dynamics = Seq2SeqDynamicsEncoder(
            sizes.pose_dim, sizes.dynamics_dim, hidden_dim=sizes.rnn_dim, num_layers=sizes.rnn_layers
        )
        self.combiner = Combiner(sizes.pose_dim, sizes.combiner_dim, context_dim=sizes.rnn_dim + sizes.dynamics_dim)
        self.initial_pose = nn.Parameter(torch.zeros(sizes.pose_dim))
        self.transition = GatedTransition(sizes.pose_dim, sizes.transition_dim, context_dim=sizes.dynamics_dim)
        self.decoder = MixtureOfExpertsConvDecoder(
            sizes.num_experts + sizes.pose_dim,
            1 if sizes.single_decoder else sizes.num_experts,
            out_channels=colours,
            image_size=image_size,
            channels=sizes.decoder_channels,
        )

    # The generative model p(s) p(d) p(z_1) prod_t p(z_t | z_{t-1}, d) p(x_t | s, z_t), equation 1

    def model(
        self,
        frames=None,
        mask=None,
        features=None,
        partner=None,
        *,
        num_sequences=None,
        num_steps=None,
        temperature=None,
    ):
        num_sequences, num_steps = lengths(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", self.static_prior())
            d = pyro.sample("d", self.normal(self.sizes.dynamics_dim))
            z = pyro.sample("z", self.pose_prior(d, num_steps, mask))
            pyro.sample("x", self.emission(s, z, mask, temperature), obs=real_frames(frames, mask))
            if partner is not None:  # beyond the paper, and no density: a term that the ledger weighs by its name
                factor("same_identity", -self.disagreement(features, mask, *partner))

    def static_prior(self) -> TorchDistribution:
        # variance, not deviation, 1 / N_s: at 1 / N_s as deviation the softmax of a prior sample is almost uniform
        return self.normal(self.sizes.num_experts, scale=self.sizes.num_experts**-0.5)

    def pose_prior(self, d: Tensor, num_steps: int, mask: Tensor | None, chain=MarkovChain) -> MarkovChain:
        initial = self.normal(self.sizes.pose_dim).expand(d.shape[:-1])
        return chain(initial, lambda z_prev: self.transition(z_prev, d), num_steps, mask=mask)

    def emission(self, s: Tensor, z: Tensor, mask: Tensor | None, temperature: float | None) -> TorchDistribution:
        temperature = self.sizes.temperature if temperature is None else temperature
        weights = torch.softmax(s / temperature, -1)
        if self.sizes.single_decoder:  # the mixing coefficients are an input and mix nothing
            s, weights = weights, weights.new_ones(*weights.shape[:-1], 1)
        logits = self.decoder(torch.cat([s.unsqueeze(-2).expand(*z.shape[:-1], -1), z], -1), weights)
        # pixels lie in [0, 1], not in {0, 1}: a cross-entropy, not a normalised density
        return bernoulli(logits, mask, 3)

    # The inference model q(s | x) q(d | x) q(z_1 | x, d) prod_t q(z_t | z_{t-1}, x, d), equation 2

    def guide(self, frames, mask=None, features=None, partner=None, *, temperature=None):
        features = self.features(frames, mask) if features is None else features
        with pyro.plate("sequences", frames.shape[0]):
            pyro.sample("s", self.static(features, mask))
            self.infer_motion(features, mask)

    def infer_motion(self, features: Tensor, mask: Tensor | None) -> None:
        embeddings, _ = self.pose_of_frame(features)
        d = pyro.sample("d", self.dynamics(embeddings, mask))
        unrolled = self.dynamics.unroll(d, features.shape[1])
        context = torch.cat([unrolled, d.unsqueeze(-2).expand(*unrolled.shape[:-1], -1)], -1)
        context = self.combiner.project(context, mask)  # of all steps at once
        initial = self.combiner.step(self.initial_pose.expand(*d.shape[:-1], -1), context[..., 0, :])
        pyro.sample("z", MarkovChain(initial, self.combiner.step, features.shape[1], inputs=context, mask=mask))

    def disagreement(self, features: Tensor, mask: Tensor | None, others: Tensor, other_mask: Tensor | None) -> Tensor:
        """How far q(s) of one clip is from q(s) of another that shows the same identity, in nats, both ways."""
        one, other = self.static(features, mask), self.static(others, other_mask)
        return kl_divergence(one, other) + kl_divergence(other, one)

    def features(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(real_frames(frames, mask))

    # Stage 1: the same static factors and decoder, every frame with a pose of its own, equation 7

    def pretraining_model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None, temperature=None):
        num_sequences, num_steps = lengths(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", self.static_prior())
            frame_pose = self.normal(self.sizes.pose_dim).expand([num_sequences, num_steps])
            z = pyro.sample("z", of_real_steps(frame_pose, mask))
            pyro.sample("x", self.emission(s, z, mask, temperature), obs=real_frames(frames, mask))

    def pretraining_guide(self, frames, mask=None, *, temperature=None):
        features = self.features(frames, mask)
        with pyro.plate("sequences", frames.shape[0]):
            pyro.sample("s", self.static(features, mask))
            frame_pose = dist.Normal(*self.pose_of_frame(features), validate_args=False).to_event(1)
            pyro.sample("z", of_real_steps(frame_pose, mask))

    # The transition by itself: no frame is decoded, and half of the chains are scored on their own roll-outs

    def motion_model(self, frames, mask=None, features=None, partner=None):
        with pyro.plate("sequences", frames.shape[0]):
            d = pyro.sample("d", self.normal(self.sizes.dynamics_dim))
            pyro.sample("z", self.pose_prior(d, frames.shape[1], mask, HalfRolledOut))
            factor("no_frames", d.new_zeros(d.shape[:-1]))

    def motion_guide(self, frames, mask=None, features=None, partner=None):
        with pyro.plate("sequences", frames.shape[0]):
            self.infer_motion(features, mask)

    def pose_of_frame(self, features: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(features.device.type, enabled=False):  # heads stay in full precision
            loc, scale = self.pose(features.to(self.pose.weight.dtype)).chunk(2, -1)
            return loc, nn.functional.softplus(scale) + 1e-4

    def normal(self, *event_shape: int, scale: float = 1.0) -> TorchDistribution:
        loc = self.initial_pose.new_zeros(event_shape)
        return dist.Normal(loc, scale, validate_args=False).to_event(len(event_shape))


class HalfRolledOut(MarkovChain):
    """A chain that scores every other sequence after the means that the transition makes of z_1 by itself.

    For those sequences the KL term is latent overshooting (Hafner et al., ICML 2019), with means in place of samples;
    the rest are scored after their own steps as ever, which keeps the one-step predictions of equation 4 close.
    """

    def conditionals(self, path):
        if self.num_steps > 1:
            rolled_out = self.extend(path[..., :1, :], self.num_steps - 1, sample=False)
            odd = torch.arange(path.shape[-3], device=path.device) % 2 == 1
            path = torch.where(odd[:, None, None], rolled_out, path)
        return super().conditionals(path)


# Hyperparameters


@dataclass(frozen=True)
class Sizes:
    """What the network is built from; the defaults are the paper's (appendix D, Table 5)."""

    num_experts: int  # N_s, also the size of s
    pose_dim: int = 30
    dynamics_dim: int = 50
    feature_dim: int = 256
    encoder_channels: tuple[int, ...] | None = (32, 32, 32, 64)
    decoder_channels: tuple[int, ...] | None = None  # 512, 256, 128, 64
    rnn_dim: int = 512
    rnn_layers: int = 3
    transition_dim: int = 64
    combiner_dim: int = 512
    temperature: float = 0.1  # tau once it is annealed
    static_scale: float | None = None  # of q(s), around which training starts; None: about 0.69
    single_decoder: bool = False  # the ablation of appendix G


@dataclass(frozen=True)
class Plan:
    """Both stages of training; the defaults are the paper's (Table 4, Figures 9 and 10)."""

    sizes: Sizes
    pretraining_steps: int
    pretraining_rate: float
    sequence_steps: int
    sequence_rate: float
    clip_length: int  # frames of a clip at stage 2
    num_groups: int = 20
    frames_per_group: int = 20
    num_clips: int = 20
    transition_steps: int = 0  # after stage 2, of the transition alone; the paper has no such stage
    transition_rate: float = 6e-3
    # stage 1: where the weight of KL(z), the weight of KL(s) and tau start, and over what part of the stage they change
    pose_weight: float = 30.0
    static_weight: float = 0.1
    temperature: float = 1.0
    pose_part: float = 1.0
    static_part: float = 1.0
    temperature_part: float = 1.0
    geometric: bool = False  # their profile: by a constant factor a step, or along a cosine
    peak_weight: float = 1.0  # stage 2: of KL(z) and KL(d) half way; above 1, it squeezes identity out of both
    same_identity: float = 0.0  # stage 2: weight of the disagreement of q(s) between two clips of one identity
    dynamics_weight: float = 1.0  # stage 2: of KL(d) at the end
    static_factor: float = 1.0  # stage 2: factor of the learning rate of the layers before s, learnt at stage 1
    pose_factor: float = 1.0  # the same for the layer before z
    # the optimiser
    warm_up: int = 1  # steps over which the learning rate rises
    decays: bool = False  # whether it then falls to 0 along a cosine
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None
    checkpoint_every: int = 500


def plan_from(config: dict) -> Plan:
    """Return the plan that `dataclasses.asdict` and JSON have taken apart."""
    return Plan(**{**tuples(config), "sizes": Sizes(**tuples(config["sizes"]))})


def _paper(num_experts: int, clip_length: int, epochs: tuple[int, int], rates: tuple[float, float], **changes) -> Plan:
    pretraining, sequence = epochs
    return Plan(
        Sizes(num_experts), 50 * pretraining, rates[0], 50 * sequence, rates[1], clip_length,
        frames_per_group=clip_length, **changes,
    )  # fmt: skip


_CPU = {
    "static_part": 0.3, "pose_part": 0.5, "temperature": 0.3, "temperature_part": 0.4, "geometric": True,
    "peak_weight": 5.0, "static_factor": 0.15, "pose_factor": 0.15, "transition_steps": 3000,
    "warm_up": 200, "decays": True, "betas": (0.9, 0.99), "clip_norm": 200.0,
}  # fmt: skip

PRESETS = {
    "paper": {  # Tables 4 and 5; a folder of one's own clips gets the sizes for MUG
        "clips": _paper(15, 20, (250, 200), (1e-3, 1e-3)),
        "sprites": _paper(40, 8, (300, 200), (8e-3, 1e-3)),
        "moving_mnist": _paper(12, 16, (300, 200), (1e-3, 1e-3), num_clips=30),
        "pendulum": _paper(8, 16, (200, 100), (5e-4, 1e-3), num_groups=50),
    },
    "cpu": {  # sized for two cores: an hour on Sprites, under five minutes on pendula
        "sprites": Plan(
            Sizes(
                num_experts=24,
                static_scale=0.1,
                encoder_channels=(16, 16, 32, 32),
                decoder_channels=(256, 128, 64, 32),
                rnn_dim=128,
                rnn_layers=1,
                combiner_dim=256,
            ),
            pretraining_steps=9000,
            pretraining_rate=4e-3,
            sequence_steps=4000,
            sequence_rate=2e-3,
            clip_length=8,
            num_groups=8,
            frames_per_group=8,
            num_clips=20,
            same_identity=30.0,
            dynamics_weight=3.0,
            **{**_CPU, "static_factor": 0.5},
        ),
        "pendulum": Plan(
            Sizes(
                num_experts=8,
                static_scale=0.1,
                pose_dim=8,
                dynamics_dim=16,
                feature_dim=128,
                encoder_channels=(16, 16, 32, 32),
                decoder_channels=(64, 32, 16, 16),
                rnn_dim=96,
                rnn_layers=1,
                combiner_dim=96,
            ),
            pretraining_steps=1800,
            pretraining_rate=4e-3,
            sequence_steps=1200,
            sequence_rate=4e-3,
            clip_length=16,
            num_groups=7,
            frames_per_group=8,
            num_clips=12,
            **_CPU,
        ),
    },
    "tiny": {  # for tests: it runs, it does not learn
        "clips": Plan(
            Sizes(
                num_experts=3,
                pose_dim=3,
                dynamics_dim=4,
                feature_dim=8,
                encoder_channels=None,
                decoder_channels=None,
                rnn_dim=8,
                rnn_layers=1,
                transition_dim=8,
                combiner_dim=8,
            ),
            pretraining_steps=6,
            pretraining_rate=1e-3,
            sequence_steps=6,
            sequence_rate=1e-3,
            clip_length=8,
            num_groups=2,
            frames_per_group=3,
            num_clips=2,
            transition_steps=4,
            checkpoint_every=2,
        ),
    },
}


PRESETS["cpu"]["clips"] = replace(  # whose identities may be unknown, or have but one clip
    PRESETS["cpu"]["sprites"], same_identity=0.0, dynamics_weight=1.0, static_factor=0.15
)
PRESETS["cpu"]["moving_mnist"] = replace(PRESETS["cpu"]["clips"], clip_length=16, num_clips=10)
PRESETS["ablation"] = {
    data: replace(plan, sizes=replace(plan.sizes, single_decoder=True)) for data, plan in PRESETS["cpu"].items()
}


def learning_rate(rate: float, num_steps: int, plan: Plan) -> AnnealingSchedule:
    warm_up = AnnealingSchedule.linear(rate / plan.warm_up, rate, plan.warm_up)
    if not plan.decays:
        return warm_up
    return warm_up.then(AnnealingSchedule.cosine(rate, 0.0, num_steps - plan.warm_up))


# Stage 1: encoder, static factors, poses of single frames and the bank of decoders


def pretraining(vdsm: VDSM, plan: Plan, clips: Clips, seed: int) -> ELBOTraining:
    n = plan.pretraining_steps
    change = AnnealingSchedule.geometric if plan.geometric else AnnealingSchedule.cosine
    calibrate(vdsm, clips, seed)
    vdsm.requires_grad_(False)
    for part in (vdsm.encoder, vdsm.static, vdsm.pose, vdsm.decoder):
        part.requires_grad_(True)
    return ELBOTraining(
        vdsm,
        vdsm.pretraining_model,
        vdsm.pretraining_guide,
        partial(clips.draw_groups, plan.num_groups, plan.frames_per_group),
        num_steps=n,
        learning_rate=learning_rate(plan.pretraining_rate, n, plan),
        weights={
            "z": change(plan.pose_weight, 1.0, round(n * plan.pose_part)),
            "s": change(plan.static_weight, 1.0, round(n * plan.static_part)),
        },
        inputs={"temperature": change(plan.temperature, plan.sizes.temperature, round(n * plan.temperature_part))},
        optimizer=partial(torch.optim.Adam, betas=plan.betas),
        terms_per_step=plan.num_groups * plan.frames_per_group,
        seed=seed,
    )


# Stage 2: the dynamics, on the features of a frozen encoder; the last layers of s and z go on learning


class EncodedBatch(NamedTuple):
    frames: Tensor
    mask: Tensor | None
    features: Tensor
    partner: tuple[Tensor, Tensor | None] | None  # features and mask of any clip of the same identity


def _needed(mask: Tensor) -> Tensor | None:
    return None if mask.all() else mask


def encoded_draws(
    vdsm: VDSM, plan: Plan, clips: Clips, *, partners: bool = False
) -> Callable[[torch.Generator], EncodedBatch]:
    features = cache(partial(encode_all, vdsm, clips))  # once, when training starts

    def draw(generator: torch.Generator) -> EncodedBatch:
        batch = clips.draw_clips(plan.num_clips, generator, num_steps=plan.clip_length)
        partner = None
        if partners:
            rows = clips.draw_partners(batch.positions[:, 0] // clips.frames.shape[1], generator)
            partner = features().unflatten(0, clips.frames.shape[:2])[rows], _needed(clips.mask[rows])
        return EncodedBatch(batch.frames, batch.mask if batch.ragged else None, features()[batch.positions], partner)

    return draw


def sequence_training(vdsm: VDSM, plan: Plan, clips: Clips, seed: int) -> ELBOTraining:
    n = plan.sequence_steps
    vdsm.requires_grad_(True)
    vdsm.encoder.requires_grad_(False)
    vdsm.decoder.requires_grad_(False)
    return ELBOTraining(
        vdsm,
        vdsm.model,
        vdsm.guide,
        encoded_draws(vdsm, plan, clips, partners=plan.same_identity > 0),
        num_steps=n,
        learning_rate=learning_rate(plan.sequence_rate, n, plan),
        # the paper's curve for z; it names none for d, which follows it here
        weights={
            site: AnnealingSchedule.quadratic([(0, 0.1), (n / 4, 0.3), (n / 2, plan.peak_weight), (n, end)])
            for site, end in (("z", 1.0), ("d", plan.dynamics_weight))
        }
        | ({"same_identity": AnnealingSchedule.constant(plan.same_identity)} if plan.same_identity else {}),
        arguments=tuple,
        terms_per_step=plan.num_clips * plan.clip_length,
        optimizer=partial(torch.optim.Adam, betas=plan.betas),
        rate_factors={"static.": plan.static_factor, "pose.": plan.pose_factor},
        seed=seed + 1,
    )


# The transition alone: only KL(z) depends on it, so a step costs little; one-step errors would add up in a roll-out


def transition_training(vdsm: VDSM, plan: Plan, clips: Clips, seed: int) -> ELBOTraining | None:
    n = plan.transition_steps
    if n == 0:
        return None
    vdsm.requires_grad_(False)
    vdsm.transition.requires_grad_(True)
    return ELBOTraining(
        vdsm,
        vdsm.motion_model,
        vdsm.motion_guide,
        encoded_draws(vdsm, replace(plan, num_clips=3 * plan.num_clips), clips),
        num_steps=n,
        learning_rate=learning_rate(plan.transition_rate, n, plan),
        arguments=tuple,
        terms_per_step=3 * plan.num_clips,
        optimizer=partial(torch.optim.Adam, betas=plan.betas),
        seed=seed + 2,
    )


@torch.no_grad()
def encode_all(vdsm: VDSM, clips: Clips, batch_size: int = 256) -> Tensor:
    """Return the features of every frame of the data, padding included, (N * T, feature_dim)."""
    frames = clips.frames.flatten(0, 1)
    chunks = [vdsm.encoder(chunk.to(vdsm.initial_pose) / 255).cpu() for chunk in frames.split(batch_size)]
    return torch.cat(chunks)


EXAMPLE = Example(
    __doc__,
    VIDEOS,
    VDSM,
    PRESETS,
    {"stage1": pretraining, "stage2": sequence_training, "transition": transition_training},
    plan_from,
    static=("s",),
    motion=("d", "z"),
)


if __name__ == "__main__":
    main(EXAMPLE)
