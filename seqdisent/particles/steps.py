"""How particles go on by one step: by runs of the programs on whole sequences, or by the chains and that step alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqdisent._random import kept_random_state
from seqdisent.chains import ChainState, IndependentSteps, MarkovChain, RecurrentChain
from seqdisent.chains.recurrent import known_states
from seqdisent.inference.programs import bare
from seqdisent.masks import fill_padding
from seqdisent.particles.programs import Programs, trajectory
from seqdisent.particles.resampling import pick


class Advance(NamedTuple):
    """One step of all particles: {trajectory: (K, B, *E)}, and its terms by site, (K, B)."""

    values: dict[str, Tensor]
    log_q: dict[str, Tensor]
    log_p: dict[str, Tensor]  # of latents and of what is observed


class WholeRuns:
    """Each step by a run of guide and model on the whole sequence, the later steps filled: right for every model.

    The density that a step was drawn from is known, whatever stands in the later steps, so that weights are right also
    where the guide reads them.
    """

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.static: dict[str, Tensor] = {}
        self._paths: dict[str, Tensor] = {}  # (K, B, t, *E)

    @property
    def chains(self) -> dict[str, Any] | None:
        """The model's chains; None, since they may be others at the next step."""
        return None

    def reorder(self, ancestors: Tensor) -> None:
        """Go on from these particles."""
        self.static = {name: pick(value, ancestors) for name, value in self.static.items()}
        self._paths = {name: pick(path, ancestors) for name, path in self._paths.items()}

    def advance(self, t: int) -> Advance:
        """Draw step t."""
        log_q: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}

        def choose(name: str, fn: Any) -> Tensor:
            if name in self.programs.static:
                if t == 0:
                    self.static[name], log_q[name] = _drawn_once(fn, self.programs.counted[name])
                values[name] = self.static[name]
            else:
                values[name], log_q[name] = self._drawn(name, fn, t)
            return values[name]

        self.programs.draw_guide(choose, stop_after=self.programs.static + self.programs.trajectories)
        terms = self.programs.score_model(values)
        static = self.programs.static
        log_p = {name: term if name in static else term[..., t] for name, term in terms.items()}
        if t > 0:
            log_p = {name: term for name, term in log_p.items() if name not in static}  # they counted at the first
        self._paths = {name: values[name][:, :, : t + 1] for name in self.programs.trajectories}
        return Advance({name: path[:, :, t] for name, path in self._paths.items()}, log_q, log_p)

    def _drawn(self, name: str, fn: Any, t: int) -> tuple[Tensor, Tensor]:
        """Draw step t of a trajectory: return a path of T steps and the step's log-density."""
        chain, before, num_steps = trajectory(fn), self._paths.get(name), self.programs.real.shape[1]
        counted = self.programs.counted[name][:, t]
        if isinstance(chain, IndependentSteps):  # the later ones too, for what else the guide draws from them
            path = chain()
            path = path if before is None else torch.cat([before, path[:, :, t:]], 2)
            return path, torch.where(counted, chain.log_prob_per_step(path)[..., t], 0.0)
        real = self.programs.real[:, t, None]
        if before is None:
            z, log_q = _drawn(chain.step()[0])
        else:
            first = before[:, :, 0].detach()
            # a walk that goes on through padding may overflow, and 0 * inf is a NaN gradient
            z_prev = torch.where(real, before[:, :, -1], first)
            z, log_q = _drawn(chain.step(z_prev, chain.state_after(before))[0])
            z = torch.where(real, z, first)
        later = z.unsqueeze(2).expand(*z.shape[:2], num_steps - t, *z.shape[2:])
        path = later if before is None else torch.cat([before, later], 2)
        return path, torch.where(counted, log_q, 0.0)


class SingleSteps:
    """Each step by the chains' own `step` and a run of the model on that step alone.

    The chains come from one run of each program, up to its last latent, and from another one after a resampling if
    there are static sites. :func:`runs_alone` says whether a model's terms are the same in this way.
    """

    def __init__(self, programs: Programs, static: Mapping[str, Tensor] | None = None) -> None:
        self.programs = programs
        self.static: dict[str, Tensor] = dict(static or {})
        self._first: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # the last step of each trajectory
        self._q_states: dict[str, ChainState] = {}
        self._p_states: dict[str, ChainState] = {}
        self._static_log_q: dict[str, Tensor] = {}
        self._static_log_p: dict[str, Tensor] = {}
        self._is_full = programs.real.all(0).tolist()
        self._alone = _by_step((programs.args, dict(programs.kwargs)), programs.real)
        self._build()

    @property
    def _num_steps(self) -> int:
        return self.programs.real.shape[1]

    @property
    def chains(self) -> dict[str, Any] | None:
        """The model's chains, of K particles each."""
        return self._p_chains

    def _build(self) -> None:
        """Run the programs up to their last latents, on the particles' static values, and keep the chains."""
        values: dict[str, Tensor] = {}
        self._ahead: dict[str, tuple[Tensor, Tensor]] = {}  # independent steps are drawn at once

        def choose(name: str, fn: Any) -> Tensor:
            if name in self.programs.static:
                if name not in self.static:
                    once = _drawn_once(fn, self.programs.counted[name])
                    self.static[name], self._static_log_q[name] = once
                values[name] = self.static[name]
            else:
                values[name] = self._filler(name, trajectory(fn))
            return values[name]

        sites = self.programs.draw_guide(choose, stop_after=self.programs.static + self.programs.trajectories)
        self._q_chains = {name: trajectory(sites[name]) for name in self.programs.trajectories}
        sites, log_p = self.programs.read_model(values)
        self._p_chains = {name: trajectory(sites[name]) for name in self.programs.trajectories}
        self._static_log_p = log_p  # read after the first run
        for chain in [*self._q_chains.values(), *self._p_chains.values()]:
            if not isinstance(chain, MarkovChain | IndependentSteps):
                raise TypeError(f"{type(chain).__name__}: its state is not known, expected a MarkovChain")

    def _filler(self, name: str, chain: Any) -> Tensor:
        """Return values of a trajectory that stand where its chain does not read them."""
        if isinstance(chain, IndependentSteps):
            path: Tensor = chain()
            self._ahead[name] = path, chain.log_prob_per_step(path)
            return path
        with kept_random_state(), torch.no_grad():
            z: Tensor = chain.step()[0].sample()
        return z.unsqueeze(2).expand(*z.shape[:2], self._num_steps, *z.shape[2:])

    def reorder(self, ancestors: Tensor) -> None:
        """Go on from these particles."""
        self.static, self._first, self._before = (
            {name: pick(value, ancestors) for name, value in kept.items()}
            for kept in (self.static, self._first, self._before)
        )
        if self.static:
            self._build()
        for states, chains in ((self._q_states, self._q_chains), (self._p_states, self._p_chains)):
            states.update({name: chains[name].gather_state(state, ancestors) for name, state in states.items()})

    def advance(self, t: int, given: Mapping[str, Tensor] | None = None) -> Advance:
        """Draw step t, or score that of the paths given."""
        values: dict[str, Tensor] = {}
        log_q: dict[str, Tensor] = {}
        log_p: dict[str, Tensor] = {}
        if t > 0:  # padding goes on from the first step, as everywhere: a walk through it may overflow
            self._before = {name: self._filled(name, z, t) for name, z in self._before.items()}
        for name, chain in self._q_chains.items():
            values[name], log_q[name] = self._drawn(name, chain, t, None if given is None else given[name])
        alone = {name: value.unsqueeze(2) for name, value in values.items()}
        known = []
        for name, chain in self._p_chains.items():
            if isinstance(chain, MarkovChain):
                conditional, self._p_states[name] = chain.step(self._before.get(name), self._p_states.get(name))
                log_p[name] = torch.where(self.programs.counted[name][:, t], conditional.log_prob(values[name]), 0.0)
                if isinstance(chain, RecurrentChain) and t > 0:
                    known.append((alone[name], chain.recurrence, self._p_states[name].carried[0].unsqueeze(-2)))
        args, kwargs = self._alone[t]
        with known_states(*known):
            beside = tuple(name for name in self.programs.trajectories if name not in log_p)
            terms = self.programs.score_model({**self.static, **alone}, args, kwargs, beside=beside)
        real = self.programs.real[:, t]
        log_p |= {name: torch.where(real, term.squeeze(-1), 0.0) for name, term in terms.items()}
        self._before = values
        if t == 0:
            self._first = {name: value.detach() for name, value in values.items()}
            log_q, log_p = {**self._static_log_q, **log_q}, {**self._static_log_p, **log_p}
        return Advance(values, log_q, log_p)

    def _drawn(self, name: str, chain: Any, t: int, given: Tensor | None) -> tuple[Tensor, Tensor]:
        counted = self.programs.counted[name][:, t]
        if given is not None and len(self._q_chains) == 1:  # nobody asks for q, and a flow's may be costly
            return given[:, :, t], given.new_zeros(())
        if isinstance(chain, IndependentSteps):
            path, log_q = self._ahead[name] if given is None else (given, chain.log_prob_per_step(given))
            return path[:, :, t], torch.where(counted, log_q[..., t], 0.0)
        conditional, self._q_states[name] = chain.step(self._before.get(name), self._q_states.get(name))
        if given is not None:
            return given[:, :, t], torch.where(counted, conditional.log_prob(given[:, :, t]), 0.0)
        z, log_q = _drawn(conditional)
        return z if t == 0 else self._filled(name, z, t), torch.where(counted, log_q, 0.0)

    def _filled(self, name: str, z: Tensor, t: int) -> Tensor:
        """Return a step with the first one where step t is padding."""
        if self._is_full[t]:
            return z
        real = self.programs.real[:, t]
        return torch.where(real.reshape(-1, *(1,) * (z.ndim - 2)), z, self._first[name])


def runs_alone(programs: Programs) -> bool:
    """Say whether all terms of a step follow from that step and from what the chains carry: tried on one draw."""
    programs = replace(programs, num_particles=1)
    static = programs.static
    with kept_random_state(), torch.no_grad():
        values: dict[str, Tensor] = {}
        q: dict[str, Tensor] = {}

        def choose(name: str, fn: Any) -> Tensor:
            values[name] = fn()
            if len(programs.trajectories) > 1 and name not in static:  # a guide's chain may read another one's path
                q[name] = trajectory(fn).log_prob_per_step(values[name])
            return values[name]

        programs.draw_guide(choose)
        whole = programs.score_model(values)
        try:
            steps = SingleSteps(programs, {name: values[name] for name in static})
            for t in range(programs.real.shape[1]):
                found = steps.advance(t, values)
                for terms, wanted in ((found.log_p, whole), (found.log_q, q)):
                    wanted = {name: term[..., t] for name, term in wanted.items() if name not in static}
                    if not all(_equal(terms[name], term).all() for name, term in wanted.items()):
                        return False
        except Exception:  # a model may fail in any way on a step alone, and whole runs are always right
            return False
    return True


def _equal(found: Tensor, wanted: Tensor) -> Tensor:
    """Say where two log-densities differ by no more than rounding; a difference that is missed would be an error."""
    within = 1000 * torch.finfo(wanted.dtype).eps
    return torch.isclose(found, wanted, rtol=within, atol=within, equal_nan=True)


def agree(found: Tensor, wanted: Tensor) -> Tensor:
    """Say where two log-densities are the same but for rounding; what is not finite is no difference of interest."""
    within = 10 * torch.finfo(wanted.dtype).eps ** 0.5
    return torch.isclose(found, wanted, rtol=within, atol=within, equal_nan=True)


def _drawn_once(fn: Any, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a static site; return its values and their log-densities."""
    value = fn()
    return value, torch.where(counted, fn.log_prob(value), 0.0)


def _drawn(conditional: Any) -> tuple[Tensor, Tensor]:
    """Draw a step, reparameterised where it can be; return it and its log-density."""
    z: Tensor = conditional.rsample() if conditional.has_rsample else conditional.sample()
    log_q: Tensor = conditional.log_prob(z)  # right away: a flow remembers the inverse of its last draw alone
    if log_q.requires_grad and (not conditional.has_rsample or conditional.support.is_discrete):
        raise ValueError(
            f"guide: a step is a {type(bare(conditional)).__name__}, whose draws have no gradient that is right; "
            "expected torch.no_grad() around the filter, or steps that are reparameterised"
        )
    return z, log_q


def _by_step(given: Any, real: Tensor) -> list[Any]:
    """Return the arguments of a program for each step alone: tensors (B, T, ...) of that step, without padding."""

    def is_by_step(value: Tensor) -> bool:
        return value.shape[:2] == real.shape

    def filled(value: Tensor) -> Tensor:
        if not is_by_step(value) or real.all():
            return value
        if value.dtype == torch.bool and value.shape == real.shape and torch.equal(value, real):
            return torch.ones_like(value)
        return fill_padding(value, real, event_dims=value.ndim - 2)

    given = _mapped(filled, given)
    return [_mapped(lambda x: x[:, t : t + 1] if is_by_step(x) else x, given) for t in range(real.shape[1])]  # noqa: B023


def _mapped(function: Callable[[Tensor], Tensor], given: Any) -> Any:
    """Apply a function to every tensor in tuples, lists and dictionaries."""
    if isinstance(given, Tensor):
        return function(given)
    if isinstance(given, dict):
        return {key: _mapped(function, value) for key, value in given.items()}
    if isinstance(given, tuple | list):
        values = [_mapped(function, value) for value in given]
        return type(given)(*values) if hasattr(given, "_fields") else type(given)(values)
    return given
