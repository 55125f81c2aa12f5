"""Checks of what would otherwise train nothing, or the wrong thing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seqdisent.inference import ELBOTerms, objectives
from seqdisent.masks import check_mask_values


def check_schedules(schedules: Mapping[str, Any]) -> None:
    """Raise TypeError unless every schedule is a function of the step."""
    for name, schedule in schedules.items():
        if not callable(schedule):
            raise TypeError(
                f"{name}: got {schedule!r}, expected a function of the step, such as AnnealingSchedule.constant(...)"
            )


def check_functions(**functions: Any) -> None:
    """Raise TypeError unless every argument can be called."""
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name}: got {type(function).__name__}, expected a function")


def check_objective(objective: Any, kl: Any, weights: Any) -> None:
    """Raise unless `objective` is a function, or the name of one that fits `kl` and `weights`.

    Raises:
        TypeError: it is neither.
        ValueError: an unknown name, or it does not fit.
    """
    if callable(objective):
        objectives.check_kl("elbo", kl)
        return
    if not isinstance(objective, str):
        raise TypeError(f"objective: got {type(objective).__name__}, expected a function or a name")
    objectives.check_objective(objective)
    objectives.check_kl(objective, kl)  # type: ignore[arg-type]
    objectives.check_unweighted(objective, weights)


def check_validation(validation: Any) -> None:
    """Raise TypeError unless `validation` gives the same batches whenever it is asked."""
    hint = "a sequence of batches, or a function that returns an iterable of batches"
    if isinstance(validation, Iterator):
        raise TypeError(f"validation: got {type(validation).__name__}, which can be read once; expected {hint}")
    is_batch = isinstance(validation, tuple) and all(isinstance(part, Tensor) for part in validation)
    if is_batch or isinstance(validation, Tensor | Mapping) or hasattr(validation, "_fields"):
        raise TypeError(f"validation: got one {type(validation).__name__}, expected {hint}; of one batch: [batch]")
    if not callable(validation) and not isinstance(validation, Iterable):
        raise TypeError(f"validation: got {type(validation).__name__}, expected {hint}")


def check_batch_mask(batch: Any) -> None:
    """Raise ValueError if the batch has a `mask` (B, T) with a hole or an empty row.

    The mask is read where the batch is drawn: on an accelerator, reading it would wait for the device.
    """
    mask = batch.get("mask") if isinstance(batch, Mapping) else getattr(batch, "mask", None)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 2 and mask.device.type == "cpu":
        check_mask_values(mask)


def check_bound(bound: Any, terms: ELBOTerms) -> None:
    """Raise ValueError unless an objective has one value a sequence: more would count some sequences twice."""
    if not isinstance(bound, Tensor) or bound.shape != terms.shape:
        found = f"shape {tuple(bound.shape)}" if isinstance(bound, Tensor) else type(bound).__name__
        raise ValueError(f"objective: returned {found}, expected shape {tuple(terms.shape)}, a value for each sequence")


def check_owner(network: nn.Module, loss: Tensor, arguments: Iterable[Any]) -> None:
    """Raise ValueError if the loss depends on parameters that `network` lacks: they would not be trained or saved."""
    own = {id(tensor) for tensor in (*network.parameters(), *arguments)}
    foreign = [leaf for leaf in _leaves(loss) if id(leaf) not in own]
    if foreign:
        raise ValueError(
            f"network: lacks {len(foreign)} parameters that model and guide use, one of them of shape "
            f"{tuple(foreign[0].shape)}; expected the module that owns all of them (also what is a pyro.param), and "
            "`.requires_grad_(False)` on those that are not to be trained"
        )


def check_parameters(network: nn.Module, num_steps: int) -> None:
    """Raise FloatingPointError unless all trained parameters are finite."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise FloatingPointError(
                f"parameter {name} is not finite after {num_steps} training steps, though every term of the ledger "
                "was: the gradient of the last step was not (that of a square root at 0, say), or the learning rate"
            )


def check_optimizer(optimizer: Any, trained: Iterable[nn.Parameter], *, needs_factors: bool) -> None:
    """Raise unless `optimizer` is one of torch, of all trained parameters, in the groups of the rate factors.

    Raises:
        TypeError: it is no optimiser of torch.
        ValueError: it lacks a parameter, or its groups have lost the factors.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: returned {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = list(trained)
    if lacking := sum(id(parameter) not in held for parameter in trained):
        raise ValueError(
            f"optimizer: lacks {lacking} of {len(trained)} trained parameters, expected all; "
            "`.requires_grad_(False)` is for those that are not to be trained"
        )
    if needs_factors and not all("factor" in group for group in optimizer.param_groups):
        raise ValueError("optimizer: its groups lack `factor`, expected those that it was given, as rate_factors wants")


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Return the leaves of the graph of `loss`."""
    nodes: list[Any] = [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        following = {other for other, _ in getattr(node, "next_functions", ())} - seen
        nodes.extend(following)
        seen |= following
