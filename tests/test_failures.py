"""What users get wrong, and what they are told: a table to read from top to bottom.

Each row says what was done and what is said. Details of a block's own checks are in its own file; here stands one row
for each kind of mistake, so that none passes silently and each message names the argument, what came and what was
wanted. Mistakes on the command line and in run folders follow at the end.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from seqdisent import (
    AnnealingSchedule,
    Combiner,
    ConvEncoder,
    DecomposedELBO,
    GatedTransition,
    MarkovChain,
    MixtureOfExperts,
    MixtureOfExpertsConvDecoder,
    NormalHead,
    Seq2SeqDynamicsEncoder,
    StaticEncoder,
    elbo_terms,
    forecast,
    generate,
    infer,
    reconstruct,
    swap,
)

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from seqdisent import training  # noqa: E402
from seqdisent.datasets import Clips, load_clips, load_frames, sprites  # noqa: E402
from seqdisent.metrics import pick_donors  # noqa: E402


class Row(NamedTuple):
    mistake: str
    do: Any  # a function, of a folder where it needs one
    error: type[BaseException]
    said: str  # a regular expression


def rows(*table):
    return pytest.mark.parametrize("row", [Row(*row) for row in table], ids=[row[0] for row in table])


def check(row, *given):
    with pytest.raises(row.error, match=row.said):
        row.do(*given)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: shapes, devices, dtypes, masks
# ---------------------------------------------------------------------------------------------------------------------

encoder = ConvEncoder(6, image_size=8, channels=(4,))
decoder = MixtureOfExpertsConvDecoder(4, 3, image_size=8, channels=(4,))
static = StaticEncoder(6, 3)
dynamics = Seq2SeqDynamicsEncoder(6, 4, hidden_dim=5, num_layers=1)
transition, combiner = GatedTransition(3, 5, context_dim=2), Combiner(3, 5, context_dim=2)
mixture = MixtureOfExperts(lambda: nn.Linear(3, 2), 3)
ones = torch.ones
mask = lambda *rows: torch.tensor(rows).bool()  # noqa: E731


def elsewhere(*shape):
    return torch.zeros(*shape, device="meta")  # any other device: this one needs no GPU


def chain(num_steps=4, **options):
    initial = dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    return MarkovChain(initial, lambda z_prev, *context: transition(z_prev, *context), num_steps, **options)


@rows(
    # shapes
    ("frames of another size", lambda: encoder(ones(2, 5, 3, 16, 16)), ValueError,
     r"frames: has shape \(2, 5, 3, 16, 16\), expected \(\*B, 3, 8, 8\)"),
    ("channels last", lambda: encoder(ones(2, 5, 8, 8, 3)), ValueError,
     r"frames: has shape \(2, 5, 8, 8, 3\), expected \(\*B, 3, 8, 8\)"),
    ("grey frames where colour is expected", lambda: encoder(ones(2, 5, 1, 8, 8)), ValueError, r"frames: has shape"),
    ("an image size that cannot be halved down", lambda: ConvEncoder(6, image_size=48), ValueError,
     r"image_size: got 48, expected one integer 4 \* 2\*\*n"),
    ("features without time", lambda: static(ones(6)), ValueError, "features: has shape .6,., expected at least 2"),
    ("a sequence of no step", lambda: static(ones(2, 0, 6)), ValueError, "features: has length 0, expected at least"),
    ("features of another size", lambda: dynamics(ones(2, 5, 7)), ValueError,
     "embeddings: last dimension is 7, expected input_dim=6"),
    ("latents of another size", lambda: decoder(ones(2, 5, 3), ones(2, 3)), ValueError,
     "latents: last dimension is 3, expected latent_dim=4"),
    ("latents without time", lambda: decoder(ones(2, 4), ones(2, 3)), ValueError,
     r"weights: has batch shape \(2,\), expected that of latents, \(\)"),
    ("weights of another number of experts", lambda: decoder(ones(2, 5, 4), ones(2, 4)), ValueError,
     "weights: last dimension is 4, expected num_experts=3"),
    ("weights that change over time", lambda: decoder(ones(2, 5, 4), ones(2, 5, 3)), ValueError,
     r"weights: has batch shape \(2, 5\), expected that of latents, \(2,\)"),
    ("weights of another batch", lambda: mixture(ones(2, 3), ones(4, 3)), ValueError,
     r"x: has batch shape \(2,\), expected that of weights, \(4,\)"),
    ("z_prev of another size", lambda: transition(ones(2, 4), ones(2, 2)), ValueError,
     "z_prev: last dimension is 4, expected latent_dim=3"),
    ("no context where there is one", lambda: transition(ones(2, 3)), ValueError, "context: got None, expected"),
    ("context of another batch", lambda: combiner(ones(2, 3), ones(5, 2)), ValueError,
     r"context: has shape \(5, 2\), expected one that expands to \(2, 2\)"),
    ("inputs shorter than num_steps", lambda: chain(inputs=ones(2, 3, 2)), ValueError,
     r"inputs: has shape \(2, 3, 2\), expected \(\*B, T, I\) with T=4"),
    ("inputs of another batch", lambda: chain(inputs=ones(5, 4, 2)), ValueError,
     r"inputs: has shape \(5, 4, 2\), expected the batch \(2,\) of `initial`"),
    ("a path of another length", lambda: chain().log_prob(ones(2, 5, 3)), ValueError,
     r"path: has shape \(2, 5, 3\), expected .* ending in \(2, 4, 3\)"),
    ("a chain of no step", lambda: chain(0), ValueError, "num_steps: got 0, expected an integer >= 1"),
    ("an initial distribution without .to_event(1)",
     lambda: MarkovChain(dist.Normal(ones(2, 3), 1.0), transition, 4), ValueError, r"initial: .*; .to_event\(1\)"),
    ("more steps than the chain has inputs for", lambda: chain(inputs=ones(2, 4, 2)).extend(ones(2, 3, 3), 2),
     ValueError, "num_steps: the chain has inputs for 4 steps, expected 3 of the prefix [+] 2"),
    # devices
    ("frames on another device", lambda: encoder(elsewhere(2, 5, 3, 8, 8)), ValueError,
     "frames: is on meta, expected cpu, where the parameters are"),
    ("features on another device", lambda: static(elsewhere(2, 5, 6)), ValueError, "features: is on meta, expected"),
    ("embeddings on another device", lambda: dynamics(elsewhere(2, 5, 6)), ValueError, "embeddings: is on meta"),
    ("dynamics on another device", lambda: dynamics.unroll(elsewhere(2, 4), 5), ValueError, "dynamics: is on meta"),
    ("latents on another device", lambda: decoder(elsewhere(2, 5, 4), ones(2, 3)), ValueError, "latents: is on meta"),
    ("weights on another device", lambda: decoder(ones(2, 5, 4), elsewhere(2, 3)), ValueError, "weights: is on meta"),
    ("an expert's input on another device", lambda: mixture(elsewhere(2, 3), ones(2, 3)), ValueError,
     "x: is on meta, expected cpu, where the parameters are"),
    ("z_prev on another device", lambda: transition(elsewhere(2, 3), ones(2, 2)), ValueError, "z_prev: is on meta"),
    ("a context on another device", lambda: combiner(ones(2, 3), elsewhere(2, 2)), ValueError, "context: is on meta"),
    ("a head's features on another device", lambda: NormalHead(6, 2)(elsewhere(2, 6)), ValueError,
     "features: is on meta"),
    ("a mask on another device", lambda: static(ones(2, 5, 6), elsewhere(2, 5).bool()), ValueError,
     "mask: is on meta, expected cpu, where the values are"),
    # dtypes
    ("a float64 model and float32 frames", lambda: ConvEncoder(6, image_size=8, channels=(4,)).double()(
        ones(2, 5, 3, 8, 8)), TypeError, "frames: has dtype torch.float32, expected torch.float64, that of the param"),
    ("a float32 model and float64 frames", lambda: encoder(ones(2, 5, 3, 8, 8).double()), TypeError,
     "frames: has dtype torch.float64, expected torch.float32, that of the parameters"),
    ("half-precision features without autocast", lambda: static(ones(2, 5, 6).half()), TypeError,
     "features: has dtype torch.float16, expected torch.float32"),
    ("float64 embeddings", lambda: dynamics(ones(2, 5, 6).double()), TypeError, "embeddings: has dtype torch.float64"),
    ("float64 z_prev", lambda: transition(ones(2, 3).double(), ones(2, 2)), TypeError,
     "z_prev: has dtype torch.float64, expected torch.float32"),
    ("float64 z_prev of a posterior", lambda: combiner(ones(2, 3).double(), ones(2, 2)), TypeError, "z_prev: has"),
    ("a float64 context", lambda: combiner(ones(2, 3), ones(2, 2).double()), TypeError, "context: has dtype"),
    ("a head's float64 features", lambda: NormalHead(6, 2)(ones(2, 6).double()), TypeError, "features: has dtype"),
    ("float64 weights", lambda: decoder(ones(2, 5, 4), ones(2, 3).double()), TypeError, "weights: has dtype torch.fl"),
    ("integer weights", lambda: mixture(ones(2, 3), ones(2, 3).long()), TypeError, "weights: has dtype torch.int64"),
    ("frames as bytes, 0 to 255", lambda: encoder(ones(2, 5, 3, 8, 8).byte()), TypeError,
     r"frames: has dtype torch.uint8, expected floating point \(pixels in \[0, 1\]\)"),
    ("integer frames", lambda: encoder(ones(2, 5, 3, 8, 8).long()), TypeError, "frames: has dtype torch.int64, exp"),
    # masks
    ("a mask of 0 and 1 that is not bool", lambda: static(ones(2, 3, 6), ones(2, 3)), TypeError,
     "mask: has dtype torch.float32, expected torch.bool .True where a step is real"),
    ("a mask of another length", lambda: static(ones(2, 3, 6), mask([1, 1], [1, 0])), ValueError,
     r"mask: has shape \(2, 2\), expected \(\*B, T\) with T=3 steps"),
    ("a mask of another batch", lambda: chain(mask=mask(*[[1, 1, 1, 0]] * 5)), ValueError,
     r"mask: has shape \(5, 4\), expected one that expands to \(2, 4\)"),
    ("a mask with a hole", lambda: static(ones(2, 3, 6), mask([1, 0, 1], [1, 1, 1])), ValueError, "a row has a hole"),
    ("padding on the left", lambda: static(ones(2, 3, 6), mask([0, 1, 1], [1, 1, 1])), ValueError,
     "mask: a row has no real first step"),
    ("a row of padding alone", lambda: static(ones(2, 3, 6), mask([0, 0, 0], [1, 1, 1])), ValueError,
     "mask: a row has no real first step; every sequence needs at least one, padding on the right"),
)  # fmt: skip
def test_tensors(row):
    check(row)


# ---------------------------------------------------------------------------------------------------------------------
# Models, guides, weights and schedules
# ---------------------------------------------------------------------------------------------------------------------

FRAMES = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))


def model(frames=None, mask=None, *, num_sequences=None, num_steps=None, sites="sz", observe=lambda x: x, width=3):
    num_sequences, num_steps = (num_sequences, num_steps) if frames is None else frames.shape[:2]
    with pyro.plate("sequences", num_sequences):
        s = pyro.sample("s", dist.Normal(torch.zeros(3), 1.0).to_event(1)) if "s" in sites else torch.zeros(3)
        z = torch.zeros(num_sequences, num_steps, 3)
        if "z" in sites:
            initial = dist.Normal(torch.zeros(num_sequences, 3), 1.0).to_event(1)
            z = pyro.sample(
                "z",
                MarkovChain(initial, lambda z: dist.Normal(0.9 * z, 1.0, validate_args=False).to_event(1), num_steps),
            )
        x = dist.Normal((s.unsqueeze(-2) + z)[..., :width], 1.0, validate_args=False).to_event(2)
        pyro.sample("x", x, obs=None if frames is None else observe(frames))


def guide(frames, mask=None, *, sites="sz", of_s=dist.Normal, **_):
    with pyro.plate("sequences", len(frames)):
        if "s" in sites:
            pyro.sample("s", of_s(frames.mean(1), 1.0, validate_args=False).to_event(1))
        if "z" in sites:
            pyro.sample("z", dist.Normal(frames, 1.0, validate_args=False).to_event(2))


def terms(frames=FRAMES, of_model=None, of_guide=None):
    return elbo_terms(lambda x: model(x, **(of_model or {})), lambda x: guide(x, **(of_guide or {})), frames)


class NotReparameterised(dist.Normal):
    has_rsample = False


def with_nan():
    frames = FRAMES.clone()
    frames[1, 2] = torch.nan
    return frames


@rows(
    # sites
    ("guide without a site", lambda: terms(of_guide={"sites": "z"}), ValueError,
     r"guide: has no site \['s'\], which the model samples"),
    ("model without a site the guide has", lambda: terms(of_model={"sites": "z"}), ValueError,
     r"model: has no latent site \['s'\], which the guide samples; expected the sites \['z'\]"),
    ("model that observes nothing", lambda: elbo_terms(lambda: model(num_sequences=2, num_steps=4),
     lambda: guide(FRAMES)), ValueError, "model: observes nothing, expected at least one site with obs="),
    ("a site that is not reparameterised", lambda: terms(of_guide={"of_s": NotReparameterised}), ValueError,
     "guide: site 's' has no rsample .*would be silently wrong"),
    ("the donor's site misspelt", lambda: swap(model, guide, FRAMES, FRAMES, sites=["S"]), ValueError,
     r"sites: the guide has no site \['S'\], expected some of \['s', 'z'\]"),
    ("the kept site misspelt", lambda: swap(model, guide, FRAMES, FRAMES, sites=["s"], keep=["Z"]), ValueError,
     r"keep: the guide has no site \['Z'\]"),
    ("a site both swapped and kept", lambda: swap(model, guide, FRAMES, FRAMES, sites=["s"], keep=["s"]), ValueError,
     r"keep: \['s'\] are in `sites` too"),
    ("one site's name where a list belongs", lambda: swap(model, guide, FRAMES, FRAMES, sites="s"), ValueError,
     r"sites: got the string 's', expected a sequence of site names such as \['s'\]"),
    ("a given site misspelt", lambda: generate(model, num_sequences=2, num_steps=3, given={"q": ones(2)}), ValueError,
     r"given: the model has no site \['q'\], expected some of \['s', 'x', 'z'\]"),
    ("a given value of another shape", lambda: generate(model, num_sequences=2, num_steps=3, given={"s": ones(2)}),
     ValueError, r"site 's': the value has shape \(2,\), expected \(2, 3\)"),
    ("a donor of another batch", lambda: swap(model, guide, FRAMES, FRAMES[:1], sites=["s"]), ValueError,
     "donor: has 1 sequences, expected as many as the source, 2"),
    # what is observed
    ("an observation of one sequence for all", lambda: terms(of_model={"observe": lambda x: x[:1]}), ValueError,
     r"site 'x': what is observed has batch shape \(1,\), expected 2 at dimension -1, that of the plate 'sequences'"),
    ("an observation without a batch", lambda: terms(of_model={"observe": lambda x: x[0]}), ValueError,
     r"site 'x': what is observed has batch shape \(\), expected 2 at dimension -1"),
    ("an emission with fewer channels than the data", lambda: terms(of_model={"width": 1}), ValueError,
     r"site 'x': what is observed has shape \(2, 4, 3\), expected one that ends in the event's, \(4, 1\)"),
    ("data with fewer channels than the emission", lambda: terms(of_model={"observe": lambda x: x[..., :1]}),
     ValueError, r"site 'x': what is observed has shape \(2, 4, 1\), expected .*\(4, 3\)"),
    ("frames without time", lambda: terms(FRAMES[:, 0], {"sites": "z"}, {"sites": "z"}), ValueError,
     r"site 'x': what is observed has batch shape \(\), expected 2 at dimension -1"),
    ("no frames", lambda: infer(guide), TypeError, "frames"),
    ("frames in a list", lambda: reconstruct(model, guide, [1.0]), TypeError, r"args: expected frames \(B, T, ...\)"),
    ("frames of length 0", lambda: forecast(model, guide, FRAMES[:, :0], num_steps=2), ValueError,
     r"args: frames have shape \(2, 0, 3\), expected \(B, T, ...\) with at least one frame"),
    ("NaN in the data", lambda: terms(with_nan()).check_finite(7), FloatingPointError,
     r"log_likelihood\['x'\] is nan at training step 7 \(sequence 1\)"),
    # weights
    ("the weight of a site misspelt", lambda: terms().elbo({"zz": 0.5}), ValueError,
     r"weights: no site \['zz'\] in the ledger, expected some of \['s', 'z'\] \(latent\) and \['x'\] \(observed\)"),
    ("the same in the loss for SVI", lambda: DecomposedELBO(weights={"zz": 0.5}).loss(
        lambda x: model(x), guide, FRAMES), ValueError, r"weights: no site \['zz'\]"),
    ("a weight that is NaN", lambda: terms().elbo({"z": float("nan")}), ValueError,
     r"weights\['z'\]: got nan, expected a finite number"),
    ("a schedule where its value belongs", lambda: terms().elbo({"z": AnnealingSchedule.constant(1.0)}), TypeError,
     r"weights\['z'\]: got _Linear, expected a number"),
    ("a weight of another batch", lambda: terms().elbo({"z": ones(4, 1)}), ValueError,
     r"weights\['z'\]: has shape \(4, 1\), expected \(\) or \(2,\) by sequence"),
    ("an unknown kind of KL term", lambda: elbo_terms(model, guide, FRAMES, kl="exact"), ValueError,
     "kl: got 'exact', expected \"analytic\" or \"monte-carlo\""),
    ("no particle", lambda: elbo_terms(model, guide, FRAMES, num_particles=0), ValueError, "num_particles: got 0"),
    # schedules
    ("a negative step", lambda: AnnealingSchedule.linear(0.0, 1.0, 10)(-1), ValueError, "step: got -1, expected"),
    ("a step that is NaN", lambda: AnnealingSchedule.linear(0.0, 1.0, 10)(float("nan")), ValueError, "step: got nan"),
    ("a schedule over no step", lambda: AnnealingSchedule.cosine(0.0, 1.0, 0), ValueError, "num_steps: got 0"),
    ("a schedule that ends in NaN", lambda: AnnealingSchedule.linear(0.0, float("nan"), 5), ValueError,
     "end: got nan, expected a finite number"),
    ("a clamp whose ends are reversed", lambda: AnnealingSchedule.linear(0.0, 1.0, 5).clamp(1.0, 0.0), ValueError,
     "low: got 1.0 above high=0.0, expected low <= high"),
    ("points of a schedule in the wrong order", lambda: AnnealingSchedule.quadratic([(5, 1.0), (1, 2.0)]), ValueError,
     "points: steps are .*, expected them to increase"),
    ("something after a schedule without end", lambda: AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=3).then(
        AnnealingSchedule.constant(1.0)), ValueError, "then: the first schedule has no end"),
)  # fmt: skip
def test_programs(row):
    check(row)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def bytes_of(*shape):
    return torch.zeros(*shape, dtype=torch.uint8)


def some_clips(**options):
    return Clips(bytes_of(3, 2, 1, 4, 4), **options)


def picture_folder(folder, *files, content=b"no picture"):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


def npz(folder, **arrays):
    np.savez(folder / "clips.npz", **arrays)
    return folder / "clips.npz"


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-50])
    return path


def wrong_sheets(folder):
    from seqdisent.datasets._sheets import SHEETS

    return picture_folder(folder, *SHEETS)


@rows(
    ("float frames in a data set of bytes", lambda _: Clips(torch.rand(3, 2, 1, 4, 4)), TypeError,
     r"frames: got torch.float32 of shape .*, expected a tensor of uint8 \(pixels 0 to 255\)"),
    ("a clip longer than its frames", lambda _: some_clips(lengths=torch.tensor([1, 2, 3])), ValueError,
     "lengths: got values from 1 to 3, expected 1 to 2"),
    ("a clip of no frame", lambda _: some_clips(lengths=torch.tensor([0, 2, 2])), ValueError, "lengths: got values fr"),
    ("identities of some clips alone", lambda _: some_clips(identity=torch.tensor([0, 1])), ValueError,
     r"identity: shape is \(2,\), expected \(3,\), one value per clip"),
    ("a static factor that changes within an identity", lambda _: some_clips(
        identity=torch.tensor([0, 0, 1]), labels={"hair": torch.tensor([0, 1, 0])}, static_factors=["hair"]),
     ValueError, "static_factors: 'hair' differs between clips of one identity"),
    ("a clip that is not there", lambda _: some_clips().batch([3]), ValueError, "indices: got positions from 3 to 3"),
    ("too few identities for a split", lambda _: some_clips(identity=torch.zeros(3).long()).split(
        0.5, 0, by="identity"), ValueError, "split by identity: there is 1, expected at least 2"),
    ("a split that leaves nothing to train on", lambda _: some_clips().split(3, 0, by="identity"), ValueError,
     "held_out: got 3 of 3 by identity, expected at most 2"),
    ("too few identities for a swap's donors", lambda _: pick_donors(torch.zeros(3).long(), None, seed=0), ValueError,
     "identity: all clips show the same one"),
    ("a true swap of data that knows none", lambda _: some_clips().true_swap(0, 1), ValueError, "have no renderer"),
    # files
    ("a folder that is not there", lambda folder: load_clips(folder / "no"), FileNotFoundError, "no: no such folder"),
    ("an empty folder", lambda folder: load_clips(folder), ValueError, "no clip in this folder; expected the layout"),
    ("a clip without frames", lambda folder: (folder / "anna" / "smile").mkdir(parents=True) or load_clips(folder),
     ValueError, "anna/smile: an empty clip; add frames or remove the folder"),
    ("pictures in the wrong layout", lambda folder: load_clips(picture_folder(folder, "frame0.png")), ValueError,
     "frame0.png: a file where an identity's folder belongs"),
    ("a file that is no picture", lambda folder: load_clips(picture_folder(folder, "anna/smile/notes.txt")), ValueError,
     "notes.txt: not a picture that Pillow can read; remove it or convert it to PNG"),
    ("one identity alone", lambda folder: load_clips(npz(folder, frames=np.zeros((2, 3, 8, 8), np.uint8),
     identity=np.zeros(2, int)), image_size=8), ValueError, "all clips show one identity, expected at least 2"),
    ("an archive without frames", lambda folder: load_clips(npz(folder, video=np.zeros(3))), ValueError,
     r"clips.npz: holds \['video'\], expected an array 'frames'"),
    ("an archive of float frames", lambda folder: load_clips(npz(folder, frames=np.zeros((2, 3, 8, 8)))), TypeError,
     "array 'frames' is float64, expected uint8 .pixels 0 to 255"),
    ("an archive that was cut off", lambda folder: load_clips(cut_off(npz(folder, frames=np.zeros(
        (2, 3, 8, 8), np.uint8)))), ValueError, "clips.npz: not a NumPy file that can be read"),
    ("an archive with objects, which could run code", lambda folder: load_frames(npz(folder, frames=np.array(
        [{}], object))), ValueError, "arrays of objects are refused"),
    ("sprite sheets of another version", lambda folder: sprites(wrong_sheets(folder)), ValueError,
     "SHA-256 is .*, expected .*; delete it and fetch it again"),
    ("sprite sheets that are not there", lambda folder: sprites(folder), FileNotFoundError,
     r"sprite sheets: in none of: .*sprites\(download=True\)"),
    ("a character that does not exist", lambda _: sprites(characters=[840]), ValueError, "characters: got .840."),
)  # fmt: skip
def test_data(row, tmp_path, monkeypatch):
    monkeypatch.setenv("SEQDISENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SEQDISENT_DATA", raising=False)
    check(row, tmp_path)


def test_a_member_of_an_archive_cannot_leave_its_folder(tmp_path):
    """Archives are read in memory and never unpacked, so a path that climbs out has nowhere to go."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = npz(folder, frames=np.zeros((2, 3, 8, 8), np.uint8), label=np.arange(2))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("frames.npy", members["frames.npy"])
        archive.writestr("../escaped.npy", members["label.npy"])
    assert len(load_clips(path, image_size=8)) == 2
    assert [found.name for found in tmp_path.rglob("*")] == ["data", "clips.npz"]


@pytest.mark.parametrize(
    ("missing", "module", "said"),
    [
        ("lightning", "seqdisent.training", "seqdisent.training needs Lightning; .*seqdisent.train."),
        ("torchmetrics", "seqdisent.metrics.swaps", "seqdisent.metrics.swaps needs .*seqdisent.metrics."),
    ],
)
def test_an_extra_that_is_not_installed(missing, module, said, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=said):
        importlib.import_module(module)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 2 * width), nn.Linear(width, 3)
        self.width = width

    def model(self, x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.width), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0, validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("sequences", len(x)):
            loc, scale = self.encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp(), validate_args=False).to_event(1))


def train(folder, network, *, num_steps=3, resume=True, bad=None, **options):
    def draw(generator):
        batch = torch.randn(4, 3, generator=generator)
        return batch if bad is None else batch * bad

    module = training.ELBOTraining(
        network, network.model, network.guide, draw, num_steps=num_steps,
        learning_rate=AnnealingSchedule.constant(1e-3), arguments=lambda batch: (batch,),
    )  # fmt: skip
    training.fit(module, folder, resume=resume, progress_bar=False, accelerator="cpu", **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder, Network())
    return (folder / "last.ckpt").read_bytes()


def half_frozen():
    network = Network()
    network.encode.requires_grad_(False)
    return network


def lacking_a_layer():
    network = Network()
    network.deeper = nn.Linear(1, 1)
    return network


def put(path, content):
    path.write_bytes(content)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


KEPT = "put a whole copy in its place, or remove it to train from the start"


@rows(
    ("half of it", lambda path, whole: put(path, whole[: len(whole) // 2]), training.CheckpointError,
     rf"last.ckpt: cannot be read as a checkpoint \(.*\); {KEPT}"),
    ("all but its last bytes", lambda path, whole: put(path, whole[:-1]), training.CheckpointError, "cannot be read"),
    ("a byte of a weight changed", lambda path, whole: put(path, flipped(whole)), training.CheckpointError,
     "cannot be read as a checkpoint .*data/[0-9]+ does not fit its checksum"),
    ("nothing", lambda path, _: put(path, b""), training.CheckpointError, "cannot be read"),
    ("garbage", lambda path, _: put(path, b"\x00\x01 garbage" * 99), training.CheckpointError, "cannot be read"),
    ("text", lambda path, _: put(path, b"loss,step\n1.0,3\n"), training.CheckpointError, "cannot be read"),
    ("a pickle that would run code", lambda path, _: torch.save({"state_dict": Harmful()}, path),
     training.CheckpointError, "cannot be read as a checkpoint .it holds more than tensors"),
    ("bare weights", lambda path, _: torch.save(Network().state_dict(), path), training.CheckpointError,
     r"is no checkpoint of seqdisent.training, it lacks \['state_dict', .*; " + KEPT),
    ("another program's", lambda path, _: torch.save([1, 2], path), training.CheckpointError, "is no checkpoint of"),
)  # fmt: skip
def test_checkpoints_that_cannot_be_read(row, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row.do(tmp_path / "last.ckpt", checkpoint)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(row.error, match=row.said) as raised:
        train(tmp_path, Network(), num_steps=5)
    assert str(tmp_path / "last.ckpt") in str(raised.value)
    assert (tmp_path / "last.ckpt").read_bytes() == before  # what is refused is not overwritten either
    assert not (tmp_path / "harmed").exists()


def flipped(whole):
    weights = torch.load(io.BytesIO(whole), weights_only=True)["state_dict"]["network.encode.weight"]
    at = whole.index(weights.numpy().tobytes()) + 1
    return whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]


@rows(
    ("of a network with other sizes", lambda: Network(width=5), training.CheckpointError,
     r"is the checkpoint of another network: it has network.encode.weight of shape \(4, 3\), expected \(10, 3\) "
     r"\(and 2 more differences\)"),
    ("of a network with fewer layers", lacking_a_layer, training.CheckpointError,
     "is the checkpoint of another network: it lacks network.deeper.weight .and 1 more"),
    ("of another stage", half_frozen, training.CheckpointError,
     "was written where other parameters were trained, encode.bias in one case alone .2 in all"),
)  # fmt: skip
def test_checkpoints_of_another_run(row, checkpoint, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(checkpoint)
    with pytest.raises(row.error, match=row.said):
        train(tmp_path, row.do(), num_steps=5)
    assert (tmp_path / "last.ckpt").read_bytes() == checkpoint


@rows(
    ("a run that is there, and no resume", lambda folder: train(folder, Network(), resume=False), FileExistsError,
     "folder: .*last.ckpt exists; resume that run, or choose another folder"),
    ("no step between checkpoints", lambda folder: train(folder, Network(), checkpoint_every=0), ValueError,
     "checkpoint_every: got 0, expected an integer >= 1"),
    ("NaN in a batch", lambda folder: train(folder, Network(), num_steps=5, bad=torch.nan), FloatingPointError,
     r"log_likelihood\['x'\] is nan at training step 3 \(sequence 0\)"),
)  # fmt: skip
def test_training(row, checkpoint, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(checkpoint)
    check(row, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Run folders and the command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vdsm():
    examples = str(Path(__file__).parent.parent / "examples")
    sys.path.insert(0, examples)
    yield importlib.import_module("vdsm")
    sys.path.remove(examples)


@pytest.fixture(scope="module")
def begun(vdsm, tmp_path_factory):
    """config.json of a run of three clips, and their archive."""
    from dataclasses import asdict

    folder = tmp_path_factory.mktemp("begun")
    frames = np.random.default_rng(0).integers(0, 256, (6, 4, 8, 8, 3), dtype=np.uint8)
    sizes = vdsm.replace(
        vdsm.PRESETS["tiny"]["clips"].sizes, encoder_channels=(4,), decoder_channels=(4,), feature_dim=4
    )
    plan = vdsm.replace(vdsm.PRESETS["tiny"]["clips"], sizes=sizes)
    return {
        "data": str(npz(folder, frames=frames, identity=np.arange(6) // 2)), "held_out": 0.1, "image_size": 8,
        "preset": "tiny", "seed": 0, "plan": asdict(plan), "frame_shape": [3, 8, 8],
    }  # fmt: skip


def without(config, name):
    return {key: value for key, value in config.items() if key != name}


def renamed(config):
    plan = config["plan"]
    return {**config, "plan": {**without(plan, "sequence_steps"), "stage2_steps": 6}}


def with_file(name, content=b"garbage"):
    def write(run):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)

    return write


RESUME = ["--run-dir", "RUN", "--resume"]


@pytest.mark.parametrize(
    ("config", "prepare", "arguments", "said"),
    [
        pytest.param(*row[1:], id=row[0])
        for row in (
            ("nothing there to resume", None, None, RESUME, "holds no run to resume"),
            ("a run that is there", dict, None, ["--run-dir", "RUN"], "holds a run; continue it with --resume"),
            ("config.json cut off", lambda config: json.dumps(config)[:50], None, RESUME,
             "config.json: cannot be read as JSON"),
            ("config.json of something else", lambda _: [1, 2], None, RESUME, "config.json: is no list of settings"),
            ("config.json without an option", lambda config: without(config, "held_out"), None, RESUME,
             "config.json: lacks held_out; written by another version"),
            ("a plan of another version", renamed, None, RESUME,
             "config.json: written by another version of this example.*stage2_steps"),
            ("a plan of another model", lambda config: {**config, "plan": {"sizes": {"width": 3}}}, None, RESUME,
             "config.json: written by another version of this example, or by another one .*width"),
            ("another seed on resuming", dict, None, [*RESUME, "--seed", "3"],
             "--seed: got 3, but this run was started with 0; choose another --run-dir"),
            ("the default seed on resuming another", lambda config: {**config, "seed": 3}, None, [*RESUME, "--seed=0"],
             "--seed: got 0, but this run was started with 3"),
            ("an option cut short", None, None, ["--run-dir", "RUN", "--see=3"], "unrecognized arguments: --see=3"),
            ("other data on resuming", dict, None, [*RESUME, "--data", "sprites"], "--data: got sprites, but this run"),
            ("data that are gone", lambda config: {**config, "data": "gone"}, None, RESUME, "--data gone: .*no such"),
            ("a checkpoint of garbage", dict, with_file("stage1/last.ckpt"), RESUME,
             "stage1/last.ckpt: cannot be read as a checkpoint"),
            ("a finished stage of garbage", dict, with_file("stage1/model.pt"), RESUME,
             "stage1/model.pt: damaged, or the weights of another network .*--resume makes it again"),
            ("an unfinished run, used", dict, None, ["generate", "RUN"], "is not finished .* continue it with --run-d"),
            ("a damaged run, used", dict, with_file("model.pt"), ["generate", "RUN"], "model.pt: damaged, or the wei"),
            ("no run, used", None, None, ["generate", "RUN"], "config.json is missing: .* is not a run folder"),
            ("unknown data", None, None, ["--run-dir", "RUN", "--data", "no/such"], "no/such: no such folder or .npz"),
        )
    ],
)  # fmt: skip
def test_run_folders(config, prepare, arguments, said, vdsm, begun, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    if config is not None:
        run.mkdir()
        changed = config(begun)
        (run / "config.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    if prepare is not None:
        prepare(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["vdsm.py", *(str(run) if part == "RUN" else part for part in arguments)])
    with pytest.raises(SystemExit) as left:
        vdsm.main(vdsm.EXAMPLE)
    assert left.value.code not in (None, 0)
    assert re.search(said, f"{left.value.code}{capsys.readouterr().err}")
    assert all(path.read_bytes() == content for path, content in before.items())  # nothing of it is lost


@pytest.mark.parametrize("frames", [torch.full((2, 3, 3, 8, 8), 255.0), torch.full((2, 3, 3, 8, 8), -0.1)])
def test_pixels_that_are_not_between_0_and_1(frames, vdsm):
    """The library cannot know the likelihood; the examples, whose likelihood wants [0, 1], can."""
    plan = vdsm.replace(vdsm.PRESETS["tiny"]["clips"].sizes, encoder_channels=(4,), decoder_channels=(4,))
    network = vdsm.VDSM((3, 8, 8), plan)
    with pytest.raises(ValueError, match=r"frames: got values from .* to .*, expected all in \[0, 1\]"):
        elbo_terms(network.model, network.guide, frames)
