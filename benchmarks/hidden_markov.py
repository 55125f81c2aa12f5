"""The sums over all paths of a hidden Markov chain: a loop over time against a scan over matrix products.

    OMP_NUM_THREADS=1 python benchmarks/hidden_markov.py
    OMP_NUM_THREADS=1 python benchmarks/hidden_markov.py --steps 1000 --repeats 3

Forward and backward, as in training. The loop takes T steps of K^2 sums, the scan 2 log2(T) of T K^3 in all. Their
evidence is checked to be the same. `taken` is what the library chooses.
"""

from __future__ import annotations

from statistics import median

import torch
from measuring import arguments_of, ratio, report, time_in_turns

from seqdisent.chains.forward_sums import _LARGEST_SCAN, forward_sums


def main() -> None:
    arguments = arguments_of(__doc__, steps=100, classes="2,5,10,20", batch="1,16,64", repeats=3)
    rows = []
    for size in map(int, arguments.classes.split(",")):
        for batch in map(int, arguments.batch.split(",")):
            moves, log_likelihoods = torch.randn(1, size, size), torch.randn(batch, arguments.steps, size)
            first = torch.zeros(batch, size).log_softmax(-1)
            for value in (moves, log_likelihoods):
                value.requires_grad_()

            def run(scan, first=first, moves=moves, log_likelihoods=log_likelihoods):
                evidence = forward_sums(first, moves.log_softmax(-1), log_likelihoods, scan=scan).log_evidence
                evidence.sum().backward()
                return evidence.sum(-1)

            row = {"classes": size, "batch": batch}
            work = batch * size**3
            if work * arguments.steps > 1e8:  # several gigabytes
                rows.append({**row, "taken": "loop"})
                continue
            torch.testing.assert_close(run(True), run(False), rtol=1e-3, atol=1e-2)
            seconds = time_in_turns(
                {"loop": lambda run=run: run(False), "scan": lambda run=run: run(True)}, arguments.repeats
            )
            row |= {f"{way}, ms": 1e3 * median(each) for way, each in seconds.items()}
            row |= {"loop / scan": ratio(seconds, "loop", "scan")}
            rows.append({**row, "taken": "scan" if work <= _LARGEST_SCAN else "loop"})
    report("hidden_markov", arguments, rows)


if __name__ == "__main__":
    main()
