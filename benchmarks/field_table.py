"""The tables of `field.py`: what each run's metrics.json says, as mean and deviation over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqdisent import _files
from seqdisent.evaluation._report import Table, page

LAST = "Information and cost"  # of the tables
Measures = dict[str, dict[str, float]]  # {table: {row: value}}; a row that ends in "%" is in per cent


def measures(numbers: Mapping[str, Any], about: Mapping[str, Any]) -> Measures:
    """Return the rows of one run; what does not exist for it is left out."""
    errors = numbers["mean_squared_error"]
    found: Measures = {
        "Summary": summary(numbers, about),
        "Errors against the true clip": {
            "reconstruction": errors["reconstruction"],
            "identity swapped": errors.get("swapped"),
            "motion swapped": errors.get("motion_swapped"),
            **{
                f"{text}, times the reconstruction's": numbers.get(f"{key} / reconstruction")
                for key, text in (
                    ("swapped", "identity swapped"),
                    ("motion_swapped", "motion swapped"),
                    ("roll_out", "roll-out from the first step"),
                )
            },
            "mean step of the training clips": errors["mean_frame"],
        },
    }
    if retrieval := numbers.get("nearest_true_clip"):
        found[f"Nearest of {retrieval['of']} true clips to a swap of the identity"] = {
            f"has the right {name}, %": value for name, value in retrieval.items() if name != "of"
        }
    for direction, factors in numbers.get("swaps", {}).items():
        rows = found.setdefault(f"Swap: {direction} from the donor, as the judge sees it", {})
        for factor, score in factors.items():
            of = "the donor's" if score["follows"] else "the clip's own"
            rows[f"{factor}: {of}, %"] = score["accuracy"]
            rows[f"{factor}: leaks, %"] = score["leakage"]
    if numbers.get("intervention_score") is not None:
        found["Both swaps"] = {"intervention score": numbers["intervention_score"]}
    for factor, score in numbers.get("sampled_swaps", {}).items():
        rows = found.setdefault("The field's protocol: motion kept, identity drawn from the prior", {})
        if score["kept"]:
            rows[f"{factor}: kept, %"] = score["accuracy"]
            rows[f"{factor}: inception score"] = score["entropies"]["inception_score"]
            rows[f"{factor}: H(y given x)"] = score["entropies"]["intra"]
            rows[f"{factor}: H(y)"] = score["entropies"]["inter"]
        else:
            rows[f"{factor}: the clip's own all the same, %"] = score["accuracy"]
            rows[f"{factor}: ... if drawn independently, %"] = score["independent"]
    for title, of in probes(numbers, about):
        found[title] = {f"{factor}, %": score["accuracy"] for factor, score in of.items()}
    if frechet := numbers.get("frechet"):
        rows = found.setdefault("Clips from the prior", {})
        rows |= {f"Frechet distance, {name}": of["distance"] for name, of in frechet.items()}
        if prior := numbers.get("neighbours", {}).get("prior"):
            rows |= {name: prior[name] for name in ("precision", "recall", "density", "coverage")}
        rows["nearer to a training clip than half of the real ones are, %"] = numbers["memorisation"]["prior"][
            "share_nearer"
        ]
    kls = {name: value for name, value in numbers["nats"].items() if name.startswith("KL")}
    found[LAST] = {
        "steps, times the preset's": about["scale"],
        "parameters": about["parameters"],
        "KL of all latents, nats a clip": None if None in kls.values() else sum(kls.values()),
        **{f"{name}, nats a clip": value for name, value in kls.items()},
    }
    shown = {title: {row: value for row, value in rows.items() if value is not None} for title, rows in found.items()}
    return {title: rows for title, rows in shown.items() if rows}


def summary(numbers: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the rows that tell most, averages over factors among them."""
    return {
        "reconstruction, squared error": numbers["mean_squared_error"]["reconstruction"],
        "identity swapped, squared error": numbers["mean_squared_error"].get("swapped"),
        "motion swapped, squared error": numbers["mean_squared_error"].get("motion_swapped"),
        "identity swapped: the nearest true clip is the right one, %": numbers.get("nearest_true_clip", {}).get("clip"),
        **of_summary(numbers, "accuracy"),
        "intervention score": numbers.get("intervention_score"),
        "Frechet distance of clips from the prior": numbers.get("frechet", {}).get("prior", {}).get("distance"),
        "minutes of training on two cores": about["minutes"],
    }


def of_summary(numbers: Mapping[str, Any], score: str) -> dict[str, float]:
    """Return averages over the factors that follow or stay, of a score or of what a constant guess reaches."""
    swaps, protocol = numbers.get("swaps", {}), numbers.get("sampled_swaps", {})
    asked = {
        f"{direction} swapped: {side}, %": {
            name: of for name, of in swaps.get(direction, {}).items() if of["follows"] == follows
        }
        for direction, side, follows in (
            ("identity", "who follows", True),
            ("identity", "what stays", False),
            ("motion", "what follows", True),
            ("motion", "who stays", False),
        )
    }
    asked["motion kept, identity drawn: what stays, %"] = {name: of for name, of in protocol.items() if of["kept"]}
    return {row: statistics.mean(each[score] for each in basic(of).values()) for row, of in asked.items() if of}


def basic(factors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the factors without `motion`, where others say it already (Sprites: action and direction)."""
    said = {"action", "direction"} <= factors.keys()
    return {name: of for name, of in factors.items() if not (said and name == "motion")}


def chances(numbers: Mapping[str, Any], about: Mapping[str, Any]) -> Measures:
    """Return what the best constant guess reaches, which is the same for every model on the same clips."""
    found: Measures = {"Summary": of_summary(numbers, "chance")}
    if retrieval := numbers.get("nearest_true_clip"):
        found["Summary"]["identity swapped: the nearest true clip is the right one, %"] = 1 / retrieval["of"]
    for direction, factors in numbers.get("swaps", {}).items():
        rows = found.setdefault(f"Swap: {direction} from the donor, as the judge sees it", {})
        for factor, score in factors.items():
            of = "the donor's" if score["follows"] else "the clip's own"
            rows |= {f"{factor}: {of}, %": score["chance"], f"{factor}: leaks, %": score["leakage_chance"]}
    for factor, score in numbers.get("sampled_swaps", {}).items():
        if score["kept"]:
            title = "The field's protocol: motion kept, identity drawn from the prior"
            found.setdefault(title, {})[f"{factor}: kept, %"] = score["chance"]
    for title, of in probes(numbers, about):
        found[title] = {f"{factor}, %": score["chance"] for factor, score in of.items()}
    return found


def probes(numbers: Mapping[str, Any], about: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return each table's title and scores. VDSM's second site that says what, z, has tables of its own."""
    places = {
        site: f"{place} site that says {role}"
        for role, sites in (("who", about["static"]), ("what", about["motion"]))
        for place, site in zip(("first", "second", "third"), sites, strict=False)
    }
    return [
        (f"Probes of the {places[site]}, {kind}", of)
        for kind, latents in numbers.get("probes", {}).items()
        for site, of in latents.items()
        if site in places
    ]


def write_tables(folder: Path, names: Sequence[str], title: str) -> list[Path]:
    """Write field.md, field.json and field.html of all finished runs, those of `names` first."""
    runs: dict[str, dict[int, tuple[dict[str, Any], dict[str, Any], Path]]] = {}
    for path in sorted(folder.glob("*/*/about.json")):
        numbers, about = (json.loads((path.parent / name).read_text()) for name in ("metrics.json", "about.json"))
        runs.setdefault(about["model"], {})[about["seed"]] = numbers, about, path.parent
    models = [name for name in names if name in runs] + [name for name in runs if name not in names]
    of_runs = {name: [measures(numbers, about) for numbers, about, _ in runs[name].values()] for name in models}
    chance: Measures = {}
    for of in runs.values():
        for numbers, about, _ in of.values():
            for title_of_table, rows in chances(numbers, about).items():
                chance.setdefault(title_of_table, {}).update(rows)
    judge = folder / "judge.json"
    every = [run for of in of_runs.values() for run in of]  # one may have measures that another lacks
    titles = sorted(dict.fromkeys(table for run in every for table in run), key=lambda each: each == LAST)  # is stable
    tables, plain = [], {}
    for table in titles:
        header = ["", *models, *(["constant guess"] if table in chance else [])]
        lines = []
        for row in dict.fromkeys(row for run in every for row in run.get(table, {})):
            values = {
                name: [run[table][row] for run in of if row in run.get(table, {})] for name, of in of_runs.items()
            }
            cells = [spread(values[name], row) for name in models]
            if table in chance:
                cells.append(spread([chance[table][row]], row) if row in chance[table] else "")
            lines.append([row, *cells])
            plain.setdefault(table, {})[row] = {name: numbers_of(of, row) for name, of in values.items() if of}
        tables.append(Table(table, header, lines))
    seeds = ", ".join(f"{name}: {len(runs[name])}" for name in models)
    note = f"Mean and standard deviation over the seeds of training ({seeds})."
    abouts = {name: next(iter(runs[name].values()))[1] for name in models}
    sites = {name: {"who": of["static"], "what": of["motion"]} for name, of in abouts.items()}
    said = ", ".join(f"{name}: {'+'.join(of['who'])} | {'+'.join(of['what'])}" for name, of in sites.items())
    note += f" Sites that say who and what ({said})."
    if accuracy := json.loads(judge.read_text()) if judge.exists() else {}:
        right = ", ".join(f"{name} {100 * value:.1f}" for name, value in accuracy.items())
        note += f" The judge's own accuracy on the real clips, %: {right}."
        if weak := [name for name, value in accuracy.items() if value < 0.9]:
            note += f" Its rows on {', '.join(weak)}, and averages with them, say little: it cannot tell them itself."
    pictures = {
        str((path / "swaps.png").relative_to(folder)): f"{name}: each row a clip's identity, each column one's motion"
        for name in models
        for _, _, path in list(runs[name].values())[:1]
        if (path / "swaps.png").exists()
    }
    text = "\n\n".join([f"# {title}", note, *(table.markdown() for table in tables)]) + "\n"
    written = [folder / f"field.{ending}" for ending in ("md", "json", "html")]
    guess = {table: {row: factor_of(row) * value for row, value in rows.items()} for table, rows in chance.items()}
    judged = {name: 100 * value for name, value in accuracy.items()}
    found = {"title": title, "sites": sites, "judge, %": judged, "constant guess": guess, "tables": plain}
    for path, content in zip(
        written, (text, json.dumps(found, indent=2), page(title, tables, pictures, note)), strict=True
    ):
        _files.write(path, content.encode(), several_writers=True)
    return written


def deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def factor_of(row: str) -> int:
    """Return by what a measure is multiplied to be what its row's name says."""
    return 100 if row.endswith("%") else 1


def numbers_of(values: Sequence[float], row: str) -> dict[str, float | None]:
    """Return mean, deviation and how many, for field.json."""
    values = [factor_of(row) * value for value in values]
    return {"mean": statistics.mean(values), "deviation": deviation(values), "seeds": len(values)}


def spread(values: Sequence[float], row: str) -> str:
    """Return mean and deviation as text."""
    if not values:
        return ""
    factor, form = factor_of(row), ".1f" if row.endswith("%") else ".0f" if row == "parameters" else ".3g"
    mean, over = factor * statistics.mean(values), deviation(values)
    return f"{mean:{form}}" + ("" if over is None or row == "parameters" else f" ± {factor * over:{form}}")
