"""Encoders: from frames to features, and from sequences of features to static latents and dynamics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from seqdisent._checks import (
    check_kind,
    check_last_dim,
    check_not_empty,
    check_pixel_dtype,
    check_positive,
    check_recurrence,
    check_steps,
    upsampling_channels,
)
from seqdisent.heads import NormalHead
from seqdisent.masks import check_mask, fill_padding, observed_steps, overwrite_padding


def _blur_pool(channels: int) -> nn.Module:
    # imported here: antialiased-cnns is CC BY-NC-SA 4.0, and users of `downsample` must not need it
    from antialiased_cnns import BlurPool

    module: nn.Module = BlurPool(channels, filt_size=4, stride=2)
    return module


class ConvEncoder(nn.Module):
    r"""Anti-aliased convolutions from a frame to a feature vector.

    For each halving of the image: a 4x4 convolution of stride 1 and padding 1, LeakyReLU (slope 0.01), and BlurPool of
    stride 2 (Zhang, 2019). At 4x4 pixels a last 4x4 convolution gives `feature_dim` values, LeakyReLU again
    (paper, section 3.1 and appendix D). Only BlurPool has a stride. If the convolutions had one too, as in the paper,
    an image of 64 pixels would be too small before the last layer.

    Args:
        feature_dim: size of the features.
        in_channels: colour channels of the image.
        image_size: height and width in pixels, 4 * 2**n.
        channels: output channels of the n convolutions, in order; None for 32, 32, and 64 from the third on.
        downsample: a function of the number of channels that returns a module that halves the image (rounding up).
            None: BlurPool of antialiased-cnns, **whose licence (CC BY-NC-SA 4.0) forbids commercial use**. With a
            function of your own, such as ``lambda channels: nn.AvgPool2d(2, ceil_mode=True)``, that package is never
            imported.

    Shape:
        - frames: (\*B, in_channels, image_size, image_size)
        - output: (\*B, feature_dim)

    Raises:
        ValueError: an invalid size (the message says what is valid), frames of another shape or on another device than
            the parameters, or a `downsample` that does not halve them.
        TypeError: frames that are not floating point, or not of the parameters' dtype (outside autocast).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> encoder = ConvEncoder(10, image_size=16, channels=(4, 8))
        >>> encoder(torch.rand(2, 7, 3, 16, 16)).shape
        torch.Size([2, 7, 10])

    References:
        Zhang, "Making convolutional networks shift-invariant again", ICML 2019. The released VDSM code writes
        ``LeakyReLU(True)``, a slope of 1, which makes its convolutions linear.
    """

    def __init__(
        self,
        feature_dim: int,
        *,
        in_channels: int = 3,
        image_size: int = 64,
        channels: Sequence[int] | None = None,
        downsample: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_positive(feature_dim=feature_dim, in_channels=in_channels)
        num_halvings = len(upsampling_channels(image_size, None, first=1))
        if channels is None:
            channels = [32] * min(2, num_halvings) + [64] * max(0, num_halvings - 2)
        channels = upsampling_channels(image_size, channels, first=1)
        self.frame_shape = (in_channels, image_size, image_size)
        self.feature_dim = feature_dim
        layers: list[nn.Module] = []
        for width_in, width_out in zip((in_channels, *channels[:-1]), channels, strict=True):
            layers += [nn.Conv2d(width_in, width_out, 4, padding=1), nn.LeakyReLU(0.01)]
            layers += [(downsample or _blur_pool)(width_out)]
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(channels[-1], feature_dim, 4), nn.LeakyReLU(0.01))
        for layer in self.convolutions:
            if isinstance(layer, nn.Conv2d):
                # torch's default shrinks the signal about 3-fold per layer, so that all features are nearly 0
                nn.init.kaiming_normal_(layer.weight, a=0.01, nonlinearity="leaky_relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the features of each frame."""
        hidden = self.convolutions[:-2](self._flatten(frames))
        if tuple(hidden.shape[-2:]) != (4, 4):
            raise ValueError(
                f"downsample: leaves {tuple(hidden.shape[-2:])} pixels to the last convolution, expected (4, 4); "
                "each call must halve the image, rounding up (such as ceil_mode=True of a pooling)"
            )
        features: Tensor = self.convolutions[-2:](hidden)
        return features.reshape(*frames.shape[:-3], self.feature_dim)

    def _flatten(self, frames: Tensor) -> Tensor:
        if frames.ndim < 3 or tuple(frames.shape[-3:]) != self.frame_shape:
            raise ValueError(
                f"frames: has shape {tuple(frames.shape)}, expected (*B, {', '.join(map(str, self.frame_shape))})"
            )
        check_pixel_dtype(frames)
        check_kind("frames", frames, next(self.convolutions.parameters()))
        # channels last: the depthwise blur is several times faster on a CPU
        return frames.reshape(-1, *self.frame_shape).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def calibrate(self, frames: Tensor) -> None:
        r"""Rescale the initial weights so that different frames have different features from the first step.

        Every channel before its activation gets mean 0 and standard deviation 1 over `frames`, layer by layer
        (data-dependent initialisation). Frames of one data set often share most of their pixels, such as a background.
        A random encoder gives them nearly the same features, and training starts with a long plateau. Call this method
        once, before training.

        Args:
            frames: (\*B, in_channels, image_size, image_size), a few hundred of the training frames.

        Raises:
            ValueError: fewer than two frames, or frames of another shape.

        References:
            Salimans and Kingma, "Weight normalization", NeurIPS 2016, section 3.
        """
        hidden = self._flatten(frames)
        for layer in self.convolutions:
            if isinstance(layer, nn.Conv2d):
                _standardise("frames", layer, layer(hidden))
            hidden = layer(hidden)


class StaticEncoder(nn.Module):
    r"""Posterior of the static latent: a Normal computed from the average of the steps' embeddings.

    .. math:: q(s | x_{1:T}) = \mathcal N(f_{loc}(\bar e), f_{scale}(\bar e)), \quad
        \bar e = \tfrac1T \sum_t \mathrm{LeakyReLU}(W e_t + b)

    (paper, equation 2: averaging over time removes what changes). The average is over real, observed steps only (0
    where there are none) and ignores their order, so the steps may be any group of frames of one identity.

    Args:
        feature_dim: size of each step's features.
        static_dim: size of the static latent.
        hidden_dim: size of the embedding that is averaged.
        initial_scale: scale of the posterior at the start of training, approximately.

    Shape:
        - features: (\*B, T, feature_dim)
        - mask: (\*B, T) bool, or None if every step is real
        - observed: (\*B, T) bool, or None if every real step was measured
        - output: Normal, batch \*B, event (static_dim,)

    Raises:
        TypeError: a mask or `observed` that is not bool, or features that are not of the parameters' dtype.
        ValueError: features of another size, of length 0 or on another device, or a mask with a hole or an empty row.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> encoder = StaticEncoder(10, 4, hidden_dim=8)
        >>> posterior = encoder(torch.randn(2, 7, 10))
        >>> posterior.batch_shape, posterior.event_shape
        (torch.Size([2]), torch.Size([4]))

    References:
        Vowels, Camgoz and Bowden, "VDSM", CVPR 2021, equation 2. The released code averages the locations of the
        steps instead (see the documentation page "The paper against the released code").
    """

    def __init__(
        self, feature_dim: int, static_dim: int, *, hidden_dim: int = 128, initial_scale: float | None = None
    ) -> None:
        super().__init__()
        check_positive(feature_dim=feature_dim, static_dim=static_dim, hidden_dim=hidden_dim)
        self.feature_dim = feature_dim
        self.embedding = nn.Linear(feature_dim, hidden_dim)
        nn.init.kaiming_normal_(self.embedding.weight, a=0.01, nonlinearity="leaky_relu")
        nn.init.zeros_(self.embedding.bias)
        self.head = NormalHead(hidden_dim, static_dim, initial_scale=initial_scale)

    def forward(self, features: Tensor, mask: Tensor | None = None, observed: Tensor | None = None) -> dist.Independent:
        """Return q(s | features)."""
        check_last_dim("features", features, self.feature_dim, "feature_dim", ndim=2)
        check_steps("features", features)
        check_kind("features", features, self.embedding.weight)
        if mask is not None:
            mask = check_mask(mask, features.shape[:-2], features.shape[-2], features.device)
        counted = observed_steps(observed, mask, features)
        if counted is None:
            mean = F.leaky_relu(self.embedding(features)).mean(-2)
        else:
            embedded = F.leaky_relu(self.embedding(overwrite_padding(features, counted)))
            mean = overwrite_padding(embedded, counted).sum(-2) / counted.sum(-1, keepdim=True).clamp(min=1)
        posterior: dist.Independent = self.head(mean)
        return posterior

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        r"""Rescale the initial embedding to mean 0 and standard deviation 1 over `features` (\*B, feature_dim).

        Call it after :meth:`ConvEncoder.calibrate`, with the features of that encoder.
        """
        check_last_dim("features", features, self.feature_dim, "feature_dim")
        _standardise("features", self.embedding, self.embedding(features.reshape(-1, self.feature_dim)))


class Seq2SeqDynamicsEncoder(nn.Module):
    r"""A sequence-to-sequence network whose bottleneck is the dynamics of the sequence.

    The encoder is a bidirectional LSTM over the embeddings. The final states of all its layers and directions give
    :math:`q(d | x_{1:T})` (paper, equation 2). The decoder is an LSTM. Its initial states are functions of d: a linear
    layer for the cell, and one followed by tanh for the hidden state. It unrolls d to :math:`\bar h_{1:T}`, which a
    :class:`~seqdisent.Combiner` reads step by step.

    Ragged batches are packed, so the backward direction starts at the last real step of each sequence. A step without
    an observation is read as 0.

    Args:
        input_dim: size of each step's embedding.
        dynamics_dim: size of d.
        hidden_dim: hidden size of both LSTMs.
        num_layers: number of layers of both LSTMs.
        dropout: dropout probability between the layers of the LSTMs, in training mode.

    Shape:
        - embeddings: (\*B, T, input_dim)
        - mask: (\*B, T) bool, or None if every step is real
        - observed: (\*B, T) bool, or None if every real step was measured
        - output: Normal, batch \*B, event (dynamics_dim,)

    Raises:
        TypeError: a mask or `observed` that is not bool, or embeddings that are not of the parameters' dtype.
        ValueError: embeddings of another size or on another device, no embeddings, a mask with a hole, or a sequence of
            length 0.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> encoder = Seq2SeqDynamicsEncoder(6, 4, hidden_dim=8, num_layers=2)
        >>> posterior = encoder(torch.randn(2, 7, 6))
        >>> posterior.event_shape, encoder.unroll(posterior.mean, 9).shape
        (torch.Size([4]), torch.Size([2, 9, 8]))

    References:
        Vowels, Camgoz and Bowden, "VDSM", CVPR 2021, section 3.1 and Table 5. The paper copies d into the decoder's
        states. Their sizes differ, so here linear layers map d to h_0 and c_0 of every layer. The released code feeds
        each output back as the next input. Here the input is a learnt constant, so that unrolling is one fused call.
    """

    def __init__(
        self,
        input_dim: int,
        dynamics_dim: int,
        *,
        hidden_dim: int = 512,
        num_layers: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(input_dim=input_dim, dynamics_dim=dynamics_dim, hidden_dim=hidden_dim, num_layers=num_layers)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: got {dropout}, expected a probability in [0, 1)")
        self.input_dim = input_dim
        self.dynamics_dim = dynamics_dim
        self.encoder = nn.LSTM(input_dim, hidden_dim, num_layers, batch_first=True, dropout=dropout, bidirectional=True)
        self.head = NormalHead(2 * num_layers * hidden_dim, dynamics_dim)
        self.initial_states = nn.Linear(dynamics_dim, 2 * num_layers * hidden_dim)
        self.decoder_input = nn.Parameter(torch.zeros(hidden_dim))
        self.decoder = nn.LSTM(hidden_dim, hidden_dim, num_layers, batch_first=True, dropout=dropout)

    def forward(
        self, embeddings: Tensor, mask: Tensor | None = None, observed: Tensor | None = None
    ) -> dist.Independent:
        """Return q(d | embeddings)."""
        check_last_dim("embeddings", embeddings, self.input_dim, "input_dim", ndim=2)
        batch_shape, num_steps = embeddings.shape[:-2], embeddings.shape[-2]
        check_steps("embeddings", embeddings)
        check_not_empty("embeddings", batch_shape)
        check_kind("embeddings", embeddings, self.decoder_input)
        embeddings = _without_holes(embeddings, observed)
        if mask is None:
            _, (final, _) = self.encoder(embeddings.reshape(-1, num_steps, self.input_dim))
        else:
            mask = check_mask(mask, batch_shape, num_steps, embeddings.device)
            flat = fill_padding(embeddings, mask).reshape(-1, num_steps, self.input_dim)
            lengths = mask.sum(-1).reshape(-1).cpu()
            packed = pack_padded_sequence(flat, lengths, batch_first=True, enforce_sorted=False)
            _, (final, _) = self.encoder(packed)
        # (layers * directions, N, hidden) -> (*B, layers * directions * hidden)
        posterior: dist.Independent = self.head(final.transpose(0, 1).reshape(*batch_shape, -1))
        return posterior

    def unroll(self, dynamics: Tensor, num_steps: int) -> Tensor:
        r"""Unroll dynamics (\*B, dynamics_dim) to the decoder's outputs (\*B, num_steps, hidden_dim)."""
        check_last_dim("dynamics", dynamics, self.dynamics_dim, "dynamics_dim")
        check_positive(num_steps=num_steps)
        check_kind("dynamics", dynamics, self.decoder_input)
        batch_shape = dynamics.shape[:-1]
        flat = dynamics.reshape(-1, self.dynamics_dim)
        num_layers, hidden_dim = self.decoder.num_layers, self.decoder.hidden_size
        states = self.initial_states(flat).view(-1, 2 * num_layers, hidden_dim).transpose(0, 1)
        hidden, cell = torch.tanh(states[:num_layers]).contiguous(), states[num_layers:].contiguous()
        inputs = self.decoder_input.expand(flat.shape[0], num_steps, hidden_dim)
        output: Tensor = self.decoder(inputs, (hidden, cell))[0]
        return output.reshape(*batch_shape, num_steps, hidden_dim)


def read_backward(
    recurrence: nn.RNNBase, inputs: Tensor, mask: Tensor | None = None, observed: Tensor | None = None
) -> Tensor:
    r"""Run a recurrent network backward in time: the output of a step depends on it and on all later steps.

    Args:
        recurrence: an ``nn.GRU``, ``nn.LSTM`` or ``nn.RNN`` with one direction.
        inputs: (\*B, T, I).
        mask: (\*B, T) bool, True where a step is real. Each sequence is read from its last real step.
        observed: (\*B, T) bool, True where a step was measured; the inputs of another one are read as 0.

    Returns:
        (\*B, T, H), 0 at padding.

    Raises:
        TypeError: `recurrence` is not such a network.
        ValueError: a bidirectional network; inputs or a mask of another shape, no sequence, or a mask with a hole or on
            another device.

    Example:
        >>> read_backward(nn.GRU(3, 5), torch.zeros(2, 7, 3)).shape
        torch.Size([2, 7, 5])

    References:
        Krishnan, Shalit and Sontag, "Structured inference networks for nonlinear state space models", AAAI 2017 (ST-R).
    """
    check_recurrence(recurrence, may_drop=True)
    check_last_dim("inputs", inputs, recurrence.input_size, "the input size of `recurrence`")
    if inputs.ndim < 2:
        raise ValueError(f"inputs: has shape {tuple(inputs.shape)}, expected (*B, T, {recurrence.input_size})")
    if 0 in inputs.shape:
        raise ValueError(f"inputs: has shape {tuple(inputs.shape)}, expected at least one sequence and one step")
    num_steps, inputs = inputs.shape[-2], _without_holes(inputs, observed)
    steps = torch.arange(num_steps, device=inputs.device)
    if mask is not None:
        mask = check_mask(mask, inputs.shape[:-2], num_steps, inputs.device)
        inputs = fill_padding(inputs, mask)
    lengths = steps.new_full((*inputs.shape[:-2], 1), num_steps) if mask is None else mask.sum(-1, keepdim=True)
    order = ((lengths - 1 - steps) % num_steps).reshape(-1, num_steps)  # an involution; padding stays on the right
    rows = (order + num_steps * torch.arange(len(order), device=order.device).unsqueeze(-1)).flatten()

    def reverse(values: Tensor) -> Tensor:  # whole steps at a time, in a third of the time that `gather` takes
        return values.reshape(len(rows), -1).index_select(0, rows)

    flat, time = reverse(inputs).reshape(-1, *inputs.shape[-2:]), 1 if recurrence.batch_first else 0
    output, _ = recurrence(flat.movedim(1, time))
    futures = reverse(output.movedim(time, 1)).reshape(*inputs.shape[:-1], -1)
    return futures if mask is None else overwrite_padding(futures, mask)


def _without_holes(inputs: Tensor, observed: Tensor | None) -> Tensor:
    """Return inputs (*B, T, I) with 0 at steps without an observation."""
    counted = observed_steps(observed, None, inputs)
    return inputs if counted is None else overwrite_padding(inputs, counted)


def _standardise(name: str, layer: nn.Conv2d | nn.Linear, output: Tensor) -> None:
    """Rescale a layer whose output was (N, C, ...) so that each channel has mean 0 and standard deviation 1."""
    if len(output) < 2:
        raise ValueError(f"{name}: got {len(output)} to calibrate on, expected two or more (a few hundred)")
    channels = output.transpose(0, 1).flatten(1)
    mean, deviation = channels.mean(1), channels.std(1)
    deviation = torch.where(deviation > 1e-6, deviation, 1.0)  # a constant channel keeps its scale
    layer.weight.div_(deviation.reshape(-1, *(1,) * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.copy_((layer.bias - mean) / deviation)
