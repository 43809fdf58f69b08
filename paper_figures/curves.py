"""Figures of the evidence, of spectra, and of the training runs that check the rules."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm

from analysis.hessian import HessianReport
from analysis.stats import t_interval
from paper_figures.maps import TITLES, Caption
from paper_figures.style import ARM_COLOURS, COLOURS, ROLE_COLOURS, role_name, save

SHORT = {
    "TENSOR": "tensor",
    "ATTENTION_HEAD": "head",
    "OUT_NEURON": "row",
    "IN_NEURON": "column",
    "TOKEN": "token",
    "FACTORED": "rank one",
}


def evidence_table(report: HessianReport, out: Path) -> Caption:
    """Draw a table of the z-score of every candidate, per role, model and checkpoint."""
    figure, grid = plt.subplots(1, 2, figsize=(10.2, 7.4))
    for axes, model in zip(grid, ("gpt", "llama"), strict=True):
        tables = [report.by_role(model, c).query("unit not in ('TENSOR', 'FACTORED')") for c in (0.0, 0.5, 1.0)]
        values = np.stack([table.z.to_numpy() for table in tables], axis=1)
        labels = [f"{role_name(r.role)} by {SHORT[r.unit]}" for r in tables[0].itertuples()]
        top = max(100.0, float(np.abs(values).max()))
        image = axes.imshow(values, norm=SymLogNorm(6, vmin=-top, vmax=top), cmap="RdBu_r", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            dark = abs(value) > 14  # Colours of a symmetric log scale are dark well below its ends.
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xticks(range(3), ["0 %", "50 %", "100 %"])
        axes.set_title(f"{TITLES[model]}: z against size-matched random partitions")
        axes.set_xlabel("share of training")
        axes.grid(False)
        figure.colorbar(image, ax=axes, shrink=0.6)
    save(figure, out, "07_evidence")
    n = report.report["settings"]["permutations"]
    return Caption(
        "07_evidence",
        "Which partitions are real",
        f"z-score of the mass inside the blocks against {n} random partitions of the same sizes (medians over layers). "
        "A z above 6 counts as structure. The null of finer partitions and larger matrices varies less, so z shows "
        "whether there is structure, but not how much. Compare z along a row, not between rows.",
    )


def spectra(report: HessianReport, out: Path) -> Caption:
    """Plot the exact spectrum and its estimate by stochastic Lanczos quadrature."""
    figure, grid = plt.subplots(1, 2, figsize=(9.6, 3.6))
    for axes, model in zip(grid, ("gpt", "llama"), strict=True):
        arrays = report.arrays(f"hessian-{model}-100")
        exact, nodes, weights = arrays["eigenvalues"], arrays["slq_nodes"], arrays["slq_weights"]
        sigma = 0.01 * float(np.abs(exact).max())
        grid_points = np.linspace(exact.min() - 5 * sigma, exact.max() + 5 * sigma, 600)

        def smooth(values: np.ndarray, mass: np.ndarray, at: np.ndarray = grid_points, s: float = sigma) -> np.ndarray:
            kernel = np.exp(-0.5 * ((at[:, None] - values[None]) / s) ** 2) / (s * math.sqrt(2 * math.pi))
            out: np.ndarray = kernel @ mass
            return out

        per_probe = np.stack([smooth(v, w) for v, w in zip(nodes, weights, strict=True)])
        mean, error = per_probe.mean(0), per_probe.std(0, ddof=1) / math.sqrt(len(per_probe))
        axes.semilogy(
            grid_points, smooth(exact, np.full(len(exact), 1 / len(exact))), color=COLOURS[6], lw=1.2, label="exact"
        )
        axes.semilogy(grid_points, mean, color=COLOURS[1], lw=1.2, ls="--", label=f"Lanczos, {len(nodes)} probes")
        axes.fill_between(
            grid_points, np.maximum(mean - 2 * error, 1e-9), mean + 2 * error, color=COLOURS[1], alpha=0.25
        )
        axes.set_ylim(1e-6 / sigma, 3 * float(mean.max()))
        axes.set_title(f"{TITLES[model]}, n = {len(exact):,}, 100 % of training")
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("density")
        axes.legend()
    save(figure, out, "08_spectra")
    return Caption(
        "08_spectra",
        "The spectrum, exactly and from matrix-vector products",
        "Density of all eigenvalues, smoothed by a Gaussian whose width is 1 % of the largest. Dashed: stochastic "
        f"Lanczos quadrature with {report.report['settings']['slq_steps']} steps; the band is two standard errors.",
    )


def block_spectra(report: HessianReport, out: Path) -> Caption:
    """Plot the spectra of a model's matrices and the distances between them."""
    figure, (curves, grid) = plt.subplots(2, 3, figsize=(12.6, 8.8), width_ratios=(1.2, 1.6, 0.7), height_ratios=(2, 3))
    for top, axes, model in zip(curves, grid, ("gpt", "llama", "mlp"), strict=True):
        _sorted_spectra(top, report, model)
        distances = report.report["js"][model]
        names = [name.removeprefix("transformer.").replace(".weight", "") for name in distances["names"]]
        image = axes.imshow(np.array(distances["distance"]), vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)
        axes.set_yticks(range(len(names)), names, fontsize=6.5)
        off = np.array(distances["distance"])[~np.eye(len(names), dtype=bool)]
        axes.set_title(f"{TITLES[model]}: mean {off.mean():.2f}")
        axes.grid(False)
    figure.colorbar(image, ax=grid, shrink=0.6, label="Jensen-Shannon distance")
    save(figure, out, "09_block_spectra")
    return Caption(
        "09_block_spectra",
        "Matrices of one model have different spectra",
        "Top: absolute eigenvalues of every matrix's diagonal block, largest first, relative to the largest. Each line "
        "is a matrix, coloured by role. Bottom: Jensen-Shannon distance between the eigenvalue densities of every pair "
        "of matrices at 100 % of training (0 is equal, 1 is disjoint). The mean over pairs is in each title. The "
        "classifier has only one pair.",
    )


def _sorted_spectra(axes: Axes, report: HessianReport, model: str) -> None:
    """Plot the eigenvalues of a model's diagonal blocks, largest first."""
    arrays, roles = report.arrays(f"hessian-{model}-100"), report.evidence.groupby("tensor").role.first()
    names = report.report["js"][model]["names"]
    palette = dict(zip(dict.fromkeys(roles[name] for name in names), ROLE_COLOURS, strict=False))
    for name in names:
        values = np.sort(np.abs(arrays[f"eig/{name}"]))[::-1]
        axes.semilogy(np.linspace(0, 1, len(values)), values / values[0], color=palette[roles[name]], lw=1)
    for role, colour in palette.items():
        axes.plot([], [], color=colour, label="output layer" if role == "HEAD" else role.lower().replace("_", " "))
    axes.set_ylim(1e-9, 2)
    axes.set_xlabel("rank / order of the block")
    axes.set_ylabel("|eigenvalue| / largest")
    axes.set_title(f"{TITLES[model]}: spectra of the blocks")
    axes.legend(fontsize=6.5, ncols=2)


def jensen(report: HessianReport, out: Path) -> Caption:
    """Plot the predicted cost of sharing, per role and unit."""
    figure, grid = plt.subplots(1, 2, figsize=(10.2, 5.6))
    for axes, model in zip(grid, ("gpt", "llama"), strict=True):
        table = report.by_role(model)
        positions = np.arange(len(table))
        chosen = report.report["rules"]["units"]
        colours = [COLOURS[1] if chosen[r.role] == r.unit else COLOURS[0] for r in table.itertuples()]
        axes.barh(positions, table.jensen, color=colours, height=0.7)
        axes.plot(table.jensen_null, positions, "|", color=COLOURS[6], ms=9, mew=1.5)
        axes.set_yticks(positions, [f"{role_name(r.role)} by {SHORT[r.unit]}" for r in table.itertuples()])
        axes.invert_yaxis()
        axes.set_title(TITLES[model])
        axes.set_xlabel("Jensen gap of v; rank one: Stein's loss (nats)")
    axes.plot([], [], "|", color=COLOURS[6], ms=9, mew=1.5, label="random partition of the same sizes")
    axes.barh([0], [0], color=COLOURS[1], label="chosen for the derived rules")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    save(figure, out, "10_jensen_gap")
    return Caption(
        "10_jensen_gap",
        "What sharing costs",
        "log(mean v) - mean(log v) inside the blocks of each candidate at 100 % of training (medians over layers). It "
        "is zero if Adam gives all elements of a block the same learning rate; half of it is the mean log ratio of "
        "learning rates. A bar as long as its tick is no better than a random partition. For rank one, the bar is "
        "Stein's loss, which is the Jensen gap where blocks share a scalar.",
    )


def training_check(report: HessianReport, out: Path) -> Caption:
    """Plot loss curves of the derived rules, the paper's rules and AdamW."""
    figure, grid = plt.subplots(1, 2, figsize=(9.6, 3.6))
    table = report.check
    for axes, model in zip(grid, ("gpt", "llama"), strict=True):
        for arm in ("elementwise", "adam_mini", "derived"):
            runs = table[(table.model == model) & (table.arm == arm)]
            curves = np.array(runs.loss.tolist())
            steps = runs.step.iloc[0]
            final = t_interval(runs.final.tolist())
            label = f"{'AdamW' if arm == 'elementwise' else arm}: {final.mean:.4f} ± {final.half:.4f}"
            axes.plot(steps, curves.mean(0), color=ARM_COLOURS[arm], label=label)
            axes.fill_between(steps, curves.min(0), curves.max(0), color=ARM_COLOURS[arm], alpha=0.15)
        axes.set_ylim(None, float(np.quantile([c[1] for c in table[table.model == model].loss], 0.9)))
        axes.set_title(TITLES[model])
        axes.set_xlabel("step")
        axes.set_ylabel("held-out loss (nats)")
        axes.legend(title=f"final, mean ± 95 % interval, n = {len(runs)}")
    save(figure, out, "11_training_check")
    return Caption(
        "11_training_check",
        "Do the rules train?",
        f"Held-out loss with the derived rules, the paper's rules and AdamW: mean over {len(runs)} seeds, band from "
        "smallest to largest. This is a sanity check on tiny models at one learning rate; the ablation compares arms.",
    )
