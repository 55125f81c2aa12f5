"""One call that evaluates a trained model: numbers, tables, pictures (extra ``metrics``; pictures: ``plot``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqdisent import _files
from seqdisent._checks import check_positive
from seqdisent._random import kept_random_state
from seqdisent.datasets import Clips, Scaler, Sequences
from seqdisent.datasets._progress import progress
from seqdisent.evaluation._checks import (
    check_data,
    check_judge,
    check_kind,
    check_labels,
    check_numbers,
    check_programs,
    check_units,
    has_holes,
)
from seqdisent.evaluation._errors import measure_errors, measure_forecasts
from seqdisent.evaluation._intervals import Panels, draw_intervals
from seqdisent.evaluation._judged import measure_judged, measure_probes, varied
from seqdisent.evaluation._pictures import SCALES, draw_pictures, true_continuation
from seqdisent.evaluation._programs import Programs, motion_numbers
from seqdisent.evaluation._report import Published, draw_confusion, page, plain, tables_of
from seqdisent.evaluation._series import Asked, measure_series
from seqdisent.evaluation._swapped import measure_swapped_labels
from seqdisent.metrics import Judge, pick_donors, train_judge
from seqdisent.plotting import plot_error_over_time, plot_intervals, save_gif, save_png

__all__ = ["Evaluation", "evaluate"]

NUMBERS = frozenset(
    [
        "held_out_clips", "mean_squared_error", "nats", "swapped / reconstruction", "motion_swapped / reconstruction",
        "roll_out / reconstruction", "nearest_true_clip", "forecast_error", "judge", "consistency", "swaps",
        "intervention_score", "entropies", "frechet", "confusion", "probes",
        "neighbours", "memorisation", "confidence", "combinations", "sampled_swaps",
        "held_out_sequences", "units", "bound_per_step", "imputation", "forecast", "swapped_labels",
    ]
)  # fmt: skip
"""The names of all that :func:`evaluate` can measure."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        numbers: all of them, in plain dicts, lists and numbers, as in ``metrics.json``; None where nothing is shown.
        pictures: {name of the file: pixels in [0, 1], (C, H, W), or (T, C, H, W) of an animation}; empty where steps
            are no pictures.
        judge: the classifier of the true factors; None where there was none.
        labels: {factor: what its values are called}, of those that the judge knows.
        roles: {latent: "static" or "motion"}, of the latents that were probed.
        intervals: {name of the file: what :func:`~seqdisent.plotting.plot_intervals` draws there}; of measurements
            alone.
    """

    numbers: dict[str, Any]
    pictures: dict[str, Tensor] = field(default_factory=dict)
    judge: Judge | None = None
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def tables(self, *, beside: Published | None = None) -> str:
        """Return the numbers as tables in Markdown.

        Args:
            beside: published numbers for columns of their own, ``{name: {"consistency": {factor: per cent}}}``; for
                probes of the first static and the first motion latent, "static" or "motion" in the place of
                "consistency".
        """
        return "\n\n".join(table.markdown() for table in tables_of(self.numbers, beside or {}, self.roles))

    def save(self, folder: str | Path, *, title: str = "Evaluation", beside: Published | None = None) -> list[Path]:
        """Write ``metrics.json``, ``report.md``, ``report.html``, the pictures, and the judge as ``judge.pt``.

        What ``metrics.json`` held before and is no number of an evaluation stays. Numbers of an earlier one go, also
        those that this one does not have.

        Args:
            folder: where to write.
            title: of the report.
            beside: as in :meth:`tables`.

        Returns:
            What was written.

        Raises:
            ImportError: Pillow or matplotlib is missing, for the pictures.
            ValueError: pictures or `intervals` that are none.
        """
        folder = Path(folder)
        numbers = folder / "metrics.json"
        before = json.loads(numbers.read_text()) if numbers.exists() else {}
        kept = {name: value for name, value in before.items() if name not in NUMBERS}
        _files.write(numbers, (json.dumps({**kept, **self.numbers}, indent=2) + "\n").encode())
        pictures = self._save_pictures(folder)
        written = [numbers, folder / "report.md", folder / "report.html", *pictures]
        if self.judge is not None:
            self.judge.save(folder / "judge.pt")
            written.append(folder / "judge.pt")
        tables = tables_of(self.numbers, beside or {}, self.roles)
        images = [f"![{path.name}]({path.name})" for path in pictures]
        text = [f"# {title}", *(table.markdown() for table in tables), "## Pictures", *images]
        _files.write(folder / "report.md", ("\n\n".join(text) + "\n").encode())
        _files.write(folder / "report.html", page(title, tables, {path.name: path.stem for path in pictures}).encode())
        return written

    def _save_pictures(self, folder: Path) -> list[Path]:
        written = []
        for name, picture in self.pictures.items():
            save = save_gif if name.endswith(".gif") else save_png
            written.append(save(picture, folder / name, scale=SCALES.get(name, 1)))
        if error := dict(self.numbers.get("forecast_error", {})):
            given = error.pop("given")
            lines = {name: torch.tensor(values) for name, values in error.items()}
            written.append(plot_error_over_time(lines, folder / "forecast_error.png", trained_on=given))
        written += [plot_intervals(path=folder / name, **panels) for name, panels in self.intervals.items()]
        if confusion := self.numbers.get("confusion", {}).get("identity"):
            written.append(draw_confusion(confusion, self.labels, folder / "confusion.png"))
        return written


@torch.no_grad()
def evaluate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    train: Sequences,
    held_out: Sequences,
    *,
    static: Sequence[str] = (),
    motion: Sequence[str] = (),
    emission: str | None = None,
    judge: Judge | int | None = 500,
    factors: Sequence[str] | None = None,
    candidates: Clips | None = None,
    forecast_steps: int | None = None,
    season: int | None = None,
    hidden: float | None = None,
    num_samples: int | None = None,
    scaler: Scaler | None = None,
    pictures: bool = True,
    sample: bool = False,
    history: bool = False,
    folder: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 64,
    **inputs: Any,
) -> Evaluation:
    """Evaluate a model and its guide on sequences that training never saw: clips, or measurements.

    What is measured depends on what is known of them. Of clips:

    - Always: errors of reconstructions and of roll-outs from the first step, beside the mean frame; the terms of the
      bound; pictures, where steps are pictures.
    - With a renderer (:class:`~seqdisent.datasets.Clips`): swaps in both directions against the true clip, forecasts
      against how the clip goes on, and, with `candidates`, which true clip is nearest to a swap.
    - With labels: probes of the latents, and what a judge sees in reconstructions, in clips from the prior and in
      swaps: accuracy, leakage, chance levels. Of clips from the prior, in the judge's features: Frechet distance,
      precision, recall, density and coverage, beside those of reconstructions and of real clips; whether they are
      copies of training clips; new combinations of factors. Swaps with the identity drawn from the prior are judged
      too (the field's protocol).

    Of other :class:`~seqdisent.datasets.Sequences`, over what is real and was observed alone:

    - Always: errors of reconstructions and roll-outs, beside the mean step; the terms of the bound, and the bound for
      each step at which something was measured.
    - With holes, or `hidden`: imputation of values that were measured and are hidden from the model, beside linear
      interpolation (over their `times`, if they have them) and the mean step. With `forecast_steps`: forecasts of the
      last steps from those before, beside the last step, frozen, the mean step, and, with `season`, the seasonal naive
      forecast. Squared error of the mean, CRPS, and coverage of intervals of draws; where steps are vectors, of each
      coordinate too.
    - With labels: probes of the latents, and whose label a swap shows to a linear classifier of each coordinate's mean
      and standard deviation.

    Every sequence is paired with a fixed donor of another identity, and of another motion where there is one. Latents
    are the posterior's means, sequences from the prior, forecasts and imputations are drawn. What a measure can and
    cannot show: :doc:`/metrics`.

    Args:
        model: a Pyro model, in the form that :func:`~seqdisent.generate` and :func:`~seqdisent.reconstruct` call. Where
            sequences have holes or covariates, both programs take ``(frames, mask, observed, covariates)``.
        guide: its guide.
        train: the sequences of the training: the mean step is theirs, a judge and probes learn from them. A label of
            both has the same `factor_names` in both, except with ``judge=None``.
        held_out: sequences that training never saw; :class:`~seqdisent.datasets.Clips` if `train` is. Clips may have
            holes, and no `covariates`.
        static: the latents that say who; without them there are no swaps.
        motion: the latents that say what. A swap of the identity keeps them.
        emission: the site that is the sequence; None for the model's last one.
        judge: a classifier of the true factors, or for how many steps one is trained, on `train`, where these are clips
            with labels and without holes whose steps are pictures; None leaves out all that needs labels.
        factors: the labels that a judge and probes learn; None for all that differ between sequences.
        candidates: every true clip there is to mistake a swapped one for, of the shape of the held-out clips. A label
            of both has the same `factor_names` in both. None for other sequences.
        forecast_steps: how many steps a forecast adds to a clip; None for as many as a clip has, if the model can, and
            0 for no forecasts. Of other sequences, how many of their last steps are held back and forecast; None for
            none.
        season: steps of a season, for the seasonal naive forecast beside `forecast_steps`; None leaves it out. Not for
            clips.
        hidden: share of what was measured that is hidden and imputed, at random, by step, or by value where `observed`
            is by value; the programs then take `observed`. 0 for no imputation; None for 0.15 where the held-out
            sequences have holes, and else 0. Not for clips.
        num_samples: draws of each forecast and each imputation, at least 2; None for 100. Not for clips.
        scaler: by which `train` and `held_out` were scaled; errors, scores and pictures are then in the units before.
            The terms of the bound stay those of the scaled values. None for the units of the data sets. Not for clips.
        pictures: whether to draw any.
        sample: draw latents instead of using means, where a guide has no means (a flow, a class).
        history: whether the model reads the frames before each step, as in :func:`~seqdisent.reconstruct`.
        folder: where :meth:`Evaluation.save` writes all of it; None to write nothing.
        seed: of the donors, of one sample of the posterior, of all draws, of what is hidden, of judge and probes.
        batch_size: sequences at a time.
        **inputs: further arguments of both programs.

    Returns:
        The :class:`Evaluation`. The random state is as before.

    Raises:
        TypeError: `static`, `motion` or `factors` is a string; only one of `train` and `held_out` is clips; `judge` is
            something else, or a Judge for sequences that are no clips; `scaler` is no Scaler.
        ValueError: a site that model or guide does not have, or that is both static and motion; an emission whose mean
            has not the shape of the sequences, or, to impute, as of :func:`~seqdisent.impute`; candidates of another
            shape; factors that the clips have no label for; a label whose values have other names in `train` or
            `candidates` than in `held_out`; clips with `covariates`; a Judge, or `candidates`, with holes; a number out
            of range; `forecast_steps` that leave no sequence, or of a model that carries nothing into the future;
            `season` without `forecast_steps`; `hidden` that hides nothing; a `scaler` of other steps; `columns` that
            differ between `train` and `held_out`; an argument that is not for clips, with clips, or `candidates`
            without; `factors` without a judge; or a module in training mode.
        ImportError: an extra is missing; the message names it.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from seqdisent import batch_sizes
        >>> def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        ...     num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        ...     with pyro.plate("sequences", num_sequences):
        ...         level = pyro.sample("level", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         grey = level[:, :, None, None, None].expand(-1, num_steps, 1, 8, 8)
        ...         pyro.sample("x", dist.Normal(grey, 0.1).to_event(4), obs=frames)
        >>> def guide(frames, mask=None):
        ...     with pyro.plate("sequences", len(frames)):
        ...         pyro.sample("level", dist.Normal(frames.mean((1, 2, 3, 4))[:, None], 0.1).to_event(1))
        >>> grey = 60 * torch.arange(4, dtype=torch.uint8)
        >>> clips = Clips(grey[:, None, None, None, None].expand(4, 3, 1, 8, 8))
        >>> found = evaluate(model, guide, clips, clips, static=["level"])
        >>> round(found.numbers["mean_squared_error"]["reconstruction"], 6), sorted(found.pictures)
        (0.0, ['forecast.png', 'prior_samples.png', 'reconstructions.png', 'swaps.gif', 'swaps.png'])
    """
    check_programs(model, guide, static, motion)
    check_numbers(forecast_steps, season, hidden, num_samples, batch_size)
    check_kind(held_out, candidates, forecast_steps, season, hidden, num_samples, scaler)
    check_data(train, held_out, candidates)
    check_units(train, held_out, scaler)
    check_judge(judge, train, held_out)
    check_labels(train, held_out, candidates, judge, factors)
    programs = Programs(model, guide, tuple(static), tuple(motion), emission, sample, history, inputs, scaler)
    labels = list(factors or [name for name in varied(train) if name in held_out.labels]) if judge is not None else []
    drawn: dict[str, Tensor] = {}
    intervals: dict[str, Panels] = {}
    with kept_random_state():
        programs = programs.looked_at(held_out)
        if forecast_steps and not programs.can_forecast:
            raise ValueError(
                f"forecast_steps: got {forecast_steps}, expected 0 or None for a model that carries nothing into the "
                "future"
            )
        donors = None
        if held_out.num_identities > 1:
            donors = pick_donors(held_out.identity, motion_numbers(held_out), seed=seed)
        torch.manual_seed(seed)
        numbers = measure_errors(programs, train, held_out, donors, candidates, batch_size)
        are_pictures, more = False, 0
        if isinstance(train, Clips) and isinstance(held_out, Clips):
            shape, num_steps = held_out.frames.shape[2:], int(held_out.lengths.max())
            are_pictures = len(shape) == 3 and shape[0] in (1, 3)
            more = (num_steps if forecast_steps is None else forecast_steps) if programs.can_forecast else 0
            of_one_length = int(held_out.lengths.min()) == num_steps
            if more and of_one_length and true_continuation(held_out, torch.arange(1), num_steps + more) is not None:
                numbers["forecast_error"] = measure_forecasts(programs, train, held_out, more, batch_size)
            if isinstance(judge, int):
                can_judge = bool(labels) and are_pictures and shape[1] == shape[2] and not has_holes(train, held_out)
                judge = _train_judge(train, held_out, labels, seed, judge) if can_judge else None
            if judge is not None:
                numbers |= measure_judged(programs, train, held_out, donors, judge, seed, batch_size)
        else:
            judge = None
            asked = Asked(forecast_steps or 0, season, hidden, num_samples or 100, seed, batch_size)
            numbers |= measure_series(programs, train, held_out, asked)
            intervals = draw_intervals(programs, held_out, asked) if pictures else {}
            if labels and static and donors is not None:
                numbers["swapped_labels"] = measure_swapped_labels(
                    programs, train, held_out, donors, labels, seed, batch_size
                )
        if labels and (static or motion):
            numbers["probes"] = measure_probes(programs, train, held_out, labels, seed, batch_size)
        if pictures and isinstance(held_out, Clips) and are_pictures:
            drawn = draw_pictures(programs, held_out, seed, more)
    known = {} if judge is None else {name: held_out.factor_names[name] for name in judge.num_classes}
    roles = dict.fromkeys(programs.static, "static") | dict.fromkeys(programs.motion, "motion")
    found = Evaluation(plain(numbers), drawn, judge, known, roles, intervals)
    if folder is not None:
        found.save(folder)
    return found


def _train_judge(train: Clips, held_out: Clips, factors: Sequence[str], seed: int, num_steps: int) -> Judge:
    check_positive(judge=num_steps)
    steps = iter(progress(range(num_steps), "judge"))
    how: dict[str, Any] = {"factors": factors, "seed": seed, "num_steps": num_steps}
    with torch.enable_grad():
        return train_judge(train, held_out, **how, on_step=lambda *_: next(steps, None))
