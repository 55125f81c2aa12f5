"""Probes find what is there, and chance where nothing is."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from strategies import Tensors, seeds

from seqdisent.metrics import probe, probe_table


def data(seed, count=120, noise=0.1):
    """Latents of which the first two dimensions hold the label, in very different units; labels of three classes."""
    tensors = Tensors(seed)
    labels = torch.randint(3, (count,), generator=tensors.generator)
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    latents = torch.cat([centres[labels] + noise * tensors.normal(count, 2), tensors.normal(count, 2)], 1)
    return latents * torch.tensor([1e-4, 1e4, 1.0, 1.0], dtype=torch.float64), labels


@given(seed=seeds())
@settings(max_examples=10)  # each fits three probes
def test_a_linear_probe_finds_a_code_in_any_units_and_classes_by_any_names(seed):
    latents, labels = data(seed)
    scores = probe(latents[:80], labels[:80], latents[80:], labels[80:])
    assert scores.accuracy > 0.95
    assert scores.converged
    assert scores.chance == pytest.approx(float(labels[80:].bincount().max()) / 40)
    names = torch.tensor([7, -2, 40])
    assert probe(latents[:80], names[labels[:80]], latents[80:], names[labels[80:]]) == scores
    shifted = 5 - 3 * latents
    assert probe(shifted[:80], labels[:80], shifted[80:], labels[80:]).accuracy == pytest.approx(
        scores.accuracy, abs=0.03
    )


def test_only_a_network_finds_what_is_not_linear():
    latents = Tensors(0).normal(600, 2)
    labels = (latents[:, 0] * latents[:, 1] > 0).long()
    halves = latents[:400], labels[:400], latents[400:], labels[400:]
    network = probe(*halves, kind="mlp")
    assert network.accuracy > 0.9
    assert probe(*halves).accuracy < 0.65
    assert probe(*halves, kind="mlp") == network


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_constant_latent_gives_chance_on_an_unbalanced_factor(kind):
    labels = torch.tensor([0] * 8 + [1, 2])
    scores = probe(torch.ones(10, 3), labels, torch.ones(10, 3), labels, kind=kind)
    assert scores.accuracy == scores.chance == 0.8


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_fit_that_was_cut_short_says_so_without_a_warning(kind):
    latents, labels = data(0, noise=2.0)
    assert not probe(latents, labels, latents, labels, kind=kind, max_iterations=1).converged


def test_the_random_state_stays_as_it_was():
    latents, labels = data(0)
    before = torch.random.get_rng_state()
    probe(latents, labels, latents, labels, kind="mlp", max_iterations=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def flattened(latents, labels, mask):
    """Return the latents and labels of all steps that count, one by one, as scikit-learn takes them."""
    places = [(row, step) for row in range(mask.shape[0]) for step in range(mask.shape[1]) if mask[row, step]]
    return [latents[place].tolist() for place in places], [int(labels[place]) for place in places]


def of_steps(seed, count=30, num_steps=6):
    """Return trajectories that hold the label of each step, these labels, and a mask of any lengths."""
    latents, labels = data(seed, count * num_steps, noise=0.5)
    mask = torch.arange(num_steps) < torch.randint(1, num_steps + 1, (count, 1), generator=Tensors(seed).generator)
    return latents.reshape(count, num_steps, 4), labels.reshape(count, num_steps), mask


@given(seed=seeds(), masked=st.booleans(), kind=st.sampled_from(["linear", "mlp"]))
@settings(max_examples=6)  # each fits two probes
def test_a_probe_of_steps_is_scikit_learns_of_the_steps_that_count(seed, masked, kind):
    train = of_steps(seed)
    test = [of[:10, :4] for of in of_steps(seed + 1)]  # other lengths
    masks = {"train_mask": train[2], "test_mask": test[2]}
    if not masked:
        train, test = ((latents, labels, torch.ones_like(mask)) for latents, labels, mask in (train, test))
        masks = {}
    scores = probe(*train[:2], *test[:2], **masks, kind=kind, max_iterations=50)
    (x, y), (x_test, y_test) = flattened(*train), flattened(*test)
    scaler = StandardScaler().fit(x)
    classifier = MLPClassifier((128,), random_state=0) if kind == "mlp" else LogisticRegression()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.set_params(max_iter=50).fit(scaler.transform(x), y)
    correct = [a == b for a, b in zip(classifier.predict(scaler.transform(x_test)), y_test, strict=True)]
    assert scores.accuracy == pytest.approx(sum(correct) / len(correct))
    assert scores.chance == pytest.approx(max(map(y_test.count, y_test)) / len(y_test))


def test_what_stands_where_nothing_counts_changes_no_score():
    latents, labels, mask = of_steps(0)
    masks = {"train_mask": mask, "test_mask": mask}
    wanted = probe(latents, labels, latents, labels, **masks)
    latents, labels = latents.masked_fill(~mask.unsqueeze(-1), torch.nan), labels.masked_fill(~mask, 99)
    assert probe(latents, labels, latents, labels, **masks) == wanted
    masks = {name: value.tolist() for name, value in masks.items()}
    assert probe(latents.tolist(), labels.tolist(), latents.numpy(), labels.numpy(), **masks) == wanted
    with pytest.raises(ValueError, match="^test_latents: not all"):
        probe(latents, labels, latents, labels, train_mask=mask)


def test_a_table_of_steps_says_which_latent_tells_the_step_and_which_the_sequence():
    z, word, mask = of_steps(0, 200)
    who = torch.arange(200) % 2
    s = torch.stack([who, 1 - who], 1).double()
    latents = {"s": s.unsqueeze(1).expand(-1, 6, -1), "z": z}
    labels = {"who": who.unsqueeze(1).expand(-1, 6), "word": word}
    first, second = (
        [{name: of[half] for name, of in each.items()} for each in (latents, labels)]
        for half in (slice(100), slice(100, 200))
    )
    masks = {"train_mask": mask[:100], "test_mask": mask[100:]}
    table = probe_table(*first, *second, **masks)
    assert table["z"]["word"] == probe(z[:100], word[:100], z[100:], word[100:], **masks)
    assert table["z"]["word"].accuracy > 0.7
    assert table["s"]["who"].accuracy == 1
    for site, factor in (("s", "word"), ("z", "who")):
        assert table[site][factor].accuracy < table[site][factor].chance + 0.1


@given(order=st.permutations(range(3)))
@settings(max_examples=5)
def test_the_table_holds_the_probe_of_every_pair(order):
    latents, labels = data(1)
    noise = Tensors(2).normal(120, 2).float()
    factors = {"code": labels, "other": labels[torch.randperm(120, generator=torch.Generator().manual_seed(0))]}
    latents_of = {"s": latents, "d": noise}
    first, second = slice(0, 80), slice(80, 120)
    table = probe_table(
        {name: latent[first] for name, latent in latents_of.items()},
        {name: torch.tensor(order)[label[first]] for name, label in factors.items()},
        {name: latent[second] for name, latent in latents_of.items()},
        {name: torch.tensor(order)[label[second]] for name, label in factors.items()},
    )
    assert {name: set(row) for name, row in table.items()} == {"s": set(factors), "d": set(factors)}
    for name, latent in latents_of.items():
        for factor, label in factors.items():
            assert table[name][factor].accuracy == pytest.approx(
                probe(latent[first], label[first], latent[second], label[second]).accuracy, abs=0.05
            )
    assert table["s"]["code"].accuracy > 0.95
    assert table["d"]["code"].accuracy < 0.6


def test_arrays_and_lists_are_taken_as_tensors_are():
    latents, labels = data(0)
    wanted = probe(latents, labels, latents, labels)
    assert probe(latents.numpy(), labels.numpy(), latents.numpy(), labels.numpy()) == wanted
    assert probe(latents, labels.tolist(), latents, labels.tolist()) == wanted
    with pytest.raises(TypeError, match="^train_labels: "):
        probe(latents, ["anna"] * 120, latents, labels)


def test_wrong_arguments_are_named():
    latents, labels = data(0)
    with pytest.raises(ValueError, match="^kind: "):
        probe(latents, labels, latents, labels, kind="forest")
    with pytest.raises(ValueError, match="^train_labels: "):
        probe(latents, torch.zeros_like(labels), latents, labels)
    with pytest.raises(ValueError, match=r"^test_labels: .*\(5,\)"):
        probe(latents, labels, latents, labels[:5])
    with pytest.raises(ValueError, match="^test_latents: "):
        probe(latents, labels, latents[:, :2], labels)
    with pytest.raises(ValueError, match="^train_latents: "):
        probe(latents[:, 0], labels, latents, labels)
    with pytest.raises(ValueError, match="^test_latents: "):
        probe(latents, labels, latents / 0, labels)
    with pytest.raises(ValueError, match="^test_labels: "):
        probe_table({"s": latents}, {"who": labels}, {"s": latents}, {})
