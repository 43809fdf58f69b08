"""Build the benchmark's tables and figures from its JSON files, one per processor.

python -m benchmarks.report [--results benchmarks/results/optimizer_step] [--add RUN.json ...] [--docs docs/speed.md]

--add copies the run of another machine into the results. It replaces an earlier run of that processor and no other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.bars import MAIN_CASE, Verdict, verdicts
from benchmarks.common import replace
from benchmarks.runs import COPY, RUNS, file_name, load, load_all

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BASELINE = "AdamW fused"
HEADER = (
    "optimizer",
    "median ms",
    "quartiles",
    "n",
    "x fused AdamW",
    "state B/param",
    "GB/s",
    "largest temporary",
    "peak of new bytes",
    "of all parameters",
)
INTRO = """# Speed of a step

Written by `python -m benchmarks.report --docs docs/speed.md` from `benchmarks/results/optimizer_step/`, which has one
file per processor. `make bench` measures this one; `make bench-quick` takes 75 seconds and writes to `out/bench/`.
`python -m benchmarks.report --add RUN.json --docs docs/speed.md` adds the file of another machine.

Optimizers are measured in heats. The optimizers of one heat step in turns, round after round, so that a disturbance
hits all of them. "x fused AdamW" is the median over rounds of the time divided by the time of torch's fused AdamW
in the same round and heat.

A step has to move the parameter twice, the gradient once and the state twice: 28 bytes per fp32 parameter for
AdamW, 20 for Adam-mini. GB/s is this least traffic divided by the time. Compare it with the plain copy of 256 MiB
in the same rounds.

The native step can go several ways through memory (`optimizer/step/engines/native/ways.py`): how many rows or columns
it takes at once, and how far ahead it prefetches. All give the same bits. In the first 80 steps of a group with 4M
elements or more it times them, and from then on it uses the fastest. The benchmark measures the steps after that;
the tables below are older and were measured with the defaults, which won on this Xeon in all cases. Without
prefetching, a step in fp32 took 1.05 times (GPT-2) to 1.18 times (Llama) as long; with too short a distance, a step in
int8 took 1.2 to 1.3 times as long (n = 5 steps of each way).

The native step of a factored second moment (`rules="factored"`) reads the gradient twice, because no element can move
before all means are known: 24 bytes per fp32 parameter, 6/7 of AdamW's 28.
The bars below have its times.

`make bench-deepspeed` compares with DeepSpeed's AdamW for the CPU, which ZeRO runs when it offloads the optimizer. On
the same processor and the 45M Llama (n = 25 rounds, quiet), `DeepSpeedCPUAdam` took 0.91 times as long as torch's fused
AdamW, Adam-mini 0.67 times with 4.01 bytes of state per parameter, and with an int8 first moment also 0.67 times with
1.04 bytes. Adam-mini thus has 1.4 times its speed, and is an 8-bit optimizer for the CPU. No AMD processor was at hand.

The same command trains that Llama inside ZeRO-2 with the optimizer offloaded, one rank, fp32 gradients, with every
optimizer in turns (`benchmarks/deepspeed_zero.py`; 25 steps; "engine" is all of `engine.step`). Ratios are medians over
the rounds. The losses of 27 steps with one seed do not rank the optimizers:

| optimizer | step, ms | x DeepSpeedCPUAdam | engine, x | state, bytes per parameter | mean of the last five losses |
|---|--:|--:|--:|--:|--:|
| DeepSpeedCPUAdam | 35.2 | 1.00 | 1.00 | 8.000 | 3.042 |
| Adam-mini | 28.7 | 0.80 | 0.91 | 4.008 | 3.064 |
| Adam-mini, int8 moment | 27.6 | 0.77 | 0.89 | 1.040 | 3.064 |
| Adam-mini, int4 moment | 30.6 | 0.88 | 0.96 | 0.571 | 3.065 |
| Adam-mini, factored | 34.9 | 1.01 | 1.00 | 4.012 | 3.065 |
| Adam-mini, factored, int8 moment | 46.2 | 1.29 | 1.10 | 1.044 | 3.065 |

Temporaries are what torch's CPU allocator hands out during one step, inside operations too (events of its
profiler). Memory that C++ code takes from malloc, kilobytes in the native loop, is not included. The columns give
the largest single temporary and the peak of all that are alive at one time, as shares of the largest tensor, and
then that peak as a share of all parameters.

A time counts only on a quiet machine. If other processes used more than a tenth of a core meanwhile, the bars say
so instead of passing or failing: two threads on two busy cores wait for each other, and the one that waits worse
loses.

No GPU was available, so the time of a step on CUDA is unmeasured. The machine code of the Triton kernels was checked
instead, for compute capability 8.0 and 9.0 (`tests/optimizer/test_triton_code.py`). Parameters, gradients and moments
move in accesses of 128 bits, if their ranges begin and end at multiples of 16 elements. An update moves 20 bytes per
fp32 element, or 28 with a second moment per element. Where sums of squares come first, as for factored second moments,
the gradient is read once more: 4 bytes. No register is spilled, but for 8 bytes in some forms of the kernel `rows`.
"""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [name, f"failed: {row['error'].replace('|', '/')}", *[""] * (len(HEADER) - 2)]
    timing = [f"{1e3 * row['median_s']:.2f}", f"{1e3 * row['q1_s']:.2f} to {1e3 * row['q3_s']:.2f}", str(row["n"])]
    if name == COPY:
        return ["a copy of 256 MiB", *timing, "", "", f"{row['gb_per_s']:.1f}", "", "", ""]
    shares = (row["largest_temporary_of_largest"], row["peak_of_largest"], row["peak_of_group"])
    return [
        name,
        *timing,
        f"{row['ratio']:.2f}",
        f"{row['state_bytes_per_parameter']:.3f}",
        f"{row['gb_per_s']:.1f}",
        *(f"{100 * share:.2f} %" for share in shares),
    ]


def case_text(name: str, case: dict[str, Any]) -> str:
    """Return one case as a Markdown section."""
    rows = case["rows"]
    count = next(row["parameters"] for row in rows.values() if "parameters" in row)
    order = [n for n in rows if n != COPY] + [n for n in rows if n == COPY]
    others = max(row.get("others_cores") or 0.0 for row in rows.values())
    return f"### {name}: {count / 1e6:.1f}M parameters (other processes: up to {others:.2f} cores)\n\n" + _table(
        HEADER, [_cells(n, rows[n]) for n in order]
    )


def bars_text(found: Sequence[Verdict]) -> str:
    """Return the verdicts on the bars as a Markdown table."""
    rows = [
        (
            v.bar.what,
            f"{v.bar.most:g} {v.bar.unit}",
            "" if v.value is None else f"{v.value:.3g} {v.bar.unit}",
            v.verdict,
        )
        for v in found
    ]
    return _table(("bar", "at most", "measured", "verdict"), rows)


def _startup_text(results: dict[str, Any]) -> str:
    start, over = results["startup"], results["overhead"]
    rows = [
        ("import torch", f"{start['import']['torch_s']:.2f} s", str(start["import"]["n"])),
        ("import optimizer, after torch", f"{1e3 * start['import']['optimizer_s']:.0f} ms", str(start["import"]["n"])),
        *(
            (f"first step of a 32-layer Llama, {words}", f"{start[kind]['first_s']:.2f} s", str(start[kind]["n"]))
            for kind, words in (("warm", "compiled before"), ("cold", "nothing compiled"))
        ),
        *(
            (f"{name}, per tensor of 8 elements", f"{over[name]['per_tensor']:.2f} us", str(over["n"]))
            for name in ("AdamMini fused", "AdamW fused")
        ),
    ]
    return "### Import, first step and Python overhead\n\n" + _table(("what", "median", "n"), rows)


def _head(results: dict[str, Any]) -> str:
    """Return a sentence on the machine and the run."""
    machine = results["machine"]
    return (
        f"Measured on {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, Python "
        f"{machine['python']}; load average {machine['load_average'][0]:.1f} before and "
        f"{results['machine_after']['load_average'][0]:.1f} after, {results['seconds'] / 60:.0f} minutes."
    )


def markdown(results: dict[str, Any]) -> str:
    """Return the report of one run: the machine, the bars, every case, and the start-up times."""
    sections = [_head(results), bars_text(verdicts(results)), *(case_text(n, c) for n, c in results["cases"].items())]
    return "\n\n".join([*sections, _startup_text(results)]) + "\n"


def page(runs: Mapping[str, dict[str, Any]]) -> str:
    """Return the page of the documentation: one section with the bars of each processor, and links to its tables.

    Args:
        runs: the result of ``runs.load_all``.
    """
    sections = []
    for name, results in runs.items():
        machine, files = results["machine"], f"../benchmarks/results/{RUNS.name}/{name}"
        sections += [
            f"## {machine['processor']}, {machine['cores']} cores",
            f"{_head(results)} Tables of all cases: [{name}.md]({files}.md).",
            bars_text(verdicts(results)),
            f"![Step times]({files}.png)",
        ]
    return "\n\n".join([INTRO.rstrip(), *sections]) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the ratios of one case as horizontal bars, and the ratios of this project's engines against model size."""
    name = MAIN_CASE if MAIN_CASE in results["cases"] else next(iter(results["cases"]))
    rows = {n: r for n, r in results["cases"][name]["rows"].items() if "error" not in r and n != COPY}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    names = sorted(rows, key=lambda n: rows[n]["ratio"], reverse=True)
    colours = ["#1f6f8b" if n.startswith("AdamMini") else "#c9b79c" for n in names]
    left.barh(names, [rows[n]["ratio"] for n in names], color=colours)
    left.axvline(1, color="black", linewidth=0.8)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # so that the line at 1 crosses no number
    for i, n in enumerate(names):
        label = f"{rows[n]['ratio']:.2f}"
        left.annotate(
            label, (rows[n]["ratio"], i), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=behind
        )
    left.set_xscale("log")
    left.set_xlabel("step time, multiples of torch's fused AdamW (log scale)")
    left.set_title(name, fontsize=10)
    left.margins(x=0.15)
    left.tick_params(axis="y", labelsize=8)
    cases = {n: c for n, c in results["cases"].items() if n.startswith("llama") and n.endswith("fp32 2 threads")}
    for contestant, marker in (("AdamMini fused", "o"), ("AdamMini fused, int8 moment", "s"), ("AdamMini eager", "^")):
        points = [
            (row["parameters"], row["ratio"]) for c in cases.values() if (row := c["rows"].get(contestant)) is not None
        ]
        if points:
            right.plot(*zip(*points, strict=True), marker=marker, label=contestant)
    right.axhline(1, color="black", linewidth=0.8)
    right.axhline(5 / 7, color="black", linewidth=0.8, linestyle=":")
    right.set_xscale("log")
    right.set_ylim(bottom=0)
    right.text(right.get_xlim()[1], 0.4, "dotted: 20 of 28 bytes moved ", fontsize=7, ha="right", va="top")
    right.set_ylabel("step time, multiples of fused AdamW")
    right.set_xlabel("parameters (Llama, fp32, 2 threads)")
    right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    temporary.replace(path)


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write a run, its report and its figure to a folder, and return the path of the run."""
    path = folder / f"{file_name(results['machine'])}.json"
    replace(path, json.dumps(results, indent=1) + "\n")
    replace(path.with_suffix(".md"), markdown(results))
    plot(results, path.with_suffix(".png"))
    return path


def main() -> None:
    """Build the reports of all processors and, with --docs, the page of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RUNS)
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="runs of other machines")
    parser.add_argument("--docs", type=Path, default=None)
    arguments = parser.parse_args()
    try:
        added = [load(path) for path in arguments.add]  # All are read before one is written.
        for results in added:
            write_report(results, arguments.results)
        runs = load_all(arguments.results)
    except (FileNotFoundError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    for results in runs.values():
        write_report(results, arguments.results)
    if arguments.docs is not None:
        replace(arguments.docs, page(runs))


if __name__ == "__main__":
    main()
