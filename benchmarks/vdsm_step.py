"""A training step of VDSM against the loop over sequences that the released code is, and against its arithmetic.

    python benchmarks/vdsm_step.py --stage 1
    python benchmarks/vdsm_step.py --stage 2
    python benchmarks/vdsm_step.py --stage 2 --train-bank 1      both ways train what the stage leaves as it is

The paper's sizes: 40 experts, 20 sequences, 64 x 64 x 3 pixels, and at stage 2 LSTMs of 3 x 512 on cached features.
Both ways train the same network with the same optimiser on the same frames; the loop has one Pyro site per sequence
(at stage 2 one per sequence and step) and blends by broadcast-and-sum. The floor is what the floating-point operations
of our step would take at the rate of a matrix product of this machine, timed in turns with the steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import pyro
import pyro.distributions as dist
import torch
from measuring import arguments_of, matrix_product, ratio, report, time_in_turns, work_of
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.nn import functional as F

from seqdisent import elbo_terms

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import vdsm as example


class Loop:
    """The programs of VDSM as loops over sequences and steps, on the blocks of a `vdsm`."""

    def __init__(self, vdsm: example.VDSM) -> None:
        self.vdsm = vdsm

    def decode(self, s, z):
        """Decode one sequence: s (K,), z (T, D)."""
        bank, weights = self.vdsm.decoder, torch.softmax(s / self.vdsm.sizes.temperature, -1)
        hidden = torch.cat([s.expand(len(z), -1), z], -1)[..., None, None]
        for i, (kernels, biases) in enumerate(zip(bank.kernels, bank.biases, strict=True)):
            kernel = (weights[:, None, None, None, None] * kernels).sum(0)
            bias = (weights[:, None] * biases).sum(0)
            options = {} if i == 0 else {"stride": 2, "padding": 1}
            hidden = F.conv_transpose2d(F.leaky_relu(hidden) if i else hidden, kernel, bias, **options)
        return hidden

    def pretraining_model(self, frames):
        for b in range(len(frames)):
            s = pyro.sample(f"s_{b}", self.vdsm.static_prior())
            z = pyro.sample(f"z_{b}", self.vdsm.normal(frames.shape[1], self.vdsm.sizes.pose_dim))
            pixels = dist.Bernoulli(logits=self.decode(s, z), validate_args=False).to_event(4)
            pyro.sample(f"x_{b}", pixels, obs=frames[b])

    def pretraining_guide(self, frames):
        for b in range(len(frames)):
            features = self.vdsm.encoder(frames[b])
            pyro.sample(f"s_{b}", self.vdsm.static(features))
            pose = self.vdsm.pose(features).to_event(1)
            pyro.sample(f"z_{b}", pose)

    def model(self, frames, features):
        for b in range(len(frames)):
            s = pyro.sample(f"s_{b}", self.vdsm.static_prior())
            d = pyro.sample(f"d_{b}", self.vdsm.normal(self.vdsm.sizes.dynamics_dim))
            poses = [pyro.sample(f"z_{b}_0", self.vdsm.normal(self.vdsm.sizes.pose_dim))]
            for t in range(1, frames.shape[1]):
                poses.append(pyro.sample(f"z_{b}_{t}", self.vdsm.transition(poses[-1], d)))
            logits = self.decode(s, torch.stack(poses))
            for t in range(frames.shape[1]):
                pixels = dist.Bernoulli(logits=logits[t], validate_args=False).to_event(3)
                pyro.sample(f"x_{b}_{t}", pixels, obs=frames[b, t])

    def guide(self, frames, features):
        for b in range(len(frames)):
            pyro.sample(f"s_{b}", self.vdsm.static(features[b]))
            embeddings = self.vdsm.pose.loc(features[b])
            d = pyro.sample(f"d_{b}", self.vdsm.dynamics(embeddings))
            unrolled = self.vdsm.dynamics.unroll(d, frames.shape[1])
            z = self.vdsm.initial_pose
            for t in range(frames.shape[1]):
                z = pyro.sample(f"z_{b}_{t}", self.vdsm.combiner(z, torch.cat([unrolled[t], d])))


WANTED = {(1, 8): 9, (1, 16): 6, (2, 8): 20}  # times faster than the loop, by stage and frames a sequence


def compare(vdsm, stage, frames, repeats) -> dict[str, float]:
    """Time a training step of both ways and a matrix product, in turns."""
    loop = Loop(vdsm)
    if stage == 1:
        inputs = their_inputs = (frames,)
        model, guide = vdsm.pretraining_model, vdsm.pretraining_guide
        their_model, their_guide = loop.pretraining_model, loop.pretraining_guide
    else:
        features = vdsm.encoder(frames).detach()
        inputs, their_inputs = (frames, None, features), (frames, features)
        model, guide, their_model, their_guide = vdsm.model, vdsm.guide, loop.model, loop.guide
    check_same_densities((guide, model), inputs, (their_guide, their_model), their_inputs)
    optimiser = torch.optim.Adam([p for p in vdsm.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def ours():
        optimiser.zero_grad()
        terms = elbo_terms(model, guide, *inputs)
        terms.check_finite()
        (-terms.elbo().sum()).backward()
        optimiser.step()

    def theirs():
        optimiser.zero_grad()
        TraceMeanField_ELBO().differentiable_loss(their_model, their_guide, *their_inputs).backward()
        optimiser.step()

    product = matrix_product()
    seconds = time_in_turns({"ours": ours, "loop": theirs, "product": product}, repeats)
    row = {
        "stage": stage,
        "frames a sequence": frames.shape[1],
        "our step, s": median(seconds["ours"]),
        "loop, s": median(seconds["loop"]),
        "times faster": ratio(seconds, "loop", "ours"),
        "wanted, times": WANTED.get((stage, frames.shape[1]), ""),
    }
    operations = work_of(ours).operations  # without those of fused LSTMs
    return row | {
        "GFLOP": operations / 1e9,
        "GFLOP/s of a product": product.operations / median(seconds["product"]) / 1e9,
        "ours over the floor": ratio(seconds, "ours", "product") * product.operations / operations,
        "wanted": 2.2 if stage == 1 else "",
    }


@torch.no_grad()
def check_same_densities(ours, inputs, theirs, their_inputs) -> None:
    """Both ways are the same model: a sample of the guide has the same densities."""
    trace = poutine.trace(ours[0]).get_trace(*inputs)
    sample = {site: trace.nodes[site]["value"] for site in ("s", "d", "z") if site in trace}
    separate = {f"{site}_{b}": row for site, value in sample.items() for b, row in enumerate(value)}
    separate |= {f"z_{b}_{t}": z for b, path in enumerate(sample["z"]) for t, z in enumerate(path)}
    for our_program, their_program in zip(ours, theirs, strict=True):
        our_density = poutine.trace(poutine.condition(our_program, sample)).get_trace(*inputs).log_prob_sum()
        their_trace = poutine.trace(poutine.condition(their_program, separate)).get_trace(*their_inputs)
        torch.testing.assert_close(their_trace.log_prob_sum(), our_density, rtol=1e-4, atol=1e-2)


def main() -> None:
    arguments = arguments_of(__doc__, stage=1, batch=20, experts=40, repeats=5, train_bank=0)
    vdsm = example.VDSM((3, 64, 64), example.Sizes(arguments.experts))
    if arguments.stage == 2:  # as in training: encoder and bank stay as they are
        vdsm.encoder.requires_grad_(False)
        vdsm.decoder.requires_grad_(bool(arguments.train_bank))
    lengths = {1: (8, 16), 2: (8,)}[arguments.stage]
    clips = [torch.rand(arguments.batch, num_steps, 3, 64, 64) for num_steps in lengths]
    rows = [compare(vdsm, arguments.stage, frames, arguments.repeats) for frames in clips]
    report(f"vdsm_step, stage {arguments.stage}", arguments, rows)


if __name__ == "__main__":
    main()
