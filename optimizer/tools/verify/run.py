"""Verify a model: run it, gather footprints attention by attention, compare with the table."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...partition import Anatomy, Role, Rules, discover, layout_of
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
    """Compare the table's word on queries, keys and values with what gradients of the model say.

    The model is copied (weights perturbed, so that nothing is zero by initialisation) and run; see ``footprints`` for
    the reasoning. Norms are held at their scale, dropout is off.

    Args:
        model: a small instance; the work grows with the square of the width of an attention.
        inputs: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments, or a list
            of these for several forward passes. None: guessed.
        seed: of the perturbation and of guessed inputs.
        every_layer: look at every layer; otherwise one of those with equal class and shapes speaks for all.

    Returns:
        ``Report``.

    Raises:
        ValueError: no attention in the model; or no forward pass could be run with guessed inputs.
        RuntimeError: a forward pass with the inputs given fails.
    """
    anatomies = discover(model)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on the meta device and has no values; build a small one with weights")
    targets = {name: a for name, a in anatomies.items() if is_target(name, a, model)}
    probe = perturbed(model, seed)
    evidence: dict[str, tuple[Footprints, Tensor | None]] = {}
    ran = []
    for forward in forwards_of(probe, inputs, seed):
        with watching(probe) as seen, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # second derivatives, too
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
        found, heads = evidence.get(name, (None, None))
        findings.append(judge(name, anatomy, layout_of(anatomy, rules), found, heads))
    return Report(tuple(_spoken_for(findings, targets)), tuple(ran))


def is_target(name: str, anatomy: Anatomy, model: nn.Module) -> bool:
    """Whether a parameter is, or might be, a projection to queries, keys or values."""
    if len(anatomy.shape) < 2:
        return False
    return bool(set(anatomy.roles) & HEAD_ROLES) or (Role.OTHER in anatomy.roles and _in_attention(name, model))


def _in_attention(name: str, model: nn.Module) -> bool:
    parts = name.split(".")
    modules = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return any(_ATTENTION.search(type(m).__name__) for m in modules[-3:])


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    """A copy in float32, in eval mode, with noise on every floating parameter."""
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
    """Make a depthwise convolution keep only the present tap, so that positions stay apart; channels never mixed."""
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
    """Footprints of every attention the forward pass went through, unless a like one is known already."""
    done: set[Any] = set()
    modules = dict(probe.named_modules())
    for scope, out in _attentions(seen, targets, anatomies):
        inside = [path for path in seen.order if path.startswith(scope) and path != out]
        key = tuple((re.sub(r"\d+", "#", path), tuple(modules[path].weight.shape)) for path in inside)
        if key in done and not every_layer:
            continue
        known = {path: anatomies[f"{path}.weight"] for path in inside if f"{path}.weight" in anatomies}
        declared = any(f"{path}.weight" in targets for path in inside)
        parts = [part for anatomy in known.values() for part in anatomy.parts]
        complete = {part.role for part in parts} >= HEAD_ROLES or any(part.shared for part in parts)
        if not declared and all(anatomy.declared for anatomy in known.values()):
            continue
        leaves = {path: seen.outputs[path] for path in inside}
        axes = {path: 1 if is_convolution(modules[path]) else -1 for path in inside}
        if not declared and not _mixes_positions(seen.inputs[out], leaves, axes):
            continue  # a feed-forward block: every unit acts at its own position
        found = footprints(seen.inputs[out], leaves, axes)
        heads = _heads(found)
        if not declared and not looks_like_attention(found, heads):
            continue
        for path in inside:
            name = f"{path}.weight"
            if path not in found or path not in known or known[path].role is Role.ATTENTION_OUT:
                continue
            if name not in targets and complete:
                continue  # beside queries, keys and values: gates and other numbers of a head, each its own
            targets.setdefault(name, known[path])
            if name not in evidence or not evidence[name][0].moves.any():
                evidence[name] = (found[path], heads)
                done.add(key)
    for path, (given, output) in seen.joint.items():
        for leaf, found_one in joint_footprints(modules[path], given, output).items():
            name = f"{path}.{leaf}" if path else leaf
            if name in targets:
                evidence[name] = (found_one, None)


def _mixes_positions(z: Tensor, leaves: dict[str, Tensor], axes: dict[str, int]) -> bool:
    """Whether the last position of z depends on another position of some projection: one backward pass."""
    last = z.reshape(-1, z.shape[-1])[-1]
    grads = torch.autograd.grad(last.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
    for (name, _), g in zip(leaves.items(), grads, strict=True):
        if g is not None:
            moved = g.movedim(axes[name], -1).reshape(-1, leaves[name].shape[axes[name]])
            if bool((moved[:-1] != 0).any()):
                return True
    return False


def _attentions(seen: Watched, targets: dict[str, Anatomy], anatomies: dict[str, Anatomy]) -> Iterable[tuple[str, str]]:
    """(prefix of everything inside an attention, path of its output projection).

    Around a target the scope grows until an output projection is in it; elsewhere only a module's own children count.
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
    """A path and those around it."""
    for _ in range(levels):
        yield path
        if not path:
            return
        path = path.rpartition(".")[0]


def _output_projection(called: Sequence[str], seen: Watched, anatomies: dict[str, Anatomy]) -> str | None:
    """What leads back from the heads: by its role, else the last projection here that depends on those before it."""
    best = None
    for i, path in enumerate(called):
        taken, anatomy = seen.inputs.get(path), anatomies.get(f"{path}.weight")
        role = anatomy.role if anatomy is not None else Role.OTHER
        if role in HEAD_ROLES or i == 0 or taken is None or not taken.requires_grad:
            continue
        before = [seen.outputs[p] for p in called[:i]]
        grads = torch.autograd.grad(taken.sum(), before, retain_graph=True, allow_unused=True)
        if any(g is not None and bool((g != 0).any()) for g in grads):
            if role is Role.ATTENTION_OUT:
                return path
            best = path
    return best


def _heads(found: dict[str, Footprints]) -> Tensor | None:
    """Heads of z's features as the queries show them, int64 [features]: one head where every query moves both or none.

    Where positions tell nothing, footprints without a gap stand in for queries.
    """
    local = [f.moves[~f.elsewhere] for f in found.values() if f.elsewhere is not None]
    rows = [rows[rows.sum(1) > 1] for rows in local]
    if not any(len(r) for r in rows):
        rows = [f.moves[[_without_gap(row) for row in f.moves]] for f in found.values()]
    if not any(len(r) for r in rows):
        return None
    return torch.unique(torch.unique(torch.cat(rows), dim=0).T, dim=0, return_inverse=True)[1]


def _without_gap(row: Tensor) -> bool:
    """Whether a footprint is two or more neighbouring features."""
    at = row.nonzero().flatten()
    return len(at) > 1 and int(at[-1] - at[0]) == len(at) - 1


def _spoken_for(findings: list[Finding], targets: dict[str, Anatomy]) -> list[Finding]:
    """Layers nobody looked at take the word of one with the same name but for its number, the same claim and shape."""

    def kind(finding: Finding) -> tuple[str, str, tuple[int, ...]]:
        return re.sub(r"\d+", "#", finding.name), finding.claim, targets[finding.name].shape

    known = {kind(f): f for f in findings if f.verdict is not Verdict.UNDECIDED}
    out = []
    for finding in findings:
        other = known.get(kind(finding))
        if finding.verdict is Verdict.UNDECIDED and other is not None:
            finding = Finding(finding.name, other.verdict, finding.claim, f"as {other.name}: {other.why}")
        out.append(finding)
    return out


__all__ = ["Forward", "is_projection", "is_target", "perturbed", "verify"]
