"""Long runs: what a process holds does not grow with the steps (docs/reliability.md has 10,000 of them)."""

import gc

import pytest
import torch

pytest.importorskip("lightning")

from flat_memory import NUM_STEPS, WAYS, StateSpaceVAE, counts, draw, measure  # noqa: E402

from seqdisent import elbo_terms  # noqa: E402


@pytest.mark.parametrize("way", WAYS)
def test_no_object_and_no_tensor_is_left_of_a_step(way):
    before = counts()["in a graph"]  # other tests'
    found = measure(way, 60, seed=0, parts=3)
    warm, *later = found
    assert [row["step"] for row in found] == [20, 40, 60]
    for row in later:  # one tensor a step would be 20 more
        assert row["tensors"] - warm["tensors"] <= 2
        assert row["in a graph"] - before <= 1
        assert row["objects"] - warm["objects"] < 60


def test_a_ledger_that_is_kept_shows_in_the_counts():
    """What the test above would see if something held on to the terms of a step, and to their graph."""
    network, generator = StateSpaceVAE(), torch.Generator().manual_seed(0)
    before, kept = counts(), []
    for _ in range(5):
        kept.append(elbo_terms(network.model, network.guide, *draw(generator)))
    after = counts()
    assert after["tensors"] - before["tensors"] >= 5 * NUM_STEPS
    assert after["in a graph"] - before["in a graph"] >= 5


def test_a_ledger_goes_without_the_garbage_collector():
    """Nothing refers to itself in a circle: memory is free as soon as the terms are, not at some later collection."""
    network, generator = StateSpaceVAE(), torch.Generator().manual_seed(0)
    batch = draw(generator)
    elbo_terms(network.model, network.guide, *batch).elbo().sum().backward()
    gc.collect()
    gc.disable()
    try:
        before = {id(tensor) for tensor in in_a_graph()}  # other tests'
        elbo_terms(network.model, network.guide, *batch).elbo().sum().backward()
        held = [tensor for tensor in in_a_graph() if id(tensor) not in before]
    finally:
        gc.enable()
    assert held == []


def in_a_graph():
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.grad_fn is not None]
