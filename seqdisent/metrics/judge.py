"""The judge: a frozen classifier of the ground-truth factors of a clip, trained on real clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqdisent import _files
from seqdisent._checks import check_kind, check_pixel_dtype, check_positive, check_scale
from seqdisent._random import kept_random_state
from seqdisent.masks import check_mask
from seqdisent.metrics._predictions import check_classes
from seqdisent.metrics.counterfactual import check_pixels

if TYPE_CHECKING:
    from seqdisent.datasets.sequences import Sequences


class Judge(nn.Module):
    r"""A classifier of every factor of a clip, such as identity and motion.

    Strided 3x3 convolutions (LeakyReLU) and a linear layer map each frame to `frame_dim` values. A bidirectional GRU
    reads these in order, since a motion and its reverse have the same frames. The features of a clip are the averages,
    over its real frames, of the frames' values and of the GRU's outputs. One linear layer maps them to the logits of
    all factors. There are no batch statistics, so the logits of a clip do not depend on other clips.

    Args:
        num_classes: {factor: number of classes}.
        in_channels: colour channels of the image.
        image_size: height and width in pixels.
        channels: output channels of each convolution; each convolution halves the image, rounding up.
        frame_dim: number of values per frame.
        hidden_dim: hidden size of the GRU, per direction.
        network: for steps that are no pictures, what maps them, (M, \*E), to (M, frame_dim), in place of the
            convolutions; `in_channels`, `image_size` and `channels` are then of no account.

    Attributes:
        accuracy: {factor: accuracy on held-out clips}, in [0, 1]; empty unless :func:`train_judge` made the judge.
            Report it beside the judge's scores.
        num_features: size of :meth:`features`.

    Shape:
        - frames: (N, T, C, H, W), floating point in [0, 1], or (N, T, \*E) of any values with a `network`; computed in
          the parameters' dtype, under autocast too
        - mask: (N, T) bool, padding on the right; None if there is no padding
        - output: {factor: logits (N, K)}

    Raises:
        ValueError: no factors, a factor without classes, frames or a mask of another shape or on another device,
            pictures whose mean is more than 0.5 outside [0, 1], or a network whose values have another shape.
        TypeError: frames that are not floating point, or outside autocast not of the parameters' dtype.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> judge = Judge({"hair": 6, "action": 3}, image_size=16, channels=(4, 4))
        >>> {factor: tuple(logits.shape) for factor, logits in judge(torch.rand(2, 5, 3, 16, 16)).items()}
        {'hair': (2, 6), 'action': (2, 3)}
    """

    def __init__(
        self,
        num_classes: Mapping[str, int],
        *,
        in_channels: int = 3,
        image_size: int = 64,
        channels: Sequence[int] = (16, 32, 48, 64),
        frame_dim: int = 128,
        hidden_dim: int = 64,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = check_classes(num_classes)
        check_positive(in_channels=in_channels, image_size=image_size, frame_dim=frame_dim, hidden_dim=hidden_dim)
        check_positive(**{f"channels[{i}]": count for i, count in enumerate(channels)})
        self.frame_shape = None if network is not None else (in_channels, image_size, image_size)
        self.channels, self.frame_dim, self.hidden_dim = tuple(channels), frame_dim, hidden_dim
        self.num_features = frame_dim + 2 * hidden_dim
        self.accuracy: dict[str, float] = {}
        self.frame_encoder = _convolutions(in_channels, image_size, channels, frame_dim) if network is None else network
        self.gru = nn.GRU(frame_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.heads = nn.Linear(self.num_features, sum(self.num_classes.values()))

    def extra_repr(self) -> str:
        """Return the factors and the accuracies."""
        return f"num_classes={self.num_classes}, accuracy={self.accuracy}"

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits of each factor."""
        features = self.features(frames, mask)
        with torch.autocast(features.device.type, enabled=False):
            logits = self.heads(features).split(list(self.num_classes.values()), -1)
        return dict(zip(self.num_classes, logits, strict=True))

    def features(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features (N, num_features) of frames and a mask, the input of the last layer."""
        fits = frames.ndim > 2 if self.frame_shape is None else tuple(frames.shape[2:]) == self.frame_shape
        if not fits or 0 in frames.shape[:2]:
            shape = "*E" if self.frame_shape is None else ", ".join(map(str, self.frame_shape))
            raise ValueError(f"frames: has shape {tuple(frames.shape)}, expected (N, T, {shape})")
        check_pixel_dtype(frames)
        check_kind("frames", frames, self.heads.weight)
        if mask is None:
            mask = frames.new_ones(frames.shape[:2], dtype=torch.bool)
        mask = check_mask(mask, frames.shape[:1], frames.shape[1], frames.device)
        frames = frames[mask].to(self.heads.weight.dtype)
        if self.frame_shape is not None:
            check_pixels("frames", frames)
            frames = frames - 0.5
        # in full precision, so that scores do not depend on an enclosing autocast
        with torch.autocast(frames.device.type, enabled=False):
            real = self.frame_encoder(frames)
            if real.shape != (len(frames), self.frame_dim):
                raise ValueError(
                    f"network: returned shape {tuple(real.shape)} for {len(frames)} steps, expected "
                    f"({len(frames)}, {self.frame_dim}), frame_dim values each"
                )
            values = real.new_zeros(*mask.shape, self.frame_dim)
            values[mask] = real
            lengths = mask.sum(1)
            packed = pack_padded_sequence(values, lengths.cpu(), batch_first=True, enforce_sorted=False)
            outputs, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=mask.shape[1])
            return torch.cat([values, outputs], -1).sum(1) / lengths.unsqueeze(-1)

    def save(self, path: str | Path) -> None:
        """Write the judge and its accuracy, beside `path` first, so that a killed process never leaves half a file."""
        options: dict[str, object] = {"frame_dim": self.frame_dim, "hidden_dim": self.hidden_dim}
        if self.frame_shape is not None:
            options |= {
                "in_channels": self.frame_shape[0],
                "image_size": self.frame_shape[1],
                "channels": self.channels,
            }
        contents = {
            "num_classes": self.num_classes,
            "options": options,
            "accuracy": self.accuracy,
            "state": self.state_dict(),
        }
        _files.write_tensors(contents, Path(path), several_writers=True)

    @classmethod
    def load(cls, path: str | Path, *, network: nn.Module | None = None) -> Judge:
        """Read the judge that :meth:`save` wrote to `path`; it is frozen, and on the CPU.

        Args:
            path: the file.
            network: one of the same architecture, for a judge that had one; it gets the weights.

        Raises:
            ValueError: a judge with a network without one here, or the other way round.
        """
        contents = _files.read_tensors(Path(path))
        if ("image_size" in contents["options"]) == (network is not None):
            had, wanted = ("none", "None") if network is not None else ("one", "a network of the same architecture")
            raise ValueError(f"network: the judge in {path} had {had}, expected {wanted}")
        with kept_random_state():
            judge = cls(contents["num_classes"], **contents["options"], network=network)
        judge.load_state_dict(contents["state"])
        judge.accuracy = contents["accuracy"]
        return judge.eval().requires_grad_(False)


def _convolutions(width: int, size: int, channels: Sequence[int], frame_dim: int) -> nn.Sequential:
    """Return what maps pictures (M, C, H, W) to (M, frame_dim)."""
    layers: list[nn.Module] = []
    for count in channels:
        layers += [nn.Conv2d(width, count, 3, stride=2, padding=1), nn.LeakyReLU(0.01)]
        width, size = count, (size + 1) // 2
    layers += [nn.Flatten(), nn.Linear(width * size * size, frame_dim), nn.LeakyReLU(0.01)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):  # torch's default shrinks the differences between frames
            nn.init.kaiming_normal_(layer.weight, a=0.01)
    return nn.Sequential(*layers)


def train_judge(
    train: Sequences,
    held_out: Sequences,
    *,
    factors: Sequence[str] | None = None,
    num_steps: int = 500,
    batch_size: int = 48,
    learning_rate: float = 3e-3,
    seed: int = 0,
    channels: Sequence[int] = (16, 32, 48, 64),
    frame_dim: int = 128,
    hidden_dim: int = 64,
    network: nn.Module | None = None,
    on_step: Callable[[int, float], object] | None = None,
) -> Judge:
    """Train a judge on real clips, freeze it, and measure its accuracy on held-out clips.

    Adam minimises the cross-entropy summed over the factors, with one cycle of the learning rate. The same seed gives
    the same judge, and the global random state does not change.

    Args:
        train: real clips, or sequences of any kind, of the training identities only
            (:meth:`~seqdisent.datasets.Sequences.split`).
        held_out: real clips of other identities, used only for the judge's accuracy.
        factors: the labels to learn; None for all.
        num_steps: number of optimisation steps.
        batch_size: clips per step.
        learning_rate: maximum of the cycle.
        seed: seed of the initial weights and of the batches.
        channels: as :class:`Judge`'s.
        frame_dim: as :class:`Judge`'s.
        hidden_dim: as :class:`Judge`'s.
        network: as :class:`Judge`'s, for steps that are no pictures. Its initial weights are the caller's, and `seed`
            has no bearing on them, only on its dropout; it is trained in place. What was not observed it reads as 0.
        on_step: called with the number and loss (nats per clip) of each step, for a progress bar.

    Returns:
        The frozen judge, on the device of the frames of `train`, with its ``accuracy``.

    Raises:
        ValueError: a factor that the clips do not have, no factors, held-out clips whose factors or frames differ from
            those of `train`, or frames that are no pictures without a `network`.

    Example:
        >>> from seqdisent.datasets import Clips
        >>> who = torch.arange(2).repeat(8)
        >>> frames = (200 * who[:, None, None, None, None]).expand(16, 2, 1, 8, 8).to(torch.uint8)
        >>> clips = Clips(frames, labels={"who": who})
        >>> train_judge(clips, clips, num_steps=20, batch_size=8, channels=(4,)).accuracy
        {'who': 1.0}
    """
    check_positive(num_steps=num_steps, batch_size=batch_size)
    check_scale(learning_rate=learning_rate)
    factors = list(train.labels) if factors is None else list(factors)
    if not factors:
        raise ValueError(f"factors: is empty, expected at least one of the labels {sorted(train.labels)}")
    for name in factors:
        for argument, clips in (("train", train), ("held_out", held_out)):
            if name not in clips.labels:
                raise ValueError(f"factors: {name!r} is not among the labels of {argument}, {sorted(clips.labels)}")
        if train.factor_names[name] != held_out.factor_names[name]:
            raise ValueError(
                f"held_out: factor {name!r} has other values than that of train ({len(held_out.factor_names[name])} "
                f"and {len(train.factor_names[name])}), expected the same; pass the same factor_names to both Clips"
            )
    shape = tuple(train.values.shape[2:])
    if network is None and (len(shape) != 3 or shape[1] != shape[2]):
        raise ValueError(
            f"train: frames have shape {shape}, expected pictures (C, H, W) with height equal to width, or a `network`"
        )
    if shape != tuple(held_out.values.shape[2:]):
        raise ValueError(
            f"held_out: frames have shape {tuple(held_out.values.shape[2:])}, expected that of train, {shape}"
        )
    with kept_random_state():
        torch.manual_seed(seed)
        judge = Judge(
            {name: len(train.factor_names[name]) for name in factors},
            **({"in_channels": shape[0], "image_size": shape[1]} if network is None else {}),
            channels=channels,
            frame_dim=frame_dim,
            hidden_dim=hidden_dim,
            network=network,
        ).to(train.values.device)
        optimizer = torch.optim.Adam(judge.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps) if num_steps > 1 else None
        generator = torch.Generator().manual_seed(seed)
        for step in range(num_steps):
            batch = train.draw_windows(batch_size, generator)
            logits = judge(batch.frames, batch.mask)
            loss = torch.stack([F.cross_entropy(logits[name], batch.labels[name]) for name in factors]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if on_step is not None:
                on_step(step, loss.item())
    judge.eval().requires_grad_(False)
    judge.accuracy = _accuracy(judge, held_out, batch_size)
    return judge


@torch.no_grad()
def _accuracy(judge: Judge, clips: Sequences, batch_size: int) -> dict[str, float]:
    right = dict.fromkeys(judge.num_classes, 0)
    for positions in torch.arange(len(clips)).split(batch_size):
        batch = clips.batch(positions)
        device = judge.heads.weight.device
        for name, logits in judge(batch.frames.to(device), batch.mask.to(device)).items():
            right[name] += int((logits.argmax(-1) == batch.labels[name].to(device)).sum())
    return {name: count / len(clips) for name, count in right.items()}
