"""torchtitan's own trainer, and beside it a plain AdamMini in one process that is given the same whole gradients.

Run by check_torchtitan under torchrun: ``-m tests.interop.titan --case '{...}' --out FILE``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.torchtitan.cpu import use_processors
from optimizer import AdamMini, tag
from tests.sharding.training import counted


class Beside:
    """Whole parameters that a plain optimizer steps with the trainer's gradients, gathered.

    Args:
        trainer: torchtitan's, built.
        rules: of the plain optimizer.
        file: where weights and state are kept for a run that goes on; read if it is there.
    """

    def __init__(self, trainer: Any, rules: str, file: Path | None) -> None:
        self.trainer, self.file = trainer, file
        self.messages: list[tuple[int, int]] = []
        self.model: nn.Module = tag(trainer.config.model_spec.model.build())
        own = dict(self.model.named_parameters())
        parts = [pair for part in trainer.model_parts for pair in part.named_parameters()]
        self.pairs = [(p, own[plain(name)]) for name, p in parts]
        self.optimizer = AdamMini(self.model, betas=(0.9, 0.95), weight_decay=0.1, rules=rules)
        if file is not None and file.exists():
            saved = torch.load(file, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        else:
            with torch.no_grad():
                for p, q in self.pairs:
                    q.copy_(whole(p))
        trainer.optimizers.register_step_pre_hook(self.step)
        for inner in trainer.optimizers:
            self._count(inner)

    def _count(self, inner: Any) -> None:
        step = inner.step

        def counting(*arguments: Any, **more: Any) -> Any:
            with counted(self.messages):
                return step(*arguments, **more)

        inner.step = counting

    @torch.no_grad()
    def step(self, *_: Any) -> None:
        """Before the trainer's step: the same here."""
        rate = self.trainer.optimizers.optimizers[0].param_groups[0]["lr"]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for p, q in self.pairs:
            q.grad = None if p.grad is None else whole(p.grad)
        self.optimizer.step()

    @torch.no_grad()
    def difference(self) -> float:
        """The largest of any weight of the trainer's, on any rank; weights and state are kept."""
        worst = torch.tensor(max(float((whole(p) - q).abs().max()) for p, q in self.pairs))
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if self.file is not None and dist.get_rank() == 0:
            torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, self.file)
        return float(worst)


def plain(name: str) -> str:
    """A parameter's name without the wrappers of compilation and activation checkpointing."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def whole(tensor: Tensor) -> Tensor:
    """What all ranks hold of it, gathered; collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def configured(case: dict[str, Any]) -> Any:
    """A configuration of the examples, with the case's settings ("parallelism.tensor_parallel_degree": 2)."""
    from examples.torchtitan import config_registry

    config = getattr(config_registry, case["config"])()
    config.optimizer.optimizer_factory_kwargs_by_name["AdamMini"]["rules"] = case.get("rules", "adam_mini")
    settings = {
        "dump_folder": case["folder"], "debug.seed": 1, "training.steps": 10, "lr_scheduler.total_steps": 10,
        "checkpoint.exclude_from_loading": ["dataloader"],
    } | case.get("settings", {})  # fmt: skip
    for path, value in settings.items():
        *outer, last = path.split(".")
        target = config
        for name in outer:
            target = getattr(target, name)
        getattr(target, last)  # a setting that is not there is a mistake
        setattr(target, last, value)
    return config


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train; returns the losses, the difference, and what was held and sent."""
    trainer = configured(case).build()
    losses: list[float] = []
    log = trainer.metrics_processor.log

    def keeping(step: int, loss: float, *rest: Any, **more: Any) -> None:
        losses.append(float(loss))
        log(step, loss, *rest, **more)

    trainer.metrics_processor.log = keeping
    file = Path(case["beside"]) if "beside" in case else None
    beside = Beside(trainer, case.get("rules_beside", case.get("rules", "adam_mini")), file)
    trainer.train()
    layouts = [layout for inner in trainer.optimizers for own in inner.layouts for layout in own]
    return {
        "losses": losses,
        "last": trainer.step,
        "difference": beside.difference(),
        "optimizers": [type(inner).__name__ for inner in trainer.optimizers],
        "blocks": sum(layout.n_blocks for layout in layouts),
        "messages": [list(message) for message in beside.messages],
        "placements": sorted({str(getattr(p, "placements", "plain")) for p, _ in beside.pairs}),
    }


def main() -> None:
    """One case from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=json.loads, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    use_processors()
    left = run(options.case)
    if dist.get_rank() == 0 and options.out is not None:
        torch.save(left, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
