"""One case through the optimizer, beside the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optimizer import AdamMini
from optimizer.step.reference import initial_state, reference_step
from tests.fuzz.draw import Case, strided

# Of one rounding, relative; what a step does with it is in ``_allowed``.
_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


def run(case: Case) -> None:
    """Raise AssertionError where a parameter, its gradient, a counter or the state is not what it must be."""
    generator = torch.Generator().manual_seed(case.seed)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for _, shape, _, _ in case.tensors]
    leaf = not case.engine.get("differentiable")
    params = [_parameter(x.to(case.dtype), t[2], leaf) for x, t in zip(start, case.tensors, strict=True)]
    optimizer, step = _optimizer(case, params)
    expected, states, travelled = _references(case, params)
    for s in range(case.steps):
        if s == case.reload:
            optimizer.load_state_dict(optimizer.state_dict())
        grads = [_gradient(case, p, generator, t[3]) for p, t in zip(params, case.tensors, strict=True)]
        given = {}
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            p.grad = None if (s, i) in case.missing else grad
            if p.grad is not None:
                given[i] = (grad, grad.clone(), grad._version)
        step()
        for i, (grad, before, version) in given.items():
            assert torch.equal(grad, before) and grad._version == version, "the gradient was touched"
            _advance(case, i, grad, expected, states, travelled)
    for i, p in enumerate(params):
        assert float(optimizer.state[p].get("step", 0)) == states[i].t, f"tensor {i}: wrong number of steps"
        if states[i].t:
            _compare(case, i, p.detach(), expected[i], states[i], travelled[i], optimizer.state[p])


def _parameter(x: Tensor, how: str, leaf: bool) -> Any:
    if leaf:
        return nn.Parameter(strided(x, how))
    return strided(x, how).clone().requires_grad_().clone()


def _optimizer(case: Case, params: list[Any]) -> tuple[AdamMini, Any]:
    flags = {key: value for key, value in case.engine.items() if key != "compiled"}
    named = [(f"t{i}", p) for i, p in enumerate(params)]
    optimizer = AdamMini(named, **case.options, **flags)
    optimizer.layouts[0] = [layout for layout, _, _, _ in case.tensors]
    if case.scale is not None:
        optimizer.grad_scale = torch.tensor(case.scale)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    if case.engine.get("compiled"):
        torch._dynamo.reset()
        return optimizer, torch.compile(optimizer.step, backend="aot_eager")
    return optimizer, optimizer.step


def _gradient(case: Case, p: Tensor, generator: torch.Generator, how: str) -> Tensor:
    size = case.gradient * (case.scale or 1.0)
    x = (torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5) * 1.9 * size
    return strided(x.to(case.dtype), how)


def _references(case: Case, params: list[Any]) -> tuple[list[Tensor], list[Any], list[Tensor]]:
    expected = [p.detach().double().clone(memory_format=torch.contiguous_format) for p in params]
    ids = [layout.block_ids(shape) for layout, shape, _, _ in case.tensors]
    states = [initial_state(e, i) for e, i in zip(expected, ids, strict=True)]
    return expected, states, [torch.zeros_like(e) for e in expected]


def _advance(
    case: Case, i: int, grad: Tensor, expected: list[Tensor], states: list[Any], travelled: list[Tensor]
) -> None:
    """The reference takes the step; ``travelled`` adds up how far each element could have moved."""
    layout, shape, _, _ = case.tensors[i]
    beta1, beta2 = case.options["betas"]
    g = grad.double() / (case.scale or 1.0)
    new = reference_step(
        expected[i], g, states[i], layout.block_ids(shape), lr=case.options["lr"], beta1=beta1, beta2=beta2,
        eps=case.options["eps"], weight_decay=case.options["weight_decay"], maximize=case.options["maximize"],
    )  # fmt: skip
    travelled[i] += (new - expected[i]).abs() + case.options["lr"]
    if case.dtype == torch.float16 and case.options["exp_avg_dtype"] is None:
        # Of an fp16 moment nothing is left below 2^-25: how far the step goes with that, in units of a rounding.
        root = (states[i].v.double() / (1 - beta2 ** states[i].t)).sqrt() + case.options["eps"]
        lost = case.options["lr"] * 2.0**-25 / (1 - beta1) / root / _UNIT[torch.float16]
        travelled[i] += lost[layout.block_ids(shape)]
    expected[i] = new


def _compare(case: Case, i: int, p: Tensor, wanted: Tensor, state: Any, travelled: Tensor, own: dict[str, Any]) -> None:
    layout, shape, _, _ = case.tensors[i]
    # The second moment is exact to rounding whatever happens to the first one and the parameter.
    v = own["exp_avg_sq"].double().reshape(layout.unfolded().aligned_shape(_view(layout, shape)))
    blocks = v.expand(_view(layout, shape)).reshape(-1)
    given = state.v.double()[layout.block_ids(shape).reshape(-1)] if blocks.numel() else blocks
    unit = _UNIT[torch.float64 if case.dtype == torch.float64 else torch.float32]
    error = (blocks - given).abs() - 256 * unit * given
    assert not (error > 0).any(), f"tensor {i}: second moment off by {float(error.max())}"
    allowed = _allowed(case, state.t, wanted, travelled)
    off = (p.double() - wanted).abs() - allowed
    assert p.isfinite().all() and not (off > 0).any(), f"tensor {i}: parameter off by {float(off.max())} too much"


def _view(layout: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if layout.fold == 1 else (layout.fold, shape[0] // layout.fold, *shape[1:])


def _allowed(case: Case, steps: int, wanted: Tensor, travelled: Tensor) -> Tensor:
    """How far rounding may carry a parameter: its own, its moment's, and a code's where the moment is quantised."""
    unit = _UNIT[case.dtype]
    moment = case.options["exp_avg_dtype"]
    share = {None: unit, torch.float32: 2.0**-24, "int8": 2.0**-5, "int4": 0.6}[moment]
    if moment is None and case.dtype == torch.float64:
        return 1e-12 * (1 + wanted.abs() + travelled)
    if isinstance(moment, str):  # a code stands for the largest element of its block, not for its own
        travelled = travelled.max().expand_as(travelled) if travelled.numel() else travelled
    return 4 * steps * (2 * unit * (wanted.abs() + travelled) + (share + 8 * unit) * travelled) + 1e-12
