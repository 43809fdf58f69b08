"""``python -m paper_figures.hessian out/hessian``: write figures, ``summary.md`` and ``index.html`` of a study."""

from __future__ import annotations

import argparse
import base64
import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from analysis.hessian import HessianReport
from analysis.hessian_maps import gather
from analysis.stats import Interval, t_interval
from paper_figures import curves, maps
from paper_figures.commandline import refusals
from paper_figures.maps import TITLES, Caption
from paper_figures.report import maps as report_maps
from paper_figures.report import site
from paper_figures.report.site import Pictures
from paper_figures.report.tables import Cell, Column, Table, interval, number, text
from paper_figures.style import setup, webp

VOTERS = ("gpt", "llama")
"""The models from which the rules are derived."""
PAPER = {
    "QUERY": "ATTENTION_HEAD",
    "KEY": "ATTENTION_HEAD",
    "TOKEN_EMBEDDING": "TOKEN",
    "POSITION_EMBEDDING": "TOKEN",
    "HEAD": "TOKEN",
}


def draw(report: HessianReport, folder: Path) -> list[Caption]:
    """Draw every figure and return the captions, in the order in which the page shows them."""
    makers: list[Callable[[], Caption]] = [
        lambda: maps.query_key(report, folder),
        lambda: maps.rows_and_columns(
            report, folder, "02_value_attention_out", ("VALUE", "ATTENTION_OUT"), "Values and attention outputs"
        ),
        lambda: maps.rows_and_columns(
            report, folder, "03_mlp_matrices", ("MLP_IN", "MLP_OUT"), "Feed-forward matrices"
        ),
        lambda: maps.rows_and_columns(
            report, folder, "04_embedding_head", ("TOKEN_EMBEDDING", "HEAD"), "Embedding and output layer: tokens"
        ),
        lambda: maps.classifier(report, folder),
        lambda: maps.whole_model(report, folder),
        lambda: curves.evidence_table(report, folder),
        lambda: curves.spectra(report, folder),
        lambda: curves.block_spectra(report, folder),
        lambda: curves.jensen(report, folder),
        lambda: curves.training_check(report, folder),
    ]
    return [make() for make in makers]


NO_BLOCKS = ("TENSOR", "FACTORED")


def role_table(report: HessianReport) -> list[dict[str, Any]]:
    """Return z and lift at the end of training: one row per role and candidate partition, with one cell per model.

    One block per tensor and factored second moments are no partitions that |H| could show.
    """
    tables = {model: report.by_role(model).set_index(["role", "unit"]) for model in VOTERS}
    keys = list(dict.fromkeys(key for table in tables.values() for key in table.index if key[1] not in NO_BLOCKS))
    rows = []
    for role, unit in keys:
        cells = [
            {"z": float(t.loc[(role, unit), "z"]), "lift": float(t.loc[(role, unit), "lift"])}
            if (role, unit) in t.index
            else {"z": None, "lift": None}
            for t in tables.values()
        ]
        rows.append({"role": role, "unit": unit, "cells": cells})
    return rows


def check_table(report: HessianReport) -> list[dict[str, Any]]:
    """Return the mean final loss, with its interval, of the training runs that check the rules."""
    rows = []
    for (model, arm), runs in report.check.groupby(["model", "arm"], sort=False):
        interval = t_interval(runs.final.tolist())
        rows.append(
            {"model": TITLES[str(model)], "arm": arm, "mean": interval.mean, "half": interval.half, "n": interval.n}
        )
    return rows


def choices(report: HessianReport) -> list[dict[str, Any]]:
    """Return the derived unit and the paper's unit of every measured role."""
    rows = []
    for role, choice in report.report["rules"]["choices"].items():
        if "predicted_cost" in choice:
            rows.append(
                {
                    "role": role,
                    "unit": choice["unit"],
                    "paper": PAPER.get(role, "OUT_NEURON"),
                    "cost": f"{choice['predicted_cost']:.3f}",
                    "why": choice["why"],
                }
            )
    return rows


def headline(report: HessianReport) -> str:
    """Summarise the results in a few sentences."""
    table = role_table(report)
    heads = [
        c["z"] for r in table if r["role"] in ("QUERY", "KEY") and r["unit"] == "ATTENTION_HEAD" for c in r["cells"]
    ]
    derived = choices(report)
    differing = [f"{r['role']} ({r['unit']})" for r in derived if r["unit"] != r["paper"]]
    finals = {(r["model"], r["arm"]): r for r in check_table(report)}
    gaps = [finals[(TITLES[m], "derived")]["mean"] - finals[(TITLES[m], "elementwise")]["mean"] for m in VOTERS]
    return (
        f"Queries and keys fall into their attention heads: the smallest z at the end of training is "
        f"{min(heads):.1f} over "
        f"both styles. The derived rules differ from the paper's for "
        f"{', '.join(differing) if differing else 'no role'}. "
        f"Trained with them, the tiny models end {gaps[0]:+.4f} (GPT style) and {gaps[1]:+.4f} (Llama style) nats from "
        f"AdamW, mean over {next(iter(finals.values()))['n']} seeds."
    )


def page(report: HessianReport, figures: list[Caption], folder: Path, explorer: Pictures) -> str:
    """Return the HTML page, which contains all pictures.

    Args:
        report: the study.
        figures: captions of the pictures.
        folder: where the pictures are.
        explorer: the interactive maps.
    """

    settings = report.report["settings"]
    tokens = settings["hessian_batches"] * settings["batch"] * settings["seq_len"]

    def show(caption: Caption) -> Markup:
        data = base64.b64encode(webp(folder / f"{caption.name}.png")).decode()
        text = html.escape(caption.text)
        return Markup(  # Safe, because the title and the text are escaped.
            f'<figure id="{caption.name}"><img alt="{html.escape(caption.title)}" src="data:image/webp;base64,{data}">'
            f"<figcaption><b>{html.escape(caption.title)}.</b> {text} n = one model a "
            f"style, its Hessian over {tokens} tokens; seed {settings['seed']}.</figcaption></figure>"
        )

    models = report.report["subjects"]
    sizes = [model["parameters"] for model in models.values()]
    return site.render(
        "hessian.html.j2",
        subjects=models,
        data=report.report["data"],
        settings=settings,
        environment=report.report["environment"],
        tables=page_tables(report),
        figures=figures,
        show=show,
        maps=explorer,
        headline=headline(report),
        smallest=f"{min(sizes):,}",
        largest=f"{max(sizes):,}",
        asymmetry=max(model["asymmetry"] for model in models.values()),
    )


def page_tables(report: HessianReport) -> dict[str, Table]:
    """Return the tables of the page: subjects, roles, choices and check."""
    numbers = {name: Column(name, numeric=True) for name in ("parameters", "held-out loss, first record", "last", "n")}
    subjects = [
        [text(TITLES[name]), number(s["parameters"]), number(s["loss"][0], ".3f"), number(s["loss"][-1], ".3f")]
        for name, s in report.report["subjects"].items()
    ]
    models = [Column(f"{TITLES[m]}: {what}", numeric=True) for m in VOTERS for what in ("z", "lift")]
    roles = [
        [text(row["role"]), text(row["unit"]), *(cell for found in row["cells"] for cell in _cells(found))]
        for row in role_table(report)
    ]
    chosen = [
        [text(c["role"]), text(c["unit"]), text(c["paper"]), number(float(c["cost"]), ".3f"), text(c["why"])]
        for c in choices(report)
    ]
    check = [
        [text(c["model"]), text(c["arm"]), interval(Interval(c["mean"], c["half"], c["n"])), number(c["n"])]
        for c in check_table(report)
    ]
    role, unit = Column("role", choose=True), Column("blocks are", choose=True)
    why = [Column("derived unit"), Column("Adam-mini paper"), Column("predicted cost", numeric=True), Column("why")]
    loss = Column("final loss ± 95 % t-interval", numeric=True)
    return {
        "subjects": Table(
            "subjects", "Held-out loss in nats, one seed.", [Column("model"), *list(numbers.values())[:3]], subjects
        ),
        "roles": Table("roles", "End of training, medians over layers, one seed.", [role, unit, *models], roles),
        "choices": Table("choices", "The predicted cost is in nats.", [role, *why], chosen),
        "check": Table("check", "Mean over seeds.", [Column("model"), Column("rules"), loss, numbers["n"]], check),
    }


def _cells(found: dict[str, Any]) -> list[Cell]:
    """Return the cells of z and lift; a z above 6 counts as structure."""
    if found["z"] is None:
        return [Cell("–", None)] * 2
    z = Cell(f"{found['z']:.1f}", found["z"], "yes" if found["z"] > 6 else "no")
    return [z, number(found["lift"], ".2f")]


def summary(report: HessianReport) -> str:
    """Return the results as Markdown."""
    lines = ["# Structure of the Hessian: summary", "", headline(report), ""]
    lines.append("| role | blocks are | " + " | ".join(f"{TITLES[m]}: z | lift" for m in VOTERS) + " |")
    lines.append("|---|---|" + "---|---|" * len(VOTERS))
    for row in role_table(report):
        cells = " | ".join("– | –" if c["z"] is None else f"{c['z']:.1f} | {c['lift']:.2f}" for c in row["cells"])
        lines.append(f"| {row['role']} | {row['unit']} | {cells} |")
    lines += ["", "| role | derived | paper | predicted cost |", "|---|---|---|---|"]
    lines += [f"| {c['role']} | {c['unit']} | {c['paper']} | {c['cost']} |" for c in choices(report)]
    lines += ["", "| model | rules | final loss | 95 % interval | n |", "|---|---|---|---|---|"]
    lines += [
        f"| {c['model']} | {c['arm']} | {c['mean']:.4f} | ± {c['half']:.4f} | {c['n']} |" for c in check_table(report)
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Draw the figures of a finished study, and write its summary and its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with refusals(FileNotFoundError, ValueError):
        report = HessianReport.load(folder)
        report.require("settings", "subjects", "js", "rules", "data", "environment")
        for stage in report.report["files"]:
            report.arrays(stage)  # Refuse missing or damaged files before drawing.
    setup()
    figures = draw(report, folder / "figures")
    temporary = folder / f".summary.md.{os.getpid()}.tmp"
    temporary.write_text(summary(report), encoding="utf-8")
    os.replace(temporary, folder / "summary.md")
    explorer = report_maps.pictures(gather(report))
    site.write(folder, page(report, figures, folder / "figures", explorer), [explorer])
    print(f"{len(figures)} figures in {folder / 'figures'}; open {folder / 'index.html'}")


if __name__ == "__main__":
    main()
