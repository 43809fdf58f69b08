"""The tables of docs/rivals.md, from the registry and from one step of each optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from experiments.models import LlamaConfig, build

from .registry import RIVALS
from .size import StateSize, state_size

BEGIN, END = "<!-- tables begin: written by python -m experiments.rivals -->", "<!-- tables end -->"


def stepped(arm: str) -> tuple[StateSize, int]:
    """Return the size of an arm's state once every tensor has moved, and the number of parameters of the 0.9M model."""
    model = build(LlamaConfig(), 0)
    optimizer = RIVALS[arm].make(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return state_size(optimizer), sum(parameter.numel() for parameter in model.parameters())


def size_row(arm: str) -> str:
    """Return an arm's row of the table of sizes."""
    size, count = stepped(arm)
    return f"| `{arm}` | {size.values / count:.3f} | {size.first / count:.3f} | {size.bytes / count:.3f} |"


def tables() -> str:
    """Return the tables of origins, of hyper-parameters, and of learning rates."""
    rivals = RIVALS.values()
    return "\n".join(
        [
            "| arm | made by | paper | state values per parameter |",
            "|---|---|---|---|",
            *_rows((r.name, r.library, _link(r.paper), r.state) for r in rivals),
            "",
            "| arm | takes of the run's config | what is not the paper's or the library's |",
            "|---|---|---|",
            *_rows((r.name, r.takes, r.differs) for r in rivals),
            "",
            "| arm | learning rates of the study | against Adam's | not moved by the first step |",
            "|---|---|---|---|",
            *_rows((r.name, ", ".join(f"{lr:g}" for lr in r.rates), r.against_adam, r.still or "-") for r in rivals),
        ]
    )


def _rows(cells: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in cells]


def _link(paper: str) -> str:
    """Return a link to an arXiv number; other sources stay as they are."""
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper.replace(".", "").isdigit() else paper


def written(page: str, arms: Iterable[str] = tuple(RIVALS)) -> str:
    """Return the page with its tables replaced.

    Args:
        page: text with the markers ``BEGIN`` and ``END``.
        arms: the arms of the table of sizes.

    Raises:
        ValueError: the page lacks a marker.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN!r} or {END!r} after it; add both where the tables belong")
    header = "| arm, Llama of 0.9M | state values per parameter | of first moments | bytes |\n|---|--:|--:|--:|"
    sizes = "\n".join([header, *map(size_row, arms)])
    return f"{before}{BEGIN}\n\n{tables()}\n\n{sizes}\n\n{END}{after}"


def write(path: Path) -> None:
    """Write the tables into a page."""
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
