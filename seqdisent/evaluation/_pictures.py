"""Pictures of held-out clips, their swaps, their continuations, and clips from the prior."""

from __future__ import annotations

import torch
from torch import Tensor

from seqdisent.datasets import Clips
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.evaluation._programs import Programs, motion_numbers, true_frames
from seqdisent.plotting import film_strip, swap_table

SCALES = {"reconstructions.png": 2, "prior_samples.png": 2, "swaps.gif": 2}  # how much larger they are written


def draw_pictures(programs: Programs, clips: Clips, seed: int, forecast_steps: int) -> dict[str, Tensor]:
    """Return {name of the file: a picture, or the pictures of an animation}."""
    spread = torch.linspace(0, len(clips) - 1, min(6, len(clips))).long()
    batch = clips.batch(spread)
    pairs = torch.stack([batch.frames, programs.reconstruct(*frames_and_mask(batch))], 1).flatten(0, 1)
    seen = batch.observed
    observed = None if seen is None else torch.stack([seen, torch.ones_like(seen)], 1).flatten(0, 1)
    pictures = {"reconstructions.png": film_strip(pairs, mask=batch.mask.repeat_interleave(2, 0), observed=observed)}
    if programs.static:
        table = swap_all(programs, clips, *_different(clips, seed))
        moments = table[torch.linspace(0, len(table) - 1, 4).long()]
        pictures |= {"swaps.png": film_strip(moments[None], gap=8), "swaps.gif": table}
    torch.manual_seed(seed)
    num_steps = int(clips.lengths.max())
    drawn = programs.generate(8, num_steps)
    real = _blank_padding(batch.frames[:4], batch.mask[:4])[:, :num_steps]
    pictures["prior_samples.png"] = film_strip(torch.cat([real, torch.ones_like(real[:1]), drawn]))
    if forecast_steps:
        given = [None if of is None else of[:4] for of in frames_and_mask(batch)]
        rows = programs.forecast(*given, num_steps=forecast_steps)
        truth = true_continuation(clips, spread[:4], rows.shape[1])
        if truth is not None:
            rows = torch.stack([truth, rows], 1).flatten(0, 1)
        pictures["forecast.png"] = film_strip(rows)
    return pictures


def true_continuation(clips: Clips, rows: Tensor, num_steps: int) -> Tensor | None:
    """Return the true frames of clips and of what follows, or None where the data end with the clip."""
    if clips.renderer is None:
        return None
    try:
        return true_frames(clips, rows, rows, num_steps)
    except ValueError:
        return None


def swap_all(programs: Programs, clips: Clips, who: Tensor, what: Tensor) -> Tensor:
    """Return the table of pictures, step by step, in which clip `who[i]`'s identity does what clip `what[j]` does."""
    pairs = torch.cartesian_prod(who, what)
    source, donor = clips.batch(pairs[:, 1]), clips.batch(pairs[:, 0])
    swapped = _blank_padding(*programs.swap_static(source, donor)).unflatten(0, (len(who), len(what)))
    static, motion = (_to_length(clips.batch(rows).frames, swapped.shape[2]) for rows in (who, what))
    return swap_table(static, motion, swapped)


def _different(clips: Clips, seed: int, *, num_identities: int = 5, num_motions: int = 6) -> tuple[Tensor, Tensor]:
    """Return clips of different identities, and clips of different motions."""
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))
    motion = motion_numbers(clips)
    labels = torch.arange(len(clips)) if motion is None or len(motion.unique()) < num_motions else motion

    def first_of_each(values: Tensor) -> Tensor:
        return torch.tensor([row for i, row in enumerate(order.tolist()) if values[row] not in values[order[:i]]])

    return first_of_each(clips.identity)[:num_identities], first_of_each(labels)[:num_motions]


def _blank_padding(frames: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None, None, None], frames, 0.0)


def _to_length(frames: Tensor, num_steps: int) -> Tensor:
    """Cut clips to `num_steps`, or repeat their last frame."""
    return frames[:, torch.arange(num_steps).clamp(max=frames.shape[1] - 1)]
