"""What the study trains: models, corpora, learning rates, seeds, and one arm for each role and unit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.models import GPT, GPTConfig, LlamaConfig, build
from hessian import sharing
from optimizer import Role, Rules, Unit, partition
from optimizer.partition import FactoredLayout, TensorLayout, discover

STEPS, ROWS, LENGTH = 150, 8, 32
"""Steps of a run, sequences per step, and bytes per sequence."""
MODELS: Mapping[str, GPTConfig | LlamaConfig] = {
    "llama": LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden=192),
    "gpt": GPTConfig(block_size=LENGTH, n_embd=64, n_layer=2, n_head=4),
}
LEARNING_RATES = (3e-3, 1e-2)
SEEDS = (0, 1, 2)
ADAMW, TWIN = "adamw", "twin"
WHOLE_SETS = ("adam_mini", "derived_blocks", "factored")
LATER = {
    "derived_row": ("derived_blocks", {Role.QUERY: Unit.OUT_NEURON}),
    "all_factored": ("factored", {Role.TOKEN_EMBEDDING: Unit.FACTORED, Role.HEAD: Unit.FACTORED}),
    "bias_tensor": ("elementwise", {Role.BIAS: Unit.TENSOR}),
}
"""Rule sets that were added after the held-out outcome: a shipped set, and the units in which they differ."""
_TABLE = (Unit.TENSOR, Unit.TOKEN, Unit.IN_NEURON, Unit.FACTORED)
_HEADS = (Unit.ATTENTION_HEAD, Unit.OUT_NEURON, Unit.IN_NEURON, Unit.FACTORED)
_MATRIX = (Unit.TENSOR, Unit.OUT_NEURON, Unit.IN_NEURON, Unit.FACTORED)
UNITS: Mapping[Role, tuple[Unit, ...]] = {
    Role.TOKEN_EMBEDDING: _TABLE,
    Role.POSITION_EMBEDDING: (Unit.TENSOR, Unit.TOKEN, Unit.FACTORED),
    Role.QUERY: _HEADS,
    Role.KEY: _HEADS,
    Role.VALUE: _MATRIX,
    Role.ATTENTION_OUT: _MATRIX,
    Role.MLP_IN: _MATRIX,
    Role.MLP_OUT: _MATRIX,
    Role.HEAD: _TABLE,
    Role.NORM: (Unit.TENSOR,),
}
"""The units that are tried for each role. Biases keep one scalar per element in every arm but ``bias_tensor``."""


@dataclass(frozen=True)
class Cell:
    """Everything that the runs of one comparison share: they differ only in the arm.

    Attributes:
        model: key of ``MODELS``.
        data: name of the corpus.
        lr: peak learning rate.
        seed: seed of the initial weights and of the batches.
    """

    model: str
    data: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The cell's name, which is also that of its file."""
        return f"{self.model}-{self.data}-{self.lr:g}-{self.seed}"


FIT, HELD_OUT = ("llama", "python-stdlib"), ("gpt", "enwik8")
"""The model and corpus on which the criterion is chosen, and those on which it is tested."""
MIXED = (("llama", "enwik8"), ("gpt", "python-stdlib"))


def cells() -> list[Cell]:
    """Return all cells: those that decide before the mixed ones, each group seed by seed.

    An interrupted study therefore has similar numbers of runs of the settings that it compares.
    """
    order = [pair for group in ((FIT, HELD_OUT), MIXED) for pair in itertools.product(SEEDS, group, LEARNING_RATES)]
    return [Cell(model, data, lr, seed) for seed, (model, data), lr in order]


class SplitProjection(nn.Module):
    """The three parts of a fused projection as separate layers with the same weights and the same output.

    Runs along one axis cannot give one part of a fused tensor a scalar per element and another part fewer, so the
    study needs separate queries, keys and values.

    Args:
        fused: the projection to [Q|K|V].
        heads: number of attention heads.
    """

    def __init__(self, fused: nn.Linear, heads: int) -> None:
        super().__init__()
        width = fused.in_features
        self.num_heads, self.head_dim = heads, width // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        with torch.no_grad():
            for i, part in enumerate((self.q_proj, self.k_proj, self.v_proj)):
                part.weight.copy_(fused.weight[i * width : (i + 1) * width])
                part.bias.copy_(fused.bias[i * width : (i + 1) * width])

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] to [B, T, 3 * width]."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def make_model(name: str, seed: int) -> nn.Module:
    """Build one of ``MODELS``; a GPT's fused projections are split, which changes neither weights nor outputs."""
    model = build(MODELS[name], seed)
    if isinstance(model, GPT):
        with torch.random.fork_rng(devices=[]):  # The new layers draw weights before they are overwritten.
            for block in model.transformer["h"]:
                block.attn.c_attn = SplitProjection(block.attn.c_attn, block.attn.n_head)
    return model


def arms(model: str) -> dict[str, Rules]:
    """Return the rules of every arm: AdamW and its twin, one role changed (``ROLE/UNIT``), and the whole rule sets.

    Raises:
        ValueError: the model cannot have a unit of ``UNITS``, so that its layout would silently have another one.
    """
    elementwise = Rules("elementwise")
    built = make_model(model, 0)
    present = {role for anatomy in discover(built).values() for role in anatomy.roles}
    out = {ADAMW: elementwise, TWIN: elementwise}
    for role, units in UNITS.items():
        for unit in units if role in present else ():
            rules = elementwise.replace(f"{role.value}/{unit.value}", {role: unit})
            if notes := {name: layout.note for name, layout in partition(built, rules).items() if layout.note}:
                raise ValueError(f"arm={rules.name!r} is not what the model {model!r} would get: {notes}; leave it out")
            out[rules.name] = rules
    out |= {name: Rules(name) for name in WHOLE_SETS}
    later = {name: Rules(base).replace(name, units) for name, (base, units) in LATER.items()}
    if Role.BIAS not in present:
        del later["bias_tensor"]
    return out | later


def shared(v: Tensor, layout: TensorLayout) -> Tensor:
    """Return every element's shared second moment under a layout of one part, in the shape of v.

    Args:
        v: second moments of one tensor, positive.
        layout: the tensor's layout.
    """
    if isinstance(layout, FactoredLayout):
        return sharing.rank_one(v)
    return sharing.block_means(v, layout.block_ids(v.shape))
