"""Errors against the sequences themselves, and against true swaps and continuations where a renderer knows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqdisent.datasets import Clips, Sequences
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.evaluation._programs import (
    Programs,
    batches,
    frozen_step,
    mean_frame,
    measured_steps,
    true_frames,
)
from seqdisent.inference.elbo import elbo_terms
from seqdisent.metrics import nearest_clip, squared_error
from seqdisent.metrics._draws import known_places

ERRORS = ("reconstruction", "swapped", "motion_swapped", "roll_out", "mean_frame", "mean_step")


def measure_errors(
    programs: Programs,
    train: Sequences,
    held_out: Sequences,
    donors: Tensor | None,
    candidates: Clips | None,
    batch_size: int,
) -> dict[str, Any]:
    """Measure each sequence's reconstruction, roll-out and true swaps, and the terms of its bound at one sample.

    A roll-out has the sequence's own latents, of every trajectory only the first step, and goes on from there by
    itself.
    """
    mean, are_pixels = mean_frame(train), isinstance(held_out, Clips)
    measured: dict[str, list[Tensor]] = {}
    swaps, truths = [], []
    for rows, batch in batches(held_out, batch_size):
        given = frames_and_mask(batch)
        found = {"reconstruction": programs.reconstruct(*given)}
        first_steps = programs.first_steps(programs.infer(*given))
        found["roll_out"] = programs.generate(len(rows), batch.frames.shape[1], first_steps, batch.covariates)
        found["mean_frame" if are_pixels else "mean_step"] = mean.expand_as(batch.frames)
        truth = programs.in_units(batch.frames)
        values = {
            name: squared_error(programs.in_units(guess), truth, batch.mask, batch.observed, are_pixels=are_pixels)
            for name, guess in found.items()
        }
        if programs.static and donors is not None and isinstance(held_out, Clips) and held_out.renderer is not None:
            donor = held_out.batch(donors[rows])
            swapped, mask = programs.swap_static(batch, donor)
            shown = true_frames(held_out, donors[rows], rows)[:, : swapped.shape[1]]
            values["swapped"] = squared_error(swapped, shown, mask & held_out.mask[rows][:, : swapped.shape[1]])
            swaps.append(swapped)
            truths.append(shown)
            if programs.motion:
                moved, mask = programs.swap(batch, donor, programs.motion)
                moved_truth = true_frames(held_out, rows, donors[rows])[:, : moved.shape[1]]
                known = held_out.mask[donors[rows]][:, : moved.shape[1]]  # the truth ends with the motion
                values["motion_swapped"] = squared_error(moved, moved_truth, mask & known)
        terms = elbo_terms(programs.model, programs.guide, *given, **programs.inputs)
        values |= {f"KL({site})": term for site, term in terms.kl.items()}
        values |= {f"log_p({site})": term for site, term in terms.log_likelihood.items()}
        for name, value in values.items():
            if value.ndim == 0:  # outside of the plate: all sequences share it
                value = (value / len(held_out)).expand(len(rows))
            measured.setdefault(name, []).append(value)
    means = {name: torch.cat(values).mean().double() for name, values in measured.items()}
    errors = {name: means.pop(name) for name in ERRORS if name in means}
    counted = {"held_out_clips" if are_pixels else "held_out_sequences": len(held_out)}
    numbers: dict[str, Any] = {**counted, "mean_squared_error": errors, "nats": means}
    for name in ("swapped", "motion_swapped", "roll_out"):
        if name in errors:
            numbers[f"{name} / reconstruction"] = errors[name] / errors["reconstruction"]
    if not isinstance(held_out, Clips):
        given_in, undone = ("data set", "data set") if programs.scaler is None else ("scaled", "before scaling")
        numbers["units"] = {"errors": undone, "nats": given_in}
        bound = sum(-value if name.startswith("KL(") else value for name, value in means.items())
        numbers["bound_per_step"] = bound * len(held_out) / measured_steps(held_out).sum()
    elif swaps and donors is not None and candidates is not None and (held_out.lengths == swaps[0].shape[1]).all():
        numbers["nearest_true_clip"] = _retrieval(torch.cat(swaps), torch.cat(truths), held_out, donors, candidates)
    return numbers


def _retrieval(swaps: Tensor, truths: Tensor, clips: Clips, donors: Tensor, candidates: Clips) -> dict[str, Any]:
    """Return how often the true clip that is nearest to a swapped one is the right one, and has the right factors."""
    frames, scale = candidates.frames[:, : swaps.shape[1]], candidates.scale
    found = nearest_clip(swaps, frames if scale == 255 else frames.float() / scale)  # bytes: a fourth of the memory
    right = {"clip": (frames[found].float() / scale == truths).flatten(1).all(1)}
    for name, labels in clips.labels.items():
        if name in candidates.labels:
            wanted = labels[donors] if name in clips.static_factors else labels
            right[name] = candidates.labels[name][found] == wanted
    return {"of": len(candidates), **{name: values.double().mean() for name, values in right.items()}}


def measure_forecasts(
    programs: Programs, train: Clips, held_out: Clips, num_steps: int, batch_size: int
) -> dict[str, Any]:
    """Measure forecasts of all held-out clips step by step, beside their last frame, frozen, and the mean frame."""
    given, mean = int(held_out.lengths.max()), mean_frame(train)
    errors: dict[str, list[Tensor]] = {"forecast": [], "last frame, frozen": [], "mean frame": []}
    for rows, batch in batches(held_out, batch_size):
        truth = true_frames(held_out, rows, rows, given + num_steps)
        predicted = programs.forecast(*frames_and_mask(batch), num_steps=num_steps)
        seen = torch.where(known_places(batch.frames, None, batch.observed), batch.frames, mean)
        frozen = torch.cat([seen, frozen_step(batch, num_steps, mean)], 1)
        guesses = (predicted, frozen, mean.expand_as(predicted))
        for name, guess in zip(errors, guesses, strict=True):
            errors[name].append((guess - truth).square().flatten(2).mean(-1))
    return {"given": given, **{name: torch.cat(values).mean(0) for name, values in errors.items()}}
