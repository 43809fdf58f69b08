"""Every code block of README.md and docs/*.md runs, and every link, path, module and make target in them exists.

A block that cannot run here is in ``NOT_RUN`` with the reason; a block that is in no list and fails, fails the test.
Numbers that a page repeats from another are compared with it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.settings import load_settings
from experiments.grids import BEST_RIVALS
from optimizer import AdamMini
from paper_figures import headline
from tests import forking
from tests.documents import PAGES, ROOT, Block, all_blocks, blocks_of, prelude, trainer_prelude, without_blocks

NOT_RUN = {
    # Python blocks, by a line that only they have
    "import deepspeed": "DeepSpeed is built by make interop, whose tests/interop/check_deepspeed.py does the same",
    "from lightning import": "Lightning is installed by make interop; tests/interop/check_lightning.py",
    "from torchtitan.models": "torchtitan is installed by make interop; tests/interop/check_torchtitan.py",
    # command lines, by their beginning
    "pip install .": "tests/test_wheel.py installs the wheel, without the registry",
    "pip wheel": "tests/test_wheel.py builds it, and compares the file's name",
    "make setup TORCH=cu128": "builds another environment",
    "make setup-workloads": "builds another environment",
    "make workloads": "minutes to hours in that environment; tests/experiments/test_growing.py runs a study's stages",
    "torchrun --nproc-per-node 2 -m experiments.train": "tests/workloads/check_pretraining.py runs both",
    "python -m experiments.train gcn-ogbn-arxiv": "needs data of a connected machine; tests/workloads/check_graphs.py",
    "make check-workloads": "needs that environment",
    "python -m paper_figures.workloads": "writes into the page; tests/paper_figures/test_workloads.py",
    "make gpu-check": "needs a GPU; tests/benchmarks/test_gpu_check.py runs the checks that a CPU can",
    "make gpu-dry-run": "tests/experiments/test_recipes.py",
    "pip install '.[data]'": "changes the environment",
    "python -m experiments.data.prepare": "needs the network; tests/experiments/test_prepare.py",
    "torchrun --nproc-per-node 8 -m experiments.train": "needs GPUs; tests/experiments/test_recipes.py",
    "make hessian": "minutes; tests/experiments/test_hessian_study.py does it with tiny sizes",
    "make test": "it is this suite",
    "python -m experiments.train byte-llama": "minutes to hours; tests/experiments/test_train.py runs a smaller config",
    "torchrun --nproc-per-node 2 --max-restarts 3 -m experiments.train": "tests/experiments/test_signals_and_kills.py",
    "python -m analysis show rivals_cpu": "reads the repository's results; tests/analysis/test_show.py reads others",
    "python -m experiments.rerun": "a minute; tests/experiments/test_rerun.py runs a smaller one again",
    "python -m experiments.studies.trajectories": "minutes; tests/experiments/test_trajectories.py takes a few steps",
    "python -m experiments.ablation": "hours, or a cluster; tests/experiments/test_signals_and_kills.py, test_slurm.py",
    "python -m pytest tests/experiments": "it is a part of this suite",
    "python -m tests.experiments.kills": "minutes; tests/experiments/test_signals_and_kills.py kills runs",
    "python -m tests.sharding.matrix": "minutes; tests/sharding/test_training.py trains on 2 and 3 ranks",
    "python -m paper_figures.suite": "writes into the page; tests/analysis/test_record.py writes into another",
    "python -m benchmarks.scaling": "minutes; tests/benchmarks/test_scaling.py checks 2 and 3 ranks",
    "pip uninstall adam-mini": "changes the environment; make interop does it in one of its own",
    "llamafactory-cli train": "LLaMA-Factory is installed by make interop; tests/interop/check_llamafactory.py",
}
BLOCKS = all_blocks()
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [
    (block, command) for block in BLOCKS if block.language == "bash" for command in block.commands()
]  # fmt: skip
PARTS = ("optimizer", "hessian", "experiments", "analysis", "paper_figures", "benchmarks", "tests", "examples", "docs",
         "results")  # fmt: skip


def reason(text: str) -> str | None:
    """Why a block or a command line is not run."""
    return next((why for key, why in NOT_RUN.items() if any(line.startswith(key) for line in text.splitlines())), None)


def run_block(block: Block, names: dict[str, Any]) -> None:
    """Execute a Python block among the given names; its lines are those of the page in a traceback."""
    exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)


@pytest.fixture
def names(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A fresh namespace with the page's prelude; the current directory is a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    if request.param == "docs/integrations.md":
        yield from trainer_prelude(tmp_path)
    else:
        yield prelude(tmp_path)
    torch.set_num_threads(threads)
    torch.set_rng_state(generator)


def _python_cases() -> list[Any]:
    return [pytest.param(b.page, b, id=str(b)) for b in PYTHON if reason(b.text) is None]


@pytest.mark.parametrize(("names", "block"), _python_cases(), indirect=["names"])
def test_python_block_runs(names: dict[str, Any], block: Block) -> None:
    run_block(block, names)


def test_a_block_that_is_wrong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks_of("text\n\n```python\nfrom hessian import slq\n\nslq(H).density(grid, sigma)\n```\n", "page.md")
    with pytest.raises(NameError, match="'H'") as error:
        run_block(block, prelude(tmp_path))
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno + 1) == ("page.md", 6)
    assert reason(block.text) is None


# ------------------------------------------------------------------------------------------------- command lines


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the prelude."""
    folder = tmp_path_factory.mktemp("shell")
    prelude(folder)
    return folder


def run(command: str, folder: Path) -> tuple[int, str]:
    """Run ``python -m ...`` in a folder, without a shell and without importing torch anew: exit status and output."""
    python, dash, module, *arguments = shlex.split(command)
    assert (python, dash) == ("python", "-m") and not set(command) & set("|&;<>$`*"), "this command needs a shell"
    with tempfile.NamedTemporaryFile("r") as output:
        status = forking.run_module(module, *arguments, output=Path(output.name), folder=folder).wait(timeout=240)
        return status, output.read()


@functools.cache
def help_of(module: str, *subcommand: str) -> str:
    """What a module's command line says of itself."""
    return run(shlex.join(["python", "-m", module, *subcommand, "--help"]), ROOT)[1]


def _shell_cases(*, run: bool) -> list[Any]:
    cases = {command: block for block, command in COMMANDS if (reason(command) is None) == run}
    return [pytest.param(command, id=f"{block} {command[:60]}") for command, block in cases.items()]


@pytest.mark.parametrize("command", _shell_cases(run=True))
def test_command_line_runs(command: str, workplace: Path) -> None:
    status, output = run(command, workplace)
    assert status == 0, output
    assert output.strip() or (workplace / "converted.pt").is_file()


@pytest.mark.parametrize("command", [c for c in _shell_cases(run=False) if " -m " in str(c.values[0])])
def test_long_command_line_has_only_options_that_exist(command: str) -> None:
    """What would take too long to run is compared with its ``--help``."""
    words = shlex.split(command)
    module, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    if module == "pytest":
        assert all((ROOT / word).exists() for word in rest)
        return
    subcommand = [word for word in rest[:1] if word[0] != "-"]
    text = help_of(module, *subcommand)
    assert text
    for option in (word for word in rest if word.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", text), f"{module} has no {option}"


def test_no_entry_of_the_list_is_stale() -> None:
    lines = [line for block in PYTHON for line in block.text.splitlines()] + [command for _, command in COMMANDS]
    assert [key for key in NOT_RUN if not any(line.startswith(key) for line in lines)] == []
    named = [path for why in NOT_RUN.values() for path in re.findall(r"tests/\S+\.py", why)]
    assert named and [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_is_in_fenced_blocks_of_a_known_language(path: Path) -> None:
    """An indented command line, or a fence without a language, would be run by nobody."""
    text = path.read_text(encoding="utf-8")
    assert {block.language for block in blocks_of(text, path.name)} <= {"python", "bash", "text", "json"}
    assert re.findall(r"^(?: {4,}|\t)(?:make|python|pip|torchrun|from|import)\b.*", without_blocks(text), re.M) == []


# ------------------------------------------------------------------------------------------- what the pages name


def _anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", without_blocks(path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(path.read_text(encoding="utf-8"))):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not file.startswith("http") and (not target.exists() or (anchor and anchor not in _anchors(target))):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_paths_modules_and_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = path.read_text(encoding="utf-8")
    missing = [f"make {name}" for name in re.findall(r"`make ([a-z-]+)", text) if name not in targets]
    for file in re.findall(rf"`((?:{'|'.join(PARTS)})/[\w./*-]+)`", without_blocks(text)):
        missing += [] if any(ROOT.glob(file.rstrip("/"))) else [file]
    for module in re.findall(rf"\b-m ((?:{'|'.join(PARTS)})[\w.]*)", text):
        missing += [] if importlib.util.find_spec(module.rstrip(".")) else [module]
    for name in re.findall(rf"`((?:{'|'.join(PARTS[:2])})(?:\.\w+)+)", without_blocks(text)):
        missing += [] if _resolves(name) else [name]
    assert missing == []


def _resolves(name: str) -> bool:
    """Whether a dotted name is a module, something in one, or an attribute of the variable ``optimizer``."""
    module, _, attribute = name.rpartition(".")
    if module == "optimizer" and (hasattr(AdamMini, attribute) or attribute == "param_groups"):
        return True
    try:
        return importlib.util.find_spec(name) is not None or hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return hasattr(importlib.import_module(module), attribute)


# ------------------------------------------------------------------------------------------------------- numbers


def _rows(path: Path, heading: str = "") -> dict[str, list[str]]:
    """First cell -> other cells of every table row below a heading."""
    text = path.read_text(encoding="utf-8")
    section = text[text.index(heading) :]
    rows = re.findall(r"^\| ([^|]+) \|(.*)\|$", section, re.M)
    return {first.strip(): [cell.strip() for cell in rest.split("|")] for first, rest in rows}


def test_the_memory_table_of_the_readme_is_that_of_its_page() -> None:
    readme, page = _rows(ROOT / "README.md", "## Memory"), _rows(ROOT / "docs/memory.md", "## Whole state")
    models = [name for name in readme if name in page and name != "model"]
    assert len(models) >= 4
    for model in models:
        adamw, _, _, *ours = page[model]
        assert readme[model] == [adamw, *ours]


def test_the_result_of_the_readme_is_that_of_its_page() -> None:
    readme, page = ROOT / "README.md", ROOT / "docs/training_results.md"
    elsewhere = _rows(page, "## Independent")
    ablation = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in _table(page, "| rules | scalars")}
    for name in ("derived_blocks", "adam_mini"):
        row = next(cells for first, cells in _rows(readme).items() if first.startswith(f"`{name}`"))
        assert row[0] == ablation[name][0].strip()
        mean, half = (float(number) for number in ablation[name][3].split("±"))
        assert row[1].strip("*") == f"{mean:+.3f} ± {half:.3f}"
        assert row[3].strip("*") == elsewhere[name][0]


def _table(path: Path, header: str) -> list[str]:
    """The rows of the table that begins with a header."""
    text = path.read_text(encoding="utf-8")
    return text[text.index(header) :].split("\n\n")[0].splitlines()[2:]


def test_the_ablation_tables_are_those_of_the_runs() -> None:
    from analysis.ablation import load_runs
    from paper_figures.ablation import tables

    page = (ROOT / "docs/training_results.md").read_text(encoding="utf-8")
    rows = [row for row in tables(load_runs(ROOT / "results/ablation_cpu")).splitlines() if "±" in row]
    assert len(rows) == 17 and [row for row in rows if row not in page] == []


def test_the_carry_over_tables_are_those_of_the_runs() -> None:
    from analysis.ablation import load_runs, paired_difference

    runs = load_runs(ROOT / "results/carry_over_cpu")
    text = (ROOT / "docs/training_results.md").read_text(encoding="utf-8")
    for against, arms in (
        ("elementwise", ("factored", "derived", "derived_blocks", "adam_mini")),
        ("adam_mini", ("factored", "derived", "derived_blocks")),
    ):
        for arm in arms:
            found = [paired_difference(runs, arm, lr=lr, against=against) for lr in (3e-3, 1e-2)]
            cells = " | ".join(f"{d.mean:+.4f} ± {d.half:.4f}" for d in found if d is not None and d.n == 8)
            assert re.search(rf"^\| `{arm}` \|.*{re.escape(cells)} \|$", text, re.M), (arm, against, cells)
            if against == "elementwise" and found[0] is not None:
                row = next(cells for first, cells in _rows(ROOT / "README.md").items() if first.startswith(f"`{arm}`"))
                assert row[2].strip("*") == f"{found[0].mean:+.3f} ± {found[0].half:.3f}"


def test_the_table_of_statistics_is_that_of_the_runs() -> None:
    from analysis.ablation import best_rates, load_runs, paired_difference

    runs = load_runs(ROOT / "results/statistics_cpu")
    text = (ROOT / "docs/training_results.md").read_text(encoding="utf-8")
    rows = {"(AdamW)": "elementwise", "| **mean**": "adam_mini", "| max |": "adam_mini_max",
            "| median |": "adam_mini_median", "| geometric mean |": "adam_mini_geometric",
            "| Jensen:": "adam_mini_jensen", "| min |": "adam_mini_min"}  # fmt: skip
    means, best = runs.groupby(["arm", "lr"]).final_val_loss.mean(), best_rates(runs)
    for begin, arm in rows.items():
        row = next(line for line in text.splitlines() if begin in line and line.count("|") == 8)
        for lr, cell in zip((3e-4, 1e-3, 3e-3, 1e-2, 3e-2), row.split("|")[2:7], strict=True):
            group = runs[(runs.arm == arm) & (runs.lr == lr)]
            if group.empty or not (group.state == "finished").any():
                assert "." not in cell
                continue
            finished = group[group.state == "finished"].final_val_loss.mean()
            assert cell.split(",")[0].strip(" *") == f"{finished:.3f}", (arm, lr)
            assert ("**" in cell) == (best[arm] == lr)
            assert (means[arm, lr] < float("inf")) == ("diverged" not in cell)
        if arm != "adam_mini":
            difference = paired_difference(runs, arm, against="adam_mini")
            assert difference is not None and f"| {difference.mean:+.3f} ± {difference.half:.3f} |" in row


def test_the_tables_of_the_hessian_benches_are_those_of_the_results() -> None:
    import json

    from benchmarks import hessian_calibration, hessian_peers

    results = {
        name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
        for name in ("hessian_calibration", "hessian_peers")
    }
    assert hessian_calibration.table(results["hessian_calibration"]) in (ROOT / "docs/hessian.md").read_text("utf-8")
    assert hessian_peers.page(results["hessian_peers"]) == (ROOT / "docs/hessian_peers.md").read_text("utf-8")


def test_times_of_a_step_are_those_of_the_bench() -> None:
    """README and limits quote the table of the Xeon in docs/speed.md."""
    speed = (ROOT / "docs/speed.md").read_text("utf-8").partition("## Intel(R) Xeon(R) Processor, 2 cores")[2]
    bars = re.findall(r"^\| (.+?), (?:45M Llama|GPT-2 124M), against .+? \| .+? \| ([\d.]+) x \|", speed, re.M)
    times: dict[str, list[float]] = {}
    for what, value in bars:
        times.setdefault(what, []).append(float(value))
    limits = " ".join((ROOT / "docs/limits.md").read_text("utf-8").split())
    for begin, what in (
        ("fp32", "fused, fp32"),
        ("bf16", "fused, bf16 with bf16 momentum"),
        ("int8 first moments", "fused, int8 momentum"),
        ("int4", "fused, int4 momentum"),
        ("factored", "fused, factored"),
    ):
        quoted = re.search(rf"{begin} ([\d.]+)x\s+and ([\d.]+)x", limits)
        assert quoted is not None and [float(x) for x in quoted.groups()] == pytest.approx(times[what], abs=0.0051), (
            what
        )
    (eager,) = times["eager, fp32"]
    assert f"In fp32 it takes {eager:.1f}x on this machine" in limits
    assert all(f"{value:.1f}" == "4.4" for value in times["eager, bf16"]) and "a fallback only: 4.4x" in limits
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"takes {eager:.1f} times as long as torch's fused AdamW ({times['fused, fp32'][0]:.2f} with one)" in readme


def test_the_low_bit_table_is_that_of_the_runs() -> None:
    import json

    document = json.loads((ROOT / "results/low_bit/final.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/low_bit.md").read_text(encoding="utf-8")
    rows = [row for row in document["comparison"] if row["arm"] != "fp32"]
    assert len(rows) == 3
    for row in rows:
        low, high = row["interval_95"]
        cells = (
            f"| {row['n']} | {row['mean_difference']:+.4f} ± {row['standard_error']:.4f} | {low:+.4f} to {high:+.4f} |"
        )
        assert cells in page, (row["arm"], cells)


def test_the_readme_and_the_suite_quote_the_headline() -> None:
    found = headline.by_place(load_settings(ROOT / "results/headline_cpu"))
    cells = [one for arms in found.values() for one in arms.values()]
    assert len(cells) == 40 and all(one.n == 10 and not one.at_edge and not one.diverged_anywhere for one in cells)
    gaps: dict[str, list[float]] = {}
    differs: dict[str, int] = {}
    for one in cells:
        if one.difference:
            gaps.setdefault(one.arm, []).append(one.difference.mean)
            differs[one.arm] = differs.get(one.arm, 0) + (one.p_corrected < headline.ALPHA)
    always = dict.fromkeys(("adam_mini", "permuted", *BEST_RIVALS), 4)
    assert differs == {**always, "slim_adam": 3, "factored": 1, "derived": 0}
    low, high = ({arm: f"{pick(values):+.3f}" for arm, values in gaps.items()} for pick in (min, max))
    rivals = [gap for arm in BEST_RIVALS for gap in gaps[arm]]
    readme, page = (" ".join((ROOT / name).read_text("utf-8").split()) for name in ("README.md", "docs/suite.md"))
    for text, words in (
        (readme, f"`adam_mini` {low['adam_mini']} to {high['adam_mini']}, each p < 0.05"),
        (readme, f"`derived` {low['derived']} to {high['derived']}, none"),
        (readme, f"`factored` {low['factored']} to {high['factored']}"),
        (readme, f"Muon and its like {max(rivals):+.2f} to {min(rivals):+.2f}"),
        (page, f"in all four places**, by {low['adam_mini'][1:]} to {high['adam_mini'][1:]} nats"),
        (page, f"of the same sizes are behind by {low['permuted'][1:]} to {high['permuted'][1:]}"),
        (page, f"from AdamW in any place** ({low['derived']} to {high['derived']})"),
        (page, f"`factored` is below it in one ({low['factored']})"),
        (page, f"in all four**, by {-max(rivals):.2f} to {-min(rivals):.2f} nats"),
    ):
        assert words in text, words


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
