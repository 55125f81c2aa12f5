"""A linear-Gaussian chain: its exact filter, also online, smoother, posterior and evidence, with padding and holes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from typing_extensions import Self

from seqdisent._checks import check_last_dim, expand_to, reads_at_once
from seqdisent.chains.markov import MarkovChain
from seqdisent.masks import expand_observed


class LinearEmission(NamedTuple):
    r"""The observation of a chain's steps, :math:`x_t \sim \mathcal N(C z_t + c, \mathrm{diag}(\rho^2))`.

    Attributes:
        matrix: C, (X, D).
        scale: :math:`\rho`, (X,), standard deviations of the noise.
        offset: c, (X,), or what broadcasts with the values, such as the effect of a control, (\*B, T, X); None for 0.
    """

    matrix: Tensor
    scale: Tensor
    offset: Tensor | None = None


class Moments(NamedTuple):
    r"""Means and covariances of the steps of a linear-Gaussian chain.

    Attributes:
        loc: (\*B, T, D).
        covariance: (\*B, T, D, D).
    """

    loc: Tensor
    covariance: Tensor


class Filtered(NamedTuple):
    r"""What the Kalman filter says after each step; after one step, without T, as `filter_step` returns it.

    Attributes:
        loc: (\*B, T, D), the mean of z_t given what was observed until t.
        covariance: (\*B, T, D, D), its covariance.
        log_evidence: (\*B, T), the log-density of what was observed at t given all before, in nats; 0 at padding. Its
            sum over time is log p(x).
    """

    loc: Tensor
    covariance: Tensor
    log_evidence: Tensor


class LinearGaussianChain(MarkovChain):
    r"""A chain whose steps are linear and whose noise is Gaussian, so that what follows from observations is exact.

    .. math:: z_1 \sim \mathcal N(m, \mathrm{diag}(\sigma_1^2)), \quad
        z_t \sim \mathcal N(A z_{t-1} + b_t, \mathrm{diag}(\sigma^2))

    The offset :math:`b_t` is the same at every step, or each step's own: the effect :math:`B u_t` of a control.

    Its conditionals are multivariate Normals. Where the steps are observed through a
    :class:`~seqdisent.chains.LinearEmission`, :meth:`filter`, :meth:`smooth` and :meth:`posterior` are exact, also
    where a coordinate or a step was not observed. A forecast is a hole at the end.

    Args:
        loc: m, (\*B, D).
        first_scale: :math:`\sigma_1`, (D,), standard deviations of the first step.
        matrix: A, (D, D).
        scale: :math:`\sigma`, (D,), standard deviations of the later steps' noise.
        num_steps: T.
        offset: b, (D,), or for each step its own, what expands to (\*B, T, D); None for 0. b_t is added on the way from
            z_{t-1} to z_t, so b_1 is never read: what acts on z_1 belongs in `loc`.
        mask: (\*B, T) bool, True where a step is real, padding on the right.

    Shape:
        - batch \*B, event (T, D)

    Raises:
        ValueError: sizes that differ, or what :class:`MarkovChain` refuses.
        TypeError: as there.

    Example:
        A random walk that was seen at its first and last step.

        >>> walk = LinearGaussianChain(torch.zeros(1, 1), torch.ones(1), torch.eye(1), torch.ones(1), 3)
        >>> x = torch.tensor([[[0.0], [torch.nan], [4.0]]])
        >>> seen = LinearEmission(torch.eye(1), scale=torch.full((1,), 0.1)), ~x.isnan()
        >>> [round(mean, 2) for mean in walk.smooth(x, *seen).loc.flatten().tolist()]
        [0.02, 2.0, 3.98]
        >>> walk.filter(x, *seen).log_evidence.sum(-1)
        tensor([-6.1550])
        >>> walk.posterior(x, *seen)  # a guide's site
        MarkovChain()

    References:
        Kalman, "A new approach to linear filtering and prediction problems", 1960; Sarkka, "Bayesian filtering and
        smoothing", 2013, chapters 4 and 8. The posterior is computed from the end on, in information form, so that
        it is a chain that can be drawn from.
    """

    def __init__(
        self,
        loc: Tensor,
        first_scale: Tensor,
        matrix: Tensor,
        scale: Tensor,
        num_steps: int,
        *,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        size = loc.shape[-1]
        offset = loc.new_zeros(size) if offset is None else offset
        for name, value in (("first_scale", first_scale), ("scale", scale), ("offset", offset)):
            check_last_dim(name, value, size, "the size of `loc`")
        if matrix.shape != (size, size):
            raise ValueError(f"matrix: has shape {tuple(matrix.shape)}, expected {(size, size)}, the size of `loc`")
        self.loc, self.first_scale, self.matrix, self.scale, self.offset = loc, first_scale, matrix, scale, offset
        super().__init__(_normal(loc, first_scale), self._move, num_steps, mask=mask)
        if offset.ndim > 1:
            self._read_by_step("inputs", expand_to("offset", offset, tuple(self.batch_shape + self.event_shape)))

    def _move(self, z_prev: Tensor, offset: Tensor | None = None) -> Any:
        offset = self.offset if offset is None else offset
        check_last_dim("inputs", offset, self.event_shape[-1], "the size of `loc`")
        with _full_precision(z_prev):
            return _normal(z_prev @ self.matrix.T + offset, self.scale)

    def _offsets(self) -> Tensor:
        """Return b of each step, (T, D) or (*B, T, D), filled in padding; the first is not to be read."""
        return self._by_step["inputs"] if self.offset.ndim > 1 else self.offset.expand(self.num_steps, -1)

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> Self:
        """Return this chain with a larger batch; a particle plate calls it."""
        return type(self)(
            self.loc.expand(*batch_shape, -1), self.first_scale, self.matrix, self.scale, self.num_steps,
            offset=self.offset, mask=self._step_mask,
        )  # fmt: skip

    def filter(self, values: Tensor, emission: LinearEmission, observed: Tensor | None = None) -> Filtered:
        r"""Return the moments of each step given the observations so far, and the evidence, by the Kalman filter.

        Args:
            values: x, (\*B, T, X).
            emission: how they are made of z.
            observed: (\*B, T) or (\*B, T, X) bool, True where measured; None for all real steps.

        Returns:
            The moments and the log-evidence of each step.

        Raises:
            ValueError: shapes that do not fit, or values that are not finite where they were measured.
            TypeError: `observed` is not bool.
        """
        error, seen = self._errors(values, emission, observed, (self.num_steps,), self._step_mask)
        found: list[Filtered] = []
        for now in zip(error.unbind(-2), seen.unbind(-2), self._offsets().unbind(-2), strict=True):
            found.append(self._filtered(found[-1] if found else None, *now, emission))
        locs, covariances, log_evidences = zip(*found, strict=True)
        return Filtered(torch.stack(locs, -2), torch.stack(covariances, -3), torch.stack(log_evidences, -1))

    def filter_step(
        self,
        values: Tensor | None,
        emission: LinearEmission,
        observed: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        state: Filtered | None = None,
    ) -> Filtered:
        r"""Filter one more step: what :meth:`filter` does, while the observations arrive, at the cost of one step.

        Neither the chain's number of steps nor its mask is read: a sequence that has ended is not observed any more.

        Args:
            values: x_t, (\*B, X); None where nothing was observed, which forecasts a step.
            emission: how it is made of z_t.
            observed: (\*B,) or (\*B, X) bool, True where measured; None for all.
            offset: b_t of this step, (\*B, D) or (D,), not read at the first one; None for the chain's own (D,).
            state: what this function returned for the step before; None for the first step.

        Returns:
            The moments of z_t given what was observed until now, and the log-evidence of x_t given all before, as of
            :meth:`filter` but without the dimension T. It is also the state that the next step starts from.

        Raises:
            ValueError: shapes that do not fit, values that are not finite where they were measured, or no `offset` for
                a chain that has one for each step.
            TypeError: `observed` is not bool.

        Example:
            >>> walk = LinearGaussianChain(torch.zeros(1, 1), torch.ones(1), torch.eye(1), torch.ones(1), num_steps=1)
            >>> emission = LinearEmission(torch.eye(1), scale=torch.full((1,), 0.1))
            >>> state = walk.filter_step(torch.zeros(1, 1), emission)
            >>> for value in (None, torch.full((1, 1), 4.0)):
            ...     state = walk.filter_step(value, emission, state=state)
            >>> state.loc.item(), state.log_evidence.item()  # the evidence of the last value given the first
            (3.98..., -5.23...)
        """
        if values is None:
            batch_shape = self.batch_shape if state is None else state.loc.shape[:-1]
            values = emission.matrix.new_zeros(*batch_shape, len(emission.matrix))
            observed = torch.zeros_like(values, dtype=torch.bool)
        error, seen = self._errors(values, emission, observed, ())
        if state is not None and offset is None and self.offset.ndim > 1:
            raise ValueError("offset: got None, expected (*B, D) of this step, since the chain has one for each step")
        offset = self.offset if offset is None else offset
        check_last_dim("offset", offset, self.event_shape[-1], "the size of `loc`")
        if state is not None:
            shape = (*error.shape[:-1], self.event_shape[-1])
            expand_to("state.loc", state.loc, shape)
            offset = expand_to("offset", offset, shape)
        return self._filtered(state, error, seen, offset, emission)

    def _filtered(
        self, before: Filtered | None, error: Tensor, seen: Tensor, offset: Tensor, emission: LinearEmission
    ) -> Filtered:
        """Filter one step, given the one before, what `_errors` says of this one, both (*B, X), and its offset."""
        with _full_precision(error):
            if before is None:
                loc, covariance = self.loc, self.first_scale.square().diag().expand(*self.batch_shape, -1, -1)
            else:
                loc = before.loc @ self.matrix.T + offset
                covariance = self.matrix @ before.covariance @ self.matrix.T + self.scale.square().diag()
            reading = seen.unsqueeze(-1) * emission.matrix  # a hole reads nothing, with an error of 0 and a noise of 1
            noise = emission.scale.square()
            spread = reading @ covariance @ reading.mT + torch.where(seen > 0, noise, 1.0).diag_embed()
            factor = torch.linalg.cholesky(spread)
            surprise = error - (reading @ loc.unsqueeze(-1)).squeeze(-1)
            whitened = torch.linalg.solve_triangular(factor, surprise.unsqueeze(-1), upper=False)
            log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            log_evidence = -0.5 * (whitened.square().sum((-2, -1)) + log_det + seen.sum(-1) * math.log(2 * math.pi))
            gain = torch.cholesky_solve(reading @ covariance, factor).mT
            kept = torch.eye(self.event_shape[-1]).to(loc) - gain @ reading
            loc = loc + (gain @ surprise.unsqueeze(-1)).squeeze(-1)
            # Joseph's form stays symmetric and positive
            covariance = kept @ covariance @ kept.mT + gain @ (seen * noise).diag_embed() @ gain.mT
            return Filtered(loc, covariance, log_evidence)

    def smooth(self, values: Tensor, emission: LinearEmission, observed: Tensor | None = None) -> Moments:
        r"""Return the moments of each step given all observations.

        Args:
            values: x, (\*B, T, X).
            emission: how they are made of z.
            observed: (\*B, T) or (\*B, T, X) bool, True where measured; None for all real steps.

        Raises:
            ValueError: as :meth:`filter`.
            TypeError: as there.
        """
        with _full_precision(values):
            first, steps = self._posterior(values, emission, observed)
            moments = [(first.loc, first.covariance_matrix)]
            for gain, shift, factor in zip(*(part.unbind(-3) for part in steps), strict=True):
                loc, covariance = moments[-1]
                loc = (gain @ loc.unsqueeze(-1) + shift).squeeze(-1)
                moments.append((loc, gain @ covariance @ gain.mT + factor @ factor.mT))
        locs, covariances = zip(*moments, strict=True)
        return Moments(torch.stack(locs, -2), torch.stack(covariances, -3))

    def posterior(self, values: Tensor, emission: LinearEmission, observed: Tensor | None = None) -> MarkovChain:
        r"""Return :math:`p(z_{1:T} \mid x_{1:T})`, again a chain: a guide's site, exact.

        Its :meth:`~MarkovChain.mean_path` is the smoother's mean.

        Args:
            values: x, (\*B, T, X).
            emission: how they are made of z.
            observed: (\*B, T) or (\*B, T, X) bool, True where measured; None for all real steps.

        Raises:
            ValueError: as :meth:`filter`.
            TypeError: as there.
        """
        size = self.event_shape[-1]
        with _full_precision(values):
            first, steps = self._posterior(values, emission, observed)
            inputs = torch.cat([part.flatten(-2) for part in steps], -1)
            inputs = torch.cat([inputs.new_zeros(*inputs.shape[:-2], 1, inputs.shape[-1]), inputs], -2)

        def step(z_prev: Tensor, inputs: Tensor) -> Any:
            with _full_precision(z_prev):
                gain, shift, factor = inputs.split([size * size, size, size * size], -1)
                loc = (gain.unflatten(-1, (size, size)) @ z_prev.unsqueeze(-1)).squeeze(-1) + shift
                return dist.MultivariateNormal(loc, scale_tril=factor.unflatten(-1, (size, size)), validate_args=False)

        return MarkovChain(first, step, self.num_steps, inputs=inputs, mask=self._step_mask)

    def _posterior(
        self, values: Tensor, emission: LinearEmission, observed: Tensor | None
    ) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
        """Return the first step's posterior, and of the later ones gain, shift and factor (*B, T - 1, D, ...)."""
        error, seen = self._errors(values, emission, observed, (self.num_steps,), self._step_mask)
        matrix, offset = emission.matrix, self._offsets()
        weight = seen / emission.scale.square()
        # what x_t says of z_t is exp(-1/2 z' L z + z' l), and x_t ... x_T: from the end on
        of_step = (weight.unsqueeze(-2) * matrix.T) @ matrix, ((weight * error) @ matrix).unsqueeze(-1)
        precision, shift = (torch.zeros_like(part[..., 0, :, :]) for part in of_step)
        identity, messages = torch.eye(self.event_shape[-1]).to(error), []
        parts = (reversed(part.unbind(-3)) for part in (*of_step, offset.unsqueeze(-1)))
        for own_precision, own_shift, move in zip(*parts, strict=True):
            precision, shift = precision + own_precision, shift + own_shift
            messages.append((precision, shift))
            mixed = identity + precision * self.scale.square()  # through the step: (I + L Q)^-1 (L, l)
            both = torch.linalg.solve(mixed, torch.cat([precision, shift - precision @ move], -1))
            precision = self.matrix.T @ both[..., :-1] @ self.matrix
            shift = self.matrix.T @ both[..., -1:]
        precisions, shifts = (torch.stack(part[::-1], -3) for part in zip(*messages, strict=True))
        _, loc, factor = _combined(self.first_scale, self.loc, precisions[..., 0, :, :], shifts[..., 0, :, :])
        first = dist.MultivariateNormal(loc.squeeze(-1), scale_tril=factor, validate_args=False)
        later = _combined(self.scale, offset[..., 1:, :], precisions[..., 1:, :, :], shifts[..., 1:, :, :])
        return first, (later[0] @ self.matrix, later[1], later[2])

    def _errors(
        self,
        values: Tensor,
        emission: LinearEmission,
        observed: Tensor | None,
        steps: tuple[int, ...],
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return x - c, 0 where nothing was seen, and 1 where it was, both (*B, *steps, X)."""
        matrix, scale, offset = emission
        if matrix.ndim != 2 or matrix.shape[1] != self.event_shape[-1]:
            raise ValueError(f"matrix: has shape {tuple(matrix.shape)}, expected (X, {self.event_shape[-1]})")
        for name, value in (("scale", scale), ("offset", scale if offset is None else offset)):
            check_last_dim(name, value, len(matrix), "X")
        wanted = (*steps, len(matrix))
        num_batch = max(0, values.ndim - len(wanted))
        try:
            batch_shape = torch.broadcast_shapes(values.shape[:num_batch], self.batch_shape)
        except RuntimeError:
            batch_shape = None
        if batch_shape is None or values.shape[num_batch:] != wanted:
            expected = f"(*B, {', '.join(map(str, wanted))}) with the chain's batch {tuple(self.batch_shape)}"
            raise ValueError(f"values: has shape {tuple(values.shape)}, expected {expected}")
        values = values.expand(*batch_shape, *wanted)
        seen = torch.ones_like(values, dtype=torch.bool)
        if observed is not None:
            observed = expand_observed(observed, values.shape[:-1], values.shape[-1:], values.device)
            seen = seen & (observed if observed.ndim == values.ndim else observed.unsqueeze(-1))
        if mask is not None:
            seen = seen & mask.unsqueeze(-1)
        error = torch.where(seen, values if offset is None else values - offset, 0.0)
        if reads_at_once(error) and not error.isfinite().all():
            raise ValueError("values: not all finite, expected numbers; what was not measured is for `observed` to say")
        return error, seen.to(error.dtype)


def _combined(scale: Tensor, loc: Tensor, precision: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine N(A z + loc, scale^2) with exp(-1/2 z' L z + z' l): the factor of A, the shift, the Cholesky factor."""
    inverse = scale.square().reciprocal()
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision + inverse.diag()))
    shift = covariance @ ((inverse * loc).unsqueeze(-1) + shift)
    return covariance * inverse, shift, torch.linalg.cholesky(covariance)


def _normal(loc: Tensor, scale: Tensor) -> Any:
    return dist.MultivariateNormal(loc, scale_tril=scale.diag(), validate_args=False)


def _full_precision(tensor: Tensor) -> Any:
    """Keep autocast away from linear algebra: in half precision the exact posterior is not exact."""
    return torch.autocast(tensor.device.type, enabled=False)
