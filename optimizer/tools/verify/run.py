"""Verify a model: run it, compute the footprints of every attention, and compare them with the partition."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...partition import Anatomy, Layout, Role, Rules, discover, layout_of
from ...partition.families import is_convolution
from ...partition.roles import HEAD_ROLES
from .compare import judge, looks_like_attention
from .footprints import Footprints, footprints
from .inputs import Forward, forwards_of
from .joint import joint_footprints, open_output
from .report import Finding, Report, Verdict
from .taps import Watched, is_projection, watching

_ATTENTION = re.compile(r"(?i)attention|attn|mixer|deltanet|mla$")


def verify(model: nn.Module, inputs: Any = None, *, seed: int = 0, every_layer: bool = False) -> Report:
    """Check with gradients which weights of a model are queries, keys and values, and which rows are a head.

    A copy of the model is run in eval mode. Its weights are perturbed, so that none is zero by initialisation, and the
    statistics of its norms are treated as constants. The derivatives of an attention's output then show which output
    units of a projection form a head; ``optimizer.tools.verify.footprints`` describes the method.

    Args:
        model: a small model with weights. The time grows with the square of the width of an attention.
        inputs: what to call the model with: a tensor, a tuple of arguments or a dict of keyword arguments, or a list of
            these for several forward passes. None to guess inputs from the model.
        seed: seed of the perturbation and of guessed inputs.
        every_layer: check every layer. Otherwise one of several layers with equal names, apart from numbers, and equal
            shapes is checked, and the others have the same verdict.

    Returns:
        One finding for each parameter that is, or might be, a query, key or value projection.

    Raises:
        ValueError: the model has no attention or no weights, or no forward pass could be run with guessed inputs.
        RuntimeError: a forward pass with the user's inputs failed.
    """
    anatomies = discover(model)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on the meta device and has no values; build a small one with weights")
    targets = {name: a for name, a in anatomies.items() if is_target(name, a, model)}
    probe = perturbed(model, seed)
    evidence: dict[str, tuple[Footprints, Tensor | None]] = {}
    ran = []
    for forward in forwards_of(probe, inputs, seed):
        with (
            watching(probe) as seen,
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # Only MATH has second derivatives.
            complaint = forward.run()
        if complaint and inputs is not None:
            raise RuntimeError(f"the forward pass {forward.name} fails: {complaint}; give other inputs")
        if seen.order or seen.joint:
            ran.append(forward.name + (f" (stopped: {complaint})" if complaint else ""))
            with sdpa_kernel(SDPBackend.MATH):
                _gather(probe, seen, targets, anatomies, evidence, every_layer)
    if not ran:
        raise ValueError(
            f"no forward pass of {type(model).__name__} could be run with guessed inputs; give inputs= (in a shell: "
            "--inputs module:function, a function that returns a tuple or a dict of arguments)"
        )
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no query, key or value projection, calls nothing attention, and no projection "
            "of it reaches across positions as one would: there is nothing to verify"
        )
    rules = Rules("adam_mini")
    findings = []
    for name, anatomy in targets.items():
        footprint, heads = evidence.get(name, (None, None))
        layout = layout_of(anatomy, rules)
        assert isinstance(layout, Layout)  # these rules factor nothing
        findings.append(judge(name, anatomy, layout, footprint, heads))
    return Report(tuple(_with_equal_layers(findings, targets)), tuple(ran))


def is_target(name: str, anatomy: Anatomy, model: nn.Module) -> bool:
    """Return whether a parameter is, or might be, a projection to queries, keys or values."""
    if len(anatomy.shape) < 2:
        return False
    return bool(set(anatomy.roles) & HEAD_ROLES) or (Role.OTHER in anatomy.roles and _in_attention(name, model))


def _in_attention(name: str, model: nn.Module) -> bool:
    """Return whether one of the three innermost modules around a parameter has a class named like an attention."""
    parts = name.split(".")
    modules = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return any(_ATTENTION.search(type(m).__name__) for m in modules[-3:])


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of the model in float32 and eval mode, with noise added to every floating-point parameter."""
    out = copy.deepcopy(model).float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in out.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                scale = 0.05 if parameter.ndim < 2 else 0.5 / max(1, parameter.shape[-1]) ** 0.5
                parameter.nan_to_num_(0.0, 0.0, 0.0).add_(noise.to(parameter.device), alpha=scale)
        for module in out.modules():
            if isinstance(module, nn.MultiheadAttention):
                open_output(module)
            if isinstance(module, nn.Conv1d) and module.groups == module.in_channels == module.out_channels:
                _pass_through(module)
    return out


def _pass_through(convolution: nn.Conv1d) -> None:
    """Make a depthwise convolution use the current position only, with weight one, so that it mixes no positions."""
    width = convolution.kernel_size[0]
    padding = convolution.padding[0] if isinstance(convolution.padding, tuple) else width // 2
    convolution.weight.zero_()
    convolution.weight[:, :, min(padding, width - 1) if padding else width - 1] = 1.0


def _gather(
    probe: nn.Module,
    seen: Watched,
    targets: dict[str, Anatomy],
    anatomies: dict[str, Anatomy],
    evidence: dict[str, tuple[Footprints, Tensor | None]],
    every_layer: bool,
) -> None:
    """Compute the footprints of every attention of a forward pass and store them in ``evidence``.

    Args:
        probe: the perturbed model.
        seen: inputs and outputs of the forward pass.
        targets: parameters to verify. Projections that behave like an attention's are added.
        anatomies: anatomies of all parameters.
        evidence: parameter name -> (footprints, heads of z), extended by this function.
        every_layer: also compute the footprints of layers that are equal to one already computed.
    """
    done: set[Any] = set()
    modules = dict(probe.named_modules())
    for scope, out in _attentions(seen, targets, anatomies):
        inside = [path for path in seen.order if path.startswith(scope) and path != out]
        key = tuple((re.sub(r"\d+", "#", path), tuple(modules[path].weight.shape)) for path in inside)
        if key in done and not every_layer:
            continue
        weights = {path: anatomies[f"{path}.weight"] for path in inside if f"{path}.weight" in anatomies}
        has_target = any(f"{path}.weight" in targets for path in inside)
        parts = [part for anatomy in weights.values() for part in anatomy.parts]
        complete = {part.role for part in parts} >= HEAD_ROLES or any(part.shared for part in parts)
        if not has_target and all(anatomy.declared for anatomy in weights.values()):
            continue
        leaves = {path: seen.outputs[path] for path in inside}
        axes = {path: 1 if is_convolution(modules[path]) else -1 for path in inside}
        if not has_target and not _mixes_positions(seen.inputs[out], leaves, axes):
            continue  # a feed-forward block, in which every unit acts at its own position only
        scope_evidence = footprints(seen.inputs[out], leaves, axes)
        heads = _heads(scope_evidence)
        if not has_target and not looks_like_attention(scope_evidence, heads):
            continue
        for path in inside:
            name = f"{path}.weight"
            if path not in scope_evidence or path not in weights or weights[path].role is Role.ATTENTION_OUT:
                continue
            if name not in targets and complete:
                continue  # Gates and other extra projections, all of whose units have a scalar each.
            targets.setdefault(name, weights[path])
            if name not in evidence or not evidence[name][0].moves.any():
                evidence[name] = (scope_evidence[path], heads)
                done.add(key)
    for path, (inputs, output) in seen.joint.items():
        for weight, footprint in joint_footprints(modules[path], inputs, output).items():
            name = f"{path}.{weight}" if path else weight
            if name in targets:
                evidence[name] = (footprint, None)


def _mixes_positions(z: Tensor, leaves: dict[str, Tensor], axes: dict[str, int]) -> bool:
    """Return whether the last position of z depends on another position of some projection."""
    last = z.reshape(-1, z.shape[-1])[-1]
    grads = torch.autograd.grad(last.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
    for (name, _), g in zip(leaves.items(), grads, strict=True):
        if g is not None:
            moved = g.movedim(axes[name], -1).reshape(-1, leaves[name].shape[axes[name]])
            if bool((moved[:-1] != 0).any()):
                return True
    return False


def _attentions(seen: Watched, targets: dict[str, Anatomy], anatomies: dict[str, Anatomy]) -> Iterable[tuple[str, str]]:
    """Yield (common prefix of the modules of an attention, path of its output projection) for every attention.

    Around a target, the search goes outwards until it finds a module that contains an output projection. For all other
    modules, only direct children are considered.
    """
    wanted = {name.removesuffix(".weight").rpartition(".")[0] for name in targets}
    for holder in dict.fromkeys(path.rpartition(".")[0] for path in seen.order):
        if holder not in wanted:
            scope = f"{holder}." if holder else ""
            called = [p for p in seen.order if p.startswith(scope) and "." not in p.removeprefix(scope)]
            behind = _output_projection(called, seen, anatomies)
            if behind is not None:
                yield scope, behind
            continue
        nearest = None
        for prefix in _upwards(holder):
            scope = f"{prefix}." if prefix else ""
            behind = _output_projection([p for p in seen.order if p.startswith(scope)], seen, anatomies)
            if behind is None:
                continue
            nearest = nearest or (scope, behind)
            if anatomies[f"{behind}.weight"].role is Role.ATTENTION_OUT:
                nearest = (scope, behind)
                break
        if nearest is not None:
            yield nearest


def _upwards(path: str, levels: int = 3) -> Iterable[str]:
    """Yield a path and the paths of the modules around it, innermost first."""
    for _ in range(levels):
        yield path
        if not path:
            return
        path = path.rpartition(".")[0]


def _output_projection(called: Sequence[str], seen: Watched, anatomies: dict[str, Anatomy]) -> str | None:
    """Return the path of the output projection among the projections called, in the order of the calls.

    It is the first projection with the role ATTENTION_OUT whose input depends on earlier projections; without one, the
    last projection of any other role than query, key or value whose input does.
    """
    best = None
    for i, path in enumerate(called):
        z, anatomy = seen.inputs.get(path), anatomies.get(f"{path}.weight")
        role = anatomy.role if anatomy is not None else Role.OTHER
        if role in HEAD_ROLES or i == 0 or z is None or not z.requires_grad:
            continue
        before = [seen.outputs[p] for p in called[:i]]
        grads = torch.autograd.grad(z.sum(), before, retain_graph=True, allow_unused=True)
        if any(g is not None and bool((g != 0).any()) for g in grads):
            if role is Role.ATTENTION_OUT:
                return path
            best = path
    return best


def _heads(evidence: dict[str, Footprints]) -> Tensor | None:
    """Return the head of every feature of z, int64 [features]; None if the footprints do not show the heads.

    Two features are in one head if every query moves both of them or neither. Queries are the units that move several
    features at their own position only. If there are none, all units that move contiguous features are used instead.
    """
    local = [f.moves[~f.elsewhere] for f in evidence.values() if f.elsewhere is not None]
    rows = [rows[rows.sum(1) > 1] for rows in local]
    if not any(len(r) for r in rows):
        rows = [f.moves[[_is_contiguous(row) for row in f.moves]] for f in evidence.values()]
    if not any(len(r) for r in rows):
        return None
    return torch.unique(torch.unique(torch.cat(rows), dim=0).T, dim=0, return_inverse=True)[1]


def _is_contiguous(row: Tensor) -> bool:
    """Return whether a footprint consists of two or more contiguous features."""
    at = row.nonzero().flatten()
    return len(at) > 1 and int(at[-1] - at[0]) == len(at) - 1


def _with_equal_layers(findings: list[Finding], targets: dict[str, Anatomy]) -> list[Finding]:
    """Copy verdicts to undecided parameters from equal layers: equal names apart from numbers, claims and shapes."""

    def kind(finding: Finding) -> tuple[str, str, tuple[int, ...]]:
        return re.sub(r"\d+", "#", finding.name), finding.claim, targets[finding.name].shape

    decided = {kind(f): f for f in findings if f.verdict is not Verdict.UNDECIDED}
    out = []
    for finding in findings:
        other = decided.get(kind(finding))
        if finding.verdict is Verdict.UNDECIDED and other is not None:
            finding = Finding(finding.name, other.verdict, finding.claim, f"as {other.name}: {other.why}")
        out.append(finding)
    return out


__all__ = ["Forward", "is_projection", "is_target", "perturbed", "verify"]
