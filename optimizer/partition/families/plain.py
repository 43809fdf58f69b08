"""Layers that have the same role everywhere in a model, and bare parameters recognised by their names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..roles import Role, whole
from .makers import kernel, rows, table_rows, vector
from .table import Context, Family, Maker

LAYERS: tuple[Family, ...] = (
    Family(
        classes=("_NormBase", "LayerNorm", "RMSNorm", "GroupNorm"),
        why="normalisation layer",
        params={"weight": vector(Role.NORM), "bias": vector(Role.BIAS)},
    ),
    Family(
        classes=("_ConvNd",),
        library="torch",
        why="convolution: one unit per output channel",
        params={"weight": kernel, "bias": vector(Role.BIAS)},
    ),
    Family(
        classes=("RNNBase", "RNNCellBase"),
        library="torch",
        why="recurrent layer: rows are (gate, hidden unit)",
        params={
            f"weight_{kind}{layer}": rows(Role.MLP_IN)
            for kind in ("ih", "hh", "hr")
            for layer in ("", *(f"_l{i}{r}" for i in range(64) for r in ("", "_reverse")))
        },
    ),
    Family(
        classes=("Bilinear",),
        library="torch",
        why="bilinear layer: one unit per output",
        params={"weight": lambda context, why: whole(Role.MLP_IN, context.shape, why)},
    ),
)
"""Embedding and Linear layers are handled in ``discover``, because their roles depend on the modules around them."""


@dataclass(frozen=True)
class Bare:
    """One row for parameters that no family claims, recognised by the class of their module and their own name.

    Attributes:
        owner: regular expression that is searched for in the class name of the module that owns the parameter.
        leaf: regular expression that must match the parameter's whole name in that module.
        make: describes the parameter.
        why: the reason shown by ``explain``.
        least: the smallest number of dimensions that the row matches.
        vectors: whether the row matches only tensors with at most one axis longer than 1. The name alone identifies a
            vector as a scale or a bias, but for a matrix the class must confirm it.
    """

    owner: str
    leaf: str
    make: Maker
    why: str
    least: int = 1
    vectors: bool = False

    def matches(self, context: Context, leaf: str) -> bool:
        """Whether this row matches the parameter; ``leaf`` is its name in the module that owns it."""
        return (
            context.tensor.ndim >= self.least
            and not (self.vectors and sum(size > 1 for size in context.shape) > 1)
            and re.search(self.owner, type(context.owner).__name__) is not None
            and re.fullmatch(self.leaf, leaf) is not None
        )


_LEARNED = table_rows(Role.POSITION_EMBEDDING)
_TOKENS = (
    r"(?!\w*(weight|proj|kernel|matrix)(_|\b))"
    r"\w*(token|embed|_emb\b|encoding|position_enc|query_|latent|probe|pointer|_newline|separator|extensor)\w*"
)
_SCALE = r"weight|scale|gamma|g|alpha"
_CONSTANTS = r"A_log|D|A|dt_bias|time_\w+|\w*_sinks?|sinks"
_CONSTANT_WHY = "one constant per channel or head: nothing is shared, as in biases"
# Unformatted, because the rows are easier to compare on one line each.
BARE: tuple[Bare, ...] = (
    Bare(r"(?i)router|gate$|gating", r"weight|.*classifier.*", rows(Role.MLP_IN), "router: one row per expert", 2),
    Bare(r"", r"\w*bias(es)?|\w*bias_([a-z]|[A-Z]+)|bias_\w+|r_[rsw]_bias", vector(Role.BIAS), "a bias"),
    Bare(r"", r"b\d", vector(Role.BIAS), "a bias", vectors=True),
    Bare(r"", _TOKENS, _LEARNED, "learned tokens: one unit per token"),
    Bare(r"", r"\w*quer(y|ies)", _LEARNED, "learned queries: one unit per query", 3),
    Bare(r"(?i)residual|projector", r"query", _LEARNED, "learned queries: one unit per query", 2),
    Bare(
        r"",
        r"(rel(ative)?_pos\w*|relative_position_bias_table|\w*pos(ition)?_embed\w*|\w*positional_embedding\w*|embedding"
        r"|mask_emb|wpe|\w*scale_shift_table|pos_emb\w*|seg_embed|\w*_ape|emb|embeddings)",
        _LEARNED,
        "a table of learned vectors: one unit per row",
        2,
    ),
    Bare(r"(?i)(norm(\d?d)?|grn|l2clip\w*)$", _SCALE, vector(Role.NORM), "scale of a normalisation layer"),
    Bare(r"(?i)norm", _SCALE, vector(Role.NORM), "scale of a normalisation layer", vectors=True),
    Bare(r"", r"layer_scale\w*|gamma\w*|\w*scale|temperature|lambda\w*|alpha", vector(Role.NORM), "a scale",
         vectors=True),
    Bare(r"", _CONSTANTS, vector(Role.BIAS), _CONSTANT_WHY, vectors=True),
    Bare(r"(?i)mamba|mixer|ssm|rwkv|delta|retention", _CONSTANTS, vector(Role.BIAS), _CONSTANT_WHY),
    Bare(r"HyperConnection|HyperHead", r"\w*fn", rows(Role.MLP_IN), "mixing of streams: one unit per output", 2),
    Bare(r"Indexer", r"\w+_gate", rows(Role.MLP_IN), "gate of an indexer: one unit per output", 2),
    Bare(r"ParametrizationList", r"original0", vector(Role.NORM), "weight norm: length of the weight", vectors=True),
    Bare(r"", r"\w*weight_g|weight_\w+_g", vector(Role.NORM), "weight norm: length of the weight", vectors=True),
)  # fmt: skip
"""In order of precedence: the first row that matches a parameter describes it."""
