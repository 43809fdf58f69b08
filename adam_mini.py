"""The door of the published adam-mini package: ``from adam_mini import Adam_mini``, and nothing else to change.

The constructor and the mutable name sets are the published package's (1.1.1); the update, the partition and the
optimizer contract are ``optimizer.AdamMini``'s.
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
from optimizer.partition import Anatomy, Part, layout_of
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
}  # in the order in which the published package asks


class Adam_mini(AdamMini):
    """The published package's optimizer class, on this project's partition and update.

    What a parameter is follows from the model where it can be known (a module, ``model.named_parameters()`` not yet
    consumed, or parameters stamped by ``optimizer.tag``), else from its name and ``dim``, ``n_heads``,
    ``n_kv_heads``. Blocks are fixed at the first step, so the name sets ``embd_names``, ``output_names``,
    ``wqk_names``, ``wv_names``, ``attn_proj_names``, ``mlp_names`` and ``adam_block_names`` may be changed or replaced
    until then: an emptied set means one scalar per tensor for its role, an added word claims the parameters whose
    lower-cased names contain it.

    Where neither the model nor the name is certain, blocks are the published package's or finer. A warning at the first
    step names the parameters whose blocks are coarser, because the model or the number of heads says so.

    Args:
        named_parameters: ``model.named_parameters()``, any iterable of (name, parameter), or a model; parameters
            without names or group dicts keep the caller's groups and decay.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added outside the root.
        weight_decay: decoupled; norms and biases are left out, as in the published package.
        model_sharding: accepted and ignored, as in the published package.
        dim: the model's hidden size; None where the model itself is known.
        n_heads: number of query heads; likewise.
        n_kv_heads: number of key-value heads; None means ``n_heads``.
        verbose: accepted; messages go to ``logging``.

    Raises:
        ValueError: a number out of range, ``n_heads`` not a multiple of ``n_kv_heads``, or (at the first step) heads
            that do not divide a query or key.
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
            params = named_parameters  # torch says what is wrong with it
        elif model is None:
            params = list(named_parameters)  # type: ignore[arg-type]
            if params and all(_is_pair(item) for item in params):
                params = _decay_groups([(str(name), p) for name, p in params], weight_decay)
        super().__init__(params, lr, betas, eps, weight_decay, rules="adam_mini")
        del self.named_parameters  # a model must not live on in its optimizer

    def recognised(self, recognition: Recognition, pairs: Sequence[tuple[Tensor, str]]) -> list[AnyLayout]:
        """What parameters are now; how they fall into blocks is decided at the first step."""
        recognition.ask_wrappers(pairs)
        self._anatomies.append([
            facts_of(parameter) or (clean(name).lower(), recognition.anatomy(parameter, name))
            for parameter, name in pairs
        ])  # fmt: skip
        self._resolved = False
        return [Layout.per_tensor(tuple(p.shape) if facts_of(p) else whole_shape(p)) for p, _ in pairs]

    def rearrange(self, positions: Sequence[Sequence[Position]], new: list[AnyLayout]) -> None:
        """Let what parameters are follow them, too; how they fall into blocks is decided anew."""
        super().rearrange(positions, new)
        self._anatomies = [[self._anatomies[g][i] for g, i in row] for row in positions]
        self._resolve()
        self._resolved = False  # the name sets may still be changed before the next step

    def _resolve(self) -> None:
        """Turn names, anatomies and the name sets as they stand into layouts."""
        emptied = [role for key, roles in _ROLES.items() if not getattr(self, key) for role in roles]
        rules = self.rules.replace("adam_mini, name sets changed", dict.fromkeys(emptied, Unit.TENSOR))
        coarser: list[str] = []
        unknown: dict[str, Anatomy] = {}

        def resolved(anatomy: Anatomy, name: str) -> Layout:
            return self._resolved_layout(clean(name).lower(), anatomy, rules, coarser, unknown)

        self.replace_layouts(
            [
                [
                    known.layout(resolved, exempt=True)
                    if isinstance(known, FlatFacts)
                    else resolved(known[1], known[0])
                    for known in group
                ]
                for group in self._anatomies
            ]
        )
        self._resolved = True
        if coarser:
            logger.warning(
                "%d parameter(s) share more than in the published package, because of what the model or the number of "
                "heads says of them: %s", len(coarser), "; ".join(coarser[:8]) + ("; ..." if coarser[8:] else ""),
            )  # fmt: skip
        report_unknown(unknown, self.rules[Role.OTHER].value, strict=False)

    def _resolved_layout(
        self, name: str, anatomy: Anatomy, rules: Rules, coarser: list[str], unknown: dict[str, Anatomy]
    ) -> Layout:
        """What is known decides; where nothing certain is, blocks are the published package's or finer.

        Args:
            name: cleaned and lower-cased.
            anatomy: what the parameter is, as far as its model, tag or name says.
            rules: with the units of emptied name sets.
            coarser: takes the parameters whose blocks are not the published package's or parts of them.
            unknown: takes the matrices that nobody recognised.
        """
        named = self._named_anatomy(name, anatomy)
        layout, theirs = layout_of(named, rules), self._published_layout(name, anatomy.shape)
        if theirs is not None and is_guessed_vector(named):
            return theirs
        if theirs is not None and not layout.refines(theirs, anatomy.shape):
            if not named.recognised or not (named.declared or named.role in HEAD_ROLES):
                return theirs
            coarser.append(f"{name} {anatomy.shape}: {layout.n_blocks} instead of {theirs.n_blocks} ({named.reason})")
        elif named is anatomy and not understood(named, rules) and (theirs is None or theirs.n_blocks == 1):
            unknown[name] = named
        return layout

    def _published_layout(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        """The blocks of the published package under the name sets as they stand; None for what it fails on.

        Its query and key blocks are runs of ``dim * dim / n_heads`` elements, whatever the matrix. Where such runs end
        inside a row, this returns the finest layout along the rows whose blocks lie inside them.
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
        """The anatomy, unless the name sets were changed in a way that touches this parameter."""
        now = _claimed_by(name, {key: getattr(self, key) for key in _ROLES})
        if now != _claimed_by(name, _DEFAULTS):
            if now is None or len(anatomy.shape) < 2:
                return whole(Role.OTHER, anatomy.shape, "no name set claims it any more: one scalar")
            anatomy = Anatomy(anatomy.shape, (Part(_ROLES[now][0], anatomy.shape[0]),), f"by {now}", in_axis=1)
        if any(part.head_dim is None for part in anatomy.parts if part.role in (Role.QUERY, Role.KEY)):
            return self._with_heads(name, anatomy, sure=anatomy.reason != "by wqk_names")
        return anatomy

    def _with_heads(self, name: str, anatomy: Anatomy, *, sure: bool) -> Anatomy:
        """Give a query or key known by name alone the heads of the constructor's arguments.

        ``sure`` is False for a parameter that a name set claims, which may be a query or a key. Then, and for keys
        whose number of heads was not given, ``dim / n_heads`` rows make a head if they divide it.
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
        """The first step fixes the blocks."""
        if not self._resolved:
            self._resolve()

    def init_state(self) -> None:
        """Make all state now; fixes the blocks if no step has yet."""
        if not self._resolved:
            self._resolve()
        super().init_state()

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load state as ``AdamMini`` does; fixes the blocks if no step has yet."""
        if not self._resolved:
            self._resolve()
        super().load_state_dict(state_dict, convert=convert)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state by kind; fixes the blocks if no step has yet."""
        if not self._resolved:
            self._resolve()
        return super().state_bytes()

    def __getstate__(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in (*_ROLES, "dim", "n_heads", "n_kv_heads", "verbose")}
        return {**super().__getstate__(), **own, "_anatomies": self._anatomies, "_resolved": self._resolved}


def _claimed_by(name: str, sets: dict[str, Any]) -> str | None:
    """Which name set claims a parameter: the first, in the published order, of which a word is in the name."""
    return next((key for key in _ROLES if any(word.lower() in name for word in sets[key])), None)


def _is_pair(item: Any) -> bool:
    """Whether this is (name, parameter), as a tuple or a list."""
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)


def _decay_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups with and without weight decay, from names, tags and shapes."""
    trainable = [(name, p) for name, p in named if p.requires_grad]
    for wrapper in wrappers():
        wrapper.describe_parameters([(p, name) for name, p in trainable], tagged_or_named)
    keep = [_decays(name, p) for name, p in trainable]
    groups = [
        {
            "params": [pair for pair, decays in zip(trainable, keep, strict=True) if decays],
            "weight_decay": weight_decay,
        },
        {"params": [pair for pair, decays in zip(trainable, keep, strict=True) if not decays], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies; a flattened parameter's parts know for themselves."""
    facts = facts_of(parameter)
    if facts is not None:
        return any(anatomy.decays for anatomy in facts.anatomies)
    return tagged_or_named(parameter, name, whole_shape(parameter)).decays
