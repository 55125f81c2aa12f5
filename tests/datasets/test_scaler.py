"""Standardised values: the statistics of what was measured, and the way back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from seqdisent.datasets import Clips, Scaler, Sequences

NAN = float("nan")


def made(lengths, by_value, seed, *, size=(2, 3)):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(lengths), max(lengths), *size, generator=generator, dtype=torch.float64) * 3 + 7
    holes = torch.rand(values.shape if by_value else values.shape[:2], generator=generator) < 0.3
    holes[:, 0] = False
    values[holes] = NAN
    return Sequences(values, lengths=torch.tensor(lengths))


ragged = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(ragged, st.booleans(), st.sampled_from([None, [], [0], [1], [0, 1]]), st.integers(0, 99))
def test_statistics_are_those_of_a_loop_over_what_was_measured(lengths, by_value, dims, seed):
    data = made(lengths, by_value, seed)
    pools = {}
    for n, length in enumerate(lengths):
        for t in range(length):
            for i in range(2):
                for j in range(3):
                    at = (n, t) if data.observed is None or data.observed.dim() == 2 else (n, t, i, j)
                    if data.observed is None or data.observed[at]:
                        own = tuple(x if dims is None or dim in dims else 0 for dim, x in enumerate((i, j)))
                        pools.setdefault(own, []).append(float(data.values[n, t, i, j]))
    scaler = Scaler.fit(data, dims=dims)
    assert scaler.loc.numel() == len(pools)
    assert scaler.loc.dim() == 2
    for own, pool in pools.items():
        mean = sum(pool) / len(pool)
        deviation = (sum((x - mean) ** 2 for x in pool) / len(pool)) ** 0.5
        assert float(scaler.loc[own]) == pytest.approx(mean, rel=1e-9)
        assert float(scaler.scale[own]) == pytest.approx(deviation if len(pool) > 1 else 1.0, rel=1e-9)


@given(ragged, st.booleans(), st.integers(0, 99))
def test_undo_undoes_of_draws_too(lengths, by_value, seed):
    data = made(lengths, by_value, seed)
    scaler = Scaler.fit(data)
    scaled = data.scaled(scaler)
    mask = data.mask if data.observed is None else data.observed
    torch.testing.assert_close(scaler.undo(scaled.values)[mask], data.values[mask])
    assert not scaled.values[~mask].any()
    assert (scaled.observed is None) == (data.observed is None)
    draws = torch.randn(4, *scaled.values.shape, dtype=torch.float64)
    units = scaler.undo(draws)
    torch.testing.assert_close(units[2, 0, 0], draws[2, 0, 0] * scaler.scale + scaler.loc)
    torch.testing.assert_close(scaler(units), draws)


def test_a_coordinate_that_never_changes_has_scale_1():
    values = torch.full((3, 1000, 2), 0.1)
    values[..., 1] = 3 * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    scaler = Scaler.fit(Sequences(values))
    assert float(scaler.scale[0]) == 1.0
    assert float(scaler.scale[1]) == pytest.approx(3, rel=0.1)
    assert scaler(values)[..., 0].abs().max() < 1e-6


def test_large_offsets_keep_their_digits():
    values = 1e4 + torch.randn(50, 200, 1, generator=torch.Generator().manual_seed(0))
    found = Scaler.fit(Sequences(values))(values)
    assert float(found.mean()) == pytest.approx(0, abs=1e-3)
    assert float(found.std()) == pytest.approx(1, abs=1e-3)


def test_a_scaler_is_saved_with_the_model_that_has_it():
    scaler = Scaler.fit(made([3, 2], False, 0))
    model = nn.ModuleDict({"scaler": scaler})
    other = nn.ModuleDict({"scaler": Scaler(torch.zeros(2, 3).double(), torch.ones(2, 3).double())})
    other.load_state_dict(model.state_dict())
    values = torch.randn(2, 4, 2, 3)
    assert torch.equal(other["scaler"](values), scaler(values))
    assert scaler(values).dtype == torch.float32  # the values' own dtype
    assert not list(model.parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Scaler([0.0], torch.ones(1)), TypeError, "^loc: got list, expected a tensor of floating point"),
        (lambda: Scaler(torch.ones(1), torch.ones(1).long()), TypeError, "^scale: got torch.int64, expected a tensor"),
        (lambda: Scaler(torch.tensor([NAN]), torch.ones(1)), ValueError, "^loc: got values that are not finite"),
        (lambda: Scaler(torch.ones(2), torch.ones(1)), ValueError, r"^scale: shape is \(1,\), expected that of loc"),
        (lambda: Scaler(torch.ones(1), torch.zeros(1)), ValueError, "^scale: got 0.0, expected positive numbers"),
        (
            lambda: Scaler(torch.ones(3), torch.ones(3))(torch.ones(2, 5, 4)),
            ValueError,
            r"^values: shape is \(2, 5, 4\), expected \(\*B, T, \*E\) with steps E of \(3,\)",
        ),
        (lambda: Scaler(torch.ones(3), torch.ones(3)).undo(torch.ones(3)), ValueError, r"^values: shape is \(3,\)"),
        (
            lambda: Scaler.fit(Clips(torch.zeros(1, 2, 1).byte())),
            TypeError,
            "^sequences: hold torch.uint8, expected fl",
        ),
        (lambda: Scaler.fit(Sequences(torch.zeros(1, 2, 1)), dims=[1]), ValueError, r"^dims: got \[1\], expected some"),
        (
            lambda: Scaler.fit(Sequences(torch.tensor([[[1.0, NAN], [2.0, NAN]]]))),
            ValueError,
            r"^sequences: coordinate \[1\] was never measured",
        ),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
