"""`evaluate` of measurements: holes, covariates, ragged lengths; numbers against exact ones and against loops."""

import copy
import json
import math

import numpy as np
import pyro
import pytest
import torch
from models import StateSpace, normal
from torch import nn

for needed in ("torchmetrics", "sklearn", "matplotlib"):
    pytest.importorskip(needed)

from seqdisent import (  # noqa: E402
    GatedTransition,
    IndependentSteps,
    MarkovChain,
    NormalHead,
    StaticEncoder,
    batch_sizes,
    generate,
    mark_missing,
)
from seqdisent.datasets import Clips, Scaler, Sequences  # noqa: E402
from seqdisent.evaluation import NUMBERS, Evaluation, evaluate  # noqa: E402
from seqdisent.evaluation._judged import latents  # noqa: E402
from seqdisent.evaluation._programs import Programs, mean_frame  # noqa: E402
from seqdisent.evaluation._series import hide_some, hold_back, without_hidden  # noqa: E402
from seqdisent.evaluation._swapped import statistics  # noqa: E402

# A linear-Gaussian state space with its exact posterior


def drawn_from(system, count, num_steps, seed):
    """Sequences from the model itself, ragged, with holes by value, in float64."""
    torch.manual_seed(seed)
    emitted = generate(system.model, num_sequences=count, num_steps=num_steps)["x"]
    values = emitted.sample()
    lengths = torch.randint(num_steps // 2, num_steps + 1, (count,))
    observed = torch.rand(values.shape) < 0.85
    observed[:, 0] = True
    observed[:30, :, 1] = torch.arange(num_steps) == lengths[:30, None] - 1  # of a coordinate, the last step alone
    return Sequences(values, lengths=lengths, observed=observed)


@pytest.fixture(scope="module")
def exact():
    system = StateSpace(5)
    train, held_out = drawn_from(system, 100, 12, seed=0), drawn_from(system, 120, 12, seed=1)
    how = {"forecast_steps": 3, "season": 2, "seed": 3}
    return system, train, held_out, how, evaluate(system.model, system.exact_guide, train, held_out, **how)


def test_the_bound_of_the_exact_posterior_is_the_kalman_evidence_of_each_measured_step(exact):
    system, _, held_out, _, found = exact
    seen = torch.where(held_out.observed, held_out.values, math.nan)
    evidence = system.log_evidence(seen, held_out.mask).sum()
    steps = sum(bool(row[t].any()) for row in held_out.observed for t in range(len(row)))
    assert steps < held_out.lengths.sum()  # some have nothing measured
    assert found.numbers["bound_per_step"] == pytest.approx(float(evidence / steps), rel=1e-9)


def test_errors_count_what_was_measured_alone(exact):
    system, train, held_out, _, found = exact
    total, counts = torch.zeros(2).double(), torch.zeros(2)
    for row, seen in zip(train.values, train.observed, strict=True):
        total += (row * seen).sum(0)
        counts += seen.sum(0)
    mean = total / counts
    wanted = []
    for row, seen in zip(held_out.values, held_out.observed, strict=True):
        errors = [(row[t, i] - mean[i]) ** 2 for t in range(len(row)) for i in range(2) if seen[t, i]]
        wanted.append(sum(errors) / len(errors))
    errors = found.numbers["mean_squared_error"]
    assert errors["mean_step"] == pytest.approx(float(sum(wanted) / len(wanted)), rel=1e-6)
    assert errors["reconstruction"] < errors["roll_out"]
    assert errors["reconstruction"] < errors["mean_step"]


@pytest.mark.parametrize("kind", ["imputation", "forecast"])
def test_draws_of_the_exact_posterior_cover_as_they_should(exact, kind):
    scores = exact[-1].numbers[kind]
    count = scores["hidden_values"] if kind == "imputation" else 3 * scores["sequences"]
    model = scores["model"]
    for level in ("50", "90"):
        share = model["expected"][level]
        error = math.sqrt(share * (1 - share) / count)
        assert model["coverage"][level] == pytest.approx(share, abs=3.5 * error)
    others = [of for name, of in scores.items() if isinstance(of, dict) and name != "model"]
    assert len(others) == {"imputation": 2, "forecast": 3}[kind]
    for other in others:
        assert model["crps"] < other["crps"]
        assert model["mean_squared_error"] < other["mean_squared_error"]


def errors_of_lines(held_out, hidden, mean, times):
    """Errors of NumPy's interpolation over the times, one coordinate of one sequence at a time; by coordinate."""
    errors = [[], []]
    for row, seen, unseen, length, at in zip(
        held_out.values.numpy(), held_out.observed.numpy(), hidden.numpy(), held_out.lengths.tolist(), times.numpy(),
        strict=True,
    ):  # fmt: skip
        for i in range(2):
            known = [t for t in range(length) if seen[t, i] and not unseen[t, i]]
            for t in np.flatnonzero(unseen[:, i]):
                guess = np.interp(at[t], at[known], row[known, i]) if known else mean[i]
                errors[i].append(row[t, i] - guess)
    return errors


def test_the_line_is_that_between_the_values_that_were_not_hidden(exact):
    _, train, held_out, how, found = exact
    hidden, mean = hide_some(held_out, 0.15, how["seed"]), mean_frame(train).numpy()
    by_coordinate = errors_of_lines(held_out, hidden, mean, torch.arange(12).expand(120, 12))
    errors = sum(by_coordinate, [])
    scores = found.numbers["imputation"]
    assert scores["hidden_values"] == len(errors)
    assert scores["linear interpolation"]["mean_squared_error"] == pytest.approx(np.mean(np.square(errors)), rel=1e-6)
    assert scores["linear interpolation"]["crps"] == pytest.approx(np.mean(np.abs(errors)), rel=1e-6)
    assert "coverage" not in scores["linear interpolation"]  # it has no draws
    assert scores["linear interpolation"]["coordinates"].keys() == {"0", "1"}
    for of, wanted in zip(scores["linear interpolation"]["coordinates"].values(), by_coordinate, strict=True):
        assert of["mean_squared_error"] == pytest.approx(np.mean(np.square(wanted)), rel=1e-6)
        assert of["crps"] == pytest.approx(np.mean(np.abs(wanted)), rel=1e-6)
        assert "coverage" not in of
    counts = [len(of) for of in by_coordinate]
    model = scores["model"]
    assert counts[0] != counts[1]
    for score in ("mean_squared_error", "crps"):
        parts = [of[score] for of in model["coordinates"].values()]
        assert model[score] == pytest.approx(np.average(parts, weights=counts), rel=1e-9)
    parts = [of["coverage"]["90"] for of in model["coordinates"].values()]
    assert model["coverage"]["90"] == pytest.approx(np.average(parts, weights=counts), rel=1e-9)


def test_the_line_is_straight_over_the_times_where_the_data_have_them(exact):
    system, train, held_out, how, _ = exact
    times = (0.1 + 9 * torch.rand(120, 12, generator=torch.Generator().manual_seed(0)) ** 3).cumsum(1)
    timed = Sequences(held_out.values, lengths=held_out.lengths, observed=held_out.observed, times=times)
    asked = {"seed": how["seed"], "num_samples": 2, "batch_size": 50, "pictures": False}
    found = evaluate(system.model, system.exact_guide, train, timed, **asked).numbers["imputation"]
    hidden, mean = hide_some(timed, 0.15, how["seed"]), mean_frame(train).numpy()
    errors = sum(errors_of_lines(timed, hidden, mean, times.double()), [])
    assert found["linear interpolation"]["crps"] == pytest.approx(np.mean(np.abs(errors)), rel=1e-6)
    untimed = evaluate(system.model, system.exact_guide, train, held_out, **asked).numbers["imputation"]
    assert found["linear interpolation"]["crps"] != pytest.approx(untimed["linear interpolation"]["crps"], rel=1e-2)
    assert found["model"] == untimed["model"]  # which does not read them


def test_the_frozen_step_is_the_last_one_before_the_forecast(exact):
    _, train, held_out, _, found = exact
    mean, errors, count = mean_frame(train), [], 0
    for row, seen, length in zip(held_out.values, held_out.observed, held_out.lengths.tolist(), strict=True):
        start = length - 3
        if start <= 2 or not (seen[:start].any() and seen[start:length].any()):
            continue
        count += 1
        for i in range(2):
            known = [t for t in range(start) if seen[t, i]]
            guess = row[known[-1], i] if known else mean[i]
            errors += [float(row[t, i] - guess) ** 2 for t in range(start, length) if seen[t, i]]
    scores = found.numbers["forecast"]
    assert scores["sequences"] == count
    assert scores["last step, frozen"]["mean_squared_error"] == pytest.approx(np.mean(errors), rel=1e-6)
    assert scores["seasonal naive"]["coverage"].keys() == {"50", "90"}  # it has draws


def test_numbers_follow_from_the_seed_and_the_random_state_stays(exact):
    system, train, held_out, how, found = exact
    state = torch.get_rng_state()
    few = train.subset(range(20)), held_out.subset(range(20))
    one, two = (
        evaluate(system.model, system.exact_guide, *few, **how, batch_size=size, num_samples=5).numbers
        for size in (64, 7)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for kind in ("imputation", "forecast"):  # guesses without draws do not depend on the batch
        for name in {"linear interpolation", "mean step", "last step, frozen"} & one[kind].keys():
            for score in ("mean_squared_error", "crps"):
                assert one[kind][name][score] == pytest.approx(two[kind][name][score], rel=1e-6)
    again = evaluate(system.model, system.exact_guide, *few, **how, batch_size=7, num_samples=5, pictures=False)
    assert again.numbers == two
    assert again.intervals == {}
    assert found.numbers.keys() <= NUMBERS


def test_the_report_shows_imputation_and_forecast(exact, tmp_path):
    found = exact[-1]
    written = found.save(tmp_path)
    assert {path.name for path in written} == {
        "metrics.json", "report.md", "report.html", "imputation.png", "forecast.png"
    }  # fmt: skip
    numbers = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert numbers == found.numbers
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    scores = found.numbers["imputation"]
    assert f"## Imputation of {scores['hidden_values']} hidden values" in text
    assert f"| linear interpolation | {scores['linear interpolation']['mean_squared_error']:.5f} |" in text
    assert "Errors on 120 held-out sequences" in text
    assert "bound, for each measured step" in page
    assert "<img src='imputation.png'" in page


# Names and units


def test_errors_scores_and_pictures_are_in_the_units_before_the_scaler(exact):
    system, train, held_out, how, _ = exact
    few = train.subset(range(30)), held_out.subset(range(40))
    scaler = Scaler(torch.tensor([5.0, -1.0]).double(), torch.tensor([10.0, 0.1]).double())
    asked = {**how, "num_samples": 10, "batch_size": 15}
    given = evaluate(system.model, system.exact_guide, *few, **asked)
    undone = evaluate(system.model, system.exact_guide, *few, **asked, scaler=scaler)
    assert given.numbers["units"] == {"errors": "data set", "nats": "data set"}
    assert undone.numbers["units"] == {"errors": "before scaling", "nats": "scaled"}
    for same in ("nats", "bound_per_step"):
        assert undone.numbers[same] == given.numbers[same]
    for kind, names in (
        ("imputation", {"model", "linear interpolation", "mean step"}),
        ("forecast", {"model", "last step, frozen", "seasonal naive", "mean step"}),
    ):
        assert names <= undone.numbers[kind].keys()
        for name in names:
            for i, scale in enumerate((10.0, 0.1)):
                one, two = (found.numbers[kind][name]["coordinates"][str(i)] for found in (given, undone))
                assert two["mean_squared_error"] == pytest.approx(scale**2 * one["mean_squared_error"], rel=1e-6)
                assert two["crps"] == pytest.approx(scale * one["crps"], rel=1e-6)
                assert two.get("coverage") == one.get("coverage")
    widths = [found.numbers["forecast"]["model"]["coordinates"]["0"]["width"]["90"] for found in (given, undone)]
    assert widths[1] == pytest.approx(10 * widths[0], rel=1e-6)
    wide = Scaler(torch.zeros(2).double(), torch.full((2,), 7.0).double())
    scaled = evaluate(system.model, system.exact_guide, *few, seed=3, hidden=0.0, scaler=wide).numbers
    for name, error in scaled["mean_squared_error"].items():
        assert error == pytest.approx(49 * given.numbers["mean_squared_error"][name], rel=1e-6)
    for name in ("imputation.png", "forecast.png"):
        for shown in ("values", "draws"):
            wanted = scaler.undo(given.intervals[name][shown])
            torch.testing.assert_close(undone.intervals[name][shown], wanted, equal_nan=True)
    assert "in units before scaling" not in given.tables()
    assert undone.tables().count(", in units before scaling\n") == 4


def test_the_report_calls_coordinates_by_their_names(exact, tmp_path):
    system, train, held_out, how, _ = exact
    few = held_out.subset(range(40, 60))
    observed = few.observed.clone()
    later = torch.arange(12) >= (few.lengths - 3)[:, None]
    observed[..., 1] &= ~later  # nothing of it is scored in the forecast
    named = Sequences(few.values, lengths=few.lengths, observed=observed, columns=["pulse|min", "<heat>"])
    asked = {**how, "season": None, "num_samples": 5}
    found = evaluate(system.model, system.exact_guide, train, named, **asked, folder=tmp_path)
    scores = {kind: found.numbers[kind]["model"]["coordinates"] for kind in ("imputation", "forecast")}
    assert scores["imputation"].keys() == {"pulse|min", "<heat>"}
    assert scores["forecast"].keys() == {"pulse|min"}
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "## The model's scores of each coordinate" in text
    of = scores["imputation"]["<heat>"]
    shown = [f"{of['mean_squared_error']:.4g}", f"{of['crps']:.4g}", f"{100 * of['coverage']['90']:.2f}"]
    assert f"| <heat> | {' | '.join(shown)} |  |  |  |" in text
    assert "| pulse\\|min | " in text
    assert "<td>pulse|min</td>" in page
    assert "<td>&lt;heat&gt;</td>" in page
    for panels in found.intervals.values():
        assert panels["columns"] == ["pulse|min", "<heat>"]


@pytest.mark.parametrize(("count", "has_table"), [(50, True), (51, False)])
def test_very_many_coordinates_are_in_the_numbers_alone(exact, count, has_table):
    numbers = copy.deepcopy(exact[-1].numbers)
    for kind in ("imputation", "forecast"):
        model = numbers[kind]["model"]
        model["coordinates"] = {str(i): model["coordinates"]["0"] for i in range(count)}
    assert ("of each coordinate" in Evaluation(numbers).tables()) == has_table


def test_a_single_coordinate_has_the_scores_of_all():
    program = Driven().eval()
    data = Sequences(torch.rand(6, 5, 1), covariates=torch.rand(6, 5, 1), columns=["level"])
    found = evaluate(program.model, program.guide, data, data, forecast_steps=2, num_samples=2)
    assert "coordinates" not in found.numbers["forecast"]["model"]
    assert found.intervals["forecast.png"]["columns"] == ["level"]


# What is hidden and held back


def test_nothing_of_what_is_hidden_reaches_the_programs():
    values = torch.arange(1.0, 41).reshape(2, 10, 2)
    data = Sequences(values, lengths=torch.tensor([10, 4]))
    hidden = hide_some(data, 0.5, 0)
    assert hidden.shape == (2, 10)  # by step, as there are no holes by value
    assert 3 <= int(hidden[0].sum()) <= 7
    assert not hidden[1, 4:].any()
    batch = without_hidden(data.batch([0, 1]), hidden)
    assert torch.equal(batch.observed, data.mask & ~hidden)
    assert (batch.frames[~batch.observed] == 0).all()
    assert torch.equal(batch.frames[batch.observed], values[batch.observed])


def test_something_is_left_of_every_sequence():
    observed = torch.zeros(200, 3, dtype=torch.bool)
    observed[:, 1] = True  # a single value each
    observed[:50] = True
    data = Sequences(torch.ones(200, 3, 1), observed=observed)
    for seed in range(5):
        hidden = hide_some(data, 0.5, seed)
        assert not hidden[50:].any()
        assert (observed & ~hidden).any(1).all()


def test_sequences_without_a_before_or_an_after_are_left_out():
    observed = torch.ones(5, 8, dtype=torch.bool)
    observed[1, :5] = False  # nothing before the last three
    observed[2, 5:] = False  # nothing of them
    data = Sequences(torch.rand(5, 8, 1), lengths=torch.tensor([8, 8, 8, 3, 5]), observed=observed)
    whole, before, after = hold_back(data, 3, None)
    assert whole.names == ["0", "4"]
    assert before.lengths.tolist() == [5, 2]
    assert after.lengths.tolist() == [3, 3]
    assert hold_back(data, 3, 2)[0].names == ["0"]  # the other has no more than a season


class Driven(nn.Module):
    """A level that moves by exactly what its covariate says."""

    def model(self, x=None, mask=None, observed=None, covariates=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            start = normal(torch.zeros(num_sequences, 1), 1.0)
            move = lambda level, moved: normal(level + moved, 1e-4)  # noqa: E731
            z = pyro.sample("z", MarkovChain(start, move, num_steps, inputs=covariates, mask=mask))
            pyro.sample("x", IndependentSteps(normal(z, 1e-4), mask, observed), obs=x)

    def guide(self, x, mask=None, observed=None, covariates=None):
        """Reads the first step, and then what it was moved by."""
        moved = covariates[..., 0].clone()
        moved[:, 0] = 0
        with pyro.plate("sequences", len(x)):
            path = x[:, :1, 0] + moved.cumsum(1)
            pyro.sample("z", IndependentSteps(normal(path.unsqueeze(-1), 1e-4), mask))


@pytest.mark.parametrize("known_future", [0, 4])
def test_forecasts_read_the_covariates_of_the_steps_to_come(known_future):
    generator = torch.Generator().manual_seed(0)
    covariates = torch.randn(12, 9 + known_future, 1, generator=generator)
    values = torch.randn(12, 1, 1, generator=generator) + torch.cat(
        [torch.zeros(12, 1, 1), covariates[:, 1:9].cumsum(1)], 1
    )
    data = Sequences(values, lengths=torch.arange(12) % 4 + 6, covariates=covariates)
    program = Driven().eval()
    found = evaluate(program.model, program.guide, data, data, forecast_steps=3, batch_size=5, hidden=0.0).numbers
    assert found["forecast"]["model"]["mean_squared_error"] < 1e-6
    assert found["forecast"]["last step, frozen"]["mean_squared_error"] > 0.1
    assert found["mean_squared_error"]["roll_out"] < 1e-6  # it reads them too
    assert "imputation" not in found
    filled = evaluate(program.model, program.guide, data, data, hidden=0.0).numbers
    assert "forecast" not in filled


# Labels


class Level(nn.Module):
    """A sequence is its level, which says who, and a swing around it, which says what."""

    def model(self, x=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", normal(torch.zeros(1), 1.0))
            z = pyro.sample(
                "z", MarkovChain(normal(torch.zeros(num_sequences, 1), 1.0), self.stay, num_steps, mask=mask)
            )
            pyro.sample("x", IndependentSteps(normal(s.unsqueeze(-2) + z, 0.1), mask), obs=x)

    def stay(self, z_prev):
        return normal(z_prev, 1.0)

    def guide(self, x, mask=None):
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        level = (x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        with pyro.plate("sequences", len(x)):
            pyro.sample("s", normal(level, 1e-3))
            pyro.sample("z", IndependentSteps(normal(x - level.unsqueeze(1), 1e-3), mask))


def levels_and_swings(count, seed):
    generator = torch.Generator().manual_seed(seed)
    who, what = torch.arange(count) % 3, torch.arange(count) // 3 % 2
    noise = 0.1 * torch.randn(count, 8, 1, generator=generator)
    swing = (-1.0) ** torch.arange(8) * (0.3 + what[:, None])
    values = 3.0 * who[:, None, None] + swing.unsqueeze(-1) + noise
    return Sequences(
        values, lengths=8 - 2 * (torch.arange(count) // 6 % 2), identity=who, labels={"who": who, "what": what},
        static_factors=["who"], motion_factors=["what"],
    )  # fmt: skip


def test_swaps_show_the_labels_of_the_donor_and_probes_find_them():
    program, train, held_out = Level().eval(), levels_and_swings(60, 0), levels_and_swings(36, 1)
    found = evaluate(program.model, program.guide, train, held_out, static=["s"], motion=["z"])
    swapped = found.numbers["swapped_labels"]
    assert swapped["known"] == {
        "who": {"real": 1, "reconstruction": 1}, "what": {"real": 1, "reconstruction": 1}
    }  # fmt: skip
    assert swapped["identity"] == {"who": {"donor": 1, "source": 0}, "what": {"donor": 0, "source": 1}}
    assert swapped["motion"] == {"who": {"donor": 0, "source": 1}, "what": {"donor": 1, "source": 0}}
    assert found.numbers["probes"]["linear"]["s"]["who"]["accuracy"] == 1
    assert found.numbers["probes"]["linear"]["z"]["who"]["accuracy"] < 0.7  # its mean is 0
    assert "| who | 100.00 | 0.00 |" in found.tables()
    assert found.judge is None
    one = evaluate(program.model, program.guide, train, held_out, static=["s"], motion=["z"], factors=["what"]).numbers
    assert one["swapped_labels"]["known"].keys() == one["probes"]["linear"]["s"].keys() == {"what"}
    bare = evaluate(program.model, program.guide, train, held_out, static=["s"], motion=["z"], judge=None).numbers
    assert bare.keys() & {"probes", "swapped_labels"} == set()


class Forgetful(Level):
    """Steps without memory."""

    def model(self, x=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            z = pyro.sample("z", IndependentSteps(normal(torch.zeros(num_sequences, num_steps, 1), 1.0), mask))
            pyro.sample("x", IndependentSteps(normal(z, 0.1), mask), obs=x)

    def guide(self, x, mask=None):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", IndependentSteps(normal(x, 1e-3), mask))


def test_a_forecast_of_a_model_without_one_is_refused():
    program, data = Forgetful().eval(), levels_and_swings(12, 0)
    assert "forecast" not in evaluate(program.model, program.guide, data, data).numbers
    with pytest.raises(ValueError, match="forecast_steps: got 2, expected 0 or None for a model that carries nothing"):
        evaluate(program.model, program.guide, data, data, forecast_steps=2)


def test_labels_that_are_numbered_otherwise_are_refused():
    program, data = Level().eval(), levels_and_swings(12, 0)
    named = [
        Sequences(data.values, labels={"who": data.labels["who"]}, factor_names={"who": names})
        for names in (["ann", "bob", "cleo"], ["bob", "cleo", "ann"])
    ]
    with pytest.raises(ValueError, match="held_out: factor 'who' has other values than that of train"):
        evaluate(program.model, program.guide, *named, static=["s"])


class Copied(Level):
    """Its trajectory is the sequence itself, and padding 100."""

    def guide(self, x, mask=None):
        with pyro.plate("sequences", len(x)):
            pyro.sample("s", normal(torch.zeros(len(x), 1), 1.0))
            path = x if mask is None else torch.where(mask.unsqueeze(-1), x, 100.0)
            pyro.sample("z", IndependentSteps(normal(path, 1e-3)))


def test_a_trajectory_of_measurements_is_probed_by_its_mean():
    program, data = Copied().eval(), levels_and_swings(12, 0)
    programs = Programs(program.model, program.guide, (), ("z",), None, False, False, {}).looked_at(data)
    found = latents(programs, data, ["z"], 5, None)["z"]
    wanted = [row[:length].mean(0) for row, length in zip(data.values, data.lengths.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted))


def test_statistics_are_those_of_what_was_measured():
    values = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.arange(6) < torch.tensor([6, 4, 5])[:, None]
    observed = torch.rand(3, 6, 2, generator=torch.Generator().manual_seed(1)) < 0.7
    observed[2, :, 1] = False
    found = statistics(torch.where(mask.unsqueeze(-1) & observed, values, math.nan), mask, observed)
    for b in range(3):
        for i in range(2):
            known = [values[b, t, i] for t in range(6) if mask[b, t] and observed[b, t, i]]
            mean = sum(known) / max(1, len(known))
            deviation = math.sqrt(sum((x - mean) ** 2 for x in known) / max(1, len(known)))
            assert float(found[b, i]) == pytest.approx(float(mean))
            assert float(found[b, 2 + i]) == pytest.approx(deviation)


# Real data


class Speaker(nn.Module):
    """A small static and sequential model that reads what was observed."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(13, 16)
        self.static, self.head = StaticEncoder(16, 4), NormalHead(16, 3)
        self.transition, self.emit = GatedTransition(3, 8), nn.Linear(7, 12)

    def model(self, x=None, mask=None, observed=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", normal(torch.zeros(4), 1.0))
            start = normal(torch.zeros(num_sequences, 3), 1.0)
            z = pyro.sample("z", MarkovChain(start, self.transition, num_steps, mask=mask))
            loc = self.emit(torch.cat([s.unsqueeze(-2).expand(*z.shape[:-1], 4), z], -1))
            pyro.sample("x", IndependentSteps(normal(loc, 0.5), mask, observed), obs=x)

    def guide(self, x, mask=None, observed=None):
        observed = torch.ones(x.shape[:2], dtype=torch.bool) if observed is None else observed
        features = self.read(mark_missing(x, observed, mask)).tanh()
        with pyro.plate("sequences", len(x)):
            pyro.sample("s", self.static(features, mask, observed))
            pyro.sample("z", IndependentSteps(self.head(features), mask))


@pytest.fixture(scope="module")
def vowels(data_root):
    path = data_root / "japanese_vowels" / "japanese_vowels.npz"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    archive = np.load(path)
    parts = []
    for part, count in (("train", 90), ("test", 60)):
        ends = archive[f"{part}_length"].astype(np.int64).cumsum()
        rows = np.linspace(0, len(ends) - 1, count).astype(int)
        arrays = [archive[part][end - n : end] for end, n in zip(ends, archive[f"{part}_length"], strict=True)]
        speakers = archive[f"{part}_speaker"].astype(np.int64)[rows]
        speakers = speakers - archive["train_speaker"].min()
        parts.append(
            Sequences.from_arrays(
                [arrays[row] for row in rows], identity=speakers, labels={"speaker": speakers},
                static_factors=["speaker"],
            )
        )  # fmt: skip
    scaler = Scaler.fit(parts[0])
    return [part.scaled(scaler) for part in parts]


def test_japanese_vowels_with_a_tiny_model(vowels, tmp_path):
    train, held_out = vowels
    torch.manual_seed(0)
    network = Speaker().eval()
    how = {"static": ["s"], "motion": ["z"], "hidden": 0.15, "forecast_steps": 4, "num_samples": 20}
    found = evaluate(network.model, network.guide, train, held_out, **how, folder=tmp_path)
    numbers = found.numbers
    assert numbers["held_out_sequences"] == 60
    assert numbers["forecast"]["sequences"] == 60
    assert numbers["swapped_labels"]["known"]["speaker"]["real"] > 0.8
    assert numbers["probes"]["linear"].keys() == {"s", "z"}
    share = numbers["imputation"]["hidden_values"] / (12 * int(held_out.lengths.sum()))
    assert share == pytest.approx(0.15, abs=0.03)
    # the bound is that of the ledger's terms, of all sequences over all steps
    terms = numbers["nats"]
    bound = 60 * (terms["log_p(x)"] - terms["KL(s)"] - terms["KL(z)"]) / int(held_out.lengths.sum())
    assert numbers["bound_per_step"] == pytest.approx(bound)
    assert {"imputation.png", "forecast.png"} <= {path.name for path in tmp_path.iterdir()}


# What is wrong


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"hidden": 1.0}, ValueError, "hidden: got 1.0, expected a share"),
        ({"hidden": 1e-9}, ValueError, "hidden: got 1e-09, which hides nothing"),
        ({"season": 0}, ValueError, "season: got 0"),
        ({"season": 2}, ValueError, "season: got 2, expected None with forecast_steps=None, or `forecast_steps` of"),
        ({"season": 2, "forecast_steps": 0}, ValueError, "season: got 2, expected None with forecast_steps=0"),
        ({"num_samples": 1}, ValueError, "num_samples: got 1, expected an integer >= 2"),
        ({"forecast_steps": 40}, ValueError, "forecast_steps: got 40, expected fewer"),
        ({"forecast_steps": 3, "season": 9}, ValueError, "forecast_steps: got 3, .*after a season of 9"),
        (
            {"candidates": Clips(torch.zeros(2, 3, 1).byte())},
            ValueError,
            "candidates: got 2 clips, expected None where `held_out` is no Clips",
        ),
        ({"train": Clips(torch.zeros(2, 3, 1).byte())}, TypeError, "train: got Clips, expected Sequences as held_out"),
        ({"scaler": len}, TypeError, "scaler: got builtin_function_or_method, expected a Scaler, or None"),
        (
            {"scaler": Scaler(torch.zeros(3), torch.ones(3))},
            ValueError,
            r"scaler: is of steps of shape \(3,\), expected \(2,\), as held_out",
        ),
        (
            {name: Sequences(torch.zeros(2, 3, 2), columns=of) for name, of in (("train", "xy"), ("held_out", "yx"))},
            ValueError,
            r"held_out: has columns \('y', 'x'\), expected those of train, \('x', 'y'\)",
        ),
    ],
)
def test_what_is_wrong_is_named(exact, options, error, said):
    system, train, held_out, *_ = exact
    few = {"train": train, "held_out": held_out.subset(range(4)), "hidden": 0.0, **options}
    with pytest.raises(error, match=said):
        evaluate(system.model, system.exact_guide, **few)
