"""Random models and guides: what hypothesis draws for the fuzzing of ledger and interventions (test_fuzz.py).

A program has up to three latents beside an optional global one, static or trajectories, in one plate or two (each
sequence has objects), with parents drawn at random; one or two observed sites; ragged lengths or none. Model and guide
are written with the library's blocks for whole batches here, and as loops over one row at a time in `by_hand.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from models import normal, without_padding
from pyro import poutine
from reference import Factor
from strategies import Tensors, dimensions, mask_of, num_steps, seeds
from torch import Tensor, nn

from seqdisent import IndependentSteps, MarkovChain, RecurrentChain

TRAJECTORIES = ("markov", "recurrent", "factorised")
NUM_FRAME_VALUES, NUM_INPUTS, STATE_SIZE = 2, 2, 2


def conditional_of(factor: Factor, location: Tensor) -> Any:
    """Return a site's distribution, or that of one step of a chain, event (D,)."""
    deviation = torch.exp(0.3 * torch.sin(factor.spread * location))
    if factor.family == "gamma":
        shape, rate = 1 + torch.exp(0.5 * torch.sin(location)), torch.exp(0.5 * torch.sin(factor.spread * location))
        return dist.Gamma(shape, rate).to_event(1)
    if factor.family == "bernoulli":
        return dist.Bernoulli(logits=location, validate_args=False).to_event(1)
    if factor.family == "log-normal":
        location = 3 * torch.sin(location / 3)
    if factor.family == "log-normal" and factor.kind == "static":
        return dist.LogNormal(location, deviation).to_event(1)
    step = normal(location, deviation)
    if factor.family == "log-normal":
        return dist.TransformedDistribution(step, [dist.transforms.ExpTransform()])
    return step


@dataclass(repr=False)
class RandomProgram:
    """What was drawn: the conditionals p and q of every site by name, and the data.

    Frames are (B, T, X), or (B, T, M, X) with objects in a second plate, as the interventions want them.
    """

    p: dict[str, Factor]
    q: dict[str, Factor]
    model_order: list[str]  # latents; "g" is outside the plates
    guide_order: list[str]
    observed: list[str]
    objects: dict[str, bool]  # which sites are in the plate of objects
    lengths: list[int]
    num_objects: int | None  # None: no second plate
    mask: Tensor | None
    frames: Tensor
    label: Tensor  # the second observed site
    inputs: Tensor
    scale: float = 1.0
    keep: Tensor | None = None  # poutine.mask on the sequences

    @property
    def num_plates(self) -> int:
        return 1 if self.num_objects is None else 2

    def is_trajectory(self, name: str) -> bool:
        return self.p[name].kind in TRAJECTORIES

    def parameters(self) -> list[Tensor]:
        return [tensor for factors in (self.p, self.q) for factor in factors.values() for tensor in factor.parameters()]

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None, inputs=None):
        label = None
        if frames is not None:
            num_sequences, num_steps = frames.shape[:2]
            frames, label = self._per_object(frames, mask), self.label
        inputs = inputs[:, :num_steps]
        values: dict[str, Tensor] = {}
        plates = self._plates(num_sequences)
        for name in [*self.model_order, *self.observed]:
            observed = {"x": frames, "y": label}.get(name)
            self._sample(name, self.p[name], values, plates, num_steps, mask, inputs, observed)

    def guide(self, frames, mask=None, *, inputs=None):
        num_sequences, num_steps = frames.shape[:2]
        values = {"frames": self._per_object(frames, mask)}
        plates = self._plates(num_sequences)
        for name in self.guide_order:
            self._sample(name, self.q[name], values, plates, num_steps, mask, inputs[:, :num_steps], None)

    def _per_object(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Return frames as (B, T, X), or (B, M, T, X), without padding."""
        if self.num_objects is None:
            return without_padding(frames, mask)
        return without_padding(frames.transpose(1, 2), None if mask is None else mask.unsqueeze(1))

    def _plates(self, num_sequences: int) -> list[Any]:
        plates = [pyro.plate("sequences", num_sequences, dim=-self.num_plates)]
        return plates if self.num_objects is None else [*plates, pyro.plate("objects", self.num_objects, dim=-1)]

    @contextmanager
    def _in_plates(self, name: str, plates: list[Any]) -> Iterator[None]:
        with ExitStack() as stack:
            if self.scale != 1:
                stack.enter_context(poutine.scale(scale=self.scale))
            if name != "g":
                for plate in plates if self.objects[name] else plates[:1]:
                    stack.enter_context(plate)
                if self.keep is not None:
                    stack.enter_context(poutine.mask(mask=self._beside_objects(self.keep)))
            yield

    def _beside_objects(self, tensor: Tensor) -> Tensor:
        return tensor if self.num_objects is None else tensor.unsqueeze(1)

    def _sample(
        self, name: str, factor: Factor, values: dict[str, Tensor], plates: list[Any], num_steps: int,
        mask: Tensor | None, inputs: Tensor, observed: Tensor | None,
    ) -> None:  # fmt: skip
        mask = None if mask is None else self._beside_objects(mask)
        moving = factor.kind in TRAJECTORIES
        location = factor.bias
        for parent, matrix in factor.reads.items():
            value = values[parent]
            if parent == "frames" and self.num_objects is not None and not self.objects[name]:
                value = value.mean(1, keepdim=True)
            if parent == "frames" or self.is_trajectory(parent):
                value = without_padding(value, mask)  # a factorised one has noise there
                if name == "g":
                    value = value.sum(-2) / (num_steps if mask is None else mask.sum(-1, keepdim=True))
                    value = value.flatten(0, -2).mean(0)
                elif not moving:
                    value = value.sum(-2) / (num_steps if mask is None else mask.sum(-1, keepdim=True))
            elif moving:
                value = value.unsqueeze(-2)
            location = location + value @ matrix.T
        if name != "g":
            shape = tuple(plate.size for plate in plates)
            if self.num_objects is not None and not self.objects[name]:
                shape = (shape[0], 1)
            event = (num_steps, len(factor.bias)) if moving else (len(factor.bias),)
            batch = torch.broadcast_shapes(location.shape[: max(0, location.ndim - len(event))], shape)
            location = location.expand(*batch, *event)
        with self._in_plates(name, plates):
            distribution = self._distribution(factor, location, num_steps, mask, self._beside_objects(inputs))
            value = pyro.sample(name, distribution, obs=observed)
        values[name] = value

    def _distribution(
        self, factor: Factor, location: Tensor, num_steps: int, mask: Tensor | None, inputs: Tensor
    ) -> Any:
        conditional = functools.partial(conditional_of, factor)
        if factor.kind == "static":
            return conditional(location)
        if factor.kind == "factorised":
            step = conditional(location)
            return IndependentSteps(step, mask)
        if factor.kind == "recurrent":
            return self._recurrent(factor, conditional, location, num_steps, mask, inputs)

        def transition(z_prev: Tensor, read: Tensor) -> Any:
            known, read = read.split([len(factor.bias), NUM_INPUTS], -1)
            return conditional(torch.sin(z_prev @ factor.of_previous.T) + known + read @ factor.of_input.T)

        read = torch.cat([location, inputs.expand(*location.shape[:-1], -1)], -1)
        return MarkovChain(conditional(location[..., 0, :]), transition, num_steps, inputs=read, mask=mask)

    @staticmethod
    def _recurrent(
        factor: Factor, conditional: Any, location: Tensor, num_steps: int, mask: Tensor | None, inputs: Tensor
    ) -> RecurrentChain:
        def transition(z_prev: Tensor, read: Tensor) -> Any:
            state, known = read.split([STATE_SIZE, len(factor.bias)], -1)
            return conditional(torch.sin(z_prev @ factor.of_previous.T) + known + state @ factor.of_state.T)

        def feedback(z_prev: Tensor, h_prev: Tensor, t: int) -> Tensor:
            of_latent, of_state = factor.feedback
            return torch.sin(z_prev @ of_latent.T + h_prev @ of_state.T)

        read: Any = inputs if factor.reads_input else None
        return RecurrentChain(
            conditional(location[..., 0, :] + factor.start @ factor.of_state.T), transition, num_steps,
            recurrence=factor.network, state=factor.start, inputs=read if factor.feedback is None else feedback,
            context=location, reads_latent=factor.reads_latent, mask=mask,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What hypothesis draws
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def factors(
    draw: st.DrawFn, tensors: Tensors, kind: str, family: str, size: int, parents: dict[str, int], *, of_guide: bool
) -> Factor:
    reads = {name: 0.5 * tensors.normal(size, width) for name, width in parents.items() if draw(st.booleans())}
    if of_guide and draw(st.booleans()):
        reads["frames"] = 0.5 * tensors.normal(size, NUM_FRAME_VALUES)
    factor = Factor(kind, family, tensors.normal(size), tensors.normal(size), reads)
    if kind in ("markov", "recurrent"):
        factor.of_previous = tensors.normal(size, size)
    if kind == "markov":
        factor.of_input = tensors.normal(size, NUM_INPUTS)
    if kind == "recurrent":
        reading = draw(st.sampled_from(("nothing", "inputs", "feedback")))
        factor.reads_latent = reading == "nothing" or draw(st.booleans())
        factor.reads_input = reading == "inputs"
        if reading == "feedback":
            factor.feedback = (tensors.normal(NUM_INPUTS, size), tensors.normal(NUM_INPUTS, STATE_SIZE))
        width = size * factor.reads_latent + NUM_INPUTS * (reading != "nothing")
        network, layers = draw(st.sampled_from((nn.GRU, nn.LSTM, nn.RNN))), draw(st.integers(1, 2))
        batch_first = draw(st.booleans())
        factor.network = tensors.build(lambda: network(width, STATE_SIZE, layers, batch_first=batch_first))
        factor.start, factor.of_state = tensors.normal(STATE_SIZE), tensors.normal(size, STATE_SIZE)
    return factor


@st.composite
def families(draw: st.DrawFn, kind: str, *, with_mean: bool) -> tuple[str, str, str, str]:
    """Draw kind and family of a site's q and p; both are trajectories or neither is, with the same support."""
    if kind == "static":
        positive = st.sampled_from(("gamma", "log-normal"))
        family = draw(st.sampled_from(("normal", "positive")))
        q, p = (draw(positive) if family == "positive" else family for _ in range(2))
        return kind, q, kind, p
    if not with_mean and draw(st.integers(0, 3)) == 0:
        return "markov", "log-normal", "markov", "log-normal"
    return draw(st.sampled_from(TRAJECTORIES)), "normal", draw(st.sampled_from(TRAJECTORIES)), "normal"


@st.composite
def random_programs(draw: st.DrawFn, *, for_interventions: bool = False, largest: int = 4) -> RandomProgram:
    tensors = Tensors(draw(seeds()))
    lengths = draw(st.lists(num_steps(largest), min_size=1, max_size=3))
    num_objects = draw(st.none() | st.integers(1, 2))
    ragged = draw(st.booleans())
    if not ragged:
        lengths = [max(lengths)] * len(lengths)
    mask = mask_of(lengths, draw(st.integers(0, 1))) if ragged else None
    total = max(lengths) if mask is None else mask.shape[1]

    latents = [f"z{i}" for i in range(draw(st.integers(1, 3)))]
    if draw(st.integers(0, 2)) == 0:
        latents.insert(draw(st.integers(0, len(latents))), "g")
    objects = {name: name != "g" and num_objects is not None and draw(st.booleans()) for name in latents}
    sizes = {name: draw(dimensions(2)) for name in latents}
    kinds = {}
    for name in latents:
        kind = "static" if name == "g" else draw(st.sampled_from(("static", "trajectory")))
        kinds[name] = draw(families(kind, with_mean=for_interventions))
    guide_order = draw(st.permutations(latents))

    def parents(name: str, order: list[str]) -> dict[str, int]:
        earlier = order[: order.index(name)] if name in order else order
        return {n: sizes[n] for n in earlier if name != "g" and (objects[name] or not objects[n])}

    p, q = {}, {}
    for name in latents:
        q_kind, q_family, p_kind, p_family = kinds[name]
        size = sizes[name]
        p[name] = draw(factors(tensors, p_kind, p_family, size, parents(name, latents), of_guide=False))
        q[name] = draw(factors(tensors, q_kind, q_family, size, parents(name, list(guide_order)), of_guide=True))
    observed = ["x", *(["y"] if draw(st.booleans()) else [])]
    for name in observed:  # x has every object's frames; y is a label of each sequence, or of each object
        objects[name] = num_objects is not None and (name == "x" or draw(st.booleans()))
        kind, family, size = ("factorised", "normal", NUM_FRAME_VALUES) if name == "x" else ("static", "bernoulli", 1)
        p[name] = draw(factors(tensors, kind, family, size, parents(name, latents), of_guide=False))

    batch = (len(lengths),) if num_objects is None else (len(lengths), num_objects)
    label_shape = (len(lengths),) if num_objects is None else (len(lengths), num_objects if objects.get("y") else 1)
    frames = tensors.normal(len(lengths), total, *batch[1:], NUM_FRAME_VALUES)
    label = (tensors.uniform(*label_shape, 1) < 0.5).to(torch.float64)
    inputs = tensors.normal(len(lengths), total + largest + 3, NUM_INPUTS)  # for donors and forecasts
    inputs[:, 0] = float("nan")  # those of the first step are never read
    program = RandomProgram(
        p, q, latents, list(guide_order), observed, objects, lengths, num_objects, mask, frames, label, inputs
    )
    if not for_interventions:
        program.scale = draw(st.sampled_from((1.0, 1.0, 0.5, 3.0)))
        if draw(st.integers(0, 2)) == 0:
            program.keep = tensors.uniform(len(lengths)) < 0.5
    return program
