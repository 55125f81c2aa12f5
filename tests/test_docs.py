"""The programs that the documentation shows: they run as they stand."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from seqdisent import elbo_terms

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/your_own_model.md"])
def test_the_pages_python_runs_from_top_to_bottom(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = {"__name__": page}
        exec(compile("\n".join(blocks), page, "exec"), names)
    if page == "docs/your_own_model.md":
        said = capsys.readouterr().out
        assert "torch.Size([4]) torch.Size([4]) torch.Size([4, 12])" in said
        assert "torch.Size([4, 12, 8]) torch.Size([2, 30, 8]) torch.Size([4, 17, 8])" in said
        for model in (names["StateSpace"](), names["Recurrent"]()):  # in any precision
            terms = elbo_terms(model.double().model, model.guide, names["frames"].double(), names["mask"])
            assert terms.elbo().dtype == torch.float64
