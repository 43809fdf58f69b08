"""torchtitan 0.3: its models, its trainer in every kind of parallelism that gloo can do, its checkpoints."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention

from optimizer import AdamMini
from optimizer.partition import discover
from optimizer.tools.verify import Verdict, verify
from optimizer.wrappers.torchtitan import AdamMiniContainer, default_adam_mini
from tests.interop.conftest import Record
from tests.interop.launch import output, torchrun
from tests.interop.plain import SAME, falls

LIBRARIES = ["torchtitan", "torch"]
DOOR = "torchtitan"
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP2": (2, {}),
    "FSDP2, heads cut": (5, {}),
    "HSDP": (4, {"parallelism.data_parallel_replicate_degree": 2}),
    "tensor and sequence parallel": (2, {"parallelism.tensor_parallel_degree": 2}),
    "tensor parallel x FSDP2": (4, {"parallelism.tensor_parallel_degree": 2}),
}
EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "experts under FSDP2": (2, {}),
    "expert parallel": (2, {"parallelism.expert_parallel_degree": 2}),
}


def train(ranks: int, folder: Path, config: str = "llama3_processors", **case: Any) -> dict[str, Any]:
    """A run of tests/interop/titan.py."""
    given = json.dumps({"config": config, "folder": str(folder)} | case)
    left: dict[str, Any] = torchrun(ranks, "-m tests.interop.titan", "--case", given)
    assert left["optimizers"] == ["AdamMini"]
    return left


def sent(messages: list[list[int]]) -> str:
    """Collectives of ten steps, in words."""
    return f"{len(messages) / 10:g} message(s) of at most {max((m for _, m in messages), default=0)} bytes a step"


@pytest.mark.parametrize("case", SETTINGS)
def check_llama(record: Record, tmp_path: Path, case: str) -> None:
    ranks, settings = SETTINGS[case]
    left = train(ranks, tmp_path, settings=settings)
    record(
        DOOR, case, LIBRARIES, ranks=ranks, ran="its trainer, Llama 3 debug model, 10 clipped steps, fp32",
        result=f"weights within {left['difference']:.1e} of one process with these gradients; {sent(left['messages'])}",
    )  # fmt: skip
    assert left["difference"] <= SAME
    assert left["last"] == len(left["losses"]) == 10
    assert len(left["messages"]) <= 10 * 3  # one a step for each group that cuts blocks
    assert all(size <= 8 * left["blocks"] for _, size in left["messages"])


@pytest.mark.parametrize("case", EXPERTS)
def check_experts(record: Record, tmp_path: Path, case: str) -> None:
    ranks, settings = EXPERTS[case]
    left = train(ranks, tmp_path, "deepseek_v3_processors", settings=settings)
    record(
        DOOR, case, LIBRARIES, ranks=ranks, ran="its trainer, DeepSeek V3 debug model, 10 clipped steps, fp32",
        result=f"weights within {left['difference']:.1e} of one process with these gradients; {sent(left['messages'])}",
    )  # fmt: skip
    assert left["difference"] <= SAME


def check_comparison_can_fail(tmp_path: Path) -> None:
    """Beside other rules the trainer's weights go elsewhere."""
    assert train(2, tmp_path, rules_beside="short_run")["difference"] > 100 * SAME


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def check_checkpoints(record: Record, tmp_path: Path, before: int, after: int) -> None:
    """Five steps and a flat distributed checkpoint on some ranks, five more on others."""
    kept = {"checkpoint.enable": True, "checkpoint.interval": 5}
    beside = str(tmp_path / "beside.pt")
    first = train(before, tmp_path, settings=kept | {"training.steps": 5}, beside=beside)
    second = train(after, tmp_path, settings=kept, beside=beside)
    record(
        DOOR, f"checkpoint, {before} to {after} ranks", LIBRARIES, ranks=max(before, after),
        ran="its trainer and its checkpoints, Llama 3 debug model, 5 steps and 5 more, fp32",
        result=f"weights within {second['difference']:.1e} of one process that never stopped",
    )  # fmt: skip
    assert (first["last"], second["last"], len(second["losses"])) == (5, 10, 5)
    assert max(first["difference"], second["difference"]) <= SAME
    if (before, after) == (2, 1):
        with pytest.raises(AssertionError, match=r"under rules 'adam_mini', this optimizer has 'short_run'"):
            train(after, tmp_path, settings=kept, rules="short_run")


def titan(steps: int, folder: Path) -> list[float]:
    """torchtitan's command line on 2 ranks: the losses by step, as it says them."""
    said = output([
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m", "examples.torchtitan.train",
        "--module", "examples.torchtitan", "--config", "llama3_processors", "--training.steps", str(steps),
        "--lr-scheduler.total-steps", "30", "--dump-folder", str(folder), "--checkpoint.enable",
        "--checkpoint.interval", "15", "--debug.seed", "1",
    ])  # fmt: skip
    losses = {int(step): float(loss) for step, loss in re.findall(r"step: +(\d+) +loss: +([\d.]+)", said)}
    return [losses[step] for step in sorted(losses)]


def check_command_line(record: Record, tmp_path: Path) -> None:
    """torchtitan.train as a user runs it; and from its checkpoint the same run goes on as if nothing had happened."""
    whole = titan(30, tmp_path)
    shutil.rmtree(tmp_path / "checkpoint" / "step-30")
    rest = titan(30, tmp_path)
    record(
        DOOR, "torchtitan.train", LIBRARIES, ranks=2,
        ran="examples/torchtitan: Llama 3 debug model, 30 steps, FSDP2; again from the checkpoint of step 15",
        result=f"{falls(whole)}; the last 15 losses {'the same' if rest == whole[15:] else 'others'}",
    )  # fmt: skip
    assert len(whole) == 30 and rest == whole[15:]


def built(module: str, flavor: str = "debugmodel", *, values: bool = False, layers: int | None = None) -> nn.Module:
    """A model of torchtitan's, on the meta device or with values and plain attention."""
    config = importlib.import_module(f"torchtitan.models.{module}").model_registry(flavor).model
    if not values:
        with torch.device("meta"):
            return config.build()
    for _, _, parent, name in list(config.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())
    config.layers = config.layers[:layers]
    model: nn.Module = config.build()
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    return model


MODELS = [("llama3", "debugmodel"), ("llama3", "8B"), ("qwen3", "debugmodel"), ("qwen3", "debugmodel_moe"),
          ("deepseek_v3", "debugmodel"), ("gpt_oss", "debugmodel"), ("kimi_k2_7", "debugmodel"),
          ("muse_glimmer", "debugmodel")]  # fmt: skip


def check_models(record: Record) -> None:
    """Every weight of its language models is recognised; heads are what a forward pass shows them to be."""
    for module, flavor in MODELS:
        unknown = [name for name, anatomy in discover(built(module, flavor)).items() if not anatomy.recognised]
        assert not unknown, f"{module} {flavor}: {unknown}"
    proven = 0
    for module in ("llama3", "qwen3", "deepseek_v3"):
        report = verify(built(module, values=True, layers=2))
        assert report.findings and {f.verdict for f in report.findings} == {Verdict.PROVEN}, f"{module}: {report}"
        proven += len(report.findings)
    names = ", ".join(dict.fromkeys(module for module, _ in MODELS))
    record(
        DOOR, "roles", LIBRARIES, ran=f"its models on the meta device: {names}",
        result=f"every weight recognised; {proven} projections of three of them proven by a forward pass",
    )  # fmt: skip


def check_options() -> None:
    """Groups, and options in the wrong place."""
    model = built("llama3", values=True, layers=1)
    (inner,) = default_adam_mini(lr=1e-3, rules="short_run", eps=1e-6).build(model_parts=[model])
    assert isinstance(inner, AdamMini) and inner.rules.name == "short_run"
    decays = {name: group["weight_decay"] for group in inner.param_groups for name in group["param_names"]}
    assert decays == {name: 0.1 if p.ndim > 1 else 0.0 for name, p in model.named_parameters()}
    assert {(group["lr"], group["eps"]) for group in inner.param_groups} == {(1e-3, 1e-6)}
    config = default_adam_mini()
    config.exempt_norms = False
    (inner,) = config.build(model_parts=[model])
    assert [group["weight_decay"] for group in inner.param_groups] == [0.1]

    mixed = default_adam_mini()
    mixed.param_groups = [
        type(mixed.param_groups[0])(pattern="embeddings", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}),
        *mixed.param_groups,
    ]
    kinds = [type(one) for one in mixed.build(model_parts=[model])]
    assert kinds == [torch.optim.AdamW, AdamMini]

    config.implementation = "fused_opt_states_bf16"
    with pytest.raises(ValueError, match="exp_avg_dtype"):
        config.build(model_parts=[model])
    with pytest.raises(ValueError, match=r"'.\*' has 'rules'"):
        AdamMiniContainer(_misplaced(), model_parts=[model])
    with pytest.raises(NotImplementedError, match="Nadam"):
        OptimizersContainer._resolve_optimizer_factory("Nadam")


def _misplaced() -> Any:
    config = default_adam_mini()
    config.param_groups[0].optimizer_kwargs["rules"] = "adam_mini"
    return config
