"""AdamMini: AdamW with one second-moment scalar per block of parameters."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .groups import Arrangement, Frozen, Recognition, groups_of, require_groups, require_initialised
from .interface import Calls, Position, Stand, whole_shape, wrappers
from .partition import Layout, Rules, discover
from .partition.discover import module_behind
from .partition.layout import AnyLayout
from .partition.names import clean
from .sharding import Shards
from .sharding.shard import Shard
from .state import checkpoint
from .state.grouping import with_names
from .state.specification import new_state, state_bytes, zero_second_moment
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
            for blockwise-scaled codes with stochastic rounding (``optimizer.step.moments``). Where the native loop does
            not take them (CUDA, strided tensors, ``foreach=True``), such tensors step one by one in torch operations.
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
        self._engines, self._shards = Engines(), Shards()
        self._stand: Stand | None = None  # what a library steps in place of the parameters
        self._frozen: Frozen | None = None
        self.undecayed: frozenset[str] = frozenset()  # names of norms and biases, whatever weight_decay is
        self._number = register(self)
        is_model = isinstance(params, nn.Module)
        model = params if isinstance(params, nn.Module) else module_behind(params)
        self._model = None if model is None else ref(model)
        if model is not None:
            for wrapper in wrappers():
                wrapper.describe_model(model, discover)
        groups = groups_of(params) if isinstance(params, nn.Module) else params
        if isinstance(params, nn.Module):
            self.undecayed = frozenset(clean(n) for g in groups if "weight_decay" in g for n, _ in g["params"])
        super().__init__(groups, defaults)
        # A model's norms and biases do not decay, also where FSDP keeps them in one parameter with what does.
        recognition = Recognition(model, self.rules, exempt=is_model)
        self.layouts: list[list[AnyLayout]] = []  # by group position, never by parameter identity
        for group in self.param_groups:
            self.layouts.append(self.recognised(recognition, named(group)))
        recognition.require_matches(self.param_groups)
        recognition.report(strict=strict)
        self._arranged = Arrangement(self.param_groups)  # which parameters the layouts were made for
        if isinstance(params, nn.Module):
            self._frozen = Frozen(params, (p for group in self.param_groups for p in group["params"]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``torch.optim.Optimizer``.

        Its parameters are recognised by the model that the optimizer was built from, by tag, then by name.
        """
        validate({**self.defaults, **param_group}, "parameter group's")
        building = "layouts" not in self.__dict__  # the constructor recognises all groups together
        if not building:
            self.follow_edits()  # what was there before may have been edited
        super().add_param_group(param_group)
        try:
            require_initialised(self.param_groups[-1], len(self.param_groups) - 1)
            if building:
                return
            recognition = self._recognition()
            own = self.recognised(recognition, named(self.param_groups[-1]))
            recognition.report(strict=self._strict)
        except ValueError:
            self.param_groups.pop()  # a refused group leaves nothing behind
            raise
        self.layouts.append(own)
        self._arranged = Arrangement(self.param_groups)

    def _recognition(self) -> Recognition:
        """What recognises parameters that come later: the model, as long as it lives, then tags and names."""
        try:
            return Recognition(None if self._model is None else self._model(), self.rules)
        except ValueError:  # the model has changed beyond recognition
            return Recognition(None, self.rules)

    def recognised(self, recognition: Recognition, pairs: Sequence[tuple[Tensor, str]]) -> list[AnyLayout]:
        """The layouts of (parameter, name) pairs that the optimizer has not seen before; for subclasses to replace."""
        return recognition.layouts(pairs)

    def follow_edits(self) -> None:
        """Let layouts follow their parameters where the caller edited ``param_groups``, and make those of new ones.

        Raises:
            TypeError: something that is no group or no parameter.
            ValueError: options out of range, a parameter that is there twice, or one that has no shape yet.
        """
        if self._arranged.holds(self.param_groups):
            return
        require_groups(self.param_groups, self.defaults)
        recognition = self._recognition()
        edit = self._arranged.edit(self.param_groups, self.layouts, recognition.full_name)
        new = self.recognised(recognition, edit.fresh) if edit.fresh else []
        recognition.report(strict=self._strict)
        self.rearrange(edit.positions, new)
        for group, names in zip(self.param_groups, edit.names, strict=True):
            if names:
                group["param_names"] = names
        self._arranged = Arrangement(self.param_groups)
        self._engines, self._shards = Engines(), Shards()

    def rearrange(self, positions: Sequence[Sequence[Position]], new: list[AnyLayout]) -> None:
        """Put what is kept by group position into another order; for subclasses to extend.

        Args:
            positions: for every parameter of the groups, where its layout is; behind the last group are the new ones.
            new: layouts of parameters that were not there before.
        """
        rows = [*self.layouts, new]
        self.layouts = [[rows[g][i] for g, i in row] for row in positions]

    def replace_layouts(self, layouts: list[list[AnyLayout]]) -> None:
        """Step with other blocks from now on; for subclasses that decide on blocks late."""
        self.layouts = layouts
        self._engines.forget()

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
            ValueError: a parameter whose shape no longer fits its layout; nothing has changed then either.
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
        """Take the step of every parameter, outside a compiler's graph."""
        if self.skips():
            return
        if self._frozen:
            self._frozen.look(lambda: self.param_groups)
        self._accelerator_graph_capture_health_check()
        with torch.set_grad_enabled(self.defaults["differentiable"]), self.whole() as calls:
            for which, only in calls:
                self._step(which, only)

    def step_parameter(self, g: int, i: int) -> None:
        """Take the step of one parameter alone."""
        if self._stand is None and not self._arranged.holds_at(self.param_groups, g, i):
            self.follow_edits()
        self._step((g,), i)

    def fix_layouts(self) -> None:
        """Make ``layouts`` final before they are used; for subclasses that decide on blocks as late as this."""

    def skips(self) -> bool:
        """Whether a GradScaler found that this step must not happen; on other devices the engines look themselves."""
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf)

    def numbers(self, group: Mapping[str, Any]) -> Hyper:
        """The group's numbers for this step, with what a GradScaler handed over."""
        return Hyper.of(group, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _step(self, which: Iterable[int] | None = None, only: int | None = None) -> None:
        """Check everything, exchange sums with other ranks, and only then change anything."""
        self.fix_layouts()
        which = range(len(self.param_groups)) if which is None else which
        here = self._shards.begin(self.param_groups, self.layouts, self.state, which, only)
        try:
            work = [
                self._engines.prepare(g, here.groups[g], here.layouts[g], here.states[g], here.among(g, only))
                for g in which
            ]
            here.exchange(getattr(self, "grad_scale", None))
            for part in work:
                self._engines.step(part, self.numbers(part.group), here.state_of(self._local_state_of))
            here.step(self.numbers, self._local_state_of)
        finally:
            here.end()

    @contextmanager
    def whole(self) -> Iterator[Calls]:
        """While this is open, ``param_groups`` hold everything that has a layout; yields what a step takes of it.

        They always do, except under a library that steps tensors of its own (DeepSpeed), some of them at a time.
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
        """Look for tensors that a library steps in place of the parameters, where the groups have changed."""
        if self._arranged.holds(self.param_groups):
            return
        self.fix_layouts()
        where = self._arranged.finder()  # what the library steps was in the groups, and it has kept it alive since
        stands = (wrapper.stand_for(self, lambda p: self._layout_at(where(p), p)) for wrapper in wrappers())
        self._stand = next((stand for stand in stands if stand is not None), None)
        if self._stand is not None:
            self.layouts = self._stand.layouts
            self._engines, self._shards = Engines(), Shards()

    def _layout_at(self, position: Position | None, parameter: Tensor) -> Layout | None:
        """The layout of a parameter that was at ``position``; None where it is not the parameter's."""
        layout = None if position is None else self.layouts[position[0]][position[1]]
        return layout if isinstance(layout, Layout) and layout.fits(whole_shape(parameter)) else None

    def shard_of(self, g: int, i: int) -> Shard | None:
        """What this rank holds of a parameter; None for an ordinary one."""
        return self._shards.of(g, i, self.param_groups[g], self.layouts[g][i])

    def state_of(self, g: int, i: int) -> dict[str, Any]:
        """A parameter's state, made if there is none."""
        group = self.param_groups[g]
        parameter = group["params"][i]
        state = self.state[parameter]
        if not state:
            shard = self.shard_of(g, i)
            if shard is None:
                aligned = self.layouts[g][i].aligned_shape(parameter.shape)
                state.update(new_state(parameter, zero_second_moment(parameter, aligned, parameter.device), group))
            else:
                state.update(shard.new_state(group))
        return state

    def _local_state_of(self, g: int, i: int) -> dict[str, Any]:
        """What this rank holds of a parameter's state."""
        state, shard = self.state_of(g, i), self.shard_of(g, i)
        return state if shard is None else shard.local_state(state)

    def init_state(self) -> None:
        """Make all state now, as zeros, so that its memory is known before the first step.

        Otherwise a parameter's state is made at its first gradient.
        """
        with self.whole():
            for g, group in enumerate(self.param_groups):
                for i, parameter in enumerate(group["params"]):
                    if parameter.requires_grad:
                        self.state_of(g, i)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state on this rank by kind, held or to come: a frozen parameter gets none."""
        total: Counter[str] = Counter()
        with self.whole():
            for g, (group, layouts) in enumerate(zip(self.param_groups, self.layouts, strict=True)):
                for i, (parameter, layout) in enumerate(zip(group["params"], layouts, strict=True)):
                    if not parameter.requires_grad and not self.state.get(parameter):
                        continue
                    shard, shape = self.shard_of(g, i), tuple(parameter.shape)
                    if shard is None:
                        total.update(state_bytes(parameter, shape, layout.aligned_shape(shape), group))
                    else:
                        total.update(shard.state_bytes(group))
        return dict(total)

    def state_dict(self) -> dict[str, Any]:
        """The state as in ``torch.optim.Optimizer``; every group also names the ``rules``.

        Second moments of parameters that FSDP1 or DeepSpeed flattened have one value per element there, as they demand.
        """
        with self.whole(), checkpoint.naming(self, self.rules):
            return self._shards.widened(super().state_dict(), self.param_groups, self.layouts)

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
        with self.whole():
            state_dict = self._shards.narrowed(state_dict, self.param_groups, self.layouts, convert=convert)
            with checkpoint.loading(
                self, self.layouts, self.rules, convert=convert, exempt=self.undecayed, named=self._with_names
            ):
                super().load_state_dict(state_dict)

    def _with_names(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """A document with other groups than ours and without names, with the model's names where those are sure."""
        model = None if self._model is None else self._model()
        names = {clean(name) for group in self.param_groups for name in group.get("param_names") or ()}
        if model is None or not names or self._stand is not None:
            return document
        with suppress(KeyError, TypeError, ValueError):  # what is no state dict is refused by name when it is read
            sizes = [len(group["params"]) for group in document["param_groups"]]
            if sizes != [len(group["params"]) for group in self.param_groups]:
                return with_names(document, model, names)
        return document

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over pickled or loaded state; options that older checkpoints lack get their defaults."""
        if "_layouts" in state:  # a pickle of version 0.1
            state = {key: value for key, value in state.items() if key not in ("_unknown", "_known", "_exempt")}
            state["layouts"] = state.pop("_layouts")
        super().__setstate__(state)
        self._engines, self._shards, self._number = Engines(), Shards(), register(self)
        if "_arranged" not in self.__dict__:  # a copy or a pickle, whose parameters are its own
            self._stand, self._model, self._frozen = None, None, None
            self.__dict__.setdefault("undecayed", frozenset())
        if self._stand is None:
            self._arranged = Arrangement(self.param_groups)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rules": self.rules, "layouts": self.layouts, "_strict": self._strict,
                "undecayed": self.undecayed}  # fmt: skip
