"""The mutual information of two latents from one batch: by hand, and where it is known."""

import math

import pytest
import torch
import torch.distributions as dist

from seqdisent.inference import minibatch_mutual_information


def test_by_hand():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 4, 3, generator=generator, dtype=torch.float64)
    found = minibatch_mutual_information(first, second, 50)
    for i in range(4):
        for t in range(3):
            both, one, other = (
                sum(math.exp(value[i, j, t]) for j in range(4)) / (4 * 50) for value in (first + second, first, second)
            )
            assert found[i, t].item() == pytest.approx(math.log(both) - math.log(one) - math.log(other), rel=1e-12)
    torch.testing.assert_close(minibatch_mutual_information(first[..., 0], second[..., 0], 50), found[:, 0])


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_on_all_sequences_at_once_it_is_the_mutual_information(correlation):
    """With the whole training set as its batch, N = B, the estimate is that of the aggregate posterior, plus log B.

    Means (a, b) of two latents are a correlated Normal, and so are the latents, drawn around them. The information of
    two Normals is known. The constant is taken off.
    """
    generator = torch.Generator().manual_seed(1)
    count, noise = 3000, 0.5
    a, e = torch.randn(2, count, generator=generator, dtype=torch.float64)
    b = correlation * a + math.sqrt(1 - correlation**2) * e
    u, v = (mean + noise * torch.randn(count, generator=generator, dtype=torch.float64) for mean in (a, b))
    log_u, log_v = (dist.Normal(m, noise).log_prob(x.unsqueeze(1)) for m, x in ((a, u), (b, v)))
    found = minibatch_mutual_information(log_u, log_v, count).mean().item() - math.log(count)
    of_draws = correlation / (1 + noise**2)
    assert found == pytest.approx(-0.5 * math.log(1 - of_draws**2), abs=0.05)


def test_posteriors_that_do_not_overlap_give_its_constant_and_no_gradient():
    centres = torch.arange(5.0, dtype=torch.float64).requires_grad_()
    log_prob = dist.Normal(100 * centres, 1.0).log_prob(100 * centres.detach().unsqueeze(1))
    found = minibatch_mutual_information(log_prob, log_prob, 20)
    torch.testing.assert_close(found, torch.full((5,), math.log(100), dtype=torch.float64))
    found.sum().backward()
    assert not centres.grad.any()


@pytest.mark.parametrize(
    ("first", "second", "count", "message"),
    [
        ((3, 4), (3, 3), 9, r"log_first: got shape \(3, 4\), expected \(B, B\) or \(B, B, T\)"),
        ((3, 3), (3,), 9, r"log_second: got shape \(3,\)"),
        ((3, 3), (3, 3, 2), 9, r"log_second: got shape \(3, 3, 2\), expected log_first's \(3, 3\)"),
        ((3, 3), (3, 3), 0, "num_sequences: got 0, expected an integer >= 1"),
    ],
)
def test_mistakes(first, second, count, message):
    with pytest.raises(ValueError, match=message):
        minibatch_mutual_information(torch.zeros(first), torch.zeros(second), count)
