"""Mixers other than attention between tokens: state spaces, gated recurrences, short convolutions, graph attention."""

from __future__ import annotations

from ..roles import Anatomy, Part, Role
from .makers import rows, vector
from .table import Context, Family, Maker


def transposed(role: Role) -> Maker:
    """Describe a bare matrix (in, out), used as x @ W; each index of the axes in front has its own units."""

    def make(context: Context, why: str) -> Anatomy:
        ndim = context.tensor.ndim
        part = Part(role, context.shape[-1])
        return Anatomy(context.shape, (part,), why, axis=ndim - 1, in_axis=ndim - 2, leading=ndim - 2)

    return make


_CONSTANTS = {name: vector(Role.BIAS) for name in ("A_log", "D", "dt_bias", "dt_proj_bias", "A")}

MIXERS: tuple[Family, ...] = (
    Family(
        children=("in_proj", "out_proj", "A_log"),
        why="state space: in_proj is [gate|x B C|dt] by rows; A, D and dt's bias have one constant per channel or head",
        params={
            "in_proj": rows(Role.MLP_IN),
            "x_proj": rows(Role.MLP_IN),
            "dt_proj": rows(Role.MLP_IN),
            "x_proj_weight": rows(Role.MLP_IN),
            "dt_proj_weight": rows(Role.MLP_IN),
            "out_proj": rows(Role.MLP_OUT),
        }
        | _CONSTANTS,
    ),
    Family(
        children=("in_proj", "conv", "out_proj"),
        why="short convolution between two dense layers",
        params={"in_proj": rows(Role.MLP_IN), "out_proj": rows(Role.MLP_OUT)},
    ),
    Family(children=("A_log",), why="state space: one constant per channel or head", params=_CONSTANTS),
    Family(
        classes=("RecurrentGemmaRglru",),
        library="transformers",
        why="RG-LRU: one gate matrix (in, out) per head",
        params={"input_gate_weight": transposed(Role.MLP_IN), "recurrent_gate_weight": transposed(Role.MLP_IN)},
    ),
    Family(
        classes=("CsmCodebooksHead",),
        library="transformers",
        why="one output layer (hidden, vocabulary) per codebook",
        params={"weight": transposed(Role.HEAD)},
    ),
    Family(
        classes=("InklingRelativeLogits", "Inkling2RelativeLogits"),
        library="transformers",
        why="relative position biases, used as x @ W: (in, distance)",
        params={"proj": transposed(Role.MLP_IN)},
    ),
    Family(
        classes=("Inkling2DynamicShortConvolution",),
        library="transformers",
        why="depthwise convolution (tap, channel): one unit per channel",
        params={"static_weight": transposed(Role.CONV)},
    ),
    Family(
        children=("mm_input_projection_weight",),
        why="projection, used as x @ W: (in, out)",
        params={"mm_input_projection_weight": transposed(Role.MLP_IN)},
    ),
    Family(
        classes=("GATConv", "GATv2Conv"),  # of PyTorch Geometric and DGL: (1, head, channel)
        why="graph attention: a dense layer from each head's channels to its score; one unit per head",
        params={
            name: rows(Role.MLP_IN) for name in ("att_src", "att_dst", "att_edge", "att", "attn_l", "attn_r", "attn")
        },
    ),
)
