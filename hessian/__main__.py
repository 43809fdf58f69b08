"""Derive rules for a model of one's own: python -m hessian derive my_module:make_model --data my_module:batches

The model is trained for a short AdamW run on a copy, its second moments are compared with every form of sharing, and
the chosen rules are written to a file that ``AdamMini(model, rules="rules.json")`` takes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizer.partition import Role, Rules, Unit, discover, layout_of
from optimizer.tools.targets import UserCodeError, call, load_target, resolve

from .derive import Evidence, derive
from .own_model import (
    Energy,
    Loss,
    Progress,
    Run,
    energies,
    evidence,
    predicted_cost,
    second_moments,
    unattainable,
)
from .parts import weight_parts


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a Hugging Face model computes of a dict, or the next-token loss of a tensor of tokens."""
    if isinstance(batch, dict):
        out = model(**batch)
        if getattr(out, "loss", None) is None:
            raise ValueError("--data yields dicts, but the model returned no loss; add labels, or give --loss")
        loss: Tensor = out.loss
        return loss
    if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.is_floating_point():
        raise ValueError(
            f"--data yields a {type(batch).__name__}; without --loss it must yield dicts for a Hugging Face model or "
            "integer tensors of tokens [rows, length]"
        )
    out = model(batch[:, :-1])
    logits = getattr(out, "logits", out)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def bar() -> Progress:
    """Return a progress bar with the time left; one line per stage where stderr is no terminal."""
    started: dict[str, float] = {}

    def show(done: int, total: int, what: str) -> None:
        stage = what.split(" of ")[0]
        begun = started.setdefault(stage, time.monotonic())
        left = (time.monotonic() - begun) / max(1, done) * (total - done)
        full = 30 * done // total
        line = f"{stage:16s} [{'#' * full}{'.' * (30 - full)}] {done}/{total}, {left:4.0f} s left"
        if sys.stderr.isatty():
            sys.stderr.write("\r" + line + ("\n" if done == total else ""))
        elif done == total:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    return show


def table(rules: Rules, found: Sequence[Energy]) -> str:
    """Return the choice of every role as text."""
    assert rules.evidence is not None
    lines = ["role                unit            gap, nats   z in v   candidates (gap)"]
    for role, choice in rules.evidence["choices"].items():
        if "candidates" not in choice:
            continue
        chosen = next(c for c in choice["candidates"] if c["unit"] == choice["unit"])
        others = ", ".join(f"{c['unit']} {c['jensen']:.3f}" for c in choice["candidates"] if c is not chosen)
        lines.append(f"{role:19s} {choice['unit']:15s} {chosen['jensen']:9.3f} {chosen['z']:8.1f}   {others}")
    if found:
        lines.append(
            "\nShare of each matrix's squared Hessian inside blocks, and what blocks of that size hold by chance:"
        )
        lines += [f"{e.part:45s} {e.unit:15s} {e.share:6.3f} +- {e.stderr:.3f}   {e.by_size:.4f}" for e in found]
    return "\n".join(lines)


def _derive(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    run, model, progress = Run(arguments.steps, arguments.lr), load_target(arguments.target), bar()
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"target {arguments.target!r} has no weights; give module:attribute of a model that has")
    data = resolve(arguments.data, "--data")
    batches = call(data, arguments.data, "--data") if callable(data) else data
    if iter(batches) is batches:  # A generator could not be begun anew.
        batches = list(itertools.islice(batches, run.steps))
    loss: Loss = resolve(arguments.loss, "--loss") if arguments.loss else default_loss
    moments, trained = second_moments(model, loss, batches, run, progress)
    rows = evidence(model, moments, seed=arguments.seed, name=arguments.target, progress=progress)
    provenance = {"lr": run.lr, "steps": run.steps, "seed": arguments.seed, "torch": torch.__version__}
    rules, fused = _attainable(model, rows, Path(arguments.out).stem, provenance, set(arguments.without))
    found: list[Energy] = []
    if arguments.probes:
        probed = list(itertools.islice(iter(batches), arguments.probe_batches))
        found = energies(
            trained.eval(), loss, probed, weight_parts(trained), probes=arguments.probes, progress=progress
        )
    rules.save(arguments.out)
    sys.stdout.write(_report(rules, model, found, fused, arguments.out))


def _attainable(
    model: nn.Module, rows: Sequence[Evidence], name: str, provenance: Any, without: set[Unit]
) -> tuple[Rules, list[str]]:
    """Derive rules that the model's fused tensors can follow.

    Returns:
        (the rules; a line for every role that would have had another unit in tensors of its own).
    """
    barred: set[Unit | tuple[Role, Unit]] = set(without)
    wanted: dict[Role, str] = {}
    while True:
        rules = derive(rows, name=name, provenance=provenance, without=barred)
        more = unattainable(model, rules)
        if not more.keys() - wanted.keys():
            break
        wanted |= more
        barred |= {(role, Unit.IN_NEURON) for role in more}
    assert rules.evidence is not None
    lines = []
    for role, tensor in wanted.items():
        asked = [row for row in rows if (row.role, row.unit) == (role.value, Unit.IN_NEURON.value)]
        gap = sum(row.n_params * row.jensen for row in asked) / sum(row.n_params for row in asked)
        got = rules.evidence["choices"][role.value].get("predicted_cost")
        cost = "was not measured" if got is None else f"has gap {got:.3f}"
        lines.append(
            f"{role.value}: IN_NEURON (gap {gap:.3f}) is not possible in {tensor}, whose other parts do not share "
            f"inputs; {rules[role].value} {cost}. FACTORED has no such limit.\n"
        )
    return rules, lines


def _report(rules: Rules, model: nn.Module, found: Sequence[Energy], fused: Sequence[str], out: Path) -> str:
    """Return what the command prints."""
    assert rules.evidence is not None
    scalars = sum(layout_of(anatomy, rules).n_blocks for anatomy in discover(model).values())
    parameters = sum(p.numel() for p in model.parameters())
    estimate, low, high = predicted_cost(rules.evidence["choices"])
    return (
        f"{table(rules, found)}\n{''.join(fused)}\n{scalars:,} second-moment scalars for {parameters:,} parameters "
        f"({100 * scalars / parameters:.2f} %).\nPredicted cost against AdamW: {estimate:.4f} nats, between {low:.4f} "
        f"and {high:.4f}, without the token embedding.\nIts slope was fitted to models of 0.13M parameters after 150 "
        f"steps; docs/role_study.md says what it cannot predict.\nWritten to {out}: "
        f"AdamMini(model, rules={str(out)!r})\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: with code 2 and one line on stderr for an argument that cannot be used, and with code 1 if the
            user's code raised an error, after its traceback.
    """
    parser = argparse.ArgumentParser(prog="python -m hessian", description=__doc__.splitlines()[0])
    command = parser.add_subparsers(required=True).add_parser("derive", help="write rules for a model of your own")
    command.add_argument("target", help="module:attribute of a model, or of a function that makes one")
    command.add_argument("--data", required=True, help="module:attribute of batches or of a function")
    command.add_argument(
        "--loss", help="module:attribute of loss(model, batch); default: the model's own, or next token"
    )
    command.add_argument("--lr", type=float, default=3e-3, help="the peak learning rate of your training (3e-3)")
    command.add_argument("--steps", type=int, default=200, help="steps of the AdamW run (200)")
    command.add_argument("--without", nargs="*", type=Unit, default=[], help="units that must not be chosen: FACTORED")
    command.add_argument("--probes", type=int, default=0, help="probes of the curvature per unit; 0 for none (0)")
    command.add_argument("--probe-batches", type=int, default=1, help="batches whose curvature is probed (1)")
    command.add_argument("--seed", type=int, default=0, help="seed of shuffles and probes (0)")
    command.add_argument("--out", type=Path, default=Path("rules.json"), help="where to write the rules (rules.json)")
    command.set_defaults(run=_derive)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserCodeError as error:
        traceback.print_exception(error.__cause__)
        sys.stderr.write(f"{error}\n")
        raise SystemExit(1) from error
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"python -m hessian: error: {error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
