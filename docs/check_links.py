"""Check the links of the built pages: python docs/check_links.py FOLDER

Every link, picture, script and style sheet that points into the folder must exist, and so must every anchor. Every
reference to a name of this package must have become a link. No page may load a script, a picture or a style sheet from
elsewhere, so that the pages work without a network. Links that point elsewhere are listed and not followed.
"""

from __future__ import annotations

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# what the API reference names and other packages define, mostly as bases
FOREIGN = {
    "ABC", "ELBO", "FrechetInceptionDistance", "LightningModule", "Metric", "Module", "NamedTuple", "Protocol",
    "TorchCheckpointIO", "TorchDistribution", "TypedDict", "ValueError", "object", "torchmetrics.Metric",
}  # fmt: skip


class Page(HTMLParser):
    """What a page points to, and what in it can be pointed to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: set[str] = set()  # the targets that a browser fetches to show the page
        self.anchors: set[str] = set()
        self.unresolved: list[str] = []  # references to names that did not become links
        self._links = 0  # how many <a> are open
        self._reference: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        self.targets += [found[name] for name in ("href", "src", "poster") if name in found]
        self.loaded |= {found[name] for name in ("src", "poster") if name in found}
        if tag == "link" and "stylesheet" in found.get("rel", ""):
            self.loaded.add(found.get("href", ""))
        self._links += tag == "a"
        if tag == "code" and "xref py" in found.get("class", "") and not self._links:
            self._reference = ""

    def handle_endtag(self, tag: str) -> None:
        self._links -= tag == "a"
        if tag == "code" and self._reference is not None:
            self.unresolved.append(self._reference)
            self._reference = None

    def handle_data(self, data: str) -> None:
        if self._reference is not None:
            self._reference += data


def broken_links(folder: Path) -> tuple[list[str], dict[str, set[str]]]:
    """Return what is broken, a line each, and {what points outside the folder: the pages that do}."""
    folder = folder.resolve()

    @cache
    def read(path: Path) -> Page:
        return Page(path.read_text(encoding="utf-8"))

    broken: list[str] = []
    external: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.html")):
        where = path.relative_to(folder).as_posix()
        page = read(path)
        broken += [
            f"{where}: no link came of the reference to {name}" for name in page.unresolved if name not in FOREIGN
        ]
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                if target in page.loaded:
                    broken.append(f"{where}: {target} is loaded from elsewhere")
                external.setdefault(target, set()).add(where)
                continue
            start = folder if parts.path.startswith("/") else path.parent
            wanted = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            wanted = wanted / "index.html" if wanted.is_dir() else wanted
            if not wanted.is_file() or not wanted.is_relative_to(folder):
                broken.append(f"{where}: {target} is not there")
            elif parts.fragment and wanted.suffix == ".html" and unquote(parts.fragment) not in read(wanted).anchors:
                broken.append(f"{where}: {target} has no such anchor")
    return broken, external


def main(folder: Path) -> int:
    """Print what was found; return 1 if anything is broken or there is no page."""
    pages = len(list(folder.rglob("*.html")))
    broken, external = broken_links(folder)
    for target, where in sorted(external.items()):
        print(f"elsewhere, not checked: {target} ({len(where)} pages)")
    for line in broken:
        print(f"broken: {line}")
    print(f"{pages} pages, {len(broken)} broken links")
    return 1 if broken or not pages else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
