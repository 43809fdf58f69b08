"""The profile ``gpu`` of the ablation: its runs, and what they need, computed without a GPU.

Everything here is arithmetic on sizes. The memory of parameters, gradients and optimizer state is that of
``optimizer.tools.plan``; activations are the published formula for GPT layers; nothing was measured on a device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from experiments.configs import TrainConfig
from experiments.models import GPTConfig, build
from experiments.optimizers import ADAMW
from experiments.recipes import RECIPES, TRAINED
from experiments.train import Options
from optimizer.tools.plan import Setup, make_plan, parameters_of
from optimizer.tools.plan.activations import estimate

ARMS = (ADAMW, "adam_mini", "derived", "factored")
"""The arms of a recipe. The paper compares the first two."""
SEEDS = (0,)
GIB = 1 << 30
BUDGET = 16 * GIB
"""Bytes of activations and logits for which ``fitting_micro_batch`` aims."""
LOGITS = 10
"""Bytes per logit: bf16 from the matrix product, fp32 in the loss, and the fp32 gradient."""


def runs(recipe: str, arms: tuple[str, ...] = ()) -> list[TrainConfig]:
    """Return the runs of a recipe: each arm at the recipe's learning rate.

    Args:
        recipe: a key of ``recipes.RECIPES``.
        arms: the arms; by default ``ARMS``.

    Raises:
        ValueError: the recipe or an arm is unknown.
    """
    if recipe not in RECIPES:
        raise ValueError(f"study={recipe!r} is no recipe of profile='gpu'; choose from {sorted(RECIPES)}")
    if unknown := set(arms) - set(ARMS):
        raise ValueError(f"arms={sorted(unknown)} are unknown; choose from {ARMS}")
    base = dataclasses.replace(RECIPES[recipe](), experiment=f"{recipe}_gpu")
    return [dataclasses.replace(base, arm=arm, seed=seed) for seed in SEEDS for arm in arms or ARMS]


def chosen(study: str, arms: tuple[str, ...] = ()) -> dict[str, list[TrainConfig]]:
    """Return recipe -> runs: one recipe by its name, or all that the profile trains if the study is ``ablation``."""
    return {name: runs(name, arms) for name in (TRAINED if study == "ablation" else (study,))}


def activation_bytes(config: TrainConfig, rows: int) -> int:
    """Estimate the bytes of activations and logits of one micro-batch, with fused attention, in 16 bits.

    Args:
        config: the run.
        rows: sequences of the micro-batch.
    """
    model = config.model
    gpt = isinstance(model, GPTConfig)
    sizes = SimpleNamespace(
        hidden_size=model.n_embd if gpt else model.dim,
        num_attention_heads=model.n_head if gpt else model.n_heads,
        num_hidden_layers=model.n_layer if gpt else model.n_layers,
    )
    layers = estimate(sizes, batch=rows, seq=config.seq_len).selective
    return layers + LOGITS * rows * config.seq_len * model.vocab


def fitting_micro_batch(config: TrainConfig, processes: int) -> int:
    """Return the largest power of two of sequences whose activations are estimated to fit ``BUDGET``; at least 1.

    Args:
        config: the run.
        processes: number of devices, over which the batch is divided.
    """
    rows, most = 1, config.batch // processes
    while 2 * rows <= most and activation_bytes(config, 2 * rows) <= BUDGET:
        rows *= 2
    return rows


@dataclass(frozen=True)
class Need:
    """What a run needs.

    Attributes:
        parameters: number of parameters.
        tokens: tokens of the whole run.
        flops: floating-point operations of the whole run, 6 per parameter and token.
        resident: arm -> bytes of parameters, gradients and optimizer state on one device.
        activations: estimated bytes of activations and logits on one device.
        micro_batch: sequences of a pass on one device.
    """

    parameters: int
    tokens: int
    flops: float
    resident: dict[str, int]
    activations: int
    micro_batch: int


def need(configs: list[TrainConfig], options: Options, processes: int) -> Need:
    """Compute what each of a recipe's runs needs; they differ in the arm alone.

    Args:
        configs: the runs of one recipe.
        options: how they are executed.
        processes: number of devices of each.

    Raises:
        ValueError: the batch does not divide over the processes.
    """
    config = configs[0]
    if config.batch % processes:
        raise ValueError(f"processes={processes} does not divide batch={config.batch}; choose a divisor")
    with torch.device("meta"):  # names and shapes without memory
        model = build(config.model, 0)
    sharding = "fsdp" if options.parallel == "fsdp2" else "ddp"
    rules = [c.arm for c in configs if c.arm != ADAMW]
    plan = make_plan(parameters_of(model), Setup(world=processes, sharding=sharding, dtype="fp32"), rules)
    rows = {name: f"Adam-mini, {name}" for name in rules} | {ADAMW: "AdamW, fp32 states"}
    tokens = config.steps * config.batch * config.seq_len
    micro_batch = options.micro_batch or fitting_micro_batch(config, processes)
    return Need(
        plan.elements,
        tokens,
        6.0 * plan.elements * tokens,
        {c.arm: plan.row(rows[c.arm]).resident for c in configs},
        activation_bytes(config, min(micro_batch, config.batch // processes)),
        micro_batch,
    )


def text(recipes: dict[str, list[TrainConfig]], options: Options, processes: int) -> str:
    """Return the plan as a table, with what it leaves out.

    Args:
        recipes: recipe -> its runs.
        options: how they are executed.
        processes: number of devices of each run.
    """
    arms = next(iter(recipes.values()))
    head = ["recipe", "runs", "parameters", "tokens", "steps", "EFLOP", "micro-batch", "activations"]
    table = [[*head, *(config.arm for config in arms)]]
    for name, configs in recipes.items():
        wanted = need(configs, options, processes)
        table.append(
            [
                name,
                str(len(configs)),
                f"{wanted.parameters / 1e6:,.0f}M",
                f"{wanted.tokens / 1e9:.1f}B",
                f"{configs[0].steps:,}",
                f"{wanted.flops / 1e18:,.1f}",
                str(wanted.micro_batch),
                f"{wanted.activations / GIB:.1f}",
                *(f"{size / GIB:.2f}" for size in wanted.resident.values()),
            ]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    devices = (
        f"{processes} device{'s' if processes > 1 else ''}, {options.parallel if processes > 1 else 'one process'}"
    )
    return "\n".join(
        [
            *lines,
            f"{devices}. The columns from activations on are GiB per device. Activations and logits of a micro-batch",
            "are an estimate (optimizer.tools.plan.activations). Under each arm are parameters, gradients and",
            "optimizer state in fp32 (optimizer.tools.plan), without DDP's buckets (one more gradient), layers that",
            "FSDP2 gathers, bf16 copies of weights and the allocator's overhead. EFLOP are 10^18 operations of a run,",
            "6 per parameter and token. Nothing of this was measured on a device.",
        ]
    )
