"""The programs that the documentation shows run as they stand; its pages and their links are what they say they are."""

import ast
import importlib.util
import re
import warnings
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import torch

from seqdisent import elbo_terms, forecast
from seqdisent.chains import Chain

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def run_page(page):
    """Run a page's python, from top to bottom, and return the names that it defines."""
    blocks = python_blocks(page)
    assert blocks
    names = {"__name__": page}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile("\n".join(blocks), page, "exec"), names)
    return names


def test_the_readme_runs():
    names = run_page("README.md")
    assert names["future"].shape == (4, 25, 8)
    assert names["swapped"].shape == (2, 6, 3, 64, 64)


def test_the_readme_begins_with_ten_lines():
    first = python_blocks("README.md")[0]
    statements = [node for node in ast.parse(first).body if not isinstance(node, ast.Import | ast.ImportFrom)]
    lines = [line for line in "\n".join(map(ast.unparse, statements)).splitlines() if line]
    assert len(lines) == 10
    assert read("README.md").index(first) < read("README.md").index("## ")


def test_the_landing_page_shows_the_same_ten_lines():
    assert python_blocks("docs/index.md") == python_blocks("README.md")[:2]


def test_a_model_of_ones_own_runs(capsys):
    names = run_page("docs/your_own_model.md")
    said = capsys.readouterr().out
    assert "torch.Size([4]) torch.Size([4]) torch.Size([4, 12])" in said
    assert "torch.Size([4, 12, 8]) torch.Size([2, 30, 8]) torch.Size([4, 17, 8])" in said
    for model in (names["StateSpace"](), names["Recurrent"]()):  # in any precision
        terms = elbo_terms(model.double().model, model.guide, names["frames"].double(), names["mask"])
        assert terms.elbo().dtype == torch.float64


def write_rooms(path):
    """Write a table of twelve rooms, with holes; return the day after the last row of each, (12, 24, 2)."""
    generator, lines, after = torch.Generator().manual_seed(0), ["room,time,celsius,humidity"], []
    noise = partial(torch.randn, generator=generator)
    for room in range(12):
        hours, level = torch.arange(24 * (6 + room % 3)), [torch.zeros(2)]
        for _ in hours[1:]:
            level.append(0.9 * level[-1] + torch.tensor([0.3, 0.8]) * noise(2))
        wave = (2 * torch.pi * hours / 24).sin()[:, None] * torch.tensor([3.0, -8.0])
        expected = torch.tensor([20.0, 50.0]) + wave + torch.stack(level)
        values = expected + torch.tensor([0.8, 2.0]) * noise(len(hours), 2)
        missing = torch.rand(len(hours), 3, generator=generator) < 0.05  # a row, or one of its values
        missing[-25, 0] = False  # the last row of the table
        for hour in range(len(hours) - 24):
            cells = ["" if missing[hour, 1 + column] else f"{values[hour, column]:.2f}" for column in range(2)]
            if not missing[hour, 0]:
                lines.append(f"room {room},{datetime(2024, 3, 1) + timedelta(hours=hour)},{','.join(cells)}")
        after.append(values[-24:])
    path.write_text("\n".join(lines), encoding="utf-8")
    return torch.stack(after)


def test_from_a_table_to_a_forecast_in_forty_lines():
    lines = [line for block in python_blocks("docs/sensor_table.md") for line in block.splitlines() if line]
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert not any(";" in line for line in lines)


@pytest.mark.slow
def test_from_a_table_to_a_forecast_with_intervals(tmp_path, monkeypatch):
    for needed in ("lightning", "matplotlib"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    after = write_rooms(tmp_path / "rooms.csv")
    names = run_page("docs/sensor_table.md")
    assert (tmp_path / "forecast.png").stat().st_size > 10_000
    data, bounds = names["data"], [names[name] for name in ("low", "median", "high")]
    rows, steps = torch.arange(12)[:, None], data.lengths[:, None] + torch.arange(24)
    low, median, high = (bound[rows, steps] for bound in bounds)
    error = (median - after).abs().mean((0, 1))
    spread = (after - after.mean((0, 1))).abs().mean((0, 1))
    assert (error < 0.6 * spread).all()  # in units of the table
    assert 0.85 < ((low < after) & (after < high)).float().mean() < 0.99


@pytest.mark.slow
def test_a_complete_model_forecasts_and_fills_holes_with_intervals():
    pytest.importorskip("torchmetrics")
    names = run_page("docs/complete_model.md")
    assert names["futures"].shape == (200, 80, names["AHEAD"], 2)
    for draws, target, counted in names["compared"].values():
        assert 100 < counted.sum() < counted.numel()  # holes are left out of the one, and are all of the other
        low, median, high = draws.quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
        assert 0.8 < ((low < target) & (target < high))[counted].float().mean() < 0.98
        known = target[counted]
        assert (median[counted] - known).abs().mean() < 0.5 * (known - known.median()).abs().mean()
    filled, past = names["filled"], names["past"]
    assert (filled.std(0)[past.observed] < 1e-5).all()  # what was measured stays as it is
    programs, on = (names["network"].model, names["network"].guide), torch.ones(80, names["AHEAD"], 1)
    bounds, ahead = [], []
    for filler in (0.0, torch.nan):  # what stands in a hole changes nothing
        torch.manual_seed(0)
        values = past.values.where(past.observed, filler)
        bounds.append(elbo_terms(*programs, values, *names["given"][1:]).elbo())
    assert torch.equal(*bounds)
    for heater in (0 * on, on):
        future = {"covariates": heater}
        means = forecast(*programs, *names["given"], num_steps=len(on[0]), future=future, sample=False)["x"].mean
        ahead.append(names["steps_after"](means, past.mask, len(on[0])))
    assert (ahead[1] - ahead[0])[:, -1].min() > 0.5  # a heater heats
    with pytest.raises(ValueError, match="^covariates: has shape"):
        elbo_terms(*programs, *names["given"][:3], past.covariates[:, 1:])


def test_the_extension_points_run(capsys):
    names = run_page("docs/extending.md")
    assert "torch.Size([2, 6, 1, 8, 8])" in capsys.readouterr().out
    assert isinstance(names["ours"], Chain)
    assert isinstance(names["ours"].expand((3, 5)), Chain)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 7])[:, None]
    ragged = names["Autoregression"](0.9, 7, 2, (5,), mask)
    path = ragged.rsample()
    torch.testing.assert_close(path[~mask], path[:, :1].expand_as(path)[~mask], rtol=0.0, atol=0.0)
    continued = (chain.extend(path, 2, mask=mask, sample=False) for chain in (ragged, names["theirs"]))
    torch.testing.assert_close(*continued)


def test_one_call_evaluates(tmp_path, monkeypatch, capsys):
    for needed in ("torchmetrics", "sklearn", "matplotlib"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/evaluation.md")
    written = {path.name for path in (tmp_path / "runs" / "mine").iterdir()}
    assert written == set(
        re.findall(r"`(\w+\.(?:json|md|html|png|gif|pt))`", read("docs/evaluation.md").split("## What is")[0])
    )
    assert names["found"].numbers["swaps"].keys() == {"identity", "motion"}
    assert "99.00" in capsys.readouterr().out


def test_the_page_on_deployment_runs(capsys):
    pytest.importorskip("lightning")
    names = run_page("docs/deployment.md")
    assert "torch.Size([1, 2]) torch.Size([1, 2, 2])" in capsys.readouterr().out
    assert torch.equal(names["expected"], names["network"](names["frames"], names["z"]))


def test_what_the_page_on_deployment_writes_as_onnx():
    for needed in ("lightning", "onnx", "onnxscript"):
        pytest.importorskip(needed)
    names = run_page("docs/deployment.md")
    (block,) = re.findall(r"^```py\n(.*?)^```$", read("docs/deployment.md"), re.DOTALL | re.MULTILINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        exec(block, names)
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(str(names["folder"] / "predictor.onnx"))
    longer = names["longer"]
    values = {name: tensor.numpy() for name, tensor in zip(evaluator.input_names, longer, strict=True)}
    (found,) = evaluator.run(None, values)
    torch.testing.assert_close(torch.from_numpy(found), names["network"](*longer), rtol=1e-4, atol=1e-5)


def test_every_page_is_in_the_table_of_contents():
    listed = {DOCS / "index.md"}
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for contents in re.findall(r"```{toctree}\n(?::[^\n]*\n)*\n(.*?)```", text, re.DOTALL):
            listed |= {page.parent / f"{name}.md" for name in contents.split()}
    built = DOCS / "_build"
    assert {page for page in DOCS.rglob("*.md") if built not in page.parents} == listed


def test_the_citation_has_the_version_of_the_package():
    version = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in read("CITATION.cff")
    assert f"version = {{{version}}}" in read("docs/citing.md")


@pytest.fixture(scope="module")
def check_links():
    spec = importlib.util.spec_from_file_location("check_links", DOCS / "check_links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOOD = """
<a href="https://example.org/a#b">elsewhere</a> <a href="#here">here</a> <h1 id="here">h</h1>
<a href="sub/other.html#ti%20tle">there</a> <a href="sub/">a folder</a> <img src="sub/picture.png">
<a href="api.html#x"><code class="xref py py-class">Known</code></a> <code class="xref py py-class">Module</code>
"""


def test_links_that_are_whole(check_links, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "api.html").write_text('<dt id="x"></dt>')
    (tmp_path / "sub" / "index.html").write_text('<link href="../index.html"><a href="/api.html">api</a>')
    (tmp_path / "sub" / "other.html").write_text('<p id="ti tle"></p>')
    (tmp_path / "sub" / "picture.png").write_bytes(b"")
    broken, external = check_links.broken_links(tmp_path)
    assert broken == []
    assert external == {"https://example.org/a#b": {"index.html"}}
    assert check_links.main(tmp_path) == 0


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ('<a href="none.html">x</a>', "none.html is not there"),
        ('<a href="#none">x</a>', "#none has no such anchor"),
        ('<a href="other.html#none">x</a>', "other.html#none has no such anchor"),
        ('<img src="none.png">', "none.png is not there"),
        ('<script src="_static/none.js"></script>', "_static/none.js is not there"),
        ('<a href="../outside.html">x</a>', "../outside.html is not there"),
        ('<script src="https://example.org/a.js"></script>', "https://example.org/a.js is loaded from elsewhere"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "//example.org/a.css is loaded from elsewhere"),
        ('<code class="xref py py-func"><span>Unknown</span></code>', "no link came of the reference to Unknown"),
    ],
)
def test_links_that_are_broken(check_links, tmp_path, page, said):
    (tmp_path / "outside.html").write_text("")
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "index.html").write_text(page)
    (folder / "other.html").write_text("")
    broken, _ = check_links.broken_links(folder)
    assert broken == [f"index.html: {said}"]
    assert check_links.main(folder) == 1


def test_no_page_is_no_success(check_links, tmp_path):
    assert check_links.main(tmp_path) == 1
