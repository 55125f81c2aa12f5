"""The sums over all paths of a hidden Markov chain, in log space: step by step, or as a scan over matrix products.

What is impossible has the log-probability `IMPOSSIBLE` in here, not -inf: the gradient of a sum of -inf alone is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IMPOSSIBLE = -1e30  # a million steps of it are still finite in float32
_LARGEST_SCAN = 1024  # sequences times K^3; see docs/performance/steps.md


class ForwardSums(NamedTuple):
    r"""What the forward recursion knows of every step; all in nats.

    Attributes:
        predicted: (\*B, T, K), the log-probabilities of k_t given what was observed before t.
        filtered: (\*B, T, K), those given what was observed until t.
        log_evidence: (\*B, T), the log-density of what was observed at t given all before; -inf if it is impossible.
    """

    predicted: Tensor
    filtered: Tensor
    log_evidence: Tensor


def forward_sums(first: Tensor, moves: Tensor, log_likelihoods: Tensor, *, scan: bool | None = None) -> ForwardSums:
    r"""Run the forward recursion.

    Args:
        first: (\*B, K), log-probabilities of the first step.
        moves: (\*B, T - 1, K, K) log-probabilities of each later step given the one before, or (\*B, 1, K, K) of all.
        log_likelihoods: (\*B, T, K).
        scan: whether to multiply matrices pairwise, in a depth of log2(T); None for whichever is faster on a CPU.
    """
    batch_shape, num_classes = log_likelihoods.shape[:-2], log_likelihoods.shape[-1]
    if scan is None:
        scan = batch_shape.numel() * num_classes**3 <= _LARGEST_SCAN
    walk = _filtered_by_scan if scan and log_likelihoods.shape[-2] > 1 else _filtered_by_step
    filtered = walk(first, moves, log_likelihoods)
    later = torch.logsumexp(filtered[..., :-1, :].unsqueeze(-1) + moves, -2)
    predicted = torch.cat([first.expand(*batch_shape, -1).unsqueeze(-2), later], -2)
    return ForwardSums(predicted, filtered, as_log_prob(torch.logsumexp(predicted + log_likelihoods, -1)))


def backward_sums(moves: Tensor, log_likelihoods: Tensor, is_real: Tensor | None) -> Tensor:
    r"""Return what all later steps say of k_t, (\*B, T, K), up to a constant of each step."""
    found = [torch.zeros_like(log_likelihoods[..., 0, :])]
    for t in range(log_likelihoods.shape[-2] - 1, 0, -1):
        move = moves[..., 0 if moves.shape[-3] == 1 else t - 1, :, :]
        of_later = log_likelihoods[..., t, :] + found[-1]
        message = torch.logsumexp(move + of_later.unsqueeze(-2), -1)
        message = message - message.amax(-1, keepdim=True).detach()
        if is_real is not None:  # padding says nothing, not even up to rounding
            message = torch.where(is_real[..., t, None], message, 0.0)
        found.append(message)
    return torch.stack(found[::-1], -2)


def best_path(first: Tensor, moves: Tensor, log_likelihoods: Tensor, is_real: Tensor | None) -> Tensor:
    r"""Return the classes (\*B, T) of the most probable path, by the Viterbi algorithm."""
    score = first + log_likelihoods[..., 0, :]
    stays = torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    came_from = []
    for t in range(1, log_likelihoods.shape[-2]):
        move = moves[..., 0 if moves.shape[-3] == 1 else t - 1, :, :]
        best, before = (score.unsqueeze(-1) + move).max(-2)
        best = best + log_likelihoods[..., t, :]
        if is_real is not None:
            best, before = (torch.where(is_real[..., t, None], *pair) for pair in ((best, score), (before, stays)))
        score = best - best.amax(-1, keepdim=True)
        came_from.append(before)
    path = [score.argmax(-1)]
    for before in reversed(came_from):
        path.append(before.gather(-1, path[-1].unsqueeze(-1)).squeeze(-1))
    return torch.stack(path[::-1], -1)


def as_log_prob(values: Tensor) -> Tensor:
    """Return log-probabilities with -inf for what is impossible."""
    return torch.where(values < IMPOSSIBLE / 2, -torch.inf, values)


def _filtered_by_step(first: Tensor, moves: Tensor, log_likelihoods: Tensor) -> Tensor:
    by_step = moves.unbind(-3) if moves.shape[-3] > 1 else (moves.squeeze(-3),) * (log_likelihoods.shape[-2] - 1)
    found: list[Tensor] = []
    for t, log_likelihood in enumerate(log_likelihoods.unbind(-2)):
        predicted = torch.logsumexp(found[-1].unsqueeze(-1) + by_step[t - 1], -2) if found else first
        found.append((predicted + log_likelihood).log_softmax(-1))
    return torch.stack(found, -2)


def _filtered_by_scan(first: Tensor, moves: Tensor, log_likelihoods: Tensor) -> Tensor:
    # totals over many steps lose digits; what all classes share does not change what is filtered
    likelihoods = log_likelihoods - log_likelihoods.amax(-1, keepdim=True).detach()
    start = (first.unsqueeze(-2) + likelihoods[..., :1, :]).unsqueeze(-2)
    later = moves + likelihoods[..., 1:, :].unsqueeze(-2)
    start = start.expand(*later.shape[:-3], 1, *later.shape[-2:])
    return _products(torch.cat([start, later], -3))[..., 0, :].log_softmax(-1)


def _products(matrices: Tensor) -> Tensor:
    r"""Return M_1, M_1 M_2, ..., M_1 ... M_T of matrices (\*B, T, K, K) in log space: an associative scan."""
    num_steps = matrices.shape[-3]
    if num_steps == 1:
        return matrices
    odd, even = matrices[..., 0::2, :, :], matrices[..., 1::2, :, :]  # counted from 1
    of_even = _products(_product(odd[..., : num_steps // 2, :, :], even))
    rest = odd[..., 1:, :, :]
    of_odd = torch.cat([odd[..., :1, :, :], _product(of_even[..., : rest.shape[-3], :, :], rest)], -3)
    both = torch.stack([of_odd[..., : num_steps // 2, :, :], of_even], -3).flatten(-4, -3)
    return torch.cat([both, of_odd[..., num_steps // 2 :, :, :]], -3)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.logsumexp(a.unsqueeze(-1) + b.unsqueeze(-3), -2)
