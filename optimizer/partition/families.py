"""The table of model families: which module makes its parameters how.

To add a family, add one ``Family`` to ``FAMILIES``: the class (or the children) it is recognised by, one line per
parameter, and why. The first family that matches a module wins; parameters no family claims are left to the plain
layers below (``LAYERS``), then to names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from .heads import fused_heads, head_dim_of
from .roles import Anatomy, Part, Role, whole


@dataclass(frozen=True)
class Place:
    """Where a parameter was found: all that a maker may look at.

    Attributes:
        tensor: the parameter.
        owner: the module that holds it directly.
        modules: the module the family matched, then its ancestors, innermost first.
    """

    tensor: Tensor
    owner: nn.Module
    modules: Sequence[nn.Module]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.tensor.shape)

    @property
    def axes(self) -> tuple[int, int]:
        """(output axis, input axis) of a weight matrix: Linear keeps (out, in), transformers' Conv1D (in, out)."""
        return (1, 0) if type(self.owner).__name__ == "Conv1D" and self.tensor.ndim == 2 else (0, 1)

    def sibling_rows(self, names: Sequence[str]) -> int | None:
        """Output size of the first of these sub-parameters of the matched module that exists."""
        for name in names:
            found = resolve(self.modules[0], name)
            if found is not None:
                owner, tensor = found
                return int(tensor.shape[Place(tensor, owner, self.modules).axes[0]])
        return None


Maker = Callable[[Place, str], Anatomy]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        why: the reason, shown by ``explain``.
        params: parameter path below the matched module -> how it is made.
        classes: names of the classes it is for, the module's bases included; with ``library`` set, only classes
            defined in that package count.
        children: or: sub-modules (or parameters) that must all exist. Never applied to a class of transformers when
            ``fused``, because there one name stands for several layouts.
        library: the package the classes are defined in; None for any.
        fused: whether the layout inside a fused tensor is assumed rather than read.
    """

    why: str
    params: dict[str, Maker]
    classes: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    library: str | None = None
    fused: bool = field(default=False)

    def matches(self, module: nn.Module) -> bool:
        """Whether this row speaks of the module."""
        for cls in type(module).__mro__:
            package = cls.__module__.split(".")[0]
            if cls.__name__ in self.classes and self.library in (None, package):
                return True
        if not self.children or (self.fused and type(module).__module__.startswith("transformers.")):
            return False
        return all(resolve(module, child) is not None for child in self.children)


def resolve(module: nn.Module, path: str) -> tuple[nn.Module, Tensor] | None:
    """(owner, parameter) at a dotted path below a module; a path to a sub-module means its ``weight``."""
    owner: object = module
    *parents, leaf = path.split(".")
    for name in parents:
        owner = getattr(owner, name, None)
    target = getattr(owner, leaf, None)
    if isinstance(target, nn.Module):
        owner, target = target, getattr(target, "weight", None)
    return (owner, target) if isinstance(owner, nn.Module) and isinstance(target, nn.Parameter) else None


# --- makers: how a tensor is made -------------------------------------------------------------------------------


def rows(role: Role) -> Maker:
    """A matrix whose output units stand for themselves."""

    def make(place: Place, why: str) -> Anatomy:
        out, into = place.axes
        return whole(role, place.shape, why, axis=out, in_axis=into if place.tensor.ndim == 2 else None)

    return make


def heads(role: Role, *, query: Sequence[str]) -> Maker:
    """A separate query, key or value projection; ``query`` says where the query projection is, whose rows count."""

    def make(place: Place, why: str) -> Anatomy:
        out, into = place.axes
        size = place.shape[out]
        query_rows = place.sibling_rows(query) or size
        head_dim = head_dim_of(place.modules, query_rows)
        return Anatomy(place.shape, (Part(role, size, head_dim),), why, axis=out, in_axis=into)

    return make


def fused(*order: Role) -> Maker:
    """[Q|K|V] (or [K|V]) one after the other along the output axis."""

    def make(place: Place, why: str) -> Anatomy:
        out, into = place.axes
        size = place.shape[out]
        if Role.QUERY not in order:  # cross attention: keys and values have the query's heads
            sizes = dict.fromkeys(order, size // len(order))
            head_dim = head_dim_of(place.modules, sizes[order[0]])
        else:
            found = fused_heads(place.modules, size)
            if found is None:
                return whole(
                    Role.OTHER,
                    place.shape,
                    f"{why}; but no number of heads was found",
                    axis=out,
                    in_axis=into,
                )
            n_heads, n_kv_heads, head_dim = found
            sizes = {role: (n_heads if role is Role.QUERY else n_kv_heads) * head_dim for role in order}
        parts = tuple(Part(role, sizes[role], head_dim) for role in order)
        return Anatomy(place.shape, parts, why, axis=out, in_axis=into)

    return make


def gpt2_c_attn(place: Place, why: str) -> Anatomy:
    """[Q|K|V] in self attention, [K|V] in cross attention."""
    cross = bool(getattr(place.modules[0], "is_cross_attention", False))
    return (fused(Role.KEY, Role.VALUE) if cross else fused(Role.QUERY, Role.KEY, Role.VALUE))(place, why)


def vector(role: Role) -> Maker:
    """A tensor without an input axis: norms, biases."""

    def make(place: Place, why: str) -> Anatomy:
        axis = max(place.tensor.ndim - 1, 0)
        return whole(role, place.shape, why, axis=axis)

    return make


def positions(place: Place, why: str) -> Anatomy:
    """A bare position table [..., positions, dim]: one unit per position."""
    axis = max(place.tensor.ndim - 2, 0)
    return whole(Role.POSITION_EMBEDDING, place.shape, why, axis=axis, in_axis=place.tensor.ndim - 1)


def kernel(place: Place, why: str) -> Anatomy:
    """A convolution kernel; the transposed ones keep their output channels on axis 1."""
    return whole(Role.CONV, place.shape, why, axis=1 if getattr(place.owner, "transposed", False) else 0)


# --- the table --------------------------------------------------------------------------------------------------


def _separate(names: tuple[str, str, str], out: tuple[str, ...], why: str) -> Family:
    """Query, key and value projections of their own, called by these names, and the output's possible names."""
    q, k, v = names
    params: dict[str, Maker] = {
        f"{name}.weight": heads(role, query=(f"{q}.weight",))
        for name, role in ((q, Role.QUERY), (k, Role.KEY), (v, Role.VALUE))
    }
    params |= {f"{o}.weight": rows(Role.ATTENTION_OUT) for o in out}
    return Family(why=why, params=params, children=names)


def _mlp(into: tuple[str, ...], out: str, why: str, classes: tuple[str, ...] = ()) -> Family:
    """A feed-forward block: matrices up to the hidden neurons, one back; known by its children if by no class."""
    params = {f"{name}.weight": rows(Role.MLP_IN) for name in into} | {f"{out}.weight": rows(Role.MLP_OUT)}
    return Family(why=why, params=params, classes=classes, children=() if classes else (*into, out))


FAMILIES: tuple[Family, ...] = (
    Family(
        classes=("MultiheadAttention",),
        library="torch",
        why="torch MultiheadAttention: in_proj is [Q|K|V] by rows, separate when kdim or vdim differ",
        params={
            "in_proj_weight": fused(Role.QUERY, Role.KEY, Role.VALUE),
            "q_proj_weight": heads(Role.QUERY, query=("q_proj_weight",)),
            "k_proj_weight": heads(Role.KEY, query=("q_proj_weight",)),
            "v_proj_weight": heads(Role.VALUE, query=("q_proj_weight",)),
            "in_proj_bias": vector(Role.BIAS),
            "bias_k": vector(Role.BIAS),
            "bias_v": vector(Role.BIAS),
            "out_proj.weight": rows(Role.ATTENTION_OUT),
        },
    ),
    _mlp(
        ("linear1",),
        "linear2",
        "torch Transformer layer's feed-forward",
        classes=("TransformerEncoderLayer", "TransformerDecoderLayer"),
    ),
    Family(
        classes=("GPT2Attention", "ImageGPTAttention", "DecisionTransformerGPT2Attention"),
        library="transformers",
        why="transformers GPT-2: Conv1D (in, out), columns [Q|K|V], [K|V] under cross attention",
        params={
            "c_attn.weight": gpt2_c_attn,
            "q_attn.weight": heads(Role.QUERY, query=("q_attn.weight",)),
            "c_proj.weight": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        children=("c_attn", "c_proj"),
        fused=True,
        why="nanoGPT style: c_attn is [Q|K|V] by output units",
        params={
            "c_attn.weight": fused(Role.QUERY, Role.KEY, Role.VALUE),
            "c_proj.weight": rows(Role.ATTENTION_OUT),
        },
    ),
    _separate(("wq", "wk", "wv"), ("wo",), "Meta and torchtitan Llama: rows are (head, head_dim)"),
    _separate(
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj", "out_proj"),
        "separate projections: rows are (head, head_dim)",
    ),
    _mlp(("w1", "w3"), "w2", "Llama feed-forward: w1 gate, w3 up, w2 down"),
    _mlp(("gate_proj", "up_proj"), "down_proj", "transformers Llama feed-forward"),
    _mlp(("c_fc",), "c_proj", "GPT-2 feed-forward"),
)

LAYERS: tuple[Family, ...] = (
    Family(classes=("_NormBase", "LayerNorm", "RMSNorm", "GroupNorm"), why="normalisation layer",
           params={"weight": vector(Role.NORM), "bias": vector(Role.BIAS)}),
    Family(classes=("_ConvNd",), library="torch", why="convolution: one unit per output channel",
           params={"weight": kernel, "bias": vector(Role.BIAS)}),
)  # fmt: skip
"""Layers that mean the same wherever they stand; Embedding and Linear are in ``discover``, for they depend on where."""
