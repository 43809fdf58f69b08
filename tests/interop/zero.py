"""What ranks do under DeepSpeed: train, compare with one process, save, and go on."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from optimizer import AdamMini, tag
from tests.sharding.models import MODELS, batches, loss_of
from tests.sharding.training import OPTIONS, STEPS, Run, clip, counted, optimizer_of, reference

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "wall_clock_breakdown": False,
    "steps_per_print": 10**9,
}


def engine_of(
    name: str,
    zero: dict[str, Any],
    kind: str = "model",
    dtype: str = "float32",
    *,
    more: dict[str, Any] | None = None,
    spoiled: bool = False,
    weights: dict[str, torch.Tensor] | None = None,
    **options: Any,
) -> tuple[Any, AdamMini]:
    """A model with its optimizer, as it stands, given to deepspeed.initialize."""
    import deepspeed
    import torch._dynamo  # zero.Init replaces constructors of tensors that this import looks at

    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    config = CONFIG | {"zero_optimization": zero} | (more or {})
    if dtype == "bfloat16":
        config |= {"bf16": {"enabled": True}}
        config |= {"data_types": {"grad_accum_dtype": "fp32"}} if zero["stage"] else {}
    if zero.get("init"):
        config["zero_optimization"] = {k: v for k, v in zero.items() if k != "init"}
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = MODELS[name]()
        values = dict(MODELS[name]().named_parameters())  # made in pieces, it drew other random numbers
        for n, p in model.named_parameters():
            with deepspeed.zero.GatheredParameters(p, modifier_rank=0), torch.no_grad():
                if dist.get_rank() == 0:
                    p.copy_(values[n])
    else:
        model = MODELS[name]().to(torch.float32)
        if weights is not None:
            model.load_state_dict(weights, strict=False)
        if spoiled:
            for p in model.parameters():
                p.data.zero_()
    built: Any = {
        "model": lambda: model,
        "names": lambda: list(model.named_parameters()),
        "door": lambda: list(model.named_parameters()),
        "tags": lambda: list(tag(model).parameters()),
        "groups": lambda: [{"params": list(model.named_parameters())[1::2]},
                           {"params": list(model.named_parameters())[::2], "lr": OPTIONS["lr"]}],
    }[kind]()  # fmt: skip
    optimizer = optimizer_of(kind)(built, **OPTIONS | options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine, optimizer


def train(engine: Any, first: int, last: int, messages: list[tuple[int, int]] | None = None) -> list[float]:
    losses = []
    inner = engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer
    step = inner.step

    def counting(*arguments: Any, **more: Any) -> Any:
        with counted(messages if messages is not None else []):
            return step(*arguments, **more)

    inner.step = counting
    for k in range(first, last):
        loss = loss_of(engine, batches(k, dist.get_world_size())[dist.get_rank()])
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    del inner.step
    return losses


def whole(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter in full precision, gathered."""
    from deepspeed.utils import safe_get_full_fp32_param

    out = {}
    for name, parameter in engine.module.named_parameters():
        # What the model computes with, where that is already fp32 and whole; else the wrapper's copy.
        own = parameter if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id") else None
        out[name] = (safe_get_full_fp32_param(parameter) if own is None else own).detach().clone()
    return out


def difference(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    worst = 0.0
    for name, value in wanted.items():
        apart = (got[name] - value).abs()
        if name.endswith("c_attn.bias"):  # a key's bias cannot change an attention: its gradient is rounding alone
            third = len(apart) // 3
            apart[third : 2 * third] = 0
        worst = max(worst, float(apart.max()))
    return worst


def share(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], beyond: float) -> float:
    """Which share of all elements is further from what is wanted than ``beyond``."""
    apart = [int(((got[name] - value).abs() > beyond).sum()) for name, value in wanted.items()]
    return sum(apart) / sum(value.numel() for value in wanted.values())


def zero_case(
    model: str,
    zero: dict[str, Any],
    kind: str = "model",
    dtype: str = "float32",
    *,
    taken: int = STEPS,
    **options: Any,
) -> dict[str, Any]:
    """Clipped steps under DeepSpeed, ten unless others are asked for, against one process."""
    messages: list[tuple[int, int]] = []
    engine, optimizer = engine_of(model, zero, kind, dtype, **options)
    train(engine, 0, taken, messages)
    got = whole(engine)
    run = Run(nn.Identity(), optimizer, "ddp", dist.get_world_size(), dist.get_rank(), [])
    wanted = reference(run, model, {"tags": "tag-after"}.get(kind, kind), torch.float32, taken, **options)
    layouts = [layout for own in optimizer.layouts for layout in own]
    return {
        "difference": difference(got, wanted),
        "share": share(got, wanted, beyond=1e-4),
        "steps": len(messages),
        "largest": max((nbytes for _, nbytes in messages), default=0),
        "blocks": sum(layout.n_blocks for layout in layouts),
        "state": optimizer.state_bytes(),
        "parameters": sum(value.numel() for value in wanted.values()),
        "wrapper": type(engine.optimizer).__name__,
    }


def shadow_case(model: str, zero: dict[str, Any], dtype: str = "bfloat16", **options: Any) -> dict[str, Any]:
    """Ten clipped steps in bf16, and beside them one process's AdamMini in fp32, given DeepSpeed's gradients."""
    from deepspeed.utils import safe_get_full_grad

    engine, _ = engine_of(model, zero, "model", dtype, **options)
    beside = MODELS[model]().to(torch.float32)
    with torch.no_grad():
        start = whole(engine)
        for name, p in beside.named_parameters():
            p.copy_(start[name])
    alone = AdamMini(beside, **OPTIONS | options)
    for k in range(STEPS):
        engine.backward(loss_of(engine, batches(k, dist.get_world_size())[dist.get_rank()]))
        gradients = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
        for name, p in beside.named_parameters():
            p.grad = gradients[name].float().clone()
        clip(list(beside.parameters()))
        alone.step()
        engine.step()
    wanted = {name: p.detach() for name, p in beside.named_parameters()}
    return {"difference": difference(whole(engine), wanted), "wrapper": type(engine.optimizer).__name__}


def whole_state_case(model: str, zero: dict[str, Any], then: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Five steps under one ZeRO stage; five more under another, and in one process that knows of no DeepSpeed."""
    from optimizer.sharding import full_state_dict, load_full_state_dict

    engine, optimizer = engine_of(model, zero, **options)
    train(engine, 0, 5)
    document, weights = full_state_dict(optimizer, rank0_only=False), whole(engine)
    assert document is not None
    engine.destroy()

    other, second = engine_of(model, then, weights=weights, **options)
    load_full_state_dict(second, document)
    train(other, 5, STEPS)

    alone = MODELS[model]().to(torch.float32)
    alone.load_state_dict(weights, strict=False)
    third = AdamMini(alone, **OPTIONS | options)
    third.load_state_dict(document)
    for step in range(5, STEPS):
        third.zero_grad()
        torch.stack([loss_of(alone, b) for b in batches(step, dist.get_world_size())]).mean().backward()
        clip(list(alone.parameters()))
        third.step()
    run = Run(nn.Identity(), optimizer, "ddp", dist.get_world_size(), dist.get_rank(), [])
    wanted = reference(run, model, "model", torch.float32, STEPS, **options)
    apart = difference({n: p.detach() for n, p in alone.named_parameters()}, wanted)
    return {"difference": max(apart, difference(whole(other), wanted))}


def refused_case() -> str:
    """An offloaded optimizer that is not DeepSpeed's: what the door says."""
    from optimizer.wrappers.deepspeed.launch import initialize

    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    try:
        initialize(MODELS["llama"](), config=CONFIG | {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": True})
    except ValueError as error:
        return str(error)
    return "nothing was refused"
