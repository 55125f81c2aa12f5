"""What the benchmarks share: timing in turns, the machine's matrix-product rate, models, tables and JSON."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# glibc returns large blocks to the system as soon as they are freed, and the next step pays for every page again
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}


def arguments_of(description: str | None, **sizes: int | str) -> argparse.Namespace:
    """Read the command line that every benchmark has, and the sizes of this one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    repeats = sizes.pop("repeats", 7)
    parser.add_argument("--repeats", type=int, default=repeats, help="how often each way is timed, in turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the figures to this JSON file")
    for name, default in sizes.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    return arguments


def time_in_turns(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each way; the ways take turns, so that what slows the machine slows all alike.

    With one thread, seconds of the processor: the time in which other work had the core does not count.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in ways.values():
        run()  # memory is allocated and code compiled before the clock runs
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], way: str, to: str) -> float:
    """Return how many times as long `way` took as `to`: the median over turns of the ratio within a turn."""
    return statistics.median(a / b for a, b in zip(seconds[way], seconds[to], strict=True))


def matrix_product(size: int = 1536) -> Callable[[], object]:
    """Return a float32 matrix product of 2 size^3 operations, to be timed in turns with what it is the measure of."""
    a, b = torch.randn(size, size), torch.randn(size, size)

    def run() -> torch.Tensor:
        return a @ b

    run.operations = 2 * size**3  # type: ignore[attr-defined]
    return run


class CountedWork(TorchDispatchMode):
    """Counts the calls of torch operators inside it, and the floating-point operations of products and convolutions.

    ``FlopCounterMode`` counts the latter by module, and its hooks fail on a module called without gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.operations = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.calls += 1
        if function._overloadpacket in flop_registry:
            self.operations += flop_registry[function._overloadpacket](*args, **kwargs, out_val=result)
        return result


def work_of(run: Callable[[], object]) -> CountedWork:
    """Return the work of one run, forward and backward."""
    with CountedWork() as work:
        run()
    return work


def report(name: str, arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a table, and write them as JSON if the command line asks for it."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [columns, *([_shown(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if arguments.out:
        about = {
            "benchmark": name,
            "arguments": {k: v for k, v in vars(arguments).items() if k != "out"},
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
        Path(arguments.out).write_text(json.dumps({**about, "rows": list(rows)}, indent=2))


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
