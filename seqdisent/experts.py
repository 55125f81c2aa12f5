"""Mixtures of experts that blend the experts' parameters, once per sequence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from seqdisent._cells import unfuse
from seqdisent._checks import check_batch_shapes, check_kind, check_last_dim, check_not_empty, check_positive


def blend(bank: Tensor, weights: Tensor) -> Tensor:
    """Average a bank (K, ...) by weights (N, K) in one matrix product: (N, ...)."""
    return (weights @ bank.reshape(len(bank), -1)).reshape(len(weights), *bank.shape[1:])


class MixtureOfExperts(nn.Module):
    r"""A bank of experts of any architecture; the mixture weights average their parameters before the call.

    For row b with weights :math:`w_b` on K experts of parameters :math:`\theta_k`, the output is
    :math:`f(x_b; \sum_k w_{bk} \theta_k)`: one forward pass of one expert, whatever K (paper, section 3.1,
    "Mixture of Experts Decoder"). A classic mixture of experts averages the experts' outputs instead.

    The K experts are drawn by `expert()`. A parameter that differs between them (random weights, assumed to have
    mean 0) becomes :math:`\sqrt K (\bar\theta + 0.3 (\theta_k - \bar\theta))`. The uniform average then has the
    spread of one expert, and the experts differ enough for the mixture weights to matter. The row that an embedding
    reserves for padding (`padding_idx`) keeps its values and gets no gradient.

    An expert may use a submodule or a parameter several times, read several tensors, and return a tuple, list or dict
    of tensors. Recurrent cells (``nn.LSTMCell``, ``nn.GRUCell``, ``nn.RNNCell``) are experts too.

    Args:
        expert: returns a new expert each time it is called, for instance ``lambda: nn.Linear(3, 2)``.
        num_experts: K, the size of the bank.

    Shape:
        - x: (\*B, ...), one example (...) of an expert's input for each row. A tuple holds several arguments: an expert
          that is called as ``cell(x, (h, c))`` gets ``mixture((x, (h, c)), weights)``.
        - weights: (\*B, num_experts), usually on the simplex.
        - output: (\*B, ...), an expert's output for one example; the same tuple, list or dict where it returns one.

    Raises:
        TypeError: `expert` cannot be called or returns no module; inputs that are not of its parameters' dtype; or an
            expert that gets or returns anything but tensors, such as a distribution.
        ValueError: the expert cannot be blended: batch norm with running statistics, spectral norm or another
            parametrisation (buffers or parameters rewritten in forward), a fused recurrent network, sparse gradients,
            lazy modules, no parameters, parameters that are not floating point; experts that share a parameter, or
            differ in their parameters' names or shapes or in their buffers; or inputs of the wrong shape, without a
            row, or on another device.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> mixture = MixtureOfExperts(lambda: nn.Linear(3, 2), num_experts=4)
        >>> mixture(torch.randn(5, 3), torch.full((5, 4), 0.25)).shape
        torch.Size([5, 2])
        >>> mixture.expert.weight.shape
        torch.Size([4, 2, 3])
        >>> cells = MixtureOfExperts(lambda: nn.LSTMCell(3, 2), num_experts=4)
        >>> hidden, cell = cells((torch.randn(5, 3), torch.zeros(2, 5, 2).unbind()), torch.full((5, 4), 0.25))
        >>> hidden.shape
        torch.Size([5, 2])

    References:
        Vowels, Camgoz and Bowden, "VDSM", CVPR 2021, section 3.1. Zhang et al., "Mode-adaptive neural networks for
        quadruped motion control", 2018, blend parameters by a gating network. The scale of the bank is ours.
    """

    def __init__(self, expert: Callable[[], nn.Module], num_experts: int) -> None:
        super().__init__()
        check_positive(num_experts=num_experts)
        if isinstance(expert, nn.Module) or not callable(expert):
            raise TypeError("expert: expected a function that returns a new module, such as `lambda: nn.Linear(3, 2)`")
        experts = [expert() for _ in range(num_experts)]
        for module in experts:
            _check_blendable(module)
        _check_alike(experts)
        self.num_experts = num_experts
        self.expert = _stack(experts)
        unfuse(self.expert)

    def forward(self, x: Any, weights: Tensor) -> Any:
        """Apply to each x[b] the expert whose parameters are averaged by weights[b]."""
        check_last_dim("weights", weights, self.num_experts, "num_experts")
        batch_shape = weights.shape[:-1]
        check_not_empty("weights", batch_shape, "row")
        check_kind("weights", weights, next(self.expert.parameters()))
        self._check_inputs(x, batch_shape)
        flat_weights = weights.reshape(-1, self.num_experts)
        arguments = tree_map(lambda tensor: tensor.reshape(len(flat_weights), *tensor.shape[len(batch_shape) :]), x)
        outputs = torch.vmap(self._apply_blended, randomness="different")(
            self._blended_parameters(flat_weights), arguments
        )
        return tree_map(lambda tensor: tensor.reshape((*batch_shape, *tensor.shape[1:])), outputs)

    def _check_inputs(self, x: Any, batch_shape: torch.Size) -> None:
        parameter = next(self.expert.parameters())
        for path, tensor in tree_flatten_with_path(x)[0]:
            name = f"x{keystr(path)}"
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
            check_batch_shapes("weights", batch_shape, name, tensor.shape[: len(batch_shape)])
            if tensor.is_floating_point():  # an embedding reads integers
                check_kind(name, tensor, parameter)

    def _blended_parameters(self, weights: Tensor) -> dict[str, Tensor]:
        """Return a blend (N, ...) for each place of a parameter in the expert, each module counted once."""
        blends = {bank: blend(bank, weights) for bank in self.expert.parameters()}
        return {
            f"{prefix}.{name}" if prefix else name: _without_gradient_of_padding(module, name, blends[bank])
            for prefix, module in self.expert.named_modules()
            for name, bank in module.named_parameters(recurse=False, remove_duplicate=False)
        }

    def _apply_blended(self, parameters: dict[str, Tensor], arguments: Any) -> Any:
        # tie_weights=False: each place is named above. Of a submodule with two names, torch would replace the
        # parameters twice, and after the call put the first replacement back in place of the bank.
        output = torch.func.functional_call(self.expert, parameters, arguments, tie_weights=False)
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"expert: returned {type(tensor).__name__}, expected a tensor, or a tuple, list or dict of tensors"
                )
        return output

    def extra_repr(self) -> str:
        """Return the number of experts."""
        return f"num_experts={self.num_experts}"


def spread(bank: Tensor) -> Tensor:
    """Shrink the deviations of K independent draws (K, ...) from their average, and restore the scale of one draw.

    The average of K draws is smaller than one draw by sqrt(K), hence the factor. The size of the deviations, 0.3, comes
    from exploratory runs; `benchmarks/stage1_choices.py` compares it with independent experts.
    """
    start = bank.mean(0)
    return math.sqrt(len(bank)) * (start + 0.3 * (bank - start))


def _check_blendable(expert: object) -> None:
    if not isinstance(expert, nn.Module):
        raise TypeError(f"expert: returned {type(expert).__name__}, expected a torch.nn.Module")
    for name, module in expert.named_modules():
        where = f"expert: {name or 'the module itself'} ({type(module).__name__}) cannot be blended"
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ValueError(f"{where}: it writes running statistics in forward; use LayerNorm, GroupNorm or none")
        if isinstance(module, nn.RNNBase):
            raise ValueError(f"{where}: fused recurrent networks keep their weights apart; use cells or convolutions")
        hooks = module._forward_pre_hooks.values()
        if parametrize.is_parametrized(module) or any(isinstance(hook, SpectralNorm | WeightNorm) for hook in hooks):
            raise ValueError(f"{where}: its weights are computed in forward (parametrised, spectral or weight norm)")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{where}: its gradients are sparse; use sparse=False")
        if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise ValueError(f"{where}: its parameters have no sizes yet; give it its input size")
    if not any(True for _ in expert.parameters()):
        raise ValueError("expert: has no parameters to blend")
    for name, parameter in expert.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(f"expert: parameter {name} is {parameter.dtype}, expected floating point")


def _check_alike(experts: list[nn.Module]) -> None:
    """Check that the experts have parameters of their own, of the same names and shapes, and the same buffers."""
    owners: dict[nn.Parameter, int] = {}
    layouts = []
    for i, expert in enumerate(experts):
        for name, parameter in expert.named_parameters():
            if owners.setdefault(parameter, i) != i:
                raise ValueError(f"expert: its modules share parameter {name}, expected a new module from each call")
        layouts.append({name: tuple(parameter.shape) for name, parameter in expert.named_parameters()})
        if layouts[i] != layouts[0]:
            raise ValueError(
                f"expert: call {i + 1} returned parameters {layouts[i]}, expected the same names and shapes as in the "
                f"first call, {layouts[0]}"
            )
    buffers_of = [dict(expert.named_buffers()) for expert in experts]
    for name in dict.fromkeys(name for buffers in buffers_of for name in buffers):
        first, *others = (buffers.get(name) for buffers in buffers_of)
        if first is None or any(other is None or not _equal(other, first) for other in others):
            raise ValueError(
                f"expert: buffer {name} differs between experts, expected the same in all, since only parameters are "
                "blended; draw it once outside the function, or make it a parameter"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _stack(experts: list[nn.Module]) -> nn.Module:
    """Return one module with the experts' parameters as (K, ...), after `spread` where they differ."""
    bank = copy.deepcopy(experts[0])
    stacked: dict[nn.Parameter, nn.Parameter] = {}  # keeps tied parameters tied, and the old ones alive as keys
    for name, module in bank.named_modules():
        for parameter_name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            each = torch.stack(
                [expert.get_submodule(name).get_parameter(parameter_name).detach() for expert in experts]
            )
            if parameter not in stacked:
                differ = not each.is_meta and bool((each != each[0]).any())
                values = spread(each) if differ else each
                stacked[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            if (row := _padding_row(module, parameter_name)) is not None:
                stacked[parameter].detach()[:, row] = each[:, row]
            setattr(module, parameter_name, stacked[parameter])
    return bank


def _padding_row(module: nn.Module, parameter_name: str) -> int | None:
    """Return the row of an embedding's table that stands for padding, if the parameter has one."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and parameter_name == "weight":
        return module.padding_idx
    return None


def _without_gradient_of_padding(module: nn.Module, parameter_name: str, table: Tensor) -> Tensor:
    """Return a blended parameter (N, ...), cut off from the gradient in the row that an embedding pads with."""
    # torch.vmap drops padding_idx
    row = _padding_row(module, parameter_name)
    if row is None:
        return table
    return table.index_copy(1, torch.tensor([row], device=table.device), table[:, row : row + 1].detach())
