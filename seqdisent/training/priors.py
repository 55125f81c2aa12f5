"""Refit the priors of a trained model to its posterior: for clips drawn from the prior."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from seqdisent._checks import check_positive
from seqdisent._random import kept_random_state
from seqdisent.chains.factorised import as_chain
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.inference import elbo_terms, infer
from seqdisent.schedules import AnnealingSchedule
from seqdisent.training.fit import fit
from seqdisent.training.module import ELBOTraining, step_seed


class _PriorsAlone(Callback):
    """Puts all but the priors into evaluation mode: dropout and running statistics are of the rest of the model."""

    def __init__(self, priors: Mapping[str, nn.Module]) -> None:
        self.priors = priors

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.network.eval()
        for module in self.priors.values():
            module.train()


class Refit(NamedTuple):
    """What :func:`refit_priors` did for one site.

    Attributes:
        before: its KL term, nats a sequence, with the prior as it was passed in; on training batches, unless others
            were passed as `measured`.
        after: with the prior as it is now.
    """

    before: float
    after: float


def refit_priors(
    network: nn.Module,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    draw: Callable[[torch.Generator], Any],
    priors: Mapping[str, nn.Module],
    folder: str | Path,
    *,
    num_steps: int = 2000,
    num_samples: int = 4096,
    num_batches: int = 16,
    measured: Callable[[torch.Generator], Any] | None = None,
    learning_rate: Callable[[int], float] | None = None,
    arguments: Callable[[Any], Any] = frames_and_mask,
    seed: int = 0,
    **options: Any,
) -> dict[str, Refit]:
    r"""Maximise :math:`\mathbb E_q \log p` of some latent sites alone, as the last stage of training.

    It is the bound's own gradient, with the guide and the rest of the model held fixed, in evaluation mode:
    reconstructions and swaps stay as they are, and only samples from the prior change. The parameters of the modules in
    `priors` are trained; each that has a method ``start`` gets posterior samples of its site first (of a chain, its
    first step).

    Args:
        network: owns the parameters.
        model: its Pyro model.
        guide: its guide.
        draw: a function of a ``torch.Generator`` that returns a batch, as of :class:`ELBOTraining`.
        priors: {latent site: the module of `network` that makes its prior}, a :class:`~seqdisent.MixturePrior`, say.
        folder: of checkpoints and logs, as of :func:`fit`.
        num_steps: of training.
        num_samples: posterior samples that the priors are started from, at least; whole batches are kept.
        num_batches: batches on which the KL terms are measured, the same before and after.
        measured: draws these batches, held-out ones say; None for `draw`.
        learning_rate: schedule; None for a cosine from 3e-3 to 0.
        arguments: as of :class:`ELBOTraining`.
        seed: of batches and noise.
        **options: those of :func:`fit`.

    Returns:
        {site: :class:`Refit`}. A prior that was not trained before is no baseline: compare `after` with the KL term of
        the model as it was trained.

    Raises:
        ValueError: `priors` is empty, or names a site that is not latent in the model, or a module that `network` does
            not own or the site does not read.
        FloatingPointError: as :func:`fit`, and so all that it raises.
        FileExistsError: as :func:`fit`.
        CheckpointError: as :func:`fit`.
        TypeError: as :func:`fit`.
        OSError: as :func:`fit`.
        KeyboardInterrupt: as :func:`fit`.
        SystemExit: as :func:`fit`.
        RuntimeError: as :func:`~seqdisent.elbo_terms`.

    Example:
        A posterior with two clusters, and a prior that learns them.

        >>> import tempfile
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from seqdisent import MixturePrior
        >>> _ = torch.manual_seed(0)
        >>> network = nn.ModuleDict({"prior": MixturePrior(1, 2)})
        >>> def model(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         z = pyro.sample("z", network["prior"]())
        ...         pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 0.1).to_event(1))
        >>> def draw(generator):
        ...     side = torch.randint(0, 2, (64, 1), generator=generator) * 10.0 - 5.0
        ...     return side + 0.3 * torch.randn(64, 1, generator=generator)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = refit_priors(network, model, guide, draw, {"z": network["prior"]}, folder, num_steps=20,
        ...                          arguments=lambda x: (x,), progress_bar=False, accelerator="cpu")
        >>> found["z"].before > found["z"].after + 3, round(found["z"].after)
        (True, 2)
    """
    check_positive(num_batches=num_batches)
    if not priors:
        raise ValueError("priors: is empty, expected {site: the module that makes its prior}")
    owned = {id(parameter) for parameter in network.parameters()}
    for site, module in priors.items():
        if not owned.issuperset(map(id, module.parameters())):
            raise ValueError(f"priors: {site!r} has parameters that `network` does not own, expected a module of it")
    modes = {module: module.training for module in network.modules()}
    is_trained = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    training = ELBOTraining(
        network, model, guide, draw, num_steps=num_steps, arguments=arguments, seed=seed,
        learning_rate=learning_rate or AnnealingSchedule.cosine(3e-3, 0.0, num_steps),
        objective=lambda terms, weights: terms.elbo({site: float(site in priors) for site in terms.terms}),
    )  # fmt: skip

    @torch.no_grad()
    def kl() -> dict[str, float]:
        with kept_random_state():
            ledgers = [
                elbo_terms(model, guide, *args, **named)
                for args, named in _batches(measured or draw, arguments, num_batches, seed, "gain", priors)
            ]
        if unknown := sorted(set(priors) - set(ledgers[0].kl)):
            known = sorted(ledgers[0].kl)
            raise ValueError(f"priors: the model has no latent site {unknown}, expected some of {known}")
        return {site: sum(terms.kl[site].mean().item() for terms in ledgers) / num_batches for site in priors}

    def check_that_modules_are_read() -> None:
        with kept_random_state():
            args, named = next(_batches(draw, arguments, 1, seed, "read", priors))
            terms = elbo_terms(model, guide, *args, **named).kl
        for site, module in priors.items():
            term, parameters = terms[site].sum(), list(module.parameters())
            is_read = term.requires_grad and len(parameters) > 0
            if not is_read or all(
                gradient is None
                for gradient in torch.autograd.grad(term, parameters, allow_unused=True, retain_graph=True)
            ):
                raise ValueError(
                    f"priors: the model's {site!r} does not read this module, expected the one of its prior"
                )

    network.requires_grad_(False).eval()
    for module in priors.values():
        module.requires_grad_(True)
    try:
        before = kl()
        check_that_modules_are_read()
        start_priors(guide, draw, priors, num_samples=num_samples, arguments=arguments, seed=seed)
        with kept_random_state():
            network.train()
            callbacks = (*options.pop("callbacks", ()), _PriorsAlone(priors))
            fit(training, folder, callbacks=callbacks, **options)
        network.eval()
        after = kl()
    finally:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(is_trained[name])
        for module, is_training in modes.items():
            module.training = is_training
    return {site: Refit(before[site], after[site]) for site in priors}


@torch.no_grad()
def start_priors(
    guide: Callable[..., Any],
    draw: Callable[[torch.Generator], Any],
    priors: Mapping[str, nn.Module],
    *,
    num_samples: int = 4096,
    arguments: Callable[[Any], Any] = frames_and_mask,
    seed: int = 0,
) -> None:
    """Start priors from posterior samples of their sites; of a chain, from those of its first step.

    The guide runs in the mode that its modules are in: call ``eval()`` before, where it has dropout or running
    statistics.

    Args:
        guide: a Pyro guide.
        draw: as of :func:`refit_priors`.
        priors: {site: a module with a method ``start(samples)``}; others are left as they are.
        num_samples: at least so many; whole batches are kept.
        arguments: as of :class:`ELBOTraining`.
        seed: of batches and noise.

    Raises:
        ValueError: `num_samples` below 1, or samples that a prior refuses.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from seqdisent import MixturePrior
        >>> def guide(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         pyro.sample("s", dist.Normal(x, 0.1).to_event(1))
        >>> def draw(generator):
        ...     return torch.randn(50, 1, generator=generator).sign()
        >>> prior = MixturePrior(1, 2)
        >>> start_priors(guide, draw, {"s": prior}, arguments=lambda x: (x,))
        >>> sorted(round(location) for location in prior.loc.flatten().tolist())
        [-1, 1]
    """
    check_positive(num_samples=num_samples)
    samples: dict[str, list[Tensor]] = {site: [] for site, prior in priors.items() if hasattr(prior, "start")}
    if not samples:
        return
    with kept_random_state():
        for args, named in _batches(draw, arguments, num_samples, seed, "start", priors):
            found = infer(guide, *args, sample=True, **named)
            for site, values in samples.items():
                if site not in found:
                    raise ValueError(f"priors: the guide has no site {site!r}, expected some of {sorted(found)}")
                distribution, value = found[site]
                if as_chain(distribution) is not None:
                    value = value.select(value.ndim - distribution.event_dim, 0)
                values.append(value)
            if sum(value.shape[:-1].numel() for value in next(iter(samples.values()))) >= num_samples:
                break
    for site, values in samples.items():
        priors[site].start(torch.cat(values))  # type: ignore[operator]


def _batches(
    draw: Callable[[torch.Generator], Any],
    arguments: Callable[[Any], Any],
    number: int,
    seed: int,
    stream: str,
    priors: Mapping[str, nn.Module],
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield what model and guide take from each of some batches, on the priors' device; the noise is seeded before."""
    device = next((parameter.device for prior in priors.values() for parameter in prior.parameters()), "cpu")
    for step in range(number):
        batch = draw(torch.Generator().manual_seed(step_seed(seed, stream, step, 0)))
        torch.manual_seed(step_seed(seed, stream + " noise", step, 0))
        given = arguments(move_data_to_device(batch, device))
        yield ((), given) if isinstance(given, dict) else (given, {})
