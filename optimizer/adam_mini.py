"""AdamMini: AdamW with one second-moment scalar per block of parameters."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .engines import native
from .partition import Anatomy, Layout, Rules, discover, layout_of
from .partition.apply import understood
from .partition.discover import module_behind, report_unknown, tagged, tagged_name
from .partition.names import by_name
from .partition.roles import Role
from .update import adam_mini_update, second_moment_dtype


class AdamMini(torch.optim.Optimizer):
    r"""AdamW that keeps one second-moment scalar per block instead of one per element.

    For each block :math:`b` of the partition (arXiv 2406.16793, Algorithm 1):

    .. math::
        \theta &\leftarrow \theta - \gamma \lambda \theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v_b &\leftarrow \beta_2 v_b + (1 - \beta_2)\, \mathrm{mean}(g_b^2) \\
        \theta_b &\leftarrow \theta_b - \gamma\, \frac{m_b / (1 - \beta_1^t)}{\sqrt{v_b / (1 - \beta_2^t)} + \epsilon}

    with :math:`\gamma` = ``lr``, :math:`\beta_1, \beta_2` = ``betas``, :math:`\epsilon` = ``eps``, :math:`\lambda` =
    ``weight_decay``. The hyper-parameters of AdamW carry over unchanged.

    State per parameter: ``step`` (0-dim fp32), ``exp_avg`` (the parameter's shape and dtype), ``exp_avg_sq`` (fp32,
    one value per index of the layout's axis, equal inside a block; it broadcasts against the parameter).

    Args:
        params: a model; ``model.named_parameters()``; ``model.parameters()``; or parameter-group dicts. A model makes
            two groups: weight decay on weights of two and more dimensions, embeddings included, none on norms and
            biases; frozen parameters are left out. Everything else keeps the caller's groups and decay.
        lr: learning rate, >= 0; a 0-dim tensor is allowed.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added outside the root, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        rules: what shares a scalar: a shipped set's name, a path to a rules file, or ``Rules``. Overrides by name need
            names: a model, ``named_parameters()``, groups of (name, tensor) pairs, or parameters stamped by ``tag``.
        maximize: ascend instead.
        exp_avg_dtype: of the first moment: None for the parameter's own, or a floating-point dtype.
        fused: None: one native pass over memory for contiguous CPU tensors where a C++ compiler is found at the first
            step (the result is cached), eager torch operations elsewhere. True: native or an error. False: eager.
        strict: raise instead of warning when a weight of two or more dimensions is not recognised; one for which an
            override of the rules chooses the unit counts as known.

    Raises:
        ValueError: a hyper-parameter out of range; rules that cannot be read; an override of the rules that matches
            no parameter, or that cannot be looked up for want of names; with ``strict``, an unknown weight.

    Example:
        >>> optimizer = AdamMini(model, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rules: str | os.PathLike[str] | Rules = "adam_mini",
        maximize: bool = False,
        exp_avg_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        strict: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
                    "exp_avg_dtype": exp_avg_dtype, "fused": fused}  # fmt: skip
        _validate(defaults, "argument")
        self.rules = Rules.load(rules)
        self._strict = strict
        self._layouts: list[list[Layout]] = []  # by group position, never by parameter identity
        self._ready: dict[int, list[native.Ready | None]] = {}  # by group position: what the native loop took last time
        self._unknown: dict[str, Anatomy] = {}
        model = params if isinstance(params, nn.Module) else module_behind(params)
        # Known only while the groups are being made: parameters may be swapped for others later on.
        self._known = _anatomies(model) if model is not None else {}
        super().__init__(_groups_of(params) if isinstance(params, nn.Module) else params, defaults)
        self._require_matches()
        self._known = {}
        self._report()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``torch.optim.Optimizer``; its parameters are recognised by tag, then by name."""
        _validate({**self.defaults, **param_group}, "parameter group's")
        super().add_param_group(param_group)
        try:
            self._layouts.append([self._layout(p, name) for p, name in _named(self.param_groups[-1])])
        except ValueError:
            self.param_groups.pop()  # a refused group leaves nothing behind
            raise
        if not self._known:  # a group added after construction speaks for itself
            self._report()

    def _layout(self, parameter: Tensor, name: str) -> Layout:
        """The layout of one parameter: from the model, a tag, or its name."""
        anatomy = self._anatomy(parameter, name)
        full_name = self._full_name(parameter, name)
        if self.rules.overrides and not full_name:
            raise ValueError(
                f"rules {self.rules.name!r} have overrides by name ({self.rules.overrides[0].pattern!r}), but a "
                f"parameter of shape {tuple(parameter.shape)} has no name; pass the model, model.named_parameters(), "
                "or tag(model) first"
            )
        if not understood(anatomy, self.rules, full_name):
            self._unknown[name or f"unnamed #{len(self._unknown)}"] = anatomy
        return layout_of(anatomy, self.rules, full_name)

    def _anatomy(self, parameter: Tensor, name: str) -> Anatomy:
        known = self._known.get(id(parameter))
        return (known[1] if known else tagged(parameter)) or by_name(name, tuple(parameter.shape))

    def _full_name(self, parameter: Tensor, name: str) -> str:
        """The name that the rules' overrides speak of: the caller's, else the model's, else the tag's."""
        return name or self._known.get(id(parameter), ("", None))[0] or tagged_name(parameter)

    def _require_matches(self) -> None:
        """Every override of the rules speaks of something: a parameter of the model, frozen ones included, or ours."""
        own = (self._full_name(p, name) for group in self.param_groups for p, name in _named(group))
        self.rules.require_matches([*own, *(name for name, _ in self._known.values())])

    def _report(self) -> None:
        report_unknown(self._unknown, self.rules[Role.OTHER].value, strict=self._strict)
        self._unknown = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: recomputes the loss and returns it; called with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse or complex gradient, or ``fused=True`` where it cannot be; nothing has changed then.
            ValueError: a parameter whose shape no longer fits its layout; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [self._prepare(g, group, layouts) for g, (group, layouts) in
                enumerate(zip(self.param_groups, self._layouts, strict=True))]  # fmt: skip
        for g, (batches, others) in enumerate(work):
            self._step_group(g, batches, others)
        return loss

    def _prepare(self, g: int, group: dict[str, Any], layouts: list[Layout]) -> tuple[native.Batches, list[int]]:
        """Check everything before anything moves: (tensors the native loop takes as it took them last time, others)."""
        ready = self._ready.setdefault(g, [None] * len(layouts))
        usable = group["fused"] is not False and not torch.compiler.is_compiling() and native.available()
        batches, others = native.Batches(), []
        for i, parameter in enumerate(group["params"]):
            grad = parameter.grad
            if grad is None:
                continue
            known = ready[i]
            if usable and known is not None and known.takes(parameter, grad, self.state.get(parameter, {})):
                batches.add(known, parameter, grad)
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{_where(group, g, i)} has a sparse gradient; use a dense one (nn.Embedding(sparse=False))"
                )
            if parameter.is_complex():
                raise RuntimeError(f"{_where(group, g, i)} is complex; give the optimizer torch.view_as_real of it")
            layouts[i].require(parameter.shape, _where(group, g, i))
            if group["fused"]:
                self._require_native(parameter, grad, _where(group, g, i))
            others.append(i)
        return batches, others

    def _step_group(self, g: int, batches: native.Batches, others: list[int]) -> None:
        """Let each engine take its own."""
        group, layouts, ready = self.param_groups[g], self._layouts[g], self._ready[g]
        beta1, beta2 = (float(beta) for beta in group["betas"])
        common: dict[str, Any] = {name: group[name] for name in ("eps", "weight_decay", "maximize")}
        common |= {"beta1": beta1, "beta2": beta2}
        usable = group["fused"] is not False and not torch.compiler.is_compiling() and native.available()
        for i in others:
            parameter, grad = group["params"][i], group["params"][i].grad
            state = self._state_of(parameter, layouts[i], group["exp_avg_dtype"])
            taken = ready[i] = native.prepare(parameter, grad, state, layouts[i]) if usable else None
            if taken is not None:
                batches.add(taken, parameter, grad)
                continue
            state["step"] += 1
            adam_mini_update(
                parameter, grad, state["exp_avg"], state["exp_avg_sq"], layouts[i], step=state["step"].item(),
                lr=group["lr"], **common,
            )  # fmt: skip
        if len(batches):
            batches.step(lr=float(group["lr"]), **common)

    def _require_native(self, parameter: Tensor, grad: Tensor, where: str) -> None:
        """Raise where ``fused=True`` was asked for and cannot be given."""
        state = self.state.get(parameter) or {
            "exp_avg": parameter, "exp_avg_sq": torch.zeros((), dtype=second_moment_dtype(parameter)),
        }  # fmt: skip
        if not native.available():
            raise RuntimeError("fused=True, but the native step cannot be built here (see the log); use fused=None")
        if native.accepts(parameter, grad, state["exp_avg"], state["exp_avg_sq"]) is None:
            raise RuntimeError(
                f"fused=True, but {where} is on {parameter.device}, {parameter.dtype}, strides {parameter.stride()}, "
                f"its gradient {grad.dtype}, strides {grad.stride()}; the native step takes contiguous floating-point "
                "CPU tensors of one dtype: use fused=None"
            )

    def _state_of(self, parameter: Tensor, layout: Layout, dtype: torch.dtype | None) -> dict[str, Any]:
        """The parameter's state, made at its first gradient."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros(
                layout.aligned_shape(parameter.shape),
                dtype=second_moment_dtype(parameter),
                device=parameter.device,
            )
        return state

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state by kind, for every trainable parameter, whether its state exists yet or not."""
        total = {"exp_avg": 0, "exp_avg_sq": 0, "step": 0}
        for group, layouts in zip(self.param_groups, self._layouts, strict=True):
            for parameter, layout in zip(group["params"], layouts, strict=True):
                aligned = math.prod(layout.aligned_shape(parameter.shape))
                total["exp_avg"] += parameter.numel() * (group["exp_avg_dtype"] or parameter.dtype).itemsize
                total["exp_avg_sq"] += aligned * second_moment_dtype(parameter).itemsize
                total["step"] += torch.float32.itemsize
        return total

    def state_dict(self) -> dict[str, Any]:
        """The state as in ``torch.optim.Optimizer``; every group also names the ``rules``."""
        with checkpoint.naming(self, self.rules):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load state: this optimizer's, Adam's and AdamW's, or the published adam-mini package's.

        Parameters are matched by name where both sides have names, else by position. Dtypes and engine options of the
        running optimizer win. No tensor of the caller's is kept, and nothing changes before all has been checked.

        Args:
            state_dict: as ``state_dict()`` of one of those optimizers returned it.
            convert: rebuild second moments of another partition from block means instead of refusing them.

        Raises:
            ValueError: the state belongs to another partition, other parameters or another kind of optimizer.
        """
        with checkpoint.loading(self, self._layouts, self.rules, convert=convert):
            super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over pickled or loaded state; options that older checkpoints lack get their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        extra = {
            "rules": self.rules,
            "_ready": {},
            "_layouts": self._layouts,
            "_strict": self._strict,
            "_unknown": {},
            "_known": {},
        }
        return {**super().__getstate__(), **extra}


def _where(group: Mapping[str, Any], g: int, i: int) -> str:
    """A parameter in words, for messages."""
    return f"parameter {i} of group {g} ({(group.get('param_names') or {i: 'unnamed'})[i]})"


def _anatomies(model: nn.Module) -> dict[int, tuple[str, Anatomy]]:
    """Name and anatomy by parameter identity, for as long as the groups are being made."""
    parameters = dict(model.named_parameters())
    return {id(parameters[name]): (name, anatomy) for name, anatomy in discover(model).items()}


def _named(group: Mapping[str, Any]) -> list[tuple[Tensor, str]]:
    """(parameter, name or an empty one) of a group."""
    names = group.get("param_names") or [""] * len(group["params"])
    return list(zip(group["params"], names, strict=True))


def _groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, with names: what decays, and norms and biases, which do not."""
    anatomies = discover(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters; unfreeze some before building the optimizer")
    decaying = {"params": [(name, p) for name, p in trainable if anatomies[name].decays]}
    rest = {"params": [(name, p) for name, p in trainable if not anatomies[name].decays], "weight_decay": 0.0}
    return [group for group in (decaying, rest) if group["params"]]


def _validate(options: Mapping[str, Any], what: str) -> None:
    """Hyper-parameters in range and finite, or a ValueError that quotes the value."""
    for name in ("lr", "eps", "weight_decay"):
        value = options[name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{what} {name} must be one number; got a tensor of shape {tuple(value.shape)}")
            if value.device.type != "cpu":
                continue  # looking at it would wait for the device
            value = value.item()
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{what} {name}={value!r} must be a finite number >= 0")
    dtype = options.get("exp_avg_dtype")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2):
        raise ValueError(
            f"{what} exp_avg_dtype={dtype!r} must be None or a dtype such as torch.float32, torch.bfloat16"
        )
    if options.get("fused") not in (None, True, False):
        raise ValueError(f"{what} fused={options['fused']!r} must be None, True or False")
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{what} betas={betas!r} must be two numbers, for example (0.9, 0.95)")
    for i, beta in enumerate(betas):
        if not 0 <= float(beta) < 1:
            raise ValueError(f"{what} betas[{i}]={beta!r} must be in [0, 1)")
