"""A trained network as a program of torch: exported, compiled, and run by a process that has torch alone."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest
import torch
from contracts import declared
from strategies import Tensors
from torch import nn

from seqdisent import Combiner, GatedTransition, MarkovChain, NormalHead, StaticEncoder

CONTRACTS = declared()
LENGTHS = torch.tensor([[5], [2], [3]])


class Predictor(nn.Module):
    """Encoder, transition and decoder: features, the latent before and a mask in, the mean of the next step out."""

    def __init__(self):
        super().__init__()
        self.encoder, self.posterior = StaticEncoder(6, 2), Combiner(3, 8, context_dim=6)
        self.transition, self.decoder = GatedTransition(3, 8, context_dim=2), NormalHead(3, 6)

    def forward(self, features, z_prev, mask=None):
        context = self.encoder(features, mask).mean
        z = self.posterior(z_prev, features[..., 0, :]).mean
        return self.decoder(self.transition(z, context).mean).mean


def predictor():
    torch.manual_seed(0)
    return Predictor().eval()


def arguments(lengths, num_steps, masked, filler=math.nan):
    tensors = Tensors(1, torch.float32)
    features, z_prev = tensors.normal(len(lengths), num_steps, 6), tensors.normal(len(lengths), 3)
    if not masked:
        return features, z_prev
    mask = torch.arange(num_steps) < lengths
    return torch.where(mask[..., None], features, filler), z_prev, mask


def exported(network, example, strict=False):
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    shapes = ({0: batch, 1: steps}, {0: batch}, {0: batch, 1: steps})[: len(example)]
    return torch.export.export(network, example, dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_an_exported_predictor_is_the_eager_one(masked, strict):
    network = predictor()
    program = exported(network, arguments(LENGTHS, 5, masked), strict).module()
    for lengths, num_steps in ((LENGTHS, 5), (torch.tensor([[7], [1]]), 7), (torch.full((4, 1), 2), 3)):
        given = arguments(lengths, num_steps, masked)
        found = program(*given)
        torch.testing.assert_close(found, network(*given))
        assert found.isfinite().all()  # whatever is in padding
    if masked:
        other = program(*arguments(LENGTHS, 5, masked, 1e6))
        assert torch.equal(other, program(*arguments(LENGTHS, 5, masked)))


def test_masks_are_checked_again_after_an_export():
    network, (features, z_prev, mask) = predictor(), arguments(LENGTHS, 5, masked=True)
    exported(network, (features, z_prev, mask))
    with pytest.raises(ValueError, match="^mask: a row has no real first step"):
        network(features, z_prev, ~mask)


def test_a_mask_breaks_no_compiled_graph():
    network, given = predictor(), arguments(LENGTHS, 5, masked=True)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), network(*given))


RUN_ALONE = """
import sys
import torch

program = torch.export.load(sys.argv[1]).module()
torch.save(program(*torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
assert not {"seqdisent", "pyro"} & set(sys.modules)
"""


def test_a_saved_program_runs_in_a_process_without_this_package(tmp_path):
    network, given = predictor(), arguments(LENGTHS, 5, masked=True)
    paths = [str(tmp_path / name) for name in ("predictor.pt2", "given.pt", "found.pt")]
    torch.export.save(exported(network, given), paths[0])
    torch.save(given, paths[1])
    done = subprocess.run([sys.executable, "-c", RUN_ALONE, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(paths[2], weights_only=True), network(*given))


class Moments(nn.Module):
    """What a block's distribution says, as tensors: an exported program returns no distribution."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        output = self.block(*inputs)
        if isinstance(output, torch.Tensor):
            return (output,)
        if isinstance(output, torch.distributions.Independent):
            return output.mean, output.stddev
        return (output.log_prob(torch.full(output.event_shape, 0.3)),)


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_block_can_be_exported(name):
    tensors = Tensors(0, torch.float32)
    block = Moments(tensors.build(CONTRACTS[name].build)).eval()
    inputs = tuple(tensors.normal(2, *shape).abs() for shape in CONTRACTS[name].inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes", UserWarning)  # torch's recurrent networks
        program = torch.export.export(block, inputs, strict=False).module()
    inputs = tuple(value + 0.5 for value in inputs)  # a constant would be found out
    torch.testing.assert_close(program(*inputs), block(*inputs), rtol=1e-4, atol=1e-5)


def test_a_step_of_a_chain_can_be_exported():
    """Of a causal guide, as it runs online."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.posterior = Combiner(3, 8, context_dim=6)

        def forward(self, frame, z_prev):
            start = self.posterior(torch.zeros_like(z_prev), frame)
            chain = MarkovChain(start, self.posterior, 1)
            conditional, _ = chain.step(z_prev, chain.step()[1], inputs=frame)
            return conditional.mean

    step, tensors = Step().eval(), Tensors(0, torch.float32)
    program = torch.export.export(step, (tensors.normal(2, 6), tensors.normal(2, 3)), strict=False).module()
    given = tensors.normal(2, 6), tensors.normal(2, 3)
    torch.testing.assert_close(program(*given), step(*given))
