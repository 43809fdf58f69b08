"""Steps on the device against the paper's transcription in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_check.verdict import Check, Evidence, NotRun
from experiments.models import GPTConfig, LlamaConfig, build
from optimizer import AdamMini
from optimizer.partition import FactoredLayout
from optimizer.partition.roles import viewed
from optimizer.step.engines import triton
from optimizer.step.reference import (
    BlockState,
    factored_reference_step,
    initial_factored_state,
    initial_state,
    reference_step,
)

NUMBERS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 3
FEW = 64
"""Blocks up to which the reference is the paper's loop over them."""
RULES = ("adam_mini", "elementwise", "pytorch_default", "slim_adam", "derived", "factored")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LLAMA = LlamaConfig(vocab=131, dim=48, n_layers=1, n_heads=3, n_kv_heads=1, hidden=80)
GPT = GPTConfig(vocab=130, block_size=24, n_embd=36, n_layer=1, n_head=3)
"""Sizes that are no powers of two; the GPT has a fused projection, biases and rows that are no multiples of 16."""
LARGE = {"embedding.weight": (519, 400), "lm_head.weight": (3, 70_001), "norm.bias": (5000,), "norm.scale": ()}
"""Bare tensors beside the models: runs that are cut over programs, odd lengths, a vector, and no axis at all."""
BOUNDS = {"fp32": (5e-6, 5e-6), "bf16": (2e-2, 5e-3), "fp16": (3e-3, 1e-3)}
"""Relative error and absolute error, in units of the weights, that ``STEPS`` steps of size 0.01 may have."""


def many_blocks_step(p: Tensor, g: Tensor, state: BlockState, ids: Tensor, **numbers: float) -> Tensor:
    """Compute ``reference_step`` with one sum over all blocks instead of a loop, whose time is blocks x elements.

    A test compares the two bit for bit up to the order of sums.
    """
    state.t += 1
    flat, index = g.reshape(-1), ids.reshape(-1)
    state.m = numbers["beta1"] * state.m + (1 - numbers["beta1"]) * flat
    sums = torch.zeros_like(state.v).index_add_(0, index, flat * flat)
    state.v = numbers["beta2"] * state.v + (1 - numbers["beta2"]) * sums / index.bincount(minlength=len(sums))
    first = state.m / (1 - numbers["beta1"] ** state.t)
    second = state.v / (1 - numbers["beta2"] ** state.t)
    theta = p.reshape(-1) - numbers["lr"] * numbers["weight_decay"] * p.reshape(-1)
    return (theta - numbers["lr"] * first / (second.sqrt() + numbers["eps"])[index]).reshape(p.shape)


class Reference:
    """The transcription of one tensor's steps, from a copy of the tensor in float64 on the CPU."""

    def __init__(self, parameter: Tensor, layout: Any) -> None:
        self.p, self.layout = parameter.detach().cpu().double(), layout
        self.factored = isinstance(layout, FactoredLayout)
        self.ids = None if self.factored else layout.block_ids(self.p.shape)
        if self.factored:
            self.states: list[Any] = [initial_factored_state(self.p.reshape(-1)[index]) for index in self._parts()]
        else:
            self.states = [initial_state(self.p, self.ids)]

    def _parts(self) -> Iterator[Tensor]:
        """Yield every part of a factored tensor as a matrix of indices into the flattened tensor."""
        layout = self.layout
        ids = torch.arange(self.p.numel()).reshape(viewed(tuple(self.p.shape), layout.fold))
        ids = ids.movedim(layout.axis, len(layout.leading))
        ids = ids.reshape(prod(layout.leading), ids.shape[len(layout.leading)], -1)
        owner = layout.part_of_row()
        for lead in ids:
            for part in range(layout.parts):
                yield lead[owner == part]

    def step(self, grad: Tensor, weight_decay: float) -> None:
        """Take one step with the gradient, which may be on any device and of any dtype."""
        g = grad.detach().cpu().double()
        beta1, beta2 = NUMBERS["betas"]
        more = {
            "beta1": beta1,
            "beta2": beta2,
            "lr": NUMBERS["lr"],
            "eps": NUMBERS["eps"],
            "weight_decay": weight_decay,
        }
        if not self.factored:
            few = len(self.states[0].v) <= FEW
            self.p = (reference_step if few else many_blocks_step)(self.p, g, self.states[0], self.ids, **more)
            return
        new = self.p.reshape(-1).clone()
        for state, index in zip(self.states, self._parts(), strict=True):
            new[index] = factored_reference_step(self.p.reshape(-1)[index], g.reshape(-1)[index], state, **more)
        self.p = new.reshape(self.p.shape)


def subjects(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what is stepped: name -> a model, or (name, parameter) pairs of bare tensors."""
    generator = torch.Generator().manual_seed(0)
    bare = [(n, nn.Parameter(torch.randn(s, generator=generator).to(device, dtype))) for n, s in LARGE.items()]
    return {"llama": build(LLAMA, 0).to(device, dtype), "gpt": build(GPT, 0).to(device, dtype), "bare tensors": bare}


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(parameters: list[Tensor], seed: int) -> None:
    """Draw gradients on the CPU, the same on every device, and give them to the parameters."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def compare(
    subject: Any, dtype: str, evidence: Evidence, step: Callable[..., Any] | None = None, **options: Any
) -> float:
    """Take ``STEPS`` steps of a subject and of the references.

    Args:
        subject: one of ``subjects``.
        dtype: key of ``BOUNDS``.
        evidence: receives the devices of parameters and state.
        step: called with the optimizer instead of its ``step``.
        **options: arguments of AdamMini.

    Returns:
        The largest error of a parameter, as a share of what is allowed.

    Raises:
        AssertionError: it is above 1, or a parameter did not move.
    """
    optimizer = AdamMini(subject, **NUMBERS, **options)
    parameters = parameters_of(optimizer)
    layouts = [layout for row in optimizer.layouts for layout in row]
    decays = [group["weight_decay"] for group in optimizer.param_groups for _ in group["params"]]
    references = [Reference(p, layout) for p, layout in zip(parameters, layouts, strict=True)]
    before = [p.detach().clone() for p in parameters]
    for seed in range(STEPS):
        set_gradients(parameters, seed)
        for reference, p, decay in zip(references, parameters, decays, strict=True):
            reference.step(p.grad, decay)  # type: ignore[arg-type]
        (step or AdamMini.step)(optimizer)
    relative, absolute = BOUNDS[dtype]
    worst = 0.0
    for p, reference, old in zip(parameters, references, before, strict=True):
        assert not torch.equal(p, old), f"a parameter of shape {tuple(p.shape)} did not move"
        error = (p.detach().cpu().double() - reference.p).abs()
        worst = max(worst, float((error / (absolute + relative * reference.p.abs())).max()))
        assert worst <= 1, (
            f"{tuple(p.shape)} {dtype} {options}: error {float(error.max()):.2e} is {worst:.1f} x allowed"
        )
        evidence.saw(t for t in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]))
    return worst


def over_rules(dtypes: tuple[str, ...], **options: Any) -> Callable[[torch.device], Evidence]:
    """Return a check of every subject under every rule set, in some dtypes."""

    def run(device: torch.device) -> Evidence:
        evidence, worst, count = Evidence(), 0.0, 0
        for dtype in dtypes:
            for rules in RULES:
                for subject in subjects(device, DTYPES[dtype]).values():
                    if not isinstance(subject, nn.Module) and rules == "derived":
                        continue  # its overrides name a model's layers
                    worst = max(worst, compare(subject, dtype, evidence, rules=rules, **options))
                    count += 1
        evidence.note = f"{count} subjects x {STEPS} steps, largest error {worst:.2f} of what is allowed"
        return evidence

    return run


def triton_step(dtypes: tuple[str, ...]) -> Callable[[torch.device], Evidence]:
    """Return a check of the Triton engine; ``fused=True`` refuses a step that it would not take."""

    def run(device: torch.device) -> Evidence:
        if not triton.available() or device.type != "cuda":
            raise NotRun(f"the Triton engine is for CUDA devices with Triton installed, and this is {device}")
        return over_rules(dtypes, fused=True)(device)

    return run


def deterministic(device: torch.device) -> Evidence:
    """The default engine gives the same bits twice."""
    evidence, results = Evidence(), []
    for _ in range(2):
        torch.manual_seed(0)
        for subject in subjects(device, torch.bfloat16).values():
            compare(subject, "bf16", evidence, rules="factored")
            results.append(torch.cat([p.detach().flatten() for p in _tensors(subject)]))
    half = len(results) // 2
    assert all(torch.equal(a, b) for a, b in zip(results[:half], results[half:], strict=True)), "two runs differ"
    evidence.note = "two runs of three steps have equal bits"
    return evidence


def _tensors(subject: Any) -> list[Tensor]:
    return list(subject.parameters()) if isinstance(subject, nn.Module) else [p for _, p in subject]


def low_bits(name: str, **options: Any) -> Callable[[torch.device], Evidence]:
    """Return a check of random rounding: the device's step against the same eager step on the CPU.

    Both draw the same random numbers. A sum in another order may change the last bit of a second moment, and then a
    code by one level. So nearly all parameters have to agree closely, and all of them to a step's size.
    """

    def run(device: torch.device) -> Evidence:
        evidence, dtype = Evidence(), torch.bfloat16 if "bf16_rounding" in options else torch.float32
        model = LlamaConfig(vocab=256, dim=96, n_layers=1, n_heads=4, n_kv_heads=2, hidden=256)
        found = []
        for where in (device, torch.device("cpu")):
            subject = build(model, 0).to(where, dtype)
            optimizer = AdamMini(subject, **NUMBERS, fused=False, foreach=False, **options)
            for seed in range(STEPS):
                set_gradients(parameters_of(optimizer), seed)
                optimizer.step()
            found.append(torch.cat([p.detach().cpu().double().flatten() for p in subject.parameters()]))
            if where == device:
                evidence.saw(subject.parameters())
                evidence.saw(s["exp_avg"] for s in optimizer.state.values())
        error = (found[0] - found[1]).abs()
        fine = 1e-5 if dtype == torch.float32 else 8e-3  # bf16 weights near 1 are 0.0078 apart
        close = float((error <= fine * (1 + found[1].abs())).double().mean())
        assert close >= 0.999 and float(error.max()) <= STEPS * NUMBERS["lr"], (
            f"{name}: {100 * (1 - close):.3f} % of the elements differ, by up to {float(error.max()):.2e}"
        )
        evidence.note = f"{100 * close:.4f} % of the elements agree with the CPU, largest difference {error.max():.1e}"
        return evidence

    return run


def scaled_and_skipped(device: torch.device) -> Evidence:
    """A gradient scale divides gradients on the device; with ``found_inf`` set, nothing changes."""
    evidence = Evidence()
    optimizer = AdamMini(build(LLAMA, 0).to(device), **NUMBERS)
    parameters = parameters_of(optimizer)
    plain = AdamMini(build(LLAMA, 0).to(device), **NUMBERS)
    for seed in range(STEPS):
        set_gradients(parameters, seed)
        set_gradients(parameters_of(plain), seed)
        for p in parameters:
            p.grad.mul_(1024.0)  # type: ignore[union-attr]
        optimizer.grad_scale = torch.tensor(1024.0, device=device)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
        optimizer.step()
        plain.step()
    pairs = zip(parameters, parameters_of(plain), strict=True)
    worst = max(float((a - b).detach().abs().max()) for a, b in pairs)
    assert worst <= 1e-6, f"a scale of 1024 changes the result by {worst:.1e}"
    before = [t.clone() for p in parameters for t in (p, *optimizer.state[p].values())]
    optimizer.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    optimizer.step()
    after = [t for p in parameters for t in (p, *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "a skipped step changed a tensor"
    evidence.saw(parameters)
    evidence.note = f"largest difference with a scale {worst:.1e}; a skipped step changes nothing"
    return evidence


CHECKS = (
    Check("default engine, fp32", over_rules(("fp32",))),
    Check("default engine, bf16 and fp16", over_rules(("bf16", "fp16"))),
    Check("Triton, fp32", triton_step(("fp32",))),
    Check("Triton, bf16 and fp16", triton_step(("bf16", "fp16"))),
    Check("foreach, fp32", over_rules(("fp32",), foreach=True)),
    Check("foreach, bf16 and fp16", over_rules(("bf16", "fp16"), foreach=True)),
    Check("eager, fp32", over_rules(("fp32",), foreach=False, fused=False)),
    Check("bf16 parameters with an fp32 moment", over_rules(("bf16",), exp_avg_dtype=torch.float32)),
    Check("same bits twice", deterministic),
    Check("int8 first moment", low_bits("int8", exp_avg_dtype="int8")),
    Check("int4 first moment", low_bits("int4", exp_avg_dtype="int4")),
    Check("bf16 with stochastic rounding", low_bits("stochastic", bf16_rounding="stochastic")),
    Check("bf16 with compensated sums", low_bits("kahan", bf16_rounding="kahan")),
    Check("gradient scale and skipped step", scaled_and_skipped),
)
"""The checks of a step, which all devices can run but those of Triton."""
