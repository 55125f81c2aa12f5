"""Who takes part in `field.py`: the examples' models, and two cheats that need no training.

A model joins by one entry, a function of the task and a seed:

    def mine(task, seed, scale):
        network = Mine(task.frame_shape)
        def stage():
            return ELBOTraining(network, network.model, network.guide, ..., num_steps=round(3000 * scale), seed=seed)
        return Contestant(network, network.model, network.guide, {"training": stage}, static=("f",), motion=("z",))

`static` and `motion` are the sites that say who and what; where the model's last site is not the sequence, `emission`
names it. `scale` is by what the steps of training, and the schedules with them, are multiplied to take the time that
all have.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from seqdisent import IndependentSteps, batch_sizes
from seqdisent.datasets import Clips
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.evaluation._checks import check_programs
from seqdisent.evaluation._programs import Programs

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from settings import settings_of  # noqa: E402


class Task(NamedTuple):
    """Clips to train on, clips to measure on, and every true clip that a swapped one can be mistaken for."""

    data: str
    preset: str
    train: Clips
    held_out: Clips
    candidates: Clips | None

    @property
    def one_length(self) -> bool:
        """Whether all clips have the same number of steps."""
        both = self.train, self.held_out
        return all(bool(clips.mask.all()) for clips in both) and len({clips.mask.shape[1] for clips in both}) == 1

    @property
    def frame_shape(self) -> tuple[int, ...]:
        return tuple(self.train.frames.shape[2:])


class Contestant(NamedTuple):
    """A model, as it is to be trained and measured."""

    network: nn.Module
    model: Callable[..., Any]
    guide: Callable[..., Any]
    stages: Mapping[str, Callable[[], Any]]  # as `seqdisent.training.train_stages` takes them; empty: nothing is learnt
    static: tuple[str, ...]  # the sites that say who
    motion: tuple[str, ...]  # the sites that say what
    options: Mapping[str, Any] = {}  # of `seqdisent.training.fit`
    emission: str | None = None  # the site that is the sequence; None: the model's last one
    history: bool = False  # whether the model reads the frames before each step


Entry = Callable[[Task, int, float], Contestant]


def check(found: Any, task: Task) -> None:
    """Check what an entry returns, by a run of both programs on a clip: before a training, not after it."""
    if not isinstance(found, Contestant):
        raise TypeError(f"got {type(found).__name__}, expected a Contestant")
    if not isinstance(found.stages, Mapping):
        raise TypeError(f"stages: got {type(found.stages).__name__}, expected {{name: function that returns a plan}}")
    found.network.eval()
    check_programs(found.model, found.guide, found.static, found.motion)
    sites = tuple(found.static), tuple(found.motion)
    programs = Programs(found.model, found.guide, *sites, found.emission, False, found.history, {})
    batch = task.held_out.batch([0])
    mean = programs.looked_at(task.held_out).reconstruct(*frames_and_mask(batch))
    if mean.shape != batch.frames.shape:
        raise ValueError(
            f"emission: its mean has shape {tuple(mean.shape)}, expected the frames' {tuple(batch.frames.shape)}"
        )


def of_example(name: str, *flags: str) -> Entry:
    """Return the entry of an example, trained as its preset for these data says."""

    def entry(task: Task, seed: int, scale: float) -> Contestant:
        example = importlib.import_module(name).EXAMPLE
        flagged = [f"--{flag}" for flag in flags]
        settings = settings_of(example, ["--preset", task.preset, "--data", task.data, *flagged])
        plan = scaled(example.plan_of(settings), scale)
        if getattr(plan, "information", 0) and not task.one_length:
            raise ValueError(
                "the mutual information of its plan needs clips of one length;"
                f" of_example({name!r}, 'plan.information=0') in a FILE.py leaves it out"
            )
        try:
            network = example.build(task.frame_shape, plan.sizes)
        except ValueError as error:
            raise ValueError(
                f"preset {task.preset!r} is not for frames {task.frame_shape}: {error}; of_example with other"
                f" 'plan.sizes' in a FILE.py changes sizes ('python examples/{name}.py --help' lists them)"
            ) from error
        stages = {stage: partial(make, network, plan, task.train, seed) for stage, make in example.stages.items()}
        options = {"clip_norm": plan.clip_norm, "checkpoint_every": plan.checkpoint_every}
        sites = example.static, example.motion
        return Contestant(network, network.model, network.guide, stages, *sites, options, "x", example.history)

    return entry


def scaled(plan: Any, scale: float) -> Any:
    """Return a plan with its counts of steps multiplied, those of warm-up and annealing too."""
    changed: dict[str, Any] = {}
    for field in fields(plan):
        value = getattr(plan, field.name)
        if field.name == "annealed":
            changed[field.name] = {
                site: (start, max(1, round(over * scale)), *end) for site, (start, over, *end) in value.items()
            }
        elif field.name == "warm_up" or field.name.endswith("steps"):
            changed[field.name] = max(1, round(value * scale)) if value else value
    return replace(plan, **changed)


# The cheats: a clip's code is its frames, made small; the decoder looks up which true clip has the nearest code


class RandomRows(TorchDistribution):
    """Any row of a table, each as likely as the others."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    @property
    def mean(self) -> Tensor:
        return self.table[0].expand(self.batch_shape + self.event_shape)  # of what comes next, a cheat has no idea

    def __init__(self, table: Tensor, batch_shape: tuple[int, ...] = ()) -> None:
        self.table = table
        super().__init__(torch.Size(batch_shape), table.shape[1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RandomRows:
        return RandomRows(self.table, tuple(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.table[torch.randint(len(self.table), (*sample_shape, *self.batch_shape))]

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_full(value.shape[:-1], -math.log(len(self.table)))


class Cheat(nn.Module):
    """Everything is in one latent, f or z, and nothing in the other."""

    def __init__(self, task: Task, full: str) -> None:
        super().__init__()
        self.full = full
        if not task.one_length:
            raise ValueError("a cheat knows clips of one length alone")
        known = [task.train, task.held_out, *([] if task.candidates is None else [task.candidates])]
        self.frames = torch.cat([clips.frames for clips in known])
        self.codes = torch.cat([code_of(part.float() / 255) for part in self.frames.split(256)])
        self.drawn = self.codes[: len(task.train)]

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        rows, idle = RandomRows(self.drawn), RandomRows(torch.zeros(1, 1))
        with pyro.plate("sequences", num_sequences):
            f = pyro.sample("f", rows if self.full == "f" else idle)
            step = (rows if self.full == "z" else idle).expand([num_sequences, num_steps])
            z = pyro.sample("z", IndependentSteps(step, mask))
            code = f if self.full == "f" else z[..., 0, :]
            found = [torch.cdist(part, self.codes).argmin(1) for part in code.flatten(0, -2).split(64)]
            clips = self.frames[torch.cat(found)].float() / 255
            clips = clips[:, torch.arange(num_steps).clamp(max=clips.shape[1] - 1)].unflatten(0, code.shape[:-1])
            step = dist.Normal(clips, 0.1, validate_args=False).to_event(clips.ndim - code.ndim)
            pyro.sample("x", IndependentSteps(step, mask), obs=frames)

    def guide(self, frames, mask=None):
        code = code_of(frames)
        idle = code.new_zeros(len(code), 1)
        f, z = (code, idle) if self.full == "f" else (idle, code)
        with pyro.plate("sequences", len(frames)):
            pyro.sample("f", dist.Delta(f, event_dim=1))
            step = dist.Delta(z.unsqueeze(1).expand(-1, frames.shape[1], -1), event_dim=1)
            pyro.sample("z", IndependentSteps(step, mask))


def code_of(frames: Tensor) -> Tensor:
    """Return clips (B, T, C, H, W) or (B, T, X) as vectors of a few hundred numbers that tell them apart."""
    some = frames[:, :: max(1, frames.shape[1] // 4)].flatten(0, 1)
    small = F.adaptive_avg_pool2d(some, 6) if frames.ndim == 5 else F.adaptive_avg_pool1d(some, 24)
    return small.unflatten(0, (len(frames), -1)).flatten(1)


def cheat(full: str) -> Entry:
    def entry(task: Task, seed: int, scale: float) -> Contestant:
        network = Cheat(task, full)
        return Contestant(network, network.model, network.guide, {}, ("f",), ("z",))

    return entry


ENTRIES: dict[str, Entry] = {
    "vdsm": of_example("vdsm"),
    "dsvae": of_example("dsvae"),
    "dsvae-full": of_example("dsvae", "full"),
    "dsvae-grouped": of_example("dsvae", "grouped"),
    "cdsvae": of_example("cdsvae"),
    "s3vae": of_example("s3vae"),
    "dbse": of_example("dbse"),
    "speakers": of_example("speakers"),
    "all in f": cheat("f"),
    "all in z": cheat("z"),
}


def find_entry(name: str) -> Entry:
    """Return an entry by its name, or `FILE.py:FUNCTION`, which may import what lies beside FILE.py."""
    if name in ENTRIES:
        return ENTRIES[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        sys.exit(f"--models: got {name!r}, expected FILE.py:FUNCTION or one of {', '.join(ENTRIES)}")
    if not Path(path).is_file():
        sys.exit(f"--models: got {name!r}, but there is no file {path}")
    sys.path.append(str(Path(path).resolve().parent))
    unlike = (
        f"_entry_of_{hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:8]}"  # any other module's name
    )
    spec = importlib.util.spec_from_file_location(unlike, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        sys.exit(f"--models: {path} has no function {function!r}")
    return found
