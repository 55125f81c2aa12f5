"""Scores and pictures that users ask for wrongly, and what they are told."""

from __future__ import annotations

import importlib
import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from failures import check, rows

pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from seqdisent import metrics, plotting  # noqa: E402
from seqdisent.datasets import Clips  # noqa: E402
from seqdisent.metrics import (  # noqa: E402
    CRPS,
    AccuracyConsistency,
    EnergyScore,
    FrechetDistance,
    GenerationEntropies,
    IntervalCoverage,
    Judge,
    QuantileLoss,
    SwapAccuracy,
    combination_scores,
    generation_scores,
    intervention_score,
    linear_interpolation,
    memorisation_scores,
    nearest_clip,
    neighbour_scores,
    pick_donors,
    probe,
    probe_table,
    released_protocol_consistency,
    sampled_swap_accuracy,
    seasonal_naive,
    seasonal_naive_draws,
    squared_error,
    train_judge,
)

ones, zeros, nan = torch.ones, torch.zeros, float("nan")
SIZES = {"who": 4, "what": 3}
LABELS = {"who": torch.tensor([0, 1, 2, 3, 0]), "what": torch.tensor([0, 1, 2, 0, 1])}


def swapped(predictions=LABELS, source=LABELS, donor=LABELS, *, follows=("what",), **changed):
    """Scores of a swap, some factor of the predictions, of the source or of the donor being `changed`."""
    values = {"predictions": predictions, "source": source, "donor": donor}
    for name, change in changed.items():
        values[name] = {**values[name], **change}
    metric = SwapAccuracy(SIZES, follows)
    metric.update(*values.values())
    return metric.compute()


def entropies(**changed):
    return GenerationEntropies(SIZES).update({**{name: zeros(5, size) for name, size in SIZES.items()}, **changed})


def pixels(clips):
    return clips[..., 0, 0, 0, :2]


def of_features(features):
    return lambda: FrechetDistance(lambda _: features, 2, "made up").update(ones(4, 1, 1, 1, 3), real=True)


def clips(*shape, who=(0, 1)):
    return Clips(zeros(2, *shape, dtype=torch.uint8), labels={"who": torch.tensor(who)})


judge = Judge({"who": 2}, in_channels=1, image_size=4, channels=(2,))
VALUES = torch.arange(8.0).reshape(2, 4)
FRAMES = torch.linspace(0, 1, 3 * 2 * 16).reshape(3, 2, 1, 4, 4)
LATENTS, CLASSES = torch.arange(40.0).reshape(10, 4), torch.arange(10) % 2


def mapped(values=None, **options):
    values = {"x": zeros(2, 4, 3)} if values is None else values
    return lambda: plotting.plot_heatmap(values, "unused.png", **options)


def probed(train=LATENTS, classes=CLASSES, test=LATENTS, test_classes=CLASSES, **options):
    return lambda: probe(train, classes, test, test_classes, **options)


def combined(**changed):
    labels = {"generated": LABELS, "train": LABELS, "held_out": LABELS, **changed}
    return lambda: combination_scores(**labels, num_classes=SIZES)


def show(frames=None, mask=None, *, num_sequences=None, num_steps=None):
    with pyro.plate("sequences", num_sequences):
        s = pyro.sample("s", dist.Normal(zeros(num_sequences), 1.0))
        pyro.sample("x", dist.Normal(s[:, None, None, None, None].expand(-1, num_steps, 1, 4, 4), 1.0).to_event(4))


def look(frames, mask=None):
    with pyro.plate("sequences", len(frames)):
        pyro.sample("s", dist.Normal(frames.mean((1, 2, 3, 4)), 1.0))


def scored(metric=CRPS, draws=None, target=None, mask=None, observed=None):
    """Score three draws of two sequences with four steps."""

    def do():
        made = metric()
        made.update(
            zeros(3, 2, 4) if draws is None else draws, zeros(2, 4) if target is None else target, mask, observed
        )
        return made.compute()

    return do


def continued(values=VALUES, num_steps=2, season=2, num_samples=None, **options):
    if num_samples is None:
        return lambda: seasonal_naive(values, num_steps, season, **options)
    return lambda: seasonal_naive_draws(values, num_steps, season, num_samples, torch.Generator(), **options)


def sampled(**options):
    return lambda: sampled_swap_accuracy(show, look, judge, clips(2, 1, 4, 4), **{"keep": ["s"], **options})


@rows(
    # swaps
    ("the name of a factor where a list belongs", lambda: SwapAccuracy(SIZES, "what"), ValueError,
     r"follows: got 'what', expected a sequence of some of \['what', 'who'\]"),
    ("no factor", lambda: SwapAccuracy({}, []), ValueError, "num_classes: is empty, expected at least one factor"),
    ("a factor without classes", lambda: Judge({"who": 0}), ValueError,
     r"num_classes\['who'\]: got 0, expected an integer >= 1"),
    ("a factor left out", lambda: swapped(donor={"who": LABELS["who"]}), ValueError,
     r"donor: has no factor 'what', expected all of \['what', 'who'\]"),
    ("labels in words", lambda: swapped(source={**LABELS, "who": ["anna"] * 5}), TypeError,
     r"source\['who'\]: got list, expected a tensor, or an array or list of numbers"),
    ("labels of some clips", lambda: swapped(source={**LABELS, "who": torch.arange(4)}), ValueError,
     r"source\['who'\]: has 4 values, expected 5, as many as the others"),
    ("a class that is not there", lambda: swapped(source={**LABELS, "who": torch.full((5,), 4)}), ValueError,
     r"source\['who'\]: has values from 4 to 4, expected 0 to 3"),
    ("predictions that are bool", lambda: swapped({**LABELS, "who": ones(5).bool()}), ValueError,
     r"predictions\['who'\]: has shape \(5,\) and dtype torch.bool, expected class numbers \(N,\) or floating-point "
     r"logits \(N, 4\)"),
    ("logits of other classes", lambda: swapped({**LABELS, "who": zeros(5, 3)}), ValueError,
     r"predictions\['who'\]: has shape \(5, 3\) and dtype torch.float32, expected floating-point logits \(N, 4\)"),
    ("logits that are NaN", lambda: swapped({**LABELS, "who": torch.full((5, 4), nan)}), ValueError,
     r"predictions\['who'\]: has a row with NaN, inf or nothing but -inf, expected logits of a distribution"),
    ("an intervention score of one kind of factor", lambda: intervention_score([swapped(follows=[])]), ValueError,
     "swaps: 2 factors stay and 0 follow the donor, expected at least one of each"),
    ("an intervention score of one swap", lambda: intervention_score(swapped()), TypeError,
     r"swaps: got the result of one swap, expected a sequence of them, such as \[metric.compute\(\)\]"),
    # generation
    ("predictions of a factor left out", lambda: GenerationEntropies(SIZES).update({"who": zeros(5, 4)}), ValueError,
     r"predictions: has no factor 'what', expected all of \['what', 'who'\]"),
    ("predictions of some clips", lambda: entropies(what=zeros(4, 3)), ValueError,
     r"predictions\['what'\]: has 4 rows, expected 5, as many as the others"),
    ("probabilities for logits", lambda: entropies(who=torch.full((5, 4), 0.25)), ValueError,
     r"predictions\['who'\]: every row is in \[0, 1\] and sums to 1, as probabilities do; expected logits, such as the "
     "logarithms of those probabilities"),
    ("an extractor without a name", lambda: FrechetDistance(pixels, 2, ""), ValueError,
     "name: is empty, expected what to call the extractor"),
    ("an extractor of no feature", lambda: FrechetDistance(pixels, 0, "made up"), ValueError,
     "num_features: got 0, expected an integer >= 1"),
    ("features in a dict", of_features({}), TypeError, "extractor: got dict, expected a tensor"),
    ("features of another size", of_features(ones(4, 3)), ValueError,
     r"extractor: returned features of shape \(4, 3\), expected \(N, 2\)"),
    ("features that are NaN", of_features(torch.full((4, 2), nan)), ValueError,
     "extractor: returned features that are not finite"),
    ("reconstructions of other labels", lambda: AccuracyConsistency(SIZES).update({"who": LABELS["who"]}, LABELS),
     ValueError, r"real: has no factor 'what', expected all of \['what', 'who'\]"),
    ("reconstructions of some clips", lambda: released_protocol_consistency(
        clips(2, 1, 8, 8), zeros(1, 2, 1, 8, 8), seed=0), ValueError,
     r"reconstructed: has shape \(1, 2, 1, 8, 8\), expected that of the clips, \(2, 2, 1, 8, 8\)"),
    ("nothing held out", lambda: released_protocol_consistency(
        clips(2, 1, 8, 8), zeros(2, 2, 1, 8, 8), seed=0, train_share=1.0), ValueError,
     "train_share: got 1.0, expected a share that leaves clips on both sides"),
    # what is drawn from the prior
    ("as many clips as neighbours", lambda: neighbour_scores(LATENTS, LATENTS[:5]), ValueError,
     "generated: has 5 rows, expected more than num_neighbours=5"),
    ("clips for features", lambda: neighbour_scores(FRAMES, FRAMES), ValueError,
     r"real: has shape \(3, 2, 1, 4, 4\), expected features \(N, F\)"),
    ("features of two extractors", lambda: neighbour_scores(LATENTS, LATENTS[:, :2]), ValueError,
     r"generated: has rows of shape \(2,\), expected \(4,\) as real"),
    ("features in words", lambda: neighbour_scores(["anna"], LATENTS), TypeError, "real: got list, expected a tensor"),
    ("features that are infinite", lambda: neighbour_scores(LATENTS, LATENTS / 0), ValueError,
     "generated: has values that are not finite, expected numbers"),
    ("no training clip", lambda: memorisation_scores(FRAMES, FRAMES, FRAMES[:0]), ValueError,
     r"train: has shape \(0, 2, 1, 4, 4\), expected features \(N, F\) or clips \(N, T, C, H, W\), none of it 0"),
    ("held-out clips of another length", lambda: memorisation_scores(FRAMES, FRAMES[:, :1], FRAMES), ValueError,
     r"held_out: has rows of shape \(1, 1, 4, 4\), expected \(2, 1, 4, 4\) as train"),
    ("combinations of a factor left out", combined(train={"who": [0]}), ValueError,
     r"train: has no factor 'what', expected all of \['what', 'who'\]"),
    ("combinations of no clip", combined(held_out={name: zeros(0).long() for name in SIZES}), ValueError,
     r"held_out: has no clips, expected at least one"),
    ("real clips' labels for logits", lambda: generation_scores({"who": zeros(5, 4)}, LABELS, {"who": 4}), ValueError,
     r"real\['who'\]: has shape \(5,\) and dtype torch.int64, expected floating-point logits \(N, 4\)"),
    ("no generated clip", lambda: generation_scores({"who": zeros(0, 4)}, {"who": zeros(5, 4)}, {"who": 4}), ValueError,
     "generated: has no clips, expected at least one"),
    ("the name of a site to keep where a list belongs", sampled(keep="s"), TypeError,
     r"keep: got the string 's', expected a sequence such as \['s'\]"),
    ("no site to keep", sampled(keep=[]), ValueError, "keep: is empty, expected at least one latent of the guide"),
    ("a site to keep that is not there", sampled(keep=["d"]), ValueError,
     r"keep: the guide has no site \['d'\], expected some of \['s'\]"),
    ("no factor that stays", sampled(), ValueError,
     r"factors: got \[\], expected some of those that the judge knows and the clips have labels of, \['who'\]"),
    # against the true clip
    ("one identity alone", lambda: pick_donors(torch.tensor([3, 3]), seed=0), ValueError,
     "identity: all clips show the same one, expected at least two"),
    ("identities in a table", lambda: pick_donors(torch.tensor([[0], [1]]), seed=0), ValueError,
     r"identity: has shape \(2, 1\) or NaN, expected one label for each clip, \(N,\)"),
    ("motions of some clips", lambda: pick_donors([0, 1, 1], [3], seed=0), ValueError,
     r"motion: has shape \(1,\) or NaN, expected \(3,\), that of identity"),
    ("a truth of another length", lambda: squared_error(FRAMES, FRAMES[:, :1]), ValueError,
     r"truth: has shape \(3, 1, 1, 4, 4\), expected that of predicted, \(3, 2, 1, 4, 4\)"),
    ("a mask of numbers", lambda: squared_error(FRAMES, FRAMES, ones(3, 2)), ValueError,
     r"mask: has shape \(3, 2\) and dtype torch.float32, expected bool \(3, 2\) with at least one real frame in each"),
    ("candidates of another size", lambda: nearest_clip(FRAMES, FRAMES[:, :1]), ValueError,
     r"candidates: have shape \(1, 1, 4, 4\) each, expected \(2, 1, 4, 4\)"),
    ("no candidate", lambda: nearest_clip(FRAMES, FRAMES[:0]), ValueError,
     "candidates: is empty, expected at least one clip"),
    ("a clip that is NaN", lambda: nearest_clip(nan * FRAMES, FRAMES), ValueError,
     "predicted: has clips with NaN or infinite pixels, to which no candidate is nearest"),
    ("integer pixels", lambda: squared_error(FRAMES, FRAMES.long()), TypeError,
     r"truth: has dtype torch.int64, expected uint8, or floating point in \[0, 1\]"),
    ("floating-point pixels up to 255", lambda: squared_error(FRAMES, 255 * FRAMES), ValueError,
     r"truth: has values from 0 to 255, expected pixels in \[0, 1\], or uint8"),
    # judge
    ("a picture for a clip", lambda: judge(zeros(2, 1, 4, 4)), ValueError,
     r"frames: has shape \(2, 1, 4, 4\), expected \(N, T, 1, 4, 4\)"),
    ("a judge's frames as bytes", lambda: judge(zeros(2, 3, 1, 4, 4).byte()), TypeError,
     r"frames: has dtype torch.uint8, expected floating point \(pixels in \[0, 1\]\)"),
    ("a judge's frames up to 255", lambda: judge(255 * FRAMES), ValueError,
     r"frames: has values of mean 1.*, expected pixels in \[0, 1\], or uint8"),
    ("no factor to judge", lambda: train_judge(clips(1, 1, 6, 6), clips(1, 1, 6, 6), factors=[]), ValueError,
     r"factors: is empty, expected at least one of the labels \['who'\]"),
    ("an unknown factor to judge", lambda: train_judge(clips(1, 1, 6, 6), clips(1, 1, 6, 6), factors=["hair"]),
     ValueError, r"factors: 'hair' is not among the labels of train, \['who'\]"),
    ("held-out clips of other classes", lambda: train_judge(clips(1, 1, 6, 6), clips(1, 1, 6, 6, who=(0, 2))),
     ValueError, r"held_out: factor 'who' has other values than that of train \(3 and 2\), expected the same; pass the "
     "same factor_names to both Clips"),
    ("held-out clips of another size", lambda: train_judge(clips(1, 1, 6, 6), clips(1, 1, 6, 8)), ValueError,
     r"held_out: frames have shape \(1, 6, 8\), expected that of train, \(1, 6, 6\)"),
    # probes
    ("an unknown probe", probed(kind="forest"), ValueError, "kind: got 'forest', expected 'linear' or 'mlp'"),
    ("one class alone", probed(classes=zeros(10).long()), ValueError,
     "train_labels: all are the same, expected at least two classes"),
    ("labels of some codes", probed(test_classes=CLASSES[:5]), ValueError,
     r"test_labels: has shape \(5,\) and dtype torch.int64, expected whole numbers \(10,\)"),
    ("codes of another size", probed(test=LATENTS[:, :2]), ValueError,
     "test_latents: have 2 dimensions, expected 4 as train_latents"),
    ("codes of one number", probed(LATENTS[:, 0]), ValueError,
     r"train_latents: has shape \(10,\), expected \(N, D\) or \(N, T, D\) with nothing empty"),
    ("steps with the labels of sequences", probed(LATENTS.reshape(5, 2, 4), CLASSES[:5]), ValueError,
     r"train_labels: has shape \(5,\) and dtype torch.int64, expected whole numbers \(5, 2\)"),
    ("steps against sequences", probed(LATENTS.reshape(5, 2, 4), CLASSES.reshape(5, 2)), ValueError,
     r"test_latents: has shape \(10, 4\), expected 3 dimensions as train_latents"),
    ("a mask of other codes", probed(train_mask=ones(9) > 0), ValueError,
     r"train_mask: has shape \(9,\), expected \(10,\), that of the labels"),
    ("a probe's mask of numbers", probed(test_mask=ones(10)), TypeError,
     "test_mask: has dtype torch.float32, expected torch.bool"),
    ("a mask that leaves nothing", probed(test_mask=zeros(10) > 0), ValueError,
     "test_mask: is False everywhere, expected True where a latent counts"),
    ("codes that are NaN", probed(test=nan * LATENTS), ValueError, "test_latents: not all are finite"),
    ("a table of other factors", lambda: probe_table({"s": LATENTS}, {"who": CLASSES}, {"s": LATENTS}, {}), ValueError,
     r"test_labels: got \[\], expected those of training, \['who'\]"),
    # forecasts
    ("a mean instead of draws", scored(draws=zeros(2, 4)), ValueError,
     r"draws: has shape \(2, 4\), expected \(S, B, T, \*E\) with at least S=2 draws"),
    ("one draw", scored(EnergyScore, draws=zeros(1, 2, 4)), ValueError,
     r"draws: has shape \(1, 2, 4\), expected \(S, B, T, \*E\) with at least S=2 draws"),
    ("draws behind the batch", scored(draws=zeros(2, 3, 4)), ValueError,
     r"target: has shape \(2, 4\), expected that of a draw, \(3, 4\), of draws \(2, 3, 4\)"),
    ("draws in bytes", scored(draws=zeros(3, 2, 4, dtype=torch.uint8)), TypeError,
     "draws: got dtype torch.uint8, expected a floating-point tensor"),
    ("a target in a list", scored(target=[0.0]), TypeError, "target: got list, expected a floating-point tensor"),
    ("a target elsewhere", scored(target=zeros(2, 4, device="meta")), ValueError,
     "target: is on meta, expected cpu, where the draws are"),
    ("a hole that nobody named", scored(target=nan * zeros(2, 4)), ValueError,
     "target: got 8 values that are not finite, expected finite ones at all real steps that `observed` does not leave"),
    ("a forecast that is NaN", scored(IntervalCoverage, draws=nan * zeros(3, 2, 4)), ValueError,
     "draws: got 24 values that are not finite"),
    ("a mask of numbers", scored(mask=ones(2, 4)), TypeError, "mask: has dtype torch.float32, expected torch.bool"),
    ("a mask of other steps", scored(mask=ones(2, 3) > 0), ValueError,
     r"mask: has shape \(2, 3\), expected \(\*B, T\) with T=4 steps"),
    ("holes in numbers", scored(observed=ones(2, 4)), TypeError,
     "observed: got dtype torch.float32, expected a bool tensor"),
    ("holes of other steps", scored(observed=ones(2, 3) > 0), ValueError,
     r"observed: has shape \(2, 3\), expected \(2, 4\)"),
    *((f"nothing to score, {metric.__name__}", scored(metric, observed=zeros(2, 4) > 0), ValueError,
       "target: got no scored value in any update, expected at least one that is real and observed")
      for metric in (CRPS, EnergyScore, IntervalCoverage, QuantileLoss)),
    *((f"levels {levels}", lambda metric=metric, levels=levels: metric(levels), ValueError,
       r"levels: got .*, expected different numbers above 0 and below 1, such as \(0.5, 0.9\)")
      for metric in (IntervalCoverage, QuantileLoss) for levels in ((), 0.5, (5, 9), (0.0,), (nan,), (0.5, 0.5), "ab")),
    # baselines
    ("no step to forecast", continued(num_steps=0), ValueError, "num_steps: got 0, expected an integer >= 1"),
    ("a season of no step", continued(season=0), ValueError, "season: got 0, expected an integer >= 1"),
    ("a season that was not seen", continued(season=5), ValueError,
     "season: got 5, expected at most the 4 steps of values"),
    ("a season without a second", continued(season=4, num_samples=2), ValueError,
     "season: got 4, expected fewer than the 4 steps of values, for residuals"),
    ("no draw", continued(num_samples=0), ValueError, "num_samples: got 0, expected an integer >= 1"),
    ("counts in whole numbers", continued(VALUES.long()), TypeError,
     "values: got dtype torch.int64, expected a floating-point tensor"),
    ("one sequence without a batch", continued(VALUES[0]), ValueError,
     r"values: has shape \(4,\), expected \(B, T, \*E\) with at least one step"),
    ("a past that is NaN", continued(nan * VALUES, num_samples=2), ValueError,
     "values: got 8 values that are not finite"),
    ("a hole in a mask", continued(mask=torch.tensor([[True, False, True, True]]).expand(2, 4)), ValueError,
     "mask: a row has a hole"),
    ("no step at all", lambda: linear_interpolation(zeros(2, 0), zeros(2, 0) > 0), ValueError,
     r"values: has shape \(2, 0\), expected \(B, T, \*E\) with at least one step"),
    ("holes between lines in numbers", lambda: linear_interpolation(VALUES, ones(2, 4)), TypeError,
     "observed: got dtype torch.float32, expected a bool tensor"),
    ("a metric that is not there", lambda: metrics.accuracy_of_everything, AttributeError,
     "module 'seqdisent.metrics' has no attribute 'accuracy_of_everything'"),
    # pictures
    ("a table of the wrong swaps", lambda: plotting.swap_table(FRAMES, FRAMES[:2], FRAMES[None]), ValueError,
     r"swapped: has shape \(1, 3, 2, 1, 4, 4\), expected \(R, Q, T, C, H, W\) from static \(3, 2, 1, 4, 4\) and motion "
     r"\(2, 2, 1, 4, 4\)"),
    ("a picture of two colours", lambda: plotting.save_png(zeros(2, 4, 4), "unused.png"), ValueError,
     r"picture: has shape \(2, 4, 4\), expected \(C, H, W\) with 1 or 3 colours"),
    ("a heat map of nothing", mapped({}), ValueError, r"values: is empty, expected \{title of a row: \(N, T, X\)\}"),
    ("a heat map of one coordinate", mapped({"x": zeros(2, 4)}), ValueError,
     r"values\['x'\]: has shape \(2, 4\), expected \(N, T, X\), none of them 0, the same in each row"),
    ("heat maps of other lengths", mapped({"x": zeros(2, 4, 3), "y": zeros(2, 5, 3)}), ValueError,
     r"values\['y'\]: has shape \(2, 5, 3\), expected \(N, T, X\), none of them 0, the same in each row"),
    ("holes of no row", mapped(observed={"z": zeros(2, 4) > 0}), ValueError,
     r"observed: got \['z'\], expected titles of values, \['x'\]"),
    ("holes of other sequences", mapped(observed={"x": zeros(3, 4) > 0}), ValueError,
     r"observed\['x'\]: has shape \(3, 4\) and dtype torch.bool, expected bool \(2, 4\) or \(2, 4, 3\)"),
    ("colours from high to low", mapped(limits=(1, 0)), ValueError,
     r"limits: got \(1, 0\), expected finite numbers, the lower one first"),
    *((f"colours without an end, {end}", mapped(limits=(0, end)), ValueError, r"limits: got \(0, .*\), expected finite")
      for end in (nan, math.inf)),
    ("names of other sequences", mapped(names=["a"]), ValueError, "names: got 1, expected 2, one for each sequence"),
    ("names of other columns", mapped(columns=["a"]), ValueError,
     "columns: got 1, expected 3, one for each coordinate"),
    ("a heat map's mask of numbers", mapped(mask=ones(2, 4)), TypeError, "mask: has dtype torch.float32"),
)  # fmt: skip
def test_metrics_and_pictures(row):
    check(row)


def test_a_log_without_a_ledger(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("step,loss\n0,1\n")
    with pytest.raises(ValueError, match=r"logs: \[.*metrics.csv.*\] hold no term of a ledger"):
        plotting.plot_ledger([log], tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("module", "missing", "package"),
    [
        ("consistency", "torchmetrics", "torchmetrics"),
        ("entropies", "torchmetrics", "torchmetrics"),
        ("forecasts", "torchmetrics", "torchmetrics"),
        ("frechet", "torchmetrics.image.fid", "torchmetrics"),
        ("generation", "seqdisent.metrics.entropies", "torchmetrics"),
        ("probes", "sklearn.exceptions", "scikit-learn"),
        ("swaps", "torchmetrics", "torchmetrics"),
    ],
)
def test_the_extra_that_is_not_installed(module, missing, package, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"seqdisent.metrics.{module}", raising=False)
    said = rf"seqdisent.metrics.{module} needs {package}; install it with: pip install 'seqdisent\[metrics\]'"
    with pytest.raises(ImportError, match=said):
        importlib.import_module(f"seqdisent.metrics.{module}")
