"""Layers that mean the same wherever they stand, and bare parameters known by what they are called."""

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
"""Embedding and Linear are in ``discover``, for they depend on where they stand."""


@dataclass(frozen=True)
class Bare:
    """A parameter no family claims, known by the class that holds it and by its own name.

    Attributes:
        owner: regular expression found in the class name of the holding module.
        leaf: regular expression that matches the parameter's own name whole.
        make: how it is made.
        why: the reason.
        least: fewest dimensions it speaks of.
        vectors: whether it speaks only of tensors with at most one axis longer than 1. What a parameter is called
            makes a vector a scale or a bias, but never a matrix: for a matrix the class has to say so.
    """

    owner: str
    leaf: str
    make: Maker
    why: str
    least: int = 1
    vectors: bool = False

    def matches(self, context: Context, leaf: str) -> bool:
        """Whether this row speaks of the parameter."""
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
_EACH_ITS_OWN = "constants of a channel or head: each its own, like biases"
BARE: tuple[Bare, ...] = (
    Bare(r"(?i)router|gate$|gating", r"weight|.*classifier.*", rows(Role.MLP_IN), "router: one row per expert", 2),
    Bare(r"", r"\w*bias(es)?|\w*bias_([a-z]|[A-Z]+)|bias_\w+|r_[rsw]_bias", vector(Role.BIAS), "a bias"),
    Bare(r"", r"b\d", vector(Role.BIAS), "a bias", vectors=True),
    Bare(r"", _TOKENS, _LEARNED, "learned tokens: one unit per token"),
    Bare(r"", r"\w*quer(y|ies)", _LEARNED, "learned queries: one unit each", 3),
    Bare(r"(?i)residual|projector", r"query", _LEARNED, "learned queries: one unit each", 2),
    Bare(
        r"",
        r"(rel(ative)?_pos\w*|relative_position_bias_table|\w*pos(ition)?_embed\w*|\w*positional_embedding\w*|embedding"
        r"|mask_emb|wpe|\w*scale_shift_table|pos_emb\w*|seg_embed|\w*_ape|emb|embeddings)",
        _LEARNED,
        "a table of learned vectors: one unit per row",
        2,
    ),
    Bare(r"(?i)(norm(\d?d)?|grn|l2clip\w*)$", _SCALE, vector(Role.NORM), "scale of a normalisation"),
    Bare(r"(?i)norm", _SCALE, vector(Role.NORM), "scale of a normalisation", vectors=True),
    Bare(r"", r"layer_scale\w*|gamma\w*|\w*scale|temperature|lambda\w*|alpha", vector(Role.NORM), "a scale",
         vectors=True),
    Bare(r"", _CONSTANTS, vector(Role.BIAS), _EACH_ITS_OWN, vectors=True),
    Bare(r"(?i)mamba|mixer|ssm|rwkv|delta|retention", _CONSTANTS, vector(Role.BIAS), _EACH_ITS_OWN),
    Bare(r"HyperConnection|HyperHead", r"\w*fn", rows(Role.MLP_IN), "mixing of streams: one unit per output", 2),
    Bare(r"Indexer", r"\w+_gate", rows(Role.MLP_IN), "gate of an indexer: one unit per output", 2),
    Bare(r"ParametrizationList", r"original0", vector(Role.NORM), "weight norm: length of the weight", vectors=True),
    Bare(r"", r"\w*weight_g|weight_\w+_g", vector(Role.NORM), "weight norm: length of the weight", vectors=True),
)  # fmt: skip
"""Read from the top; the first row that matches decides."""
