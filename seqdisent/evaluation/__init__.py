"""One call that evaluates a trained model: numbers, tables, pictures (extra ``metrics``; pictures: ``plot``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqdisent import _files
from seqdisent._checks import check_positive, is_integer
from seqdisent._random import kept_random_state
from seqdisent.datasets import Clips
from seqdisent.datasets._progress import progress
from seqdisent.evaluation._errors import measure_errors, measure_forecasts
from seqdisent.evaluation._judged import measure_judged, measure_probes, varied
from seqdisent.evaluation._pictures import SCALES, draw_pictures, true_continuation
from seqdisent.evaluation._programs import Programs, motion_numbers
from seqdisent.evaluation._report import Published, draw_confusion, page, plain, tables_of
from seqdisent.metrics import Judge, pick_donors, train_judge
from seqdisent.plotting import plot_error_over_time, save_gif, save_png

__all__ = ["Evaluation", "evaluate"]

NUMBERS = frozenset(
    [
        "held_out_clips", "mean_squared_error", "nats", "swapped / reconstruction", "motion_swapped / reconstruction",
        "roll_out / reconstruction", "nearest_true_clip", "forecast_error", "judge", "consistency", "swaps",
        "intervention_score", "entropies", "frechet", "confusion", "probes",
        "neighbours", "memorisation", "confidence", "combinations", "sampled_swaps",
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
    """

    numbers: dict[str, Any]
    pictures: dict[str, Tensor] = field(default_factory=dict)
    judge: Judge | None = None
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    def tables(self, *, beside: Published | None = None) -> str:
        """Return the numbers as tables in Markdown.

        Args:
            beside: published numbers for columns of their own, ``{name: {"consistency": {factor: per cent}}}``; for
                probes, "static" or "motion" in the place of "consistency".
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
        _files.write(folder / "report.html", page(title, tables, [path.name for path in pictures]).encode())
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
        if confusion := self.numbers.get("confusion", {}).get("identity"):
            written.append(draw_confusion(confusion, self.labels, folder / "confusion.png"))
        return written


@torch.no_grad()
def evaluate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    train: Clips,
    held_out: Clips,
    *,
    static: Sequence[str] = (),
    motion: Sequence[str] = (),
    emission: str | None = None,
    judge: Judge | int | None = 500,
    factors: Sequence[str] | None = None,
    candidates: Clips | None = None,
    forecast_steps: int | None = None,
    pictures: bool = True,
    sample: bool = False,
    history: bool = False,
    folder: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 64,
    **inputs: Any,
) -> Evaluation:
    """Evaluate a model and its guide on clips that training never saw.

    What is measured depends on what is known of the clips.

    - Always: errors of reconstructions and of roll-outs from the first step, beside the mean frame; the terms of the
      bound; pictures, where steps are pictures.
    - With a renderer (:class:`~seqdisent.datasets.Clips`): swaps in both directions against the true clip, forecasts
      against how the clip goes on, and, with `candidates`, which true clip is nearest to a swap.
    - With labels: probes of the latents, and what a judge sees in reconstructions, in clips from the prior and in
      swaps: accuracy, leakage, chance levels. Of clips from the prior, in the judge's features: Frechet distance,
      precision, recall, density and coverage, beside those of reconstructions and of real clips; whether they are
      copies of training clips; new combinations of factors. Swaps with the identity drawn from the prior are judged
      too (the field's protocol).

    Every clip is paired with a fixed donor of another identity, and of another motion where there is one. Latents are
    the posterior's means, clips from the prior are drawn. What a measure can and cannot show: :doc:`/metrics`.

    Args:
        model: a Pyro model, in the form that :func:`~seqdisent.generate` and :func:`~seqdisent.reconstruct` call.
        guide: its guide.
        train: the clips of the training: the mean frame is theirs, a judge and probes learn from them.
        held_out: clips that training never saw.
        static: the latents that say who; without them there are no swaps.
        motion: the latents that say what. A swap of the identity keeps them.
        emission: the site that is the clip; None for the model's last one.
        judge: a classifier of the true factors, or for how many steps one is trained, on `train`, where that has labels
            and its steps are pictures; None leaves out what needs a judge, and the probes.
        factors: the labels that a judge is trained on; None for all that differ between clips.
        candidates: every true clip there is to mistake a swapped one for, of the shape of the held-out clips.
        forecast_steps: how many steps a forecast adds; None for as many as a clip has, 0 for no forecasts.
        pictures: whether to draw any.
        sample: draw latents instead of using means, where a guide has no means (a flow, a class).
        history: whether the model reads the frames before each step, as in :func:`~seqdisent.reconstruct`.
        folder: where :meth:`Evaluation.save` writes all of it; None to write nothing.
        seed: of the donors, of one sample of the posterior, of clips from the prior, of judge and probes.
        batch_size: clips at a time.
        **inputs: further arguments of both programs.

    Returns:
        The :class:`Evaluation`. The random state is as before.

    Raises:
        TypeError: `static`, `motion` or `factors` is a string.
        ValueError: a site that model or guide does not have, or that is both static and motion; an emission whose mean
            has not the shape of the clips; candidates of another shape; factors that the clips have no label for; or a
            module in training mode.
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
    _check_programs(model, guide, static, motion)
    _check_clips(train, held_out, candidates, factors)
    check_positive(batch_size=batch_size)
    if forecast_steps is not None and (not is_integer(forecast_steps) or forecast_steps < 0):
        raise ValueError(f"forecast_steps: got {forecast_steps!r}, expected an integer >= 0, or None")
    if judge is not None and not isinstance(judge, int | Judge):
        raise TypeError(
            f"judge: got {type(judge).__name__}, expected a Judge, a number of steps to train one, or None; "
            "predictions of another classifier go into seqdisent.metrics.SwapAccuracy"
        )
    programs = Programs(model, guide, tuple(static), tuple(motion), emission, sample, history, inputs)
    shape, num_steps = held_out.frames.shape[2:], int(held_out.lengths.max())
    are_pictures = len(shape) == 3 and shape[0] in (1, 3)
    labels = [name for name in varied(train) if name in held_out.labels] if judge is not None else []
    with kept_random_state():
        programs = programs.looked_at(held_out)
        more = (num_steps if forecast_steps is None else forecast_steps) if programs.can_forecast else 0
        donors = None
        if held_out.num_identities > 1:
            donors = pick_donors(held_out.identity, motion_numbers(held_out), seed=seed)
        torch.manual_seed(seed)
        numbers = measure_errors(programs, train, held_out, donors, candidates, batch_size)
        of_one_length = int(held_out.lengths.min()) == num_steps
        if more and of_one_length and true_continuation(held_out, torch.arange(1), num_steps + more) is not None:
            numbers["forecast_error"] = measure_forecasts(programs, train, held_out, more, batch_size)
        if isinstance(judge, int):
            can_judge = bool(labels) and are_pictures and shape[1] == shape[2]
            judge = _train_judge(train, held_out, factors or labels, seed, judge) if can_judge else None
        if judge is not None:
            numbers |= measure_judged(programs, train, held_out, donors, judge, seed, batch_size)
        if labels and (static or motion):
            numbers["probes"] = measure_probes(programs, train, held_out, labels, seed, batch_size)
        drawn = {}
        if pictures and are_pictures:
            drawn = draw_pictures(programs, held_out, seed, more)
    known = {} if judge is None else {name: held_out.factor_names[name] for name in judge.num_classes}
    roles = {name: "static" for name in programs.static[:1]} | {name: "motion" for name in programs.motion[:1]}
    found = Evaluation(plain(numbers), drawn, judge, known, roles)
    if folder is not None:
        found.save(folder)
    return found


def _check_programs(model: Any, guide: Any, static: Sequence[str], motion: Sequence[str]) -> None:
    for argument, program in (("model", model), ("guide", guide)):
        module = getattr(program, "__self__", program)
        if isinstance(module, nn.Module) and module.training:
            raise ValueError(f"{argument}: {type(module).__name__} is in training mode, expected .eval() before")
    for argument, sites in (("static", static), ("motion", motion)):
        if isinstance(sites, str):
            raise TypeError(f"{argument}: got the string {sites!r}, expected a sequence of site names")
    if both := sorted(set(static) & set(motion)):
        raise ValueError(f"motion: {both} are in `static` too, expected each site in one of the two")


def _check_clips(train: Clips, held_out: Clips, candidates: Clips | None, factors: Sequence[str] | None) -> None:
    shape, num_steps = tuple(held_out.frames.shape[2:]), int(held_out.lengths.max())
    if candidates is not None and bool((held_out.lengths == num_steps).all()):  # else there is no retrieval
        lengths = sorted(set(candidates.lengths.tolist()))
        if lengths != [num_steps] or tuple(candidates.frames.shape[2:]) != shape:
            raise ValueError(
                f"candidates: have lengths {lengths} and steps of shape {tuple(candidates.frames.shape[2:])}, expected "
                f"{num_steps} and {shape}, as the held-out clips"
            )
    if isinstance(factors, str):
        raise TypeError(f"factors: got the string {factors!r}, expected a sequence of labels")
    known = sorted(set(train.labels) & set(held_out.labels))
    if unknown := sorted(set(factors or ()) - set(known)):
        raise ValueError(f"factors: the clips have no label {unknown}, expected some of {known}")


def _train_judge(train: Clips, held_out: Clips, factors: Sequence[str], seed: int, num_steps: int) -> Judge:
    check_positive(judge=num_steps)
    steps = iter(progress(range(num_steps), "judge"))
    how: dict[str, Any] = {"factors": factors, "seed": seed, "num_steps": num_steps}
    with torch.enable_grad():
        return train_judge(train, held_out, **how, on_step=lambda *_: next(steps, None))
