"""The mutual information of two latents, estimated from one batch."""

from __future__ import annotations

import math

from torch import Tensor

from seqdisent._checks import check_positive


def minibatch_mutual_information(log_first: Tensor, log_second: Tensor, num_sequences: int) -> Tensor:
    r"""Estimate the mutual information of two latents by minibatch weighted sampling.

    The marginal of a latent is the average of its posteriors over all N sequences of the training. Of a batch of B
    sequences, :math:`q(u_i) \approx \frac{1}{BN} \sum_j q(u_i \mid x_j)`, and so for u, v and both together. Then

    .. math:: \log q(u_i, v_i) - \log q(u_i) - \log q(v_i)

    of sequence i is a loss that asks two latents to be independent. It is biased: where no two posteriors of a batch
    overlap, it is the constant log BN, whatever the latents have in common.

    Args:
        log_first: :math:`\log q(u_i \mid x_j)` of what was drawn for sequence i under the posterior of sequence j.
        log_second: likewise of the other latent.
        num_sequences: N, at least 1.

    Shape:
        log_first, log_second: (B, B), or (B, B, T) of latents with a value at each step; i, then j.

    Returns:
        Nats, (B,) or (B, T), with gradients.

    Raises:
        ValueError: another shape, two different ones, or `num_sequences` that is no integer of at least 1.

    Example:
        >>> import torch
        >>> import torch.distributions as dist
        >>> u = torch.tensor([-1.0, 0.0, 1.0])
        >>> narrow, wide = (dist.Normal(u, scale).log_prob(u.unsqueeze(1)) for scale in (0.1, 1000.0))  # (3, 3)
        >>> minibatch_mutual_information(narrow, narrow, 3)  # log 9
        tensor([2.1972, 2.1972, 2.1972])
        >>> minibatch_mutual_information(narrow, wide, 3)  # a latent that tells nothing shares log 3 less
        tensor([1.0986, 1.0986, 1.0986])

    References:
        Chen, Li, Grosse and Duvenaud, "Isolating sources of disentanglement in VAEs", NeurIPS 2018, section 4.1.
    """
    check_positive(num_sequences=num_sequences)
    for name, value in (("log_first", log_first), ("log_second", log_second)):
        if value.ndim not in (2, 3) or value.shape[0] != value.shape[1]:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected (B, B) or (B, B, T)")
    if log_first.shape != log_second.shape:
        raise ValueError(
            f"log_second: got shape {tuple(log_second.shape)}, expected log_first's {tuple(log_first.shape)}"
        )
    both = (log_first + log_second).logsumexp(1)
    return both - log_first.logsumexp(1) - log_second.logsumexp(1) + math.log(len(log_first) * num_sequences)
