"""Training of any model and guide with Lightning (extra ``train``).

Everything random in a step, the batch as well as the noise, is a function of (seed, step, process); schedules are
functions of the step. A run that was interrupted therefore continues with the very losses of one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from seqdisent._checks import check_positive
from seqdisent._distributed import all_processes
from seqdisent._training_checks import check_bound, check_owner, check_parameters, check_schedules
from seqdisent.inference import ELBOTerms, elbo_terms

try:
    import lightning
    from lightning.pytorch.callbacks import Callback, TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.plugins.io import TorchCheckpointIO
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from seqdisent import _checkpoints
    from seqdisent._checkpoints import CheckpointError as CheckpointError
except ImportError as error:
    raise ImportError("seqdisent.training needs Lightning; install it with: pip install 'seqdisent[train]'") from error


TERMINATED = 128 + 15  # what a shell says of a process that SIGTERM ended


def step_seed(seed: int, stream: str, step: int, rank: int) -> int:
    """Return the seed of one step's batch or noise on one process, in [0, 2**63).

    Args:
        seed: of the run.
        stream: what it is for; different names give unrelated seeds.
        step: the training step.
        rank: the process, 0 for the first.

    Example:
        >>> step_seed(0, "noise", 3, 0) == step_seed(0, "noise", 3, 0) != step_seed(0, "batch", 3, 0)
        True
    """
    digest = hashlib.blake2b(f"{seed} {stream} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def frames_and_mask(batch: Any) -> tuple[Tensor, ...]:
    """Return what model and guide take from a batch of clips; the mask only if there is padding.

    Args:
        batch: a :class:`~seqdisent.datasets.Batch`, or what has its `frames` and `mask`.

    Returns:
        ``(frames,)`` or ``(frames, mask)``.

    Raises:
        TypeError: `batch` is something else.

    Example:
        >>> from seqdisent.datasets import pendulum
        >>> [part.shape for part in frames_and_mask(pendulum(2, seed=0, num_steps=4, image_size=8).batch([0, 1]))]
        [torch.Size([2, 4, 3, 8, 8])]
    """
    if not (hasattr(batch, "frames") and hasattr(batch, "mask")):
        raise TypeError(
            f"draw: the batch is a {type(batch).__name__}, expected clips with `frames` and `mask`; "
            "what model and guide take from anything else is for `arguments` to say"
        )
    return (batch.frames,) if bool(batch.mask.all()) else (batch.frames, batch.mask)


class ELBOTraining(lightning.LightningModule):
    """Maximise the weighted evidence lower bound of a model and guide, step by step.

    Args:
        network: owns the parameters; those with ``requires_grad`` are trained, with Adam.
        model: a Pyro model (a method of `network`, say).
        guide: its guide.
        draw: a function of a ``torch.Generator`` that returns the next batch, a :class:`~seqdisent.datasets.Batch` or
            anything that `arguments` can read.
        num_steps: optimisation steps in all.
        learning_rate: of Adam; a schedule, as of :class:`~seqdisent.AnnealingSchedule`, or any function of the step.
        weights: {site: schedule of the weight of its term}; a site that is not named counts 1.
        inputs: {name: schedule of an argument of model and guide}, such as a temperature.
        arguments: a function of a batch that returns the tuple that model and guide take.
        terms_per_step: the loss is minus the bound, summed over the batch and divided by this fixed number (frames in a
            batch, say), at optimisation only; the ledger that is logged is not divided by it.
        betas: of Adam.
        weight_decay: of Adam: this times a parameter is added to its gradient.
        rate_factors: {start of a parameter's name: factor of its learning rate}, to fine-tune parts more gently.
        kl: as in :func:`~seqdisent.elbo_terms`.
        objective: a function of the ledger and of {site: weight} that returns what to maximise, (B,): the weighted
            bound, or what you make of the ledger's terms and conditionals (free bits, a balanced KL). The weights are
            those of all latent sites, 1 where there is no schedule, and of the observed ones that have a schedule.
        seed: of batches and noise.

    Raises:
        ValueError: `num_steps` below 1; in training, a weight or rate factor that names nothing, an objective of
            another shape, or a model with parameters that `network` does not own.
        TypeError: a number where a schedule is wanted (:meth:`~seqdisent.AnnealingSchedule.constant` makes one of it).
        FloatingPointError: in training, as soon as a term is not finite; it names the term, the sequence and the step.
            Where the objective or its gradient is not finite, the checkpoint before that is kept.

    Example:
        See :func:`fit`.
    """

    def __init__(
        self,
        network: nn.Module,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        draw: Callable[[torch.Generator], Any],
        *,
        num_steps: int,
        learning_rate: Callable[[int], float],
        weights: Mapping[str, Callable[[int], float]] | None = None,
        inputs: Mapping[str, Callable[[int], float]] | None = None,
        arguments: Callable[[Any], tuple[Any, ...]] = frames_and_mask,
        terms_per_step: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        rate_factors: Mapping[str, float] | None = None,
        kl: Literal["analytic", "monte-carlo"] = "analytic",
        objective: Callable[[ELBOTerms, Mapping[str, float]], Tensor] = ELBOTerms.elbo,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(num_steps=num_steps)
        check_schedules({"learning_rate": learning_rate})
        check_schedules({f"weights[{site!r}]": schedule for site, schedule in (weights or {}).items()})
        check_schedules({f"inputs[{name!r}]": schedule for name, schedule in (inputs or {}).items()})
        self.network = network
        self.model, self.guide, self.draw, self.arguments = model, guide, draw, arguments
        self.num_steps, self.learning_rate, self.seed = int(num_steps), learning_rate, int(seed)
        self.weights, self.inputs = dict(weights or {}), dict(inputs or {})
        self.terms_per_step, self.kl, self.objective = terms_per_step, kl, objective
        self.betas, self.weight_decay = betas, weight_decay
        self.rate_factors = dict(rate_factors or {})
        self._owner_is_checked = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam on the parameters that require a gradient."""
        groups: dict[float, list[nn.Parameter]] = {}
        names = [name for name, _ in self.network.named_parameters()]
        if unknown := [start for start in self.rate_factors if not any(name.startswith(start) for name in names)]:
            raise ValueError(f"rate_factors: no parameter starts with {unknown}, expected starts of {names}")
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                factor = next((f for start, f in self.rate_factors.items() if name.startswith(start)), 1.0)
                groups.setdefault(factor, []).append(parameter)
        parameters = [{"params": members, "factor": factor} for factor, members in groups.items()]
        # Lightning does not clip the gradient of a fused optimiser under mixed precision
        fused = not str(self.trainer.precision).endswith("-mixed")
        options: dict[str, Any] = {"betas": self.betas, "weight_decay": self.weight_decay, "fused": fused}
        return torch.optim.Adam(parameters, lr=float(self.learning_rate(0)), **options)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches from the current step on."""
        # a generator of its own: the loader would draw a seed for its workers from the global one
        return DataLoader(_Batches(self), batch_size=None, generator=torch.Generator())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its ledger."""
        step = self.global_step
        for group in self.optimizers().optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = float(self.learning_rate(step)) * group["factor"]
        weights = {site: schedule(step) for site, schedule in self.weights.items()}
        inputs: dict[str, Any] = {name: schedule(step) for name, schedule in self.inputs.items()}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(step_seed(self.seed, "noise", step, self.global_rank))
            arguments = self.arguments(batch)
            if not isinstance(arguments, tuple | list):  # Lightning makes lists of tuples
                raise TypeError(f"arguments: returned {type(arguments).__name__}, expected a tuple")
            terms = elbo_terms(self.model, self.guide, *arguments, kl=self.kl, **inputs)
        loss = -self._bound(terms, weights).sum() / self.terms_per_step
        if not all_processes(terms.is_finite() & loss.detach().isfinite()):
            check_parameters(self.network, step)  # if they are the reason, no term is to blame
            terms.check_finite(step)
            raise FloatingPointError(
                f"the loss is {loss.item()} at training step {step}, here or on another process, though every term of "
                "the ledger is finite; expected a finite objective and terms_per_step"
            )
        if not self._owner_is_checked:
            check_owner(self.network, loss, arguments)
            self._owner_is_checked = True
        self._log_ledger(terms, loss, weights, inputs)
        return loss

    def _bound(self, terms: ELBOTerms, weights: Mapping[str, float]) -> Tensor:
        """Return the objective of each sequence."""
        terms.check_weights(weights)
        bound = self.objective(terms, {**dict.fromkeys(terms.kl, 1.0), **weights})
        check_bound(bound, terms)
        return bound

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the seed and which parameters are trained; refuse parameters that are not finite."""
        check_parameters(self.network, self.global_step)
        checkpoint["trained"], checkpoint["seed"] = self._trained(), self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network, of other trained parameters, of another seed, or of a longer run."""
        trainer = self._trainer  # None in `load_from_checkpoint`, where no optimiser goes on
        path = (trainer.ckpt_path if trainer else None) or "the checkpoint"
        _checkpoints.check_is_of_this_network(path, checkpoint["state_dict"], self.state_dict())
        if trainer is not None:
            _checkpoints.check_goes_on(path, checkpoint, self.seed, self.num_steps)
            _checkpoints.check_trains_the_same(path, checkpoint.get("trained", self._trained()), self._trained())

    def _trained(self) -> list[str]:
        return [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]

    def _log_ledger(
        self, terms: ELBOTerms, loss: Tensor, weights: Mapping[str, float], inputs: Mapping[str, float]
    ) -> None:
        shown = {f"log_p({site})": term.detach().mean() for site, term in terms.log_likelihood.items()}
        shown |= {f"KL({site})": term.detach().mean() for site, term in terms.kl.items()}
        written: dict[str, Any] = {"loss": loss.detach(), "elbo": terms.elbo().detach().mean()}
        written |= {f"weight({site})": torch.as_tensor(weight).float().mean() for site, weight in weights.items()}
        written |= {f"input({name})": value for name, value in inputs.items()}
        written["learning_rate"] = self.learning_rate(self.global_step)
        self.log_dict(shown, prog_bar=True, logger=False)
        self.log_dict(written, logger=False)  # for callbacks
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            # Lightning would write after the checkpoint: a run killed in between would lack this step
            for logger in self.loggers:
                logger.log_metrics({k: float(v) for k, v in {**shown, **written}.items()}, self.global_step)
                logger.save()


class _Batches(IterableDataset[Any]):
    """The batches of a run, each a function of its step."""

    def __init__(self, training: ELBOTraining) -> None:
        self.training = training

    def __len__(self) -> int:
        return self.training.num_steps

    def __iter__(self) -> Iterator[Any]:
        training = self.training
        for step in range(training.global_step, training.num_steps):
            generator = torch.Generator()
            generator.manual_seed(step_seed(training.seed, "batch", step, training.global_rank))
            yield training.draw(generator)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, so that a killed run never leaves half a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write the checkpoint; where that fails (a full disk), the one before stays, and OSError names the file."""
        _checkpoints.write(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Return the checkpoint, of plain tensors and numbers alone; CheckpointError names a file that is none."""
        return _checkpoints.read(Path(path))


def fit(
    training: ELBOTraining,
    folder: str | Path,
    *,
    resume: bool = False,
    clip_norm: float | None = None,
    checkpoint_every: int = 500,
    log_every: int = 20,
    callbacks: tuple[Callback, ...] = (),
    progress_bar: bool = True,
    accelerator: str = "auto",
    devices: int | str = 1,
    precision: Any = "32-true",
    num_nodes: int = 1,
) -> None:
    """Train, with a progress bar, CSV and TensorBoard logs of the ledger, and checkpoints in `folder`.

    Args:
        training: what to train.
        folder: ``last.ckpt`` and ``logs/`` are written there.
        resume: continue from ``last.ckpt`` if it is there.
        clip_norm: the largest norm of a step's gradient; None for any.
        checkpoint_every: steps between checkpoints.
        log_every: steps between log lines.
        callbacks: further Lightning callbacks (``EMAWeightAveraging``, say).
        progress_bar: show the bar with the ledger's terms.
        accelerator: as Lightning's.
        devices: as Lightning's.
        precision: as Lightning's ("bf16-mixed", "64-true").
        num_nodes: as Lightning's.

    Raises:
        FloatingPointError: a term of the ledger is not finite.
        FileExistsError: `folder` holds a checkpoint and `resume` is False.
        CheckpointError: (a ValueError) ``last.ckpt`` is damaged, no checkpoint, of another network or seed, or has more
            steps behind it than `training` has.
        ValueError: `checkpoint_every` or `log_every` below 1.
        OSError: a checkpoint or a log could not be written, on a full disk say; the checkpoint before is whole.
        KeyboardInterrupt: Ctrl-C was pressed. The step at hand was finished and ``last.ckpt`` written, and a resumed
            run continues exactly there. Pressed again before that, training ends at once and the checkpoint is older.
        SystemExit: SIGTERM was received, as a cluster sends it before it takes a machine away; the code is 143. In a
            single process, the step at hand was finished and ``last.ckpt`` written; with several, it is older.

    Example:
        >>> import tempfile
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from seqdisent import AnnealingSchedule
        >>> network = nn.Linear(1, 1)
        >>> def model(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         pyro.sample("z", dist.Normal(network(x.unsqueeze(-1)).squeeze(-1), 0.7))
        >>> training = ELBOTraining(
        ...     network,
        ...     model,
        ...     guide,
        ...     draw=lambda generator: torch.randn(8, generator=generator),
        ...     arguments=lambda batch: (batch,),
        ...     num_steps=3,
        ...     learning_rate=AnnealingSchedule.constant(0.1),
        ...     weights={"z": AnnealingSchedule.linear(0.1, 1.0, 3)},
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fit(training, folder, checkpoint_every=3, progress_bar=False, accelerator="cpu")
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['last.ckpt', 'logs', 'tensorboard']
    """
    folder = Path(folder)
    last = folder / "last.ckpt"
    if last.exists() and not resume:
        raise FileExistsError(f"folder: {last} exists; resume that run, or choose another folder")
    check_positive(checkpoint_every=checkpoint_every, log_every=log_every)
    checkpoints = _checkpoints.RunCheckpoint(last, checkpoint_every)
    bar: list[Callback] = [TQDMProgressBar(refresh_rate=max(1, log_every // 2))] if progress_bar else []
    with _quiet(), _checkpoints.stopped_by_ctrl_c(checkpoints):
        trainer = lightning.Trainer(
            max_steps=training.num_steps,
            default_root_dir=folder,
            logger=[CSVLogger(folder, "logs"), TensorBoardLogger(folder, "tensorboard")],
            callbacks=[checkpoints, *bar, *callbacks],
            plugins=[AtomicCheckpointIO()],
            gradient_clip_val=clip_norm,
            log_every_n_steps=min(log_every, training.num_steps),
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            enable_progress_bar=progress_bar,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        try:
            trainer.fit(training, ckpt_path=str(last) if last.exists() else None)
        except _checkpoints.Stopped:
            pass
        except SIGTERMException:
            raise SystemExit(TERMINATED) from None
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):  # what Lightning makes of a second Ctrl-C
                raise
    if checkpoints.stop or trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.received_sigterm:  # after the last step
        raise SystemExit(TERMINATED)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on every run to itself; its warnings about anything else stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)


# what Lightning says of every run that draws its batches in the main process and validates elsewhere
_EXPECTED = (
    ".*does not have many workers.*",
    ".*`IterableDataset` has `__len__` defined.*",
    ".*Starting from v1.9.0.*",
    ".*treespec.*",
    ".*You have overridden.*",
    ".*exists and is not empty.*",
    ".*your dataloader is not resumable.*",  # it is: batches are functions of the step
)
