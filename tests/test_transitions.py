"""One step of a chain: against the formulas of the docstrings, with the module's own weights."""

from __future__ import annotations

import pytest
import torch
from contracts import Contract
from hypothesis import given
from hypothesis import strategies as st
from reference import affine, softplus
from strategies import Tensors, batch_shapes, dimensions, dtypes, num_steps, seeds
from torch import Tensor, nn

from seqdisent import Combiner, GatedTransition, OrnsteinUhlenbeckTransition

CONTRACTS = {
    "GatedTransition": Contract(
        lambda: GatedTransition(8, 16, context_dim=3), ((8,), (3,)), (8,), "in_features=11, out_features=16"
    ),
    "OrnsteinUhlenbeckTransition": Contract(
        lambda: OrnsteinUhlenbeckTransition(4),
        ((4,), (1,)),
        (4,),
        "latent_dim=4",
        positive=(1,),
        starts_at_random=False,
    ),
    "Combiner": Contract(lambda: Combiner(2, 4, context_dim=3), ((2,), (3,)), (2,), "in_features=3, out_features=4"),
}

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64


def gated_transition(latent_dim: int = 2, context_dim: int = 3) -> GatedTransition:
    return GatedTransition(latent_dim, 4, context_dim=context_dim)


def combiner(latent_dim: int = 2, context_dim: int = 3) -> Combiner:
    return Combiner(latent_dim, 4, context_dim=context_dim)


both = pytest.mark.parametrize("build", [gated_transition, combiner])


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def moments(conditional) -> Tensor:
    return torch.cat([conditional.mean, conditional.stddev], -1)


# The formulas --------------------------------------------------------------------------------------------------------


@given(seeds(), dimensions(), dimensions(), st.integers(0, 3), st.sampled_from((1e-4, 0.1, 2.0)))
def test_gated_transition_is_its_formula(seed, latent_dim, hidden_dim, context_dim, min_scale):
    tensors = Tensors(seed)
    transition = tensors.build(
        lambda: GatedTransition(latent_dim, hidden_dim, context_dim=context_dim, min_scale=min_scale)
    )
    z_prev, context = tensors.normal(3, latent_dim), tensors.normal(3, context_dim)
    step = transition(z_prev, context if context_dim else None)
    f1, f2 = transition.gate[0], transition.gate[2]
    f3, f4 = transition.proposal[0], transition.proposal[2]
    f5, f6 = transition.linear, transition.scale
    for b in range(3):
        u = torch.cat([z_prev[b], context[b]])
        g = sigmoid(affine(f2, relu(affine(f1, u))))
        h = affine(f4, relu(affine(f3, u)))
        torch.testing.assert_close(step.mean[b], g * h + (1 - g) * affine(f5, u), **CLOSE)
        torch.testing.assert_close(step.stddev[b], softplus(affine(f6, relu(h))) + min_scale, **CLOSE)


@given(seeds(), dimensions(), dimensions(), dimensions(), st.sampled_from((1e-4, 0.1, 2.0)))
def test_combiner_is_its_formula(seed, latent_dim, hidden_dim, context_dim, min_scale):
    tensors = Tensors(seed)
    module = tensors.build(lambda: Combiner(latent_dim, hidden_dim, context_dim=context_dim, min_scale=min_scale))
    z_prev, context = tensors.normal(3, latent_dim), tensors.normal(3, context_dim)
    step = module(z_prev, context)
    f7, f8, f9 = module.previous, module.head.loc, module.head.scale
    for b in range(3):
        e = (torch.tanh(affine(f7, z_prev[b])) + affine(module.context, context[b])) / 2
        torch.testing.assert_close(step.mean[b], affine(f8, e), **CLOSE)
        torch.testing.assert_close(step.stddev[b], softplus(affine(f9, e)) + min_scale, **CLOSE)


@given(seeds(), batch_shapes(2, 3), num_steps())
def test_combiner_reads_contexts_that_were_projected_at_once(seed, batch_shape, steps):
    tensors = Tensors(seed)
    module = combiner().double()
    z_prev, context = tensors.normal(*batch_shape, 2), tensors.normal(*batch_shape, steps, 3)
    projected = module.project(context)
    assert projected.shape == (*batch_shape, steps, 4)
    for t in range(steps):
        expected = moments(module(z_prev, context[..., t, :]))
        torch.testing.assert_close(moments(module.step(z_prev, projected[..., t, :])), expected, **CLOSE)


@pytest.mark.parametrize("filling", [1e6, float("nan")])
def test_padding_of_projected_contexts_reaches_no_gradient(filling):
    module, context = combiner(), Tensors(0).normal(2, 3, 3).float()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    gradients = []
    for padding in (0.0, filling):
        padded = torch.where(mask[..., None], context, padding).requires_grad_()
        terms = torch.where(mask[..., None], module.project(padded, mask), 0.0)
        gradients.append(torch.autograd.grad(terms.square().sum(), (padded, *module.context.parameters())))
    for clean, dirty in zip(*gradients, strict=True):
        assert torch.equal(clean, dirty)


def test_a_context_that_is_not_projected_is_refused():
    with pytest.raises(ValueError, match="^projected: .*hidden_dim"):
        combiner().step(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"^projected: .*\(7, 4\)"):
        combiner().step(torch.zeros(5, 1, 2), torch.zeros(7, 4))
    with pytest.raises(ValueError, match="^context: .*context_dim"):
        combiner().project(torch.zeros(5, 4))


@pytest.mark.parametrize("context_dim", [0, 3])
def test_linear_path_starts_as_identity_on_z_and_zero_on_the_context(context_dim):
    transition = GatedTransition(2, 4, context_dim=context_dim)
    z_prev = torch.randn(5, 2)
    u = torch.cat([z_prev, 10 * torch.randn(5, context_dim)], -1)
    torch.testing.assert_close(transition.linear(u), z_prev)
    with torch.no_grad():  # with the gate shut, the whole transition
        transition.gate[2].weight.zero_()
        transition.gate[2].bias.fill_(-100)
    step = transition(z_prev, u[:, 2:] if context_dim else None)
    torch.testing.assert_close(step.mean, z_prev)


# What both hold to ---------------------------------------------------------------------------------------------------


@both
@given(dtype=dtypes(), size=st.sampled_from((0.0, 1.0, 1e6, -1e6)), seed=seeds(), noise=st.sampled_from((0.0, 3.0)))
def test_scale_is_bounded_away_from_zero_whatever_the_input(build, dtype, size, seed, noise):
    tensors = Tensors(seed, dtype)
    module = tensors.build(build, noise=noise)
    z_prev, context = (size * tensors.normal(4, n).sign() for n in (2, 3))
    z_prev.requires_grad_()
    step = module(z_prev, context)
    assert step.mean.isfinite().all()
    assert step.stddev.isfinite().all()
    assert (step.stddev >= 1e-4 * (1 - 1e-6)).all()
    assert step.log_prob(step.rsample()).isfinite().all()
    step.log_prob(step.mean.detach() + 1e-4).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in [*module.parameters(), z_prev])


@both
@given(seed=seeds(), batch_shape=batch_shapes())
def test_any_batch_shape_equals_the_flattened_call(build, seed, batch_shape):
    tensors = Tensors(seed)
    module = tensors.build(build)
    z_prev, context = tensors.normal(*batch_shape, 2), tensors.normal(*batch_shape, 3)
    step = module(z_prev, context)
    assert step.batch_shape == batch_shape
    assert step.event_shape == (2,)
    flat = module(z_prev.reshape(-1, 2), context.reshape(-1, 3))
    torch.testing.assert_close(moments(step), moments(flat).reshape(*batch_shape, 4), **CLOSE)


@both
@given(seed=seeds(), steps=num_steps(), batch=dimensions(3))
def test_static_context_is_broadcast_against_steps_on_the_left(build, seed, steps, batch):
    tensors = Tensors(seed)
    module = tensors.build(build)
    path, context = tensors.normal(steps, batch, 2), tensors.normal(batch, 3)
    one_by_one = torch.stack([moments(module(z_prev, context)) for z_prev in path])
    torch.testing.assert_close(moments(module(path, context)), one_by_one, **CLOSE)


@both
def test_a_row_does_not_see_its_neighbours(build):
    tensors = Tensors(0)
    module = tensors.build(build)
    z_prev, context = tensors.normal(3, 2).requires_grad_(), tensors.normal(3, 3).requires_grad_()
    step = moments(module(z_prev, context))
    changed = moments(
        module(torch.cat([z_prev[:1], tensors.normal(2, 2)]), torch.cat([context[:1], tensors.normal(2, 3)]))
    )
    torch.testing.assert_close(step[0], changed[0], rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(step[0].sum(), [z_prev, context]):
        assert gradient[0].abs().sum() > 0
        assert (gradient[1:] == 0).all()


@both
def test_a_nan_is_left_to_the_ledger_which_can_name_the_term(build):
    step = build()(torch.full((2, 2), float("nan")), torch.zeros(2, 3))
    assert step.log_prob(torch.zeros(2, 2)).isnan().all()


@both
def test_float32_under_autocast(build):
    module, z_prev, context = build(), torch.randn(4, 2), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        step = module(z_prev, context)
        half = module(z_prev.bfloat16(), context.bfloat16())
    assert step.mean.dtype == step.stddev.dtype == half.mean.dtype == half.stddev.dtype == torch.float32
    # bfloat16 has 8 bits: a relative error of 0.4 % an operation, on numbers of order 1
    torch.testing.assert_close(moments(step), moments(module(z_prev, context)), rtol=0, atol=0.05)


@both
@pytest.mark.parametrize(
    ("z_prev", "context", "message"),
    [
        ((2, 3), (2, 3), "^z_prev: "),
        ((), (2, 3), r"^z_prev: .*\(\)"),
        ((2, 2), (2, 2), "^context: "),
        ((2, 2), (), r"^context: .*\(\)"),
        ((2, 2), (4, 3), r"^context: .*\(4, 3\)"),
        # z_prev is never broadcast against a larger context
        ((1, 2), (4, 3), r"^context: .*\(4, 3\)"),
        ((2,), (1, 3), r"^context: .*\(1, 3\)"),
        ((2, 2), None, "^context: "),
    ],
)
def test_inputs_that_do_not_fit_are_refused(build, z_prev, context, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(z_prev), None if context is None else torch.zeros(context))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both
def test_parameters_in_half_precision_are_refused_by_name(build, dtype):
    module, z_prev, context = build().to(dtype), torch.zeros(2, 2, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    with pytest.raises(TypeError, match="^parameters: "):
        module(z_prev, context)
    with pytest.raises(TypeError, match="^z_prev: "):
        build()(z_prev, context.float())


def test_a_mask_on_another_device_is_refused():
    mask = torch.ones(2, 4, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="^mask: .*meta"):
        combiner().project(torch.zeros(2, 4, 3), mask)


def test_a_context_where_none_was_declared_is_refused():
    with pytest.raises(ValueError, match="^context: "):
        GatedTransition(2, 3)(torch.zeros(4, 2), torch.zeros(4, 1))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: GatedTransition(0, 3), "^latent_dim: "),
        (lambda: GatedTransition(2, 0), "^hidden_dim: "),
        (lambda: GatedTransition(2, 3, context_dim=-1), "^context_dim: "),
        (lambda: GatedTransition(2, 3, context_dim=1.0), "^context_dim: "),
        (lambda: GatedTransition(2, 3, context_dim=True), "^context_dim: "),
        (lambda: GatedTransition(2, 3, min_scale=0.0), "^min_scale: "),
        (lambda: Combiner(0, 3, context_dim=1), "^latent_dim: "),
        (lambda: Combiner(2, 0, context_dim=1), "^hidden_dim: "),
        (lambda: Combiner(2, 3, context_dim=0), "^context_dim: "),
        (lambda: Combiner(2, 3, context_dim=1, min_scale=-1.0), "^min_scale: "),
    ],
)
def test_sizes_that_make_no_sense_are_refused(factory, message):
    with pytest.raises(ValueError, match=message):
        factory()


def test_every_layer_of_the_paper_is_there():
    """f1 ... f6 and f7 ... f9 with the layer of the context: no more, no less."""
    assert sum(isinstance(module, nn.Linear) for module in gated_transition().modules()) == 6
    assert sum(isinstance(module, nn.Linear) for module in combiner().modules()) == 4
