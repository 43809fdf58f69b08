"""Compare stochastic Lanczos quadrature with that of other libraries: CPU time, and errors against float64.

    make bench-peers
    python -m benchmarks.hessian_peers [--steps 80] [--probes 1] [--rounds 5] [--docs docs/hessian_peers.md]

Every library runs the same number of Lanczos steps and probes on the same batch, on one thread. Times are those of the
processor, so that other processes disturb them less; rounds of the libraries are interleaved. ``--docs`` writes the
page from the results alone and measures nothing.

Errors come from a model so small that its Hessian is known in float64. Every library computes in float32 there. Two
errors are told apart: that of the quadrature, for the start vectors that the library drew, and that of the density of
eigenvalues, which also has the noise of the probes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import RESULTS, OtherProcesses, replace, write
from experiments.models import GPTConfig, LlamaConfig, build

logger = logging.getLogger("benchmarks")
MODELS = {"GPT style": GPTConfig(block_size=64), "Llama style": LlamaConfig()}
"""Models that are timed; both have about 0.86M parameters."""
TINY = {
    "GPT style": GPTConfig(vocab=8, block_size=16, n_embd=8, n_layer=1, n_head=2),
    "Llama style": LlamaConfig(vocab=8, dim=8, n_layers=2, n_heads=2, n_kv_heads=1, hidden=24),
}
"""Models whose Hessian is computed in full."""
INTRO = """# Spectra beside other libraries

Written by `make bench-peers` from `benchmarks/results/hessian_peers.json`.

Stochastic Lanczos quadrature with {steps} steps and {probes} probes, float32, one batch of {rows} x {length} tokens.
CPU time on one thread, {rounds} interleaved rounds, {processor}, {cores} cores, torch {torch}. Other processes used
{busy:.1f} cores meanwhile.

{versions}. Every library computes with torch's math kernel of attention, because the fused ones have no second
derivative. Times include the construction of the operator, and with it our checks. PyHessian runs on a single batch,
where it keeps the graph of the gradient; it needs `torch.eig`, which torch has removed, and gets a replacement.
curvlinops does not make its Lanczos vectors orthogonal again. Its products use torch's forward mode, which in 2.13
drops terms of LayerNorm's second derivative (the error of its products below), and has no rule for the gradient of
SiLU, so that it fails on models in Llama style.

- **product**: error of one product, relative to ours in float64.
- **quadrature**: L1 error of the smoothed density (sigma is 1 % of the spectrum) on a model whose Hessian is known in
  float64, against the exact density for the same start vectors. Median over {seeds} seeds.
- **density**: the same against the density of all eigenvalues, which adds the noise of the probes.
"""
OURS, PYHESSIAN, CURVLINOPS, EIGENTHINGS = "adam-mini-lab", "PyHessian", "curvlinops", "hessian-eigenthings"
PACKAGES = {PYHESSIAN: "pyhessian", CURVLINOPS: "curvlinops-for-pytorch", EIGENTHINGS: "hessian-eigenthings"}
Quadrature = tuple[Tensor, Tensor]
"""Nodes and weights, float64 [probes, steps] each."""


class Flat(nn.Module):
    """A language model with the tokens of all rows in one axis, the form that every library takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens, int64 [B, T], to logits [B * T, vocab]."""
        out: Tensor = self.model(tokens).flatten(0, 1)
        return out


def subject(config: Any, rows: int, length: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a model and one batch, (tokens [B, T], next tokens [B * T])."""
    windows = torch.randint(0, config.vocab, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return Flat(build(config, 0)), (windows[:, :-1].contiguous(), windows[:, 1:].flatten())


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def _ours(model: nn.Module, batch: Any, steps: int, probes: int, seed: int) -> Quadrature:
    from hessian import HessianOperator, slq

    found = slq(HessianOperator(model, loss_of, None, [batch]), steps, probes, seed)
    return found.nodes, found.weights


def _pyhessian(model: nn.Module, batch: Any, steps: int, probes: int, seed: int) -> Quadrature:
    """Run PyHessian on a single batch, where it keeps the graph of the gradient."""
    from pyhessian import hessian

    def eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    model.zero_grad(set_to_none=True)
    with mock.patch.object(torch, "eig", eig, create=True):  # torch has removed it
        torch.manual_seed(seed)
        nodes, weights = hessian(model, F.cross_entropy, data=batch, cuda=False).density(iter=steps, n_v=probes)
    model.zero_grad(set_to_none=True)
    return torch.tensor(nodes, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


def _curvlinops(model: nn.Module, batch: Any, steps: int, probes: int, seed: int) -> Quadrature:
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [batch], check_deterministic=False
    )
    torch.manual_seed(seed)
    pairs = [fast_lanczos(operator, steps) for _ in range(probes)]
    return torch.stack([v.double() for v, _ in pairs]), torch.stack([x[0].double().square() for _, x in pairs])


def _eigenthings(model: nn.Module, batch: Any, steps: int, probes: int, seed: int) -> Quadrature:
    from hessian_eigenthings import HessianOperator
    from hessian_eigenthings.algorithms.spectral_density import spectral_density

    operator = HessianOperator(model, [batch], loss_of)
    found = spectral_density(
        operator, num_runs=probes, lanczos_steps=steps, num_grid_points=16, seed=1000 * seed
    )  # run i has the seed 1000 * seed + i
    return found.raw_eigenvalues.double().nan_to_num(), found.raw_weights.double()


LIBRARIES: dict[str, Callable[[nn.Module, Any, int, int, int], Quadrature]] = {
    OURS: _ours, PYHESSIAN: _pyhessian, CURVLINOPS: _curvlinops, EIGENTHINGS: _eigenthings,
}  # fmt: skip


def starts(library: str, n: int, sizes: Sequence[int], probes: int, steps: int, seed: int) -> Tensor:
    """Return the start vectors that a library draws from a seed, float64 [probes, n]."""
    if library == OURS:
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8) for _ in range(probes)]
    elif library == EIGENTHINGS:
        rows = [
            torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(1000 * seed + run))
            for run in range(probes)
        ]
    else:
        torch.manual_seed(seed)
        if library == CURVLINOPS:
            return torch.stack([torch.randn(n) for _ in range(probes)]).double()
        rows = [torch.cat([torch.randint_like(torch.empty(size), high=2) for size in sizes]) for _ in range(probes)]
    return torch.stack(rows).double() * 2 - 1


def timed(config: Any, arguments: argparse.Namespace, libraries: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return each library's CPU times of one density, with those of one gradient beside them."""
    model, batch = subject(config, arguments.rows, arguments.length)
    parameters = list(model.parameters())
    calls: dict[str, Callable[[], Any]] = {
        "one gradient": lambda: torch.autograd.grad(loss_of(model, batch), parameters)
    }
    for name in libraries:
        calls[name] = lambda name=name: LIBRARIES[name](model, batch, arguments.steps, arguments.probes, 0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(arguments.rounds):
        for name, call in calls.items():
            start = time.process_time()
            with sdpa_kernel(SDPBackend.MATH):
                call()
            seconds[name].append(time.process_time() - start)
            logger.info("round %d: %s took %.2f s", number, name, seconds[name][-1])
    products = arguments.steps * arguments.probes
    ours, gradient = (statistics.median(seconds[name]) for name in (OURS, "one gradient"))
    return {
        name: {
            "seconds": values,
            "median_s": statistics.median(values),
            "times_ours": statistics.median(values) / ours,
            "gradients_per_product": statistics.median(values) / products / gradient,
        }
        for name, values in seconds.items()
        if name in LIBRARIES
    }


def product_errors(config: Any, arguments: argparse.Namespace, libraries: Sequence[str]) -> dict[str, float]:
    """Return the relative error of every library's float32 product with one vector, against ours in float64."""
    from hessian import HessianOperator

    model, batch = subject(config, arguments.rows, arguments.length)
    v = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(2))
    found: dict[str, Tensor] = {}
    with sdpa_kernel(SDPBackend.MATH):
        for name in libraries:
            try:
                found[name] = _product(name, model, batch, v)
            except (RuntimeError, NotImplementedError) as error:  # curvlinops has no product of a model with SiLU
                logger.info("%s fails: %s", name, error)
        wanted = HessianOperator(model.double(), loss_of, None, [batch]) @ v.double()
    return {name: float((product.double() - wanted).norm() / wanted.norm()) for name, product in found.items()}


def _product(name: str, model: nn.Module, batch: Any, v: Tensor) -> Tensor:
    parameters = list(model.parameters())
    if name == OURS:
        from hessian import HessianOperator

        return HessianOperator(model, loss_of, None, [batch]) @ v
    if name == CURVLINOPS:
        from curvlinops import HessianLinearOperator

        loss = nn.CrossEntropyLoss()
        return HessianLinearOperator(model, loss, parameters, [batch], check_deterministic=False) @ v
    if name == EIGENTHINGS:
        from hessian_eigenthings import HessianOperator as Eigenthings

        return Eigenthings(model, [batch], loss_of).matvec(v)
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    model.zero_grad(set_to_none=True)
    runner = hessian(model, F.cross_entropy, data=batch, cuda=False)
    parts = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
    product = torch.cat([x.flatten() for x in hessian_vector_product(runner.gradsH, runner.params, parts)])
    model.zero_grad(set_to_none=True)
    return product


def errors(config: Any, arguments: argparse.Namespace, libraries: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the errors of every library's density on a tiny model, medians over seeds."""
    from hessian import HessianOperator, dense

    model, batch = subject(config, 32, 16)
    sizes = [p.numel() for p in model.parameters()]
    values, vectors = torch.linalg.eigh(dense(HessianOperator(model.double(), loss_of, None, [batch])))
    model.float()
    span = float(values[-1] - values[0])
    grid = torch.linspace(float(values[0]) - 0.1 * span, float(values[-1]) + 0.1 * span, 2000, dtype=torch.float64)
    sigma, width = span / 100, float(grid[1] - grid[0])

    def density(nodes: Tensor, weights: Tensor) -> Tensor:
        kernel = torch.exp(-0.5 * ((grid - nodes[:, None]) / sigma).square()) / (sigma * math.sqrt(2 * math.pi))
        return weights @ kernel

    whole = density(values, torch.full_like(values, 1 / len(values)))
    rows: dict[str, dict[str, list[float]]] = {name: {"quadrature": [], "density": []} for name in libraries}
    for seed in range(arguments.seeds):
        for name in libraries:
            with sdpa_kernel(SDPBackend.MATH):
                nodes, weights = LIBRARIES[name](model, batch, arguments.steps, arguments.probes, seed)
            drawn = starts(name, len(values), sizes, arguments.probes, arguments.steps, seed)
            exact = ((drawn / drawn.norm(dim=1, keepdim=True)) @ vectors).square().mean(0)
            found = density(nodes.flatten(), weights.flatten() / arguments.probes)
            rows[name]["quadrature"].append(float((found - density(values, exact)).abs().sum()) * width)
            rows[name]["density"].append(float((found - whole).abs().sum()) * width)
    return {name: {what: statistics.median(each) for what, each in row.items()} for name, row in rows.items()}


def page(document: dict[str, Any]) -> str:
    """Return the page with the tables of the results."""
    options, machine = document["options"], document["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    lines = [
        INTRO.format(
            **options, versions=versions, processor=machine["processor"], cores=machine["cores"],
            torch=machine["torch"], busy=document["other_processes_cores"],
        )
    ]  # fmt: skip
    for title, model in document["models"].items():
        times = model["times"]
        fastest = min(row["times_ours"] for library, row in times.items() if library != OURS)
        lines += [
            f"## {title}, {model['parameters']:,} parameters",
            "",
            "| library | seconds (median) | x ours | gradients per product | product | quadrature | density |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {library} | {row['median_s']:.1f} | {row['times_ours']:.2f} | {row['gradients_per_product']:.2f} | "
                f"{model['products'][library]:.0e} | {model['errors'][library]['quadrature']:.0e} | "
                f"{model['errors'][library]['density']:.2f} |"
                for library, row in times.items()
            ),
            "",
            *(f"{name} fails on this model." for name in LIBRARIES if name not in times),
            f"The fastest other library takes {fastest:.2f} times as long as ours.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and write ``benchmarks/results/hessian_peers.json``, or the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="Lanczos steps of every probe")
    parser.add_argument("--probes", type=int, default=1, help="start vectors")
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch that is timed")
    parser.add_argument("--length", type=int, default=64, help="tokens of each row")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which every library is timed once")
    parser.add_argument("--seeds", type=int, default=10, help="seeds of the comparison with the known spectrum")
    parser.add_argument("--docs", type=Path, help="write this page from the results and measure nothing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.docs:
        replace(arguments.docs, page(json.loads((RESULTS / "hessian_peers.json").read_text())))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    others, models = OtherProcesses(), {}
    for name, config in MODELS.items():
        products = product_errors(config, arguments, list(LIBRARIES))
        models[name] = {
            "parameters": sum(p.numel() for p in build(config, 0).parameters()),
            "products": products,
            "errors": errors(TINY[name], arguments, list(products)),
            "times": timed(config, arguments, list(products)),
        }
        logger.info("%s: %s", name, json.dumps(models[name]))
        document = {
            "versions": {library: version(package) for library, package in PACKAGES.items()},
            "options": {k: v for k, v in vars(arguments).items() if k != "docs"},
            "other_processes_cores": others.cores(),
            "models": models,
        }
        logger.info("written to %s", write("hessian_peers", document))


if __name__ == "__main__":
    main()
