"""The tables of docs/real_model.md, from stored results."""

from __future__ import annotations

import math
import re

from analysis import real_model
from analysis.real_model import Number, Study
from analysis.role_study import WHOLE_SETS
from paper_figures.style import role_name

NOTE = "SmolLM2-135M-Instruct, 4-bit weights de-quantised to fp32."
MATRICES = {"H": "H (Hessian)", "G": "G (Gauss-Newton)"}
SETS = ("adam_mini", "derived_blocks")


def short(name: str) -> str:
    """Shorten a parameter's name: layers.29.self_attn.q_proj; "embedding" and "last norm" outside of layers."""
    if "embed" in name:
        return "embedding"
    if name in ("model.norm.weight", "norm.weight"):
        return "last norm"
    return re.sub(r"^model\.|\.weight", "", name)


def number(x: Number, digits: int = 3) -> str:
    """Return value ± standard error with the digits that the error allows."""
    if not math.isfinite(x.stderr):
        return f"{x.value:.{digits}g}"
    if x.value == 0 or abs(x.value) >= 1e-3:
        places = max(0, min(6, 1 - math.floor(math.log10(x.stderr)))) if x.stderr > 0 else digits
        return f"{x.value:.{places}f} ± {x.stderr:.{places}f}"
    return f"{x.value:.1e} ± {x.stderr:.0e}"


def interval(x: Number) -> str:
    """Return the 95 % interval."""
    return f"{x.low:.3g} to {x.high:.3g}" if math.isfinite(x.half) else "–"


def _seen(share: Number, control: Number) -> str:
    return "yes" if share.low > 2 * control.value else "no"


def _table(*header: str) -> list[str]:
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def whole_table(study: Study) -> list[str]:
    """Return the shares of the whole model."""
    lines = _table("matrix", "text", "blocks", "n", "share inside", "95 %", "by chance", "seen (R1)", "relative error")
    for text in sorted({d["task"]["text"] for d in study.of("energy", target="model")}):
        for matrix in "HG":
            if (document := study.one("energy", matrix=matrix, target="model", text=text)) is not None:
                n = str(len(document["samples"]))
                for r in real_model.energy(document).itertuples():
                    cells = (number(r.share), interval(r.share), f"{r.control.value:.1e}", _seen(r.share, r.control))
                    lines.append(_row(matrix, str(text), r.partition, n, *cells, number(r.error)))
    for matrix in "HG":
        document = study.one("columns", matrix=matrix)
        found = None if document is None else real_model.layer_map(document)
        if found is not None:
            chance = found.chance(study.one("energy", matrix=matrix, target="model", text=0))
            seen = _seen(found.share, Number(chance, 0, 1))
            cells = (number(found.share), interval(found.share), f"{chance:.1e}", seen)
            error = number(real_model.relative_error(found.share))
            lines.append(_row(matrix, "0", "layer", f"{found.probes} per layer", *cells, error))
    return lines


def place_table(study: Study) -> list[str]:
    """Return in the rows of which roles the squared norm lies."""
    lines = _table("matrix", "role", "parameters", "share of the parameters", "share of the squared norm")
    for document in study.of("columns"):
        if real_model.layer_map(document) is not None:
            found = real_model.by_role(document)
            total = sum(size for size, _ in found.values())
            for role, (size, share) in found.items():
                place = (document["task"]["matrix"], role_name(role))
                lines.append(_row(*place, f"{size:,}", f"{size / total:.5f}", number(share)))
    return lines


def role_table(study: Study) -> list[str]:
    """Return, for H and G of every role's tensors by themselves, the shares of their own squared norm inside blocks.

    Roles whose tensors' own squared norm is not known to a third are left out: the noise of the other tensors hides it.
    """
    lines = _table("matrix", "role", "element", "column", "row", "by chance: column, row")
    for matrix in "HG":
        document = study.one("energy", matrix=matrix, target="model", text=0)
        if document is not None:
            for role in dict.fromkeys(p["role"] for p in document["facts"]["parameters"] if p["role"] != "NORM"):
                own = real_model.energy(document, (role,)).set_index("partition").share["tensor"]
                if own.value < 3 * own.stderr:
                    continue
                found = real_model.energy(document, (role,), of="tensor").set_index("partition")
                cells = [number(found.share[p]) for p in ("element", "column", "row")]
                chance = ", ".join(f"{found.control[p].value:.1e}" for p in ("column", "row"))
                lines.append(_row(matrix, role_name(role), *cells, chance))
    return lines


def matrix_table(study: Study) -> list[str]:
    """Return the shares of single matrices of the chosen layers; bold where a partition is seen."""
    blocks = ("element", "column", "row", "head", real_model.CONTROL)
    lines = _table("weights", "", "n", *blocks[:-1], "random, sizes of row", "by chance: column, row, head")
    for document in study.of("matrices"):
        for name, part in real_model.matrices(document).groupby("name", sort=False):
            found = part.set_index("partition")
            cells = []
            for block in blocks:
                text = number(found.share[block]) if block in found.index else "–"
                seen = block in blocks[1:4] and block in found.index
                seen = seen and _seen(found.share[block], found.control[block]) == "yes"
                cells.append(f"**{text}**" if seen else text)
            chance = ", ".join(f"{found.control[x].value:.1e}" for x in blocks[1:4] if x in found.index)
            lines.append(_row(short(name), document["task"]["matrix"], str(part.n.iloc[0]), *cells, chance))
    return lines


def between_table(study: Study) -> list[str]:
    """Return how much of a layer's squared norm lies inside its matrices' own blocks."""
    lines = _table("layer", "matrix", "share inside the seven matrices", "95 %", "relative error")
    for document in study.of("matrices"):
        share = real_model.between_matrices(document)
        if share is not None:
            place = (document["task"]["target"], document["task"]["matrix"])
            lines.append(_row(*place, number(share), interval(share), number(real_model.relative_error(share))))
    return lines


def contrast_table(study: Study) -> list[str]:
    """Return the contrasts of the maps: heads of a role, and the same neurons against others."""
    head = ("RMS entry inside over outside", "at least 2 (R3)", "share of the squared norm inside", "by chance")
    lines = _table("map", "matrix", "blocks", *head)
    for kind in ("heads", "neurons"):
        contrasts = real_model.head_contrasts if kind == "heads" else real_model.neuron_contrasts
        for document in study.of(kind):
            for name, x in contrasts(real_model.block_map(document)).items():
                what = role_name(name) if kind == "heads" else name
                seen = "yes" if x.value - 2 * x.stderr >= 2 else "no"
                place = (f"{kind} of {document['task']['target']}", document["task"]["matrix"])
                share = real_model.head_shares(real_model.block_map(document)).get(name)
                # Heads of equal size: by chance, one in so many, without the diagonal.
                shares = ("–", "–") if share is None else (number(share), f"{1 / (share.freedom + 1):.2f}")
                lines.append(_row(*place, what, number(x), seen, *shares))
    return lines


def token_table(study: Study) -> list[str]:
    """Return the share of the embedding's squared norm in the rows of the text's tokens, and the RMS entries."""
    lines = _table(
        "matrix", "group of tokens", "tokens' parameters", "share of the squared norm", "RMS entry of the group's block"
    )
    for document in study.of("tokens"):
        found = real_model.block_map(document)
        total, rms = found.mean.sum(), found.rms.diagonal()
        shares, variances = found.mean.sum(1) / total, (found.stderr**2).sum(1)
        # A row and the rest of the map, as two numbers with errors of their own.
        rest = variances.sum() - variances
        errors = ((1 - shares) ** 2 * variances + shares**2 * rest) ** 0.5 / total
        relative = 0.5 * found.stderr.diagonal() / found.mean.diagonal()
        for i, label in enumerate(found.labels):
            share = number(Number(float(shares[i]), float(errors[i]), 1))
            entry = f"{rms[i]:.1e} ± {rms[i] * relative[i]:.0e}"
            lines.append(_row(document["task"]["matrix"], label, f"{int(found.sizes[i]):,}", share, entry))
    return lines


def spectrum_table(study: Study) -> list[str]:
    """Return a summary of every spectrum."""
    lines = _table(
        "block", "matrix", "order", "mean eigenvalue", "largest Ritz value", "least", "squared norm in negative ones"
    )
    for document in sorted(study.of("spectrum"), key=lambda d: (d["task"]["target"], d["task"]["matrix"] == "G")):
        s = real_model.spectrum(document)
        mean = s.mean()
        ends = (f"{s.nodes.max():.3g}", f"{s.nodes.min():.2g}")
        cells = (f"{mean.value:.2e} ± {mean.stderr:.0e}", *ends, number(s.negative()))
        lines.append(_row(short(document["task"]["target"]), document["task"]["matrix"], f"{s.order:,}", *cells))
    return lines


def gap_table(study: Study) -> list[str]:
    """Return what each form of sharing loses on the second moments, by role."""
    table, chosen = real_model.gaps(real_model.evidence(study)), real_model.choices(study)
    seeds = list(chosen)
    lines = _table(
        "role",
        "unit",
        "scalars per parameter",
        "gap ± error over layers",
        *(f"seed {s}" for s in seeds),
        "least z",
        "chosen by",
    )
    for r in table.itertuples():
        by = [name for name in SETS if WHOLE_SETS[name].get(r.role) == r.unit]
        by += [f"derive, seed {s}" for s in seeds if chosen[s].get(r.role) == r.unit]
        cells = [f"{r.seeds[s]:.4f}" for s in seeds]
        lines.append(
            _row(role_name(r.role), r.unit, f"{r.scalars:.1e}", number(r.gap), *cells, f"{r.z:.0f}", ", ".join(by))
        )
    return lines


def rule_table(study: Study) -> list[str]:
    """Return, by role, how the units of the rule sets differ in gap."""
    table, chosen = real_model.evidence(study), real_model.choices(study)
    lines = _table(
        "role",
        "adam_mini",
        "derived_blocks",
        "derive here",
        "derived_blocks − adam_mini",
        "derive here − adam_mini",
        "differ (R4)",
    )
    for role in dict.fromkeys(table.role):
        units = [
            WHOLE_SETS["adam_mini"].get(role),
            WHOLE_SETS["derived_blocks"].get(role),
            next(iter(chosen.values())).get(role),
        ]
        cells, differ = [], []
        for other in units[1:]:
            if None in (units[0], other) or other == units[0]:
                cells.append("same")
                differ.append("–")
            else:
                x, yes = real_model.difference(table, role, other, units[0])
                cells.append(number(x))
                differ.append("yes" if yes else "no")
        lines.append(_row(role_name(role), *(str(u) for u in units), *cells, ", ".join(differ)))
    return lines


def made_of(study: Study) -> str:
    """Return the machine, the time and the number of samples."""
    documents = list(study.documents.values())
    samples, machine = sum(len(d["samples"]) for d in documents), documents[0]["environment"]
    subject = documents[0]["subject"]
    return (
        f"{len(documents)} tasks with {samples} samples, {study.hours:.2f} hours of one thread of {machine['cores']} "
        f"shared {machine['machine']} cores beside other work, torch {machine['torch']}. Model: {subject['name']}, "
        f"weights {subject.get('weights', 'as trained')}. Numbers are estimates ± one standard error; n is the number "
        "of samples."
    )


def tables(study: Study) -> str:
    """Return all tables as Markdown; a table without results is left out."""
    parts = (
        ("energy", "Whole model, share of the squared Frobenius norm inside blocks:", whole_table),
        ("columns", "Where the squared norm of the whole model lies, by rows (text 0):", place_table),
        (
            "energy",
            "Single matrices, from the same samples, share of the squared norm of a matrix's own block:",
            role_table,
        ),
        ("matrices", "Matrices of one layer, each by itself (text 0); bold: seen by R1:", matrix_table),
        ("matrices", "The matrices of one layer together (text 0):", between_table),
        ("heads", "Maps (text 0, 2 probes per block):", contrast_table),
        ("tokens", "The embedding's own block, by groups of tokens (text 0):", token_table),
        ("spectrum", "Spectra of single blocks (text 0):", spectrum_table),
        ("moments", "Second moments of the AdamW run, by role:", gap_table),
        (
            "moments",
            "The units of the rule sets (differences of gaps, nats ± error over layers):",
            rule_table,
        ),
    )
    kinds = {document["task"]["kind"] for document in study.documents.values()}
    written = []
    for kind, intro, make in parts:
        lines = make(study) if kind in kinds else []
        if len(lines) > 2:
            written.append(f"{intro}\n\n" + "\n".join(lines))
    return "\n\n".join([made_of(study), *written])
