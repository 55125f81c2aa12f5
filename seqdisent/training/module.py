"""A model and guide as a Lightning module: batches, the weighted bound, the optimiser, the ledger's log."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from seqdisent._checks import check_positive
from seqdisent._distributed import all_processes
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.inference import ELBOTerms, elbo_terms
from seqdisent.inference.auxiliary import AuxiliaryLosses, check_auxiliary_losses
from seqdisent.inference.elbo import guess_max_plate_nesting
from seqdisent.inference.objectives import KL, Objective
from seqdisent.training import checkpoints, checks
from seqdisent.training.cuda_graphs import StepGraphs
from seqdisent.training.logs import means, per_sequence, per_step


def step_seed(seed: int, stream: str, step: int, rank: int) -> int:
    """Return the seed, in [0, 2**63), of what `stream` names at one step on one process of a run."""
    digest = hashlib.blake2b(f"{seed} {stream} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ELBOTraining(lightning.LightningModule):
    """Maximise the weighted evidence lower bound of a model and guide, step by step.

    Args:
        network: owns the parameters; those with ``requires_grad`` are trained.
        model: a Pyro model (a method of `network`, say).
        guide: its guide.
        draw: a function of a ``torch.Generator`` that returns the next batch, a :class:`~seqdisent.datasets.Batch` or
            anything that `arguments` can read. If a batch has a `mask` (an attribute or key of that name, bool (B, T)),
            it is checked for holes and empty rows as it is drawn.
        num_steps: optimisation steps in all.
        learning_rate: a schedule, as of :class:`~seqdisent.AnnealingSchedule`, or any function of the step. It replaces
            the rate of `optimizer` at every step.
        weights: {site: schedule of the weight of its term}; a site that is not named counts 1.
        inputs: {name: schedule of an argument of model and guide}, such as a temperature.
        arguments: a function of a batch that returns what model and guide take: a tuple of positional arguments, or a
            dict of keyword arguments.
        terms_per_step: the loss is minus the bound, summed over the batch and divided by this fixed number (frames in a
            batch, say), at optimisation only; the logged ledger is not divided by it.
        optimizer: a function of parameters, as the classes of ``torch.optim`` are, that returns the optimiser:
            ``partial(torch.optim.AdamW, weight_decay=0.01)``. It gets a list of parameters; with `rate_factors`, a list
            of groups, which have to keep their key ``factor``. Adam and AdamW are fused unless they say otherwise.
        rate_factors: {start of a parameter's name: factor of its learning rate}, to fine-tune parts more gently.
        kl: as in :func:`~seqdisent.elbo_terms`; None is closed form with ``"elbo"`` and with a function.
        objective: ``"elbo"``, ``"stl"``, ``"iwae"``, ``"dreg"`` or ``"fivo"``, as in :func:`~seqdisent.elbo_terms`; the
            last three take no `weights`. Or a function of the ledger and of {site: weight} that returns what to
            maximise, (B,): a function of the ledger's terms and conditionals (free bits, a balanced KL). The weights
            are those of all latent sites, 1 where there is no schedule, and of the observed sites that have one.
        num_particles: K draws of the guide for each sequence, in one run: model and guide get them as a dimension on
            the left of the sequences.
        auxiliary_losses: as of :func:`~seqdisent.elbo_terms`, with their schedules in `weights`. They are subtracted
            from every objective, but not from the bound of `validation`.
        validation: held-out batches, a sequence of them or a function that returns an iterable of them. :func:`fit`
            evaluates the unweighted bound on all of them every `validate_every` steps; with ``"iwae"`` and ``"dreg"``
            the importance-weighted bound too, with ``"fivo"`` that of the filter, by which the best checkpoint is then
            chosen.
        logged: {name: function of `network` that returns a number or a tensor, whose mean is logged}, such as a learnt
            scale. Called when a row of the log is written.
        seed: of batches and noise.

    Attributes:
        minutes: of training until the last checkpoint, over all resumptions of the run.

    Raises:
        ValueError: `num_steps` or `num_particles` below 1, an unknown `objective` or one that does not fit `kl` or
            `weights`; in training, a weight or rate factor that names nothing, an objective of
            another shape, an optimiser that lacks parameters, a name in both `inputs` and the dict of `arguments`, a
            mask with a hole, or a model with parameters that `network` does not own.
        TypeError: a number where a schedule is wanted (:meth:`~seqdisent.AnnealingSchedule.constant` makes one of it),
            or another argument that is no function; a `validation` that can be read only once.
        FloatingPointError: in training, as soon as a term is not finite; it names the term, the sequence and the step.
            Where the objective or its gradient is not finite, the checkpoint before that is kept.

    Example:
        See :func:`fit`.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]

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
        arguments: Callable[[Any], tuple[Any, ...] | dict[str, Any]] = frames_and_mask,
        terms_per_step: float = 1.0,
        optimizer: Callable[[list[Any]], torch.optim.Optimizer] = torch.optim.Adam,
        rate_factors: Mapping[str, float] | None = None,
        kl: KL | None = None,
        objective: Objective | Callable[[ELBOTerms, Mapping[str, float]], Tensor] = "elbo",
        num_particles: int = 1,
        auxiliary_losses: AuxiliaryLosses | None = None,
        validation: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        logged: Mapping[str, Callable[[Any], Tensor | float]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(num_steps=num_steps, num_particles=num_particles)
        checks.check_schedules({"learning_rate": learning_rate})
        checks.check_schedules({f"weights[{site!r}]": schedule for site, schedule in (weights or {}).items()})
        checks.check_schedules({f"inputs[{name!r}]": schedule for name, schedule in (inputs or {}).items()})
        functions = {"model": model, "guide": guide, "draw": draw, "arguments": arguments, "optimizer": optimizer}
        checks.check_functions(**functions)
        self.auxiliary_losses = dict(check_auxiliary_losses(auxiliary_losses, objective))
        checks.check_objective(objective, kl, set(weights or {}) - set(self.auxiliary_losses))
        checks.check_functions(**{f"logged[{name!r}]": function for name, function in (logged or {}).items()})
        if validation is not None:
            checks.check_validation(validation)
        self.network = network
        # past nn.Module: a program that is a module is not to be saved and counted a second time beside `network`
        self.__dict__.update(model=model, guide=guide)
        self.draw, self.arguments = draw, arguments
        self.num_steps, self.learning_rate, self.seed = int(num_steps), learning_rate, int(seed)
        self.weights, self.inputs = dict(weights or {}), dict(inputs or {})
        self.terms_per_step, self.kl, self.objective = terms_per_step, kl, objective
        self.num_particles = int(num_particles)
        self.optimizer, self.rate_factors = optimizer, dict(rate_factors or {})
        self.validation, self.logged = validation, dict(logged or {})
        self.minutes = 0.0
        self.graphs: StepGraphs | None = None  # fit(cuda_graph=True) has steps replayed from them
        self._owner_is_checked = False
        self._own_plates: int | None = None  # how many dimensions the programs' plates take

    def __deepcopy__(self, memo: dict[int, Any]) -> ELBOTraining:
        """Copy the weights, but not the data behind `draw` and `validation`: weight averaging makes a copy."""
        memo |= {id(shared): shared for shared in (self.draw, self.validation)}
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return duplicate

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser of the parameters that require a gradient."""
        groups: dict[float, list[nn.Parameter]] = {}
        names = [name for name, _ in self.network.named_parameters()]
        if unknown := [start for start in self.rate_factors if not any(name.startswith(start) for name in names)]:
            raise ValueError(f"rate_factors: no parameter starts with {unknown}, expected starts of {names}")
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                factor = next((f for start, f in self.rate_factors.items() if name.startswith(start)), 1.0)
                groups.setdefault(factor, []).append(parameter)
        trained = [parameter for members in groups.values() for parameter in members]
        grouped = [{"params": members, "factor": factor} for factor, members in groups.items()]
        optimizer = self.optimizer(grouped if self.rate_factors else trained)
        checks.check_optimizer(optimizer, trained, needs_factors=bool(self.rate_factors))
        for group in optimizer.param_groups:
            group.setdefault("factor", 1.0)
        # set here and not by `fused=True`, which would keep Lightning from clipping gradients under mixed precision
        if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and all(p.is_floating_point() for p in trained):
            for group in optimizer.param_groups:
                if not any(group[way] for way in ("foreach", "capturable", "differentiable")):
                    group["fused"] = group["fused"] is not False
        return optimizer

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches from the current step on."""
        # a generator of its own: the loader would draw a seed for its workers from the global one
        return DataLoader(_Batches(self), batch_size=None, generator=torch.Generator())

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its ledger."""
        step = self.global_step
        for group in self.optimizers().optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = float(self.learning_rate(step)) * group["factor"]
        weights = {site: schedule(step) for site, schedule in self.weights.items()}
        inputs = {name: schedule(step) for name, schedule in self.inputs.items()}
        with self._noise("noise", step, self.global_rank):
            args, named = self._arguments_of(batch, inputs)
            compute = self._compute if self.graphs is None else partial(self.graphs, self._compute)
            terms, loss = compute(args, named, weights)
        if not all_processes(terms.is_finite() & loss.detach().isfinite()):  # waits for the device
            checks.check_parameters(self.network, step)  # if they are the reason, no term is to blame
            terms.check_finite(step)
            raise FloatingPointError(
                f"the loss is {loss.item()} at training step {step}, here or on another process, though every term of "
                "the ledger is finite; expected a finite objective and terms_per_step"
            )
        self._log_ledger(terms, loss, weights, inputs)
        return loss

    def _validation_terms(self, batch: Any, index: int) -> ELBOTerms:
        """Return the ledger of validation batch number `index`, with the same noise whenever it is asked."""
        inputs = {name: schedule(max(0, self.global_step - 1)) for name, schedule in self.inputs.items()}
        with self._noise("validation", index, 0):
            return self._terms(*self._arguments_of(batch, inputs))

    @contextlib.contextmanager
    def _noise(self, stream: str, step: int, rank: int) -> Iterator[None]:
        """Draw noise of its own inside, and put the random state back."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(step_seed(self.seed, stream, step, rank))
            yield

    def _arguments_of(self, batch: Any, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what model and guide are given, by position and by name."""
        given = self.arguments(batch)
        if not isinstance(given, tuple | list | dict):  # Lightning makes lists of tuples
            raise TypeError(f"arguments: returned {type(given).__name__}, expected a tuple or a dict")
        args, named = ((), given) if isinstance(given, dict) else (tuple(given), {})
        if twice := sorted(set(named) & set(inputs)):
            raise ValueError(f"inputs: {twice} are also in the dict that `arguments` returned, expected one value")
        return args, {**named, **inputs}

    def _compute(
        self, args: tuple[Any, ...], named: Mapping[str, Any], weights: Mapping[str, float]
    ) -> tuple[ELBOTerms, Tensor]:
        """Return the ledger of a training step, and its loss."""
        terms = self._terms(args, named, self.auxiliary_losses)
        loss = -self._bound(terms, weights).sum() / self.terms_per_step
        if not self._owner_is_checked:
            checks.check_owner(self.network, loss, [*args, *named.values()])
            self._owner_is_checked = True
        return terms, loss

    def _terms(
        self, args: tuple[Any, ...], named: Mapping[str, Any], losses: AuxiliaryLosses | None = None
    ) -> ELBOTerms:
        options: dict[str, Any] = {"kl": self.kl, "objective": "elbo" if callable(self.objective) else self.objective}
        options |= {"num_particles": self.num_particles, "vectorize_particles": self.num_particles > 1}
        if self.num_particles > 1 and self.objective != "fivo":
            if self._own_plates is None:
                self._own_plates = guess_max_plate_nesting(self.model, self.guide, args, named)
            options["max_plate_nesting"] = self._own_plates
        return elbo_terms(self.model, self.guide, *args, **options, auxiliary_losses=losses, **named)

    def _bound(self, terms: ELBOTerms, weights: Mapping[str, float]) -> Tensor:
        """Return the objective of each sequence."""
        terms.check_weights(weights)
        if not callable(self.objective):
            return terms.bound(weights)
        of_losses = {name: weight for name, weight in weights.items() if name in terms.auxiliary_losses}
        of_sites = {name: weight for name, weight in weights.items() if name not in of_losses}
        bound = self.objective(terms, {**dict.fromkeys(terms.kl, 1.0), **of_sites})
        checks.check_bound(bound, terms)
        return bound - terms.penalty(of_losses) if terms.auxiliary_losses else bound

    @override
    def on_fit_start(self) -> None:
        """Start the clock of ``minutes`` where the checkpoint stopped it."""
        if self.trainer.ckpt_path is None:
            self.minutes = 0.0
        self._started = time.monotonic() - 60 * self.minutes

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the settings, the minutes and which parameters are trained; refuse parameters that are not finite."""
        checks.check_parameters(self.network, self.global_step)
        self.minutes = (time.monotonic() - self._started) / 60
        checkpoint |= {"trained": self._trained(), "minutes": self.minutes, **self._settings()}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network, of other trained parameters or settings, or of a longer run."""
        trainer = self._trainer  # None in `load_from_checkpoint`, where no optimiser goes on
        path = (trainer.ckpt_path if trainer else None) or "the checkpoint"
        checkpoints.check_is_of_this_network(path, checkpoint["state_dict"], self.state_dict())
        self.minutes = checkpoint.get("minutes", 0.0)
        if trainer is not None:
            checkpoints.check_goes_on(path, checkpoint, self.num_steps, **self._settings())
            checkpoints.check_trains_the_same(path, checkpoint.get("trained", self._trained()), self._trained())
            averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            checkpoints.check_averages_the_same(path, checkpoint, averages=averages)

    def _settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "clip_norm": self.trainer.gradient_clip_val}

    def _trained(self) -> list[str]:
        return [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]

    def _log_ledger(
        self, terms: ELBOTerms, loss: Tensor, weights: Mapping[str, float], inputs: Mapping[str, float]
    ) -> None:
        ledger = means(per_sequence(terms))
        bound = ledger.pop("elbo")
        written: dict[str, Any] = {"loss": loss.detach(), "elbo": bound}
        written |= {f"weight({site})": torch.as_tensor(weight).float().mean() for site, weight in weights.items()}
        written |= {f"input({name})": value for name, value in inputs.items()}
        written["learning_rate"] = self.learning_rate(self.global_step)
        self.log_dict(ledger, prog_bar=True, logger=False)
        self.log_dict(written, logger=False)  # for callbacks
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            with torch.no_grad():
                extra = {name: torch.as_tensor(of(self.network)).float().mean() for name, of in self.logged.items()}
            row = {**ledger, **written, **means(per_step(terms)), **extra}
            # Lightning would write after the checkpoint: a run killed in between would lack this step
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in row.items()}, self.global_step)
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
            batch = training.draw(generator)
            checks.check_batch_mask(batch)
            yield batch
