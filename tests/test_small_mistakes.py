"""Small things that users get wrong, or right and were refused for, that belong to no one block."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from seqdisent import (
    ConvEncoder,
    GatedTransition,
    MarkovChain,
    MixtureOfExperts,
    RecurrentChain,
    StaticEncoder,
    overwrite_padding,
)
from seqdisent._checks import check_positive


def start(*batch_shape):
    return dist.Normal(torch.zeros(*batch_shape, 2), 1.0).to_event(1)


# Masks ---------------------------------------------------------------------------------------------------------------

TAKES_A_MASK = {
    "block": lambda mask: StaticEncoder(3, 2)(torch.zeros(2, 4, 3), mask),
    "chain": lambda mask: MarkovChain(start(2), GatedTransition(2, 3), 4, mask=mask),
    "overwrite_padding": lambda mask: overwrite_padding(torch.zeros(2, 4, 3), mask),
}


@pytest.mark.parametrize("use", TAKES_A_MASK.values(), ids=TAKES_A_MASK)
@pytest.mark.parametrize(
    "mask", [[4, 2], np.ones((2, 4), dtype=bool), torch.tensor([4, 2])], ids=["list", "NumPy", "lengths"]
)
def test_what_is_no_mask_is_refused_with_the_way_to_one(use, mask):
    with pytest.raises(TypeError, match=r"^mask: .*torch\.arange\(T\) < lengths\[:, None\]"):
        use(mask)


def test_the_way_from_lengths_to_a_mask_that_the_message_names():
    lengths = torch.tensor([4, 2])
    assert (torch.arange(4) < lengths[:, None]).tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize(
    ("mask", "values", "event_dims"),
    [
        ((2, 6), (2, 6, 3, 16, 16), 1),
        ((2, 6), (2, 6, 3), 0),
        ((2, 6), (2, 6, 3), 2),
        ((2, 6), (2, 5, 3), 1),
        ((2, 6), (1, 6, 3), 1),  # the values would be broadcast
        ((2, 6), (6, 3), 1),
        ((2, 6), (6,), 3),
        ((6, 2), (2, 6), 0),
    ],
)
def test_a_mask_that_does_not_fit_the_values_is_named(mask, values, event_dims):
    with pytest.raises(ValueError, match=rf"^mask: .*event_dims={event_dims}"):
        overwrite_padding(torch.ones(values), torch.zeros(mask, dtype=torch.bool), event_dims=event_dims)


@pytest.mark.parametrize("mask", [(2, 6), (1, 6), (6,), (2, 1)])
def test_a_mask_that_fits_may_have_fewer_dimensions_than_the_values(mask):
    for shape, event_dims in (((4, 2, 6, 3), 1), ((2, 6), 0), ((2, 6, 3, 8, 8), 3)):
        blank = overwrite_padding(torch.ones(shape), torch.zeros(mask, dtype=torch.bool), event_dims=event_dims)
        assert blank.shape == shape
        assert not blank.any()


# Batches of nothing --------------------------------------------------------------------------------------------------


def test_a_chain_of_no_sequence_is_refused():
    with pytest.raises(ValueError, match="^initial: "):
        MarkovChain(start(3, 0), GatedTransition(2, 3), 4)
    with pytest.raises(ValueError, match="^initial: "):
        RecurrentChain(start(0), lambda z, h: start(0), 4, recurrence=nn.GRU(2, 3))


# NumPy's numbers -----------------------------------------------------------------------------------------------------


def test_numpys_integers_are_sizes():
    lengths = np.array([6, 4])
    chain = MarkovChain(start(2), GatedTransition(np.int64(2), np.int32(3), context_dim=np.int64(0)), lengths.max())
    assert chain.rsample().shape == (2, 6, 2)
    assert type(chain.num_steps) is int
    assert chain.extend(chain.rsample(), np.int64(2)).shape == (2, 8, 2)
    encoder = ConvEncoder(np.int64(4), in_channels=np.int64(1), image_size=np.int64(16), channels=np.array([3, 4]))
    assert encoder(torch.zeros(2, 1, 16, 16)).shape == (2, 4)
    assert MixtureOfExperts(lambda: nn.Linear(3, 2), np.int64(4))(torch.ones(1, 3), torch.ones(1, 4)).shape == (1, 2)


@pytest.mark.parametrize(
    "size", [0, -1, True, 2.0, np.float64(2), np.int64(0), np.bool_(True), float("nan"), "2", None]
)
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="^num_steps: "):
        check_positive(num_steps=size)


def test_numpys_integers_count_clips():
    datasets = pytest.importorskip("seqdisent.datasets")
    clips = datasets.pendulum(np.int64(14), seed=0, num_steps=np.int64(5), image_size=np.int64(16))
    generator = torch.Generator().manual_seed(0)
    assert clips.draw_clips(np.int64(3), generator, num_steps=np.int64(4)).frames.shape[:2] == (3, 4)
    assert len(clips.split(np.int64(2), 0, by="sequence")[1]) == 2
    assert torch.equal(clips.true_swap(np.int64(1), np.int64(2)), clips.true_swap(1, 2))


# The examples' main process ------------------------------------------------------------------------------------------

RANKS = {  # who starts the processes, and what it tells them
    "nobody": ({}, True),
    "torchrun, node 1": ({"RANK": "4", "LOCAL_RANK": "0", "GROUP_RANK": "1", "WORLD_SIZE": "8"}, False),
    "torchrun, first": ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "8"}, True),
    "SLURM": ({"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0", "SLURM_NTASKS": "4"}, False),
    "Lightning, second process": ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
    "Lightning, node 1": ({"NODE_RANK": "1"}, False),
}
LAUNCHERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "SLURM", "JSM")


@pytest.mark.slow
def test_one_process_alone_writes_the_run_folder():
    pytest.importorskip("lightning")
    alone = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    path = os.pathsep.join(sys.path)
    program = "from seqdisent.training import is_main_process; print(is_main_process())"
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**alone, **told, "PYTHONPATH": path},
        )
        for name, (told, _) in RANKS.items()
    }
    said = {name: process.communicate(timeout=300)[0].strip() for name, process in started.items()}
    assert said == {name: str(is_main) for name, (_, is_main) in RANKS.items()}
