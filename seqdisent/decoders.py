"""Convolutional decoders from latents to images: one for all sequences, or a blend of experts for each sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqdisent._checks import (
    check_batch_shapes,
    check_kind,
    check_last_dim,
    check_not_empty,
    check_positive,
    check_steps,
    upsampling_channels,
)
from seqdisent.experts import blend, spread
from seqdisent.heads import full_precision


class ConvDecoder(nn.Module):
    r"""Transposed convolutions from a latent vector to the logits of an image, the same for all sequences.

    The first layer goes from 1x1 to 4x4 pixels. Each further layer doubles the image (stride 2, padding 1) until it has
    `image_size` pixels. Kernels are 4x4, with LeakyReLU (slope 0.01) between the layers. Weights start as He et al.
    propose, biases at 0. This is the architecture of one expert of :class:`~seqdisent.MixtureOfExpertsConvDecoder`.

    Args:
        latent_dim: size of the latent vector.
        out_channels: colour channels of the image.
        image_size: height and width in pixels, 4 * 2**n.
        channels: channels at 4, 8, ... pixels, n values; None for 512, 256, 128, 64 at 64 pixels (512, halved each
            time).

    Shape:
        - latents: (\*B, latent_dim), or (\*B, T, latent_dim) for all steps of a sequence
        - output: (\*B, out_channels, image_size, image_size), or (\*B, T, ...), logits (float32 under autocast)

    Raises:
        ValueError: an invalid size (the message says what is valid), or latents of another size, on another device, or
            without a single vector.
        TypeError: latents that are not of the parameters' dtype (outside autocast).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> decoder = ConvDecoder(5, image_size=16, channels=(8, 4))
        >>> decoder(torch.randn(2, 7, 5)).shape
        torch.Size([2, 7, 3, 16, 16])

    References:
        He et al., "Delving deep into rectifiers", ICCV 2015 (the initial weights).
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        out_channels: int = 3,
        image_size: int = 64,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_positive(latent_dim=latent_dim, out_channels=out_channels)
        self.latent_dim = latent_dim
        widths = [latent_dim, *upsampling_channels(image_size, channels, first=512), out_channels]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            first = not layers
            # not initialised twice: the draws are those of a bank of one expert
            options = {"stride": 1 if first else 2, "padding": 0 if first else 1, "device": torch.get_default_device()}
            layer = nn.utils.skip_init(nn.ConvTranspose2d, width_in, width_out, 4, **options)
            nn.init.normal_(layer.weight, std=_initial_deviation(width_in, first=first))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            layers += [layer, nn.LeakyReLU(0.01)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, latents: Tensor) -> Tensor:
        """Return the logits of each latent vector's image."""
        check_last_dim("latents", latents, self.latent_dim, "latent_dim")
        batch_shape = latents.shape[:-1]
        check_not_empty("latents", batch_shape, "latent vector")
        check_kind("latents", latents, next(self.layers.parameters()))
        logits = self.layers(latents.reshape(-1, self.latent_dim, 1, 1))
        return full_precision(logits.reshape(*batch_shape, *logits.shape[1:]))


class MixtureOfExpertsConvDecoder(nn.Module):
    r"""A bank of convolutional decoders whose parameters are blended once per sequence, for all its frames.

    Every expert has the architecture of :class:`~seqdisent.ConvDecoder`. For a sequence with weights :math:`w`, the
    kernels **and** biases of layer l are :math:`\sum_k w_k \theta_{kl}` (paper, section 3.1). One matrix product per
    layer blends the whole bank; there is no loop over experts.

    The bank starts as :math:`\theta_k = \theta + 0.3 \sqrt K \epsilon_k`. Here :math:`\theta` and the centred
    :math:`\epsilon_k` have the standard deviation that He et al. give the weights of one decoder. At uniform weights
    the blend is :math:`\theta`, a decoder of the right scale. The average of K independent decoders would be smaller
    by :math:`\sqrt K` in every layer, and its images would hardly depend on the latents.

    Args:
        latent_dim: size of each step's latent vector.
        num_experts: K, the size of the bank.
        out_channels: colour channels of the image.
        image_size: height and width in pixels, 4 * 2**n.
        channels: channels at 4, 8, ... pixels, n values; None for 512, 256, 128, 64 at 64 pixels (512, halved each
            time).

    Shape:
        - latents: (\*B, T, latent_dim)
        - weights: (\*B, num_experts), usually on the simplex
        - output: (\*B, T, out_channels, image_size, image_size), logits (float32 under autocast)

    Raises:
        ValueError: an invalid size (the message says what is valid), or inputs of another shape, without a sequence or
            a step, or on another device.
        TypeError: inputs that are not of the bank's dtype (outside autocast).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> decoder = MixtureOfExpertsConvDecoder(5, 3, image_size=16, channels=(8, 4))
        >>> decoder(torch.randn(2, 7, 5), torch.softmax(torch.randn(2, 3), -1)).shape
        torch.Size([2, 7, 3, 16, 16])

    References:
        Vowels, Camgoz and Bowden, "VDSM", CVPR 2021, section 3.1 and appendix D. The released code blends by
        broadcast-and-sum, one sequence after another, which gives the same values more slowly.
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
        """Draw new initial kernels, and set the biases to 0."""
        for i, kernel in enumerate(self.kernels):
            nn.init.normal_(kernel, std=_initial_deviation(kernel.shape[1], first=i == 0))
            with torch.no_grad():
                kernel.copy_(spread(kernel))
        for bias in self.biases:
            nn.init.zeros_(bias)

    def forward(self, latents: Tensor, weights: Tensor) -> Tensor:
        """Decode each sequence of latents with its blend of the experts."""
        check_last_dim("latents", latents, self.latent_dim, "latent_dim", ndim=2)
        check_last_dim("weights", weights, self.num_experts, "num_experts")
        check_steps("latents", latents)
        batch_shape = latents.shape[:-2]
        check_not_empty("latents", batch_shape)
        check_batch_shapes("latents", batch_shape, "weights", weights.shape[:-1])
        check_kind("latents", latents, self.kernels[0])
        check_kind("weights", weights, self.kernels[0])
        flat_weights = weights.reshape(-1, self.num_experts)
        kernels = [blend(bank, flat_weights) for bank in self.kernels]
        biases = [blend(bank, flat_weights) for bank in self.biases]
        # the first layer, from 1x1 to 4x4 pixels, is one batched matrix product
        hidden = latents.reshape(-1, *latents.shape[-2:]) @ kernels[0].flatten(2)
        hidden = F.leaky_relu(hidden.unflatten(-1, (-1, 4, 4)) + biases[0][:, None, :, None, None])
        logits = self._upsample(hidden, kernels[1:], biases[1:])
        return full_precision(logits.unflatten(0, batch_shape) if batch_shape else logits.squeeze(0))

    @staticmethod
    def _upsample(hidden: Tensor, kernels: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Apply the transposed convolutions of each sequence: hidden (N, T, C, 4, 4), kernels (N, C, C', 4, 4)."""
        # On a CPU, one fused call per sequence is faster than one grouped convolution. Unbinding instead of indexing
        # stacks the gradients of all sequences once.
        frames = hidden.unbind()
        for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
            frames = tuple(
                F.conv_transpose2d(frame if i == 0 else F.leaky_relu(frame), k, b, stride=2, padding=1)
                for frame, k, b in zip(frames, kernel.unbind(), bias.unbind(), strict=True)
            )
        return torch.stack(frames)

    def extra_repr(self) -> str:
        """Return the sizes of the bank."""
        return (
            f"latent_dim={self.latent_dim}, num_experts={self.num_experts}, out_channels={self.biases[-1].shape[1]}, "
            f"image_size={self.image_size}, channels={self.channels}"
        )


def _initial_deviation(in_channels: int, *, first: bool) -> float:
    """Return the standard deviation that He et al. give the weights of one layer."""
    # an output pixel sees each input once in the first layer, and 2x2 pixels of it where the stride is 2
    fan_in = in_channels * (1 if first else 4)
    return nn.init.calculate_gain("leaky_relu", 0.01) / math.sqrt(fan_in)
