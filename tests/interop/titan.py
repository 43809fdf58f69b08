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
from optimizer import AdamMini


class Beside:
    """Whole parameters that a plain optimizer steps with what the trainer's gradients are, gathered."""

    def __init__(self, trainer: Any, rules: str, file: Path | None) -> None:
        self.trainer, self.file = trainer, file
        torch.manual_seed(0)
        self.model: nn.Module = trainer.config.model_spec.model.build()
        own = dict(self.model.named_parameters())
        here = {name: p for part in trainer.model_parts for name, p in part.named_parameters()}
        self.pairs = [(p, own[plain(name)]) for name, p in here.items()]
        groups = [{"params": [(n, p) for n, p in own.items() if (p.ndim > 1) is decays], "weight_decay": decay}
                  for decays, decay in ((True, 0.1), (False, 0.0))]  # fmt: skip
        tagged = {id(p) for p in own.values()}
        assert all(id(q) in tagged for _, q in self.pairs)
        from optimizer import tag

        tag(self.model)
        self.optimizer = AdamMini(groups, lr=1.0, betas=(0.9, 0.95), rules=rules)
        self.follow()
        if file is not None and file.exists():
            saved = torch.load(file, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        trainer.optimizers.register_step_pre_hook(self.step)

    @torch.no_grad()
    def follow(self) -> None:
        """Take over the trainer's weights."""
        for p, q in self.pairs:
            q.copy_(whole(p))

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
        """The largest of any weight of the trainer's, on any rank; the state is kept for a run that goes on."""
        worst = torch.tensor(max(float((whole(p) - q).abs().max()) for p, q in self.pairs))
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if self.file is not None and dist.get_rank() == 0:
            saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(saved, self.file)
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
    config.lr_scheduler.warmup_steps, config.lr_scheduler.total_steps = 2, 10
    config.optimizer = type(config.optimizer)(
        param_groups=config.optimizer.param_groups,
        optimizer_factory_kwargs_by_name={"AdamMini": {"rules": case.get("rules", "adam_mini"), "strict": True}},
    )
    settings = {"training.steps": 10, "debug.seed": 1, "dump_folder": case["folder"]} | case.get("settings", {})
    for path, value in settings.items():
        *outer, last = path.split(".")
        target = config
        for name in outer:
            target = getattr(target, name)
        assert hasattr(target, last), path
        setattr(target, last, value)
    return config


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train; returns the losses, the difference, and what the optimizers hold."""
    trainer = configured(case).build()
    losses: list[float] = []
    log = trainer.metrics_processor.log
    trainer.metrics_processor.log = lambda step, loss, *rest, **more: (losses.append(loss), log(step, loss, *rest, **more))
    beside = Beside(trainer, case.get("rules", "adam_mini"), Path(case["beside"]) if case.get("beside") else None)
    trainer.train()
    held = [opt for opt in trainer.optimizers if isinstance(opt, AdamMini)]
    layouts = [layout for opt in held for own in opt._layouts for layout in own]
    return {
        "losses": losses,
        "difference": beside.difference(),
        "optimizers": [type(opt).__name__ for opt in trainer.optimizers],
        "blocks": sum(layout.n_blocks for layout in layouts),
        "placements": sorted({str(getattr(p, "placements", "plain")) for p, _ in beside.pairs}),
        "shared": sum(len(message) for opt in held for message in [[]]),
        "first": trainer.step - len(losses),
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
