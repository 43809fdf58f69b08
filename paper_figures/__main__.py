"""Rebuild every figure and table of the project from committed results: ``make figures``.

It reads results and computes statistics only. A result that is missing or damaged ends it; nothing is left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis import hessian_maps, paper_hessian, studies
from paper_figures import ablation, kept_maps, real_model, role_study, study, suite, workloads
from paper_figures.commandline import refusals
from paper_figures.paper_hessian import __main__ as paper_hessian_figures
from paper_figures.style import setup

CARRY_OVER = ("elementwise", "adam_mini", "derived_blocks", "derived", "factored")
SUITE = ("rivals_cpu", "record_cpu", "headline_cpu", "sensitivity_cpu", "trajectories")
"""What the step of the suite needs, besides ``length_cpu``, which is not run yet."""
Step = Callable[[Path, Path], None]
"""Draws from a root of results into a folder."""
READ = ("hessian_maps", "paper_hessian", "real_model", "role_study", "trajectories")
"""Folders of results other than training runs that a step reads."""


def _ablation(results: Path, out: Path) -> None:
    prediction = str(results / "predicted_cost.json")
    ablation.main(["--results", str(results / "ablation_cpu"), "--out", str(out), "--prediction", prediction])


def _carry_over(results: Path, out: Path) -> None:
    folder, arms = str(results / "carry_over_cpu"), ["--arms", *CARRY_OVER, "--against", "adam_mini"]
    ablation.main(["--results", folder, "--out", str(out / "carry_over"), *arms])


def _studies(results: Path, out: Path) -> None:
    setup()
    for folder in studies.folders(results)[0]:
        print(study.write(studies.load(folder), out))


def _suite(results: Path, out: Path) -> None:
    for name in SUITE:  # The command by itself says what is not run yet.
        if not (results / name).is_dir():
            raise FileNotFoundError(f"{results / name} does not exist; restore it from the repository")
    suite.main(["--results", str(results), "--out", str(out)])


def _workloads(results: Path, out: Path) -> None:
    workloads.main(["--results", str(results), "--out", str(out)])


def _maps(results: Path, out: Path) -> None:
    setup()
    print(*kept_maps.write(hessian_maps.load(results / "hessian_maps"), out))


def _role_study(results: Path, out: Path) -> None:
    role_study.main(["--results", str(results / "role_study"), "--out", str(out)])


def _real_model(results: Path, out: Path) -> None:
    real_model.main(["--results", str(results / "real_model"), "--out", str(out)])


def _paper_hessian(results: Path, out: Path) -> None:
    for part in paper_hessian.PARTS:  # The command by itself leaves out what is not measured yet.
        paper_hessian.load(results / "paper_hessian", part)
    paper_hessian_figures.main(["--results", str(results / "paper_hessian"), "--out", str(out)])


STEPS: dict[str, Step] = {
    "ablation": _ablation,
    "carry over": _carry_over,
    "every study": _studies,
    "suite": _suite,
    "workloads": _workloads,
    "Hessian maps": _maps,
    "role study": _role_study,
    "real model": _real_model,
    "paper's Hessian": _paper_hessian,
}


def build(results: Path, out: Path) -> int:
    """Run every step, and return the number of figures.

    Raises:
        FileNotFoundError: a result is missing.
        ValueError: a result is damaged, or a figure lacks its PNG or its PDF.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, step in STEPS.items():
        start = time.monotonic()
        step(results, out)
        print(f"{name}: {time.monotonic() - start:.0f} s")
    return len(complete(out))


def complete(out: Path) -> list[Path]:
    """Return the PNGs below a folder, each of which needs a PDF beside it, and the other way round.

    Raises:
        ValueError: one of the two is missing; the message names it.
    """
    drawn, printed = ({path.with_suffix("") for path in out.rglob(f"*.{kind}")} for kind in ("png", "pdf"))
    if odd := sorted(drawn ^ printed):
        kind = "pdf" if odd[0] in drawn else "png"
        raise ValueError(f"{odd[0]}.{kind} is missing, though its twin is there; delete {out} and draw again")
    return sorted(path.with_suffix(".png") for path in drawn)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. A result that is missing or damaged ends it with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=Path("paper_figures/out"))
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    with refusals(FileNotFoundError, ValueError, OSError):
        count = build(arguments.results, arguments.out)
    if unread := [folder.name for folder in studies.folders(arguments.results)[1] if folder.name not in READ]:
        print(f"no figures of: {', '.join(unread)}")
    print(f"{count} figures, PNG and PDF, in {time.monotonic() - start:.0f} s; {arguments.out}")


if __name__ == "__main__":
    main()
