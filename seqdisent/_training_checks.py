"""What can be wrong with a training that would otherwise go on, and teach nothing or the wrong thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from seqdisent.inference import ELBOTerms


def check_schedules(schedules: Mapping[str, Any]) -> None:
    """Raise TypeError unless every one is a function of the step."""
    for name, schedule in schedules.items():
        if not callable(schedule):
            raise TypeError(
                f"{name}: got {schedule!r}, expected a function of the step, such as AnnealingSchedule.constant(...)"
            )


def check_bound(bound: Any, terms: ELBOTerms) -> None:
    """Raise ValueError unless an objective has a value for each sequence: a sum of more would count some twice."""
    if not isinstance(bound, Tensor) or bound.shape != terms.shape:
        found = f"shape {tuple(bound.shape)}" if isinstance(bound, Tensor) else type(bound).__name__
        raise ValueError(f"objective: returned {found}, expected shape {tuple(terms.shape)}, a value for each sequence")


def check_owner(network: nn.Module, loss: Tensor, arguments: Sequence[Any]) -> None:
    """Raise ValueError if the loss depends on parameters of others, which would be neither trained nor saved."""
    own = {id(tensor) for tensor in (*network.parameters(), *arguments)}
    foreign = [leaf for leaf in _leaves(loss) if id(leaf) not in own]
    if foreign:
        raise ValueError(
            f"network: lacks {len(foreign)} parameters that model and guide use, one of them of shape "
            f"{tuple(foreign[0].shape)}; expected the module that owns all of them (also what is a pyro.param), and "
            "`.requires_grad_(False)` on those that are not to be trained"
        )


def check_parameters(network: nn.Module, num_steps: int) -> None:
    """Raise FloatingPointError unless all parameters that are trained are finite."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise FloatingPointError(
                f"parameter {name} is not finite after {num_steps} training steps, though every term of the ledger "
                "was: the gradient of the last step was not (that of a square root at 0, say), or the learning rate"
            )


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
