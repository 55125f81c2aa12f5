"""`evaluate RUN`: every measure of `seqdisent.metrics` on a finished run, as tables beside the paper's numbers.

It writes into the run folder:

    judge.pt              the classifier of the true factors, trained on real clips of the training identities
    metrics.json          the numbers that the run ended with, and all of these
    report.md, .html      tables and pictures
    confusion.png         what the judge sees in clips with another's identity, factor by factor
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from run_folder import EMISSION, Example
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor, nn
from tqdm import tqdm

from seqdisent import generate, infer, reconstruct, swap
from seqdisent.datasets import Batch, Clips
from seqdisent.metrics import (
    AccuracyConsistency,
    FrechetDistance,
    GenerationEntropies,
    Judge,
    SwapAccuracy,
    intervention_score,
    probe_table,
    squared_error,
    train_judge,
)
from seqdisent.training import frames_and_mask

PROBED_CLIPS = 2000  # training clips that probes learn from
JUDGE_STEPS = 500
PRODUCTS = {"motion"}  # labels made of others: probed for, but counted in no average

# Vowels et al., tables 1 and 2: consistency, from the identity's embedding, from the dynamics', in per cent
PAPER = {
    "sprites": {
        "body": (99.67, 98.67, 52.67),
        "shirt": (99.67, 99.67, 47.33),
        "pants": (99.00, 97.67, 31.67),
        "hair": (100.00, 99.33, 21.00),
        "action": (99.33, 45.00, 99.33),
        "average": (99.53, None, None),
    }
}


def find_judge(train: Clips, held_out: Clips, path: Path, *, seed: int, num_steps: int | None) -> Judge:
    """Return the judge of an earlier evaluation of these clips, or train one, as always if `num_steps` is given."""
    factors = [name for name in _varied(train) if name not in PRODUCTS]
    if path.exists() and num_steps is None:
        judge = Judge.load(path)
        wanted = {name: len(train.factor_names[name]) for name in factors}
        if judge.num_classes == wanted and judge.frame_shape == tuple(train.frames.shape[2:]):
            print(f"the judge is {path}, of an earlier evaluation")
            return judge
    num_steps = JUDGE_STEPS if num_steps is None else num_steps
    with tqdm(total=num_steps, desc="judge") as bar:
        judge = train_judge(
            train, held_out, factors=factors, seed=seed, num_steps=num_steps, on_step=lambda *_: bar.update()
        )
    judge.save(path)
    return judge


@torch.no_grad()
def measure(
    example: Example, network: nn.Module, train: Clips, held_out: Clips, judge: Judge, donors: Tensor, *, seed: int
) -> dict[str, Any]:
    """Measure on held-out clips, each with a fixed donor, at posterior means; what comes from the prior is sampled."""
    factors = judge.num_classes
    static, motion = (
        [name for name in of if name in factors] for of in (held_out.static_factors, held_out.motion_factors)
    )
    swaps = {
        # an identity is swapped under the clip's own motion, whatever the guide infers motion from
        "identity": (example.static, example.motion, SwapAccuracy(factors, static)),
        "motion": (example.motion, (), SwapAccuracy(factors, motion)),
    }
    consistency, errors = AccuracyConsistency(factors), {"reconstruction": [], **{name: [] for name in swaps}}
    entropies = {name: GenerationEntropies(factors) for name in ("real clips", "reconstruction", "prior")}
    distances = {
        name: FrechetDistance(judge.features, judge.num_features, "the judge's features") for name in entropies
    }
    for _, batch in _batches(_some(train, len(held_out), seed)):  # as many as are compared with them
        for distance in distances.values():
            distance.update(batch.frames, batch.mask, real=True)
    torch.manual_seed(seed)
    for rows, batch in tqdm(list(_batches(held_out)), desc="held-out clips"):
        other = held_out.batch(donors[rows])
        given, donated = frames_and_mask(batch), frames_and_mask(other)
        found = reconstruct(network.model, network.guide, *given)[EMISSION].mean
        drawn = generate(network.model, num_sequences=len(rows), num_steps=batch.frames.shape[1])[EMISSION].mean
        said = {}
        for name, clips in zip(distances, (batch.frames, found, drawn), strict=True):
            said[name] = judge(clips, batch.mask)
            entropies[name].update(said[name])
            distances[name].update(clips, batch.mask, real=False)
        consistency.update(said["real clips"], said["reconstruction"])
        errors["reconstruction"].append(squared_error(found, batch.frames, batch.mask))
        for name, (sites, keep, accuracy) in swaps.items():
            swapped = swap(network.model, network.guide, given, donated, sites=sites, keep=keep)[EMISSION].mean
            mask = batch.mask if name == "identity" else other.mask  # the chain brings its length with it
            accuracy.update(judge(swapped, mask), batch.labels, other.labels)
            if held_out.renderer is not None:
                truth = held_out.true_swap(*((donors[rows], rows) if name == "identity" else (rows, donors[rows])))
                errors[name].append(squared_error(swapped, truth, mask))
    scores = {name: accuracy.compute() for name, (*_, accuracy) in swaps.items()}
    agreement = consistency.compute()
    probed = [
        _latents(example, network, clips, _varied(train)) for clips in (_some(train, PROBED_CLIPS, seed), held_out)
    ]
    return {
        "judge": judge.accuracy,
        "consistency": {**agreement.agreement, "average": agreement.average},
        "swaps": {name: {factor: score._asdict() for factor, score in of.items()} for name, of in scores.items()},
        "intervention_score": intervention_score(list(scores.values())) if static else None,
        "error_over_reconstruction": {
            name: torch.cat(values).mean() / torch.cat(errors["reconstruction"]).mean()
            for name, values in errors.items()
            if values and name != "reconstruction"
        },
        "probes": {
            kind: {
                latent: {factor: score._asdict() for factor, score in of.items()}
                for latent, of in probe_table(*probed[0], *probed[1], kind=kind, seed=seed).items()
            }
            for kind in ("linear", "mlp")
        },
        "entropies": {
            name: {factor: score._asdict() for factor, score in metric.compute().items()}
            for name, metric in entropies.items()
        },
        "frechet": {name: metric.compute()._asdict() for name, metric in distances.items()},
        "confusion": {name: accuracy.confusion() for name, (*_, accuracy) in swaps.items()},
    }


def plain(measured: Any) -> Any:
    """Return tensors as numbers and lists, for JSON; what no pair of clips can show is null, not NaN."""
    if isinstance(measured, Tensor):
        return plain(measured.tolist())
    if isinstance(measured, float) and math.isnan(measured):
        return None
    if isinstance(measured, Mapping):
        return {name: plain(value) for name, value in measured.items()}
    return [plain(value) for value in measured] if isinstance(measured, list) else measured


def _batches(clips: Clips, size: int = 64) -> Iterator[tuple[Tensor, Batch]]:
    for rows in torch.arange(len(clips)).split(size):
        yield rows, clips.batch(rows)


def _some(clips: Clips, count: int, seed: int) -> Clips:
    return clips.subset(torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))[:count])


def _varied(clips: Clips) -> list[str]:
    return [name for name, label in clips.labels.items() if len(label.unique()) > 1]


def _latents(
    example: Example, network: nn.Module, clips: Clips, factors: list[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the posterior means of the first sites of who and what (VDSM: s and d), and the clips' labels.

    A trajectory is all its steps in a row, 0 where a clip has ended.
    """
    parts: dict[str, list[Tensor]] = {example.static[0]: [], example.motion[0]: []}
    for _, batch in tqdm(list(_batches(clips)), desc="latents"):
        found = infer(network.guide, *frames_and_mask(batch))
        for name, values in parts.items():
            value = found[name].value
            if value.ndim == 3:
                real = torch.where(batch.mask.unsqueeze(-1), value, 0.0)
                value = nn.functional.pad(real, (0, 0, 0, clips.frames.shape[1] - value.shape[1])).flatten(1)
            values.append(value)
    return {name: torch.cat(values) for name, values in parts.items()}, {name: clips.labels[name] for name in factors}


# The report


def write_report(measured: Mapping[str, Any], data: str, clips: Clips, run: Path) -> list[Path]:
    """Write report.md, report.html and the confusion matrices."""
    written = [_draw_confusion(measured["confusion"]["identity"], clips, run / "confusion.png")]
    text = "\n\n".join([f"# {run.name}: {data}", *tables(measured, data), *_pictures(run)]) + "\n"
    (run / "report.md").write_text(text)
    page = MarkdownIt("commonmark").enable("table").render(text)
    (run / "report.html").write_text(f"<!doctype html>\n<meta charset='utf-8'>\n<style>{_STYLE}</style>\n{page}")
    return [*written, run / "report.md", run / "report.html"]


_STYLE = """body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #bbb;padding:.2em .6em;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}"""


def tables(measured: Mapping[str, Any], data: str) -> list[str]:
    """Return the report's tables as Markdown."""
    paper = PAPER.get(data, {})
    consistency = dict(measured["consistency"])
    if paper:  # its average is over these
        consistency["average"] = sum(float(consistency[name]) for name in paper if name != "average") / (len(paper) - 1)
    beside = ["VDSM (paper)"] if paper else []

    def papers(factor: str, column: int) -> list[str]:
        return [_plain(paper.get(factor, (None,) * 3)[column])] if paper else []

    parts = ["## Judge and accuracy consistency", _table(
        ["factor", "judge on real held-out clips, %", "same answer for clip and reconstruction, %", *beside],
        [
            [name, _per_cent(measured["judge"].get(name)), _per_cent(value), *papers(name, 0)]
            for name, value in consistency.items()
        ],
    )]  # fmt: skip
    for direction, scores in measured["swaps"].items():
        parts += [f"## Swap: {direction} from the donor", _table(
            ["factor", "should be", "accuracy, %", "constant guess, %", "leakage, %", "constant guess, %"],
            [
                [
                    name, "the donor's" if score["follows"] else "the source's",
                    *(_per_cent(score[key]) for key in ("accuracy", "chance", "leakage", "leakage_chance")),
                ]
                for name, score in scores.items()
            ],
        )]  # fmt: skip
    if measured["error_over_reconstruction"]:
        rows = [
            [f"{name} from the donor", f"{ratio:.3f}"] for name, ratio in measured["error_over_reconstruction"].items()
        ]
        parts += [
            "## Against the true swapped clip",
            _table(["swap", "squared error over that of reconstruction"], rows),
        ]
    if measured["intervention_score"] is not None:
        parts.append(f"Intervention score: {measured['intervention_score']:.4f}")
    for kind, latents in measured["probes"].items():
        rows = []
        for name in next(iter(latents.values())):
            row = [name]
            for column, scores in enumerate(latents.values(), 1):
                unfinished = "" if scores[name]["converged"] else " (not converged)"
                row += [_per_cent(scores[name]["accuracy"]) + unfinished, *papers(name, column)]
            rows.append([*row, _per_cent(next(iter(latents.values()))[name]["chance"])])
        header = [cell for latent in latents for cell in (f"from {latent}, %", *beside)]
        parts += [f"## Probes, {kind}", _table(["factor", *header, "constant guess, %"], rows)]
    rows = [
        [kind, name, *(f"{score[key]:.3f}" for key in ("inter", "intra", "inception_score"))]
        for kind, scores in measured["entropies"].items()
        for name, score in scores.items()
    ]
    parts += ["## Entropies of the judge's predictions, nats", _table(
        ["clips", "factor", "inter-entropy H(y)", "intra-entropy H(y given x)", "inception score"], rows
    )]  # fmt: skip
    extractor = next(iter(measured["frechet"].values()))["extractor"]
    parts += [f"## Frechet distance in {extractor}", _table(
        ["clips, against as many real training clips", "distance"],
        [[name, f"{score['distance']:.3f}"] for name, score in measured["frechet"].items()],
    )]  # fmt: skip
    return parts


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _per_cent(share: Any) -> str:
    return "" if share is None else f"{100 * float(share):.2f}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _pictures(run: Path) -> list[str]:
    names = ("swaps.png", "swaps.gif", "reconstructions.png", "prior_samples.png", "confusion.png")
    return ["## Pictures", *(f"![{name}]({name})" for name in names if (run / name).exists())]


def _draw_confusion(matrices: Mapping[str, Tensor], clips: Clips, path: Path) -> Path:
    figure = Figure(figsize=(4 * len(matrices), 4), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)
    for axis, (name, counts) in zip(axes[0], matrices.items(), strict=True):
        ConfusionMatrixDisplay(counts.cpu().numpy(), display_labels=clips.factor_names[name]).plot(
            ax=axis, colorbar=False, xticks_rotation=90, text_kw={"fontsize": 7}
        )
        axis.set(title=name, xlabel="judged", ylabel="should be")
    figure.suptitle("Identity from the donor")
    figure.savefig(path, dpi=120)
    return path
