"""One case through the optimizer, beside the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optimizer import AdamMini
from tests.fuzz.draw import Case, strided
from tests.fuzz.references import Blocks, Factored, reference_of

# Of one rounding, relative; what a step does with it is in ``_allowed``.
_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


def run(case: Case) -> None:
    """Raise AssertionError where a parameter, its gradient, a counter or the state is not what it must be."""
    generator = torch.Generator().manual_seed(case.seed)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for _, shape, _, _ in case.tensors]
    leaf = not case.engine.get("differentiable")
    params = [_parameter(x.to(case.dtype), t[2], leaf) for x, t in zip(start, case.tensors, strict=True)]
    optimizer, step = _optimizer(case, params)
    references = _references(case, params)
    travelled = [torch.zeros_like(reference.p) for reference in references]
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
            _advance(case, grad, references[i], travelled[i])
    for i, (p, reference) in enumerate(zip(params, references, strict=True)):
        assert float(optimizer.state[p].get("step", 0)) == reference.t, f"tensor {i}: wrong number of steps"
        if reference.t:
            _compare(case, i, p.detach(), reference, travelled[i], optimizer.state[p])


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


def _references(case: Case, params: list[Any]) -> list[Blocks | Factored]:
    whole = (p.detach().double().clone(memory_format=torch.contiguous_format) for p in params)
    return [reference_of(layout, p) for (layout, _, _, _), p in zip(case.tensors, whole, strict=True)]


def _advance(case: Case, grad: Tensor, reference: Blocks | Factored, travelled: Tensor) -> None:
    """The reference takes the step; ``travelled`` adds up how far each element could have moved."""
    options = case.options
    beta1, beta2 = options["betas"]
    before, g = reference.p, grad.double() / (case.scale or 1.0)
    reference.step(
        g, lr=options["lr"], beta1=beta1, beta2=beta2, eps=options["eps"], weight_decay=options["weight_decay"],
        maximize=options["maximize"],
    )  # fmt: skip
    travelled += (reference.p - before).abs() + options["lr"]
    root = (reference.second() / (1 - beta2**reference.t)).sqrt() + options["eps"]
    if case.dtype == torch.float16 and options["exp_avg_dtype"] is None:
        # Of an fp16 moment nothing is left below 2^-25: how far the step goes with that, in units of a rounding.
        travelled += options["lr"] * 2.0**-25 / (1 - beta1) / root / _UNIT[torch.float16]
    if isinstance(options["exp_avg_dtype"], str) and isinstance(reference, Factored) and g.numel():
        # A code is wrong by a share of the largest moment of its block, and each element has a root of its own.
        travelled += options["lr"] * g.abs().max() / root


def _compare(case: Case, i: int, p: Tensor, reference: Blocks | Factored, travelled: Tensor, own: Any) -> None:
    # The second moment is exact to rounding whatever happens to the first one and the parameter.
    unit = _UNIT[torch.float64 if case.dtype == torch.float64 else torch.float32]
    for name, got, given in reference.moments(own):
        error = (got - given).abs() - 256 * unit * given
        assert not (error > 0).any(), f"tensor {i}: {name} off by {float(error.max())}"
    allowed = _allowed(case, reference.t, reference.p, travelled)
    off = (p.double() - reference.p).abs() - allowed
    assert p.isfinite().all() and not (off > 0).any(), f"tensor {i}: parameter off by {float(off.max())} too much"


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
