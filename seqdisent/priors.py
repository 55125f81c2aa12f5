"""Learnt priors: modules that return a richer distribution than one Normal, with or without a context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms import AffineCoupling, ConditionalAffineCoupling
from pyro.nn import ConditionalDenseNN, DenseNN
from torch import Tensor, nn
from torch.distributions import transforms
from torch.nn import functional as F

from seqdisent._checks import check_context_dim, check_kind, check_last_dim, check_positive, check_scale
from seqdisent.heads import check_precision, full_precision


class _Prior(nn.Module):
    """What the priors of a vector share: its size, its context, and the samples that it is started from."""

    loc: nn.Parameter

    def __init__(self, latent_dim: int, context_dim: int, hidden_dim: int, min_scale: float) -> None:
        super().__init__()
        check_positive(latent_dim=latent_dim, hidden_dim=hidden_dim)
        check_scale(min_scale=min_scale)
        check_context_dim(context_dim)
        self.latent_dim, self.context_dim, self.min_scale = latent_dim, context_dim, min_scale

    def extra_repr(self) -> str:
        return f"{self.latent_dim}, context_dim={self.context_dim}"

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """Return p(z), or p(z | context)."""
        check_precision(self.loc)
        if self.context_dim == 0:
            if context is not None:
                raise ValueError(f"context: got shape {tuple(context.shape)}, expected None since context_dim=0")
        elif context is None:
            raise ValueError(f"context: got None, expected a tensor (*B, context_dim={self.context_dim})")
        else:
            check_last_dim("context", context, self.context_dim, "context_dim")
            context = full_precision(context)
            check_kind("context", context, self.loc)
        with torch.autocast(self.loc.device.type, enabled=False):
            return self._distribution(context)

    def _distribution(self, context: Tensor | None) -> TorchDistribution:
        raise NotImplementedError

    def _checked_samples(self, samples: Tensor, at_least: int) -> Tensor:
        check_last_dim("samples", samples, self.latent_dim, "latent_dim")
        flat = samples.detach().reshape(-1, self.latent_dim)
        if len(flat) < at_least:
            raise ValueError(f"samples: got {len(flat)}, expected {at_least} or more")
        if not torch.isfinite(flat).all():
            raise ValueError("samples: have values that are not finite, expected numbers")
        return flat


class MixturePrior(_Prior):
    r"""A mixture of Gaussians with learnt weights, locations and covariances.

    .. math:: p(z \mid c) = \sum_{k=1}^K \pi_k(c) \, \mathcal N(z; \mu_k(c), \Sigma_k(c))

    With a context it is a mixture density network: a layer of `hidden_dim` units adds to the logits of the weights, to
    the locations and to the scales; it starts at 0, so that training starts from the mixture without context.

    :meth:`start` takes the first mixture from samples. Without it, locations start as draws of N(0, 1) and scales at 1.

    A KL to a mixture has no closed form. The ledger estimates it from the guide's sample, and says so. The mean of a
    mixture lies between its clusters: draw with ``sample=True``.

    Args:
        latent_dim: D, the size of z.
        num_components: K.
        context_dim: C, the size of the context; 0 for none.
        hidden_dim: units of the layer that reads the context.
        full: full covariances in place of diagonal ones.
        min_scale: the smallest scale; of full covariances, the smallest diagonal entry of their Cholesky factor.

    Shape:
        - context: (\*B, C), or None if context_dim is 0
        - output: mixture, batch \*B (() without context), event (D,)

    Raises:
        ValueError: a size below 1, a `min_scale` that is not positive, a context of another size, a missing one, or one
            although context_dim is 0.
        TypeError: a context of another dtype than the parameters.

    Example:
        Two clusters.

        >>> _ = torch.manual_seed(0)
        >>> samples = torch.cat([torch.randn(500, 1) - 4, torch.randn(500, 1) + 4])
        >>> prior = MixturePrior(1, 2)
        >>> prior.start(samples)
        >>> sorted(round(location) for location in prior.loc.flatten().tolist())
        [-4, 4]
        >>> prior().event_shape, prior().log_prob(torch.zeros(1)) < prior().log_prob(torch.full((1,), 4.0))
        (torch.Size([1]), tensor(True))

    References:
        Bishop, "Mixture density networks", 1994. Dilokthanakul et al., "Deep unsupervised clustering with Gaussian
        mixture variational autoencoders", 2016, for mixtures as priors.
    """

    def __init__(
        self,
        latent_dim: int,
        num_components: int,
        *,
        context_dim: int = 0,
        hidden_dim: int = 64,
        full: bool = False,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__(latent_dim, context_dim, hidden_dim, min_scale)
        check_positive(num_components=num_components)
        self.num_components = num_components
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, latent_dim))
        self.raw_scale = nn.Parameter(_raw(torch.ones(num_components, latent_dim), min_scale))
        self.lower = nn.Parameter(torch.zeros(num_components, latent_dim, latent_dim)) if full else None
        self.context = _from_context(context_dim, hidden_dim, num_components * (1 + 2 * latent_dim))

    def _distribution(self, context: Tensor | None) -> TorchDistribution:
        logits, loc, raw_scale = self.logits, self.loc, self.raw_scale
        if self.context is not None and context is not None:
            sizes = (self.num_components, *2 * (self.num_components * self.latent_dim,))
            more_logits, more_loc, more_scale = self.context(context).split(sizes, -1)
            logits = logits + more_logits
            loc = loc + more_loc.unflatten(-1, loc.shape)
            raw_scale = raw_scale + more_scale.unflatten(-1, loc.shape[-2:])
        scale = F.softplus(raw_scale) + self.min_scale
        if self.lower is None:
            components = dist.Normal(loc, scale, validate_args=False).to_event(1)
        else:
            identity = torch.eye(self.latent_dim, dtype=loc.dtype, device=loc.device)
            factor = (self.lower.tril(-1) + identity) * scale.unsqueeze(-2)
            components = dist.MultivariateNormal(loc, scale_tril=factor, validate_args=False)
        weights = dist.Categorical(logits=logits, validate_args=False)
        mixture: TorchDistribution = dist.MixtureSameFamily(weights, components, validate_args=False)
        return mixture

    @torch.no_grad()
    def start(self, samples: Tensor, *, seed: int = 0) -> None:
        r"""Take the mixture from samples, by expectation maximisation (needs the extra ``metrics``).

        What was learnt before is lost, of the context too.

        Args:
            samples: (\*S, D), posterior samples of z over the training data, say; at least two, and `num_components`
                different ones.
            seed: of its first components, which k-means finds.

        Raises:
            ValueError: samples of another size, too few (different) ones, or some that are not finite.
            ImportError: scikit-learn is not installed.
        """
        try:
            from sklearn.mixture import GaussianMixture
        except ImportError as error:
            raise ImportError("start needs scikit-learn; install it with: pip install 'seqdisent[metrics]'") from error
        flat = self._checked_samples(samples, 2)
        if (count := len(flat.unique(dim=0))) < self.num_components:
            raise ValueError(f"samples: got {count} different ones, expected {self.num_components} or more")
        kind = "diag" if self.lower is None else "full"
        found = GaussianMixture(
            self.num_components, covariance_type=kind, reg_covar=self.min_scale**2, random_state=seed
        ).fit(flat.double().cpu().numpy())
        covariances = torch.from_numpy(found.covariances_)
        if self.lower is None:
            scale = covariances.sqrt()
        else:
            factor = torch.linalg.cholesky(covariances)
            scale = factor.diagonal(dim1=-2, dim2=-1)
            self.lower.copy_((factor / scale.unsqueeze(-2)).tril(-1))
        if self.context is not None:
            _zero(self.context[-1])
        self.logits.copy_(torch.from_numpy(found.weights_).log())
        self.loc.copy_(torch.from_numpy(found.means_))
        self.raw_scale.copy_(_raw(scale, self.min_scale))


class FlowPrior(_Prior):
    r"""A normalising flow: affine couplings from N(0, I), with or without a context.

    Every coupling leaves one half of the coordinates alone and shifts and scales the other by functions of it; the
    order is reversed in between. Density and sampling cost the same. It starts as N(0, I).

    Args:
        latent_dim: D, the size of z, two or more.
        num_layers: couplings.
        context_dim: C, the size of the context; 0 for none.
        hidden_dim: units of the two hidden layers of each coupling.
        min_scale: the smallest factor of the last, affine layer.

    Shape:
        - context: (\*B, C), or None if context_dim is 0
        - output: transformed Normal, batch \*B (() without context), event (D,)

    Raises:
        ValueError: a size below 1, a `latent_dim` below 2, a `min_scale` that is not positive, or a context as of
            :class:`MixturePrior`.
        TypeError: a context of another dtype than the parameters.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> prior = FlowPrior(4, context_dim=2)
        >>> prior(torch.zeros(3, 2)).rsample().shape
        torch.Size([3, 4])

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", ICLR 2017.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        num_layers: int = 6,
        context_dim: int = 0,
        hidden_dim: int = 64,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__(latent_dim, context_dim, hidden_dim, min_scale)
        check_positive(num_layers=num_layers)
        if latent_dim < 2:
            raise ValueError(f"latent_dim: got {latent_dim}, expected 2 or more: a coupling needs two halves")
        self.num_kept = latent_dim // 2
        hidden, changed = [hidden_dim, hidden_dim], latent_dim - self.num_kept
        sizes = [changed, changed]
        networks: list[Any] = [
            ConditionalDenseNN(self.num_kept, context_dim, hidden, sizes) if context_dim
            else DenseNN(self.num_kept, hidden, sizes)
            for _ in range(num_layers)
        ]  # fmt: skip
        for network in networks:  # every coupling starts as the identity
            _zero(network.layers[-1])
        self.couplings = nn.ModuleList(networks)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.raw_scale = nn.Parameter(_raw(torch.ones(latent_dim), min_scale))

    def _distribution(self, context: Tensor | None) -> TorchDistribution:
        layers: list[Any] = []
        reversal = dist.transforms.Permute(torch.arange(self.latent_dim - 1, -1, -1, device=self.loc.device))
        for network in self.couplings:
            if context is None:
                layers += [AffineCoupling(self.num_kept, network), reversal]
            else:
                layers += [ConditionalAffineCoupling(self.num_kept, network).condition(context), reversal]
        scale = F.softplus(self.raw_scale) + self.min_scale
        layers.append(transforms.AffineTransform(self.loc, scale, event_dim=1))
        shape = (self.latent_dim,) if context is None else (*context.shape[:-1], self.latent_dim)
        base = dist.Normal(self.loc.new_zeros(shape), 1.0, validate_args=False).to_event(1)
        return _Flow(base, layers, validate_args=False)

    @torch.no_grad()
    def start(self, samples: Tensor) -> None:
        r"""Take location and scale of the last layer from samples (\*S, D), two or more; couplings start anew.

        Raises:
            ValueError: samples of another size, too few of them, or some that are not finite.
        """
        flat = self._checked_samples(samples, 2)
        for network in self.couplings:
            _zero(network.layers[-1])  # type: ignore[index]
        self.loc.copy_(flat.mean(0))
        self.raw_scale.copy_(_raw(flat.std(0), self.min_scale))


class _Flow(dist.TransformedDistribution):  # type: ignore[misc]
    """A flow whose log-density broadcasts a value over the batch, as every distribution's does; Pyro's do not."""

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        log_prob: Tensor = super().log_prob(value.expand(shape))
        return log_prob


class VampPrior(nn.Module):
    r"""A mixture of the guide's own posteriors of learnt pseudo-inputs.

    .. math:: p(z) = \sum_{k=1}^K \pi_k \, q(z \mid u_k)

    It is given the function of the guide that returns q(z | x), without ``pyro.sample``. For ragged sequences keep
    their mask: ``prior(lambda u: posterior(u, mask))``.

    Args:
        pseudo_inputs: u, (K, \*E), where they start: K training clips of T frames, say, (K, T, C, H, W).
        bounds: the smallest and the largest value of a pseudo-input (0 and 1 of pixels); None for any.

    Shape:
        - encode: a function of (K, \*E) that returns a distribution with batch (K,)
        - output: mixture, batch (), the event of `encode`

    Raises:
        ValueError: no pseudo-input, `bounds` that are not (smallest, largest), a pseudo-input outside of them, or an
            `encode` that returns another batch than (K,).
        TypeError: pseudo-inputs that are no floating-point tensor.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> def encode(clips):
        ...     return dist.Normal(clips.mean((1, 2)).unsqueeze(-1), 0.1).to_event(1)
        >>> prior = VampPrior(torch.rand(5, 8, 3), bounds=(0.0, 1.0))
        >>> prior(encode).sample().shape
        torch.Size([1])

    References:
        Tomczak and Welling, "VAE with a VampPrior", AISTATS 2018; learnt weights are ours.
    """

    def __init__(self, pseudo_inputs: Tensor, *, bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        if not isinstance(pseudo_inputs, Tensor) or not pseudo_inputs.is_floating_point():
            found = getattr(pseudo_inputs, "dtype", type(pseudo_inputs).__name__)
            raise TypeError(f"pseudo_inputs: got {found}, expected a floating-point tensor (K, *E)")
        if pseudo_inputs.ndim < 2 or not len(pseudo_inputs):
            raise ValueError(f"pseudo_inputs: has shape {tuple(pseudo_inputs.shape)}, expected (K, *E) with K >= 1")
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"bounds: got {bounds}, expected (smallest, largest)")
        if bounds is not None and not bool(((pseudo_inputs >= bounds[0]) & (pseudo_inputs <= bounds[1])).all()):
            raise ValueError(f"pseudo_inputs: have values outside of bounds={bounds}, expected all inside")
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())
        self.logits = nn.Parameter(pseudo_inputs.new_zeros(len(pseudo_inputs)))
        self.bounds = bounds

    def forward(self, encode: Callable[[Tensor], TorchDistribution]) -> TorchDistribution:
        r"""Return p(z).

        Args:
            encode: the guide's posterior of (K, \*E): a function that returns a distribution with batch (K,).
        """
        components = encode(self._inside())
        if components.batch_shape != self.logits.shape:
            raise ValueError(
                f"encode: returned a distribution with batch {tuple(components.batch_shape)}, expected "
                f"{tuple(self.logits.shape)}, one a pseudo-input"
            )
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        mixture: TorchDistribution = dist.MixtureSameFamily(weights, components, validate_args=False)
        return mixture

    def _inside(self) -> Tensor:
        if self.bounds is None:
            return self.pseudo_inputs
        if not self.training:
            return self.pseudo_inputs.clamp(*self.bounds)
        with torch.no_grad():  # a projection: clamped in the graph, a value outside would get no gradient back
            self.pseudo_inputs.clamp_(*self.bounds)
        return self.pseudo_inputs.clone()  # of each call its own, which the next call does not change


def _from_context(context_dim: int, hidden_dim: int, out_features: int) -> nn.Sequential | None:
    if not context_dim:
        return None
    network = nn.Sequential(nn.Linear(context_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_features))
    _zero(network[-1])
    return network


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _raw(scale: Tensor, min_scale: float) -> Tensor:
    """Return what softplus and the smallest scale make the scale of, as far as it is larger than that."""
    wanted = (scale - min_scale).clamp(min=1e-6)
    return wanted + torch.log(-torch.expm1(-wanted))
