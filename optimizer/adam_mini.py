"""AdamMini: AdamW with one second-moment scalar per block of parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .groups import Arrangement, Frozen, Recognition, Source, require_groups, require_initialised, with_model_names
from .groups.states import first_state, total_state_bytes
from .interface import Calls, Position, Stand, wrappers
from .partition import Rules
from .partition.layout import AnyLayout
from .sharding import Shards
from .sharding.shard import Shard
from .state import checkpoint
from .step.engines import Engines, register, traced_step
from .step.hyper import Hyper
from .step.labels import named
from .step.options import validate


class AdamMini(torch.optim.Optimizer):
    r"""AdamW that keeps one second-moment scalar per block instead of one per element.

    For each block :math:`b` of the partition (arXiv 2406.16793, Algorithm 1):

    .. math::
        \theta &\leftarrow \theta - \gamma \lambda \theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v_b &\leftarrow \beta_2 v_b + (1 - \beta_2)\, \mathrm{mean}(g_b^2) \\
        \theta_b &\leftarrow \theta_b - \gamma\, \frac{m_b / (1 - \beta_1^t)}{\sqrt{v_b / (1 - \beta_2^t)} + \epsilon}

    Here :math:`\theta` is the parameter, :math:`g` its gradient, :math:`t` the number of the step, starting at 1,
    :math:`\gamma` = ``lr``, :math:`\beta_1, \beta_2` = ``betas``, :math:`\epsilon` = ``eps`` and :math:`\lambda` =
    ``weight_decay``. Hyper-parameters tuned for AdamW can be used unchanged.

    State of each parameter: ``step`` (0-dim fp32), ``exp_avg`` (:math:`m`, the parameter's shape; its dtype or
    ``exp_avg_dtype``) and ``exp_avg_sq`` (:math:`v`, fp32, or float64 for float64 parameters; one value per index of
    the layout's axis, equal inside a block; its shape broadcasts against the parameter). A tensor with the unit
    ``FACTORED`` also has ``exp_avg_sq_col``: then :math:`v_{ij} = r_i c_j / \mathrm{mean}(r)`, where ``exp_avg_sq`` is
    :math:`r`, the means over rows, and ``exp_avg_sq_col`` is :math:`c`, the means over columns (arXiv 1804.04235).

    Args:
        params: a model, ``model.named_parameters()``, ``model.parameters()``, or parameter-group dicts. A model is
            split into two groups: weight decay applies to weights of two or more dimensions, embeddings included, and
            not to norms and biases; frozen parameters are left out. All other forms keep the caller's groups and
            decay.
        lr: learning rate, >= 0; a number or a one-element tensor.
        betas: decay rates of the first and second moment, each in [0, 1); numbers or one-element tensors.
        eps: number added to the square root in the denominator, >= 0.
        weight_decay: coefficient of the decoupled weight decay, >= 0.
        rules: which elements share a scalar: the name of a shipped set, the path of a rules file, or a ``Rules``
            object. Overrides match parameter names, so they need a model, ``named_parameters()``, groups of
            (name, tensor) pairs, or parameters stamped by ``tag``.
        maximize: if True, maximize the objective instead of minimizing it.
        exp_avg_dtype: dtype of the first moment. None: the parameter's dtype. A floating-point dtype: that dtype.
            "int8" or "int4": blockwise-scaled integer codes with stochastic rounding (``optimizer.step.moments``).
            The native CPU step handles these codes; where it cannot run (CUDA, strided tensors, ``foreach=True``),
            such parameters are stepped one by one with torch operations.
        bf16_rounding: how updates of bf16 parameters are rounded without an fp32 master copy. None: to nearest.
            "stochastic": stochastic rounding. "kahan": compensated summation, which stores one extra bf16 tensor per
            parameter.
        foreach: True: use torch's operations over lists of tensors. None: use them on CUDA if the step is not fused.
            As in torch, True or False rules out the fused step unless ``fused=True``.
        fused: True: use a fused step or raise an error. False: do not use one. None: use one if the device and the
            tensors allow it, otherwise follow ``foreach``. On CPUs it is one native pass over memory, which needs a
            C++ compiler at the first step (the compiled library is cached); on CUDA one Triton kernel for all tensors.
        capturable: if True, keep all numbers on the device, so that a step can be captured in a CUDA graph.
        differentiable: if True, autograd records the step. This is slow and meant for meta-learning.
        strict: if True, raise an error instead of a warning when the role of a weight of two or more dimensions is
            unknown. A weight whose unit is set by an override is accepted.

    Raises:
        RuntimeError: a combination of flags that torch refuses too.
        ValueError: a hyper-parameter is out of range; the rules cannot be read; an override matches no parameter, or
            cannot be applied because parameters have no names; or, with ``strict``, the role of a weight is unknown.

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
        # Unformatted, because a dict of plain name-to-argument pairs does not need twelve lines.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
                    "exp_avg_dtype": exp_avg_dtype, "bf16_rounding": bf16_rounding, "foreach": foreach, "fused": fused,
                    "capturable": capturable, "differentiable": differentiable}  # fmt: skip
        validate(defaults, "argument")
        self.rules = Rules.load(rules)
        self._strict = strict
        self._engines, self._shards = Engines(), Shards()
        self._stand: Stand | None = None  # the tensors that a library steps instead of the parameters
        self._frozen: Frozen | None = None
        self._number = register(self)
        source = Source.of(params)
        self._model = None if source.model is None else ref(source.model)
        self.undecayed = source.undecayed  # names of a model's norms and biases, which never decay
        super().__init__(source.groups, defaults)
        # A model's norms and biases do not decay, even if FSDP joins them with weights in one parameter.
        recognition = Recognition(source.model, self.rules, exempt=isinstance(params, nn.Module))
        # Stored by group position, not by parameter, because parameters may be replaced by other tensors.
        self.layouts: list[list[AnyLayout]] = [self.recognised(recognition, named(g)) for g in self.param_groups]
        recognition.require_matches(self.param_groups)
        recognition.report(strict=strict)
        self._arranged = Arrangement(self.param_groups)  # which parameters the layouts were made for
        if isinstance(params, nn.Module):
            self._frozen = Frozen(params, (p for group in self.param_groups for p in group["params"]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim.Optimizer``.

        The role of each parameter is looked up in the model that the optimizer was built from, then read from the
        stamp of ``tag``, then guessed from the name.

        Raises:
            ValueError: an option is out of range, a parameter is not initialised, or, with ``strict``, the role of a
                weight is unknown. The group is not added then.
        """
        validate({**self.defaults, **param_group}, "parameter group's")
        building = "layouts" not in self.__dict__  # the constructor recognises all groups together
        if not building:
            self.follow_edits()  # the caller may have edited the existing groups
        super().add_param_group(param_group)
        try:
            require_initialised(self.param_groups[-1], len(self.param_groups) - 1)
            if building:
                return
            recognition = Recognition.of(self._model, self.rules)
            group_layouts = self.recognised(recognition, named(self.param_groups[-1]))
            recognition.report(strict=self._strict)
        except ValueError:
            self.param_groups.pop()  # leave the optimizer as it was
            raise
        self.layouts.append(group_layouts)
        self._arranged = Arrangement(self.param_groups)

    def recognised(self, recognition: Recognition, pairs: Sequence[tuple[Tensor, str]]) -> list[AnyLayout]:
        """Return the layouts of (parameter, name) pairs that are new to the optimizer. Subclasses may override it."""
        return recognition.layouts(pairs)

    def follow_edits(self) -> None:
        """Update the layouts after the caller edited ``param_groups``, and make layouts for new parameters.

        Raises:
            TypeError: a group is not a dict with a list of ``params``, or a parameter is not a tensor.
            ValueError: an option is out of range, a parameter occurs twice, or it is not initialised.
        """
        if self._arranged.holds(self.param_groups):
            return
        require_groups(self.param_groups, self.defaults)
        recognition = Recognition.of(self._model, self.rules)
        edit = self._arranged.edit(self.param_groups, self.layouts, recognition.full_name)
        new = self.recognised(recognition, edit.fresh) if edit.fresh else []
        recognition.report(strict=self._strict)
        self.rearrange(edit.positions, new)
        edit.rename(self.param_groups)
        self._arranged = Arrangement(self.param_groups)
        self._engines, self._shards = Engines(), Shards()

    def rearrange(self, positions: Sequence[Sequence[Position]], new: list[AnyLayout]) -> None:
        """Reorder everything that is stored by group position. Subclasses that store more extend it.

        Args:
            positions: for every parameter of the groups, the (group, index) where its layout was before. New
                parameters have the group number ``len(layouts)`` and an index into ``new``.
            new: layouts of the new parameters.
        """
        rows = [*self.layouts, new]
        self.layouts = [[rows[g][i] for g, i in row] for row in positions]

    def replace_layouts(self, layouts: list[list[AnyLayout]]) -> None:
        """Use other layouts from now on. For subclasses that decide on blocks after construction."""
        self.layouts = layouts
        self._engines.forget()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler lets ``step`` unscale gradients and check them for inf: with ``fused=True``."""
        return bool(self.defaults["fused"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: recomputes the loss and returns it; it is called with gradients enabled.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            RuntimeError: a gradient is sparse, complex, or of another dtype or device than its parameter; state does
                not fit its parameter; or ``fused=True`` is impossible. Nothing has changed then.
            ValueError: the shape of a parameter does not fit its layout. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() and not self.defaults["differentiable"]:
            traced_step(self, self._number)
        else:
            self.step_all()
        return loss

    def step_all(self) -> None:
        """Update every parameter that has a gradient, outside a compiled graph."""
        if self.skips():
            return
        if self._frozen:
            self._frozen.look(lambda: self.param_groups)
        self._accelerator_graph_capture_health_check()
        with torch.set_grad_enabled(self.defaults["differentiable"]), self.whole() as calls:
            for groups, parameter in calls:
                self._step(groups, parameter)

    def step_parameter(self, g: int, i: int) -> None:
        """Update parameter ``i`` of group ``g`` and no other."""
        if self._stand is None and not self._arranged.holds_at(self.param_groups, g, i):
            self.follow_edits()
        self._step((g,), i)

    def fix_layouts(self) -> None:
        """Make ``layouts`` final before they are used. For subclasses that decide on blocks at the first step."""

    def skips(self) -> bool:
        """Whether a GradScaler found inf or NaN, so that this step is skipped.

        This is checked on the CPU only; on other devices the engines check it, to avoid a synchronisation.
        """
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf)

    def numbers(self, group: Mapping[str, Any]) -> Hyper:
        """Return the hyper-parameters of a group for this step, with the scale and flag that a GradScaler set."""
        return Hyper.of(group, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _step(self, groups: Iterable[int] | None = None, parameter: int | None = None) -> None:
        """Check all inputs, exchange partial sums with other ranks, and only then change tensors.

        ``groups`` are positions of groups, None for all; ``parameter`` is the index of the only one to step, or None.
        """
        self.fix_layouts()
        groups = range(len(self.param_groups)) if groups is None else groups
        view = self._shards.begin(self.param_groups, self.layouts, self.state, groups, parameter)
        try:
            work = [
                self._engines.prepare(g, view.groups[g], view.layouts[g], view.states[g], view.among(g, parameter))
                for g in groups
            ]
            view.exchange(getattr(self, "grad_scale", None), self._local_columns_of)
            for part in work:
                self._engines.step(part, self.numbers(part.group), view.state_of(self._local_state_of))
            view.step(self.numbers, self._local_state_of)
        finally:
            view.end()

    @contextmanager
    def whole(self) -> Iterator[Calls]:
        """Make ``param_groups`` contain every parameter that has a layout, while this context is open.

        They always do, except under DeepSpeed, which steps tensors of its own, a few at a time.

        Yields:
            The (groups, parameter) arguments of the ``_step`` calls that make up one step.
        """
        if self._stand is None and any(wrapper.may_stand() for wrapper in wrappers()):
            self._find_stand()
        if self._stand is None:
            self.follow_edits()
            yield [(None, None)]
            return
        with self._stand.whole(self) as calls:
            self._shards.settle(self.param_groups, self.layouts, self.state)
            yield list(calls)

    def _find_stand(self) -> None:
        """Ask the wrappers, once the groups have changed, for tensors that a library steps instead of parameters."""
        if self._arranged.holds(self.param_groups):
            return
        self.fix_layouts()
        # The library keeps alive the parameters it replaced, so they can be identified.
        layout_of = self._arranged.layout_finder(self.layouts)
        stands = (wrapper.stand_for(self, layout_of) for wrapper in wrappers())
        self._stand = next((stand for stand in stands if stand is not None), None)
        if self._stand is not None:
            self.layouts = self._stand.layouts
            self._engines, self._shards = Engines(), Shards()

    def shard_of(self, g: int, i: int) -> Shard | None:
        """Return the shard of parameter ``i`` of group ``g`` on this rank; None if the parameter is not sharded."""
        return self._shards.of(g, i, self.param_groups[g], self.layouts[g][i])

    def state_of(self, g: int, i: int) -> dict[str, Any]:
        """Return the state of parameter ``i`` of group ``g``; create it if there is none."""
        group = self.param_groups[g]
        parameter = group["params"][i]
        state = self.state[parameter]
        if not state:
            state.update(first_state(parameter, self.layouts[g][i], self.shard_of(g, i), group))
        return state

    def _local_state_of(self, g: int, i: int) -> dict[str, Any]:
        """Return the part of a parameter's state that is on this rank, as local tensors."""
        state, shard = self.state_of(g, i), self.shard_of(g, i)
        return state if shard is None else shard.local_state(state)

    def _local_columns_of(self, g: int, i: int) -> Tensor | None:
        """Return a sharded parameter's local column means; None if it has no state yet, or they are not factored."""
        state, shard = self.state.get(self.param_groups[g]["params"][i]), self.shard_of(g, i)
        return shard.local_state(state).get("exp_avg_sq_col") if state and shard is not None else None

    def init_state(self) -> None:
        """Create all state now, filled with zeros, so that its memory is allocated before the first step.

        Without this call, the state of a parameter is created at its first gradient.
        """
        with self.whole():
            for g, group in enumerate(self.param_groups):
                for i, parameter in enumerate(group["params"]):
                    if parameter.requires_grad:
                        self.state_of(g, i)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of optimizer state on this rank by kind: ``exp_avg``, ``exp_avg_sq``, ``step``.

        State that does not exist yet is counted; frozen parameters without state are not.
        """
        with self.whole():
            return total_state_bytes(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.optim.Optimizer`` does; every group also has the name of the ``rules``.

        For parameters that FSDP1 or DeepSpeed flattened, second moments and quantised first moments have one value per
        element, because these libraries require it. So have quantised first moments whose rows are sharded.
        """
        with self.whole(), checkpoint.naming(self, self.rules):
            return self._shards.widened(super().state_dict(), self.param_groups, self.layouts)

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load the state of this optimizer, of Adam or AdamW, or of the published adam-mini package.

        Parameters are matched by name if both sides have names, otherwise by position. The running optimizer keeps
        its dtypes and engine options. No tensor of ``state_dict`` is kept, and nothing changes before everything has
        been checked.

        Args:
            state_dict: the return value of ``state_dict()`` of one of these optimizers.
            convert: if True, rebuild the second moments of another partition from block means instead of raising.

        Raises:
            ValueError: the state belongs to another partition, other parameters or another kind of optimizer.
        """
        with self.whole():
            state_dict = self._shards.narrowed(state_dict, self.param_groups, self.layouts, convert=convert)
            model = None if self._model is None or self._stand is not None else self._model()
            add_names = partial(with_model_names, model=model, groups=self.param_groups)
            packed = self._shards.packed(self.param_groups, self.layouts)
            options: Any = {"convert": convert, "exempt": self.undecayed, "packed": packed, "named": add_names}
            with checkpoint.loading(self, self.layouts, self.rules, **options):
                super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore pickled or loaded state; options that older checkpoints lack get their defaults."""
        if "_layouts" in state:  # a pickle of version 0.1
            state = {key: value for key, value in state.items() if key not in ("_unknown", "_known", "_exempt")}
            state["layouts"] = state.pop("_layouts")
        super().__setstate__(state)
        self._engines, self._shards, self._number = Engines(), Shards(), register(self)
        if "_arranged" not in self.__dict__:  # a copy or a pickle, whose parameters are not those of the original
            self._stand, self._model, self._frozen = None, None, None
            self.__dict__.setdefault("undecayed", frozenset())
        if self._stand is None:
            self._arranged = Arrangement(self.param_groups)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: torch's own state, the rules and the layouts."""
        stored = {"rules": self.rules, "layouts": self.layouts, "_strict": self._strict, "undecayed": self.undecayed}
        return {**super().__getstate__(), **stored}
