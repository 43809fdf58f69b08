"""What ranks do in the checks of DeepSpeed's checkpoints: save from some ranks, go on with the same or others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from optimizer import AdamMini
from tests.interop.zero import difference, engine_of, whole
from tests.sharding.models import MODELS, batches, loss_of
from tests.sharding.training import OPTIONS, clip

SHARES = 6
"""Batches of a step, whoever computes them; 1, 2 and 3 ranks share them equally."""


def _train(engine: Any, first: int, last: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, last):
        engine.backward(loss_of(engine, torch.cat(batches(step, SHARES)[rank::world])))
        engine.step()


def _alone(model: str, kind: str, **options: Any) -> dict[str, torch.Tensor]:
    """Ten steps in one process."""
    module = MODELS[model]().to(torch.float32)
    optimizer = AdamMini(module if kind == "model" else list(module.named_parameters()), **OPTIONS | options)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(module, torch.cat(batches(step, SHARES))).backward()
        clip(list(module.parameters()))
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def save(model: str, zero: dict[str, Any], folder: str, kind: str = "model", **options: Any) -> str:
    """Five steps, saved."""
    engine, _ = engine_of(model, zero, kind, **options)
    _train(engine, 0, 5)
    engine.save_checkpoint(folder, tag="five")
    return "saved"


def go_on(
    model: str, zero: dict[str, Any], folder: str, universal: bool, kind: str = "model", **options: Any
) -> dict[str, Any]:
    """Five more steps from a checkpoint, by an engine whose weights are of no use."""
    config = {"checkpoint": {"load_universal": True}} if universal else {}
    engine, optimizer = engine_of(model, zero, kind, more=config, spoiled=True, **options)
    path, _ = engine.load_checkpoint(folder, tag="five-universal" if universal else "five")
    _train(engine, 5, 10)
    kept = sum(s["exp_avg_sq"].nbytes for s in optimizer.state.values())
    return {
        "difference": difference(whole(engine), _alone(model, kind, **options)),
        "loaded": str(path),
        "kept as counted": kept == optimizer.state_bytes()["exp_avg_sq"],
    }


def convert(folder: str | Path) -> None:
    """DeepSpeed's own conversion to a universal checkpoint."""
    import subprocess
    import sys

    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", f"{folder}/five",
         "--output_folder", f"{folder}/five-universal", "--num_extract_workers", "1", "--num_merge_workers", "1",
         "--inject_missing_state"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    Path(folder, "latest_universal").write_text("five-universal")
