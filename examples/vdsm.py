"""VDSM: who is in a video, and what they do, without a label (Vowels, Camgoz and Bowden, CVPR 2021).

    python examples/vdsm.py                                   train on pendula that it generates itself
    python examples/vdsm.py --data sprites                    or moving_mnist, or FOLDER_OR_NPZ: your own clips
    python examples/vdsm.py --plan.sizes.num_experts 12       change any setting; --config FILE.yaml, many
    python examples/vdsm.py evaluate RUN                      judge, swaps, probes; also: generate, swap, forecast, pack

This file is the model as the paper has it, what the presets `cpu` add to it, and the stages of training. Presets are in
`presets/vdsm/`, the command line is in `command_line.py`, data and pictures in `videos.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from command_line import main
from parts import bernoulli, disagreement, factor, real_frames, unstack, warmed_up
from pyro.distributions import TorchDistribution
from settings import Example
from torch import Tensor, nn
from videos import VIDEOS, calibrate, encoded_draws, group_draws, part_recoloured, with_other_colours

from seqdisent import (
    AnnealingSchedule,
    Combiner,
    ConvEncoder,
    GatedTransition,
    IndependentSteps,
    MarkovChain,
    MixtureOfExpertsConvDecoder,
    MixturePrior,
    NormalHead,
    OvershootingChain,
    RecurrentChain,
    Seq2SeqDynamicsEncoder,
    StaticEncoder,
    batch_sizes,
    fill_padding,
    read_backward,
)
from seqdisent.datasets import Clips
from seqdisent.training import ELBOTraining, start_priors


@dataclass(frozen=True)
class Sizes:
    """What the network is built from; the defaults are the paper's (appendix D, Table 5)."""

    num_experts: int = 15  # N_s, also the size of s
    pose_dim: int = 30
    dynamics_dim: int = 50
    feature_dim: int = 256
    encoder_channels: tuple[int, ...] | None = (32, 32, 32, 64)
    decoder_channels: tuple[int, ...] | None = None  # 512, 256, 128, 64
    rnn_dim: int = 512
    rnn_layers: int = 3
    transition_dim: int = 64
    combiner_dim: int = 512
    memory_dim: int | None = None  # the prior remembers all poses, and q(z) sees every frame; None: the paper's graph
    temperature: float = 0.1  # tau once it is annealed
    static_scale: float | None = None  # of q(s), around which training starts; None: about 0.69
    num_components: int | None = None  # of the mixtures that p(s), p(d) and p(z_1 | d) become in the end; None: Normals
    single_decoder: bool = False  # the ablation of appendix G


@dataclass(frozen=True)
class Plan:
    """The stages of training; the defaults are the paper's (Table 4, Figures 9 and 10)."""

    sizes: Sizes
    pretraining_steps: int = 12_500
    pretraining_rate: float = 1e-3
    sequence_steps: int = 10_000
    sequence_rate: float = 1e-3
    clip_length: int = 20  # frames of a clip at stage 2
    num_groups: int = 20
    frames_per_group: int = 20
    num_clips: int = 20
    prior_steps: int = 0  # after stage 2, of the priors alone, transition and all; the paper has no such stage
    prior_rate: float = 6e-3
    # stage 1: where the weight of KL(z), the weight of KL(s) and tau start, and over what part of the stage they change
    pose_weight: float = 30.0
    static_weight: float = 0.1
    temperature: float = 1.0
    pose_part: float = 1.0
    static_part: float = 1.0
    temperature_part: float = 1.0
    recolour: float = 0.0  # of few identities: part of stage 1's groups in other colours; above 0, stage 2 has copies
    geometric: bool = False  # their profile: by a constant factor a step, or along a cosine
    peak_weight: float = 1.0  # stage 2: of KL(z) half way; above 1, it squeezes identity out
    dynamics_peak: float = 1.0  # stage 2: of KL(d) half way
    rolled: float = 0.0  # after stage 1: part of the chains that are scored on the prior's own roll-outs
    same_identity: float = 0.0  # stage 2: weight of the disagreement of q(s) between two clips of one identity
    same_motion: float = 0.0  # stage 2: of q(d) between a clip and its motion with another's identity
    dynamics_weight: float = 1.0  # stage 2: of KL(d) at the end
    static_factor: float = 1.0  # stage 2: factor of the learning rate of the layers before s, learnt at stage 1
    pose_factor: float = 1.0  # the same for the layer before z
    warm_up: int = 1  # steps over which the learning rate rises
    decays: bool = False  # whether it then falls to 0 along a cosine
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if (self.sizes.num_components and not self.prior_steps) or (self.rolled and not self.sizes.memory_dim):
            raise ValueError("plan: expected prior_steps where num_components are set, memory_dim where rolled is > 0")


class VDSM(nn.Module):
    """Static factors s choose a decoder, dynamics d drive the poses z_1 ... z_T, decoder and pose make a frame x_t."""

    def __init__(self, frame_shape: tuple[int, int, int], sizes: Sizes) -> None:
        super().__init__()
        (colours, image_size, _), self.sizes = frame_shape, sizes
        self.encoder = ConvEncoder(
            sizes.feature_dim, in_channels=colours, image_size=image_size, channels=sizes.encoder_channels
        )
        self.static = StaticEncoder(sizes.feature_dim, sizes.num_experts, initial_scale=sizes.static_scale)
        self.pose = NormalHead(sizes.feature_dim, sizes.pose_dim)
        z_dim, d_dim, memory_dim = sizes.pose_dim, sizes.dynamics_dim, sizes.memory_dim or 0
        self.dynamics = Seq2SeqDynamicsEncoder(z_dim, d_dim, hidden_dim=sizes.rnn_dim, num_layers=sizes.rnn_layers)
        self.combiner = Combiner(z_dim, sizes.combiner_dim, context_dim=sizes.rnn_dim + d_dim + 2 * memory_dim)
        self.initial_pose = nn.Parameter(torch.zeros(z_dim))
        self.transition = GatedTransition(z_dim, sizes.transition_dim, context_dim=d_dim + memory_dim)
        if memory_dim:
            self.memory = nn.GRU(z_dim, memory_dim, batch_first=True)
            self.first_memory = nn.Linear(d_dim, memory_dim)
            self.past, self.future = (nn.GRU(z_dim, memory_dim, batch_first=True) for _ in range(2))
        if sizes.num_components:
            mixture = partial(MixturePrior, num_components=sizes.num_components)
            self.priors = nn.ModuleDict({"s": mixture(sizes.num_experts, full=True), "d": mixture(d_dim),
                                         "z": mixture(z_dim, context_dim=d_dim)})  # fmt: skip
        self.decoder = MixtureOfExpertsConvDecoder(
            sizes.num_experts + sizes.pose_dim, 1 if sizes.single_decoder else sizes.num_experts,
            out_channels=colours, image_size=image_size, channels=sizes.decoder_channels,
        )  # fmt: skip

    # The generative model p(s) p(d) p(z_1) prod_t p(z_t | z_{t-1}, d) p(x_t | s, z_t), equation 1

    def model(self, frames=None, mask=None, features=None, partner=None, *,
              num_sequences=None, num_steps=None, temperature=None, rolled=0.0, learnt=True):  # fmt: skip
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            s, z = self.latents(num_steps, mask, rolled, learnt)
            pyro.sample("x", self.emission(s, z, mask, temperature), obs=real_frames(frames, mask))

    def latents(self, num_steps: int, mask: Tensor | None, rolled: float, learnt: bool) -> tuple[Tensor, Tensor]:
        learnt = learnt and self.sizes.num_components is not None
        s = pyro.sample("s", self.priors["s"]() if learnt else self.static_prior())
        d = pyro.sample("d", self.priors["d"]() if learnt else self.normal(self.sizes.dynamics_dim))
        initial = self.priors["z"](d) if learnt else self.normal(self.sizes.pose_dim).expand(d.shape[:-1])
        return s, pyro.sample("z", self.pose_prior(initial, d, num_steps, mask, rolled))

    def static_prior(self) -> TorchDistribution:
        return self.normal(self.sizes.num_experts, scale=self.sizes.num_experts**-0.5)  # 1 / N_s is the variance

    def pose_prior(self, initial: TorchDistribution, d: Tensor, num_steps: int, mask: Tensor | None, rolled: float):
        def step(z_prev: Tensor, *memory: Tensor) -> TorchDistribution:
            return self.transition(z_prev, torch.cat([d.expand(*z_prev.shape[:-1], -1), *memory], -1))

        if not self.sizes.memory_dim:
            return MarkovChain(initial, step, num_steps, mask=mask)
        chain = partial(OvershootingChain, part=rolled) if rolled else RecurrentChain
        start = torch.tanh(self.first_memory(d))
        return chain(initial, step, num_steps, recurrence=self.memory, state=start, mask=mask)

    def emission(self, s: Tensor, z: Tensor, mask: Tensor | None, temperature: float | None) -> TorchDistribution:
        temperature = self.sizes.temperature if temperature is None else temperature
        weights = torch.softmax(s / temperature, -1)
        if self.sizes.single_decoder:  # the mixing coefficients are an input and mix nothing
            s, weights = weights, weights.new_ones(*weights.shape[:-1], 1)
        logits = self.decoder(torch.cat([s.unsqueeze(-2).expand(*z.shape[:-1], -1), z], -1), weights)
        return bernoulli(logits, mask, 3)  # pixels lie in [0, 1]: a cross-entropy, not a normalised density

    # The inference model q(s | x) q(d | x) q(z_1 | x, d) prod_t q(z_t | z_{t-1}, x, d), equation 2

    def guide(self, frames, mask=None, features=None, partner=None, *, temperature=None):
        features = self.encoder(real_frames(frames, mask)) if features is None else features
        with pyro.plate("sequences", frames.shape[0]):
            pyro.sample("s", self.static(features, mask))
            embeddings = self.pose(features).mean
            d = pyro.sample("d", self.dynamics(embeddings, mask))
            unrolled = self.dynamics.unroll(d, features.shape[1])
            context = [unrolled, d.unsqueeze(-2).expand(*unrolled.shape[:-1], -1)]
            if self.sizes.memory_dim:
                poses = embeddings if mask is None else fill_padding(embeddings, mask)
                seen = torch.cat([self.past(poses)[0], read_backward(self.future, poses, mask)], -1)
                context.append(seen.expand(*unrolled.shape[:-1], -1))
            context = self.combiner.project(torch.cat(context, -1), mask)  # of all steps at once
            initial = self.combiner.step(self.initial_pose.expand(*d.shape[:-1], -1), context[..., 0, :])
            pyro.sample("z", MarkovChain(initial, self.combiner.step, features.shape[1], inputs=context, mask=mask))

    def same_identity(self, drawn, frames, mask, features, partner):  # beyond the paper: losses beside the bound
        return disagreement(self.static(features, mask), self.static(*partner))

    def same_motion(self, drawn, frames, mask, features, partner):
        with torch.no_grad():  # each motion decoded with another clip's s, and seen again
            seen = self.encoder(self.emission(drawn["s"].value.roll(1, -2), drawn["z"].value, mask, None).mean)
        return disagreement(*unstack(self.dynamics(self.pose(torch.stack([features, seen])).mean, mask)))

    # Stage 1: every frame has a pose of its own, equation 7; by itself, a model of still images (paper, Figure 8)

    def pretraining_model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None, temperature=None):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", self.static_prior())
            pose = self.normal(self.sizes.pose_dim).expand([num_sequences, num_steps])
            z = pyro.sample("z", IndependentSteps(pose, mask))
            pyro.sample("x", self.emission(s, z, mask, temperature), obs=real_frames(frames, mask))

    def pretraining_guide(self, frames, mask=None, *, temperature=None):
        features = self.encoder(real_frames(frames, mask))
        with pyro.plate("sequences", frames.shape[0]):
            pyro.sample("s", self.static(features, mask))
            pyro.sample("z", IndependentSteps(self.pose(features), mask))

    # Stage 3: the priors by themselves, and no frame is decoded

    def prior_model(self, frames, mask=None, features=None, partner=None, *, rolled=0.0):
        with pyro.plate("sequences", frames.shape[0]):
            s, _ = self.latents(frames.shape[1], mask, rolled, learnt=True)
            factor("no_frames", s.new_zeros(s.shape[:-1]))

    def normal(self, *shape: int, scale: float = 1.0) -> TorchDistribution:
        return dist.Normal(self.initial_pose.new_zeros(shape), scale, validate_args=False).to_event(len(shape))


# Training

PRIOR = ("transition", "memory", "first_memory")


def training(vdsm: VDSM, parts: tuple[str, ...], plan: Plan, num_steps: int, rate: float, *programs, **options):
    """Return the training of some parts; its learning rate rises, and falls to 0 along a cosine if the plan says so."""
    for name, parameter in vdsm.named_parameters():
        parameter.requires_grad_(name.startswith(parts))
    learning_rate = warmed_up(rate, plan.warm_up, num_steps, decays=plan.decays)
    options |= {"num_steps": num_steps, "optimizer": partial(torch.optim.Adam, betas=plan.betas)}
    return ELBOTraining(vdsm, *programs, learning_rate=learning_rate, **options)


def pretraining(vdsm: VDSM, plan: Plan, clips: Clips, seed: int) -> ELBOTraining:
    """Stage 1: encoder, static factors, poses of single frames and the bank of decoders."""
    calibrate(vdsm, clips, seed)
    n, change = plan.pretraining_steps, AnnealingSchedule.geometric if plan.geometric else AnnealingSchedule.cosine
    return training(
        vdsm, ("encoder", "static", "pose", "decoder"), plan, n, plan.pretraining_rate,
        vdsm.pretraining_model, vdsm.pretraining_guide,
        group_draws(clips, plan.num_groups, plan.frames_per_group, part_recoloured(plan.recolour, clips)),
        weights={"z": change(plan.pose_weight, 1.0, round(n * plan.pose_part)),
                 "s": change(plan.static_weight, 1.0, round(n * plan.static_part))},
        inputs={"temperature": change(plan.temperature, plan.sizes.temperature, round(n * plan.temperature_part))},
        terms_per_step=plan.num_groups * plan.frames_per_group, seed=seed,
    )  # fmt: skip


def sequence_training(vdsm: VDSM, plan: Plan, clips: Clips, seed: int) -> ELBOTraining:
    """Stage 2: the dynamics, on the features of a frozen encoder; the last layers of s and z go on learning."""
    n = plan.sequence_steps
    parts = ("static", "pose.loc", "dynamics", "combiner", "initial_pose", "past", "future", *PRIOR)
    weights = {  # the paper's curve for z; it names none for d, which follows it here
        site: AnnealingSchedule.quadratic([(0, 0.1), (n / 4, 0.3), (n / 2, peak), (n, end)])
        for site, peak, end in (("z", plan.peak_weight, 1.0), ("d", plan.dynamics_peak, plan.dynamics_weight))
    }
    agree = {name: getattr(vdsm, name) for name in ("same_identity", "same_motion") if getattr(plan, name)}
    weights |= {name: AnnealingSchedule.constant(getattr(plan, name)) for name in agree}
    clips = with_other_colours(clips, seed) if part_recoloured(plan.recolour, clips) else clips
    draw = encoded_draws(vdsm.encoder, clips, plan.num_clips, plan.clip_length, partners=bool(agree))
    return training(
        vdsm, parts, plan, n, plan.sequence_rate,
        partial(vdsm.model, rolled=plan.rolled, learnt=False), vdsm.guide, draw,
        weights=weights, rate_factors={"static.": plan.static_factor, "pose.": plan.pose_factor}, arguments=tuple,
        auxiliary_losses=agree, terms_per_step=plan.num_clips * plan.clip_length, seed=seed + 1,
    )  # fmt: skip


def prior_training(vdsm: VDSM, plan: Plan, clips: Clips, seed: int) -> ELBOTraining | None:
    """Stage 3: the priors alone, transition and all; only KL terms depend on them, so a step decodes nothing."""
    if plan.prior_steps == 0:
        return None
    draw = encoded_draws(vdsm.encoder, clips, 3 * plan.num_clips, plan.clip_length, decodes=False)
    if vdsm.sizes.num_components:
        start_priors(vdsm.guide, draw, vdsm.priors, arguments=tuple, seed=seed)
    return training(
        vdsm, ("priors", *PRIOR), plan, plan.prior_steps, plan.prior_rate,
        partial(vdsm.prior_model, rolled=plan.rolled), vdsm.guide, draw,
        rate_factors={"priors.s": 0.1, "priors.d": 0.1} if vdsm.sizes.num_components else {},
        arguments=tuple, terms_per_step=3 * plan.num_clips, seed=seed + 2,
    )  # fmt: skip


STAGES = {"stage1": pretraining, "stage2": sequence_training, "priors": prior_training}
EXAMPLE = Example("vdsm", __doc__, VIDEOS, VDSM, STAGES, Sizes, Plan, static=("s",), motion=("d", "z"))

if __name__ == "__main__":
    main(EXAMPLE)
