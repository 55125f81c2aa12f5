"""Mutation testing of one module: mutmut's mutants and choice of tests, in forks of a session that collected once.

    pip install mutmut==3.8.1
    HYPOTHESIS_PROFILE=mutation mutmut run no_such_mutant     # writes mutants/, and which test runs what
    HYPOTHESIS_PROFILE=mutation python benchmarks/mutants.py schedules

`mutmut run` itself gives the same answers; it starts pytest anew for each mutant, which takes longer than most tests.
What is mutated and which tests are used stands in `pyproject.toml`. The first mutant does not exist: it must survive.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest


class Forks:
    """A pytest plugin that runs, instead of all tests once, the tests of each mutant in a process of its own."""

    def __init__(self, module: str, sample: int | None, seed: int, longest: float, children: int) -> None:
        stats = json.loads(Path("mutmut-stats.json").read_text())
        self.tests_of, self.seconds = stats["tests_by_mangled_function_name"], stats["duration_by_test"]
        known = json.loads(Path(f"seqdisent/{module}.py.meta").read_text())["exit_code_by_key"]
        self.mutants = list(known)
        if sample is not None:
            self.mutants = random.Random(seed).sample(self.mutants, min(sample, len(known)))  # noqa: S311
        self.mutants.insert(0, self.mutants[0].rpartition("_")[0] + "_none")
        self.longest, self.children = longest, children
        self.killers: dict[str, Counter[str]] = defaultdict(
            Counter
        )  # what killed one mutant of a function is tried first
        self.found: dict[str, str] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        running: dict[int, tuple[str, Path]] = {}
        for number, mutant in enumerate(self.mutants):
            function = mutant.rpartition("__mutmut_")[0]
            names = [name for name in self.tests_of.get(function, []) if name in items]
            names = [name for name in names if self.seconds.get(name, 0.0) < self.longest]
            names.sort(key=lambda name: (-self.killers[function][name], self.seconds.get(name, 0.0)))  # noqa: B023
            if len(running) == self.children:
                self._wait(running)
            said = Path(f"killer-{number}")
            process = os.fork()
            if process == 0:
                self._try(session, [items[name] for name in names], mutant, said)
            running[process] = (mutant, said)
        while running:
            self._wait(running)
        return True

    def _try(self, session: pytest.Session, items: list[pytest.Item], mutant: str, said: Path) -> None:
        os.environ["MUTANT_UNDER_TEST"] = mutant
        budget = 30 + int(10 * sum(self.seconds.get(item.nodeid, 1.0) for item in items))
        resource.setrlimit(resource.RLIMIT_CPU, (budget, budget + 1))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        for item in items:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if session.testsfailed:
                said.write_text(item.nodeid)
                os._exit(1)
        os._exit(0 if items else 2)

    def _wait(self, running: dict[int, tuple[str, Path]]) -> None:
        process, status = os.wait()
        mutant, said = running.pop(process)
        if os.WIFSIGNALED(status):
            self.found[mutant] = "out of time"
        else:
            self.found[mutant] = ("survived", "killed", "no test")[os.WEXITSTATUS(status)]
        if said.exists():
            self.killers[mutant.rpartition("__mutmut_")[0]][said.read_text()] += 1
            said.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="distributions, elbo, experts or schedules")
    parser.add_argument("--sample", type=int, help="how many mutants, drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=float("inf"), help="leave out tests that took more seconds")
    parser.add_argument("--children", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tests", nargs="+", help="the test files; those of pyproject.toml by default")
    options = parser.parse_args()
    os.chdir("mutants")
    sys.path.insert(0, os.getcwd())
    os.environ["PYTHONPATH"] = os.getcwd()  # for tests that start processes of their own
    forks = Forks(options.module, options.sample, options.seed, options.longest, options.children)
    tests = options.tests or sorted({name.partition("::")[0] for name in forks.seconds})
    quiet = ["-o", "addopts=--import-mode=importlib", "-p", "no:terminal", "-p", "no:cacheprovider"]
    pytest.main([*quiet, *tests], plugins=[forks])
    none = forks.mutants[0]
    if forks.found.pop(none, None) != "survived":
        raise SystemExit("the code fails its tests without a mutant")
    for mutant, what in sorted(forks.found.items()):
        if what != "killed":
            print(f"{what}: mutmut show {mutant}")
    print(options.module, dict(Counter(forks.found.values())), "of", len(forks.found))


if __name__ == "__main__":
    main()
