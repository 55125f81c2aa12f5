"""Entropies and inception score of predictions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, seeds

from seqdisent.metrics import GenerationEntropies

SIZES = {"who": 4, "what": 3}


def scores_of(predictions):
    metric = GenerationEntropies({name: SIZES[name] for name in predictions})
    metric.update(predictions)
    return metric.compute()


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


@given(seed=seeds(), count=st.integers(2, 20), at=st.integers(1, 19))
def test_scores_are_those_of_a_loop_in_batches_and_over_processes(seed, count, at):
    tensors = Tensors(seed)
    logits = {name: 3 * tensors.normal(count, size) for name, size in SIZES.items()}
    cut = min(at, count)
    metric, updated, first, second = (GenerationEntropies(SIZES) for _ in range(4))
    for rows, part in ((slice(0, cut), first), (slice(cut, count), second)):
        batch = {name: values[rows] for name, values in logits.items()}
        metric(batch)
        updated.update(batch)
        part.update(batch)
    first.merge_state(second)
    for scores in (scores_of(logits), metric.compute(), updated.compute(), first.compute()):
        for name in SIZES:
            rows = logits[name].softmax(-1).tolist()
            inter = entropy([sum(column) / count for column in zip(*rows, strict=True)])
            intra = sum(entropy(row) for row in rows) / count
            assert float(scores[name].inter) == pytest.approx(inter, abs=1e-9)
            assert float(scores[name].intra) == pytest.approx(intra, abs=1e-9)
            assert float(scores[name].inception_score) == pytest.approx(math.exp(inter - intra))
            assert -1e-9 <= intra <= inter + 1e-9 <= math.log(SIZES[name]) + 2e-9


@given(seed=seeds())
def test_names_of_the_classes_do_not_matter(seed):
    tensors = Tensors(seed)
    logits = tensors.normal(10, 4)
    order = torch.randperm(4, generator=tensors.generator)
    torch.testing.assert_close(scores_of({"who": logits}), scores_of({"who": logits[:, order]}))


@pytest.mark.parametrize("scale", [1e3, 1e30, float("inf")])
def test_ceilings_are_reached_with_one_clip_of_each_class_and_no_doubt_at_any_scale(scale):
    logits = torch.where(torch.eye(4).bool(), 0.0, -scale)
    scores = scores_of({"who": logits})["who"]
    assert float(scores.inter) == pytest.approx(math.log(4))
    assert float(scores.intra) == 0
    assert float(scores.inception_score) == pytest.approx(4)


def test_one_class_alone_and_a_judge_in_doubt_both_score_one():
    collapsed = scores_of({"who": 1e3 * torch.eye(4)[[2, 2, 2]]})["who"]
    doubtful = scores_of({"who": torch.zeros(5, 4)})["who"]
    assert float(collapsed.inter) == pytest.approx(0, abs=1e-12)
    assert float(doubtful.inter) == float(doubtful.intra) == pytest.approx(math.log(4))
    assert float(collapsed.inception_score) == float(doubtful.inception_score) == pytest.approx(1)


def test_wrong_arguments_are_named():
    metric = GenerationEntropies(SIZES)
    good = {name: torch.zeros(5, size) for name, size in SIZES.items()}
    with pytest.raises(ValueError, match="^predictions: .*'what'"):
        metric.update({"who": good["who"]})
    with pytest.raises(ValueError, match=r"^predictions\['what'\]: .*4"):
        metric.update({**good, "what": good["what"][:4]})
    for wrong in (torch.zeros(5, dtype=torch.long), torch.zeros(5, 2), torch.full((5, 3), float("nan"))):
        with pytest.raises(ValueError, match=r"^predictions\['what'\]: "):
            metric.update({**good, "what": wrong})
    assert int(metric.count) == 0


@pytest.mark.parametrize("sure", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_are_refused_and_their_logarithms_are_not(sure, dtype):
    probabilities = torch.eye(4, dtype=dtype) if sure else Tensors(0).simplex(4, 4).to(dtype)
    with pytest.raises(ValueError, match=r"^predictions\['who'\]: .*probabilities"):
        scores_of({"who": probabilities})
    score = scores_of({"who": probabilities.log()})["who"].inception_score
    assert not sure or float(score) == pytest.approx(4)
    scores_of({"who": torch.cat([probabilities, torch.zeros(1, 4, dtype=dtype)])})  # one row may look like it
    metric = GenerationEntropies({"who": 4})
    metric.update({"who": probabilities[:0]})
    assert int(metric.count) == 0


def test_logits_in_an_array_or_a_list_are_those_of_a_tensor():
    logits = Tensors(0).normal(5, 4)
    wanted = scores_of({"who": logits})
    assert scores_of({"who": logits.numpy()}) == wanted
    torch.testing.assert_close(scores_of({"who": logits.tolist()}), wanted)
