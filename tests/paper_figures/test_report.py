"""The site of `make report`, without a browser: what it holds, what its numbers are, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import studies
from analysis.ablation import summary
from analysis.settings import load_settings
from analysis.stats import t_interval
from paper_figures.headline import by_place
from paper_figures.report import reproduction, workloads
from paper_figures.report.__main__ import MOST_BYTES, Sources, build, main
from paper_figures.report.figures import looks
from paper_figures.report.headline import SHOWN, STUDY, Answer, sentence
from paper_figures.report.tables import Cell, interval
from paper_figures.report.training import sections
from tests.analysis.runs import write_grid
from tests.analysis.test_workloads import write_workload

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
STUDIES = ("ablation_cpu", "carry_over_cpu", "statistics_cpu")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the committed results."""
    out = tmp_path_factory.mktemp("report")
    build(Sources(), out)
    return out


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A results root that tests may spoil: the small studies as they are, links to what is only read."""
    root = tmp_path / "results"
    root.mkdir()
    for name in (STUDY, "ablation_cpu"):
        shutil.copytree(RESULTS / name, root / name)
    for name in ("hessian_maps", "paper_hessian", "real_model"):
        (root / name).symlink_to(RESULTS / name)
    return root


def page_of(site: Path) -> str:
    return (site / "index.html").read_text(encoding="utf-8")


def data_of(site: Path, name: str) -> dict[str, Any]:
    """The content of a data file, which is a script with one assignment."""
    text = (site / "site" / f"{name}.js").read_text(encoding="utf-8")
    begin = f'REPORT_DATA["{name}"]='
    assert text.startswith(begin) and text.endswith(";\n")
    return json.loads(text[len(begin) : -2])


def index_of(site: Path, pictures: str) -> list[dict[str, Any]]:
    found = re.search(rf'id="{pictures}">\s*<script type="application/json">(.*?)</script>', page_of(site), re.S)
    assert found is not None, pictures
    return json.loads(found[1])["index"]


# ------------------------------------------------------------------------------------------------- what it holds


def test_the_site_is_small_and_needs_no_network(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    assert [path.name for path in files].count("plotly.min.js") == 1
    page = page_of(site)
    assert len(page) < 1_000_000
    loads = re.findall(r"""(?:src|href|action|poster)\s*=\s*["']([^"']*)["']""", page)
    assert loads and not [link for link in loads if re.match(r"(?:[a-z]+:)?//|https?:", link)]
    assert not re.findall(r"url\(|@import|\bfetch\(|XMLHttpRequest|import\(", page)
    for link in loads:
        assert link.startswith(("#", "data:")) or (site / link).is_file(), link
    for path in (site / "site").glob("*.js"):
        if path.name != "plotly.min.js":
            assert "http" not in path.read_text(encoding="utf-8"), path


def test_every_section_has_content_and_every_picture_exists(site: Path) -> None:
    page = page_of(site)
    targets = re.findall(r'<a href="#([\w-]+)">', page.split("</nav>")[0])
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(targets) <= set(ids) and len(targets) == 8
    named = set(re.findall(r'class="pictures" id="([\w-]+)"', page))
    assert {"headline", "differences", "pareto", "curves", "maps", "rules"} <= named
    for pictures in named:
        entries = index_of(site, pictures)
        # The page takes a figure that has the name of the one before for the same figure.
        assert len({entry["figure"] for entry in entries}) == len(entries) > 0
        for entry in entries:
            figure = data_of(site, entry["file"])["figures"][entry["figure"]]
            assert figure["data"] and figure["layout"]["height"] > 100 and figure["alt"]
            assert "n = " in figure["caption"], figure["caption"]
    bodies = re.findall(r"<tbody>(.*?)</tbody>", page, re.S)
    assert len(bodies) >= 2 * len(STUDIES) + 3 and all("<tr>" in body for body in bodies)


def test_every_map_has_its_levels_and_borders(site: Path) -> None:
    entries = index_of(site, "maps")
    models = {entry["choice"][0] for entry in entries}
    assert len(models) == 4 and any("SmolLM2" in model for model in models)
    assert {entry["choice"][1] for entry in entries if "GPT" in entry["choice"][0]} == {
        f"{percent} % of training" for percent in (0, 50, 100)
    }
    for file in {entry["file"] for entry in entries} - {"maps-real"}:
        held = data_of(site, file)
        for figure in held["figures"].values():
            (trace,) = figure["data"]
            stored = held["levels"][trace["levels"]]
            assert len(stored["levels"]) == stored["cells"] * (stored["cells"] + 1)
            assert bool(figure["layout"].get("shapes")) == (trace["blocks"] > 1)
            assert len(figure["zooms"]) == 1 + (min(trace["blocks"], 16) if trace["blocks"] > 1 else 0)
            assert dict(figure["facts"]).keys() & {"z", "blocks"}


def test_numbers_of_the_first_screen_are_those_of_the_runs(site: Path) -> None:
    page, settings = page_of(site), load_settings(RESULTS / STUDY)
    assert "seed, n = 10. Better" in page
    for arm in SHOWN:
        runs = pd.concat([setting.runs[setting.runs.arm == arm] for setting in settings])
        shares = 100 * runs.second_moment_scalars / runs.parameters
        low, high = f"{shares.min():.1f}", f"{shares.max():.1f}"
        assert f'data-share="{arm}">{low if low == high else f"{low} to {high}"} %<' in page
    expected = []
    for place, arms in by_place(settings).items():
        for arm in SHOWN:
            one = arms[arm]
            found = re.search(rf'data-answer="{arm}, {place}">([^<]*)</span> <small>([^<]*)</small>', page)
            assert found is not None and one.difference is not None
            assert found[1] == f"{one.difference.mean:+.4f} ± {one.difference.half:.4f}"
            differs = "worse" if one.difference.mean > 0 else "better"
            verdict = differs if one.p_corrected < 0.05 else "not told apart"
            assert found[2] == verdict and one.n == 10
            expected.append(one.difference.mean)
    assert len(expected) == len(re.findall("data-answer=", page)) == 4 * len(SHOWN)
    figure = data_of(site, "headline")["figures"]["headline-0"]
    assert [value for trace in figure["data"] for value in trace["x"]] == pytest.approx(expected)


def test_tables_of_the_studies_are_those_of_the_runs(site: Path) -> None:
    for name in STUDIES:
        study = studies.load(RESULTS / name)
        (section,) = sections([study])
        assert len(section.best.rows) == study.runs.arm.nunique()
        assert len(section.every.rows) == len(study.runs.groupby(["arm", "lr"]))
        columns = [column.name for column in section.best.columns]
        facts = summary(study.runs).set_index("arm")
        for row in section.best.rows:
            cells = dict(zip(columns, row, strict=True))
            expected = facts.loc[cells["arm"].text]
            assert cells["final loss (nats)"].text == f"{expected.loss:.4f} ± {expected.loss_half:.4f}"
            assert cells["n"].text == str(expected.n) and cells["diverged"].text == str(expected.diverged)
            assert cells["second moments"].text == f"{expected.scalars:,}"
            assert (cells["differs"].text in ("worse", "better")) == expected.differs
    assert 'data-value="1.70' in page_of(site)


def test_the_reproduction_tables_are_those_of_their_page(site: Path) -> None:
    source, page = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8"), page_of(site)
    assert page.index('id="claims"') < page.index('id="reproduction"')
    for name, heading in (("claims", "| claim |"), ("reproduction", "| what |")):
        rows = source[source.index(heading) :].split("\n\n")[0].splitlines()[2:]
        body = re.search(rf'id="{name}">.*?<tbody>(.*?)</tbody>', page, re.S)
        assert body is not None and body[1].count("<tr>") == len(rows) > 5
        for command in re.findall(r"`((?:make|python) [^`]+)`", "\n".join(rows)):
            assert f"<code>{command}" in body[1]
    claims = re.search(r'id="claims">.*?<tbody>(.*?)</tbody>', page, re.S)
    assert claims is not None
    for first, kind in (("confirmed", "yes"), ("refuted", "no")):
        cells = re.findall(rf'<td data-value="{first}[^"]*" class="(\w*)">', claims[1])
        assert cells and set(cells) == {kind}
    assert "](" not in claims[1]


def test_a_damaged_page_of_claims_is_named(tmp_path: Path) -> None:
    source = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    for spoiled, words in (
        (source.replace("| verdict |", "| outcome |"), "0 tables of claims and 2 of commands"),
        (source.replace("| – | not measured | – |", "| not measured | – |", 1), "a row of 4 cells below 5 headings"),
    ):
        (tmp_path / "page.md").write_text(spoiled, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            reproduction.load(tmp_path / "page.md")


def test_rules_and_their_candidates_are_shown(site: Path) -> None:
    shown = 0
    for rules, table in (("derived", "trained"), ("derived_blocks", "evidence")):
        document = json.loads((ROOT / f"optimizer/partition/rules/{rules}.json").read_text())
        measured = [choice for choice in document["evidence"]["choices"].values() if choice.get("candidates")]
        assert len([entry for entry in index_of(site, "rules") if entry["choice"][0] == rules]) == len(measured) > 5
        body = re.search(rf'id="{table}">.*?<tbody>(.*?)</tbody>', page_of(site), re.S)
        assert body is not None and body[1].count("<tr>") == sum(len(c["candidates"]) for c in measured)
        assert body[1].count(">yes</td>") == len(measured)
        shown += len(measured)
    assert shown == len(index_of(site, "rules"))
    for name in (path.stem for path in (ROOT / "optimizer/partition/rules").glob("*.json")):
        assert f">{name}</button>" in page_of(site)


# ------------------------------------------------------------------------------------------- new and missing results


def test_a_new_folder_of_runs_appears_without_code(copies: Path, tmp_path: Path) -> None:
    write_grid(copies / "my_new_map")
    build(Sources(results=copies), tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert "<h3>My new map</h3>" in page and 'id="best-my_new_map"' in page and "statistics_cpu" not in page
    for pictures in ("differences", "pareto", "curves"):
        assert any(entry["choice"][0] == "My new map" for entry in index_of(tmp_path / "out", pictures))


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (STUDY, "results/headline_cpu, or run `python -m experiments.ablation --study headline`"),
        ("hessian_maps", "hessian_maps/maps.json does not exist; run `make hessian`"),
        ("real_model", "no results in"),
        ("paper_hessian", "paper_hessian does not exist"),
    ],
)
def test_a_missing_folder_is_one_line(
    copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: str, words: str
) -> None:
    path = copies / gone
    shutil.rmtree(path) if not path.is_symlink() else path.unlink()
    with pytest.raises(SystemExit) as ended:
        main(["--results", str(copies), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_runs_are_named(copies: Path, tmp_path: Path) -> None:
    run = next(path for path in sorted((copies / "ablation_cpu").iterdir()) if path.is_dir())
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match=rf"{run.name} is damaged"):
        main(["--results", str(copies), "--out", str(tmp_path / "out")])
    (run / "metrics.jsonl").write_text(whole)
    (copies / "ablation_cpu" / "photos").mkdir()
    with pytest.raises(SystemExit, match="photos is no training run"):
        main(["--results", str(copies), "--out", str(tmp_path / "out")])


def test_other_sources_that_are_missing_are_named(tmp_path: Path) -> None:
    for option, words in (("--rules", "no rule sets"), ("--reproduction", "does not exist")):
        with pytest.raises(SystemExit, match=words):
            main([option, str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


# -------------------------------------------------------------------------------------------------------- pieces


def test_the_answer_follows_the_verdicts() -> None:
    good, bad, half = ("not told apart", "better"), ("worse", "worse"), ("not told apart", "worse")

    def told(**verdicts: tuple[str, str]) -> str:
        found = [
            Answer(arm, place, t_interval([0.0, 0.1]), 10, 0.01, verdict)
            for arm, both in (dict.fromkeys(SHOWN, bad) | verdicts).items()
            for place, verdict in zip(("GPT", "Llama"), both, strict=True)
        ]
        return sentence(found)

    text = told(factored=good, slim_adam=half)
    assert "(factored), the loss is not measurably worse than AdamW's in any of 2 places" in text
    assert "(slim_adam), it is worse in 1 of 2." in text and "(adam_mini), it is worse in all 2." in text
    assert "Nor is it" not in text
    assert "Nor is it with one number per row and one per column (factored" in told(derived=good, factored=good)
    assert told().startswith("More than these keep")


def test_cells_without_a_value_have_no_key() -> None:
    assert interval(None, missing="diverged") == Cell("diverged", None)
    assert Cell("diverged", None).key == "" and Cell("x", float("inf")).key == "" and Cell("0", 0.0).key == "0.0"


def test_arms_that_have_no_colour_get_one_that_no_other_has_while_there_are_any() -> None:
    found = looks(["elementwise", "muon", "lion", "adam_mini"])
    assert len({look.colour for look in found.values()}) == 4
    many = looks([f"arm {i}" for i in range(10)])
    assert len({(look.colour, look.symbol) for look in many.values()}) == 10
    owned = ("elementwise", "adam_mini", "derived", "factored", "slim_adam", "permuted")
    crowded = looks([*owned, "muon", "normuon", "soap", "adamuon"])
    assert len({crowded[arm].colour for arm in ("muon", "normuon", "soap", "adamuon")}) == 4


# ------------------------------------------------------------------------------------------------- workloads


def test_workloads_have_a_table_images_and_answers(copies: Path, tmp_path: Path) -> None:
    build(Sources(results=copies), tmp_path / "without")
    assert "make workloads PROFILE=cpu" in page_of(tmp_path / "without")
    for name in ("diffusion", "sft"):
        for run in write_workload(copies, name).iterdir():
            images = np.arange(10 * 6, dtype=np.uint8).reshape(10, 2, 3)
            answer = {"question": "Why <b>?", "before": "blue", "after": "green"}
            left = {"shape": [10, 2, 3], "base64": base64.b64encode(images.tobytes()).decode()}
            left = left if name == "diffusion" else {"answers": [answer]}
            (run / "samples.json").write_text(json.dumps(left))
    build(Sources(results=copies), tmp_path / "site")
    page = page_of(tmp_path / "site")
    assert "Why &lt;b&gt;?" in page and ">green<" in page and "accuracy 0.8900 ± " in page
    entries = index_of(tmp_path / "site", "samples")
    assert entries[0]["choice"] == ["diffusion", "AdamW (elementwise)"] and len(entries) == 3
    (trace,) = data_of(tmp_path / "site", "samples")["figures"][entries[0]["figure"]]["data"]
    assert trace["z"][-1][:4] == [0, 1, 2, 6] and len(trace["z"]) == 4 and len(trace["z"][0]) == 24
    with pytest.raises(ValueError, match="have 60 bytes"):
        workloads.decoded({**left_images(), "shape": [9, 2, 3]})


def left_images() -> dict[str, Any]:
    return {"shape": [10, 2, 3], "base64": base64.b64encode(bytes(60)).decode()}
