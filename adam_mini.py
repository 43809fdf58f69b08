"""A drop-in replacement for the published adam-mini package: ``from adam_mini import Adam_mini``.

The constructor and the mutable name sets are those of the published package (1.1.1). The update, the partition and
the optimizer's other methods are those of ``optimizer.AdamMini``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from math import gcd, prod
from typing import Any

from torch import Tensor, nn

from optimizer import AdamMini, Layout, Role, Rules, Unit
from optimizer.groups import Recognition
from optimizer.interface import Position, whole_shape, wrappers
from optimizer.partition import Anatomy, Part, TensorLayout, layout_of
from optimizer.partition.apply import understood
from optimizer.partition.discover import module_behind, report_unknown, tagged_or_named
from optimizer.partition.layout import AnyLayout, Runs
from optimizer.partition.names import clean, is_guessed_vector
from optimizer.partition.roles import HEAD_ROLES, whole
from optimizer.sharding.facts import FlatFacts, facts_of

__all__ = ["Adam_mini"]
logger = logging.getLogger("optimizer")

_DEFAULTS: dict[str, frozenset[str]] = {
    "embd_names": frozenset({"embed", "embd", "wte"}),
    "output_names": frozenset({"lm_head", "output", "final_layer"}),
    "wqk_names": frozenset({"k_proj", "q_proj", "wq", "wk", "query", "key"}),
    "wv_names": frozenset({"v_proj", "wv", "value"}),
    "attn_proj_names": frozenset({"o_proj", "wo", "attn.proj"}),
    "mlp_names": frozenset({"feed_forward", "linear", "mlp"}),
    "adam_block_names": frozenset({"bias"}),
}
_ROLES: dict[str, tuple[Role, ...]] = {
    "adam_block_names": (Role.BIAS,),
    "wqk_names": (Role.QUERY, Role.KEY),
    "embd_names": (Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING),
    "output_names": (Role.HEAD,),
    "wv_names": (Role.VALUE,),
    "mlp_names": (Role.MLP_IN, Role.MLP_OUT, Role.EXPERT_IN, Role.EXPERT_OUT),
    "attn_proj_names": (Role.ATTENTION_OUT,),
}
"""The roles that each name set affects, in the order in which the published package checks the sets."""


class Adam_mini(AdamMini):
    """The optimizer class of the published package, with the partition and update of ``optimizer.AdamMini``.

    The role of a parameter follows from the model if it is available: the model itself, ``model.named_parameters()``
    that has not been consumed, or parameters stamped by ``optimizer.tag``. Otherwise it follows from the parameter's
    name and from ``dim``, ``n_heads`` and ``n_kv_heads``.

    Blocks are fixed at the first step. Until then, the name sets ``embd_names``, ``output_names``, ``wqk_names``,
    ``wv_names``, ``attn_proj_names``, ``mlp_names`` and ``adam_block_names`` may be changed or replaced. Emptying a
    set gives the parameters of its roles one scalar per tensor. Adding a word assigns the parameters whose lower-case
    names contain it to the set.

    If neither the model nor the name determines the role, blocks are those of the published package or finer. If the
    model or the number of heads implies coarser blocks, a warning at the first step names the parameters.

    Args:
        named_parameters: ``model.named_parameters()``, an iterable of (name, parameter) pairs, or a model; these are
            split into two groups, with and without weight decay. Parameters without names and group dicts keep the
            caller's groups and weight decay.
        lr: learning rate, >= 0.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: number added to the square root in the denominator, >= 0.
        weight_decay: coefficient of the decoupled weight decay, >= 0; norms and biases do not decay, as in the
            published package.
        model_sharding: ignored, as in the published package.
        dim: the model's hidden size; None if unknown. It is used only for parameters recognised by name.
        n_heads: number of query heads; None if unknown. It is used only for parameters recognised by name.
        n_kv_heads: number of key-value heads; None means ``n_heads``.
        verbose: ignored; messages are written with ``logging``.

    Raises:
        ValueError: a number is out of range, ``n_heads`` is not a multiple of ``n_kv_heads``, or (at the first step)
            the number of heads does not divide the rows of a query or key.
    """

    embd_names: Any
    output_names: Any
    wqk_names: Any
    wv_names: Any
    attn_proj_names: Any
    mlp_names: Any
    adam_block_names: Any

    def __init__(
        self,
        named_parameters: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model_sharding: bool | None = None,
        dim: int | None = 2048,
        n_heads: int | None = 32,
        n_kv_heads: int | None = None,
        verbose: bool = True,
    ) -> None:
        for name, value in (("dim", dim), ("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
            if value is not None and (int(value) != value or value <= 0):
                raise ValueError(f"argument {name}={value!r} must be a positive whole number, or None if unknown")
        if n_heads is not None and n_kv_heads is not None and n_heads % n_kv_heads:
            raise ValueError(
                f"argument n_kv_heads={n_kv_heads} must divide n_heads={n_heads}; take both from the model's config"
            )
        self.dim, self.n_heads = dim, n_heads
        self.n_kv_heads = n_kv_heads
        self.verbose = verbose
        self.named_parameters = named_parameters
        for attribute, names in _DEFAULTS.items():
            setattr(self, attribute, set(names))
        self._anatomies: list[list[tuple[str, Anatomy] | FlatFacts]] = []
        self._resolved = False
        model = named_parameters if isinstance(named_parameters, nn.Module) else module_behind(named_parameters)
        params: Any = model
        if model is None and isinstance(named_parameters, Tensor):
            params = named_parameters  # torch raises the error for a single tensor
        elif model is None:
            params = list(named_parameters)  # type: ignore[arg-type]
            if params and all(_is_pair(item) for item in params):
                params = _decay_groups([(str(name), p) for name, p in params], weight_decay)
        super().__init__(params, lr, betas, eps, weight_decay, rules="adam_mini")
        del self.named_parameters  # otherwise the optimizer would keep the model alive

    def recognised(self, recognition: Recognition, pairs: Sequence[tuple[Tensor, str]]) -> list[AnyLayout]:
        """Record what the parameters do, and return preliminary layouts; blocks are decided at the first step."""
        recognition.ask_wrappers(pairs)
        self._anatomies.append(
            [
                facts_of(parameter) or (clean(name).lower(), recognition.anatomy(parameter, name))
                for parameter, name in pairs
            ]
        )
        self._resolved = False
        return [Layout.per_tensor(tuple(p.shape) if facts_of(p) else whole_shape(p)) for p, _ in pairs]

    def rearrange(self, positions: Sequence[Sequence[Position]], new: list[AnyLayout]) -> None:
        """Reorder the recorded anatomies, too, and decide on blocks again."""
        super().rearrange(positions, new)
        self._anatomies = [[self._anatomies[g][i] for g, i in row] for row in positions]
        self._resolve()
        self._resolved = False  # the name sets may still be changed before the next step

    def _resolve(self) -> None:
        """Make the layouts from the recorded names and anatomies and from the present name sets."""
        emptied = [role for key, roles in _ROLES.items() if not getattr(self, key) for role in roles]
        rules = self.rules.replace("adam_mini, name sets changed", dict.fromkeys(emptied, Unit.TENSOR))
        coarser: list[str] = []
        unknown: dict[str, Anatomy] = {}

        def resolved(anatomy: Anatomy, name: str) -> TensorLayout:
            return self._resolved_layout(clean(name).lower(), anatomy, rules, coarser, unknown)

        def layout(recorded: tuple[str, Anatomy] | FlatFacts) -> AnyLayout:
            if isinstance(recorded, FlatFacts):
                return recorded.layout(resolved, exempt=True)
            name, anatomy = recorded
            return resolved(anatomy, name)

        self.replace_layouts([[layout(recorded) for recorded in group] for group in self._anatomies])
        self._resolved = True
        if coarser:
            logger.warning(
                "%d parameter(s) share more than in the published package, because the model or the number of heads "
                "determines their blocks: %s",
                len(coarser),
                "; ".join(coarser[:8]) + ("; ..." if coarser[8:] else ""),
            )
        report_unknown(unknown, self.rules[Role.OTHER].value, strict=False)

    def _resolved_layout(
        self, name: str, anatomy: Anatomy, rules: Rules, coarser: list[str], unknown: dict[str, Anatomy]
    ) -> TensorLayout:
        """Return the layout of one parameter: the model's if it is certain, otherwise the published one or a finer one.

        Args:
            name: the parameter's name in lower case, without prefixes of wrappers.
            anatomy: what the parameter does, from its model, tag or name.
            rules: the rules, with one scalar per tensor for the roles of emptied name sets.
            coarser: receives descriptions of parameters whose blocks do not lie inside published blocks.
            unknown: receives the matrices that are not recognised.
        """
        named = self._named_anatomy(name, anatomy)
        layout, published = layout_of(named, rules), self._published_layout(name, anatomy.shape)
        if published is not None and is_guessed_vector(named):
            return published
        if published is not None and not layout.refines(published, anatomy.shape):
            if not named.recognised or not (named.declared or named.role in HEAD_ROLES):
                return published
            coarser.append(
                f"{name} {anatomy.shape}: {layout.n_blocks} instead of {published.n_blocks} ({named.reason})"
            )
        elif named is anatomy and not understood(named, rules) and (published is None or published.n_blocks == 1):
            unknown[name] = named
        return layout

    def _published_layout(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        """Return the blocks of the published package under the present name sets; None if it fails on the parameter.

        Its query and key blocks are runs of ``dim * dim / n_heads`` elements, regardless of the matrix. If such runs
        end inside a row, the result has shorter runs along the rows, so that its blocks lie inside the published ones.
        """
        claim = _claimed_by(name, {key: getattr(self, key) for key in _ROLES})
        if claim is None:
            return Layout.per_tensor(shape)
        if claim == "adam_block_names":
            return Layout.per_element(shape)
        if claim != "wqk_names":
            return Layout(0, Runs(((1, shape[0]),))) if len(shape) == 2 else None
        run, width = (self.dim or 0) ** 2 // (self.n_heads or 1), prod(shape[1:])
        if self.n_heads is None or not run or not shape or not prod(shape) or prod(shape) % run:
            return None
        if run % width == 0:
            return Layout(0, Runs(((run // width, shape[0] * width // run),)))
        common = gcd(run, width)
        return (
            Layout(1, Runs(((common, width // common),)), shape[:1]) if len(shape) == 2 else Layout.per_element(shape)
        )

    def _named_anatomy(self, name: str, anatomy: Anatomy) -> Anatomy:
        """Return the anatomy, or another one if changed name sets assign the parameter to another set."""
        now = _claimed_by(name, {key: getattr(self, key) for key in _ROLES})
        if now != _claimed_by(name, _DEFAULTS):
            if now is None or len(anatomy.shape) < 2:
                return whole(Role.OTHER, anatomy.shape, "no longer in any name set: one scalar")
            anatomy = Anatomy(anatomy.shape, (Part(_ROLES[now][0], anatomy.shape[0]),), f"by {now}", in_axis=1)
        if any(part.head_dim is None for part in anatomy.parts if part.role in (Role.QUERY, Role.KEY)):
            return self._with_heads(name, anatomy, sure=anatomy.reason != "by wqk_names")
        return anatomy

    def _with_heads(self, name: str, anatomy: Anatomy, *, sure: bool) -> Anatomy:
        """Return the anatomy of a query or key recognised by name, with heads from the constructor's arguments.

        Args:
            name: the parameter's name.
            anatomy: its anatomy without heads.
            sure: False for a parameter assigned by a name set, which may be a query or a key. For such a parameter,
                and for keys if ``n_kv_heads`` is None, a head has ``dim / n_heads`` rows if that divides the rows.
        """
        if self.n_heads is None or len(anatomy.parts) > 1:
            return anatomy
        role, size = anatomy.role, anatomy.shape[0]
        heads = self.n_heads if role is Role.QUERY else self.n_kv_heads or self.n_heads
        head_dim = size // heads
        if not sure or (role is Role.KEY and self.n_kv_heads is None):
            usual = (self.dim or 0) // self.n_heads
            head_dim = usual if usual and size % usual == 0 else head_dim
        if head_dim == 0 or size % head_dim:
            raise ValueError(
                f"{name} has {size} rows, which {heads} heads do not divide (dim={self.dim}, n_heads={self.n_heads}, "
                f"n_kv_heads={self.n_kv_heads}); pass the numbers of the model's config, or the model itself"
            )
        return Anatomy(anatomy.shape, (Part(role, size, head_dim),), anatomy.reason, in_axis=1)

    def fix_layouts(self) -> None:
        """Decide on blocks at the first step, unless that has been done."""
        if not self._resolved:
            self._resolve()

    def init_state(self) -> None:
        """Create all state now. This fixes the blocks, as the first step does."""
        if not self._resolved:
            self._resolve()
        super().init_state()

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load state as ``AdamMini.load_state_dict`` does. This fixes the blocks, as the first step does."""
        if not self._resolved:
            self._resolve()
        super().load_state_dict(state_dict, convert=convert)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of optimizer state on this rank by kind. This fixes the blocks, as the first step does."""
        if not self._resolved:
            self._resolve()
        return super().state_bytes()

    def __getstate__(self) -> dict[str, Any]:
        attributes = {key: getattr(self, key) for key in (*_ROLES, "dim", "n_heads", "n_kv_heads", "verbose")}
        return {**super().__getstate__(), **attributes, "_anatomies": self._anatomies, "_resolved": self._resolved}


def _claimed_by(name: str, sets: dict[str, Any]) -> str | None:
    """Return the first name set, in the published order, with a word that the name contains; None without any."""
    return next((key for key in _ROLES if any(word.lower() in name for word in sets[key])), None)


def _is_pair(item: Any) -> bool:
    """Whether an item is a (name, parameter) pair, as a tuple or a list."""
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)


def _decay_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into groups with and without weight decay, by their tags, names and shapes."""
    trainable = [(name, p) for name, p in named if p.requires_grad]
    for wrapper in wrappers():
        wrapper.describe_parameters([(p, name) for name, p in trainable], tagged_or_named)
    decays = [_decays(name, p) for name, p in trainable]
    decaying = [pair for pair, decay in zip(trainable, decays, strict=True) if decay]
    rest = [pair for pair, decay in zip(trainable, decays, strict=True) if not decay]
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter; to a flattened parameter it does if it applies to any part."""
    facts = facts_of(parameter)
    if facts is not None:
        return any(anatomy.decays for anatomy in facts.anatomies)
    return tagged_or_named(parameter, name, whole_shape(parameter)).decays
