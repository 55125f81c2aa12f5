"""The numbers of an evaluation as tables, in Markdown and HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqdisent.plotting._figures import make_axes, save_figure

Published = Mapping[str, Mapping[str, Mapping[str, float]]]
"""{what a column is called: {"consistency", "static" or "motion": {factor: per cent}}}."""

STYLE = """body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #bbb;padding:.2em .6em;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}"""


class Table(NamedTuple):
    """A title, the columns' names, and rows of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        rows = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        return f"## {self.title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def html(self) -> str:
        lines = [("th", self.header), *(("td", row) for row in self.rows)]
        body = "\n".join(
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>" for tag, cells in lines
        )
        return f"<h2>{html.escape(self.title)}</h2>\n<table>\n{body}\n</table>"


def page(title: str, tables: Sequence[Table], pictures: Mapping[str, str], note: str = "") -> str:
    """Return a page of HTML, with `pictures` {file: what is written above it}."""
    images = "".join(
        f"\n<h3>{html.escape(above)}</h3>\n<p><img src='{name}' alt='{name}'></p>" for name, above in pictures.items()
    )
    head = f"<!doctype html>\n<meta charset='utf-8'>\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>"
    body = "\n".join(table.html() for table in tables)
    above = f"<h1>{html.escape(title)}</h1>\n" + (f"<p>{html.escape(note)}</p>\n" if note else "")
    return f"{head}\n{above}{body}\n<h2>Pictures</h2>{images}\n"


def plain(measured: Any) -> Any:
    """Return tensors as numbers and lists, for JSON; what no pair of clips can show is None, not NaN."""
    if isinstance(measured, Tensor):
        return plain(measured.tolist())
    if isinstance(measured, float) and not math.isfinite(measured):
        return None
    if isinstance(measured, Mapping):
        return {name: plain(value) for name, value in measured.items()}
    return [plain(value) for value in measured] if isinstance(measured, list) else measured


def tables_of(numbers: Mapping[str, Any], beside: Published, roles: Mapping[str, str]) -> list[Table]:
    """Return the tables of what was measured; `roles` say which latent is static and which is motion."""
    errors = numbers["mean_squared_error"]
    one = "clip" if "held_out_clips" in numbers else "sequence"
    terms = [[name, _number(value, 1)] for name, value in numbers["nats"].items()]
    if "bound_per_step" in numbers:
        terms.append(["bound, for each measured step", _number(numbers["bound_per_step"])])
    units = ", in units before scaling" if numbers.get("units", {}).get("errors") == "before scaling" else ""
    tables = [
        Table(
            f"Errors on {numbers[f'held_out_{one}s']} held-out {one}s{units}",
            [f"{one}s", "mean squared error", "over that of reconstruction"],
            [
                [
                    name,
                    _number(value, 5) if one == "clip" else _short(value),
                    _number(numbers.get(f"{name} / reconstruction")),
                ]
                for name, value in errors.items()
            ],
        ),
        Table("Terms of the bound", ["term", f"nats a {one}"], terms),
    ]
    if found := numbers.get("imputation"):
        tables.append(_of_draws(f"Imputation of {found['hidden_values']} hidden values{units}", found))
    if found := numbers.get("forecast"):
        title = f"Forecast of the last {found['num_steps']} steps of {found['sequences']} sequences{units}"
        tables.append(_of_draws(title, found))
    tables += _coordinates(numbers, units)
    if found := numbers.get("swapped_labels"):
        tables += _swapped_labels(found)
    if retrieval := numbers.get("nearest_true_clip"):
        rows = [[name, _per_cent(value)] for name, value in retrieval.items() if name != "of"]
        tables.append(Table(f"Nearest of {retrieval['of']} true clips to a swap", ["has the right", "%"], rows))
    if "judge" in numbers:
        tables += _judged(numbers, beside)
    for kind, latents in numbers.get("probes", {}).items():
        tables.append(_probes(kind, latents, beside, roles))
    return tables


def _of_draws(title: str, found: Mapping[str, Any]) -> Table:
    """Return scores of draws and, for guesses without draws, of these alone."""
    scores = {name: of for name, of in found.items() if isinstance(of, Mapping)}
    levels = scores["model"]["expected"]
    header = ["values from", "mean squared error", "CRPS"]
    header += [f"within the {level} % interval, % (calibrated: {_per_cent(of)})" for level, of in levels.items()]
    header += [f"width of the {level} % interval" for level in levels]
    rows = [
        [name, _short(of["mean_squared_error"]), _short(of["crps"])]
        + [_per_cent(of.get("coverage", {}).get(level)) for level in levels]
        + [_short(of.get("width", {}).get(level)) for level in levels]
        for name, of in scores.items()
    ]
    return Table(title, header, rows)


def _coordinates(numbers: Mapping[str, Any], units: str) -> list[Table]:
    """Return the model's scores of each coordinate, unless these are too many to read."""
    scores = {
        kind: numbers[kind]["model"].get("coordinates", {}) for kind in ("imputation", "forecast") if kind in numbers
    }
    names = list(dict.fromkeys(name for of in scores.values() for name in of))
    if not names:
        return []
    header, rows = ["coordinate"], [[name] for name in names]
    for kind, of in scores.items():
        header += [f"{kind}: mean squared error", f"{kind}: CRPS", f"{kind}: within the 90 % interval, %"]
        for row in rows:
            found = of.get(row[0], {})  # nothing of it was scored
            row += ["" if key not in found else f"{found[key]:.4g}" for key in ("mean_squared_error", "crps")]
            row.append(_per_cent(found.get("coverage", {}).get("90")))
    return [Table(f"The model's scores of each coordinate{units}", header, rows)]


def _swapped_labels(found: Mapping[str, Any]) -> list[Table]:
    known = [[name, *map(_per_cent, of.values())] for name, of in found["known"].items()]
    tables = [Table("Labels told from mean and standard deviation", ["factor", "real, %", "reconstructed, %"], known)]
    for direction, scores in found.items():
        if direction != "known" and scores:
            rows = [[name, _per_cent(of["donor"]), _per_cent(of["source"])] for name, of in scores.items()]
            tables.append(
                Table(f"Swap: {direction} from the donor", ["factor", "the donor's, %", "the source's, %"], rows)
            )
    return tables


def _judged(numbers: Mapping[str, Any], beside: Published) -> list[Table]:
    tables = [_consistency(numbers, beside)]
    for direction, scores in numbers["swaps"].items():
        header = ["factor", "should be", "accuracy, %", "constant guess, %", "leakage, %", "constant guess, %"]
        keys = ("accuracy", "chance", "leakage", "leakage_chance")
        rows = [
            [name, "the donor's" if score["follows"] else "the source's", *(_per_cent(score[key]) for key in keys)]
            for name, score in scores.items()
        ]
        tables.append(Table(f"Swap: {direction} from the donor", header, rows))
    if numbers["intervention_score"] is not None:
        rows = [["all factors, both swaps", _number(numbers["intervention_score"], 4)]]
        tables.append(Table("Intervention score", ["of", "score"], rows))
    rows = [
        [kind, name, *(_number(score[key]) for key in ("inter", "intra", "inception_score"))]
        for kind, scores in numbers["entropies"].items()
        for name, score in scores.items()
    ]
    header = ["clips", "factor", "inter-entropy H(y)", "intra-entropy H(y given x)", "inception score"]
    tables.append(Table("Entropies of the judge's predictions, nats", header, rows))
    extractor = next(iter(numbers["frechet"].values()))["extractor"]
    rows = [[name, _number(score["distance"])] for name, score in numbers["frechet"].items()]
    header = ["clips, against as many real training clips", "distance"]
    tables.append(Table(f"Frechet distance in {extractor}", header, rows))
    return [*tables, *_generated(numbers)]


def _generated(numbers: Mapping[str, Any]) -> list[Table]:
    tables = []
    if found := numbers.get("neighbours"):
        keys = ("precision", "recall", "density", "coverage", "expected_coverage")
        rows = [[name, *(_number(of[key]) for key in keys)] for name, of in found.items()]
        tables.append(
            Table(
                "Clips against real held-out clips, by neighbours in the judge's features",
                ["clips", *(key.replace("_", " ") for key in keys)],
                rows,
            )
        )
    if found := numbers.get("memorisation"):
        rows = [[name, _number(of["median"]), _per_cent(of["share_nearer"])] for name, of in found.items()]
        rows.append(["real held-out clips", _number(found["prior"]["held_out_median"]), _per_cent(0.5)])
        header = ["clips", "distance to the nearest training clip, median", "nearer than the held-out median, %"]
        tables.append(Table("Memorising", header, rows))
    if found := numbers.get("confidence"):
        rows = [[name, *map(_per_cent, of.values())] for name, of in found.items()]
        tables.append(Table("Confidence of the judge, %", ["factor", *next(iter(found.values()))], rows))
    if found := numbers.get("combinations"):
        rows = [
            ["new, of clips from the prior", _per_cent(found["new"]), _per_cent(found["new_if_independent"])],
            [f"of {found['num_held_out']} held out, drawn", _per_cent(found["covered"])]
            + [_per_cent(found["covered_if_independent"])],
        ]
        header = ["combinations of static factors", "%", "if factors were drawn independently, %"]
        tables.append(Table("New combinations", header, rows))
    if found := numbers.get("sampled_swaps"):
        rows = [
            [name, "kept" if of["kept"] else "drawn", _per_cent(of["accuracy"]), _per_cent(of["independent"])]
            + [_number(of["entropies"][key]) for key in ("inception_score", "intra", "inter")]
            for name, of in found.items()
        ]
        header = [
            "factor",
            "expected",
            "agrees with the clip, %",
            "if drawn independently, %",
            "inception score",
            "H(y given x)",
            "H(y)",
        ]
        tables.append(Table("Motion kept, identity drawn from the prior", header, rows))
    return tables


def _consistency(numbers: Mapping[str, Any], beside: Published) -> Table:
    found = dict(numbers["consistency"])
    columns = {name: of["consistency"] for name, of in beside.items() if "consistency" in of}
    for column in columns.values():  # an average is over the same factors
        if shared := [found[name] for name in column if name in found and name != "average"]:
            found["average"] = sum(shared) / len(shared)
    header = ["factor", "judge on real held-out clips, %", "same answer for clip and reconstruction, %", *columns]
    rows = [
        [name, _per_cent(numbers["judge"].get(name)), _per_cent(value)]
        + [_number(column.get(name), 2) for column in columns.values()]
        for name, value in found.items()
    ]
    return Table("Judge and accuracy consistency", header, rows)


def _probes(kind: str, latents: Mapping[str, Any], beside: Published, roles: Mapping[str, str]) -> Table:
    header, rows = ["factor"], {name: [name] for name in next(iter(latents.values()))}
    firsts = {role: latent for latent, role in reversed(list(roles.items()))}
    for latent, scores in latents.items():
        role = roles[latent]
        columns = {name: of[role] for name, of in beside.items() if role in of and firsts[role] == latent}
        header += [f"from {latent}, %", *columns]
        for name, score in scores.items():
            rows[name].append(_per_cent(score["accuracy"]) + ("" if score["converged"] else " (not converged)"))
            rows[name] += [_number(column.get(name), 2) for column in columns.values()]
    for name, score in next(iter(latents.values())).items():
        rows[name].append(_per_cent(score["chance"]))
    return Table(f"Probes, {kind}", [*header, "constant guess, %"], list(rows.values()))


def _per_cent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    """Return a number in a unit that may be of any size."""
    return "" if value is None else f"{value:.4g}"


def draw_confusion(matrices: Mapping[str, Any], labels: Mapping[str, Sequence[str]], path: Path) -> Path:
    """Draw what the judge says of clips with another's identity, factor by factor."""
    from sklearn.metrics import ConfusionMatrixDisplay

    figure, axes = make_axes(len(matrices), width=4.0, height=4.0)
    for axis, (name, counts) in zip(axes, matrices.items(), strict=True):
        display = ConfusionMatrixDisplay(torch.tensor(counts).numpy(), display_labels=labels[name])
        display.plot(ax=axis, colorbar=False, xticks_rotation=90, text_kw={"fontsize": 7})
        axis.set(title=name, xlabel="judged", ylabel="should be")
    figure.suptitle("Identity from the donor")
    return save_figure(figure, path)
