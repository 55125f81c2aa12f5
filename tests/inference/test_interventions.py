"""Interventions on a linear model: every mean is known by hand, one sequence and one step at a time."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import WhoWhat, normal, without_padding
from pyro import poutine
from strategies import Tensors, lengths, mask_of, num_steps, padding, seeds
from torch import nn
from torch.testing import assert_close

from seqdisent import IndependentSteps, MarkovChain, elbo_terms, forecast, generate, infer, reconstruct, swap
from seqdisent.chains.factorised import as_chain

exact = functools.partial(assert_close, rtol=1e-9, atol=1e-9)


def clips(seed, row_lengths, extra_steps=0, filling=0.0):
    """Ragged frames (B, T, 4), their mask, and each row without padding."""
    mask = mask_of(row_lengths, extra_steps)
    frames = Tensors(seed).normal(*mask.shape, 4)
    rows = [row[:length] for row, length in zip(frames, row_lengths, strict=True)]
    return torch.where(mask.unsqueeze(-1), frames, filling), mask, rows


def assert_rows(tensor, rows):
    """The real steps of each row are those worked out by hand."""
    assert len(tensor) == len(rows)
    for actual, row in zip(tensor, rows, strict=True):
        exact(actual[: len(row)].detach(), row)


# ---------------------------------------------------------------------------------------------------------------------
# infer, reconstruct
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds(), lengths(), st.integers(0, 1), padding())
def test_inferred_means_are_those_worked_out_by_hand(seed, row_lengths, extra_steps, filling):
    what = WhoWhat(seed)
    frames, mask, rows = clips(seed + 1, row_lengths, extra_steps, filling)
    inferred = infer(what.guide, frames, mask)
    assert list(inferred) == ["s", "d", "z"]
    for i, row in enumerate(rows):
        by_hand = what.by_hand(row)
        for site in ("s", "d"):
            exact(inferred[site].value[i].detach(), by_hand[site])
            exact(inferred[site].distribution.mean[i].detach(), by_hand[site])
        exact(inferred["z"].value[i, : len(row)].detach(), by_hand["z"])
        exact(inferred["z"].distribution.mean_path()[i, : len(row)].detach(), by_hand["z"])


def test_without_a_mask_every_step_is_real():
    what = WhoWhat(0)
    frames, mask, rows = clips(1, [3, 3])
    assert_rows(infer(what.guide, frames)["z"].value, [what.by_hand(row)["z"] for row in rows])
    exact(
        reconstruct(what.model, what.guide, frames)["x"].mean,
        reconstruct(what.model, what.guide, frames, mask)["x"].mean,
    )


def test_sampled_latents_have_the_means_of_the_posterior():
    """4,000 copies of a clip; every mean of a linear guide within 5 of its own standard errors."""
    what = WhoWhat(0)
    frames, _, rows = clips(1, [3])
    inferred = infer(what.guide, frames.expand(4000, -1, -1), sample=True)
    by_hand = what.by_hand(rows[0])
    for site, mean in by_hand.items():
        values = inferred[site].value.detach()
        assert ((values.mean(0) - mean).abs() < 5 * values.std(0) / math.sqrt(4000)).all()
        assert (values.std(0) > 0.1).all()
    # a site's distribution is the one given the sampled values before it
    exact(inferred["d"].value.shape, inferred["d"].distribution.shape())
    assert not torch.allclose(inferred["d"].distribution.mean[0], inferred["d"].distribution.mean[1])


@given(seeds(), lengths(), st.integers(0, 1), padding())
def test_a_reconstruction_is_the_one_worked_out_by_hand(seed, row_lengths, extra_steps, filling):
    what = WhoWhat(seed)
    frames, mask, rows = clips(seed + 1, row_lengths, extra_steps, filling)
    pictures = reconstruct(what.model, what.guide, frames, mask)
    assert list(pictures) == ["x"]
    assert pictures["x"].shape() == frames.shape
    by_hand = [what.by_hand(row) for row in rows]
    assert_rows(pictures["x"].mean, [what.picture_by_hand(known["s"], known["z"]) for known in by_hand])


@given(seeds(), lengths(4, 3))
def test_the_distributions_of_ragged_clips_know_their_padding(seed, row_lengths):
    """The mask reaches the model: scored under its own reconstruction, or a swap, a clip's padding counts 0."""
    what = WhoWhat(seed)
    frames, mask, rows = clips(seed + 1, row_lengths, 1)
    clip = (frames, mask)
    for pictures in (
        reconstruct(what.model, what.guide, *clip),
        swap(what.model, what.guide, clip, clip, sites=["s"]),
        swap(what.model, what.guide, clip, clip, sites=["z"]),
    ):
        scores = pictures["x"].log_prob(frames)
        for score, row in zip(scores, rows, strict=True):
            known = what.by_hand(row)
            exact(score.detach(), normal(what.picture_by_hand(known["s"], known["z"]), 0.3, 2).log_prob(row))


def test_a_sampled_reconstruction_varies_around_the_mean():
    """4,000 copies of a clip, within 5 standard errors."""
    what = WhoWhat(0)
    frames, _, _ = clips(1, [3])
    mean = reconstruct(what.model, what.guide, frames)["x"].mean.detach()
    many = reconstruct(what.model, what.guide, frames.expand(4000, -1, -1), sample=True)["x"].mean.detach()
    assert ((many.mean(0) - mean[0]).abs() < 5 * many.std(0) / math.sqrt(4000)).all()
    assert (many.std(0) > 0.1).all()


def test_every_emission_is_returned_and_factors_and_records_are_not():
    what = WhoWhat(0, second_emission=True)
    frames, mask, rows = clips(1, [3, 2])

    def model(*args, **options):
        what.model(*args, **options)
        pyro.factor("penalty", torch.zeros(()))
        pyro.deterministic("record", torch.zeros(()))

    def guide(*args):
        pyro.deterministic("summary", torch.zeros(()))
        what.guide(*args)

    assert list(infer(guide, frames, mask)) == ["s", "d", "z"]
    pictures = reconstruct(model, guide, frames, mask)
    assert list(pictures) == ["x", "y"]
    for i, row in enumerate(rows):
        exact(pictures["y"].mean[i].detach(), (what.y_of_s @ what.by_hand(row)["s"]).detach())
    swapped = swap(model, guide, (frames, mask), (frames.flip(0), mask.flip(0)), sites=["s"])
    assert list(swapped) == ["x", "y"]
    exact(swapped["y"].mean, pictures["y"].mean.flip(0))
    assert list(forecast(model, guide, frames, mask, num_steps=1)) == ["x", "y"]
    assert list(generate(model, num_sequences=1, num_steps=1)) == ["y"]


# ---------------------------------------------------------------------------------------------------------------------
# swap
# ---------------------------------------------------------------------------------------------------------------------


def expected_swap(what, source, donor, sites, keep):
    """Return s, d and z of one pair of clips by hand."""
    of_source, of_donor = what.by_hand(source), what.by_hand(donor)
    chosen = {site: of_donor[site] for site in sites} | {site: of_source[site] for site in keep}
    inferred = what.by_hand(source, s=chosen.get("s"), d=chosen.get("d"))
    return inferred | chosen


CHOICES = [
    (sites, keep)
    for sites in (["s"], ["d"], ["z"], ["s", "d"], ["s", "z"], ["d", "z"], ["s", "d", "z"])
    for keep in ([], ["s"], ["d"], ["z"], ["d", "z"])
    if not set(sites) & set(keep)
]


@pytest.mark.parametrize(("sites", "keep"), CHOICES, ids=lambda names: "+".join(names) or "none")
@given(seed=seeds(), row_lengths=lengths(4, 3), data=st.data())
def test_a_swap_is_the_one_worked_out_by_hand(sites, keep, seed, row_lengths, data):
    """Donors have lengths of their own; the result has theirs exactly if z follows them."""
    donor_lengths = data.draw(st.lists(num_steps(4), min_size=len(row_lengths), max_size=len(row_lengths)))
    what = WhoWhat(seed)
    source, source_mask, source_rows = clips(seed + 1, row_lengths, filling=float("nan"))
    donor, donor_mask, donor_rows = clips(seed + 2, donor_lengths, filling=float("nan"))
    pictures = swap(what.model, what.guide, (source, source_mask), [donor, donor_mask], sites=sites, keep=keep)
    rows = []
    for source_row, donor_row in zip(source_rows, donor_rows, strict=True):
        known = expected_swap(what, source_row, donor_row, sites, keep)
        rows.append(what.picture_by_hand(known["s"], known["z"]))
    assert [len(row) for row in rows] == (donor_lengths if "z" in sites else row_lengths)
    followed = donor if "z" in sites else source
    assert pictures["x"].shape() == followed.shape
    assert_rows(pictures["x"].mean, rows)


@pytest.mark.parametrize(("sites", "keep"), CHOICES, ids=lambda names: "+".join(names) or "none")
def test_a_swap_with_itself_is_a_reconstruction(sites, keep):
    what = WhoWhat(0)
    frames, mask, _ = clips(1, [4, 2, 3])
    expected = reconstruct(what.model, what.guide, frames, mask)["x"].mean
    for clip in ((frames, mask), [frames, mask]):
        exact(swap(what.model, what.guide, clip, clip, sites=sites, keep=keep)["x"].mean, expected)
    plain = frames[:1]  # a tensor alone: no mask
    exact(
        swap(what.model, what.guide, plain, plain, sites=sites, keep=keep)["x"].mean,
        reconstruct(what.model, what.guide, plain)["x"].mean,
    )


class TwoChains:
    """z and w read the frames, each by itself; x shows both. In the prior, each step is half the one before."""

    @staticmethod
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        start = normal(torch.zeros(num_sequences, 1), 1.0)
        with pyro.plate("sequences", num_sequences):
            z, w = (
                pyro.sample(site, MarkovChain(start, lambda z: normal(z / 2, 1.0), num_steps, mask=mask))
                for site in ("z", "w")
            )
            pyro.sample("x", normal(torch.cat([z, w], -1), 1.0, 2), obs=frames)

    @staticmethod
    def guide(frames, mask=None):
        frames = without_padding(frames, mask)
        with pyro.plate("sequences", len(frames)):
            for i, site in enumerate(("z", "w")):
                read = frames[..., i : i + 1]
                start = normal(read[:, 0], 1.0)
                pyro.sample(
                    site, MarkovChain(start, lambda z, x: normal(x, 1.0), frames.shape[1], inputs=read, mask=mask)
                )


@pytest.mark.parametrize("keep", [(), ("w",)])
def test_the_other_trajectory_is_cut_to_the_donor_s_length_or_continued(keep):
    short, long = torch.randn(1, 2, 2), torch.randn(1, 4, 2)
    cut = swap(TwoChains.model, TwoChains.guide, long, short, sites=["z"], keep=keep)["x"].mean
    exact(cut, torch.stack([short[..., 0], long[:, :2, 1]], -1))
    longer = swap(TwoChains.model, TwoChains.guide, short, long, sites=["z"], keep=keep)["x"].mean
    w = short[0, :, 1].tolist()
    w += [w[-1] / 2, w[-1] / 4]
    exact(longer, torch.stack([long[..., 0], torch.tensor([w])], -1))
    # a ragged source is continued from its own last step
    mask = torch.tensor([[True, False]])
    ragged = swap(TwoChains.model, TwoChains.guide, (short, mask), long, sites=["z"], keep=keep)["x"].mean
    exact(ragged[0, :, 1], short[0, 0, 1] * torch.tensor([1.0, 0.5, 0.25, 0.125]))


def test_a_sampled_swap_varies_around_the_mean():
    """4,000 copies of a pair of clips, within 5 standard errors."""
    what = WhoWhat(0)
    frames, _, _ = clips(1, [3, 3])
    source, donor = (clip.expand(4000, -1, -1) for clip in frames)
    many = swap(what.model, what.guide, source, donor, sites=["d"], keep=["s"], sample=True)["x"].mean.detach()
    mean = swap(what.model, what.guide, frames[:1], frames[1:], sites=["d"], keep=["s"])["x"].mean.detach()
    assert ((many.mean(0) - mean[0]).abs() < 5 * many.std(0) / math.sqrt(4000)).all()
    assert (many.std(0) > 0.1).all()


# ---------------------------------------------------------------------------------------------------------------------
# generate
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds(), st.integers(1, 3), st.integers(1, 12), st.data())
def test_generated_means_at_any_length_and_given_anything(seed, num_sequences, steps, data):
    what, tensors = WhoWhat(seed), Tensors(seed + 1)
    values = {
        "s": tensors.normal(num_sequences, 2),
        "d": tensors.normal(num_sequences, 2),
        "z": tensors.normal(num_sequences, data.draw(st.integers(1, steps), "prefix"), 3),
    }
    given_sites = {site: values[site] for site in data.draw(st.sets(st.sampled_from("sdz")), "given")}
    pictures = generate(
        what.model, num_sequences=num_sequences, num_steps=steps, given=given_sites, sample=False, emissions=["x"]
    )
    assert pictures["x"].shape() == (num_sequences, steps, 4)
    for i in range(num_sequences):
        s = values["s"][i] if "s" in given_sites else torch.zeros(2, dtype=torch.float64)
        d = values["d"][i] if "d" in given_sites else what.prior_d.detach()
        z = what.continued_by_hand(values["z"][i] if "z" in given_sites else torch.zeros(0, 3), d, steps)
        exact(pictures["x"].mean[i].detach(), what.picture_by_hand(s, z))


def test_generated_samples_have_the_prior_s_moments():
    """20,000 clips of two steps; means and variances of the last step within 5 of their standard errors."""
    what = WhoWhat(0)
    pictures = generate(what.model, num_sequences=20_000, num_steps=2)["x"].mean[:, 1].detach()
    with torch.no_grad():
        mean = what.x_of_z @ (what.z_of_z @ what.z_of_d + what.z_of_d) @ what.prior_d
        drive = (what.z_of_z @ what.z_of_d + what.z_of_d) @ (what.z_of_z @ what.z_of_d + what.z_of_d).T
        z = drive + 0.25 * what.z_of_z @ what.z_of_z.T + 0.16 * torch.eye(3)
        covariance = what.x_of_s @ what.x_of_s.T + what.x_of_z @ z @ what.x_of_z.T
    centred = pictures - mean
    assert (centred.mean(0).abs() < 5 * (covariance.diag() / 20_000).sqrt()).all()
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(20_000)).all()


def test_a_given_prefix_stays_and_what_follows_is_drawn():
    prefix = torch.randn(2, 2, 1)
    first, second = (
        generate(TwoChains.model, num_sequences=2, num_steps=5, given={"z": prefix})["x"].mean for _ in range(2)
    )
    for pictures in (first, second):
        exact(pictures[:, :2, :1], prefix)
    assert (first[:, 2:, 0] != second[:, 2:, 0]).all()


def test_which_emissions_are_returned():
    what = WhoWhat(0, second_emission=True)
    sizes = {"num_sequences": 2, "num_steps": 3}
    assert list(generate(what.model, **sizes)) == ["y"]  # the last site
    assert list(generate(what.model, **sizes, emissions=("y", "x"))) == ["y", "x"]
    latents = generate(what.model, **sizes, emissions=["z", "s"], sample=False)
    exact(latents["s"].mean, torch.zeros(2, 2, dtype=torch.float64))
    assert latents["z"].event_shape == (3, 3)


def test_further_inputs_reach_the_programs():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None, offset=0.0):
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", dist.Normal(offset, 1.0))
            pyro.sample("x", normal(s.unsqueeze(-1).expand(-1, num_steps), 1.0), obs=frames)

    def guide(frames, mask=None, *, offset=0.0):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("s", dist.Normal(frames.mean(1) + offset, 1.0))

    frames = torch.zeros(2, 3)
    assert (infer(guide, frames, offset=2.0)["s"].value == 2).all()
    assert (reconstruct(model, guide, frames, offset=2.0)["x"].mean == 2).all()
    assert (swap(model, guide, frames, frames + 1, sites=["s"], offset=2.0)["x"].mean == 3).all()
    assert (generate(model, num_sequences=2, num_steps=3, sample=False, offset=2.0)["x"].mean == 2).all()
    assert (forecast(model, guide, frames, num_steps=1, offset=2.0, sample=False)["x"].mean == 2).all()


# ---------------------------------------------------------------------------------------------------------------------
# forecast
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds(), lengths(4, 3), st.integers(1, 8), padding())
def test_a_forecast_of_means_iterates_the_prior_from_each_row_s_last_frame(seed, row_lengths, more, filling):
    what = WhoWhat(seed)
    frames, mask, rows = clips(seed + 1, row_lengths, filling=filling)
    pictures = forecast(what.model, what.guide, frames, mask, num_steps=more, sample=False)["x"].mean.detach()
    assert pictures.shape == (len(rows), mask.shape[1] + more, 4)
    reconstructed = reconstruct(what.model, what.guide, frames, mask)["x"].mean.detach()
    for i, row in enumerate(rows):
        known = what.by_hand(row)
        z = what.continued_by_hand(known["z"], known["d"], mask.shape[1] + more)
        exact(pictures[i], what.picture_by_hand(known["s"], z))
        exact(pictures[i, : len(row)], reconstructed[i, : len(row)])


@given(seeds(), st.integers(1, 3), st.integers(1, 4))
def test_one_frame_is_enough(seed, num_sequences, more):
    what = WhoWhat(seed)
    frames, _, rows = clips(seed + 1, [1] * num_sequences)
    pictures = forecast(what.model, what.guide, frames, num_steps=more, sample=False)["x"].mean.detach()
    for i, row in enumerate(rows):
        known = what.by_hand(row)
        exact(pictures[i], what.picture_by_hand(known["s"], what.continued_by_hand(known["z"], known["d"], 1 + more)))


def test_a_sampled_forecast_spreads_as_the_prior_does():
    """20,000 forecasts from one path: the first new step within 5 standard errors of its mean and its deviation."""
    frames = torch.ones(20_000, 2, 2)
    pictures = forecast(TwoChains.model, TwoChains.guide, frames, num_steps=1)["x"].mean
    step = pictures[:, 2] - pictures[:, 1] / 2
    assert (step.mean(0).abs() < 5 / math.sqrt(20_000)).all()
    assert ((step.std(0) - 1).abs() < 5 / math.sqrt(2 * 20_000)).all()
    assert ((pictures[:, :2].mean(0) - 1).abs() < 5 / math.sqrt(20_000)).all()  # the posterior of what was seen


def test_a_factorised_prior_continues_with_its_own_steps():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        loc = torch.arange(float(num_steps)).reshape(-1, 1)
        with pyro.plate("sequences", num_sequences):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))  # carries on; z alone would not
            z = pyro.sample("z", IndependentSteps(normal(loc, 1.0)))
            pyro.sample("x", normal(z + level.reshape(-1, 1, 1), 1.0, 2), obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("level", dist.Normal(torch.zeros(len(frames)), 1.0))
            pyro.sample("z", IndependentSteps(normal(frames, 1.0)))

    frames = 10 * torch.ones(2, 2, 1)
    pictures = forecast(model, guide, frames, num_steps=2, sample=False)["x"].mean
    exact(pictures, torch.tensor([10.0, 10.0, 2.0, 3.0]).reshape(1, 4, 1).expand(2, 4, 1))


# ---------------------------------------------------------------------------------------------------------------------
# What they leave alone
# ---------------------------------------------------------------------------------------------------------------------


def everything(what, frames, mask):
    clip = (frames, mask)
    infer(what.guide, *clip)
    return [
        reconstruct(what.model, what.guide, *clip)["x"].mean,
        swap(what.model, what.guide, clip, clip, sites=["d"])["x"].mean,
        generate(what.model, num_sequences=2, num_steps=3)["x"].mean,
        forecast(what.model, what.guide, *clip, num_steps=2)["x"].mean,
    ]


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradient_are_the_caller_s(training):
    what = WhoWhat(0)
    what.watched = nn.Dropout(0.5)  # in no program
    what.train(training)
    frames, mask, _ = clips(1, [3, 2])
    before = {name: parameter.clone() for name, parameter in what.named_parameters()}
    for picture in everything(what, frames, mask):
        assert torch.is_grad_enabled()
        assert picture.requires_grad
        gradients = torch.autograd.grad(picture.sum(), what.parameters(), allow_unused=True)
        assert any(gradient is not None and gradient.any() for gradient in gradients)
    with torch.no_grad():
        for picture in everything(what, frames, mask):
            assert not picture.requires_grad
        assert not torch.is_grad_enabled()
    assert what.training == what.watched.training == training
    for name, parameter in what.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_means_need_no_random_numbers():
    what = WhoWhat(0)
    frames, mask, _ = clips(1, [3, 2])
    clip, state = (frames, mask), torch.get_rng_state()
    infer(what.guide, *clip)
    reconstruct(what.model, what.guide, *clip)
    swap(what.model, what.guide, clip, clip, sites=["d"], keep=["z"])
    generate(what.model, num_sequences=2, num_steps=3, sample=False)
    forecast(what.model, what.guide, *clip, num_steps=2, sample=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_programs_are_those_that_are_trained():
    """The same model and guide go through the ledger, and the ledger's sites are those that can be swapped."""
    what = WhoWhat(0)
    frames, mask, _ = clips(1, [3, 2])
    terms = elbo_terms(what.model, what.guide, frames, mask)
    assert set(terms.kl) == set(infer(what.guide, frames, mask))
    assert set(terms.log_likelihood) == set(reconstruct(what.model, what.guide, frames, mask))


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

WHAT = WhoWhat(0)
CLIP = torch.zeros(2, 3, 4, dtype=torch.float64)
SIZES = {"num_sequences": 2, "num_steps": 3}


@pytest.mark.parametrize(
    ("source", "donor", "options", "error", "message"),
    [
        (CLIP, CLIP[:1], {"sites": ["d"]}, ValueError, "^donor: .*1.*2"),
        (CLIP, CLIP, {"sites": ["q"]}, ValueError, r"^sites: .*\['q'\]"),
        (CLIP, CLIP, {"sites": ["d"], "keep": ["q"]}, ValueError, r"^keep: .*\['q'\]"),
        (CLIP, CLIP, {"sites": "d"}, ValueError, "^sites: .*string"),
        (CLIP, CLIP, {"sites": ["d"], "keep": "z"}, ValueError, "^keep: .*string"),
        (CLIP, CLIP, {"sites": []}, ValueError, "^sites: .*empty"),
        (CLIP, CLIP, {"sites": ["d", "s"], "keep": ["s"]}, ValueError, r"^keep: .*\['s'\]"),
        (CLIP[:, :0], CLIP, {"sites": ["d"]}, ValueError, r"^source: .*\(2, 0, 4\)"),
        (CLIP, CLIP[:, :0], {"sites": ["d"]}, ValueError, r"^donor: .*\(2, 0, 4\)"),
        (None, CLIP, {"sites": ["d"]}, TypeError, "^source: .*NoneType"),
        (CLIP, (), {"sites": ["d"]}, TypeError, "^donor: .*tuple"),
        (CLIP, ("x",), {"sites": ["d"]}, TypeError, "^donor: "),
        ((CLIP, torch.ones(2, 2).bool()), CLIP, {"sites": ["d"]}, ValueError, "^mask: .*T=3"),
        (CLIP, (CLIP, torch.tensor([True, False, True])), {"sites": ["d"]}, ValueError, "^mask: .*hole"),
    ],
)  # fmt: skip
def test_swaps_that_are_refused(source, donor, options, error, message):
    with pytest.raises(error, match=message):
        swap(WHAT.model, WHAT.guide, source, donor, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sequences": 0}, "^num_sequences: "),
        ({"num_steps": 2.5}, "^num_steps: "),
        ({"given": {"q": torch.zeros(2)}}, r"^given: .*\['q'\]"),
        ({"emissions": ["q"]}, r"^emissions: .*\['q'\]"),
        ({"given": {"s": torch.zeros(2)}}, r"^site 's': .*\(2,\)"),
        ({"given": {"s": torch.zeros(3, 2)}}, r"^site 's': .*\(3, 2\)"),
        ({"given": {"s": torch.zeros(2, 5)}}, r"^site 's': .*\(2, 5\)"),
        ({"given": {"z": torch.zeros(2, 4, 3)}}, r"^site 'z': .*\(2, 4, 3\)"),
        ({"given": {"z": torch.zeros(1, 3, 3)}}, r"^site 'z': .*\(1, 3, 3\)"),
        ({"given": {"z": torch.zeros(2, 0, 3)}}, r"^prefix: .*\(2, 0, 3\)"),
        ({"given": {"z": torch.zeros(2, 2, 1)}}, r"^prefix: .*\(2, 2, 1\)"),
    ],
)  # fmt: skip
def test_generations_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(WHAT.model, **{**SIZES, **options})


def test_a_given_value_is_not_broadcast_into_a_larger_event():
    with pytest.raises(ValueError, match="^site 'z': "):
        generate(TwoChains.model, **SIZES, given={"z": torch.zeros(2, 3, 5)})


@pytest.mark.parametrize("call", [reconstruct, functools.partial(forecast, num_steps=1)])
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((), TypeError, "^args: "),
        (([1.0],), TypeError, "^args: "),
        ((torch.zeros(3),), ValueError, r"^args: .*\(3,\)"),
        ((CLIP[:0],), ValueError, r"^args: .*\(0, 3, 4\)"),
        ((CLIP[:, :0],), ValueError, r"^args: .*\(2, 0, 4\)"),
        ((CLIP, torch.ones(2, 3)), TypeError, "^mask: "),
        ((CLIP, torch.tensor([[1, 1, 1], [0, 0, 0]]).bool()), ValueError, "^mask: .*first step"),
        ((CLIP, torch.ones(4, 3).bool()), ValueError, r"^mask: .*\(4, 3\)"),
    ],
)  # fmt: skip
def test_frames_that_are_refused(call, args, error, message):
    with pytest.raises(error, match=message):
        call(WHAT.model, WHAT.guide, *args)


def test_forecasts_that_are_refused():
    with pytest.raises(ValueError, match="^num_steps: "):
        forecast(WHAT.model, WHAT.guide, CLIP, num_steps=0)


def test_a_trajectory_that_is_no_chain_cannot_be_forecast():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            pyro.sample("z", dist.Laplace(torch.zeros(num_steps, 1), 1.0).to_event(2))

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", normal(frames[..., :1], 1.0, 2))

    with pytest.raises(ValueError, match="^site 'z': "):
        forecast(model, guide, CLIP, num_steps=2)


def test_a_site_of_the_guide_that_the_model_lacks_is_named():
    model = poutine.block(WHAT.model, hide=["d"])
    with pytest.raises(ValueError, match=r"^model: .*\['d'\]"):
        reconstruct(model, WHAT.guide, CLIP)


def test_a_site_without_a_mean_is_named():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        flow = [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(1.0, 2.0)]
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", dist.TransformedDistribution(dist.Normal(0.0, 1.0), flow))
            pyro.sample("x", dist.Normal(s, 1.0))

    with pytest.raises(ValueError, match="^sample: site 's'"):
        generate(model, **SIZES, sample=False)
    assert generate(model, **SIZES)["x"].mean.shape == (2,)


def test_a_masked_chain_is_still_a_chain():
    """`.mask(...)` around a chain (sequences that do not count) hides neither its mean nor its continuation."""
    keep = torch.tensor([True, False])

    class MaskZ(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] == "z" and as_chain(msg["fn"]) is not None:
                msg["fn"] = msg["fn"].mask(keep)

    frames, mask, _ = clips(1, [3, 2])
    model, guide = MaskZ()(WHAT.model), MaskZ()(WHAT.guide)
    for plain, masked in zip(
        everything_of_means(WHAT.model, WHAT.guide, frames, mask),
        everything_of_means(model, guide, frames, mask),
        strict=True,
    ):
        exact(plain, masked)


def everything_of_means(model, guide, frames, mask):
    clip = (frames, mask)
    return [
        infer(guide, *clip)["z"].value,
        reconstruct(model, guide, *clip)["x"].mean,
        swap(model, guide, clip, (frames.flip(0), mask.flip(0)), sites=["z"])["x"].mean,
        forecast(model, guide, *clip, num_steps=2, sample=False)["x"].mean,
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is a trajectory
# ---------------------------------------------------------------------------------------------------------------------


class Slots:
    """A matrix of five slots that does not change, beside a chain that adds 1 a step; frames show both."""

    def __init__(self, posterior=lambda frames: normal(frames[..., :1], 1.0, 2)):
        self.posterior = posterior

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        def plus_one(z_prev):
            return normal(z_prev + 1, 1.0)

        with pyro.plate("sequences", num_sequences):
            w = pyro.sample("w", normal(torch.zeros(num_sequences, 5, 2), 1.0, 2))
            z = pyro.sample(
                "z", MarkovChain(normal(torch.zeros(num_sequences, 1), 1.0), plus_one, num_steps, mask=mask)
            )
            pyro.sample("slots", normal(w, 1.0, 2))
            pyro.sample("x", normal(z, 1.0, 2), obs=frames)

    def guide(self, frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("w", normal(7 * torch.ones(len(frames), 5, 2), 1.0, 2))
            pyro.sample("z", self.posterior(frames))


def ramp(*lengths_):
    """Rows that count by tens, and their mask."""
    mask = mask_of(list(lengths_))
    return 10 * torch.arange(1.0, mask.shape[1] + 1).expand(mask.shape).unsqueeze(-1), mask


@pytest.mark.parametrize("steps", [3, 5, 8])
def test_a_matrix_that_is_no_trajectory_stays_as_it_is(steps):
    slots, sevens = Slots(), torch.full((2, 5, 2), 7.0)
    source, donor = ramp(8, 6), ramp(steps, steps - 1)
    exact(swap(slots.model, slots.guide, source, donor, sites=["z"])["slots"].mean, sevens)
    if steps != 5:  # a Normal with as many rows as frames cannot be told from a trajectory
        exact(forecast(slots.model, slots.guide, *donor, num_steps=1, sample=False)["slots"].mean, sevens)
        swapped = swap(slots.model, slots.guide, source, donor, sites=["w"])
        exact(swapped["x"].mean[0], source[0][0])  # which keeps the source's length


@pytest.mark.parametrize("family", [dist.Laplace, dist.Normal])
def test_any_posterior_over_steps_is_a_trajectory(family):
    slots = Slots(lambda frames: IndependentSteps(family(frames[..., :1], 1.0).to_event(1)))
    long, short = ramp(4, 4)[0], ramp(2, 2)[0]
    exact(swap(slots.model, slots.guide, long, short, sites=["w"])["x"].mean, long)
    exact(swap(slots.model, slots.guide, long + 1, short, sites=["z"])["x"].mean, short)
    exact(forecast(slots.model, slots.guide, short, num_steps=2, sample=False)["x"].mean[0, :, 0],
          torch.tensor([10.0, 20.0, 21.0, 22.0]))  # fmt: skip


def test_a_chain_in_another_plate_does_not_take_the_sequences_mask():
    def plus_one(z_prev):
        return normal(z_prev + 1, 1.0)

    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("objects", 3):
            start = normal(torch.zeros(3, 1), 1.0)
            objects = pyro.sample("objects' paths", MarkovChain(start, plus_one, num_steps))
        with pyro.plate("sequences", num_sequences):
            pyro.sample("s", dist.Normal(0.0, 1.0))
            pyro.sample("x", normal(objects.sum(0).expand(num_sequences, -1, -1), 1.0, 2), obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("objects", 3):
            pyro.sample("objects' paths", normal(torch.full((3, frames.shape[1], 1), 7.0), 1.0, 2))
        with pyro.plate("sequences", len(frames)):
            pyro.sample("s", dist.Normal(0.0, 1.0))

    frames, mask = ramp(4, 2)
    pictures = forecast(model, guide, frames, mask, num_steps=1, sample=False)["x"].mean
    exact(pictures, torch.tensor([21.0, 21.0, 21.0, 21.0, 24.0]).reshape(1, 5, 1).expand(2, 5, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Models that are modules; masks by name; mistakes
# ---------------------------------------------------------------------------------------------------------------------


class ReadsHistory(nn.Module):
    def forward(self, frames=None, mask=None, *, num_sequences=None, num_steps=None, history=None):
        shift = 0.0 if history is None else history[0].mean()
        with pyro.plate("sequences", num_sequences):
            z = pyro.sample("z", normal(torch.zeros(num_steps, 1), 1.0, 2))
            pyro.sample("x", normal(z + shift, 1.0, 2), obs=frames)


def copies(frames, mask=None):
    with pyro.plate("sequences", len(frames)):
        pyro.sample("z", normal(frames, 1.0, 2))


@pytest.mark.parametrize(
    "wrap",
    [lambda model: model, lambda model: model.forward, lambda model: poutine.scale(model, scale=1.0),
     lambda model: torch.compile(model, backend="eager"), lambda model: functools.partial(model)],
    ids=["module", "method", "handler", "compiled", "partial"],
)  # fmt: skip
def test_any_model_gets_the_history_when_it_is_asked_for(wrap):
    model, frames = wrap(ReadsHistory()), torch.full((2, 3, 1), 5.0)
    exact(reconstruct(model, copies, frames, history=True)["x"].mean, torch.full((2, 3, 1), 10.0))
    exact(reconstruct(model, copies, frames)["x"].mean, torch.full((2, 3, 1), 5.0))
    with pytest.raises(TypeError, match="history"):
        reconstruct(WHAT.model, WHAT.guide, torch.zeros(2, 3, 4).double(), history=True)


def test_a_mask_may_be_given_by_name():
    frames, mask, _ = clips(1, [3, 2])
    for call in (reconstruct, functools.partial(forecast, num_steps=2, sample=False)):
        by_name = call(WHAT.model, WHAT.guide, frames, mask=mask)["x"].mean
        exact(by_name, call(WHAT.model, WHAT.guide, frames, mask)["x"].mean)
    with pytest.raises(TypeError, match="^mask: "):
        swap(WHAT.model, WHAT.guide, frames, frames, sites=["z"], mask=mask)


@pytest.mark.parametrize("fn", [dist.Categorical(torch.ones(3)), dist.Cauchy(0.0, 1.0)])
def test_a_mean_that_is_nan_is_no_mean(fn):
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            pyro.sample("x", dist.Normal(pyro.sample("k", fn).float(), 1.0))

    with pytest.raises(ValueError, match=rf"^sample: site 'k' \({type(fn).__name__}\)"):
        generate(model, **SIZES, sample=False)
    assert generate(model, **SIZES)["x"].mean.isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"given": {"z": [[1.0]]}}, TypeError, "^given: 'z'"),
        ({"emissions": "x"}, ValueError, "^emissions: "),
        ({"given": {"z": torch.zeros(5, 2, 1)}}, ValueError, r"^site 'z': .*\(5, 2, 1\)"),
    ],
)
def test_what_is_given_and_named_is_checked(options, error, message):
    with pytest.raises(error, match=message):
        generate(TwoChains.model, **SIZES, **options)


@pytest.mark.parametrize(
    "emission", [dist.Categorical(torch.ones(3, 4)).to_event(1), dist.Cauchy(torch.zeros(3), 1.0).to_event(1)]
)
def test_an_emission_without_a_mean_is_returned_all_the_same(emission):
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            pyro.sample("z", normal(torch.zeros(num_steps, 1), 1.0, 2))
            pyro.sample("x", emission, obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", normal(torch.zeros(3, 1), 1.0, 2))

    frames = torch.zeros(2, 3)
    for found in (
        reconstruct(model, guide, frames),
        swap(model, guide, frames, frames, sites=["z"]),
        generate(model, **SIZES, sample=False),
    ):
        assert found["x"].sample().shape == (2, 3)


def test_a_chain_of_another_length_than_the_frames_is_continued():
    """A start before the first frame: T + 1 steps for T frames."""

    def z(num_sequences, num_steps):
        start = normal(torch.zeros(num_sequences, 1), 1.0)
        return pyro.sample("z", MarkovChain(start, lambda z: normal(z + 1, 1.0), num_steps + 1))

    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            pyro.sample("x", normal(z(num_sequences, num_steps)[..., 1:, :], 1.0, 2), obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            z(*frames.shape[:2])

    frames = torch.zeros(2, 4, 1)
    foretold = forecast(model, guide, frames, num_steps=2, sample=False)["x"].mean
    exact(foretold, torch.arange(1.0, 7).reshape(1, 6, 1).expand(2, 6, 1))
    swapped = swap(model, guide, torch.zeros(2, 6, 1), frames, sites=["z"])["x"].mean
    exact(swapped, torch.arange(1.0, 5).reshape(1, 4, 1).expand(2, 4, 1))


def test_a_forecast_draws_what_the_guide_infers_unless_its_means_are_asked_for():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            steps = s.unsqueeze(1).expand(-1, num_steps, -1)
            pyro.sample("x", IndependentSteps(dist.Normal(steps, 1.0).to_event(1)), obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("s", dist.Normal(torch.full((len(frames), 1), 3.0), 1.0).to_event(1))

    frames = torch.zeros(500, 2, 1)
    torch.manual_seed(0)
    drawn = forecast(model, guide, frames, num_steps=1)["x"].mean[:, -1]
    assert drawn.std().item() == pytest.approx(1, abs=0.1)
    assert (forecast(model, guide, frames, num_steps=1, sample=False)["x"].mean == 3).all()
