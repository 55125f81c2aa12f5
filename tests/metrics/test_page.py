"""The programs of docs/metrics.md, run as they stand on pendula in the place of sprites."""

import re
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import seqdisent.datasets
import seqdisent.metrics
from seqdisent.datasets import Clips, pendulum

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def pendula():
    """Forty-two real clips of 21 identities, each at both speeds, with a factor by the name that the page reads."""
    clips = pendulum(42, seed=0, num_steps=4, image_size=16)
    position = torch.arange(42)
    return Clips(
        clips.frames,
        identity=position // 14 * 7 + position % 7,
        labels={"colour": clips.labels["colour"], "motion": clips.labels["speed"]},
        static_factors=["colour"],
        motion_factors=["motion"],
    )


def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
    """Show colour s, the brighter the larger d and the step's z are."""
    num_sequences, num_steps = (num_sequences, num_steps) if frames is None else frames.shape[:2]
    with pyro.plate("sequences", num_sequences):
        s = pyro.sample("s", dist.Normal(torch.zeros(num_sequences, 3), 1.0).to_event(1))
        d = pyro.sample("d", dist.Normal(torch.zeros(num_sequences, 1), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(torch.zeros(num_sequences, num_steps, 1), 1.0).to_event(2))
        logits = ((s + d)[:, None] + z)[..., None, None].expand(-1, -1, -1, 16, 16)
        pyro.sample("x", dist.ContinuousBernoulli(logits=logits).to_event(4), obs=frames)


def guide(frames, mask=None):
    with pyro.plate("sequences", len(frames)):
        pyro.sample("s", dist.Normal(frames.mean((1, 3, 4)), 0.1).to_event(1))
        pyro.sample("d", dist.Normal(frames.std((1, 2, 3, 4)).unsqueeze(-1), 0.1).to_event(1))
        pyro.sample("z", dist.Normal(frames.mean((2, 3, 4)).unsqueeze(-1), 0.1).to_event(2))


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(seqdisent.datasets, "sprites", pendula)
    monkeypatch.setattr(
        seqdisent.metrics, "train_judge", partial(seqdisent.metrics.train_judge, num_steps=3, channels=(4, 4))
    )
    programs = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names = {"model": model, "guide": guide}
    exec(compile("\n".join(programs), PAGE.name, "exec"), names)
    assert [{name: score.follows for name, score in swap.items()} for swap in names["scores"]] == [
        {"colour": True, "motion": False},
        {"colour": False, "motion": True},
    ]
    said = capsys.readouterr().out
    assert "'colour': SwapScores(follows=True" in said
    for result in ("Neighbour", "Memorisation", "Generation", "Combination"):
        assert f"{result}Scores(" in said
    assert {name: score.kept for name, score in names["protocol"].items()} == {"colour": False, "motion": True}
    assert seqdisent.metrics.Judge.load("judge.pt").accuracy == names["judge"].accuracy
    probes = {site: {name: score.accuracy for name, score in row.items()} for site, row in names["probes"].items()}
    assert min(probes["s"]["who"], probes["z"]["word"]) > 0.95
    assert max(probes["s"]["word"], probes["z"]["who"]) < 0.7
    scores, coverage = zip(*names["table"].values(), strict=True)
    assert scores[0] < min(scores[1:])
    assert coverage[1] == 0  # a mean is no interval
    assert abs(coverage[0] - 0.882) < 0.03
    assert abs(coverage[2] - 0.882) < 0.06  # the baseline has 24 residuals a series
