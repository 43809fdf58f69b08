"""Write a site: one page, Plotly's library beside it once, and data as scripts, because a page opened from a file may
not fetch JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import plotly

from paper_figures.report.figures import THEMES, Figure

TEMPLATES = Path(__file__).with_name("templates")
LIBRARY = "plotly.min.js"


@dataclass(frozen=True)
class Entry:
    """Where a figure is: the selectors' values that lead to it, its file, and its name in the file."""

    choice: tuple[str, ...]
    file: str
    figure: str


@dataclass
class Pictures:
    """Figures that a selector chooses from, and the files in which they lie.

    Attributes:
        id: HTML id.
        dimensions: names of the selectors.
        index: one entry per figure.
        files: name of a file -> name of a figure -> the figure.
        levels: name of a file -> key -> a map on 256 levels; traces refer to it by ``levels``.
        first: the choice that is shown first; empty for the first of the index.
    """

    id: str
    dimensions: Sequence[str]
    index: list[Entry] = field(default_factory=list)
    files: dict[str, dict[str, Figure]] = field(default_factory=dict)
    levels: dict[str, dict[str, Any]] = field(default_factory=dict)
    first: tuple[str, ...] = ()

    def add(self, choice: tuple[str, ...], file: str, figure: Figure) -> None:
        """Add a figure.

        Args:
            choice: a value for each selector.
            file: file in which it lies; figures of one file are loaded together.
            figure: the figure.
        """
        assert len(choice) == len(self.dimensions)
        name = f"{self.id}-{len(self.index)}"
        self.files.setdefault(file, {})[name] = figure
        self.index.append(Entry(choice, file, name))

    def of_page(self) -> dict[str, Any]:
        """Return what the page needs to build the selectors."""
        return {
            "dimensions": list(self.dimensions),
            "first": list(self.first),
            "index": [{"choice": list(e.choice), "file": e.file, "figure": e.figure} for e in self.index],
        }


def environment() -> jinja2.Environment:
    """Return the environment in which the pages' templates are rendered; an unknown name is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **names: Any) -> str:
    """Render a page with the shared style sheet, script and themes."""
    shared = {name: (TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "site.js")}
    return (
        environment()
        .get_template(template)
        .render(style=shared["style.css"], script=shared["site.js"], themes=THEMES, library=LIBRARY, **names)
    )


def write(folder: Path, page: str, pictures: Sequence[Pictures]) -> int:
    """Write a page with its data and Plotly's library, each file atomically.

    Args:
        folder: the site's folder.
        page: the HTML of ``index.html``.
        pictures: the figures of the page.

    Returns:
        The size of the site in bytes: the page, the library and the data.
    """
    assets = folder / "site"
    assets.mkdir(parents=True, exist_ok=True)
    for stale in assets.glob("*.js"):
        stale.unlink()
    shutil.copyfile(Path(plotly.__file__).parent / "package_data" / LIBRARY, assets / LIBRARY)
    merged: dict[str, dict[str, Any]] = {}
    for each in pictures:
        for file, figures in each.files.items():
            held = merged.setdefault(file, {"figures": {}, "levels": {}})
            held["figures"] |= {name: figure.to_dict() for name, figure in figures.items()}
            held["levels"] |= each.levels.get(file, {})
    for file, content in merged.items():
        document = json.dumps(content, separators=(",", ":"), allow_nan=False)
        _replace(assets / f"{file}.js", f"REPORT_DATA[{json.dumps(file)}]={document};\n")
    _replace(folder / "index.html", page)
    return (folder / "index.html").stat().st_size + sum(path.stat().st_size for path in assets.iterdir())


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def file_name(*words: str) -> str:
    """Return words as the name of a data file: letters, digits, hyphens and underscores only."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(words))


def facts_of(pairs: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return pairs of a mapping that have a value."""
    return [(name, value) for name, value in pairs.items() if value]
