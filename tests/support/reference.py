"""The slow, obvious version of what the library vectorises: loops, one sample at a time, straight from the formula.

Nothing here may import what it checks: weights come in as tensors or as torch's own modules.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Experts: blended parameters
# ---------------------------------------------------------------------------------------------------------------------


def transposed_convolution(image: Tensor, kernel: Tensor, bias: Tensor, *, stride: int, padding: int) -> Tensor:
    """Transposed convolution by its definition: each pixel (C, h, w) stamps its kernel (C, C', k, k) on the output."""
    _, height, width = image.shape
    size = kernel.shape[-1]
    canvas = image.new_zeros(kernel.shape[1], stride * (height - 1) + size, stride * (width - 1) + size)
    for i in range(height):
        for j in range(width):
            stamp = sum(image[c, i, j] * kernel[c] for c in range(image.shape[0]))
            canvas[:, stride * i : stride * i + size, stride * j : stride * j + size] += stamp
    return canvas[:, padding : canvas.shape[1] - padding, padding : canvas.shape[2] - padding] + bias[:, None, None]


def blended_decoder(banks: Sequence[tuple[Tensor, Tensor]], latents: Tensor, weights: Tensor) -> Tensor:
    """Average each layer's kernels (K, C, C', 4, 4) and biases (K, C') and decode: one sequence, one frame a time."""
    sequences = []
    for latents_of_row, weights_of_row in zip(latents, weights, strict=True):
        layers = []
        for kernels, biases in banks:
            kernel, bias = torch.zeros_like(kernels[0]), torch.zeros_like(biases[0])
            for k in range(len(kernels)):
                kernel = kernel + weights_of_row[k] * kernels[k]
                bias = bias + weights_of_row[k] * biases[k]
            layers.append((kernel, bias))
        frames = []
        for latent in latents_of_row:
            image = transposed_convolution(latent[:, None, None], *layers[0], stride=1, padding=0)
            for kernel, bias in layers[1:]:
                image = torch.where(image > 0, image, 0.01 * image)
                image = transposed_convolution(image, kernel, bias, stride=2, padding=1)
            frames.append(image)
        sequences.append(torch.stack(frames))
    return torch.stack(sequences)


def plain_decoder(kernels: Sequence[Tensor], biases: Sequence[Tensor]) -> nn.Sequential:
    """The decoder of one expert as torch's own layers."""
    layers: list[nn.Module] = []
    for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        stride, padding = (1, 0) if i == 0 else (2, 1)
        layer = nn.ConvTranspose2d(*kernel.shape[:2], 4, stride=stride, padding=padding, dtype=kernel.dtype)
        with torch.no_grad():
            layer.weight.copy_(kernel)
            layer.bias.copy_(bias)
        layers += [layer, nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers[:-1])


def blended_module(expert: nn.Module, bank: dict[str, Tensor], x: Tensor, weights: Tensor) -> Tensor:
    """For each row, set the parameters of a copy of `expert` to the average of the bank (K, ...), and apply it."""
    outputs = []
    for row, weights_of_row in zip(x, weights, strict=True):
        blended = copy.deepcopy(expert)
        with torch.no_grad():
            for name, parameter in blended.named_parameters():
                parameter.copy_(sum(w * bank[name][k] for k, w in enumerate(weights_of_row)))
        outputs.append(blended(row))
    return torch.stack(outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Encoders: one sequence at a time, without its padding
# ---------------------------------------------------------------------------------------------------------------------


def leaky_relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.01 * x)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def affine(layer: nn.Linear, vector: Tensor) -> Tensor:
    return layer.weight @ vector + layer.bias


def masked_average(values: Tensor, mask: Tensor) -> Tensor:
    """Average each row's real steps: values (B, T, D), mask (B, T)."""
    rows = []
    for row, real in zip(values, mask, strict=True):
        steps = [step for step, is_real in zip(row, real, strict=True) if is_real]
        rows.append(sum(steps) / len(steps))
    return torch.stack(rows)


def lstm_layer(
    lstm: nn.LSTM, suffix: str, inputs: Sequence[Tensor], h: Tensor, c: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Run one layer and direction by the formulas of its gates; return (h, c) after each step."""
    w_ih, w_hh = getattr(lstm, f"weight_ih_{suffix}"), getattr(lstm, f"weight_hh_{suffix}")
    bias = getattr(lstm, f"bias_ih_{suffix}") + getattr(lstm, f"bias_hh_{suffix}")
    states = []
    for x in inputs:
        i, f, g, o = (w_ih @ x + w_hh @ h + bias).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append((h, c))
    return states


def final_states(lstm: nn.LSTM, sequence: Tensor) -> Tensor:
    """Final h of each layer of a bidirectional LSTM, forward then backward, for one unpadded sequence (T, I)."""
    inputs, final = list(sequence), []
    zero = sequence.new_zeros(lstm.hidden_size)
    for layer in range(lstm.num_layers):
        forward = [h for h, _ in lstm_layer(lstm, f"l{layer}", inputs, zero, zero)]
        backward = [h for h, _ in lstm_layer(lstm, f"l{layer}_reverse", inputs[::-1], zero, zero)]
        final += [forward[-1], backward[-1]]
        inputs = [torch.cat(pair) for pair in zip(forward, backward[::-1], strict=True)]
    return torch.cat(final)


def unrolled(lstm: nn.LSTM, constant: Tensor, hidden: Sequence[Tensor], cell: Sequence[Tensor], steps: int) -> Tensor:
    """Outputs (steps, H) of an LSTM that reads the same input at every step, from (h, c) of each layer."""
    inputs = [constant] * steps
    for layer in range(lstm.num_layers):
        inputs = [h for h, _ in lstm_layer(lstm, f"l{layer}", inputs, hidden[layer], cell[layer])]
    return torch.stack(inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Recurrent networks: one vector at a time, by the formulas of torch's documentation
# ---------------------------------------------------------------------------------------------------------------------

Carried = list[tuple[Tensor, Tensor]]  # h and c of each layer; c is an LSTM's alone


def recurrent_step(network: nn.RNNBase, read: Tensor, carried: Carried) -> Carried:
    after = []
    for layer, (h, c) in enumerate(carried):
        if isinstance(network, nn.LSTM):
            h, c = lstm_layer(network, f"l{layer}", [read], h, c)[0]
        else:
            of_input = getattr(network, f"weight_ih_l{layer}") @ read + getattr(network, f"bias_ih_l{layer}")
            of_state = getattr(network, f"weight_hh_l{layer}") @ h + getattr(network, f"bias_hh_l{layer}")
            if isinstance(network, nn.GRU):
                (r_x, z_x, n_x), (r_h, z_h, n_h) = of_input.chunk(3), of_state.chunk(3)
                r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
                h = (1 - z) * torch.tanh(n_x + r * n_h) + z * h
            else:
                h = torch.tanh(of_input + of_state)
        after.append((h, c))
        read = h
    return after


def recurrent_walk(
    network: nn.RNNBase,
    state: Tensor,
    num_steps: int,
    choose: Callable[[int, Tensor | None, Tensor], Tensor],
    read: Callable[[int, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Walk one sequence, h_1 = state, h_t = f(h_{t-1}, read(t, z_{t-1}, h_{t-1})), z_t = choose(t, z_{t-1}, h_t).

    Return its path (T, D) and its states (T, H). Time counts from 0 here.
    """
    carried = [(state, torch.zeros_like(state))] * network.num_layers
    path, states = [choose(0, None, state)], [state]
    for t in range(1, num_steps):
        carried = recurrent_step(network, read(t, path[-1], states[-1]), carried)
        states.append(carried[-1][0])
        path.append(choose(t, path[-1], states[-1]))
    return torch.stack(path), torch.stack(states)


def read_backward(network: nn.RNNBase, sequence: Tensor) -> Tensor:
    """Outputs (T, H) of a network that reads one unpadded sequence (T, I) from its last step to its first."""
    zero = sequence.new_zeros(network.hidden_size)
    carried, outputs = [(zero, zero)] * network.num_layers, []
    for x in reversed(list(sequence)):
        carried = recurrent_step(network, x, carried)
        outputs.append(carried[-1][0])
    return torch.stack(outputs[::-1])


# ---------------------------------------------------------------------------------------------------------------------
# Linear-Gaussian chains: one sequence at a time, as one dense Gaussian, or through the Kalman filter
#
# A chain is given as its first step's mean and covariance and a list of later steps (A, b, Q):
# z_t = A z_{t-1} + b + noise of covariance Q. A path (T, D) is flattened to T * D coordinates.
# ---------------------------------------------------------------------------------------------------------------------

LinearStep = tuple[Tensor, Tensor, Tensor]


def gaussian_log_prob(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    error = x - mean
    quadratic = error @ torch.linalg.inv(covariance) @ error
    return -0.5 * (quadratic + torch.logdet(covariance) + len(x) * math.log(2 * math.pi))


def gaussian_kl(q_mean: Tensor, q_covariance: Tensor, p_mean: Tensor, p_covariance: Tensor) -> Tensor:
    precision, error = torch.linalg.inv(p_covariance), p_mean - q_mean
    log_ratio = torch.logdet(p_covariance) - torch.logdet(q_covariance)
    return 0.5 * (torch.trace(precision @ q_covariance) + error @ precision @ error - len(q_mean) + log_ratio)


def diagonal_normal_log_prob(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Sum the log-densities of independent coordinates, one after another."""
    total = torch.zeros((), dtype=x.dtype)
    for value, mean, deviation in zip(x, loc, scale, strict=True):
        total = total - 0.5 * ((value - mean) / deviation) ** 2 - deviation.log() - 0.5 * math.log(2 * math.pi)
    return total


def dense_chain(mean: Tensor, covariance: Tensor, steps: Sequence[LinearStep]) -> tuple[Tensor, Tensor]:
    """Return mean (T D) and covariance (T D, T D) of the whole path, block by block."""
    num_steps, size = 1 + len(steps), len(mean)
    means = [mean]
    blocks = [[mean.new_zeros(size, size) for _ in range(num_steps)] for _ in range(num_steps)]
    blocks[0][0] = covariance
    for t, (matrix, offset, noise) in enumerate(steps, start=1):
        means.append(matrix @ means[-1] + offset)
        for earlier in range(t):
            blocks[t][earlier] = matrix @ blocks[t - 1][earlier]
            blocks[earlier][t] = blocks[t][earlier].T
        blocks[t][t] = matrix @ blocks[t - 1][t - 1] @ matrix.T + noise
    return torch.cat(means), torch.cat([torch.cat(row, 1) for row in blocks])


def conditioned(mean: Tensor, covariance: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of a Gaussian's first coordinates, given that its last ones are `known`."""
    n = len(mean) - len(known)
    gain = covariance[:n, n:] @ torch.linalg.inv(covariance[n:, n:])
    return mean[:n] + gain @ (known - mean[n:]), covariance[:n, :n] - gain @ covariance[n:, :n]


def as_linear_steps(mean: Tensor, covariance: Tensor, size: int) -> tuple[Tensor, Tensor, list[LinearStep]]:
    """Take the dense Gaussian of a Markov chain with steps of `size` apart again: the reverse of `dense_chain`."""
    steps = []
    for t in range(1, len(mean) // size):
        now, before = slice(t * size, (t + 1) * size), slice((t - 1) * size, t * size)
        matrix = covariance[now, before] @ torch.linalg.inv(covariance[before, before])
        steps.append(
            (matrix, mean[now] - matrix @ mean[before], covariance[now, now] - matrix @ covariance[before, now])
        )
    return mean[:size], covariance[:size, :size], steps


def by_coordinate(observed: Tensor, values: Tensor) -> Tensor:
    """Return what was observed of values (B, T, *E), (B, T) or (B, T, *E), as (B, T, *E)."""
    return observed.reshape(observed.shape + (1,) * (values.ndim - observed.ndim)).expand(values.shape)


def posterior_chain(
    mean: Tensor, covariance: Tensor, steps: Sequence[LinearStep], emission: LinearStep, frames: Tensor
) -> tuple[Tensor, Tensor, list[LinearStep]]:
    """Return the exact posterior of a chain seen through x_t = C z_t + c + noise of covariance R, itself a chain.

    NaN is what was not seen.
    """
    z_mean, z_covariance = dense_chain(mean, covariance, steps)
    matrix, offset, noise = emission
    num_steps = len(frames)
    decode = torch.block_diag(*[matrix] * num_steps)
    x_mean = decode @ z_mean + offset.repeat(num_steps)
    x_covariance = decode @ z_covariance @ decode.T + torch.block_diag(*[noise] * num_steps)
    joint = torch.cat(
        [
            torch.cat([z_covariance, z_covariance @ decode.T], 1),
            torch.cat([decode @ z_covariance, x_covariance], 1),
        ]
    )
    seen = ~frames.reshape(-1).isnan()
    kept = torch.cat([torch.ones_like(z_mean, dtype=torch.bool), seen])
    known = frames.reshape(-1)[seen]
    return as_linear_steps(*conditioned(torch.cat([z_mean, x_mean])[kept], joint[kept][:, kept], known), len(mean))


def kalman_log_evidence(
    mean: Tensor, covariance: Tensor, steps: Sequence[LinearStep], emission: LinearStep, frames: Tensor
) -> Tensor:
    """Return log p(x_1, ..., x_T) of one sequence (T, X) by the Kalman filter: predict, score, update.

    NaN is what was not seen.
    """
    total = torch.zeros((), dtype=mean.dtype)
    for t, frame in enumerate(frames):
        if t > 0:
            step, shift, drift = steps[t - 1]
            mean, covariance = step @ mean + shift, step @ covariance @ step.T + drift
        seen = ~frame.isnan()
        frame, matrix, offset, noise = frame[seen], emission[0][seen], emission[1][seen], emission[2][seen][:, seen]
        spread = matrix @ covariance @ matrix.T + noise
        total = total + gaussian_log_prob(frame, matrix @ mean + offset, spread)
        gain = covariance @ matrix.T @ torch.linalg.inv(spread)
        mean = mean + gain @ (frame - matrix @ mean - offset)
        covariance = covariance - gain @ matrix @ covariance
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Random programs: the conditionals of one site as plain numbers, for one sequence and one step at a time
#
# A location is a bias and a matrix for each parent; a chain adds sin(A z_{t-1}) from its second step on, what it reads
# beside, or a recurrent state. The families make their own parameters of that location.
# ---------------------------------------------------------------------------------------------------------------------

Row = dict[str, Tensor]  # what one sequence reads: static values (D,), trajectories and frames (T, D)


@dataclass
class Factor:
    """p or q of one site; `kind` is static, markov, recurrent or factorised; the last three are trajectories."""

    kind: str
    family: str  # normal, log-normal, gamma or bernoulli
    bias: Tensor
    spread: Tensor
    reads: dict[str, Tensor]
    of_previous: Tensor | None = None
    of_input: Tensor | None = None  # of a Markov chain; the network of a recurrent one reads its inputs itself
    network: nn.RNNBase | None = None
    start: Tensor | None = None
    of_state: Tensor | None = None
    reads_latent: bool = True
    reads_input: bool = False
    feedback: tuple[Tensor, Tensor] | None = None  # the network's input from z_{t-1} and h_{t-1}

    def parameters(self) -> list[Tensor]:
        own = [self.bias, self.spread, *self.reads.values(), self.of_previous, self.of_input, self.start, self.of_state]
        network = [] if self.network is None else list(self.network.parameters())
        return [*(tensor for tensor in own if tensor is not None), *network, *(self.feedback or ())]


def drive(factor: Factor, row: Row, t: int | None, length: int) -> Tensor:
    """Return what a site's parents add to its location at step t; a static site (t=None) reads averages over time."""
    total = factor.bias
    for name, matrix in factor.reads.items():
        value = row[name]
        if value.ndim == 2:
            value = sum(value[:length]) / length if t is None else value[t]
        total = total + matrix @ value
    return total


def walk(
    factor: Factor, row: Row, inputs: Tensor, length: int, choose: Callable[[int, Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Walk through a trajectory; choose(t, location) is each step. Return all locations and the path."""
    locations: list[Tensor] = []
    path: list[Tensor] = []
    carried: Carried = []
    for t in range(length):
        location = drive(factor, row, t, length)
        if factor.network is not None:
            if t == 0:
                carried = [(factor.start, torch.zeros_like(factor.start))] * factor.network.num_layers
            else:
                read = [path[-1]] if factor.reads_latent else []
                if factor.reads_input:
                    read.append(inputs[t])
                if factor.feedback is not None:
                    of_latent, of_state = factor.feedback
                    read.append(torch.sin(of_latent @ path[-1] + of_state @ carried[-1][0]))
                carried = recurrent_step(factor.network, torch.cat(read), carried)
            location = location + factor.of_state @ carried[-1][0]
        if t > 0 and factor.kind != "factorised":
            location = location + torch.sin(factor.of_previous @ path[-1])
            if factor.of_input is not None:
                location = location + factor.of_input @ inputs[t]
        locations.append(location)
        path.append(choose(t, location))
    return locations, path


def deviation(factor: Factor, location: Tensor) -> Tensor:
    return torch.exp(0.3 * torch.sin(factor.spread * location))


def log_location(factor: Factor, location: Tensor) -> Tensor:
    """Return the location of a log-normal's logarithm, bounded: its exponential may be another one's location."""
    return 3 * torch.sin(location / 3) if factor.family == "log-normal" else location


def gamma_parameters(factor: Factor, location: Tensor) -> tuple[Tensor, Tensor]:
    return 1 + torch.exp(0.5 * torch.sin(location)), torch.exp(0.5 * torch.sin(factor.spread * location))


def log_density(factor: Factor, location: Tensor, value: Tensor) -> Tensor:
    if factor.family == "normal":
        return diagonal_normal_log_prob(value, location, deviation(factor, location))
    if factor.family == "log-normal":
        at = log_location(factor, location)
        of_logarithm = diagonal_normal_log_prob(value.log(), at, deviation(factor, location))
        return of_logarithm - value.log().sum()
    if factor.family == "gamma":
        a, b = gamma_parameters(factor, location)
        return (a * b.log() - torch.lgamma(a) + (a - 1) * value.log() - b * value).sum()
    return -(value * softplus(-location) + (1 - value) * softplus(location)).sum()


def divergence(q: Factor, q_location: Tensor, p: Factor, p_location: Tensor) -> Tensor:
    """Return KL(q || p) of two distributions of one family."""
    if q.family == "gamma":
        (a, b), (c, d) = gamma_parameters(q, q_location), gamma_parameters(p, p_location)
        return (
            (a - c) * torch.digamma(a) - torch.lgamma(a) + torch.lgamma(c) + c * (b / d).log() + a * (d - b) / b
        ).sum()
    q_covariance, p_covariance = (torch.diag(deviation(f, m) ** 2) for f, m in ((q, q_location), (p, p_location)))
    # of log-normals too, for the logarithm is one and the same map
    return gaussian_kl(log_location(q, q_location), q_covariance, log_location(p, p_location), p_covariance)


def mean(factor: Factor, location: Tensor) -> Tensor:
    if factor.family == "gamma":
        a, b = gamma_parameters(factor, location)
        return a / b
    if factor.family == "log-normal":
        return torch.exp(log_location(factor, location) + deviation(factor, location) ** 2 / 2)
    return 1 / (1 + torch.exp(-location)) if factor.family == "bernoulli" else location


# ---------------------------------------------------------------------------------------------------------------------
# Hidden Markov chains: every path of classes, one after another
# ---------------------------------------------------------------------------------------------------------------------


def class_paths(
    initial: Tensor, transitions: Sequence[Tensor], log_likelihoods: Tensor
) -> tuple[list[tuple[int, ...]], Tensor]:
    """Return all K^T paths of one sequence, and log p(k_{1:T}, x_{1:T}) of each.

    `initial` (K,) and `transitions`, (K, K) into each later step, are log-probabilities; `log_likelihoods` are (T, K).
    """
    num_steps, num_classes = log_likelihoods.shape
    paths = list(itertools.product(range(num_classes), repeat=num_steps))
    joint = []
    for path in paths:
        total = initial[path[0]] + log_likelihoods[0, path[0]]
        for t in range(1, num_steps):
            total = total + transitions[t - 1][path[t - 1], path[t]] + log_likelihoods[t, path[t]]
        joint.append(total)
    return paths, torch.stack(joint)


def class_marginals(paths: Sequence[tuple[int, ...]], probs: Tensor, num_classes: int) -> Tensor:
    """Return the probability (T, K) of each class at each step, given that of each path."""
    found = probs.new_zeros(len(paths[0]), num_classes)
    for path, prob in zip(paths, probs, strict=True):
        for t, k in enumerate(path):
            found[t, k] += prob
    return found
