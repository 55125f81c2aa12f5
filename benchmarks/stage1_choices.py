"""Which start and which heads VDSM's first stage learns best with, on real Sprites.

    python benchmarks/stage1_choices.py --steps 800 --seed 0

Every variant trains on the same batches with the same schedules and seed. Then, on characters that training never saw:
the mean squared error of reconstructed frames, and that of swapped frames (pose of one character, static factors of
another) against the true ones. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pyro.distributions as dist
import torch
from torch import nn

from seqdisent import infer, reconstruct, swap
from seqdisent.datasets import sprites
from seqdisent.metrics import squared_error
from seqdisent.training import fit

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import vdsm as example


class AverageOfHeads(nn.Module):
    """q(s) as the released code has it: heads of every frame, LeakyReLU locations, then the average over time."""

    def __init__(self, static):
        super().__init__()
        width = static.head.loc.out_features
        self.embedding = static.embedding
        self.hidden = nn.Linear(static.embedding.out_features, width)
        self.loc, self.scale = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.scale.bias, math.log(math.expm1(0.1)))
        self.calibrate = static.calibrate  # of the same embedding

    def forward(self, features, mask=None):
        hidden = nn.functional.leaky_relu(self.hidden(nn.functional.leaky_relu(self.embedding(features))))
        loc = nn.functional.leaky_relu(self.loc(hidden)).mean(-2)
        scale = nn.functional.softplus(self.scale(hidden)).mean(-2) + 1e-4
        return dist.Normal(loc, scale, validate_args=False).to_event(1)


def as_built(vdsm):
    pass


def not_calibrated(vdsm):
    vdsm.calibrate = lambda frames: None


def independent_experts(vdsm):
    """K independent decoders, scaled so that their uniform average has the size of one."""
    for kernel in vdsm.decoder.kernels:
        fan_in = kernel.shape[1] * (1 if kernel is vdsm.decoder.kernels[0] else 4)
        nn.init.normal_(kernel, std=math.sqrt(2 * len(kernel) / fan_in))


def independent_unscaled_experts(vdsm):
    """K independent decoders of the usual size."""
    independent_experts(vdsm)
    with torch.no_grad():
        for kernel in vdsm.decoder.kernels:
            kernel.div_(math.sqrt(len(kernel)))


def average_of_heads(vdsm):
    vdsm.static = AverageOfHeads(vdsm.static)


VARIANTS = {
    "as built": as_built,
    "no calibration": not_calibrated,
    "independent experts, times sqrt(K)": independent_experts,
    "independent experts": independent_unscaled_experts,
    "q(s): average of LeakyReLU heads": average_of_heads,
}


@torch.no_grad()
def measure(vdsm, clips, seed):
    """Return the errors of reconstructed and of swapped frames, KL(s), KL(z) a frame, and the experts in use."""
    generator = torch.Generator().manual_seed(seed)
    who = torch.arange(clips.num_identities)
    picks = torch.randint(9 * 8, (len(who), 8), generator=generator)  # the same eight frames of a character's 72
    frames = clips.frames.unflatten(0, (len(who), 9)).flatten(1, 2)
    donor = who.roll(1)
    own, true_swaps = frames[who[:, None], picks].float() / 255, frames[donor[:, None], picks].float() / 255
    model, guide = vdsm.pretraining_model, vdsm.pretraining_guide
    latents = infer(guide, own)
    weights = torch.softmax(latents["s"].value / vdsm.sizes.temperature, -1)
    prior = vdsm.static_prior()
    kl = torch.distributions.kl_divergence
    swapped = swap(model, guide, own, own[donor], sites=["s"])["x"].mean
    posterior = latents["z"].distribution
    standard = dist.Normal(torch.zeros_like(posterior.mean), 1.0).to_event(2)
    return {
        "reconstruction": squared_error(reconstruct(model, guide, own)["x"].mean, own).mean().item(),
        "swapped": squared_error(swapped, true_swaps).mean().item(),
        "KL(s)": kl(latents["s"].distribution, prior.expand([len(who)])).mean().item(),
        "KL(z) a frame": kl(posterior, standard).mean().item() / 8,
        "experts in use": torch.exp(-(weights * weights.log()).sum(-1)).mean().item(),
        "largest weight": weights.amax(-1).mean().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="stage1_choices.json")
    arguments = parser.parse_args()
    plan = example.EXAMPLE.preset("cpu", "sprites")
    sizes = replace(plan.sizes, decoder_channels=(128, 64, 32, 16))  # small, so that many variants can be compared
    plan = replace(plan, sizes=sizes, pretraining_steps=arguments.steps, warm_up=50)
    train, held_out = sprites().split(0.1, arguments.seed, by="identity")
    results = {}
    for name, change in VARIANTS.items():
        torch.manual_seed(arguments.seed)
        vdsm = example.VDSM((3, 64, 64), sizes)
        change(vdsm)
        training = example.pretraining(vdsm, plan, train, arguments.seed)
        with tempfile.TemporaryDirectory() as folder:
            fit(training, folder, clip_norm=plan.clip_norm, progress_bar=False, checkpoint_every=arguments.steps)
        results[name] = measure(vdsm.eval(), held_out, arguments.seed)
        print(f"{name:36}", *(f"{key} {value:.4g}" for key, value in results[name].items()), sep="  ", flush=True)
    Path(arguments.out).write_text(json.dumps({"steps": arguments.steps, "seed": arguments.seed, **results}, indent=2))


if __name__ == "__main__":
    main()
