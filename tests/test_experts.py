"""Blending: against loops, one-hot, linear, blind to order and to neighbours; what cannot be blended is refused."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from contracts import Contract
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import blended_module
from strategies import Tensors, dimensions, seeds
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from seqdisent import MixtureOfExperts, NormalHead

CONTRACTS = {
    "MixtureOfExperts": Contract(
        lambda: MixtureOfExperts(lambda: nn.Linear(3, 2), 4),
        ((3,), (4,)),
        (2,),
        "num_experts=4",
        takes_any=("x",),  # whatever the expert takes
    ),
}

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64; sums are taken in another order


class Tied(nn.Module):
    """An autoencoder of one matrix, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


class WithConstants(nn.Module):
    """A module with buffers that forward only reads; the names hold "_u" and "_v" as those of spectral norm do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("time_unit", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("scale_v", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_v * self.linear(x * self.time_unit)


class Scaled(nn.Module):
    """A module with a number as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


class TwoNames(nn.Module):
    """A module that has one parameter under two names, as long as the banks of some tests."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))
        self.bias = self.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.tanh(x) + self.bias


class Twice(nn.Module):
    """A module that has one layer under two names, and another one inside both of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        inner = nn.Linear(3, 3)
        self.left, self.right = nn.Sequential(inner, nn.Tanh()), nn.Sequential(inner, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.second(torch.tanh(self.first(x)))) + self.right(x)


class Several(nn.Module):
    """A module that reads several tensors and returns several, nested and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, others: dict[str, Tensor], index: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        hidden = self.linear(x) * others["scale"]
        return hidden, {"parts": [hidden.sum(), hidden[..., index]]}


EXPERTS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "linear on steps": (lambda: nn.Linear(3, 2), (5, 3)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 1, 1)), (2, 6)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), (3,)),
    "tied": (Tied, (3,)),
    "constant buffers": (WithConstants, (3,)),
    "a number as a parameter": (Scaled, (3,)),
    "one submodule under two names": (Twice, (3,)),
    "one parameter under two names": (TwoNames, (4,)),
}
every_expert = pytest.mark.parametrize(("factory", "example_shape"), EXPERTS.values(), ids=EXPERTS)


def bank_of(mixture: MixtureOfExperts) -> dict[str, Tensor]:
    return {name: bank.detach() for name, bank in mixture.expert.named_parameters()}


@every_expert
@settings(max_examples=5)  # for each of the experts
@given(seed=seeds(), num_experts=dimensions(4), batch=dimensions(3))
def test_mixture_equals_the_loop(factory, example_shape, seed, num_experts, batch):
    tensors = Tensors(seed)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, num_experts))
    x, weights = tensors.normal(batch, *example_shape), tensors.normal(batch, num_experts)
    expected = blended_module(factory().to(torch.float64), bank_of(mixture), x, weights)
    torch.testing.assert_close(mixture(x, weights), expected, **CLOSE)


@every_expert
def test_one_expert_is_the_plain_module(factory, example_shape):
    torch.manual_seed(3)
    mixture = MixtureOfExperts(factory, 1).double()
    torch.manual_seed(3)
    plain = factory().double()
    x = Tensors(0).normal(2, *example_shape)
    expected = torch.stack([plain(row) for row in x])
    torch.testing.assert_close(mixture(x, torch.ones(2, 1, dtype=torch.float64)), expected, **CLOSE)


@every_expert
def test_one_hot_weights_pick_one_expert_of_the_bank(factory, example_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 3))
    x = tensors.normal(*example_shape).expand(3, *example_shape)
    outputs = mixture(x, torch.eye(3, dtype=torch.float64))
    for k in range(3):
        plain = factory().double()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(bank_of(mixture)[name][k])
        torch.testing.assert_close(outputs[k], plain(x[k]), **CLOSE)


@given(seeds(), dimensions(4), st.floats(-2, 2), st.floats(-2, 2))
def test_mixture_of_linear_experts_is_linear_in_the_bank(seed, num_experts, a, b):
    tensors = Tensors(seed)
    first, second = (tensors.build(lambda: MixtureOfExperts(lambda: nn.Linear(3, 2), num_experts)) for _ in range(2))
    both = copy.deepcopy(first)
    with torch.no_grad():
        for parameter, one, two in zip(both.parameters(), first.parameters(), second.parameters(), strict=True):
            parameter.copy_(a * one + b * two)
    x, weights = tensors.normal(2, 3), tensors.simplex(2, num_experts)
    torch.testing.assert_close(both(x, weights), a * first(x, weights) + b * second(x, weights), **CLOSE)


@every_expert
def test_mixture_is_blind_to_the_order_of_experts(factory, example_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 4))
    permuted, order = copy.deepcopy(mixture), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in permuted.parameters():
            parameter.copy_(parameter[order].clone())
    x, weights = tensors.normal(3, *example_shape), tensors.simplex(3, 4)
    torch.testing.assert_close(permuted(x, weights[:, order]), mixture(x, weights), **CLOSE)


@every_expert
def test_mixture_row_does_not_see_its_neighbours(factory, example_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 2))
    x, weights = tensors.normal(3, *example_shape).requires_grad_(), tensors.simplex(3, 2).requires_grad_()
    output = mixture(x, weights)
    changed = mixture(
        torch.cat([x[:1], tensors.normal(2, *example_shape)]), torch.cat([weights[:1], tensors.simplex(2, 2)])
    )
    torch.testing.assert_close(output[0], changed[0], rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(output[0].square().sum(), [x, weights]):
        assert gradient[0].abs().sum() > 0
        assert (gradient[1:] == 0).all()


@every_expert
@pytest.mark.parametrize("batch_shape", [(), (2,), (2, 3), (1, 2, 1)])
def test_mixture_takes_any_batch_shape(factory, example_shape, batch_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 2))
    x, weights = tensors.normal(*batch_shape, *example_shape), tensors.simplex(*batch_shape, 2)
    output, flat = mixture(x, weights), mixture(x.reshape(-1, *example_shape), weights.reshape(-1, 2))
    assert output.shape == (*batch_shape, *flat.shape[1:])
    torch.testing.assert_close(output, flat.reshape(output.shape), **CLOSE)


@every_expert
def test_every_parameter_of_a_mixture_leads_with_the_experts_and_gets_a_gradient(factory, example_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 3))
    mixture(tensors.normal(4, *example_shape), tensors.simplex(4, 3)).pow(3).sum().backward()
    assert {name for name, _ in mixture.expert.named_parameters()} == {name for name, _ in factory().named_parameters()}
    for parameter in mixture.parameters():
        assert parameter.shape[0] == 3
        assert (parameter.grad.reshape(3, -1).norm(dim=1) > 0).all()


@every_expert
def test_a_call_leaves_the_bank_as_it_was(factory, example_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 3))
    x, weights = tensors.normal(2, *example_shape), tensors.simplex(2, 3)
    places = [
        (module, name, parameter) for module in mixture.modules() for name, parameter in module._parameters.items()
    ]
    first = mixture(x, weights)
    assert all(module._parameters[name] is parameter for module, name, parameter in places)
    assert torch.equal(mixture(x, weights), first)
    with pytest.raises(RuntimeError):
        mixture(tensors.normal(2, *(7 for _ in example_shape)), weights)  # an error leaves it as it was, too
    assert torch.equal(mixture(x, weights), first)


def test_tied_parameters_stay_tied():
    mixture = MixtureOfExperts(Tied, 3)
    for module in (mixture, copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):  # noqa: S301 - our own
        assert module.expert.encode.weight is module.expert.decode.weight
        assert len(list(module.parameters())) == 2


def test_a_parameter_under_two_names_is_one_bank():
    mixture = MixtureOfExperts(TwoNames, 3)
    assert mixture.expert.gain is mixture.expert.bias
    assert mixture.expert.gain.shape == (3, 4)


def test_frozen_parameters_stay_frozen():
    def expert() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.bias.requires_grad_(False)
        return layer

    mixture = MixtureOfExperts(expert, 3)
    assert mixture.expert.weight.requires_grad
    assert not mixture.expert.bias.requires_grad


@pytest.mark.parametrize("num_experts", [1, 8, 40])
def test_uniform_average_of_the_bank_has_the_spread_of_one_expert(num_experts):
    # nn.Linear(64, .) draws uniformly from [-1/8, 1/8]: standard deviation 1 / (8 sqrt 3). 4,096 weights: the standard
    # error of a standard deviation is at most 1 / sqrt(2 * 4096) = 1.1 %, so 5 % is four of them; without sqrt(K) it
    # would be 0.16 of it for 40 experts
    torch.manual_seed(0)
    mixture = MixtureOfExperts(lambda: nn.Linear(64, 64), num_experts)
    spread = mixture.expert.weight.detach().mean(0).std().item()
    assert spread * 8 * math.sqrt(3) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("num_experts", [2, 8, 40])
def test_experts_differ_from_their_average_by_the_stated_share(num_experts):
    # deviations of 0.3 sqrt(K - 1) times the average's own; at least 4,096 weights of each, so that the ratio has a
    # standard error of at most sqrt(2) / sqrt(2 * 4096) = 1.6 %, and 6 % is four of them
    torch.manual_seed(0)
    mixture = MixtureOfExperts(lambda: nn.Linear(64, 64), num_experts)
    bank = mixture.expert.weight.detach()
    average = bank.mean(0)
    ratio = ((bank - average).square().mean() / average.square().mean()).sqrt().item()
    assert ratio == pytest.approx(0.3 * math.sqrt(num_experts - 1), rel=0.06)


def test_the_bank_is_what_was_drawn_nearer_to_its_average_and_scaled():
    drawn = [nn.Linear(3, 2) for _ in range(4)]
    mixture = MixtureOfExperts(iter(drawn).__next__, 4)
    average = sum(expert.weight for expert in drawn) / 4
    for bank, expert in zip(mixture.expert.weight, drawn, strict=True):
        torch.testing.assert_close(bank, 2 * (0.7 * average + 0.3 * expert.weight))


def test_the_factorys_own_modules_are_left_alone():
    drawn = [nn.Sequential(nn.Linear(3, 4), nn.LSTMCell(4, 2)) for _ in range(2)]
    before = copy.deepcopy(drawn)
    mixture = MixtureOfExperts(iter(drawn).__next__, 2)
    assert mixture.expert[1].weight_hh.shape == (2, 8, 2)
    for module, untouched in zip(drawn, before, strict=True):
        assert type(module[1]) is nn.LSTMCell
        for name, tensor in untouched.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor)


def test_parameters_that_are_no_draws_are_not_scaled():
    mixture = MixtureOfExperts(lambda: nn.LayerNorm(3), 4)
    assert (mixture.expert.weight == 1).all()
    assert (mixture.expert.bias == 0).all()


# Several inputs and outputs, cells, embeddings ---------------------------------------------------------------------


def row_by_row(mixture: MixtureOfExperts, factory: Callable[[], nn.Module], x: tuple, weights: Tensor) -> list:
    """Apply to each row's arguments a plain module whose parameters are blended; what each returns."""
    outputs = []
    for b, weights_of_row in enumerate(weights):
        plain = factory().to(weights.dtype)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(torch.tensordot(weights_of_row, bank_of(mixture)[name], 1))
        outputs.append(plain(*tree_map(lambda tensor: tensor[b], x)))  # noqa: B023
    return outputs


def test_an_expert_may_read_and_return_several_tensors():
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(Several, 3))
    index = torch.tensor([[[0], [1]], [[1], [1]]])
    x, weights = (tensors.normal(2, 2, 4, 3), {"scale": tensors.normal(2, 2, 1)}, index), tensors.simplex(2, 2, 3)
    hidden, others = mixture(x, weights)
    assert hidden.shape == (2, 2, 4, 2)
    assert others["parts"][0].shape == (2, 2)
    assert others["parts"][1].shape == (2, 2, 4, 1)
    flat = row_by_row(mixture, Several, tree_map(lambda tensor: tensor.flatten(0, 1), x), weights.flatten(0, 1))
    for row, (wanted, wanted_others) in enumerate(flat):
        got = hidden[row // 2, row % 2], *(part[row // 2, row % 2] for part in others["parts"])
        torch.testing.assert_close(got, (wanted, *wanted_others["parts"]), **CLOSE)
    assert MixtureOfExperts(Listed, 2)([torch.zeros(2, 3), torch.zeros(2, 3)], torch.zeros(2, 2)).shape == (2, 2)
    one = mixture(tree_map(lambda tensor: tensor[0, 1], x), weights[0, 1])
    torch.testing.assert_close(one, tree_map(lambda tensor: tensor[0, 1], (hidden, others)), **CLOSE)


CELLS = {
    "lstm": lambda: nn.LSTMCell(3, 5),
    "gru": lambda: nn.GRUCell(3, 5),
    "rnn": lambda: nn.RNNCell(3, 5),
    "relu": lambda: nn.RNNCell(3, 5, nonlinearity="relu"),
    "lstm without biases": lambda: nn.LSTMCell(3, 5, bias=False),
    "gru without biases": lambda: nn.GRUCell(3, 5, bias=False),
}


@pytest.mark.parametrize("steps", [(), (4,)], ids=["one input", "a batch of inputs"])
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_recurrent_cells_are_experts(cell, steps):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(cell, 3))
    assert repr(mixture.expert) == repr(cell())
    weights, x = tensors.simplex(5, 3), tensors.normal(5, *steps, 3).requires_grad_()
    state = tensors.normal(5, *steps, 5)
    if isinstance(cell(), nn.LSTMCell):
        state = state, tensors.normal(5, *steps, 5)
    for arguments in ((x, state), (x,)):  # without a state a cell starts at 0
        output = mixture(arguments, weights)
        wanted = row_by_row(mixture, cell, arguments, weights)
        for row in range(5):
            torch.testing.assert_close(tree_map(lambda tensor: tensor[row], output), wanted[row], **CLOSE)  # noqa: B023
    torch.testing.assert_close(mixture(x, weights), output, rtol=0, atol=0)
    total = sum(tensor.pow(3).sum() for tensor in tree_leaves(mixture((x, state), weights)))
    wanted = sum(tensor.pow(3).sum() for tensor in tree_leaves(row_by_row(mixture, cell, (x, state), weights)))
    torch.testing.assert_close(torch.autograd.grad(total, x), torch.autograd.grad(wanted, x), **CLOSE)
    for duplicate in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):  # noqa: S301 - our own
        torch.testing.assert_close(duplicate(x, weights), output, rtol=0, atol=0)


def test_a_cell_with_a_forward_of_its_own_keeps_it():
    class Doubled(nn.RNNCell):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * nn.functional.linear(input, self.weight_ih, self.bias_ih)

    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(lambda: Doubled(3, 2), 2))
    x, weights = tensors.normal(4, 3), tensors.simplex(4, 2)
    wanted = row_by_row(mixture, lambda: Doubled(3, 2), (x,), weights)
    torch.testing.assert_close(mixture(x, weights), torch.stack(wanted), **CLOSE)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ((torch.zeros(2, 3), None), TypeError, r"^x\[1\]: "),
        (
            (torch.zeros(2, 3), torch.zeros(3, 2)),
            ValueError,
            r"^x\[1\]: ",
        ),
        (
            (torch.zeros(2, 3), (torch.zeros(2, 2), torch.zeros(2, 2).double())),
            TypeError,
            r"^x\[1\]\[1\]: ",
        ),
    ],
)
def test_the_argument_that_does_not_fit_is_named(x, error, message):
    with pytest.raises(error, match=message):
        MixtureOfExperts(lambda: nn.LSTMCell(3, 2), 4)(x, torch.zeros(2, 4))


def test_an_expert_that_returns_no_tensor_is_named():
    mixture = MixtureOfExperts(lambda: NormalHead(3, 2), 4)
    with pytest.raises(TypeError, match="^expert: .*Independent"):
        mixture(torch.zeros(2, 3), torch.zeros(2, 4))
    mixture = MixtureOfExperts(lambda: nn.MultiheadAttention(4, 1), 2)
    steps = torch.zeros(3, 5, 4)
    with pytest.raises(TypeError, match="^expert: .*bool"):
        MixtureOfExperts(Answers, 2)(torch.zeros(2, 3), torch.zeros(2, 2))
    attended, weights = mixture((steps, steps, steps), torch.zeros(3, 2))
    assert (attended.shape, weights.shape) == ((3, 5, 4), (3, 5, 5))


class Listed(nn.Linear):
    """A module whose one argument is a list."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return super().forward(inputs[0]) + super().forward(inputs[1])


class Answers(nn.Linear):
    """A module that says yes."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, bool]:
        return super().forward(x), True


class TiedWords(nn.Module):
    """A table of words that is read at the start and, transposed, at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(2, 5)
        self.words = nn.Embedding(5, 2, padding_idx=3)
        self.scores.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.words(x))


def drawn_table(kind: type[nn.Module]) -> nn.Module:
    """A table whose padding row is drawn, and not 0."""
    return kind.from_pretrained(torch.randn(5, 2), freeze=False, padding_idx=3)


TABLES = {
    "embedding": (lambda: nn.Embedding(5, 2, padding_idx=3), "weight"),
    "counted from the end": (lambda: nn.Embedding(5, 2, padding_idx=-2), "weight"),
    "a drawn row": (lambda: drawn_table(nn.Embedding), "weight"),
    "inside": (lambda: nn.Sequential(nn.Embedding(5, 2, padding_idx=3), nn.Linear(2, 2)), "0.weight"),
    "tied": (TiedWords, "scores.weight"),
}


@pytest.mark.parametrize(("factory", "name"), TABLES.values(), ids=TABLES)
def test_the_padding_row_of_an_embedding_keeps_its_values_and_its_gradient(factory, name):
    torch.manual_seed(0)
    drawn = [factory() for _ in range(3)]
    mixture = MixtureOfExperts(iter(drawn).__next__, 3)
    bank = mixture.expert.get_parameter(name)
    for k, expert in enumerate(drawn):
        assert torch.equal(bank[k, 3], expert.get_parameter(name)[3])
        assert not torch.equal(bank[k, 2], expert.get_parameter(name)[2])
    x, weights = torch.tensor([[0, 3, 1], [3, 3, 2]]), torch.randn(2, 3).softmax(-1)
    output = mixture(x, weights)
    torch.testing.assert_close(output, torch.stack(row_by_row(mixture, factory, (x,), weights)))
    (gradient,) = torch.autograd.grad((output + 1).pow(2).sum(), bank)
    # the sum of the gradients of plain modules, by row and expert
    wanted = torch.zeros_like(bank)
    for b in range(2):
        plain = factory()
        with torch.no_grad():
            for parameter_name, parameter in plain.named_parameters():
                parameter.copy_(torch.tensordot(weights[b], bank_of(mixture)[parameter_name], 1))
        (one,) = torch.autograd.grad((plain(x[b]) + 1).pow(2).sum(), plain.get_parameter(name))
        wanted += weights[b][:, None, None] * one
    torch.testing.assert_close(gradient, wanted)
    if name != "scores.weight":
        assert (gradient[:, 3] == 0).all()
    assert (gradient[:, 2] != 0).any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops over the rows
def test_the_padding_row_of_a_bag_counts_nothing():
    torch.manual_seed(0)
    drawn = [drawn_table(nn.EmbeddingBag) for _ in range(3)]
    mixture = MixtureOfExperts(iter(drawn).__next__, 3)
    for bank, expert in zip(mixture.expert.weight, drawn, strict=True):
        assert torch.equal(bank[3], expert.weight[3])
    x, weights = torch.tensor([[[0, 3, 1]], [[3, 3, 2]]]), torch.randn(2, 3).softmax(-1)
    output = mixture(x, weights)
    torch.testing.assert_close(
        output, torch.stack(row_by_row(mixture, lambda: drawn_table(nn.EmbeddingBag), (x,), weights))
    )
    output.sum().backward()
    assert (mixture.expert.weight.grad[:, 3] == 0).all()


# What is refused, and what is not --------------------------------------------------------------------------------


def test_dropout_inside_an_expert_differs_between_rows_and_stops_in_eval():
    mixture = MixtureOfExperts(lambda: nn.Sequential(nn.Linear(3, 200), nn.Dropout(0.5)), 2)
    x, weights = torch.ones(2, 3), torch.full((2, 2), 0.5)
    first, second = mixture(x, weights)
    dropped = torch.stack([first, second]) == 0
    # each of 2 x 200 units is dropped with probability 1/2: 40 is four standard deviations of the count
    assert abs(dropped.sum().item() - 200) <= 40
    assert (dropped[0] != dropped[1]).any()
    first, second = mixture.eval()(x, weights)
    assert torch.equal(first, second)
    assert not (first == 0).any()


def _named(expert: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"part": expert}))


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (lambda: nn.BatchNorm1d(3), r"BatchNorm1d\)"),
        (lambda: nn.InstanceNorm1d(3, track_running_stats=True), r"InstanceNorm1d\)"),
        (lambda: nn.LSTM(3, 3), r"LSTM\)"),
        (lambda: nn.GRU(3, 3), r"GRU\)"),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), r"Linear\)"),
        (lambda: nn.utils.weight_norm(nn.Linear(3, 3)), r"Linear\)"),
        (
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            r"ParametrizedLinear\)",
        ),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            r"ParametrizedLinear\)",
        ),
        (lambda: nn.Embedding(5, 3, sparse=True), r"Embedding\)"),
        (lambda: nn.EmbeddingBag(5, 3, sparse=True), r"EmbeddingBag\)"),
        (lambda: nn.LazyLinear(3), r"LazyLinear\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_modules_that_cannot_be_blended_are_refused_by_name(expert, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the old norms and lazy modules warn
        with pytest.raises(ValueError, match=r"^expert: the module itself \(" + message):
            MixtureOfExperts(expert, 2)
        with pytest.raises(ValueError, match=r"^expert: 1\.part \(" + message):
            MixtureOfExperts(lambda: _named(expert()), 2)


def test_an_unblendable_expert_is_refused_even_when_it_is_not_the_first():
    experts = iter([nn.Linear(3, 3), nn.LSTM(3, 3)])
    with pytest.raises(ValueError, match="^expert: .*LSTM"):
        MixtureOfExperts(lambda: next(experts), 2)


def test_experts_that_share_parameters_are_refused():
    shared = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="^expert: .* weight,"):
        MixtureOfExperts(lambda: shared, 2)
    with pytest.raises(ValueError, match=r"^expert: .* 1\.weight,"):
        MixtureOfExperts(lambda: nn.Sequential(nn.Linear(3, 3), shared), 2)
    MixtureOfExperts(lambda: nn.Sequential(shared, shared), 1)


@pytest.mark.parametrize(
    ("second", "got"),
    [
        (lambda: nn.Linear(3, 4), r"\{'weight': \(4, 3\), 'bias': \(4,\)\}"),
        (lambda: nn.Linear(3, 2, bias=False), r"\{'weight': \(2, 3\)\}"),
        (lambda: nn.Bilinear(3, 3, 2), r"\{'weight': \(2, 3, 3\), .*\}"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), r"\{'0.weight': .*\}"),
    ],
    ids=["size", "fewer", "another", "deeper"],
)
def test_experts_with_other_parameters_than_the_first_are_refused(second, got):
    experts = iter([nn.Linear(3, 2), nn.Linear(3, 2), second()])
    with pytest.raises(ValueError, match=f"^expert: .*3 .*{got}"):
        MixtureOfExperts(experts.__next__, 3)
    experts = iter([nn.Linear(3, 2, bias=False), nn.Linear(3, 2)])
    with pytest.raises(ValueError, match=r"^expert: .*2 .*'bias': \(2,\)"):
        MixtureOfExperts(experts.__next__, 2)


class Drawn(nn.Module):
    """A module with buffers, of which one may be drawn."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.register_buffer("unit", torch.ones(2))
        self.part = nn.Linear(2, 2)
        self.part.register_buffer("w", buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x * self.unit) * self.part.w


@pytest.mark.parametrize("second", [torch.tensor([1.0, 3.0]), torch.ones(3), None], ids=["value", "shape", "none"])
def test_a_buffer_that_differs_between_experts_is_refused_by_name(second):
    buffers = iter([torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), second])
    with pytest.raises(ValueError, match=r"^expert: .*part\.w"):
        MixtureOfExperts(lambda: Drawn(next(buffers)), 3)
    MixtureOfExperts(lambda: Drawn(torch.tensor([1.0, 2.0])), 3)


@pytest.mark.parametrize(
    ("first", "second"),
    [([1.0, 2.0], [1.0, 2.0000002]), ([0.0, 2.0], [1e-9, 2.0]), ([1.0, 2.0], [1.0, math.nan])],
    ids=["by a rounding", "from 0", "by NaN"],
)
def test_a_buffer_that_differs_by_little_is_refused(first, second):
    buffers = iter([torch.tensor(first), torch.tensor(second)])
    with pytest.raises(ValueError, match=r"^expert: .*part\.w"):
        MixtureOfExperts(lambda: Drawn(next(buffers)), 2)


@pytest.mark.parametrize("buffer", [[1.0, math.nan], [math.inf, 0.0], [True, False], [1, 2]])
def test_equal_buffers_are_taken(buffer):
    MixtureOfExperts(lambda: Drawn(torch.tensor(buffer)), 2)


def test_norms_without_running_statistics_are_taken():
    mixture = MixtureOfExperts(lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4)), 2)
    assert mixture(torch.randn(3, 1, 2, 5), torch.full((3, 2), 0.5)).shape == (3, 1, 4, 5)


@pytest.mark.parametrize(
    ("expert", "error", "message"),
    [
        (nn.Linear(3, 2), TypeError, "^expert: .*function"),
        ("linear", TypeError, "^expert: .*function"),
        (lambda: torch.zeros(3), TypeError, "^expert: .*Tensor"),
        (nn.ReLU, ValueError, "^expert: .*no parameters"),
        (
            lambda: nn.ParameterDict({"count": nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)}),
            ValueError,
            "^expert: .*count .*int64",
        ),
    ],
    ids=["instance", "string", "no module", "no parameters", "integers"],
)
def test_what_is_no_factory_of_experts_is_refused(expert, error, message):
    with pytest.raises(error, match=message):
        MixtureOfExperts(expert, 2)


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        ((2, 3), (2, 5), "^weights: "),
        ((2, 3), (), r"^weights: .*\(\)"),
        ((3, 3), (2, 4), "^x: "),
        ((1, 3), (2, 4), "^x: "),
        ((3,), (2, 3, 4), "^x: "),
        ((0, 3), (0, 4), r"^weights: .*\(0,\)"),
        ((2, 0, 3), (2, 0, 4), r"^weights: .*\(2, 0\)"),
    ],
)
def test_mixture_refuses_inputs(x, weights, message):
    mixture = MixtureOfExperts(lambda: nn.Linear(3, 2), 4)
    with pytest.raises(ValueError, match=message):
        mixture(torch.zeros(x), torch.zeros(weights))


@pytest.mark.parametrize("named", ["x", "weights"])
def test_mixture_names_the_input_of_another_dtype(named):
    inputs = {"x": torch.zeros(2, 3), "weights": torch.zeros(2, 4)}
    inputs[named] = inputs[named].double()
    with pytest.raises(TypeError, match=f"^{named}: "):
        MixtureOfExperts(lambda: nn.Linear(3, 2), 4)(**inputs)


def test_an_expert_may_read_integers():
    mixture = MixtureOfExperts(lambda: nn.Embedding(5, 2), 3)
    weights = torch.randn(2, 3).softmax(-1)
    rows = torch.tensor([4, 1])
    blended = [sum(w * table[row] for w, table in zip(ws, mixture.expert.weight, strict=True))
               for ws, row in zip(weights, rows, strict=True)]  # fmt: skip
    torch.testing.assert_close(mixture(rows, weights), torch.stack(blended))


@pytest.mark.parametrize("num_experts", [0, -1, 2.0, True])
def test_mixture_refuses_a_bank_of_no_experts(num_experts):
    with pytest.raises(ValueError, match="^num_experts: "):
        MixtureOfExperts(lambda: nn.Linear(3, 2), num_experts)
