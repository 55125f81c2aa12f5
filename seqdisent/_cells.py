"""Recurrent cells in operations that torch.vmap can vectorise; it has no rule for torch's fused cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _LSTMCell(nn.LSTMCell):
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        hidden, cell = (_zero_state(self, input),) * 2 if hx is None else hx
        gates = _from_input(self, input) + _from_hidden(self, hidden)
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4, -1)
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
        return output_gate.sigmoid() * cell.tanh(), cell

    def _get_name(self) -> str:
        return "LSTMCell"


class _GRUCell(nn.GRUCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        hidden = _zero_state(self, input) if hx is None else hx
        (reset, update, candidate), (reset_h, update_h, candidate_h) = (
            gates.chunk(3, -1) for gates in (_from_input(self, input), _from_hidden(self, hidden))
        )
        candidate = torch.tanh(candidate + (reset + reset_h).sigmoid() * candidate_h)
        return torch.lerp(candidate, hidden, (update + update_h).sigmoid())

    def _get_name(self) -> str:
        return "GRUCell"


class _RNNCell(nn.RNNCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        hidden = _zero_state(self, input) if hx is None else hx
        activation = {"tanh": torch.tanh, "relu": torch.relu}[self.nonlinearity]
        return activation(_from_input(self, input) + _from_hidden(self, hidden))

    def _get_name(self) -> str:
        return "RNNCell"


_UNFUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTMCell: _LSTMCell,
    nn.GRUCell: _GRUCell,
    nn.RNNCell: _RNNCell,
}


def unfuse(module: nn.Module) -> None:
    """Give every recurrent cell of torch in `module` a forward without fused operations; the values are the same."""
    for part in module.modules():
        if type(part) in _UNFUSED:  # a subclass may have a forward of its own
            part.__class__ = _UNFUSED[type(part)]


def _zero_state(cell: nn.RNNCellBase, input: Tensor) -> Tensor:
    return input.new_zeros(cell.hidden_size)


def _from_input(cell: nn.RNNCellBase, input: Tensor) -> Tensor:
    return nn.functional.linear(input, cell.weight_ih, cell.bias_ih)


def _from_hidden(cell: nn.RNNCellBase, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, cell.weight_hh, cell.bias_hh)
