"""What a user's type checker sees: the package in use, with the types that results should have.

`test_typing.py` gives this file to mypy (strict) and, where it is installed, to pyright. It is checked and never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from typing_extensions import assert_type

from seqdisent import (
    AnnealingSchedule,
    Combiner,
    ConvDecoder,
    ConvEncoder,
    DecomposedELBO,
    ELBOTerms,
    GatedTransition,
    HiddenMarkovChain,
    HiddenMarkovEmission,
    IndependentSteps,
    MarkovChain,
    MixtureOfExperts,
    MixtureOfExpertsConvDecoder,
    NormalHead,
    RecurrentChain,
    Seq2SeqDynamicsEncoder,
    StaticEncoder,
    SwitchingChain,
    batch_sizes,
    elbo_terms,
    feedback,
    fill_padding,
    forecast,
    generate,
    infer,
    load,
    overwrite_padding,
    read_backward,
    reconstruct,
    shift_steps,
    swap,
)
from seqdisent.chains import Chain, ChainState, Conditionals, Draw
from seqdisent.datasets import (
    Batch,
    Clips,
    MovingMNISTRenderer,
    PendulumRenderer,
    Renderer,
    SpriteRenderer,
    jsb_chorales,
    load_clips,
    load_frames,
    moving_mnist,
    mug,
    pendulum,
    polyphonic_music,
    render_pendulum,
    sprites,
)
from seqdisent.evaluation import Evaluation, evaluate
from seqdisent.inference import Inferred, Term
from seqdisent.metrics import (
    CRPS,
    AccuracyConsistency,
    CombinationScores,
    ConsistencyScores,
    CoverageScores,
    EnergyScore,
    EntropyScores,
    FrechetDistance,
    FrechetScore,
    GenerationEntropies,
    GenerationScores,
    IntervalCoverage,
    Judge,
    MemorisationScores,
    NeighbourScores,
    ProbeScores,
    QuantileLoss,
    QuantileScores,
    SampledSwapScores,
    SwapAccuracy,
    SwapScores,
    combination_scores,
    generation_scores,
    intervention_score,
    linear_interpolation,
    memorisation_scores,
    nearest_clip,
    neighbour_scores,
    pick_donors,
    probe,
    probe_table,
    released_protocol_consistency,
    sampled_swap_accuracy,
    seasonal_naive,
    seasonal_naive_draws,
    squared_error,
    train_judge,
)
from seqdisent.plotting import (
    film_strip,
    plot_error_over_time,
    plot_heatmap,
    plot_ledger,
    plot_schedules,
    save_gif,
    save_png,
    swap_table,
)
from seqdisent.training import (
    TERMINATED,
    CheckpointError,
    ELBOTraining,
    TrainerOptions,
    fit,
    frames_and_mask,
    is_main_process,
    load_weights,
    save_weights,
    train_stages,
)
from seqdisent.zoo import ZooModel


def model(
    frames: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    num_sequences: int | None = None,
    num_steps: int | None = None,
) -> None: ...


def guide(frames: Tensor, mask: Tensor | None = None) -> None: ...


def halve(channels: int) -> nn.Module:
    return nn.AvgPool2d(2, ceil_mode=True)


def blocks(frames: Tensor, mask: Tensor, weights: Tensor) -> None:
    assert_type(ConvEncoder(8, image_size=16, channels=(4, 8), downsample=halve).forward(frames), Tensor)
    ConvEncoder(8).calibrate(frames)
    posterior: TorchDistribution = StaticEncoder(8, 4).forward(frames, mask)
    dynamics = Seq2SeqDynamicsEncoder(8, 4, hidden_dim=8, num_layers=1)
    d: Tensor = dynamics.forward(frames, mask).rsample()
    assert_type(dynamics.unroll(d, 9), Tensor)
    head: TorchDistribution = NormalHead(8, 4, initial_scale=0.1).forward(frames)
    bank = MixtureOfExpertsConvDecoder(5, 3, image_size=16, channels=[8, 4])
    assert_type(bank.forward(frames, weights), Tensor)
    assert_type(ConvDecoder(5, image_size=16, channels=[8, 4]).forward(frames), Tensor)
    blended: Tensor = MixtureOfExperts(lambda: nn.Linear(3, 2), 4).forward(frames, weights)
    hidden, cell = MixtureOfExperts(lambda: nn.LSTMCell(3, 2), 4).forward((frames, (d, d)), weights)
    assert_type(overwrite_padding(frames, mask, event_dims=3), Tensor)
    assert_type(fill_padding(frames, mask, event_dims=3), Tensor)
    assert_type(batch_sizes(frames, None, None), tuple[int, int])
    assert_type(read_backward(nn.GRU(3, 5), frames, mask), Tensor)
    print(posterior, head, blended, hidden, cell)


def chains(start: TorchDistribution, inputs: Tensor, mask: Tensor) -> None:
    transition, combiner = GatedTransition(3, 8, context_dim=2), Combiner(3, 8, context_dim=2)
    chain = MarkovChain(start, transition, 5, inputs=inputs, mask=mask)
    path = chain.rsample()
    assert_type(path, Tensor)
    assert_type(chain.log_prob_per_step(path), Tensor)
    assert_type(chain.conditionals(path), Conditionals)
    assert_type(chain.extend(path, 2, sample=False), Tensor)
    assert_type(chain.rsample_with_conditionals(), Draw)
    _, state = chain.step()
    assert_type(state, ChainState)
    emission = IndependentSteps(start, mask)
    assert_type(emission.log_prob_per_step(path), Tensor)
    projected = combiner.project(shift_steps(inputs), mask)
    MarkovChain(start, combiner.step, 5, inputs=projected)

    def step(z_prev: Tensor, read: Tensor) -> TorchDistribution:
        return NormalHead(8, 3).forward(read)

    classes = HiddenMarkovChain(inputs, inputs, 5, mask=mask)
    assert_type(classes.filter(inputs).log_evidence, Tensor)
    assert_type(classes.smooth(inputs).pair_probs, Tensor)
    assert_type(classes.posterior(inputs), HiddenMarkovChain)
    assert_type(classes.viterbi(inputs), Tensor)
    assert_type(HiddenMarkovEmission(classes, start, mask).log_prob_per_step(path), Tensor)
    switching = SwitchingChain(start, transition, 5, initial_logits=inputs, transition_logits=lambda z_prev: z_prev)
    assert_type(switching.regimes(path), HiddenMarkovChain)
    recurrent = RecurrentChain(start, step, 5, recurrence=nn.GRU(3, 8), context=inputs)
    own = feedback(lambda z_prev, hidden: z_prev + hidden, (inputs, mask))
    RecurrentChain(start, step, 5, recurrence=nn.GRU(6, 8), inputs=own)
    assert_type(recurrent.states(path), Tensor)
    for known in (chain, recurrent):
        as_chain: Chain = known
        assert_type(as_chain.mean_path(), Tensor)


def ledger(frames: Tensor, mask: Tensor) -> None:
    terms = elbo_terms(model, guide, frames, mask, kl="monte-carlo", num_particles=2)
    assert_type(terms, ELBOTerms)
    assert_type(terms.kl["z"], Tensor)
    assert_type(terms.kl_per_step["z"], Tensor)
    assert_type(terms.log_likelihood_per_step["x"], Tensor)
    assert_type(terms.terms["z"], Term)
    assert_type(terms.elbo(weights={"z": 0.4, "s": torch.ones(())}), Tensor)
    weights: dict[str, float] = {"z": 0.4}
    assert_type(terms.elbo(weights), Tensor)
    assert_type(terms.importance_weighted(), Tensor)
    terms.check_finite(3)
    loss: float = DecomposedELBO(weights={"z": 0.1}).loss(model, guide, frames)
    tighter = elbo_terms(model, guide, frames, mask, objective="dreg", num_particles=2, vectorize_particles=True)
    assert_type(tighter.bound(), Tensor)
    loss += DecomposedELBO(objective="stl").loss(model, guide, frames)
    print(loss)


def interventions(frames: Tensor, mask: Tensor) -> None:
    inferred = infer(guide, frames, mask)
    assert_type(inferred, dict[str, Inferred])
    assert_type(inferred["z"].value, Tensor)
    pictures: dict[str, TorchDistribution] = reconstruct(model, guide, frames, mask)
    pictures |= swap(model, guide, frames, (frames, mask), sites=["z"], keep=["s"])
    pictures |= generate(model, num_sequences=2, num_steps=9, given={"z": frames}, emissions=["x"])
    pictures |= forecast(model, guide, frames, num_steps=5, sample=False)
    pictures |= forecast(model, guide, frames, mask, None, frames, num_steps=5, future={"covariates": frames})


def schedules() -> AnnealingSchedule:
    start = AnnealingSchedule.constant(0.1, num_steps=10)
    others = [
        AnnealingSchedule.linear(0, 1, 10),
        AnnealingSchedule.cosine(30.0, 1.0, 10),
        AnnealingSchedule.geometric(30.0, 1.0, 10),
        AnnealingSchedule.quadratic([(0, 30.0), (50, 0.2)]),
        AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=10),
    ]
    assert_type(start(3), float)
    return start.then(others[0]).clamp(0.2, 0.8)


def data(folder: Path) -> Clips:
    clips = pendulum(14, seed=0)
    train, held_out = clips.split(0.1, 0, by="identity")
    batch = train.batch(range(4))
    assert_type(batch, Batch)
    assert_type(batch.labels["colour"], Tensor)
    generator = torch.Generator()
    for drawn in (train.draw_clips(4, generator), train.draw_groups(4, 8, generator), train.draw_pairs(4, generator)):
        assert_type(drawn.frames, Tensor)
    assert_type(held_out.true_swap(0, 1), Tensor)
    more = [sprites(), moving_mnist(seed=1), mug(folder), jsb_chorales(split="test"), load_clips(folder)]
    more.append(polyphonic_music("musedata", split="test"))
    frames = load_frames(folder, channels=3)
    pixels = render_pendulum(torch.zeros(2), torch.ones(3))
    own: Renderer = SpriteRenderer(frames)
    for renderer in (own, clips.renderer):
        if isinstance(renderer, PendulumRenderer | MovingMNISTRenderer):
            print(renderer(torch.zeros(1), torch.zeros(1)))
    print(Clips(pixels, renderer=own, labels={"who": torch.zeros(2)}), more)
    return clips


def training(network: nn.Module, clips: Clips, folder: Path) -> None:
    def objective(terms: ELBOTerms, weights: Mapping[str, float]) -> Tensor:
        return terms.elbo(weights)

    module = ELBOTraining(
        network,
        model,
        guide,
        lambda generator: clips.draw_clips(4, generator),
        num_steps=10,
        learning_rate=schedules(),
        weights={"z": schedules(), "s": lambda step: 0.5},
        arguments=frames_and_mask,
        optimizer=partial(torch.optim.AdamW, weight_decay=0.01),
        objective=objective,
        validation=[clips.batch([0, 1, 2]), clips.batch([3])],
        logged={"scale": lambda network: network.scale},
    )
    options: TrainerOptions = {"precision": "bf16-mixed", "devices": 1}
    fit(module, folder, resume=True, clip_norm=1.0, validate_every=5, patience=3, averaging=0.999, **options)
    try:
        load_weights(network, folder / "best.ckpt")
    except CheckpointError as error:
        print(error, TERMINATED)
    save_weights(network, folder / "model.pt")
    stages = {"first": lambda: module, "skipped": lambda: None}
    assert_type(train_stages(network, stages, folder, resume=True, clip_norm=1.0), dict[str, ELBOTraining])
    assert_type(is_main_process(), bool)


def measures(train: Clips, held_out: Clips, frames: Tensor, latents: Tensor, labels: Tensor) -> None:
    judge = train_judge(train, held_out)
    assert_type(judge, Judge)
    assert_type(judge.accuracy, dict[str, float])
    said = judge.forward(frames)
    donors = pick_donors(held_out.identity, held_out.labels["speed"], seed=0)
    assert_type(squared_error(frames, frames[donors]), Tensor)
    assert_type(nearest_clip(frames, frames), Tensor)

    swaps = SwapAccuracy(judge.num_classes, ["speed"])
    swaps.update(said, held_out.labels, held_out.labels)
    scores: dict[str, SwapScores] = swaps.compute()
    assert_type(intervention_score([scores]), Tensor)

    consistency = AccuracyConsistency(judge.num_classes)
    consistency.update(said, said)
    agreement: ConsistencyScores = consistency.compute()
    agreement = released_protocol_consistency(held_out, frames, seed=0)

    entropies = GenerationEntropies(judge.num_classes)
    entropies.update(said)
    diversity: dict[str, EntropyScores] = entropies.compute()

    frechet = FrechetDistance(judge.features, judge.num_features, "the judge")
    frechet.update(frames, real=True)
    distance: FrechetScore = frechet.compute()

    assert_type(neighbour_scores(latents, latents, num_neighbours=3), NeighbourScores)
    assert_type(memorisation_scores(frames, frames, frames), MemorisationScores)
    assert_type(combination_scores(said, held_out.labels, held_out.labels, judge.num_classes), CombinationScores)
    assert_type(generation_scores(said, said, judge.num_classes), dict[str, GenerationScores])

    assert_type(probe(latents, labels, latents, labels, kind="mlp"), ProbeScores)
    table = probe_table({"s": latents}, {"who": labels}, {"s": latents}, {"who": labels}, train_mask=labels > 0)
    assert_type(table["s"]["who"].accuracy, float)
    print(agreement, diversity, distance)


def forecasts(draws: Tensor, target: Tensor, mask: Tensor, observed: Tensor) -> None:
    crps, energy = CRPS(fair=False), EnergyScore(by_step=True)
    coverage, loss = IntervalCoverage([0.5]), QuantileLoss((0.1, 0.9))
    crps.update(draws, target)
    energy.update(draws, target, mask)
    coverage.update(draws, target, observed=observed)
    loss.update(draws, target, mask=mask, observed=observed)
    average: Tensor = crps.compute()
    covered: CoverageScores = coverage.compute()
    losses: QuantileScores = loss.compute()
    assert_type(covered.width, dict[float, Tensor])
    assert_type(losses.average, Tensor)
    assert_type(seasonal_naive(target, 3, season=2, observed=observed), Tensor)
    assert_type(seasonal_naive_draws(target, 3, 2, 10, torch.Generator(), mask=mask), Tensor)
    assert_type(linear_interpolation(target, observed, mask, fill=1.0), Tensor)
    print(average, energy.compute())


def protocol(judge: Judge, held_out: Clips) -> dict[str, SampledSwapScores]:
    scores = sampled_swap_accuracy(model, guide, judge, held_out, keep=("d", "z"), factors=["speed"], seed=1)
    assert_type(scores["speed"].entropies, EntropyScores)
    return scores


def evaluation(model: nn.Module, guide: Callable[..., None], train: Clips, folder: Path) -> dict[str, object]:
    found = evaluate(model, guide, train, train, static=["s"], motion=("d", "z"), judge=None, folder=folder, seed=1)
    assert_type(found, Evaluation)
    assert_type(found.tables(beside={"A paper": {"consistency": {"hair": 99.0}}}), str)
    assert_type(found.save(folder, title="mine"), list[Path])
    return found.numbers


def trained(clips: Tensor, folder: Path) -> Tensor:
    found = load("vdsm-pendulum", source=folder)
    assert_type(found, ZooModel)
    assert_type(found.static, tuple[str, ...])
    return swap(found.model, found.guide, clips[:1], clips[1:], sites=found.motion)["x"].mean


def pictures(clips: Tensor, folder: Path) -> list[Path]:
    table = swap_table(clips, clips, clips[None])
    fade: Callable[[float], float] = lambda step: 0.9**step  # noqa: E731
    return [
        save_png(film_strip(clips, gap=1, mask=clips > 0), folder / "strip.png", scale=2),
        save_gif(table, str(folder / "table.gif"), frames_per_second=4),
        plot_schedules({"z": schedules(), "fade": fade}, 100, folder / "schedules.png"),
        plot_ledger([folder / "metrics.csv"], folder / "ledger.png"),
        plot_heatmap({"data": clips}, folder / "map.png", observed={"data": clips > 0}, limits=(0, 1), names=["a"]),
        plot_error_over_time({"model": clips}, folder / "error.png", trained_on=16),
    ]


class OwnChain:
    """A chain needs no base class."""

    step_mask: Tensor | None = None

    def conditionals(self, path: Tensor) -> Conditionals:
        return Conditionals(dist.Normal(0.0, 1.0), None)

    def log_prob_per_step(self, path: Tensor) -> Tensor:
        return self.conditionals(path).log_prob_per_step(path)

    def mean_path(self) -> Tensor:
        return torch.zeros(1, 3)

    def extend(self, prefix: Tensor, num_steps: int, *, mask: Tensor | None = None, sample: bool = True) -> Tensor:
        return prefix


own_chain: Chain = OwnChain()
