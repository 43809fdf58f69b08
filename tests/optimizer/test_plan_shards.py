"""Planned bytes of shards against ``AdamMini.state_bytes()`` on every rank of FSDP2 and of ZeRO.

FSDP2 runs on a process group that does not communicate. DeepSpeed is not installed here: tensors are flattened, padded
and cut as its wrappers do, and the optimizer finds them where it finds DeepSpeed's. ``make interop`` compares the same
numbers on ranks of DeepSpeed itself.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from optimizer import AdamMini, Layout, Rules
from optimizer.partition import discover, layout_of
from optimizer.sharding import offline
from optimizer.sharding.flat import FlatLayout, Range, flat_geometry
from optimizer.sharding.placed import placed_geometry
from optimizer.tools.plan import Parameter, Setup, make_plan, parameters_of
from optimizer.tools.plan.holdings import stepped
from optimizer.tools.plan.sharding import tensor_parallel_axis, tensor_parallel_shape
from optimizer.tools.plan.states import adam_mini
from tests.sharding.models import MODELS

RULES = ("adam_mini", "slim_adam", "derived", "pytorch_default", "elementwise")
KINDS = ("exp_avg", "exp_avg_sq", "step")


@contextmanager
def rank_of(world: int, rank: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def planned(parameters: list[Parameter], setup: Setup, rules: str) -> list[dict[str, int]]:
    """By rank where ranks differ, else of the one with the most."""
    loaded = Rules.load(rules)
    layouts = [layout_of(p.anatomy, loaded) for p in parameters]
    out = []
    for holding in stepped(parameters, layouts, setup):
        total: Counter[str] = Counter()
        for tensor, count in holding.items():
            state = adam_mini(setup)(tensor)
            total.update({kind: count * getattr(state, kind) for kind in KINDS})
            total["exp_avg"] += count * state.scales
        out.append(dict(total))
    return out


@pytest.mark.parametrize(("name", "world"), [("llama", 3), ("gpt2", 8), ("mixtral", 5)])
def test_the_first_rank_of_fsdp2_holds_what_is_planned(name: str, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    setup = Setup(world=world, sharding="fsdp", dtype="fp32")
    for rules in RULES:
        with rank_of(world, 0):
            model = MODELS[name]()
            parameters = parameters_of(model)
            fully_shard(model, mesh=dist.init_device_mesh("cpu", (world,)))
            held = AdamMini(model, rules=rules).state_bytes()
            local = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[operator]
        row = make_plan(parameters, setup, (rules,)).rows[-1]
        assert {kind: getattr(row.state, kind) for kind in KINDS} == held
        assert row.parameters == row.gradients == local


@pytest.mark.parametrize(("dp", "tp"), [(3, 1), (8, 1), (3, 2)])
@pytest.mark.parametrize("rules", [rules for rules in (*RULES, "derived_blocks") if rules != "derived"])  # not factored
def test_no_rank_of_a_mesh_holds_more_than_the_first(rules: str, dp: int, tp: int) -> None:
    loaded = Rules.load(rules)
    for p in parameters_of(MODELS["llama-parallel"]()):
        layout, shape = layout_of(p.anatomy, loaded), p.anatomy.shape
        axis = tensor_parallel_axis(p.anatomy)
        at = [offline.place(shape, axis, offline.Mesh((dp, tp), (d, t))) for d in range(dp) for t in range(tp)]
        first, *others = (placed_geometry(one, layout) for one in at)  # type: ignore[arg-type]
        for other in others:
            assert prod(other.shape) <= prod(first.shape) and prod(other.aligned) <= prod(first.aligned)


def test_fsdp2_over_tensor_parallel_is_planned_as_it_is_held() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    setup = Setup(world=6, tp=2, sharding="fsdp", dtype="fp32")
    changes = {"vocab": 38, "n_heads": 6, "n_kv_heads": 6, "hidden": 36}
    for rules in RULES:
        with rank_of(6, 0):
            mesh = dist.init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
            model = MODELS["llama"](**changes)
            axes = {name: tensor_parallel_axis(a) for name, a in discover(model).items()}
            for name, p in list(model.named_parameters()):
                if axes[name] is not None:
                    module = model.get_submodule(name.rpartition(".")[0])
                    cut = distribute_tensor(p.detach(), mesh["tp"], [Shard(axes[name])], src_data_rank=None)
                    setattr(module, name.rpartition(".")[2], nn.Parameter(cut))
            fully_shard(model, mesh=mesh["dp"])
            held = AdamMini(model, rules=rules).state_bytes()
        assert planned(parameters_of(MODELS["llama"](**changes)), setup, rules) == [held]


def share(numel: int, world: int) -> int:
    return -(-numel // world)


class Zero:
    """What DeepSpeed leaves: flat tensors in the optimizer's groups, and a wrapper that knows what is in them."""

    def __init__(self, optimizer: AdamMini, stage: int, world: int, rank: int, sub_group: int) -> None:
        self.optimizer = optimizer
        params = [list(group["params"]) for group in optimizer.param_groups]
        if stage < 3:
            self.round_robin_bit16_groups = params
            self.real_dp_process_group = [dist.group.WORLD] * len(params)
            self.single_partition_of_fp32_groups = flats = [self._joined(own, world, rank) for own in params]
            for group, flat in zip(optimizer.param_groups, flats, strict=True):
                group["params"] = [flat]
            return
        self.dp_process_group, self.fp16_groups, self.fp32_partitioned_groups_flat = dist.group.WORLD, [], []
        self.sub_group_to_group_id: dict[int, int] = {}
        for g, own in enumerate(params):
            group: list[Tensor] = []
            for p in own:
                p.partition_numel = partial(share, p.numel(), world)  # type: ignore[attr-defined]
                group.append(p)
                size = sum(q.partition_numel() for q in group)  # type: ignore[attr-defined]
                if size >= sub_group or p is own[-1]:
                    self.sub_group_to_group_id[len(self.fp16_groups)] = g
                    self.fp16_groups.append(group)
                    self.fp32_partitioned_groups_flat.append(nn.Parameter(torch.zeros(size)))
                    group = []
        for group in optimizer.param_groups:
            group["params"] = []

    @staticmethod
    def _joined(params: list[Tensor], world: int, rank: int) -> nn.Parameter:
        flat = torch.cat([p.detach().flatten() for p in params])
        flat = nn.functional.pad(flat, (0, -len(flat) % (2 * world)))
        return nn.Parameter(flat.chunk(world)[rank].clone())


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> Any:
    base = ModuleType("deepspeed.runtime.base_optimizer")
    base.DeepSpeedOptimizer = Zero  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, base.__name__, base)
    return Zero


def on_ranks(
    wrapped: Any, model: nn.Module, rules: str, stage: int, world: int, sub_group: int = offline.SUB_GROUP, **more: Any
) -> list[dict[str, int]]:
    out = []
    for rank in range(world):
        with rank_of(world, rank):
            optimizer = AdamMini(model, rules=rules, **more)
            wrapper = wrapped(optimizer, stage, world, rank, sub_group)
            out.append(optimizer.state_bytes())
            assert wrapper.optimizer is optimizer  # it is alive: the optimizer looks for it
    return out


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("name", "world"), [("llama", 3), ("gpt2", 5), ("mixtral", 2)])
def test_every_rank_of_zero_holds_what_is_planned(wrapped: Any, name: str, world: int, stage: int) -> None:
    """Columns included: a range that ends inside a matrix keeps every column it reaches into, and no more."""
    setup, model = Setup(world=world, sharding=f"zero{stage}", dtype="fp32"), MODELS[name]()
    parameters = parameters_of(model)
    for rules in RULES:
        held = on_ranks(wrapped, model, rules, stage, world)
        assert planned(parameters, setup, rules) == held
        row = make_plan(parameters, setup, (rules,)).rows[-1]
        assert {kind: getattr(row.state, kind) for kind in KINDS} in held


@pytest.mark.parametrize("moment", ["int8", "int4"])
@pytest.mark.parametrize("stage", [1, 3])
def test_quantised_moments_of_zero_are_planned_as_they_are_held(wrapped: Any, stage: int, moment: str) -> None:
    setup = Setup(world=5, sharding=f"zero{stage}", dtype="fp32", exp_avg_dtype=moment)
    model = MODELS["wide"]()
    held = on_ranks(wrapped, model, "adam_mini", stage, 5, exp_avg_dtype=moment)
    assert planned(parameters_of(model), setup, "adam_mini") == held


@pytest.mark.parametrize("moment", ["int8", "int4"])
def test_quantised_moments_of_fsdp2_are_planned_as_they_are_held(moment: str) -> None:
    from torch.distributed.fsdp import fully_shard

    setup = Setup(world=5, sharding="fsdp", dtype="fp32", exp_avg_dtype=moment)
    with rank_of(5, 0):
        model = MODELS["wide"]()
        parameters = parameters_of(model)
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (5,)))
        optimizer = AdamMini(model, exp_avg_dtype=moment)
        held = optimizer.state_bytes()
        optimizer.init_state()
        made = sum(
            x.to_local().nbytes for s in optimizer.state.values() for k, x in s.items() if k.startswith("exp_avg")
        )
    assert planned(parameters, setup, "adam_mini") == [held]
    assert made == held["exp_avg"] + held["exp_avg_sq"]


def test_sub_groups_have_a_counter_each(wrapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, model = Setup(world=3, sharding="zero3", dtype="fp32"), MODELS["llama"]()
    parameters = parameters_of(model)
    one = planned(parameters, setup, "adam_mini")
    monkeypatch.setattr(offline.sub_groups, "__defaults__", (400,))
    several = planned(parameters, setup, "adam_mini")
    assert several == on_ranks(wrapped, model, "adam_mini", 3, 3, 400)
    assert several[0]["step"] > 2 * one[0]["step"] and several[0]["exp_avg_sq"] == one[0]["exp_avg_sq"]


def test_the_rank_that_needs_most_is_not_always_the_first() -> None:
    """5 rows of 3 over 3 ranks, 5 elements each: ranks 0, 1, 2 reach into 2, 3 and 2 rows."""
    parameters = parameters_of(nn.Linear(3, 5, bias=False))
    setup = Setup(world=3, sharding="zero3", dtype="fp32")
    assert [own["exp_avg_sq"] for own in planned(parameters, setup, "adam_mini")] == [8, 12, 8]
    row = make_plan(parameters, setup).row("Adam-mini, adam_mini")
    assert (row.state.exp_avg_sq, row.parameters) == (12, 20)


LAYOUTS = [
    ((6, 5), Layout(0, [2, 2, 2])),
    ((6, 5), Layout.per_element((6, 5))),
    ((6, 5), Layout.per_tensor((6, 5))),
    ((3, 4, 5), Layout(1, [1] * 4, leading=(3,))),
    ((6, 5), Layout(1, [1] * 5)),
    ((3, 4, 5), Layout(2, [1] * 5, leading=(3,))),
    ((12, 5), Layout(1, [1] * 4, leading=(3,), fold=3)),
    ((12, 5), Layout(2, [1] * 5, leading=(3,), fold=3)),
    ((7,), Layout(0, [7])),
    ((), Layout.per_tensor(())),
]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_second_moments_are_counted_as_the_geometry_keeps_them(shape: tuple[int, ...], layout: Layout) -> None:
    for start in range(0, prod(shape), 4):  # 4 and 3 meet every remainder of the 5 elements of a row
        for stop in range(start, prod(shape) + 1, 3):
            held = Range(shape, layout, ((start, stop),), 0)
            counted = FlatLayout((held, held), 2 * (stop - start), "").aligned_shape(())
            assert counted == flat_geometry([held, held], 2 * (stop - start), None, torch.device("cpu")).aligned


def test_second_moments_are_counted_without_being_made() -> None:
    """A terabyte of numbers would not fit here."""
    shape = (1 << 20, 1 << 20)
    held = Range(shape, Layout.per_element(shape), ((5, prod(shape)),), 0)
    assert FlatLayout((held,), prod(shape), "").aligned_shape(()) == (prod(shape) - 5,)


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_over_tensor_parallel_cuts_what_tensor_parallelism_left(stage: int) -> None:
    parameters = parameters_of(MODELS["llama"](vocab=38, n_heads=6, n_kv_heads=6, hidden=36))
    setup = Setup(world=8, tp=2, sharding=f"zero{stage}", dtype="fp32")
    left = sum(prod(tensor_parallel_shape(p, 2)) for p in parameters)
    ranks = planned(parameters, setup, "elementwise")
    assert sum(own["exp_avg_sq"] for own in ranks) == 4 * left and len(ranks) == 4


def folded() -> list[Any]:
    """Experts that one axis holds one behind the other: up [4 * 6, 8], transposed down [4 * 6, 8]."""
    up, down = (p.anatomy for p in parameters_of(MODELS["mixtral"]()) if "expert" in p.name.lower())
    up = replace(up, shape=(24, 8), parts=(replace(up.parts[0], size=6),), axis=1, in_axis=2, leading=1, fold=4)
    down = replace(down, shape=(24, 8), parts=(replace(down.parts[0], size=8),), axis=2, in_axis=1, leading=1, fold=4)
    return [replace(parameters_of(nn.Linear(2, 2, bias=False))[0], anatomy=anatomy) for anatomy in (up, down)]


def test_tensor_parallelism_counts_the_axes_of_folded_experts() -> None:
    """The anatomy's axes are those of [4, 6, 8]; the tensor has two."""
    up, down = folded()
    assert [tensor_parallel_axis(p.anatomy) for p in (up, down)] == [0, 0]
    assert [tensor_parallel_shape(p, 2) for p in (up, down)] == [(12, 8), (12, 8)]
    with pytest.raises(ValueError, match="--tp 3 does not divide the 4 folded parts"):
        tensor_parallel_shape(up, 3)


def test_overrides_of_the_rules_count(tmp_path: Path) -> None:
    path = Rules.load("adam_mini").override({"*.wq.weight": "OUT_NEURON"}).save(tmp_path / "mine.json")
    model = MODELS["llama"]()
    row = make_plan(parameters_of(model), Setup(dtype="fp32"), (str(path),)).rows[-1]
    optimizer = AdamMini(model, rules=str(path))
    assert row.n_blocks == sum(layout.n_blocks for own in optimizer.layouts for layout in own)
    assert row.n_blocks != sum(layout.n_blocks for own in AdamMini(model).layouts for layout in own)
    with pytest.raises(ValueError, match="wq"):
        make_plan(parameters_of(MODELS["gpt2"]()), Setup(), (str(path),))
