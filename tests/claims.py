"""What the table of claims in docs/reproduction.md must say, computed from committed results.

Each function below returns the verdict of one row, by the rule in the function, and every number in its cells "ours"
and "verdict". A verdict "?" means that the results no longer say what the row says, whatever that is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

import pandas as pd

from analysis import ablation, hessian_maps, real_model, record, sensitivity, trajectories, workloads
from analysis.paper_hessian import load, models, quadratics
from analysis.settings import load_settings
from analysis.stats import Interval, t_interval
from tests.documents import ROOT

RESULTS = ROOT / "results"

Expected = tuple[str, list[str]]
"""The verdict's beginning, and all numbers of "ours" and "verdict" in their order."""
EXPECTED: dict[str, Callable[[], Expected]] = {}


def row(beginning: str) -> Callable[[Callable[[], Expected]], Callable[[], Expected]]:
    """Register what the row whose claim begins so must say."""

    def register(function: Callable[[], Expected]) -> Callable[[], Expected]:
        assert beginning not in EXPECTED
        EXPECTED[beginning] = function
        return function

    return register


def pm(found: Interval, form: str = "+.4f") -> str:
    """A mean ± half its interval, as the page writes it."""
    return f"{found.mean:{form}} ± {found.half:{form.lstrip('+')}}"


def n_of(found: Interval) -> str:
    """How the page writes n."""
    return f"n = {found.n}"


@functools.cache
def runs(study: str) -> pd.DataFrame:
    """The runs of a study."""
    return ablation.load_runs(RESULTS / study)


def setting(*studies: str) -> list[str]:
    """Parameters in millions and steps of the studies, as verdicts name them."""
    sizes = [runs(study).parameters.iloc[0] / 1e6 for study in studies]
    (steps,) = {steps for study in studies for steps in runs(study).steps}
    (size,) = {f"{size:.2f}M" if len(studies) == 1 else f"{size:.1f}M" for size in sizes}
    return [size, str(steps)]


def gap(study: str, arm: str, against: str = "elementwise", lr: float | None = None) -> Interval:
    """The paired difference of two arms."""
    found = ablation.paired_difference(runs(study), arm, lr=lr, against=against)
    assert found is not None
    return found


def no_gap(found: Interval) -> str:
    """The verdict on "as good as AdamW"."""
    return "refuted" if found.low > 0 else "undecided" if found.high > 0 else "confirmed"


def size_of(study: str) -> str:
    return setting(study)[0]


def tokens_per_parameter() -> float:
    config = json.loads(next((RESULTS / "ablation_cpu").glob("*/config.json")).read_text())
    return config["steps"] * config["batch"] * config["seq_len"] / runs("ablation_cpu").parameters.iloc[0]


@functools.cache
def bench() -> dict[str, dict[str, dict[str, float]]]:
    """Case -> optimizer -> measurements of a step."""
    path = ROOT / "benchmarks/results/optimizer_step/intel-xeon-processor-2-cores.json"
    return {name: case["rows"] for name, case in json.loads(path.read_text())["cases"].items()}


@row("memory of the state halves")
def _memory() -> Expected:
    line = next(x for x in (ROOT / "docs/memory.md").read_text("utf-8").splitlines() if x.startswith("| Llama 2-7B"))
    _, _, _, adamw, ours, *_ = (cell.strip() for cell in line.split("|"))
    rows = bench()["llama-45M fp32 2 threads"]
    bytes_each = [rows[name]["state_bytes_per_parameter"] for name in ("AdamW fused", "AdamMini fused")]
    halves = abs(float(ours) / float(adamw) - 0.5) < 0.001 and abs(bytes_each[1] / bytes_each[0] - 0.5) < 0.002
    return "confirmed" if halves else "refuted", [adamw, ours, "45M", *(f"{b:.2f}" for b in bytes_each)]


@row("throughput at equal batch")
def _step() -> Expected:
    found = [bench()[f"{name} fp32 2 threads"]["AdamMini fused"] for name in ("llama-45M", "gpt2-124M")]
    (rounds,) = {int(each["n"]) for each in found}
    ratios = [f"{each['ratio']:.2f}" for each in found]
    return "not testable here", [ratios[0], "45M", ratios[1], "2 124M", str(rounds)]


@row("GPT-2's loss curve")
def _gpt() -> Expected:
    found = gap("carry_over_cpu", "adam_mini")
    return no_gap(found), [size_of("carry_over_cpu"), pm(found), n_of(found), *setting("carry_over_cpu")]


@row("Llama's loss curve")
def _llama() -> Expected:
    found = gap("ablation_cpu", "adam_mini")
    return no_gap(found), [size_of("ablation_cpu"), pm(found), n_of(found), *setting("ablation_cpu")]


@row("perplexity is lower")
def _scaling() -> Expected:
    found = gap("ablation_cpu", "adam_mini")
    numbers = [size_of("ablation_cpu"), f"{tokens_per_parameter():.2f}", pm(found), n_of(found), "39M"]
    return "not testable here", numbers


@row("2509.02046: the gap")
def _falling() -> Expected:
    found = gap("ablation_cpu", "adam_mini")
    numbers = [size_of("ablation_cpu"), f"{tokens_per_parameter() / 20:.2f}", pm(found), n_of(found)]
    return "not measured yet; there is a gap" if found.low > 0 else "not measured yet", numbers


@row("short runs want")
def _short() -> Expected:
    rows, all_of_it = gap("ablation_cpu", "short_run", "adam_mini"), gap("ablation_cpu", "short_run")
    verdict = "undecided" if not rows.excludes_zero else "refuted" if rows.mean > 0 else "confirmed"
    return verdict, [pm(rows), pm(all_of_it), n_of(rows), *setting("ablation_cpu")]


@row("one v per tensor")
def _tensor() -> Expected:
    found, own = gap("ablation_cpu", "pytorch_default"), runs("ablation_cpu").query("arm == 'pytorch_default'")
    diverged = int((own.state == "diverged").sum())
    verdict = "in part: worse and stable" if found.low > 0 and not diverged else "?"
    return verdict, [pm(found), n_of(found), f"{diverged} of {len(own)}", *setting("ablation_cpu")]


@functools.cache
def z_scores() -> pd.Series:
    """Median over layers of z, by model, checkpoint, role and unit."""
    found = [
        [entry["model"], entry["checkpoint"], entry["role"], each["unit"], each["z"]]
        for entry in hessian_maps.load(RESULTS / "hessian_maps")["maps"]
        for each in entry["candidates"]
    ]
    table = pd.DataFrame(found, columns=["model", "checkpoint", "role", "unit", "z"])
    return table.groupby(["model", "checkpoint", "role", "unit"]).z.median()


HEAD, ROW, COLUMN, TOKEN = "ATTENTION_HEAD", "OUT_NEURON", "IN_NEURON", "TOKEN"
PAPER = {"QUERY": HEAD, "KEY": HEAD, "VALUE": ROW, "ATTENTION_OUT": ROW, "MLP_IN": ROW, "MLP_OUT": ROW,
         "TOKEN_EMBEDDING": TOKEN, "HEAD": TOKEN}  # fmt: skip
"""Role -> the unit that the paper sees in it."""


def z_of(roles: Sequence[str], unit: str | None = None, checkpoint: float = 1.0) -> list[float]:
    """z of the GPT and the Llama, role by role; of the paper's unit if none is given."""
    return [z_scores()[m, checkpoint, role, unit or PAPER[role]] for role in roles for m in ("gpt", "llama")]


def blocks_row(roles: Sequence[str]) -> Expected:
    """A row of z by the paper's unit and by column: in part where a column is clearer than the paper's unit."""
    ours, others = z_of(roles), z_of(roles, COLUMN)
    clearer = all(a > b for a, b in zip(ours, others, strict=True))
    size = hessian_maps.load(RESULTS / "hessian_maps")["subjects"]["llama"]["parameters"]
    verdict = "refuted" if min(ours) <= models.REAL else "confirmed" if clearer else "in part"
    return verdict, [*(f"{z:.1f}" for z in (*ours, *others)), f"{round(size, -3):,}"]


@row("queries, keys")
def _heads() -> Expected:
    roles = ("QUERY", "KEY")
    verdict, numbers = blocks_row(roles)
    rows = z_of(roles, ROW)
    as_clear = min(a / b for a, b in zip(rows, z_of(roles), strict=True)) > 0.75
    return verdict if as_clear else "?", [*numbers[:4], *(f"{z:.1f}" for z in rows), numbers[-1]]


@row("value, attention output")
def _values() -> Expected:
    return blocks_row(("VALUE", "ATTENTION_OUT"))


@row("MLP: output neurons")
def _mlp() -> Expected:
    return blocks_row(("MLP_IN", "MLP_OUT"))


@row("embedding, output layer")
def _tokens() -> Expected:
    return blocks_row(("TOKEN_EMBEDDING", "HEAD"))


@row("they are there all along")
def _along() -> Expected:
    least = [min(z_of(tuple(PAPER), checkpoint=at)) for at in (0.0, 0.5, 1.0)]
    verdict = "confirmed" if min(least) > models.REAL else "refuted"
    return verdict, [*(f"{z:.1f}" for z in least), "5,000"]


@row("the same in a trained model")
def _real() -> Expected:
    study, numbers, seen = real_model.load(RESULTS / "real_model"), [], {}
    for layer in (29, 15):
        document = study.one("heads", target=f"layer {layer}", matrix="H")
        assert document is not None
        numbers.append(str(layer))
        for role in ("QUERY", "KEY"):
            found = real_model.head_contrasts(real_model.block_map(document))[role]
            numbers.append(f"{found.value:.1f} ± {found.stderr:.1f}")
            seen[role, layer] = found.value - 2 * found.stderr >= 2  # Rule R3 of docs/real_model.md.
    unseen = [key for key, yes in seen.items() if not yes]
    return "in part" if unseen == [("QUERY", 15)] else "?", [*numbers, "15"]


@row("the Hessian's sub-blocks")
def _principle() -> Expected:
    chance = gap("ablation_cpu", "permuted", "adam_mini")
    other = gap("carry_over_cpu", "derived_blocks", "adam_mini")
    verdict = "in part: better than chance, not the best" if chance.low > 0 > other.high else "?"
    both = setting("ablation_cpu", "carry_over_cpu")
    return verdict, [pm(chance), n_of(chance), pm(other), n_of(other), *both]


@functools.cache
def ends() -> pd.DataFrame:
    return quadratics.ends(load(RESULTS / "paper_hessian", "quadratics"))


def decades(problem: str, schedule: str, arm: str, other: str) -> Interval:
    """Difference of log10 f; "Adam" is the better beta2 with beta1 = 0."""
    adam = quadratics.better_adam(ends(), problem, schedule)
    names = (adam if name == "Adam" else name for name in (arm, other))
    return quadratics.end_difference(ends(), problem, schedule, *names)


@row("three blocks")
def _order() -> Expected:
    pairs = ((quadratics.BLOCKWISE, "Adam"), ("Adam", quadratics.SINGLE))
    constant = [decades("three blocks", "constant", *pair) for pair in pairs]
    falling = decades("three blocks", "linear to zero", *pairs[0])
    holds = all(found.high < 0 for found in constant) and falling.mean == 0
    return "confirmed with constant rates" if holds else "?", [*(pm(d, "+.2f") for d in constant), n_of(constant[0])]


@row("in one dense block")
def _one_block() -> Expected:
    names = [f"block {i} alone" for i in (1, 2, 3)]
    constant = [decades(name, "constant", quadratics.SINGLE, "Adam") for name in names]
    falling = [decades(name, "linear to zero", quadratics.SINGLE, "Adam") for name in names]
    holds = all(found.high < 0 for found in constant) and not any(found.mean for found in falling)
    return "confirmed with constant rates" if holds else "?", [*(pm(d, "+.2f") for d in constant), n_of(constant[0])]


@row("Adam's diagonal helps less")
def _tau() -> Expected:
    table, bar = quadratics.gains(load(RESULTS / "paper_hessian", "diagonal_gain")), -0.5
    pairs = [pair for _, pair in table.groupby(["d", "condition"])]
    diagonal = [quadratics.rank_of_gain(pair, "r") for pair in pairs]
    met = sum(quadratics.rank_of_gain(pair, "r_first")[2] < bar for pair in pairs)
    ranks = [value for value, _, high in diagonal if high < bar]
    verdict = "in part" if len(ranks) == len(pairs) > met else "?"
    numbers = [f"{min(ranks):.2f}", f"{max(ranks):.2f}", f"{bar}", f"{met} of {len(pairs)}", str(table.seed.nunique())]
    return verdict, numbers


@row("leave-one-out")
def _left_out() -> Expected:
    results = load(RESULTS / "paper_hessian", "leave_out")
    table = models.left_out(results)
    found = [models.left_out_differences(table, "block", count) for count in (1, 2, 3)]
    against = [each["one rate - AdamW"] for each in found]
    matches = all(each.high < models.ENOUGH for each in against)
    alone = all(each["one rate - control"].excludes_zero for each in found)
    verdict = "confirmed" if matches and not alone else "?"
    parameters = "0.07M"  # 65,824, which docs/paper_hessian.md says and no result repeats.
    return verdict, [*map(pm, against), n_of(against[0]), parameters, str(results.settings["steps"])]


@row("the mean is the best")
def _statistics() -> Expected:
    arms = [f"adam_mini_{name}" for name in ("max", "median", "min", "geometric", "jensen")]
    found = {arm: gap("statistics_cpu", arm, "adam_mini") for arm in arms}
    best = not any(each.high < 0 for each in found.values()) and all(found[arm].low > 0 for arm in arms[:3])
    numbers = [*(pm(found[arm], "+.3f") for arm in arms[:3]), n_of(found[arms[0]])]
    return "confirmed" if best else "refuted", [*numbers, *setting("statistics_cpu")]


def growth(study: str) -> Interval:
    """How much the gap to AdamW grows from 3e-3, the best rate of both arms, to 1e-2; paired by seed."""
    wide = runs(study).pivot(index="seed", columns=["arm", "lr"], values="final_val_loss")
    best = ablation.best_rates(runs(study))
    assert best["adam_mini"] == best["elementwise"] == 3e-3
    low, high = (wide["adam_mini", lr] - wide["elementwise", lr] for lr in (3e-3, 1e-2))
    return t_interval((high - low).tolist())


@row("not more sensitive to the learning rate")
def _rates() -> Expected:
    llama, gpt = growth("ablation_cpu"), growth("carry_over_cpu")
    verdict = "in part: refuted on Llama, undecided on GPT" if llama.low > 0 > gpt.low else "?"
    numbers = ["3e-3", "1e-2", pm(llama, "+.3f"), n_of(llama), pm(gpt, "+.3f"), n_of(gpt)]
    return verdict, [*numbers, *setting("ablation_cpu", "carry_over_cpu")]


@row("not more sensitive to weight decay")
def _hyper_parameters() -> Expected:
    found = sensitivity.sensitivities(sensitivity.table(load_settings(RESULTS / "sensitivity_cpu")))
    spread = {one.name: one.difference for one in found if one.arm == "adam_mini" and one.difference}
    decay, first, second, eps = (spread[name] for name in ("weight_decay", "beta1", "beta2", "eps"))
    more = [one.low > 0 for one in (decay, first, second, eps)]
    verdict = "in part: more to the first beta" if more == [False, True, False, True] else "?"
    return verdict, [*(pm(one, "+.3f") for one in (decay, first, second, eps)), n_of(first), "0.13M", "300"]


@row("graphs: GCN")
def _graphs() -> Expected:
    gcn = next(one for one in workloads.load(RESULTS) if one.name == "gcn")
    rows = {one.comparison.arm: one for one in gcn.rows}
    difference = rows["adam_mini"].comparison.difference
    assert difference is not None
    accuracy = [f"{rows[arm].metrics['accuracy'].mean:.3f}" for arm in ("adam_mini", "elementwise")]
    size = f"{gcn.setting.runs.parameters.iloc[0] / 1e6:.2f}M"
    return no_gap(difference), [pm(difference), *accuracy, n_of(difference), size, str(gcn.setting.runs.steps.iloc[0])]


@row("stays closest")
def _trajectory() -> Expected:
    ways = {one.arm: one for one in trajectories.load(RESULTS / "trajectories" / "distances.json")}
    farther, closer = ("sm3", "came", "lion", "adafactor"), ("adafactor_zhai", "other batches")
    signs = [(ways[arm].difference, sign) for arms, sign in ((farther, 1), (closer, -1)) for arm in arms]
    holds = all(one is not None and one.excludes_zero and one.mean * sign > 0 for one, sign in signs)
    numbers = [
        pm(ways["adam_mini"].last, ".3f"),
        *(f"{of(ways[a].last.mean for a in farther):.3f}" for of in (min, max)),
    ]
    numbers += [f"{ways[arm].last.mean:.3f}" for arm in closer]
    return "in part" if holds else "?", [*numbers, n_of(ways["adam_mini"].last), "0.13M", "300"]


@row("Adafactor, CAME")
def _rivals() -> Expected:
    gaps = [gap("rivals_cpu", arm) for arm in ("adafactor", "came", "sm3", "lion", "adafactor_zhai")]
    worse = [one.low > 0 for one in gaps]
    verdict = "in part" if worse == [False, True, True, True, False] else "?"
    return verdict, [*(pm(one, "+.3f") for one in gaps), n_of(gaps[0]), *setting("rivals_cpu")]


@row("2402.16788")
def _spectra() -> Expected:
    table = models.distances(load(RESULTS / "paper_hessian", "spectra"))
    trained = table[table.checkpoint == "trained"]
    each = [t_interval(trained[trained.model == m].distance.tolist()) for m in ("transformer", models.CNN)]
    difference = models.against_cnn(table, "transformer", "trained")
    images = models.against_cnn(table, "vision transformer", "trained")
    verdict = "confirmed" if difference.low > 0 and images.low > 0 else "?"
    numbers = [*(pm(one, ".3f") for one in each), pm(difference, "+.3f"), pm(images, "+.3f"), n_of(images)]
    return verdict, numbers


@row("2509.02046: it diverges")
def _breaks() -> Expected:
    table = record.table(load_settings(RESULTS / "record_cpu"))
    at = table[table.lr == 3e-2]
    broken = {arm: at[at.arm == arm].broken for arm in ("adam_mini", "elementwise")}
    clip = next(e for e in record.effects(at, "clip", 0.0, 1.0) if e.arm == "adam_mini")
    warm = next(e for e in record.effects(at, "warmup", 0.0, 0.1) if e.arm == "adam_mini")
    holds = broken["adam_mini"].sum() > broken["elementwise"].sum() and clip.only_without <= clip.only_with
    counts = [f"{b.sum()} of {len(b)}" for b in broken.values()]
    verdict = "in part" if holds and warm.only_without > 0 and table.seed.nunique() == 3 else "?"
    saved = [f"{clip.only_without} of {clip.pairs}", f"{warm.only_without} of {warm.pairs}"]
    return verdict, ["3e-2", *counts, saved[0], "10 %", saved[1], "0.13M", "300"]


@functools.cache
def classes() -> pd.DataFrame:
    return models.class_ratios(load(RESULTS / "paper_hessian", "classes"))


def exponent(loss: str, layer: str) -> models.Exponent:
    found = models.exponent(classes().query("loss == @loss and layer == @layer"))
    assert found is not None
    return found


@row("2505.02809: off-diagonal")
def _law() -> Expected:
    hidden, whole = ([exponent(loss, layer) for loss in ("mse", "cross-entropy")] for layer in ("hidden", "whole"))
    holds = abs(hidden[1].value - models.LAW) < 0.1 and hidden[0].holds and not any(each.holds for each in whole)
    numbers = [f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" for e in hidden]
    return "in part" if holds else "?", [*numbers, *(f"{e.value:.2f}" for e in whole), str(classes().seed.nunique())]


def dominance(loss: str) -> Interval:
    return t_interval(classes().query("loss == @loss and layer == 'whole' and classes == 100").absolute.tolist())


@row("2505.02809: blocks dominate, MSE")
def _mse() -> Expected:
    found = dominance("mse")
    return "in part: about twice" if abs(found.mean / 22 - 2) < 0.1 else "?", [pm(found, ".1f"), n_of(found)]


@row("2505.02809: blocks dominate, cross-entropy")
def _cross_entropy() -> Expected:
    found = dominance("cross-entropy")
    return "confirmed" if found.low <= 10.5 <= found.high else "?", [pm(found, ".1f"), n_of(found)]
