"""Heads against their formula."""

from __future__ import annotations

import torch
from contracts import Contract
from hypothesis import given
from hypothesis import strategies as st
from reference import affine, softplus
from strategies import Tensors, dimensions, seeds

from seqdisent import NormalHead

CONTRACTS = {
    "NormalHead": Contract(lambda: NormalHead(3, 2), ((3,),), (2,), "in_features=3, out_features=2"),
}


@given(seeds(), dimensions(), dimensions(), st.sampled_from((1e-4, 0.1, 2.0)))
def test_normal_head_is_its_formula(seed, in_features, latent_dim, min_scale):
    tensors = Tensors(seed)
    head = tensors.build(lambda: NormalHead(in_features, latent_dim, min_scale=min_scale))
    features = tensors.normal(3, in_features)
    normal = head(features)
    for b in range(3):
        torch.testing.assert_close(normal.mean[b], affine(head.loc, features[b]))
        torch.testing.assert_close(normal.stddev[b], softplus(affine(head.scale, features[b])) + min_scale)


@given(st.floats(0.01, 50.0))
def test_training_starts_at_the_initial_scale(initial_scale):
    head = NormalHead(3, 2, initial_scale=initial_scale).double()
    scale = head(torch.zeros(3, dtype=torch.float64)).stddev
    torch.testing.assert_close(scale, torch.full_like(scale, initial_scale), rtol=1e-5, atol=0.0)  # a float32 bias
