"""What the ledger costs: a training step through `elbo_terms` against the same loss written by hand, without Pyro.

    python benchmarks/ledger.py

For VDSM's second stage (the paper's sizes: 40 experts, 20 sequences of 8 frames, cached features; and those of the
preset `cpu`) and for the deep Markov model of `dmm_step.py`. For equal seeds both ways draw the same noise, and the
losses are checked to be equal.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from dmm_step import DMM, some_chorales
from measuring import arguments_of, ratio, report, time_in_turns
from torch.nn import functional as F

from seqdisent import elbo_terms, read_backward

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import vdsm as example


def draw(loc, scale):
    return loc + scale * torch.randn_like(loc)


def kl(q_loc, q_scale, p_loc, p_scale):
    difference = ((q_loc - p_loc) / p_scale) ** 2
    return (0.5 * ((q_scale / p_scale) ** 2 + difference - 1) + (p_scale / q_scale).log()).sum(-1)


def head(layers, features):
    return layers.loc(features), F.softplus(layers.scale(features)) + layers.min_scale


def combine(combiner, z, projected):
    return head(combiner.head, 0.5 * (torch.tanh(combiner.previous(z)) + projected))


def gated(transition, u):
    gate, proposal = transition.gate(u), transition.proposal(u)
    loc = gate * proposal + (1 - gate) * transition.linear(u)
    return loc, F.softplus(transition.scale(F.relu(proposal))) + transition.min_scale


def walk(combiner, before, projected, mask=None):
    """Draw z_1 ... z_T; return them, and location and scale of each, all (B, T, D)."""
    z, steps = before, []
    first = None
    for t, context in enumerate(projected.unbind(1)):
        if mask is not None and t > 0:  # a sequence that has ended goes on from its first step
            z = torch.where(mask[:, t - 1, None] & mask[:, t, None], z, first.detach())
        loc, scale = combine(combiner, z, context)
        z = draw(loc, scale)
        first = z if t == 0 else first
        steps.append((z, loc, scale))
    return tuple(torch.stack(parts, 1) for parts in zip(*steps, strict=True))


def dmm_by_hand(network, rolls, mask):
    projected = network.combiner.project(read_backward(network.rnn, rolls, mask))
    z, q_loc, q_scale = walk(network.combiner, network.first("posterior", len(rolls)), projected, mask)
    z = torch.where(mask[..., None], z, 0.0)
    before = torch.cat([network.first("prior", len(rolls))[:, None], z[:, :-1]], 1)
    kl_z = torch.where(mask, kl(q_loc, q_scale, *gated(network.transition, before)), 0.0)
    cross_entropy = F.binary_cross_entropy_with_logits(network.emission(z), rolls, reduction="none").sum(-1)
    return (torch.where(mask, cross_entropy, 0.0) + kl_z).sum()


def vdsm_by_hand(vdsm, frames, features):
    num_sequences, num_steps = frames.shape[:2]
    static = vdsm.static.head
    s_loc, s_scale = head(static, F.leaky_relu(vdsm.static.embedding(features)).mean(1))
    s = draw(s_loc, s_scale)
    embeddings = vdsm.pose.loc(features)
    _, (final, _) = vdsm.dynamics.encoder(embeddings)
    d_loc, d_scale = head(vdsm.dynamics.head, final.transpose(0, 1).flatten(1))
    d = draw(d_loc, d_scale)
    unrolled = vdsm.dynamics.unroll(d, num_steps)
    repeated = d[:, None].expand(-1, num_steps, -1)
    projected = vdsm.combiner.context(torch.cat([unrolled, repeated], -1))
    z, q_loc, q_scale = walk(vdsm.combiner, vdsm.initial_pose.expand(num_sequences, -1), projected)
    p_loc, p_scale = gated(vdsm.transition, torch.cat([z[:, :-1], repeated[:, 1:]], -1))
    kl_z = kl(q_loc[:, 0], q_scale[:, 0], torch.zeros(()), torch.ones(())).sum()
    kl_z = kl_z + kl(q_loc[:, 1:], q_scale[:, 1:], p_loc, p_scale).sum()
    kl_d = kl(d_loc, d_scale, torch.zeros(()), torch.ones(())).sum()
    kl_s = kl(s_loc, s_scale, torch.zeros(()), torch.tensor(vdsm.sizes.num_experts**-0.5)).sum()
    logits = vdsm.decoder(
        torch.cat([s[:, None].expand(-1, num_steps, -1), z], -1), torch.softmax(s / vdsm.sizes.temperature, -1)
    )
    return F.binary_cross_entropy_with_logits(logits, frames, reduction="sum") + kl_z + kl_d + kl_s


def step_of(network, loss, seed):
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step():
        torch.manual_seed(seed)
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()

    return step


def ledger_loss(model, guide, *inputs):
    terms = elbo_terms(model, guide, *inputs)
    terms.check_finite()
    return -terms.elbo().sum()


PAPER = {"memory_dim": None, "num_components": None}  # the paper's graph


def main() -> None:
    arguments = arguments_of(__doc__, repeats=15)
    models = {}
    for name, sizes in (
        ("VDSM, stage 2, paper's sizes", example.Sizes(40)),
        ("VDSM, stage 2, preset cpu", replace(example.EXAMPLE.preset("cpu", "sprites").sizes, **PAPER)),
    ):
        vdsm = example.VDSM((3, 64, 64), sizes)
        vdsm.encoder.requires_grad_(False)
        vdsm.decoder.requires_grad_(False)
        frames = torch.rand(20, 8, 3, 64, 64)
        features = vdsm.encoder(frames).detach()
        models[name] = (
            vdsm,
            lambda v=vdsm, x=frames, f=features: ledger_loss(v.model, v.guide, x, None, f),
            lambda v=vdsm, x=frames, f=features: vdsm_by_hand(v, x, f),
            1.05,
        )
    dmm, chorales = DMM(), some_chorales(20, 129)
    models["deep Markov model"] = (
        dmm,
        lambda: ledger_loss(dmm.model, dmm.guide, *chorales),
        lambda: dmm_by_hand(dmm, *chorales),
        1.20,
    )
    rows = []
    for name, (network, ledger, by_hand, wanted) in models.items():
        losses = []
        for loss in (ledger, by_hand):
            torch.manual_seed(arguments.seed)
            losses.append(loss())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0.0)
        ways = {
            "ledger": step_of(network, ledger, arguments.seed),
            "by hand": step_of(network, by_hand, arguments.seed),
        }
        seconds = time_in_turns(ways, arguments.repeats)
        rows.append(
            {
                "step": name,
                "ledger, s": median(seconds["ledger"]),
                "by hand, s": median(seconds["by hand"]),
                "times": ratio(seconds, "ledger", "by hand"),
                "wanted": wanted,
            }
        )
    report("ledger", arguments, rows)


if __name__ == "__main__":
    main()
