"""Swap accuracy, leakage and their chance levels; the intervention score."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from seqdisent.metrics import SwapAccuracy, intervention_score

SIZES = {"who": 4, "what": 3}


def draw(seed, count, *, unbalanced=0.0):
    """Labels of sources and donors and predictions; `unbalanced` moves that share of labels to class 0."""
    generator = torch.Generator().manual_seed(seed)

    def labels():
        drawn = {name: torch.randint(size, (count,), generator=generator) for name, size in SIZES.items()}
        zero = torch.rand(count, generator=generator) < unbalanced
        return {name: label.masked_fill(zero, 0) for name, label in drawn.items()}

    return labels(), labels(), labels()


def scores_of(predictions, source, donor, follows=("what",)):
    metric = SwapAccuracy(SIZES, follows)
    metric.update(predictions, source, donor)
    return metric.compute()


def by_hand(predictions, source, donor, name, follows):
    """The scores of one factor, one pair at a time."""
    wanted, unwanted = (donor, source) if follows else (source, donor)
    triples = list(zip(*(labels[name].tolist() for labels in (wanted, unwanted, predictions)), strict=True))
    differing = [(w, u, p) for w, u, p in triples if w != u]
    constants = range(SIZES[name])

    def share(hits, rows):
        return sum(hits) / len(rows) if rows else float("nan")

    return {
        "accuracy": share([p == w for w, _, p in triples], triples),
        "chance": max(share([w == c for w, _, _ in triples], triples) for c in constants),
        "leakage": share([p == u for _, u, p in differing], differing),
        "leakage_chance": max(share([u == c for _, u, _ in differing], differing) for c in constants),
        "agreement": share([w == u for w, u, _ in triples], triples),
        "towards_unwanted": share([p == u for _, u, p in triples], triples),
    }


def assert_same(scores, others):
    for name in SIZES:
        torch.testing.assert_close(
            torch.tensor([float(x) for x in scores[name]]),
            torch.tensor([float(x) for x in others[name]]),
            equal_nan=True,
        )


@given(seed=seeds(), count=st.integers(1, 30), unbalanced=st.sampled_from((0.0, 0.5, 1.0)))
def test_scores_are_those_of_a_loop(seed, count, unbalanced):
    predictions, source, donor = draw(seed, count, unbalanced=unbalanced)
    scores = scores_of(predictions, source, donor)
    for name in SIZES:
        assert scores[name].follows == (name == "what")
        for field, value in by_hand(predictions, source, donor, name, name == "what").items():
            assert float(getattr(scores[name], field)) == pytest.approx(value, nan_ok=True), (name, field)


@given(seed=seeds(), count=st.integers(2, 30))
def test_names_of_the_classes_do_not_matter(seed, count):
    drawn = draw(seed, count)
    generator = torch.Generator().manual_seed(seed)
    names = {name: torch.randperm(size, generator=generator) for name, size in SIZES.items()}
    renamed = [{name: names[name][label] for name, label in labels.items()} for labels in drawn]
    assert_same(scores_of(*drawn), scores_of(*renamed))


@given(seed=seeds(), count=st.integers(2, 30), at=st.integers(1, 29))
def test_batches_processes_and_all_at_once_agree(seed, count, at):
    drawn = draw(seed, count)
    batches = [
        [{name: label[rows] for name, label in labels.items()} for labels in drawn]
        for rows in (slice(0, min(at, count)), slice(min(at, count), count))
    ]
    metric, updated, first, second = (SwapAccuracy(SIZES, ["what"]) for _ in range(4))
    for batch in batches:
        updated.update(*batch)
        metric(*batch)  # forward: also the score of the batch alone
    assert_same(updated.compute(), scores_of(*drawn))
    assert_same(metric.compute(), scores_of(*drawn))
    first.update(*batches[0])
    second.update(*batches[1])
    first.merge_state(second)
    assert_same(first.compute(), scores_of(*drawn))
    for name, size in SIZES.items():
        assert first.confusion()[name].shape == (size, size)
        assert int(first.confusion()[name].sum()) == count
    metric.reset()
    assert int(metric.confusion()["who"].sum()) == 0


@given(seed=seeds(), unbalanced=st.sampled_from((0.0, 0.7)))
def test_perfect_copying_and_inverted_swaps(seed, unbalanced):
    _, source, donor = draw(seed, 200, unbalanced=unbalanced)
    perfect = scores_of({"who": source["who"], "what": donor["what"]}, source, donor)
    copied = scores_of(source, source, donor)
    inverted = scores_of({"who": donor["who"], "what": source["what"]}, source, donor)
    for name in SIZES:
        assert (perfect[name].accuracy, perfect[name].leakage) == (1, 0)
        assert perfect[name].towards_unwanted == perfect[name].agreement
        assert (inverted[name].accuracy, inverted[name].leakage) == (inverted[name].agreement, 1)
    assert (copied["who"].accuracy, copied["who"].leakage) == (1, 0)
    assert (copied["what"].accuracy, copied["what"].leakage) == (copied["what"].agreement, 1)


@given(seed=seeds(), constant=st.integers(0, 2), unbalanced=st.sampled_from((0.0, 0.3, 0.8)))
def test_a_constant_prediction_is_never_above_chance_and_the_best_one_reaches_it(seed, constant, unbalanced):
    _, source, donor = draw(seed, 60, unbalanced=unbalanced)
    wanted = {"who": source["who"], "what": donor["what"]}
    for best in (False, True):
        value = {name: wanted[name].mode().values.item() if best else constant for name in SIZES}
        scores = scores_of({name: torch.full((60,), value[name]) for name in SIZES}, source, donor)
        for name in SIZES:
            assert scores[name].accuracy <= scores[name].chance
            assert scores[name].leakage <= scores[name].leakage_chance
            if best:
                assert scores[name].accuracy == scores[name].chance


def test_chance_is_that_of_the_pairs_on_an_unbalanced_factor():
    labels = {"who": torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 2])}
    metric = SwapAccuracy({"who": 3}, [])
    metric.update(labels, labels, {"who": labels["who"].flip(0)})
    assert float(metric.compute()["who"].chance) == pytest.approx(0.8)
    assert float(metric.compute()["who"].leakage_chance) == pytest.approx(0.5)  # unwanted where they differ: 1 2 0 0


def test_logits_count_as_their_largest():
    predictions, source, donor = draw(0, 20)
    logits = {name: 3.0 * torch.nn.functional.one_hot(predictions[name], size) for name, size in SIZES.items()}
    assert_same(scores_of(logits, source, donor), scores_of(predictions, source, donor))


def test_arrays_and_lists_count_as_tensors():
    drawn = draw(0, 20)
    arrays = [{name: label.numpy() for name, label in labels.items()} for labels in drawn]
    lists = [{name: label.tolist() for name, label in labels.items()} for labels in drawn]
    assert_same(scores_of(*arrays), scores_of(*drawn))
    assert_same(scores_of(*lists), scores_of(*drawn))
    wrong = {**drawn[1], "who": ["anna"] * 20}
    with pytest.raises(TypeError, match=r"^source\['who'\]: "):
        scores_of(drawn[0], wrong, drawn[2])


def test_no_pair_that_differs_leaves_leakage_open():
    labels, _, _ = draw(0, 5)
    scores = scores_of(labels, labels, labels)["what"]
    assert scores.accuracy == 1
    assert scores.agreement == 1
    assert scores.leakage.isnan()
    assert scores.leakage_chance.isnan()


def test_wrong_arguments_are_named():
    predictions, source, donor = draw(0, 5)
    for follows in ("what", ["hair"]):
        with pytest.raises(ValueError, match="^follows: "):
            SwapAccuracy(SIZES, follows)
    with pytest.raises(ValueError, match="^num_classes: "):
        SwapAccuracy({}, [])
    metric = SwapAccuracy(SIZES, [])
    with pytest.raises(ValueError, match="^donor: .*'what'"):
        metric.update(predictions, source, {"who": donor["who"]})
    with pytest.raises(ValueError, match=r"^source\['who'\]: .*5"):
        metric.update(predictions, {**source, "who": source["who"][:4]}, donor)
    with pytest.raises(ValueError, match=r"^source\['who'\]: .*4 to 4"):
        metric.update(predictions, {**source, "who": torch.full((5,), 4)}, donor)
    with pytest.raises(ValueError, match=r"^predictions\['who'\]: .*\(5, 3\)"):
        metric.update({**predictions, "who": torch.zeros(5, 3)}, source, donor)
    with pytest.raises(ValueError, match=r"^predictions\['who'\]: .*\(5,\)"):
        metric.update({**predictions, "who": torch.zeros(5, dtype=torch.bool)}, source, donor)
    with pytest.raises(ValueError, match=r"^predictions\['who'\]: .*NaN"):
        metric.update({**predictions, "who": torch.full((5, 4), float("nan"))}, source, donor)
    assert int(metric.confusion()["who"].sum()) == 0


@given(seed=seeds())
def test_the_intervention_score_is_the_benchmarks_on_balanced_random_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    who, what, donor_who, donor_what = torch.cartesian_prod(*(torch.arange(size) for size in (4, 3, 4, 3))).unbind(
        1
    )  # every pair once: the labels agree by chance exactly
    source, donor = {"who": who, "what": what}, {"who": donor_who, "what": donor_what}
    table = {}
    swaps = []
    for follows in ("who", "what"):
        predictions = {name: torch.randint(size, who.shape, generator=generator) for name, size in SIZES.items()}
        table[follows] = {name: (predictions[name] == source[name]).double().mean() for name in SIZES}
        swaps.append(scores_of(predictions, source, donor, [follows]))
    on = [abs(table[swapped][name] - 1) for swapped in SIZES for name in SIZES if name != swapped]
    off = [abs(table[name][name] - 1 / SIZES[name]) for name in SIZES]
    wanted = 1 - (sum(on) / len(on) + sum(off) / len(off)) / 2
    assert float(intervention_score(swaps)) == pytest.approx(float(wanted), abs=1e-6)


def test_the_intervention_score_needs_factors_of_both_kinds():
    labels, _, _ = draw(0, 5)
    with pytest.raises(ValueError, match="^swaps: "):
        intervention_score([scores_of(labels, labels, labels, [])])


def test_the_result_of_one_swap_alone_goes_into_a_list():
    labels, _, _ = draw(0, 5)
    with pytest.raises(TypeError, match="^swaps: "):
        intervention_score(scores_of(labels, labels, labels))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_predictions_and_labels_may_lie_on_other_devices_than_the_metric():
    labels = torch.tensor([0, 1, 1, 0])
    metric = SwapAccuracy({"who": 2}, follows=["who"])
    metric.update({"who": labels.cuda()}, {"who": labels.flip(0)}, {"who": labels})
    assert float(metric.compute()["who"].accuracy) == 1
