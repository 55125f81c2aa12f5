"""Models, guides, weights and interventions that users get wrong, and what they are told."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import torch
from failures import check, rows
from pyro import poutine
from strategies import mask_of

from seqdisent import (
    AnnealingSchedule,
    DecomposedELBO,
    IndependentSteps,
    MarkovChain,
    batch_sizes,
    elbo_terms,
    forecast,
    generate,
    impute,
    infer,
    reconstruct,
    swap,
)
from seqdisent.particles import filter, resample

ones = torch.ones
FRAMES = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(FRAMES.shape[:2], dtype=torch.bool)


def model(frames=None, mask=None, *, num_sequences=None, num_steps=None, sites="sz", observe=lambda x: x, width=3):
    num_sequences, num_steps = (num_sequences, num_steps) if frames is None else frames.shape[:2]
    with pyro.plate("sequences", num_sequences):
        s = pyro.sample("s", dist.Normal(torch.zeros(3), 1.0).to_event(1)) if "s" in sites else torch.zeros(3)
        z = torch.zeros(num_sequences, num_steps, 3)
        if "z" in sites:
            initial = dist.Normal(torch.zeros(num_sequences, 3), 1.0).to_event(1)
            z = pyro.sample(
                "z",
                MarkovChain(initial, lambda z: dist.Normal(0.9 * z, 1.0, validate_args=False).to_event(1), num_steps),
            )
        x = dist.Normal((s.unsqueeze(-2) + z)[..., :width], 1.0, validate_args=False).to_event(2)
        pyro.sample("x", x, obs=None if frames is None else observe(frames))


def guide(frames, mask=None, *, sites="sz", of_s=dist.Normal, **_):
    with pyro.plate("sequences", len(frames)):
        if "s" in sites:
            pyro.sample("s", of_s(frames.mean(1), 1.0, validate_args=False).to_event(1))
        if "z" in sites:
            pyro.sample("z", dist.Normal(frames, 1.0, validate_args=False).to_event(2))


def terms(frames=FRAMES, of_model=None, of_guide=None):
    return elbo_terms(lambda x: model(x, **(of_model or {})), lambda x: guide(x, **(of_guide or {})), frames)


class NotReparameterised(dist.Normal):
    has_rsample = False


def small(z, observed=True, *, scale=1.0, mask=None):
    """A program of one latent z and, in a model, what is observed: two sequences."""

    def program():
        with pyro.plate("sequences", 2):
            with nullcontext() if mask is None else poutine.mask(mask=mask), poutine.scale(scale=scale):
                pyro.sample("z", z)
            if observed:
                pyro.sample("x", dist.Normal(torch.zeros(2), 1.0), obs=torch.zeros(2))

    return program


def pair(p, q, p_options=None, q_options=None, then=None, **options):
    """The terms of a model with prior p and a guide with posterior q."""

    def do():
        found = elbo_terms(small(p, **(p_options or {})), small(q, False, **(q_options or {})), **options)
        return getattr(found, then)() if then else found

    return do


STANDARD, KEEP = dist.Normal(0.0, 1.0), torch.tensor([True, False])
POINT = dist.Delta(torch.zeros(2, requires_grad=True))
THIRDS = torch.full((3,), 1 / 3)
RELAXED = dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), THIRDS)
HARD, STRAIGHT = dist.OneHotCategorical(THIRDS), dist.OneHotCategoricalStraightThrough(THIRDS)


def walk(*lengths):
    initial, mask = dist.Normal(torch.zeros(2, 1), 1.0).to_event(1), mask_of([3, *lengths]) if lengths else None
    return MarkovChain(initial, lambda z: dist.Normal(z, 1.0).to_event(1), 3, mask=mask)


def with_penalty():
    pyro.factor("penalty", torch.tensor(-1.0))
    small(STANDARD)()


def counts_padding():
    with pyro.plate("sequences", 2):
        pyro.sample("z", walk(1))
        pyro.sample("x", dist.Normal(torch.zeros(2, 3, 1), 1.0).to_event(2), obs=torch.zeros(2, 3, 1))


def in_a_plate_of_its_own():
    with pyro.plate("own", 2):
        pyro.sample("z", STANDARD)


def outside_of_plates():
    pyro.sample("z", STANDARD)
    pyro.factor("x", torch.zeros(()))


def enumerated():
    pyro.sample("z", STANDARD, infer={"enumerate": "parallel"})


def without_rsample():
    step = MarkovChain(
        dist.Normal(torch.zeros(2, 1), 1.0).to_event(1), lambda z: NotReparameterised(z, 1.0).to_event(1), 3
    )
    small(step, False)()


def steps_as_batch():
    with pyro.plate("sequences", 2):
        pyro.sample("x", dist.Normal(torch.zeros(2, 2), 1.0), obs=torch.zeros(2, 2))


def masked_over_more_than_plates():
    with poutine.mask(mask=torch.ones(4, 2, dtype=torch.bool)):
        small(STANDARD)()


def joined(x):
    with pyro.plate("sequences", 2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, 1), 1.0).to_event(1))
        torch.cat([z, x], -1)


def steps_as_plates(observes=True):
    with pyro.plate("sequences", 2, dim=-2), pyro.plate("steps", 3, dim=-1):
        pyro.sample("z", STANDARD)
        if observes:
            pyro.sample("x", STANDARD, obs=torch.zeros(2, 3))


def of_one_step(x):
    with pyro.plate("sequences", 2):
        pyro.sample("z", dist.Normal(torch.zeros(2, 1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)


def without_memory(frames=None, mask=None, *, num_sequences=None, num_steps=None):
    with pyro.plate("sequences", num_sequences or len(frames)):
        step = dist.Normal(torch.zeros(num_sequences or len(frames), num_steps or frames.shape[1], 3), 1.0)
        pyro.sample("x", IndependentSteps(step.to_event(1)), obs=frames)


def of_heavy_tails(frames=None, mask=None, *, num_sequences=None, num_steps=None):
    with pyro.plate("sequences", num_sequences):
        pyro.sample("x", dist.Normal(pyro.sample("k", dist.Cauchy(0.0, 1.0)), 1.0))


sizes = {"num_sequences": 2, "num_steps": 3}


def with_nan():
    frames = FRAMES.clone()
    frames[1, 2] = torch.nan
    return frames


def checked(x, *given):
    """A model whose emission checks what it is asked about."""
    with pyro.plate("sequences", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        step = dist.Normal(z.unsqueeze(-2).expand(x.shape), 1.0, validate_args=True).to_event(1)
        pyro.sample("x", IndependentSteps(step, *given), obs=x)


def of_means(x, *_):
    with pyro.plate("sequences", len(x)):
        pyro.sample("z", dist.Normal(x.mean(1), 1.0, validate_args=False).to_event(1))


@rows(
    # sites
    ("guide without a site", lambda: terms(of_guide={"sites": "z"}), ValueError,
     r"guide: has no site \['s'\], which the model samples"),
    ("model without a site the guide has", lambda: terms(of_model={"sites": "z"}), ValueError,
     r"model: has no latent site \['s'\], which the guide samples; expected the sites \['z'\]"),
    ("model that observes nothing", lambda: elbo_terms(lambda: model(num_sequences=2, num_steps=4),
     lambda: guide(FRAMES)), ValueError, "model: observes nothing, expected at least one site with obs="),
    ("a site that is not reparameterised", lambda: terms(of_guide={"of_s": NotReparameterised}), ValueError,
     "guide: site 's' has no rsample .*would be silently wrong"),
    ("a class that is not reparameterised", pair(HARD, HARD), ValueError, r"guide: site 'z' has no rsample "
     r"\(OneHotCategorical\), so the gradient .* expected a reparameterised .*, for a class OneHotCategoricalStraight"),
    ("a chain that is not reparameterised", lambda: elbo_terms(small(walk()), without_rsample), ValueError,
     r"guide: site 'z' has no rsample \(a step is a Independent, which has no rsample\), so the gradient of its param"),
    ("a site that is enumerated", lambda: elbo_terms(small(STANDARD), enumerated), ValueError,
     "guide: site 'z' is enumerated, which the ledger does not support; expected a reparameterised sample"),
    ("a guide that observes", lambda: elbo_terms(small(STANDARD), small(STANDARD)), ValueError,
     "guide: site 'x' is observed, expected a sample"),
    ("a site of another shape", pair(STANDARD, dist.Normal(torch.zeros(2, 2), 1.0).to_event(1)), ValueError,
     r"site 'z': has event shape \(2,\) in the guide, expected the model's \(\)"),
    ("a class in the model, a number in the guide", pair(HARD, RELAXED), ValueError,
     "site 'z': is a RelaxedOneHotCategoricalStraightThrough in the guide and a OneHotCategorical in the model, "
     "expected both discrete or both continuous: a density minus a mass is no KL"),
    ("a class whose gradient would be wrong", pair(HARD, STRAIGHT, kl="monte-carlo"), ValueError,
     "site 'z': is discrete and has no closed form here, so the gradient of its term would be silently wrong; expected "
     'kl="analytic" and the model\'s order of sites in the guide, or torch.no_grad'),
    ("a batch dimension without a plate", lambda: elbo_terms(steps_as_batch, lambda: None), ValueError,
     r"model: site 'x' has batch shape \(2, 2\) and no plate at dimension -2; expected one there, or `.to_event\(n\)` "
     "if these are values of one sequence"),
    ("a plate of the guide alone", lambda: elbo_terms(outside_of_plates, in_a_plate_of_its_own), ValueError,
     r"site 'z': is in plates \(dim, size\) \[\] in the model and \[\(-1, 2\)\] in the guide, expected the same"),
    ("a weight in the model alone", pair(STANDARD, STANDARD, {"scale": 0.5}), ValueError,
     r"site 'z': is scaled by 0.5 in the model and by 1.0 in the guide, expected the same; put the weight of a term "
     r"into ELBOTerms.elbo\(weights\)"),
    ("a mask of the guide alone", pair(STANDARD, STANDARD, None, {"mask": KEEP}), ValueError,
     "site 'z': has different masks in model and guide, expected the same"),
    ("coordinates that count in the guide alone", pair(dist.Normal(torch.zeros(2, 2), 1.0).to_event(1),
     dist.Normal(torch.zeros(2, 2), 1.0).mask(KEEP).to_event(1)), ValueError,
     "site 'z': coordinates have different masks in model and guide, expected the same"),
    ("chains with different masks", pair(walk(1), walk(2)), ValueError,
     "site 'z': the chains of guide and model have different masks, expected the same real steps in both"),
    ("a mask with a dimension of its own", lambda: elbo_terms(masked_over_more_than_plates, lambda: poutine.mask(
        small(STANDARD, False), mask=torch.ones(4, 2, dtype=torch.bool))()), ValueError,
     r"site '.': its term has batch shape \(4, 2\), by a mask or a scale with a dimension -2 that is no plate's"),
    ("particles that a program cannot broadcast", lambda: elbo_terms(of_one_step, joined, torch.zeros(2, 1),
     num_particles=3, vectorize_particles=True), RuntimeError, "vectorize_particles: model or guide failed with 3 "
     "particles as a dimension on the left of their own; expected programs that broadcast what they read of a latent"),
    ("the donor's site misspelt", lambda: swap(model, guide, FRAMES, FRAMES, sites=["S"]), ValueError,
     r"sites: the guide has no site \['S'\], expected some of \['s', 'z'\]"),
    ("the kept site misspelt", lambda: swap(model, guide, FRAMES, FRAMES, sites=["s"], keep=["Z"]), ValueError,
     r"keep: the guide has no site \['Z'\]"),
    ("a site both swapped and kept", lambda: swap(model, guide, FRAMES, FRAMES, sites=["s"], keep=["s"]), ValueError,
     r"keep: \['s'\] are in `sites` too"),
    ("one site's name where a list belongs", lambda: swap(model, guide, FRAMES, FRAMES, sites="s"), ValueError,
     r"sites: got the string 's', expected a sequence of site names such as \['s'\]"),
    ("a given site misspelt", lambda: generate(model, num_sequences=2, num_steps=3, given={"q": ones(2)}), ValueError,
     r"given: the model has no site \['q'\], expected some of \['s', 'x', 'z'\]"),
    ("a given value of another shape", lambda: generate(model, num_sequences=2, num_steps=3, given={"s": ones(2)}),
     ValueError, r"site 's': the value has shape \(2,\), expected \(2, 3\)"),
    ("a donor of another batch", lambda: swap(model, guide, FRAMES, FRAMES[:1], sites=["s"]), ValueError,
     "donor: has 1 sequences, expected as many as the source, 2"),
    ("no site to swap", lambda: swap(model, guide, FRAMES, FRAMES, sites=[]), ValueError,
     r"sites: is empty, expected at least one of \['s', 'z'\]"),
    ("a mask beside source and donor", lambda: swap(model, guide, FRAMES, FRAMES, sites=["s"], mask=MASK), TypeError,
     r"mask: source and donor have one each, expected \(frames, mask, observed\) of either"),
    ("holes beside source and donor", lambda: swap(model, guide, FRAMES, FRAMES, sites=["s"], observed=MASK), TypeError,
     r"observed: source and donor have one each, expected \(frames, mask, observed\) of either"),
    ("a fifth argument", lambda: reconstruct(model, guide, *[FRAMES] * 5), TypeError,
     r"args: got 5 arguments, expected at most four, \(frames, mask, observed, covariates\)"),
    ("covariates twice", lambda: reconstruct(model, guide, FRAMES, None, None, FRAMES, covariates=FRAMES), TypeError,
     "covariates: got one by position and one by name, expected one of them"),
    ("covariates that end early", lambda: batch_sizes(FRAMES, covariates=FRAMES[:, :3]), ValueError,
     r"covariates: has shape \(2, 3, 3\), expected \(2, 4, ...\), a value for each step"),
    ("covariates of another batch", lambda: batch_sizes(None, 3, 4, mask=None, covariates=FRAMES), ValueError,
     r"covariates: has shape \(2, 4, 3\), expected \(3, 4, ...\)"),
    ("nothing that was observed", lambda: impute(model, guide, FRAMES), TypeError,
     "observed: got None, expected a bool tensor, True where measured"),
    ("a future that ends early", lambda: forecast(model, guide, FRAMES, None, None, FRAMES, num_steps=2,
     future={"covariates": FRAMES[:, :1]}), ValueError,
     r"future: 'covariates' has shape \(2, 1, 3\), expected \(2, 2, 3\)"),
    ("a future of what was not given", lambda: forecast(model, guide, FRAMES, num_steps=2, future={"q": FRAMES}),
     ValueError, r"future: got 'q', expected some of \[\], the inputs of the steps before"),
    ("a future that is no mapping", lambda: forecast(model, guide, FRAMES, num_steps=2, future=FRAMES), TypeError,
     r"future: got Tensor, expected {name: \(B, num_steps, ...\)} of inputs by step"),
    ("a source that is none", lambda: swap(model, guide, None, FRAMES, sites=["s"]), TypeError,
     r"source: got NoneType, expected frames or \(frames, mask\)"),
    ("a given value that is no tensor", lambda: generate(model, **sizes, given={"z": [[1.0]]}), TypeError,
     "given: 'z' is list, expected a tensor"),
    ("one emission's name where a list belongs", lambda: generate(model, **sizes, emissions="x"), ValueError,
     "emissions: got the string 'x', expected a sequence of site names"),
    ("a model without sites", lambda: generate(lambda frames=None, mask=None, **_: None, **sizes), ValueError,
     "model: has no sample site, expected at least one that it emits"),
    ("a mean that there is not", lambda: generate(of_heavy_tails, **sizes, sample=False), ValueError,
     r"sample: site 'k' \(Cauchy\) has no mean, expected sample=True for it"),
    ("a site of the guide that the model lacks", lambda: reconstruct(functools.partial(model, sites="s"), guide,
     FRAMES), ValueError, r"model: has no site \['z'\], which the guide samples"),
    ("a forecast without memory", lambda: forecast(without_memory, lambda frames, mask=None: None, FRAMES, num_steps=2),
     ValueError, "model: has no latent that carries the frames into the future, so the forecast would ignore them; "
     "expected a chain or a static latent, or history=True for a model that reads its own frames"),
    # what is observed
    ("padding that counts", lambda: elbo_terms(counts_padding, small(walk(1), False)), ValueError,
     "site 'x': counts steps that are padding in 'z', of 3; expected IndependentSteps.step, mask. with the same mask, "
     r"or `.mask\(True\)` if these are no steps"),
    ("an observation of one sequence for all", lambda: terms(of_model={"observe": lambda x: x[:1]}), ValueError,
     r"site 'x': what is observed has batch shape \(1,\), expected 2 at dimension -1, that of the plate 'sequences'"),
    ("an observation without a batch", lambda: terms(of_model={"observe": lambda x: x[0]}), ValueError,
     r"site 'x': what is observed has batch shape \(\), expected 2 at dimension -1"),
    ("an emission with fewer channels than the data", lambda: terms(of_model={"width": 1}), ValueError,
     r"site 'x': what is observed has shape \(2, 4, 3\), expected one that ends in the event's, \(4, 1\)"),
    ("data with fewer channels than the emission", lambda: terms(of_model={"observe": lambda x: x[..., :1]}),
     ValueError, r"site 'x': what is observed has shape \(2, 4, 1\), expected .*\(4, 3\)"),
    ("frames without time", lambda: terms(FRAMES[:, 0], {"sites": "z"}, {"sites": "z"}), ValueError,
     r"site 'x': what is observed has batch shape \(\), expected 2 at dimension -1"),
    ("no frames", lambda: infer(guide), TypeError, "frames"),
    ("frames in a list", lambda: reconstruct(model, guide, [1.0]), TypeError, "args: got list, expected frames"),
    ("frames that are NaN", lambda: reconstruct(model, guide, with_nan()), ValueError,
     "args: frames have real steps that are not finite, expected numbers"),
    ("frames of length 0", lambda: forecast(model, guide, FRAMES[:, :0], num_steps=2), ValueError,
     r"args: frames have shape \(2, 0, 3\), expected \(B, T, ...\) with at least one frame"),
    ("NaN in the data", lambda: terms(with_nan()).check_finite(7), FloatingPointError,
     r"log_likelihood\['x'\] is nan at training step 7 \(sequence 1\)"),
    ("NaN that is no hole", lambda: elbo_terms(checked, lambda x: of_means(FRAMES), with_nan()), ValueError,
     "site 'x': what is observed has 3 NaN, expected numbers, or holes that `observed` names: IndependentSteps"),
    ("a guide that reads NaN", lambda: elbo_terms(checked, of_means, with_nan()), ValueError,
     r"guide: site 'z' is NaN, expected numbers; if the guide reads NaN in holes, mark_missing\(values, "),
    # weights
    ("the weight of a site misspelt", lambda: terms().elbo({"zz": 0.5}), ValueError,
     r"weights: no site \['zz'\] in the ledger, expected some of \['s', 'z'\] \(latent\) and \['x'\] \(observed\)"),
    ("the same in the loss for SVI", lambda: DecomposedELBO(weights={"zz": 0.5}).loss(
        lambda x: model(x), guide, FRAMES), ValueError, r"weights: no site \['zz'\]"),
    ("a weight that is NaN", lambda: terms().elbo({"z": float("nan")}), ValueError,
     r"weights\['z'\]: got nan, expected a finite number"),
    ("a schedule where its value belongs", lambda: terms().elbo({"z": AnnealingSchedule.constant(1.0)}), TypeError,
     r"weights\['z'\]: got _Linear, expected a number"),
    ("a weight of another batch", lambda: terms().elbo({"z": ones(4, 1)}), ValueError,
     r"weights\['z'\]: has shape \(4, 1\), expected \(\) or \(2,\) by sequence"),
    ("an unknown kind of KL term", lambda: elbo_terms(model, guide, FRAMES, kl="exact"), ValueError,
     "kl: got 'exact', expected \"analytic\" or \"monte-carlo\""),
    ("no particle", lambda: elbo_terms(model, guide, FRAMES, num_particles=0), ValueError, "num_particles: got 0"),
    ("importance weights of closed forms", lambda: terms().importance_weighted(), ValueError,
     r'importance_weighted: the KL terms are analytic, expected elbo_terms\(..., kl="monte-carlo"\)'),
    ("importance weights of a term for all", lambda: elbo_terms(with_penalty, small(STANDARD, False),
     kl="monte-carlo").importance_weighted(), ValueError,
     r"importance_weighted: \['penalty'\] lie outside the sequences' plate; their weights are shared"),
    ("importance weights of scaled terms", pair(STANDARD, STANDARD, {"scale": 2.0}, {"scale": 2.0},
     kl="monte-carlo", then="importance_weighted"), ValueError, r"importance_weighted: \['z'\] are scaled \(by a "
     r"subsampling plate or poutine.scale\); expected a plate over the sequences themselves"),
    # objectives
    ("an unknown objective", lambda: elbo_terms(model, guide, FRAMES, objective="vimco"), ValueError,
     "objective: got 'vimco', expected one of 'elbo', 'iwae', 'stl', 'dreg', 'fivo'"),
    ("closed forms with the path derivative", lambda: elbo_terms(model, guide, FRAMES, kl="analytic", objective="stl"),
     ValueError, "kl: got \"analytic\" with objective='stl', which needs the density of the sample itself; expected "
     'kl="monte-carlo" .or None., or objective="elbo"'),
    ("weights in an importance-weighted bound", lambda: elbo_terms(model, guide, FRAMES, objective="iwae").bound(
        {"z": 0.5}), ValueError, r"weights: got \['z'\] with objective='iwae', whose importance weights are densities "
     'and cannot be weighted by term; expected none, or objective="elbo" or "stl"'),
    ("the same in the loss for SVI", lambda: DecomposedELBO(objective="dreg", weights={"z": 0.5}), ValueError,
     r"weights: got \['z'\] with objective='dreg'"),
    ("a term for all in an importance-weighted bound", lambda: elbo_terms(with_penalty, small(STANDARD, False),
     objective="dreg", num_particles=2).bound(), ValueError, r"importance_weighted: \['penalty'\] lie outside"),
    ("a class with the path derivative", pair(STRAIGHT, STRAIGHT, objective="stl"), ValueError,
     "site 'z': is discrete and has no closed form here"),
    ("a class that is not reparameterised, likewise", pair(HARD, HARD, objective="dreg"), ValueError,
     "site 'z': is discrete and has no closed form here|guide: site 'z' has no rsample"),
    ("a point under DReG", pair(STANDARD, POINT, objective="dreg", num_particles=2), ValueError,
     "guide: site 'z' is a point .Delta. with parameters of its own, so the gradient of objective='dreg' would be "
     'silently wrong; expected a density, or objective="elbo" or "iwae"'),
    ("a point whose density has parameters", pair(STANDARD, dist.Delta(torch.zeros(2), POINT.v), objective="stl"),
     ValueError, "guide: site 'z' is a point .Delta. with parameters of its own, so the gradient of objective='stl'"),
)  # fmt: skip
def test_programs(row):
    check(row)


class Unsteppable(dist.TorchDistribution):
    """A chain by the protocol, that has no `step`."""

    arg_constraints, step_mask, has_rsample = {}, None, True

    def __init__(self):
        super().__init__(torch.Size((2,)), torch.Size((3, 1)), validate_args=False)

    def rsample(self, sample_shape=()):
        return torch.zeros(2, 3, 1)

    def expand(self, batch_shape, _instance=None):
        return self

    def log_prob_per_step(self, path):
        return path.sum(-1)

    log_prob = conditionals = extend = mean_path = log_prob_per_step


def seen(z=None, options=None, then=None, x=None):
    """A model of a trajectory z that is seen through noise; a program without x is a guide."""

    def program():
        with pyro.plate("sequences", 2), poutine.scale(scale=(options or {}).get("scale", 1.0)):
            value = pyro.sample("z", walk() if z is None else z)
            if then is not None:
                pyro.sample("s", then(value))
            if x is not None:
                pyro.sample("x", x(value), obs=torch.zeros(2, *x(value).event_shape))

    return program


def through_noise(z):
    return IndependentSteps(dist.Normal(z, 1.0).to_event(1))


def particles(model=None, guide=None, **options):
    model = seen(x=through_noise) if model is None else model
    return lambda: filter(model, seen() if guide is None else guide, **{"num_particles": 3, **options})


@rows(
    ("no particle", particles(num_particles=0), ValueError, "num_particles: got 0"),
    ("a part of the particles above one", particles(threshold=2.0), ValueError,
     r"threshold: got 2.0, expected a part of the particles, in \[0, 1\]"),
    ("a scheme that is none", particles(resampling="best"), ValueError,
     "resampling: got 'best', expected one of 'systematic', 'stratified', 'residual', 'multinomial'"),
    ("a scheme that is none, alone", lambda: resample(torch.zeros(3, 2), "best"), ValueError, "scheme: got 'best'"),
    ("weights that are all 0", lambda: resample(torch.full((3, 2), -torch.inf)), ValueError,
     "log_weights: are NaN, infinite or all -inf in a sequence, expected a particle with weight"),
    ("a trajectory in plates of steps", particles(steps_as_plates, lambda: steps_as_plates(False)), ValueError,
     "site '[zx]': is in plates of 2 at dimension -2, 3 at dimension -1, expected one, of the sequences, at dimension "
     "-1; a trajectory is one site, a chain"),
    ("a site that is scaled", particles(seen(x=through_noise, options={"scale": 2.0}), seen(options={"scale": 2.0})),
     ValueError, "site 'z': is scaled, so that its term is no log-density; expected no scale"),
    ("an observed site without steps", particles(seen(x=lambda z: dist.Normal(z.sum((-2, -1)), 1.0))), ValueError,
     r"site 'x': is observed and has no steps \(Normal\), expected IndependentSteps or a chain"),
    ("a static site after a chain", particles(
        seen(x=through_noise, then=lambda z: STANDARD), seen(then=lambda z: dist.Normal(z.mean((-2, -1)), 1.0))),
     ValueError, "guide: site 's' does not change over time and is drawn after the trajectory 'z', expected the static "
     "sites first"),
    ("a chain without a step", particles(guide=seen(Unsteppable())), ValueError,
     r"guide: site 'z' is a Unsteppable that cannot be drawn step by step, expected a chain with step\(z_prev, state\) "
     r"and state_after\(path\), as MarkovChain has them"),
    ("an emission that reads later steps", particles(seen(x=lambda z: through_noise(z.flip(-2)))), ValueError,
     r"model: the log-density of site 'x' at step \d of sequence 0 is \S+ before later steps are drawn and \S+ after; "
     "expected a model whose steps read no later ones, and that draws nothing at random but its sites"),
    ("an emission that nothing can have made", particles(seen(x=lambda z: IndependentSteps(
        dist.Uniform(z * 0 + 1, 2.0, validate_args=False).to_event(1)))), FloatingPointError,
     "step 0 of sequence 0: all particles have weight 0; not finite: log p of 'x'"),
)  # fmt: skip
def test_particles(row):
    check(row)
