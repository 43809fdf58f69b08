"""AdamMini: AdamW with one second-moment scalar per block of parameters."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from . import checkpoint
from .engines import Engines, register, traced_step
from .groups import anatomies_by_identity, groups_of, named
from .hyper import Hyper
from .options import validate
from .partition import Anatomy, Layout, Rules, discover, layout_of
from .partition.apply import understood
from .partition.discover import module_behind, report_unknown, tagged, tagged_name
from .partition.names import by_name, is_guessed_vector
from .partition.roles import Role, whole_shape
from .sharding import Shards, deepspeed
from .sharding.fsdp1 import facts_of, stamp, stamp_bare
from .state import new_state, state_bytes


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

    State per parameter: ``step`` (0-dim fp32), ``exp_avg`` (the parameter's shape; its dtype or ``exp_avg_dtype``),
    ``exp_avg_sq`` (fp32, one value per index of the layout's axis, equal inside a block; it broadcasts against the
    parameter).

    Args:
        params: a model; ``model.named_parameters()``; ``model.parameters()``; or parameter-group dicts. A model makes
            two groups: weight decay on weights of two and more dimensions, embeddings included, none on norms and
            biases; frozen parameters are left out. Everything else keeps the caller's groups and decay.
        lr: learning rate, >= 0; a one-element tensor is allowed.
        betas: decay of the first and second moment, each in [0, 1); two numbers or two one-element tensors.
        eps: added outside the root, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        rules: what shares a scalar: a shipped set's name, a path to a rules file, or ``Rules``. Overrides by name need
            names: a model, ``named_parameters()``, groups of (name, tensor) pairs, or parameters stamped by ``tag``.
        maximize: ascend instead.
        exp_avg_dtype: of the first moment: None for the parameter's own, a floating-point dtype, or "int8" or "int4"
            for blockwise-scaled codes with stochastic rounding (``optimizer.moments``). Where the native loop does not
            take them (CUDA, strided tensors, ``foreach=True``), such tensors step one by one in torch operations.
        bf16_rounding: how bf16 parameters are rounded where no fp32 copy is kept: None to nearest, "stochastic", or
            "kahan" (a bf16 tensor of compensation beside each).
        foreach: True: operations over lists of tensors. None: that on CUDA where nothing is fused. As in torch, any
            other choice than None decides against fusing unless ``fused=True``.
        fused: None: the best the device and the tensors allow: on CPUs one native pass over memory where a C++
            compiler is found at the first step (the result is cached), on CUDA one Triton kernel for all tensors,
            else what ``foreach`` says. True: fused or an error. False: not fused.
        capturable: keep every number on the device, so that a step can be captured in a CUDA graph.
        differentiable: let autograd through the step; slow, for meta-learning.
        strict: raise instead of warning when a weight of two or more dimensions is not recognised; one for which an
            override of the rules chooses the unit counts as known.

    Raises:
        RuntimeError: flags that torch refuses together.
        ValueError: a hyper-parameter out of range; rules that cannot be read; an override of the rules that matches
            no parameter, or that cannot be looked up for want of names; with ``strict``, an unknown weight.

    Example:
        >>> optimizer = AdamMini(model, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rules: str | os.PathLike[str] | Rules = "adam_mini",
        maximize: bool = False,
        exp_avg_dtype: torch.dtype | str | None = None,
        bf16_rounding: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        strict: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
                    "exp_avg_dtype": exp_avg_dtype, "bf16_rounding": bf16_rounding, "foreach": foreach, "fused": fused,
                    "capturable": capturable, "differentiable": differentiable}  # fmt: skip
        validate(defaults, "argument")
        self.rules = Rules.load(rules)
        self._strict = strict
        self._layouts: list[list[Layout]] = []  # by group position, never by parameter identity
        self._engines, self._shards = Engines(), Shards()
        self._origins: list[list[ref[Tensor]]] = []  # what the layouts were made for, kept alive by others
        self._flattened: deepspeed.Flattened | None = None
        self._handle = register(self)
        self._unknown: dict[str, Anatomy] = {}
        model = params if isinstance(params, nn.Module) else module_behind(params)
        # Known only while the groups are being made: parameters may be swapped for others later on.
        self._known = anatomies_by_identity(model) if model is not None else {}
        if model is not None:
            stamp(model, discover)
        # A model's norms and biases do not decay, also where FSDP keeps them in one parameter with what does.
        self._exempt = isinstance(params, nn.Module)
        super().__init__(groups_of(params) if isinstance(params, nn.Module) else params, defaults)
        self._require_matches()
        self._known, self._exempt = {}, False
        self._report()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``torch.optim.Optimizer``; its parameters are recognised by tag, then by name."""
        validate({**self.defaults, **param_group}, "parameter group's")
        super().add_param_group(param_group)
        try:
            stamp_bare(named(self.param_groups[-1]), lambda p, name, shape: tagged(p, shape) or by_name(name, shape))
            self._layouts.append([self._layout(p, name) for p, name in named(self.param_groups[-1])])
            self._origins.append([ref(p) for p in self.param_groups[-1]["params"]])
        except ValueError:
            self.param_groups.pop()  # a refused group leaves nothing behind
            raise
        if not self._known:  # a group added after construction speaks for itself
            self._report()

    def _layout(self, parameter: Tensor, name: str) -> Layout:
        """The layout of one parameter: from the model, a tag, or its name."""
        if facts := facts_of(parameter):
            return facts.layout(self._layout_of, exempt=self._exempt)
        return self._layout_of(self._anatomy(parameter, name), self._full_name(parameter, name), name)

    def _layout_of(self, anatomy: Anatomy, full_name: str, name: str = "") -> Layout:
        if self.rules.overrides and not full_name:
            raise ValueError(
                f"rules {self.rules.name!r} have overrides by name ({self.rules.overrides[0].pattern!r}), but a "
                f"parameter of shape {anatomy.shape} has no name; pass the model, model.named_parameters(), "
                "or tag(model) first"
            )
        if not understood(anatomy, self.rules, full_name) or is_guessed_vector(anatomy):
            self._unknown[name or full_name or f"unnamed #{len(self._unknown)}"] = anatomy
        return layout_of(anatomy, self.rules, full_name)

    def _anatomy(self, parameter: Tensor, name: str) -> Anatomy:
        known = self._known.get(id(parameter))
        return (known[1] if known else tagged(parameter)) or by_name(name, whole_shape(parameter))

    def _full_name(self, parameter: Tensor, name: str) -> str:
        """The name that the rules' overrides speak of: the caller's, else the model's, else the tag's."""
        return name or self._known.get(id(parameter), ("", None))[0] or tagged_name(parameter)

    def _require_matches(self) -> None:
        """Every override of the rules speaks of something: a parameter of the model, frozen ones included, or ours."""
        own = (self._full_name(p, name) for group in self.param_groups for p, name in named(group))
        flat = (name for group in self.param_groups for p in group["params"] if (f := facts_of(p)) for name in f.names)
        self.rules.require_matches([*own, *flat, *(name for name, _ in self._known.values())])

    def _report(self) -> None:
        report_unknown(self._unknown, self.rules[Role.OTHER].value, strict=self._strict)
        self._unknown = {}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves unscaling and the check for inf to ``step``: asked for by ``fused``."""
        return bool(self.defaults["fused"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: recomputes the loss and returns it; called with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient that cannot be stepped (sparse, complex, of another dtype or device), state that
                no longer fits its parameter, or ``fused=True`` where it cannot be; nothing has changed then.
            ValueError: a parameter whose shape no longer fits its layout; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() and not self.defaults["differentiable"]:
            traced_step(self, self._handle)
        elif not self._skips():
            self._accelerator_graph_capture_health_check()
            with torch.set_grad_enabled(self.defaults["differentiable"]), self._whole() as calls:
                for which, only in calls:
                    self._step(which, only)
        return loss

    def _before_step(self) -> None:
        """For subclasses: torch runs the hooks of a ``step`` that calls another one's twice."""

    def _skips(self) -> bool:
        """Whether a GradScaler found that this step must not happen; on other devices the engines look themselves."""
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf)

    def _step_parameter(self, g: int, i: int) -> None:
        """Take the step of one parameter alone."""
        self._step((g,), i)

    def _step(self, which: Iterable[int] | None = None, only: int | None = None) -> None:
        """Check everything, hear from other ranks, and only then change anything."""
        self._before_step()
        which = range(len(self.param_groups)) if which is None else which
        here = self._shards.begin(self.param_groups, self._layouts, self.state, which, only)
        try:
            work = [
                self._engines.prepare(g, here.groups[g], here.layouts[g], here.states[g], here.among(g, only))
                for g in which
            ]
            here.exchange(getattr(self, "grad_scale", None))
            for part in work:
                self._engines.step(part, self._hyper(part.group), here.state_of(self._local_state_of))
            here.step(self._hyper, self._local_state_of)
        finally:
            here.end()

    @contextmanager
    def _whole(self) -> Iterator[list[tuple[Iterable[int] | None, int | None]]]:
        """While this is open, ``param_groups`` hold everything that has a layout; yields what a step takes of it.

        They do anyway but under DeepSpeed, which puts tensors of its own there, and only some of them at a time.
        """
        if self._flattened is None and deepspeed.loaded() and self._replaced():
            self._before_step()
            known = {
                id(parameter): layout
                for refs, own in zip(self._origins, self._layouts, strict=True)
                for origin, layout in zip(refs, own, strict=True)
                if (parameter := origin()) is not None
            }
            self._flattened = deepspeed.flattened(self, lambda parameter: known.get(id(parameter)))
            if self._flattened is None:
                self._origins = [[ref(p) for p in group["params"]] for group in self.param_groups]
            else:
                self._layouts = self._flattened.layouts
                self._engines, self._shards = Engines(), Shards()
        if self._flattened is None:
            yield [(None, None)]
            return
        with self._flattened.whole(self) as calls:
            self._shards.settle(self.param_groups, self._layouts, self.state)
            yield list(calls)

    def _replaced(self) -> bool:
        """Whether a group has other parameters than it was built with, as far as number and the first one tell."""
        return len(self.param_groups) != len(self._origins) or any(
            len(group["params"]) != len(refs) or (refs and refs[0]() is not group["params"][0])
            for group, refs in zip(self.param_groups, self._origins, strict=True)
        )

    def _hyper(self, group: Mapping[str, Any]) -> Hyper:
        """The group's numbers, with what a GradScaler handed over."""
        return Hyper.of(group, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _state_of(self, g: int, i: int) -> dict[str, Any]:
        """A parameter's state, made at its first gradient."""
        group = self.param_groups[g]
        state = self.state[group["params"][i]]
        if not state:
            shard = self._shards.of(g, i, group, self._layouts[g][i])
            state.update(
                new_state(group["params"][i], self._layouts[g][i], group)
                if shard is None
                else self._shards.new_state(shard, group)
            )
        return state

    def _local_state_of(self, g: int, i: int) -> dict[str, Any]:
        """What this rank holds of a parameter's state."""
        state = self._state_of(g, i)
        shard = self._shards.of(g, i, self.param_groups[g], self._layouts[g][i])
        return state if shard is None else shard.local_state(state)

    def init_state(self) -> None:
        """Make all state now, as zeros, so that its memory is known before the first step; otherwise a parameter's is
        made at its first gradient."""
        with self._whole():
            for g, group in enumerate(self.param_groups):
                for i, parameter in enumerate(group["params"]):
                    if parameter.requires_grad:
                        self._state_of(g, i)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state on this rank by kind, for every parameter, whether its state exists yet or not."""
        total: Counter[str] = Counter()
        with self._whole():
            for g, (group, layouts) in enumerate(zip(self.param_groups, self._layouts, strict=True)):
                for i, (parameter, layout) in enumerate(zip(group["params"], layouts, strict=True)):
                    shard = self._shards.of(g, i, group, layout)
                    total.update(state_bytes(parameter, layout, group) if shard is None else shard.state_bytes(group))
        return dict(total)

    def state_dict(self) -> dict[str, Any]:
        """The state as in ``torch.optim.Optimizer``; every group also names the ``rules``.

        Second moments of parameters that FSDP1 or DeepSpeed flattened have one value per element there, as they demand.
        """
        with self._whole(), checkpoint.naming(self, self.rules):
            return self._shards.widened(super().state_dict(), self.param_groups, self._layouts)

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
        with self._whole():
            state_dict = self._shards.narrowed(state_dict, self.param_groups, self._layouts, convert=convert)
            with checkpoint.loading(self, self._layouts, self.rules, convert=convert):
                super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over pickled or loaded state; options that older checkpoints lack get their defaults."""
        super().__setstate__(state)
        self._engines, self._shards, self._handle = Engines(), Shards(), register(self)
        if "_origins" not in self.__dict__:  # a copy or a pickle, whose parameters are its own
            self._flattened, self._origins = None, [[ref(p) for p in group["params"]] for group in self.param_groups]
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        extra = {
            "rules": self.rules,
            "_layouts": self._layouts,
            "_strict": self._strict,
            "_unknown": {},
            "_known": {},
            "_exempt": False,
        }
        return {**super().__getstate__(), **extra}
