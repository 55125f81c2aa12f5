"""What ledger and interventions must say of a random program: loops over sequences, objects and steps.

The programs are those of `random_programs.py`; what one conditional is stands in `reference.py`. Nothing here imports
the library.
"""

from __future__ import annotations

from typing import Any

import reference
import torch
from reference import Factor, Row
from torch import Tensor

Rows = dict[str, dict[tuple[int, int], Tensor]]  # {site: {(sequence, object): value}}, trajectories (T, D) unpadded


class ByHand:
    """A random program, one row at a time: an object's row is (b, m), a sequence's (b, 0), the global site's (0, 0)."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.num_objects = program.num_objects or 1

    def rows(self, name: str, num_sequences: int) -> list[tuple[int, int]]:
        if name == "g":
            return [(0, 0)]
        objects = self.num_objects if self.program.objects[name] else 1
        return [(b, m) for b in range(num_sequences) for m in range(objects)]

    def of_frames(self, frames: Tensor, lengths: list[int]) -> dict[tuple[int, int], Tensor]:
        """Take frames (B, T, X) or (B, T, M, X) apart."""
        frames = frames.unsqueeze(2) if frames.ndim == 3 else frames
        return {(b, m): frames[b, :n, m] for b, n in enumerate(lengths) for m in range(self.num_objects)}

    def of_values(self, values: dict[str, Tensor], lengths: list[int]) -> Rows:
        """Take a batch of latents (B, [M or 1,] ...) apart; trajectories lose their padding."""
        taken: Rows = {}
        for name, value in values.items():
            taken[name] = {}
            for b, m in self.rows(name, len(lengths)):
                row = value.flatten() if name == "g" else value[b] if self.program.num_objects is None else value[b, m]
                taken[name][b, m] = row[: lengths[b]] if self.program.is_trajectory(name) else row
        return taken

    def read(self, factor: Factor, name: str, row: tuple[int, int], rows: Rows, lengths: list[int]) -> Row:
        """Return what one row of a site reads."""
        b, m = row
        found: Row = {}
        for parent in factor.reads:
            if parent == "frames":
                seen = rows["frames"]
                if name == "g":  # the average of all sequences' averages
                    averages = [sum(frames) / len(frames) for frames in seen.values()]
                    found[parent] = sum(averages) / len(averages)
                elif self.program.objects[name]:
                    found[parent] = seen[b, m]
                else:
                    found[parent] = sum(seen[b, i] for i in range(self.num_objects)) / self.num_objects
            else:
                own = (0, 0) if parent == "g" else (b, m if self.program.objects[parent] else 0)
                found[parent] = rows[parent][own]
        return found

    def locations(self, factor: Factor, read: Row, b: int, length: int, path: Tensor) -> list[Tensor]:
        """Return the location of every step of a trajectory at a given path."""
        return reference.walk(factor, read, self.program.inputs[b], length, lambda t, _: path[t])[0]

    def ledger(self, values: dict[str, Tensor], *, analytic: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return {site: (B,) or ()} of all sites, and {trajectory: (B, T)}, at one particle's latent values."""
        program, lengths = self.program, self.program.lengths
        rows = self.of_values(values, lengths)
        rows["frames"] = self.of_frames(program.frames, lengths)
        terms: dict[str, Tensor] = {}
        per_step: dict[str, Tensor] = {}
        closed = self.closed_forms() if analytic else set()
        for name in [*program.model_order, *program.observed]:
            steps: dict[int, list[Tensor]] = {}
            for b, m in self.rows(name, len(lengths)):
                counted = program.scale * (1.0 if program.keep is None or name == "g" else float(program.keep[b]))
                row_steps = [counted * term for term in self._terms(name, (b, m), rows, name in closed)]
                steps[b] = row_steps if b not in steps else [x + y for x, y in zip(steps[b], row_steps, strict=True)]
            totals = [sum(steps[b]) for b in sorted(steps)]
            terms[name] = totals[0] if name == "g" else torch.stack(totals)
            if name in program.model_order and program.is_trajectory(name):
                per_step[name] = torch.zeros(len(lengths), program.frames.shape[1], dtype=torch.float64)
                for b, row in steps.items():
                    for t, term in enumerate(row):
                        per_step[name][b, t] = term.detach()
        return terms, per_step

    def _terms(self, name: str, row: tuple[int, int], rows: Rows, closed: bool) -> list[Tensor]:
        """Return the terms of one row's steps: log p of what is observed, or log q - log p, or KL(q || p)."""
        program, (b, m) = self.program, row
        p, length = program.p[name], program.lengths[b]
        read_by_p = self.read(p, name, row, rows, program.lengths)
        if name == "y":
            label = program.label[b] if program.num_objects is None else program.label[b, m]
            return [reference.log_density(p, reference.drive(p, read_by_p, None, length), label)]
        if name == "x":
            path = rows["frames"][row]
            at = self.locations(p, read_by_p, b, length, path)
            return [reference.log_density(p, location, frame) for location, frame in zip(at, path, strict=True)]
        q, value = program.q[name], rows[name][row]
        read_by_q = self.read(q, name, row, rows, program.lengths)
        if program.is_trajectory(name):
            q_at = self.locations(q, read_by_q, b, length, value)
            p_at = self.locations(p, read_by_p, b, length, value)
            steps = list(value)
        else:
            every = program.lengths if name == "g" else [length]
            q_at = [reference.drive(q, read_by_q, None, every[0])]
            p_at, steps = [reference.drive(p, read_by_p, None, every[0])], [value]
        if closed:
            return [reference.divergence(q, at_q, p, at_p) for at_q, at_p in zip(q_at, p_at, strict=True)]
        return [
            reference.log_density(q, at_q, step) - reference.log_density(p, at_p, step)
            for at_q, at_p, step in zip(q_at, p_at, steps, strict=True)
        ]

    def closed_forms(self) -> set[str]:
        """Return the sites whose term is a closed form: of one family, and drawn after all that p reads before it."""
        program, closed = self.program, set()
        for i, name in enumerate(program.model_order):
            before = program.guide_order[: program.guide_order.index(name)]
            flow = program.is_trajectory(name) and program.p[name].family == "log-normal"  # known by its draw alone
            same = program.p[name].family == program.q[name].family
            if same and not flow and set(program.model_order[:i]) <= set(before):
                closed.add(name)
        return closed

    # What interventions do, with means ------------------------------------------------------------------------------

    def means(self, factors: dict[str, Factor], order: list[str], lengths: list[int], rows: Rows, chosen: Rows) -> Rows:
        """Run a program with means; sites that are `chosen` keep their values, too short ones are continued."""
        rows = dict(rows)
        for name in order:
            factor, known, rows[name] = factors[name], chosen.get(name), {}
            for b, m in self.rows(name, len(lengths)):
                read = self.read(factor, name, (b, m), rows, lengths)
                if not self.program.is_trajectory(name):
                    location = reference.drive(factor, read, None, lengths[b])
                    rows[name][b, m] = reference.mean(factor, location) if known is None else known[b, m]
                    continue
                prefix = [] if known is None else known[b, m]

                def choose(t: int, location: Tensor, factor=factor, prefix=prefix) -> Tensor:
                    return prefix[t] if t < len(prefix) else reference.mean(factor, location)

                _, path = reference.walk(factor, read, self.program.inputs[b], lengths[b], choose)
                rows[name][b, m] = torch.stack(path)
        return rows

    def pictures(self, rows: Rows, lengths: list[int]) -> Rows:
        """Return the means of the emissions, given the latents."""
        found: Rows = {}
        for name in self.program.observed:
            factor, found[name] = self.program.p[name], {}
            for b, m in self.rows(name, len(lengths)):
                read = self.read(factor, name, (b, m), rows, lengths)
                steps = [None] if name == "y" else range(lengths[b])
                each = [reference.mean(factor, reference.drive(factor, read, t, lengths[b])) for t in steps]
                found[name][b, m] = each[0] if name == "y" else torch.stack(each)
        return found
