"""The bound on validation pieces while models of music train, from the logs of their runs, as one picture.

    python benchmarks/validation_curves.py RUN RUN ... --out validation.png

Nats per step, of runs of `examples/dmm.py`, `vrnn.py` or `srnn.py`; each is named by its folder.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure


def curve(run: Path) -> tuple[list[int], list[float]]:
    """Return the steps at which a run was validated, and minus the bound per step."""
    found = {}
    for log in sorted(run.glob("training/logs/*/metrics.csv")):
        with log.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("validation/elbo"):
                    kl, likelihood = (float(row[f"validation/per_step/{term}"]) for term in ("KL(z)", "log_p(x)"))
                    found[int(row["step"])] = kl - likelihood
    return list(found), list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("validation.png"))
    parser.add_argument("--highest", type=float, default=10.0, help="where the picture ends, in nats per step")
    arguments = parser.parse_args()
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for run in arguments.runs:
        steps, bounds = curve(run)
        (line,) = axis.plot(steps, bounds, label=f"{run.name}: {min(bounds):.2f}")
        best = min(zip(bounds, steps, strict=True))
        axis.plot(best[1], best[0], "o", color=line.get_color())
    axis.set(
        ylim=(None, arguments.highest), xlabel="training step", ylabel="minus the bound, nats per step",
        title="Validation pieces; a dot is the model that is kept",
    )  # fmt: skip
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(arguments.out, dpi=100)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
