"""What every public module promises: shapes, gradients, saving, copies, repr, dtype, arguments."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pyro
import pytest
import torch
from contracts import declared
from hypothesis import given, settings
from strategies import Tensors, batch_shapes, dtypes, seeds
from torch import Tensor, nn

import seqdisent

CONTRACTS = declared()
every_module = pytest.mark.parametrize("name", CONTRACTS)


def outputs(name: str, module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Return every tensor that a call gives (of a distribution its moments or densities), and those of other calls."""
    output = module(*inputs)
    if isinstance(output, Tensor):
        tensors = [output]
    elif isinstance(output, pyro.distributions.Independent):
        tensors = [output.mean, output.stddev]
    else:
        event = next(module.parameters()).new_ones(output.event_shape)
        tensors = [output.log_prob(scale * event) for scale in (0.0, 0.7, -1.3)]
    return tensors + CONTRACTS[name].other_calls(module, inputs)


def draw_inputs(tensors: Tensors, name: str, batch_shape: tuple[int, ...] = (2,)) -> list[Tensor]:
    drawn = [tensors.normal(*batch_shape, *shape) for shape in CONTRACTS[name].inputs]
    return [tensor.abs() if i in CONTRACTS[name].positive else tensor for i, tensor in enumerate(drawn)]


def test_every_public_module_has_a_contract():
    public = {name for name in seqdisent.__all__ if inspect.isclass(getattr(seqdisent, name))}
    modules = {name for name in public if issubclass(getattr(seqdisent, name), nn.Module)}
    modules.remove("VampPrior")  # which reads a function, and no tensor
    assert modules == set(CONTRACTS), "declare CONTRACTS in the file that tests the block"


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
        draw = output.rsample if output.has_rsample else output.sample  # of a mixture
        assert (output.batch_shape, output.event_shape) == (batch_shape, CONTRACTS[name].event)
        assert draw().shape == (*batch_shape, *CONTRACTS[name].event)
        assert output.log_prob(draw()).shape == batch_shape
    assert all(tensor.dtype == dtype for tensor in outputs(name, module, inputs))


@every_module
def test_every_parameter_and_input_gets_a_gradient(name):
    tensors = Tensors(0)
    module, inputs = tensors.build(CONTRACTS[name].build), draw_inputs(tensors, name)
    for tensor in inputs:
        tensor.requires_grad_()
    sum(tensor.pow(3).sum() for tensor in outputs(name, module, inputs)).backward()
    for key, tensor in [*module.named_parameters(), *enumerate(inputs)]:
        assert tensor.grad is not None, key
        assert tensor.grad.isfinite().all(), key
        assert tensor.grad.norm() > 0, key


@every_module
def test_saved_weights_load_into_a_new_module(name):
    tensors = Tensors(0)
    module, other = (tensors.build(CONTRACTS[name].build) for _ in range(2))
    inputs = draw_inputs(tensors, name)
    expected = outputs(name, module, inputs)
    assert not torch.equal(outputs(name, other, inputs)[0], expected[0])
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(outputs(name, other, inputs), expected, strict=True))


@every_module
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])  # noqa: S301
def test_copies_give_the_same_and_share_nothing(name, duplicate):
    tensors = Tensors(0)
    module, inputs = tensors.build(CONTRACTS[name].build), draw_inputs(tensors, name)
    expected, other = outputs(name, module, inputs), duplicate(module)
    assert all(torch.equal(a, b) for a, b in zip(outputs(name, other, inputs), expected, strict=True))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(outputs(name, module, inputs), expected, strict=True))


@every_module
def test_calls_change_no_state_and_take_no_random_numbers(name):
    tensors = Tensors(0)
    module, inputs = tensors.build(CONTRACTS[name].build), draw_inputs(tensors, name)
    state, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    untouched = [tensor.clone() for tensor in inputs]
    first, second = outputs(name, module, inputs), outputs(name, module.eval(), inputs)
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
    same = all(torch.equal(modules[0][key], modules[2][key]) for key in modules[0])
    assert same is not CONTRACTS[name].starts_at_random


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
        if argument in CONTRACTS[name].takes_any:
            continue
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


def gives_a_distribution(name: str) -> bool:
    inputs = [torch.zeros(2, *shape) for shape in CONTRACTS[name].inputs]
    return isinstance(CONTRACTS[name].build()(*inputs), pyro.distributions.Distribution)


HEADS = [name for name in CONTRACTS if gives_a_distribution(name)]


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
    expected = outputs(name, module, inputs)
    on_device = outputs(name, module.cuda(), [tensor.cuda() for tensor in inputs])
    for got, wanted in zip(on_device, expected, strict=True):
        assert got.device.type == "cuda"
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-2, atol=1e-2)  # TF32 convolutions
