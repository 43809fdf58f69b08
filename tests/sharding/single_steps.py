"""Single facts about sharded steps, each answered with the same words by every rank."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from adam_mini import Adam_mini
from optimizer import AdamMini, Layout, tag
from optimizer.sharding import full_state_dict, load_full_state_dict
from tests.sharding.training import (
    FINE,
    MODELS,
    OPTIONS,
    STEPS,
    Run,
    batches,
    clip,
    counted,
    difference,
    fsdp1,
    fsdp2,
    local,
    loss_of,
    reference,
    start,
    train_case,
)


def _matrix(rows: int, columns: int, placements: list[Placement] | None = None, seed: int = 0) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(distribute_tensor(whole, mesh, placements or [Shard(0)]))


def _give(parameter: nn.Parameter, seed: int) -> Tensor:
    """A gradient, and the whole of it."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    return whole


def nothing_cut() -> str:
    """Rows dealt out by rows, elements in any way, norms whole: no message at all."""
    rows, table = _matrix(7, 4), _matrix(5, 6)
    optimizer = AdamMini([("mlp.up_proj.weight", rows), ("embed_tokens.weight", table)], lr=1e-2)
    messages: list[tuple[int, int]] = []
    for step in range(3):
        _give(rows, step), _give(table, step)
        with counted(messages):
            optimizer.step()
    return FINE if not messages and len(optimizer.state) == 2 else f"{messages} {len(optimizer.state)}"


FEW_BITS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"exp_avg_dtype": "int8"}),
    (torch.float32, {"exp_avg_dtype": "int4", "rules": "factored"}),
    (torch.bfloat16, {"exp_avg_dtype": "int4", "bf16_rounding": "kahan"}),
    (torch.bfloat16, {"exp_avg_dtype": "int8", "bf16_rounding": "stochastic"}),
    (torch.bfloat16, {"bf16_rounding": "stochastic"}),
)


def few_bits_of_whole_rows() -> str:
    """Where rows are whole, weights, codes and scales have the bits of one process: dealt out by output units, by
    experts, and by the units of every expert, whose rows are not neighbours."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    everything = [("up_proj.weight", (91, 201), 0), ("experts.down_proj", (5, 24, 66), 0), ("q.proj", (4, 21, 70), 1)]
    for (dtype, options), fused in itertools.product(FEW_BITS, (None, False)):
        if options.get("rules") == "factored":
            continue  # the means over columns are sums over ranks, in another order than in one process
        cases = everything if fused is False else everything[:2]  # the native step counts neighbouring rows
        named, alone = [], []
        for name, shape, axis in cases:
            generator = torch.Generator().manual_seed(len(named))
            whole = torch.randn(shape, generator=generator).to(dtype)
            named.append((name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(axis)]))))
            alone.append((name, nn.Parameter(whole.clone())))
        ours, theirs = (AdamMini(one, **OPTIONS, **options, fused=fused) for one in (named, alone))
        for layouts in (ours.layouts, theirs.layouts):  # one scalar per row, so that no block is shared
            layouts[0][:] = [Layout(len(shape) - 2, [1] * shape[-2], shape[:-2]) for _, shape, _ in cases]
        for step in range(3):
            for (_, p), (_, q) in zip(named, alone, strict=True):
                q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
                p.grad = distribute_tensor(q.grad, mesh, p.placements)  # type: ignore[attr-defined]
            ours.step(), theirs.step()
        for (name, p), (_, q) in zip(named, alone, strict=True):
            pairs = [(p.detach(), q.detach())] + [(ours.state[p][key], x) for key, x in theirs.state[q].items()]
            for own, wanted in pairs:
                whole = own.full_tensor() if isinstance(own, DTensor) else own
                if not torch.equal(whole, wanted):
                    return f"{name} {options}: {(whole.double() - wanted.double()).abs().max()} apart"
    return FINE


def few_bits_of_shared_blocks() -> str:
    """A matrix with one scalar, its rows dealt out or cut: about as in one process, and no two bits alike by chance."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dtype, options in FEW_BITS:
        for axis in (0, 1):
            torch.manual_seed(0)
            whole = torch.randn(90, 201).to(dtype)
            parameter, alone = (nn.Parameter(x) for x in (distribute_tensor(whole, mesh, [Shard(axis)]), whole.clone()))
            ours, theirs = (AdamMini([("up_proj.weight", p)], **OPTIONS, **options) for p in (parameter, alone))
            exact = nn.Parameter(whole.float())
            plain = AdamMini([("up_proj.weight", exact)], **OPTIONS, rules=options.get("rules", "adam_mini"))
            if "rules" not in options:
                for optimizer in (ours, theirs, plain):
                    optimizer.layouts[0][0] = Layout.per_tensor((90, 201))
            for step in range(4):
                grad = torch.randn(90, 201, generator=torch.Generator().manual_seed(step)).to(dtype)
                alone.grad, exact.grad = grad, grad.float()
                parameter.grad = distribute_tensor(grad, mesh, [Shard(axis)])
                ours.step(), theirs.step(), plain.step()
            own = parameter.full_tensor().detach()  # type: ignore[attr-defined]
            apart, rounding = ((own - x).double().square().mean().sqrt() for x in (alone.detach(), exact.detach()))
            noise = (alone.detach() - exact.detach()).double().square().mean().sqrt()
            if rounding > 1.1 * noise or (axis == 0 and apart > 0.05 * noise):
                return f"{options}, axis {axis}: {rounding} from exact arithmetic, one process {noise}; {apart} apart"
    return FINE


def rounding_of_flat_ranges() -> str:
    """bf16 weights without a master copy in flat tensors, some of whose blocks are shared: nearly one process.

    A weight beyond 1 has steps of 0.008. FSDP1's joined tensors draw other random numbers than one process.
    """
    few = {"bf16_rounding": "stochastic", "exp_avg_dtype": "int8"}
    cases = (({"bf16_rounding": "kahan"}, "fsdp1-flat", 0.01), (few, "fsdp1", 0.02), (few, "fsdp1-flat", 0.08))
    apart = [train_case("wide", wrap, dtype="bfloat16", **options)["difference"] for options, wrap, _ in cases]
    # Ranks hold other elements, so none may leave before the last case.
    return FINE if all(x < bar for x, (_, _, bar) in zip(apart, cases, strict=True)) else f"{apart} apart"


def missing_gradients() -> str:
    """A rank without a gradient for a cut tensor steps it as with zeros; without any, nobody does."""
    parameter = _matrix(1, 6, [Shard(1)])
    whole = parameter.full_tensor().detach().clone().requires_grad_()  # type: ignore[attr-defined]
    ours = AdamMini([("q_proj.weight", parameter)], **OPTIONS)
    alone = AdamMini([("q_proj.weight", whole)], **OPTIONS)
    ours.step()
    if ours.state.get(parameter):
        return "stepped without any gradient"
    for step in range(3):
        whole.grad = _give(parameter, step)
        if step == 1:
            whole.grad[:, 3:] = 0
            if dist.get_rank() == 1:
                parameter.grad = None
        ours.step()
        alone.step()
    full = parameter.full_tensor()  # type: ignore[attr-defined]
    return FINE if torch.allclose(full, whole, atol=1e-14, rtol=0) else f"{full - whole}"


def partial_placement() -> str:
    parameter = nn.Parameter(DTensor.from_local(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Partial()]))
    optimizer = AdamMini([("q_proj.weight", parameter)])
    parameter.grad = parameter.detach().clone()
    return _refused(optimizer.step, ValueError, "Partial", "Replicate or Shard")


def partial_gradient() -> str:
    """A replicated parameter whose gradient is still to be summed, as sequence parallelism leaves it."""
    parameter = _matrix(3, 4, [Replicate()])
    whole = parameter.full_tensor().detach().clone().requires_grad_()  # type: ignore[attr-defined]
    share = torch.full((3, 4), 1.0 + dist.get_rank(), dtype=torch.float64)
    parameter.grad = DTensor.from_local(share, parameter.device_mesh, [Partial()])  # type: ignore[attr-defined]
    whole.grad = torch.full((3, 4), 3.0, dtype=torch.float64)
    for one in (parameter, whole):
        AdamMini([("norm.weight", one)], **OPTIONS).step()
    return FINE if torch.equal(local(parameter), whole) else f"{local(parameter) - whole}"


def _refused(call: Callable[[], Any], kind: type[Exception], *words: str) -> str:
    try:
        call()
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        return FINE if not missing else f"{missing} not in {error}"
    return "not refused"


def other_rules() -> str:
    """Ranks whose rules differ, one of which would not even communicate."""
    parameter = _matrix(6, 4, [Shard(1)])
    optimizer = AdamMini([("up_proj.weight", parameter)], rules=("adam_mini", "elementwise")[dist.get_rank()])
    _give(parameter, 0)
    before = local(parameter).clone()
    answer = _refused(optimizer.step, RuntimeError, "ranks [1]", "than rank 0", "up_proj.weight")
    return answer if torch.equal(before, local(parameter)) else "moved"


def other_order() -> str:
    """Ranks that hold the same parameters in another order."""
    named = [("a.up_proj.weight", _matrix(6, 4, [Shard(1)])), ("b.up_proj.weight", _matrix(5, 4, [Shard(1)], 1))]
    optimizer = AdamMini(named if dist.get_rank() == 0 else named[::-1])
    for _, parameter in named:
        _give(parameter, 0)
    return _refused(optimizer.step, RuntimeError, "ranks [1]", "another order")


def resharded() -> str:
    """A parameter that is dealt out in another way between two steps, with its state, goes on as if it had been."""
    parameter = _matrix(6, 8)
    whole = parameter.full_tensor().detach().clone().requires_grad_()  # type: ignore[attr-defined]
    ours = AdamMini([("q_proj.weight", parameter)], **OPTIONS)
    alone = AdamMini([("q_proj.weight", whole)], **OPTIONS)
    for step in range(4):
        if step == 2:
            state = ours.state.pop(parameter)
            parameter = nn.Parameter(parameter.detach().redistribute(placements=[Shard(1)]))  # type: ignore[attr-defined]
            ours.param_groups[0]["params"][0] = parameter
            moment = state["exp_avg"].redistribute(placements=[Shard(1)])
            second = state["exp_avg_sq"].redistribute(placements=[Replicate()])
            ours.state[parameter] = {"step": state["step"], "exp_avg": moment, "exp_avg_sq": second}
        whole.grad = _give(parameter, step)
        ours.step()
        alone.step()
    full = parameter.full_tensor()  # type: ignore[attr-defined]
    return FINE if torch.allclose(full, whole, atol=1e-14, rtol=0) else f"{full - whole}"


def without_exchange() -> str:
    """The negative control: what these comparisons say where shared blocks are not summed."""
    from optimizer.sharding import exchange

    send = exchange._all_reduce
    exchange._all_reduce = lambda *_: None
    try:
        apart = train_case("llama", "fsdp2")["difference"]
    finally:
        exchange._all_reduce = send
    return FINE if apart > 1e-5 else f"only {apart} apart"


def bytes_of_state() -> str:
    """What is counted is what is held."""
    wraps = ("fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-columns")
    for wrap, (name, options) in itertools.product(wraps, (("gpt2", {}), ("wide", {"exp_avg_dtype": "int4"}))):
        run = start(name, wrap, **options)
        counted_before = run.optimizer.state_bytes()  # type: ignore[attr-defined]
        run.optimizer.init_state()  # type: ignore[attr-defined]
        held: Counter[str] = Counter()
        for state in run.optimizer.state.values():
            held.update({key.removesuffix("_scale"): local(x).numel() * x.itemsize for key, x in state.items()
                         if key != "exp_avg"})  # fmt: skip
            held["exp_avg"] += local(state["exp_avg"]).nbytes
        if counted_before != dict(held):
            return f"{wrap}: {counted_before}"
    return FINE


def compiled_step() -> str:
    """A compiled step of sharded parameters does what the plain one does."""
    model, plainly = (MODELS["llama"]().to(torch.float64) for _ in range(2))
    for one in (model, plainly):
        fsdp2(one)
    first, second = AdamMini(model, **OPTIONS), AdamMini(plainly, **OPTIONS)
    step = torch.compile(first.step, backend="eager")
    for index in range(3):
        for one, take in ((model, step), (plainly, second.step)):
            one.zero_grad()
            loss_of(one, batches(index, 2)[dist.get_rank()]).backward()
            take()
    same = all(torch.equal(local(p), local(q)) for p, q in zip(model.parameters(), plainly.parameters(), strict=True))
    return FINE if same else "different"


def zero_redundancy() -> str:
    """Torch's ZeroRedundancyOptimizer deals out whole tensors: the same weights, and nothing sent by us."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(tag(MODELS["llama"]().to(torch.float64)))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamMini, **OPTIONS)
    run = Run(model, optimizer, "ddp", dist.get_world_size(), dist.get_rank(), [])
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batches(step, run.replicas)[run.replica]).backward()
        clip(list(model.parameters()))
        optimizer.step()
    apart = difference(run, "llama", reference(run, "llama", "tag-after", torch.float64, STEPS))
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0 and len(optimizer.state_dict()["state"]) != len(list(model.parameters())):
        return "consolidate_state_dict lost state"
    return FINE if apart <= 1e-12 else f"{apart} apart from one process"


def whole_state_through_the_door() -> str:
    """The published package's class fixes its blocks late, and FSDP1's joined parameters know short names only."""
    model = fsdp1(MODELS["llama"](), False)

    def built() -> Adam_mini:
        return Adam_mini(list(model.named_parameters()), 1e-2, dim=24, n_heads=6, n_kv_heads=3)

    first, second = built(), built()
    loss_of(model, batches(0, 1)[0]).backward()
    first.step()
    document = full_state_dict(first, rank0_only=False)
    assert document is not None
    names = sorted(name for group in document["param_groups"] for name in group["param_names"])
    if names != sorted(name for name, _ in MODELS["llama"]().named_parameters()):
        return f"names {names}"
    load_full_state_dict(second, document)
    one, other = ([state[key] for state in o.state.values() for key in sorted(state)] for o in (first, second))
    return FINE if all(map(torch.equal, one, other)) and len(one) == len(other) > 0 else "other state"


def nothing_held() -> str:
    """A gradient makes state also where a rank holds nothing of the parameter: distributed checkpoints count on it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    run = start("llama", "fsdp1")
    parameters = list(run.model.parameters())
    if all(p.numel() for p in parameters):
        return f"rank {dist.get_rank()} holds something of everything: the case shows nothing"
    get_optimizer_state_dict(run.model, run.optimizer)  # torch makes state by a step with zero gradients
    without = sum(not run.optimizer.state.get(p) for p in parameters)
    return FINE if not without else f"{without} parameters have no state on rank {dist.get_rank()}"
