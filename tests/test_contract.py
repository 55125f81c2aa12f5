"""What every public module promises: shapes, gradients, saving, copies, repr, dtype, arguments."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pytest
import torch
from hypothesis import given, settings
from strategies import Tensors, batch_shapes, dtypes, seeds
from torch import Tensor, nn

import seqdisent
from seqdisent import (
    Combiner,
    ConvDecoder,
    ConvEncoder,
    GatedTransition,
    MixtureOfExperts,
    MixtureOfExpertsConvDecoder,
    NormalHead,
    Seq2SeqDynamicsEncoder,
    StaticEncoder,
)


class Contract(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]  # the shape of each input to the right of the batch
    event: tuple[int, ...]  # of the output: a tensor's shape to the right of the batch, or a distribution's event
    says: str  # what the repr must hold


def and_unroll(module: Seq2SeqDynamicsEncoder, embeddings: Tensor) -> list[Tensor]:
    return [module.unroll(module(embeddings).mean, 2)]


CONTRACTS = {
    "MixtureOfExperts": Contract(
        lambda: MixtureOfExperts(lambda: nn.Linear(3, 2), 4), ((3,), (4,)), (2,), "num_experts=4"
    ),
    "MixtureOfExpertsConvDecoder": Contract(
        lambda: MixtureOfExpertsConvDecoder(2, 4, out_channels=1, image_size=8, channels=(3,)),
        ((2, 2), (4,)),
        (2, 1, 8, 8),
        "latent_dim=2, num_experts=4, out_channels=1, image_size=8, channels=(3,)",
    ),
    "ConvDecoder": Contract(
        lambda: ConvDecoder(2, out_channels=1, image_size=8, channels=(3,)), ((2,),), (1, 8, 8), "ConvTranspose2d(3, 1"
    ),
    "ConvEncoder": Contract(
        lambda: ConvEncoder(4, in_channels=1, image_size=8, channels=(3,)), ((1, 8, 8),), (4,), "Conv2d(1, 3"
    ),
    "StaticEncoder": Contract(
        lambda: StaticEncoder(3, 2, hidden_dim=4), ((5, 3),), (2,), "in_features=4, out_features=2"
    ),
    "Seq2SeqDynamicsEncoder": Contract(
        lambda: Seq2SeqDynamicsEncoder(3, 2, hidden_dim=4, num_layers=2), ((5, 3),), (2,), "LSTM(3, 4, num_layers=2"
    ),
    "NormalHead": Contract(lambda: NormalHead(3, 2), ((3,),), (2,), "in_features=3, out_features=2"),
    "GatedTransition": Contract(
        lambda: GatedTransition(8, 16, context_dim=3), ((8,), (3,)), (8,), "in_features=11, out_features=16"
    ),
    "Combiner": Contract(lambda: Combiner(2, 4, context_dim=3), ((2,), (3,)), (2,), "in_features=3, out_features=4"),
}
every_module = pytest.mark.parametrize("name", CONTRACTS)


def outputs(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Return every tensor that a call gives: of a distribution its moments, of a sequence encoder its unrolling too."""
    output = module(*inputs)
    tensors = [output] if isinstance(output, Tensor) else [output.mean, output.stddev]
    return tensors + (and_unroll(module, *inputs) if isinstance(module, Seq2SeqDynamicsEncoder) else [])


def draw_inputs(tensors: Tensors, name: str, batch_shape: tuple[int, ...] = (2,)) -> list[Tensor]:
    return [tensors.normal(*batch_shape, *shape) for shape in CONTRACTS[name].inputs]


def test_every_public_module_has_a_contract():
    public = {name for name in seqdisent.__all__ if inspect.isclass(getattr(seqdisent, name))}
    assert {name for name in public if issubclass(getattr(seqdisent, name), nn.Module)} == set(CONTRACTS)


@every_module
@settings(max_examples=5)  # for each of the modules
@given(seed=seeds(), batch_shape=batch_shapes(), dtype=dtypes())
def test_shapes_and_dtype(name, seed, batch_shape, dtype):
    tensors = Tensors(seed, dtype)
    module, inputs = tensors.build(CONTRACTS[name].build), draw_inputs(tensors, name, batch_shape)
    output = module(*inputs)
    if isinstance(output, Tensor):
        assert output.shape == (*batch_shape, *CONTRACTS[name].event)
    else:
        assert isinstance(output, pyro.distributions.Distribution)
        assert isinstance(output, torch.distributions.Distribution)
        assert output.has_rsample
        assert (output.batch_shape, output.event_shape) == (batch_shape, CONTRACTS[name].event)
        assert output.rsample().shape == (*batch_shape, *CONTRACTS[name].event)
        assert output.log_prob(output.mean).shape == batch_shape
    assert all(tensor.dtype == dtype for tensor in outputs(module, inputs))


@every_module
def test_every_parameter_and_input_gets_a_gradient(name):
    tensors = Tensors(0)
    module, inputs = tensors.build(CONTRACTS[name].build), draw_inputs(tensors, name)
    for tensor in inputs:
        tensor.requires_grad_()
    sum(tensor.pow(3).sum() for tensor in outputs(module, inputs)).backward()
    for key, tensor in [*module.named_parameters(), *enumerate(inputs)]:
        assert tensor.grad is not None, key
        assert tensor.grad.isfinite().all(), key
        assert tensor.grad.norm() > 0, key


@every_module
def test_saved_weights_load_into_a_new_module(name):
    tensors = Tensors(0)
    module, other = (tensors.build(CONTRACTS[name].build) for _ in range(2))
    inputs = draw_inputs(tensors, name)
    expected = outputs(module, inputs)
    assert not torch.equal(outputs(other, inputs)[0], expected[0])
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(outputs(other, inputs), expected, strict=True))


@every_module
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])  # noqa: S301
def test_copies_give_the_same_and_share_nothing(name, duplicate):
    tensors = Tensors(0)
    module, inputs = tensors.build(CONTRACTS[name].build), draw_inputs(tensors, name)
    expected, other = outputs(module, inputs), duplicate(module)
    assert all(torch.equal(a, b) for a, b in zip(outputs(other, inputs), expected, strict=True))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(outputs(module, inputs), expected, strict=True))


@every_module
def test_calls_change_no_state_and_take_no_random_numbers(name):
    tensors = Tensors(0)
    module, inputs = tensors.build(CONTRACTS[name].build), draw_inputs(tensors, name)
    state, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    untouched = [tensor.clone() for tensor in inputs]
    first, second = outputs(module, inputs), outputs(module.eval(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, untouched, strict=True))
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@every_module
def test_one_seed_gives_one_module(name):
    modules = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        modules.append(CONTRACTS[name].build().state_dict())
    assert all(torch.equal(modules[0][key], modules[1][key]) for key in modules[0])
    assert any(not torch.equal(modules[0][key], modules[2][key]) for key in modules[0])


@every_module
def test_repr_says_the_sizes(name):
    text = repr(CONTRACTS[name].build())
    assert text.startswith(name)
    assert CONTRACTS[name].says in text


@every_module
def test_wrong_last_dimension_is_an_error_that_names_the_argument(name):
    module = CONTRACTS[name].build()
    arguments = list(inspect.signature(module.forward).parameters)
    for i, argument in enumerate(arguments[: len(CONTRACTS[name].inputs)]):
        if (name, argument) == ("MixtureOfExperts", "x"):
            continue  # whatever the expert takes
        inputs = [torch.zeros(2, *shape) for shape in CONTRACTS[name].inputs]
        inputs[i] = torch.zeros(*inputs[i].shape[:-1], 11)
        with pytest.raises(ValueError, match=f"^{argument}: .*11.*expected"):
            module(*inputs)


@every_module
def test_sizes_are_positional_and_options_are_keywords(name):
    parameters = inspect.signature(getattr(seqdisent, name)).parameters.values()
    for parameter in parameters:
        required = parameter.default is parameter.empty
        assert required or parameter.kind == parameter.KEYWORD_ONLY, parameter.name
    assert sum(parameter.kind == parameter.POSITIONAL_OR_KEYWORD for parameter in parameters) >= 1


NO_HEADS = ("MixtureOfExperts", "MixtureOfExpertsConvDecoder", "ConvDecoder", "ConvEncoder")
HEADS = [name for name in CONTRACTS if name not in NO_HEADS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_what_ends_in_a_distribution_refuses_parameters_in_half_precision(name, dtype):
    tensors = Tensors(0, torch.float32)
    module, inputs = tensors.build(CONTRACTS[name].build).to(dtype), draw_inputs(tensors, name)
    with pytest.raises(
        TypeError, match=f"parameters: have dtype {dtype}, expected torch.float32 or torch.float64; half"
    ):
        module(*(tensor.to(dtype) for tensor in inputs))


@every_module
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_is_kept(name):
    tensors = Tensors(0, torch.float32)
    module, inputs = tensors.build(CONTRACTS[name].build), draw_inputs(tensors, name)
    expected = outputs(module, inputs)
    on_device = outputs(module.cuda(), [tensor.cuda() for tensor in inputs])
    for got, wanted in zip(on_device, expected, strict=True):
        assert got.device.type == "cuda"
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-2, atol=1e-2)  # TF32 convolutions
