"""Small Pyro models and guides whose truth is known, shared by the tests of chain, ledger and interventions.

All are float64 and drawn from a seed. Frames are vectors: (B, T, X).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pyro
import pyro.distributions as dist
import reference
import torch
from pyro import poutine
from strategies import Tensors, mask_of
from torch import Tensor, nn
from torch.distributions import register_kl

from seqdisent import ELBOTerms, IndependentSteps, MarkovChain, RecurrentChain
from seqdisent.inference import Term


@register_kl(IndependentSteps, IndependentSteps)
def kl_of_independent_steps(q: IndependentSteps, p: IndependentSteps) -> Tensor:
    """What Pyro's TraceMeanField_ELBO is told for the comparison with it; both have the same mask."""
    per_step = torch.distributions.kl_divergence(q.step_distribution, p.step_distribution)
    return (per_step if q.step_mask is None else torch.where(q.step_mask, per_step, 0.0)).sum(-1)


def normal(loc: Tensor, scale: Tensor | float, event_dims: int = 1) -> Any:
    return dist.Normal(loc, scale, validate_args=False).to_event(event_dims)


def without_padding(frames: Tensor, mask: Tensor | None) -> Tensor:
    return frames if mask is None else torch.where(mask.unsqueeze(-1), frames, frames.new_zeros(()))


def emission(loc: Tensor, scale: Tensor | float, mask: Tensor | None) -> Any:
    """Frames (B, T, X), each step independent; padding scores 0."""
    frames = dist.Normal(loc, scale, validate_args=False)
    return (frames if mask is None else frames.mask(mask.unsqueeze(-1))).to_event(2)


class LinearChain:
    """z_t = A z_{t-1} + U u_t + W c + noise: static context c, inputs u_t, a chain and its parts.

    `inputs` is (*B, T, I), `context` (*B, C); with `mask`, its rows are ragged.
    """

    def __init__(self, seed: int, batch_shape: tuple[int, ...], num_steps: int, size: int, mask: Tensor | None = None):
        tensors = Tensors(seed)
        self.num_steps, self.size, self.mask = num_steps, size, mask
        self.matrix = 0.6 * tensors.normal(size, size)
        self.read, self.shift = tensors.normal(size, 2), tensors.normal(size, 3)
        self.scale = 0.3 + tensors.uniform(size)
        self.loc, self.first_scale = tensors.normal(*batch_shape, size), 0.3 + tensors.uniform(*batch_shape, size)
        self.context = tensors.normal(*batch_shape, 3)
        self.inputs = tensors.normal(*batch_shape, num_steps, 2)
        self.calls: list[torch.Size] = []

    @property
    def initial(self) -> Any:
        return normal(self.loc, self.first_scale)

    def transition(self, z_prev: Tensor, inputs: Tensor) -> Any:
        assert inputs.shape[:-1] == z_prev.shape[:-1]
        self.calls.append(z_prev.shape)
        return normal(z_prev @ self.matrix.T + inputs @ self.read.T + self.context @ self.shift.T, self.scale)

    def chain(self, **changed: Any) -> MarkovChain:
        options = {"inputs": self.inputs, "mask": self.mask, **changed}
        return MarkovChain(self.initial, self.transition, self.num_steps, **options)

    def parameters(self) -> list[Tensor]:
        return [self.matrix, self.read, self.shift, self.scale, self.loc, self.first_scale, self.context]

    def of_row(self, *row: int, length: int | None = None) -> tuple[Tensor, Tensor, list[reference.LinearStep]]:
        """Return mean and covariance of the first step of one sequence, and its later steps."""
        noise = torch.diag(self.scale**2)
        offset = self.shift @ self.context[row]
        steps = [(self.matrix, self.read @ u + offset, noise) for u in self.inputs[row][1 : length or self.num_steps]]
        return self.loc[row], torch.diag(self.first_scale[row] ** 2), steps


class StateSpace:
    """z_1 ~ N(m, P), z_t = A z_{t-1} + b + noise, x_t = C z_t + c + noise, with an exact and a rough guide."""

    def __init__(self, seed: int, latent_dim: int = 2, frame_dim: int = 2, *, dense: bool = False):
        tensors = Tensors(seed)
        self.latent_dim, self.dense = latent_dim, dense  # dense: the same normals as MultivariateNormal
        self.loc, self.first_scale = tensors.normal(latent_dim), 0.4 + tensors.uniform(latent_dim)
        self.matrix, self.offset = 0.6 * tensors.normal(latent_dim, latent_dim), tensors.normal(latent_dim)
        self.scale = 0.4 + tensors.uniform(latent_dim)
        self.decode, self.decode_offset = tensors.normal(frame_dim, latent_dim), tensors.normal(frame_dim)
        self.frame_scale = 0.4 + tensors.uniform(frame_dim)
        self.encode, self.carry = 0.3 * tensors.normal(latent_dim, frame_dim), 0.3 * tensors.normal(latent_dim)
        self.guide_scale = 0.4 + tensors.uniform(latent_dim)

    def parameters(self) -> list[Tensor]:
        return [self.loc, self.first_scale, self.matrix, self.offset, self.scale, self.decode, self.decode_offset] + [
            self.frame_scale, self.encode, self.carry, self.guide_scale
        ]  # fmt: skip

    def prior(self, loc: Tensor, scale: Tensor) -> Any:
        if not self.dense:
            return normal(loc, scale)
        return dist.MultivariateNormal(loc, scale_tril=torch.diag(scale), validate_args=False)

    def transition(self, z_prev: Tensor) -> Any:
        return self.prior(z_prev @ self.matrix.T + self.offset, self.scale)

    def model(
        self, frames: Tensor | None = None, mask: Tensor | None = None, observed: Tensor | None = None,
        *, num_sequences=None, num_steps=None,
    ):  # fmt: skip
        if frames is not None:
            num_sequences, num_steps = frames.shape[:2]
            frames = without_padding(frames, mask) if observed is None else frames
        with pyro.plate("sequences", num_sequences):
            initial = self.prior(self.loc.expand(num_sequences, -1), self.first_scale)
            z = pyro.sample("z", MarkovChain(initial, self.transition, num_steps, mask=mask))
            loc = z @ self.decode.T + self.decode_offset
            x = emission(loc, self.frame_scale, mask)
            if observed is not None:
                x = IndependentSteps(normal(loc, self.frame_scale), mask, observed)
            pyro.sample("x", x, obs=frames)

    def guide(self, frames: Tensor, mask: Tensor | None = None):
        """A rough guide: q(z_t | z_{t-1}, x_t), linear."""
        features = without_padding(frames, mask) @ self.encode.T

        def step(z_prev: Tensor, features: Tensor) -> Any:
            return normal(self.carry * z_prev + features, self.guide_scale)

        with pyro.plate("sequences", len(frames)):
            initial = normal(features[:, 0], self.guide_scale)
            pyro.sample("z", MarkovChain(initial, step, frames.shape[1], inputs=features, mask=mask))

    def factorised_guide(self, frames: Tensor, mask: None = None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", normal(frames @ self.encode.T, self.guide_scale, 2))

    def _parts(self) -> tuple[Tensor, Tensor, reference.LinearStep, reference.LinearStep]:
        step = (self.matrix, self.offset, torch.diag(self.scale**2))
        seen = (self.decode, self.decode_offset, torch.diag(self.frame_scale**2))
        return self.loc, torch.diag(self.first_scale**2), step, seen

    def log_evidence(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """NaN is what was not seen."""
        loc, covariance, step, seen = self._parts()
        mask = torch.ones(frames.shape[:2], dtype=torch.bool) if mask is None else mask
        return torch.stack(
            [
                reference.kalman_log_evidence(loc, covariance, [step] * len(row), seen, row[real])
                for row, real in zip(frames, mask, strict=True)
            ]
        )

    def exact_guide(self, frames: Tensor, mask: Tensor | None = None, observed: Tensor | None = None):
        """q(z_t | z_{t-1}, x), exact: each step's matrix, offset and Cholesky factor are its inputs."""
        if observed is not None:  # NaN is what was not seen
            frames = torch.where(reference.by_coordinate(observed, frames), frames, float("nan"))
        num_sequences, num_steps = frames.shape[:2]
        size = self.latent_dim
        lengths = [num_steps] * num_sequences if mask is None else mask.sum(1).tolist()
        loc, covariance, step, seen = self._parts()
        first_loc, first_tril = torch.zeros(num_sequences, size), torch.zeros(num_sequences, size, size)
        first_loc, first_tril = first_loc.to(frames), first_tril.to(frames)
        inputs = torch.full((num_sequences, num_steps, 2 * size**2 + size), float("nan"), dtype=frames.dtype)
        for i, length in enumerate(lengths):
            mean, spread, steps = reference.posterior_chain(
                loc, covariance, [step] * (length - 1), seen, frames[i, :length]
            )
            first_loc[i], first_tril[i] = mean, torch.linalg.cholesky(spread)
            for t, (matrix, offset, noise) in enumerate(steps, start=1):
                tril = torch.linalg.cholesky(noise)
                tril = tril - torch.diag(tril.diag()) + torch.diag(tril.diag().log())  # 0, as padding is, gives I
                inputs[i, t] = torch.cat([matrix.flatten(), offset, tril.flatten()])

        def transition(z_prev: Tensor, inputs: Tensor) -> Any:
            matrix, offset, tril = inputs.split([size**2, size, size**2], -1)
            matrix, tril = (x.unflatten(-1, (size, size)) for x in (matrix, tril))
            tril = tril.tril(-1) + torch.diag_embed(tril.diagonal(dim1=-2, dim2=-1).exp())
            mean = (matrix @ z_prev.unsqueeze(-1)).squeeze(-1) + offset
            return dist.MultivariateNormal(mean, scale_tril=tril, validate_args=False)

        with pyro.plate("sequences", num_sequences):
            initial = dist.MultivariateNormal(first_loc, scale_tril=first_tril, validate_args=False)
            pyro.sample("z", MarkovChain(initial, transition, num_steps, inputs=inputs, mask=mask))


class VRNN:
    """h_t = f(h_{t-1}, z_{t-1}, x_{t-1}), which prior, posterior and frames share: p(z_t | h_t), q(z_t | h_t, x_t).

    Without frames, the network reads those of `history`, and then the means of its own. Its state starts at `start`.
    """

    def __init__(self, seed: int):
        tensors = Tensors(seed)
        self.network: nn.GRU = tensors.build(lambda: nn.GRU(4, 3))
        self.start = tensors.normal(3)
        self.prior_of_h, self.q_of_h, self.q_of_x = tensors.normal(2, 3), tensors.normal(2, 3), tensors.normal(2, 2)
        self.x_of_z, self.x_of_h = tensors.normal(2, 2), tensors.normal(2, 3)
        self.scale, self.q_scale, self.frame_scale = (0.3 + tensors.uniform(2) for _ in range(3))

    def parameters(self) -> list[Tensor]:
        names = ("start", "prior_of_h", "q_of_h", "q_of_x", "x_of_z", "x_of_h", "scale", "q_scale", "frame_scale")
        return [*self.network.parameters(), *(getattr(self, name) for name in names)]

    def frame(self, z: Tensor, h: Tensor) -> Tensor:
        return (z @ self.x_of_z.T + h @ self.x_of_h.T).sin()

    def prior(self, _: Tensor | None, h: Tensor) -> Any:
        return normal(h @ self.prior_of_h.T, self.scale)

    def posterior(self, _: Tensor | None, h_and_x: Tensor) -> Any:
        h, x = h_and_x.split([3, 2], -1)
        return normal(h @ self.q_of_h.T + x @ self.q_of_x.T, self.q_scale)

    def reading(self, history: Any) -> Any:
        def read(z_prev: Tensor, h_prev: Tensor, t: int) -> Tensor:
            made = self.frame(z_prev, h_prev)
            if history is None or t > history[0].shape[1]:
                return made
            frames, mask = history
            return frames[:, t - 1] if mask is None else torch.where(mask[:, t - 1, None], frames[:, t - 1], made)

        return read

    def _carried(self, previous: Any, mask: Tensor | None) -> dict[str, Any]:
        return {"recurrence": self.network, "state": self.start, "inputs": previous, "mask": mask}

    def model(self, frames: Tensor | None = None, mask: Tensor | None = None, *, num_sequences=None, num_steps=None,
              history=None):  # fmt: skip
        previous: Any = self.reading(history)
        if frames is not None:
            num_sequences, num_steps = frames.shape[:2]
            frames = without_padding(frames, mask)
            previous = frames.roll(1, 1)
        with pyro.plate("sequences", num_sequences):
            initial = self.prior(None, self.start.expand(num_sequences, -1))
            chain = RecurrentChain(initial, self.prior, num_steps, **self._carried(previous, mask))
            z = pyro.sample("z", chain)
            pyro.sample("x", emission(self.frame(z, chain.states(z)), self.frame_scale, mask), obs=frames)

    def guide(self, frames: Tensor, mask: Tensor | None = None):
        frames = without_padding(frames, mask)
        with pyro.plate("sequences", len(frames)):
            first = torch.cat([self.start.expand(len(frames), -1), frames[:, 0]], -1)
            carried = self._carried(frames.roll(1, 1), mask)
            chain = RecurrentChain(
                self.posterior(None, first), self.posterior, frames.shape[1], context=frames, **carried
            )
            pyro.sample("z", chain)


class WhoWhat(nn.Module):
    """Who: s. What: d, which drives the chain z. x shows s and z; y, a second emission, shows s alone.

    The guide infers s from the average frame, d from the last frame less the first and from s, z from d and the frames.
    Everything is linear, so `by_hand` can say what every mean must be, one sequence and one step at a time.
    """

    def __init__(self, seed: int = 0, *, second_emission: bool = False):
        super().__init__()
        tensors = Tensors(seed)
        self.second_emission = second_emission

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(0.5 * tensors.normal(rows, columns))

        # sizes: s 2, d 2, z 3, x 4, y 1
        self.x_of_s, self.x_of_z, self.y_of_s = matrix(4, 2), matrix(4, 3), matrix(1, 2)
        self.z_of_d, self.z_of_z = matrix(3, 2), matrix(3, 3)
        self.q_s_of_x, self.q_d_of_x, self.q_d_of_s = matrix(2, 4), matrix(2, 4), matrix(2, 2)
        self.q_z_of_x, self.q_z_of_d, self.q_z_of_z = matrix(3, 4), matrix(3, 2), matrix(3, 3)
        self.prior_d = nn.Parameter(tensors.normal(2))

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        if frames is not None:
            num_sequences, num_steps = frames.shape[:2]
            frames = without_padding(frames, mask)
        zeros = self.prior_d.new_zeros(num_sequences, 2)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", normal(zeros, 1.0))
            d = pyro.sample("d", normal(self.prior_d + zeros, 1.0))
            drive = d @ self.z_of_d.T

            def step(z_prev: Tensor) -> Any:
                return normal(z_prev @ self.z_of_z.T + drive, 0.4)

            z = pyro.sample("z", MarkovChain(normal(drive, 0.5), step, num_steps, mask=mask))
            loc = (s @ self.x_of_s.T).unsqueeze(-2) + z @ self.x_of_z.T
            pyro.sample("x", emission(loc, 0.3, mask), obs=frames)
            if self.second_emission:
                pyro.sample("y", normal(s @ self.y_of_s.T, 0.3))

    def guide(self, frames, mask=None):
        if mask is None:
            mask = torch.ones(frames.shape[:2], dtype=torch.bool)
        frames = without_padding(frames, mask)
        lengths = mask.sum(1)
        rows = torch.arange(len(frames))
        with pyro.plate("sequences", len(frames)):
            s = pyro.sample("s", normal((frames.sum(1) / lengths[:, None]) @ self.q_s_of_x.T, 0.2))
            change = frames[rows, lengths - 1] - frames[:, 0]
            d = pyro.sample("d", normal(change @ self.q_d_of_x.T + s @ self.q_d_of_s.T, 0.3))
            drive = d @ self.q_z_of_d.T

            def step(z_prev: Tensor, frame: Tensor) -> Any:
                return normal(z_prev @ self.q_z_of_z.T + frame @ self.q_z_of_x.T + drive, 0.2)

            initial = normal(frames[:, 0] @ self.q_z_of_x.T + drive, 0.2)
            pyro.sample("z", MarkovChain(initial, step, frames.shape[1], inputs=frames, mask=mask))

    @torch.no_grad()
    def by_hand(self, frames: Tensor, *, s: Tensor | None = None, d: Tensor | None = None) -> dict[str, Tensor]:
        """Return the means of s, d and z for one sequence (T, X) without padding, given s or d where they are known."""
        s = self.q_s_of_x @ (sum(frames) / len(frames)) if s is None else s
        d = self.q_d_of_x @ (frames[-1] - frames[0]) + self.q_d_of_s @ s if d is None else d
        z = [self.q_z_of_x @ frames[0] + self.q_z_of_d @ d]
        for frame in frames[1:]:
            z.append(self.q_z_of_z @ z[-1] + self.q_z_of_x @ frame + self.q_z_of_d @ d)
        return {"s": s, "d": d, "z": torch.stack(z)}

    @torch.no_grad()
    def continued_by_hand(self, z: Tensor, d: Tensor, num_steps: int) -> Tensor:
        """Lengthen z (T, Z) to `num_steps` with the prior's means; T may be 0."""
        path = list(z)
        while len(path) < num_steps:
            path.append(self.z_of_d @ d + (self.z_of_z @ path[-1] if path else 0))
        return torch.stack(path)

    @torch.no_grad()
    def picture_by_hand(self, s: Tensor, z: Tensor) -> Tensor:
        """Return the mean frames (T, X)."""
        return torch.stack([self.x_of_s @ s + self.x_of_z @ z_t for z_t in z])


# ---------------------------------------------------------------------------------------------------------------------
# Programs of every form, for the comparison of the ledger with Pyro's own bounds
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Program:
    """A model and guide, what they are called with, the tensors they depend on, and what the ledger should say."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    parameters: list[Tensor]
    sites: tuple[str, ...]
    num_sequences: int
    chains: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    nesting: int = 1
    closed_form: bool = True  # Pyro's TraceMeanField_ELBO knows the closed form of every site
    vectorisable: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)


def _data(seed: int, num_sequences: int, num_steps: int) -> tuple[Tensors, Tensor]:
    tensors = Tensors(seed)
    return tensors, tensors.normal(num_sequences, num_steps, 2)


def factorised(seed: int, num_sequences: int, num_steps: int) -> Program:
    """Static s (event 2) and a scalar site, two observed sites of different families."""
    tensors, x = _data(seed, num_sequences, num_steps)
    label = (tensors.uniform(num_sequences) < 0.5).to(x)
    weight, scale = tensors.normal(2), 0.3 + tensors.uniform(2)

    def model(x, label):
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", normal(weight.new_zeros(2), 1.0))
            r = pyro.sample("r", dist.Gamma(weight.new_tensor(2.0), s[..., 0].exp()))
            pyro.sample("x", normal((s * weight + r.unsqueeze(-1)).unsqueeze(-2), scale, 2), obs=x)
            pyro.sample("label", dist.Bernoulli(logits=s[..., 1], validate_args=False), obs=label)

    def guide(x, label):
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", normal(x.mean(1) * weight, scale))
            pyro.sample("r", dist.Gamma(weight.new_tensor(3.0), (label + 1) * s[..., 1].exp()))

    return Program(model, guide, (x, label), [weight, scale], ("s", "r", "x", "label"), num_sequences)


def chain(seed: int, num_sequences: int, num_steps: int) -> Program:
    """A chain without padding."""
    system = StateSpace(seed)
    x = Tensors(seed + 1).normal(num_sequences, num_steps, 2)
    return Program(
        system.model, system.guide, (x,), system.parameters(), ("z", "x"), num_sequences, ("z",), closed_form=False
    )


def ragged_chain(seed: int, num_sequences: int, num_steps: int) -> Program:
    """A chain with padding."""
    program = chain(seed, num_sequences, num_steps)
    mask = mask_of([1 + (seed + 3 * i) % num_steps for i in range(num_sequences)], 1)
    x = Tensors(seed + 1).normal(*mask.shape, 2)
    program.args = (torch.where(mask.unsqueeze(-1), x, float("nan")), mask)
    return program


def recurrent_chain(seed: int, num_sequences: int, num_steps: int) -> Program:
    """Chains beside a recurrent network that model and guide share, with padding; the frames read its states."""
    program, system = ragged_chain(seed, num_sequences, num_steps), VRNN(seed)
    program.model, program.guide, program.parameters = system.model, system.guide, system.parameters()
    return program


def factorised_chain(seed: int, num_sequences: int, num_steps: int) -> Program:
    """Independent steps, which are a trajectory without memory, in model and guide."""
    tensors, x = _data(seed, num_sequences, num_steps)
    weight, scale = tensors.normal(2), 0.3 + tensors.uniform(2)

    def model(x):
        with pyro.plate("sequences", num_sequences):
            z = pyro.sample("z", IndependentSteps(normal(weight.new_zeros(num_steps, 2), 1.0)))
            pyro.sample("x", normal(z * weight, scale, 2), obs=x)

    def guide(x):
        with pyro.plate("sequences", num_sequences):
            pyro.sample("z", IndependentSteps(normal(x * weight, scale)))

    return Program(model, guide, (x,), [weight, scale], ("z", "x"), num_sequences, ("z",))


def _simple(seed: int, num_sequences: int, num_steps: int) -> tuple[Program, Callable, Callable]:
    """One latent s and one observed x, without plates: what the programs below wrap."""
    tensors, x = _data(seed, num_sequences, num_steps)
    weight, scale = tensors.normal(2), 0.3 + tensors.uniform(2)

    def generative(x):
        s = pyro.sample("s", normal(weight.new_zeros(2), 1.0))
        pyro.sample("x", normal((s * weight).unsqueeze(-2), scale, 2), obs=x)

    def inference(x):
        pyro.sample("s", normal(x.mean(1) * weight, scale))

    empty = Program(generative, inference, (x,), [weight, scale], ("s", "x"), num_sequences)
    return empty, generative, inference


def subsampled(seed: int, num_sequences: int, num_steps: int) -> Program:
    """A plate of 3 times as many sequences, of which the batch is a part: every term counts 3 times."""
    program, generative, inference = _simple(seed, num_sequences, num_steps)

    def in_plate(inner):
        def run(x):
            with pyro.plate("sequences", 3 * num_sequences, subsample_size=num_sequences):
                inner(x)

        return run

    program.model, program.guide = in_plate(generative), in_plate(inference)
    return program


def masked(seed: int, num_sequences: int, num_steps: int) -> Program:
    """`poutine.mask` drops sequences in both; x is masked once more by its own distribution."""
    program, _, inference = _simple(seed, num_sequences, num_steps)
    weight, scale = program.parameters
    keep = Tensors(seed + 1).uniform(num_sequences) < 0.6
    seen = Tensors(seed + 2).uniform(num_sequences) < 0.6

    def model(x):
        with pyro.plate("sequences", num_sequences), poutine.mask(mask=keep):
            s = pyro.sample("s", normal(weight.new_zeros(2), 1.0))
            pyro.sample("x", normal((s * weight).unsqueeze(-2), scale, 2).mask(seen), obs=x)

    def guide(x):
        with pyro.plate("sequences", num_sequences), poutine.mask(mask=keep):
            inference(x)

    program.model, program.guide = model, guide
    return program


def masked_distributions(seed: int, num_sequences: int, num_steps: int) -> Program:
    """`.mask` on the distributions of a latent chain, alike in model and guide."""
    program = chain(seed, num_sequences, num_steps)
    keep = Tensors(seed + 1).uniform(num_sequences) < 0.6

    class MaskZ(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] == "z":
                msg["fn"] = msg["fn"].mask(keep)

    program.model, program.guide = MaskZ()(program.model), MaskZ()(program.guide)
    return program


def scaled(seed: int, num_sequences: int, num_steps: int) -> Program:
    """`poutine.scale` on both, by a number, and by one for each sequence on the chain."""
    program = ragged_chain(seed, num_sequences, num_steps)
    factor = 0.3 + Tensors(seed + 1).uniform(num_sequences)
    model, guide = (poutine.scale(fn, scale=factor) for fn in (program.model, program.guide))
    program.model, program.guide = poutine.scale(model, scale=0.3), poutine.scale(guide, scale=0.3)
    return program


def nested_plates(seed: int, num_sequences: int, num_steps: int) -> Program:
    """Sequences on the left, steps on the right, a latent in each; steps are plates, not events."""
    tensors, x = _data(seed, num_sequences, num_steps)
    weight, scale = tensors.normal(2), 0.3 + tensors.uniform(2)

    def model(x):
        with pyro.plate("sequences", num_sequences, dim=-2):
            s = pyro.sample("s", dist.Normal(weight.new_zeros(()), 1.0))
            with pyro.plate("steps", num_steps, dim=-1):
                z = pyro.sample("z", normal(weight.new_zeros(2), 1.0))
                pyro.sample("x", normal(z * weight + s.unsqueeze(-1), scale), obs=x)

    def guide(x):
        with pyro.plate("sequences", num_sequences, dim=-2):
            pyro.sample("s", dist.Normal((x @ weight).mean(1, keepdim=True), scale[0]))
            with pyro.plate("steps", num_steps, dim=-1):
                pyro.sample("z", normal(x * weight, scale))

    return Program(model, guide, (x,), [weight, scale], ("s", "z", "x"), num_sequences, nesting=2)


def with_global_site(seed: int, num_sequences: int, num_steps: int) -> Program:
    """A latent outside the sequences' plate, which all of them share."""
    tensors, x = _data(seed, num_sequences, num_steps)
    weight, scale = tensors.normal(2), 0.3 + tensors.uniform(2)

    def model(x):
        g = pyro.sample("g", normal(weight.new_zeros(2), 1.0))
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", normal(weight.new_zeros(2), 1.0))
            pyro.sample("x", normal((s * weight + g).unsqueeze(-2), scale, 2), obs=x)

    def guide(x):
        pyro.sample("g", normal(weight, scale))
        with pyro.plate("sequences", num_sequences):
            pyro.sample("s", normal(x.mean(1) * weight, scale))

    return Program(model, guide, (x,), [weight, scale], ("g", "s", "x"), num_sequences, outside=("g",))


def with_factors(seed: int, num_sequences: int, num_steps: int) -> Program:
    """`pyro.factor` inside and outside the plate, and `pyro.deterministic`, which is no factor of the joint."""
    tensors, x = _data(seed, num_sequences, num_steps)
    weight, scale = tensors.normal(2), 0.3 + tensors.uniform(2)

    def model(x):
        pyro.factor("penalty", -weight.square().sum())
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", normal(weight.new_zeros(2), 1.0))
            picture = pyro.deterministic("picture", s * weight, event_dim=1)
            pyro.factor("bonus", s.sum(-1))
            pyro.sample("x", normal(picture.unsqueeze(-2), scale, 2), obs=x)

    def guide(x):
        with pyro.plate("sequences", num_sequences):
            pyro.sample("s", normal(x.mean(1) * weight, scale))

    sites, outside = ("s", "x", "penalty", "bonus"), ("penalty",)
    return Program(model, guide, (x,), [weight, scale], sites, num_sequences, outside=outside)


def no_plate(seed: int, num_sequences: int, num_steps: int) -> Program:
    """One sequence (or one data set): nothing is in a plate."""
    program, generative, inference = _simple(seed, 1, num_steps)
    weight, scale = program.parameters

    def guide(x):
        pyro.sample("s", normal(x.mean((0, 1)) * weight, scale))

    program.guide, program.nesting = guide, 0
    program.args = (program.args[0][0],)
    program.outside = ("s", "x")
    return program


PROGRAMS: list[Callable[[int, int, int], Program]] = [
    factorised, chain, ragged_chain, recurrent_chain, factorised_chain, subsampled, masked, masked_distributions,
    scaled, nested_plates, with_global_site, with_factors, no_plate,
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What one of several processes does (a test starts it by name, so it cannot live in the test's own file)
# ---------------------------------------------------------------------------------------------------------------------


def ledger_with(log_likelihood: Tensor) -> ELBOTerms:
    """Return a ledger of one observed site."""
    term = Term("x", "log_likelihood", log_likelihood, None, None, None, "density", in_plate=True, is_scaled=False)
    return ELBOTerms({"x": term}, len(log_likelihood), None)


def check_finite_on_rank(rank: int, folder: str) -> None:
    """Join a group of two, check ledgers that are broken on one rank or on none, and write down what was raised."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    try:
        said = []
        for broken_rank in (0, 1, None):
            terms = ledger_with(torch.tensor([0.0, float("nan") if rank == broken_rank else 1.0]))
            try:
                terms.check_finite(7)
                said.append("finite")
            except FloatingPointError as error:
                said.append(str(error))
        with open(f"{folder}/rank-{rank}", "w") as file:
            file.write("\n".join(said))
    finally:
        torch.distributed.destroy_process_group()
