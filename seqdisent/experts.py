"""Mixtures of experts whose *parameters* are blended, once per sequence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from seqdisent._checks import check_batch_shapes, check_kind, check_last_dim, check_positive, upsampling_channels
from seqdisent.heads import full_precision


def _blend(bank: Tensor, weights: Tensor) -> Tensor:
    """Average a bank (K, ...) by weights (N, K) in one matrix product: (N, ...)."""
    return (weights @ bank.reshape(len(bank), -1)).reshape(len(weights), *bank.shape[1:])


class MixtureOfExperts(nn.Module):
    r"""Any module as an expert: its parameters are averaged by the mixture weights before it is applied.

    For row b with weights :math:`w_b` on K experts of parameters :math:`\theta_k`, the output is
    :math:`f(x_b; \sum_k w_{bk} \theta_k)`: one forward pass of one expert, whatever K (paper, section 3.1,
    "Mixture of Experts Decoder"). The average of outputs, as in a classic mixture of experts, is something else.

    The K experts are drawn by `expert()`. A parameter that they do not share from the start (random weights, taken to
    have mean 0) becomes :math:`\sqrt K (\bar\theta + 0.3 (\theta_k - \bar\theta))`: the uniform average has the spread
    that one expert was meant to have, and the experts differ enough for the mixture weights to matter.

    Args:
        expert: returns a new expert each time it is called, for instance ``lambda: nn.Linear(3, 2)``.
        num_experts: K, the size of the bank.

    Shape:
        - x: (\*B, ...), whatever an expert takes as one example of shape (...).
        - weights: (\*B, num_experts), usually on the simplex.
        - output: (\*B, ...), what an expert gives for one example.

    Raises:
        TypeError: `expert` cannot be called or returns no module; or inputs that are not of its parameters' dtype.
        ValueError: the expert cannot be blended: batch norm with running statistics, spectral norm or another
            parametrisation (buffers or parameters rewritten in forward), a fused recurrent network, lazy modules, no
            parameters, parameters that are not floating point, buffers that differ between experts; or inputs of the
            wrong shape or on another device.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> mixture = MixtureOfExperts(lambda: nn.Linear(3, 2), num_experts=4)
        >>> mixture(torch.randn(5, 3), torch.full((5, 4), 0.25)).shape
        torch.Size([5, 2])
        >>> mixture.expert.weight.shape
        torch.Size([4, 2, 3])

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
        _check_same_buffers(experts)
        self.num_experts = num_experts
        self.expert = _stack(experts)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Apply to each x[b] the expert whose parameters are averaged by weights[b]."""
        check_last_dim("weights", weights, self.num_experts, "num_experts")
        batch_shape = weights.shape[:-1]
        check_batch_shapes("weights", batch_shape, "x", x.shape[: len(batch_shape)])
        parameter = next(self.expert.parameters())
        check_kind("weights", weights, parameter)
        if x.is_floating_point():  # an embedding reads integers
            check_kind("x", x, parameter)
        flat_weights = weights.reshape(-1, self.num_experts)
        parameters = {name: _blend(bank, flat_weights) for name, bank in self.expert.named_parameters()}

        def apply(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(self.expert, parameters, (row,))
            return output

        output = torch.vmap(apply, randomness="different")(
            parameters, x.flatten(0, len(batch_shape) - 1) if batch_shape else x.unsqueeze(0)
        )
        return output.unflatten(0, batch_shape) if batch_shape else output.squeeze(0)

    def extra_repr(self) -> str:
        """Name the number of experts beside the expert itself."""
        return f"num_experts={self.num_experts}"


class MixtureOfExpertsConvDecoder(nn.Module):
    r"""A bank of transposed-convolution decoders, blended once per sequence and applied to all its frames.

    Every expert is: a transposed convolution from 1x1 to 4x4 pixels, then one of stride 2 and padding 1 for each
    doubling up to `image_size`; kernels 4x4, LeakyReLU (slope 0.01) between, logits out. For a sequence with weights
    :math:`w`, kernels **and** biases of layer l are :math:`\sum_k w_k \theta_{kl}` (paper, section 3.1).
    The whole bank is blended by one matrix product a layer, never by a loop over experts.

    The bank starts as :math:`\theta_k = \theta + 0.3 \sqrt K \epsilon_k`, with :math:`\theta` and the centred
    :math:`\epsilon_k` of the size that He et al. give one decoder. At uniform weights the blend is
    :math:`\theta`, a decoder of the right size; K independent decoders would average to one that is smaller by
    :math:`\sqrt K` in every layer, and paint nearly the same whatever the latents are.

    Args:
        latent_dim: size of each step's latent vector.
        num_experts: K, the size of the bank.
        out_channels: colours of the image.
        image_size: height and width in pixels, 4 * 2**n.
        channels: the width at 4, 8, ... pixels, n values; None for 512 halving (512, 256, 128, 64 at 64 pixels).

    Shape:
        - latents: (\*B, T, latent_dim)
        - weights: (\*B, num_experts), usually on the simplex
        - output: (\*B, T, out_channels, image_size, image_size), logits (float32 under autocast)

    Raises:
        ValueError: a size that does not fit (what would is named), or inputs of the wrong shape, without a sequence or
            a step, or on another device.
        TypeError: inputs that are not of the bank's dtype (outside autocast).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> decoder = MixtureOfExpertsConvDecoder(5, 3, image_size=16, channels=(8, 4))
        >>> decoder(torch.randn(2, 7, 5), torch.softmax(torch.randn(2, 3), -1)).shape
        torch.Size([2, 7, 3, 16, 16])

    References:
        Vowels, Camgoz and Bowden, "VDSM", CVPR 2021, section 3.1 and appendix D. The released code blends by
        broadcast-and-sum, one sequence after another: the same numbers, slower.
    """

    def __init__(
        self,
        latent_dim: int,
        num_experts: int,
        *,
        out_channels: int = 3,
        image_size: int = 64,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_positive(latent_dim=latent_dim, num_experts=num_experts, out_channels=out_channels)
        self.latent_dim = latent_dim
        self.num_experts = num_experts
        self.image_size = image_size
        self.channels = upsampling_channels(image_size, channels, first=512)
        widths = [latent_dim, *self.channels, out_channels]
        self.kernels = nn.ParameterList(
            torch.empty(num_experts, widths[i], widths[i + 1], 4, 4) for i in range(len(widths) - 1)
        )
        self.biases = nn.ParameterList(torch.zeros(num_experts, width) for width in widths[1:])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bank again; its biases are 0."""
        gain = nn.init.calculate_gain("leaky_relu", 0.01)
        for i, kernel in enumerate(self.kernels):
            # an output pixel sees all inputs once in the first layer, and 2x2 pixels of them where the stride is 2
            fan_in = kernel.shape[1] * (1 if i == 0 else 4)
            nn.init.normal_(kernel, std=gain / math.sqrt(fan_in))
            with torch.no_grad():
                kernel.copy_(_spread(kernel))
        for bias in self.biases:
            nn.init.zeros_(bias)

    def forward(self, latents: Tensor, weights: Tensor) -> Tensor:
        """Decode each sequence of latents with the decoder that its weights blend."""
        check_last_dim("latents", latents, self.latent_dim, "latent_dim", ndim=2)
        check_last_dim("weights", weights, self.num_experts, "num_experts")
        if latents.shape[-2] == 0:
            raise ValueError("latents: has length 0, expected at least one step")
        batch_shape = latents.shape[:-2]
        if 0 in batch_shape:
            raise ValueError(f"latents: has batch shape {tuple(batch_shape)}, expected at least one sequence")
        check_batch_shapes("latents", batch_shape, "weights", weights.shape[:-1])
        check_kind("latents", latents, self.kernels[0])
        check_kind("weights", weights, self.kernels[0])
        flat_weights = weights.reshape(-1, self.num_experts)
        kernels = [_blend(bank, flat_weights) for bank in self.kernels]
        biases = [_blend(bank, flat_weights) for bank in self.biases]
        # from 1x1 to 4x4 pixels every output sees the latent alone: one batched matrix product
        hidden = latents.reshape(-1, *latents.shape[-2:]) @ kernels[0].flatten(2)
        hidden = F.leaky_relu(hidden.unflatten(-1, (-1, 4, 4)) + biases[0][:, None, :, None, None])
        logits = self._upsample(hidden, kernels[1:], biases[1:])
        return full_precision(logits.unflatten(0, batch_shape) if batch_shape else logits.squeeze(0))

    @staticmethod
    def _upsample(hidden: Tensor, kernels: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Apply each sequence's own transposed convolutions: hidden (N, T, C, 4, 4), kernels (N, C, C', 4, 4)."""
        # One fused call a sequence on unbound weights is faster on a CPU than one grouped convolution; unbinding
        # (not indexing) gathers the gradients of all sequences in one stack.
        frames = hidden.unbind()
        for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
            frames = tuple(
                F.conv_transpose2d(frame if i == 0 else F.leaky_relu(frame), k, b, stride=2, padding=1)
                for frame, k, b in zip(frames, kernel.unbind(), bias.unbind(), strict=True)
            )
        return torch.stack(frames)

    def extra_repr(self) -> str:
        """Say the sizes that the bank was built with."""
        return (
            f"latent_dim={self.latent_dim}, num_experts={self.num_experts}, out_channels={self.biases[-1].shape[1]}, "
            f"image_size={self.image_size}, channels={self.channels}"
        )


def _spread(bank: Tensor) -> Tensor:
    """Return K independent draws (K, ...) as a common start of the same size, and deviations from it.

    The average of K draws is smaller than one by sqrt(K), hence the factor. The share of the deviations, 0.3, comes
    from exploratory runs; `benchmarks/stage1_choices.py` measures it against independent experts.
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
        if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise ValueError(f"{where}: its parameters have no sizes yet; give it its input size")
    if not any(True for _ in expert.parameters()):
        raise ValueError("expert: has no parameters to blend")
    for name, parameter in expert.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(f"expert: parameter {name} is {parameter.dtype}, expected floating point")


def _check_same_buffers(experts: list[nn.Module]) -> None:
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
    """Return one module whose parameters are (K, ...): the experts' own, random ones spread."""
    bank = copy.deepcopy(experts[0])
    stacked: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays tied; as keys the old ones stay alive
    for name, module in bank.named_modules():
        for parameter_name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in stacked:
                each = torch.stack(
                    [expert.get_submodule(name).get_parameter(parameter_name).detach() for expert in experts]
                )
                drawn_apart = bool((each != each[0]).any())
                values = _spread(each) if drawn_apart else each
                stacked[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(module, parameter_name, stacked[parameter])
    return bank
