"""Attention with separate query, key and value projections, and its output projections.

The rows of such projections are (head, head_dim) in every supported library; only the names of the children differ.
"""

from __future__ import annotations

import re

from torch import nn

from ..roles import Role
from .makers import K, Q, V, heads, one_head, per_slice, rows, same_heads, stacked, table_first, table_rows, vector
from .table import Family, Maker, is_dense

# Unformatted, because lists of names are easier to read in a block than one name per line.
_OUT = ("o_proj", "out_proj", "wo", "Wo", "dense", "proj", "out_lin", "output", "attention_out", "post_proj",
        "proj_out", "o", "projection_layer", "projection", "to_out", "to_out.0", "linear_out", "linear_o",
        "output.dense", "final", "output_projection.o_proj", "dense_proj")  # fmt: skip
_EXTRA = ("gate_proj", "g_proj", "output_gate", "output_projection.gate_proj", "b_proj", "a_proj", "dt_proj", "r_proj",
          "sink_proj", "g_a_proj", "g_b_proj", "forget_gate.f_proj", "forget_gate.f_a_proj", "forget_gate.f_b_proj",
          "gate", "to_gate_logits", "gating", "alpha_proj", "gru_rel_pos_linear",
          "fgate_preact", "igate_preact", "ogate_preact", "conv_kernel_layer", "conv_out_layer",
          "relative_pos_embeddings", "proj_a", "f_proj", "beta_proj")  # fmt: skip


_POSITIONS = ("linear_pos", "relative_k_proj", "rel_pos_proj", "pos_proj", "pos_key_proj", "pos_query_proj")
"""Projections of relative positions. Queries (or keys) are multiplied with them, so they have heads like keys."""


def _separate(q: str, k: str, v: str, why: str, *, extra: dict[str, Maker] | None = None) -> Family:
    """Return a family of attentions whose query, key and value projections are children with these names."""
    params: dict[str, Maker] = {
        q: heads(Q, query=(q,)),
        k: heads(K, query=(q,)),
        v: heads(V, query=(q,), key=(k,)),
    }
    params |= {name: rows(Role.ATTENTION_OUT) for name in _OUT if name not in params}
    params |= {name: rows(Role.MLP_IN) for name in _EXTRA}
    params |= {name: heads(K, query=(q,)) for name in _POSITIONS}
    return Family(why=why, params=params | (extra or {}), children=(q, k, v))


class Alike(Family):
    """Attentions with three children whose names differ only in q, k, v or query, key, value: W_q, w_qs, queries."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module has three such children."""
        return _alike(module) is not None

    def claims(self, module: nn.Module) -> dict[str, Maker]:
        """Return parameter path -> maker for the three projections and the output projection."""
        names = _alike(module)
        return _separate(*names, self.why).params if names is not None else {}


def _alike(module: nn.Module) -> tuple[str, str, str] | None:
    """Return the names of the query, key and value projections, which differ only in these words; None without any."""
    names = [name for name, child in module._modules.items() if child is not None and is_dense(child)]
    for name in names:
        for q, k, v in (("queries", "keys", "values"), ("query", "key", "value"), ("q", "k", "v"), ("Q", "K", "V")):
            for match in re.finditer(q, name):
                key_name, value_name = (name[: match.start()] + word + name[match.end() :] for word in (k, v))
                if key_name in names and value_name in names:
                    return name, key_name, value_name
    return None


_HUGGING_FACE = "separate projections: rows are (head, head_dim)"

_GLOBAL = {  # Longformer and LED: a second set of projections for the tokens with global attention
    "query_global": heads(Q, query=("query",)),
    "key_global": heads(K, query=("query",)),
    "value_global": heads(V, query=("query",), key=("key",)),
}
_LUKE = {name: heads(Q, query=("query",)) for name in ("w2e_query", "e2w_query", "e2e_query")}
_ADDED = {  # joint attention of diffusers: the second stream has the same heads
    "add_q_proj": heads(Q, query=("to_q",)),
    "add_k_proj": heads(K, query=("to_q",)),
    "add_v_proj": heads(V, query=("to_q",), key=("to_k",)),
    "to_add_out": rows(Role.ATTENTION_OUT),
    "to_out.1": rows(Role.ATTENTION_OUT),
}
_DELTA = {  # gated delta rules with separate projections
    "q_proj": heads(Q, dim=("head_k_dim", "head_dim")),
    "k_proj": heads(K, dim=("head_k_dim", "head_dim")),
    "v_proj": heads(V, dim=("head_v_dim", "head_dim")),
}

SEPARATE: tuple[Family, ...] = (
    Family(
        classes=("JanusVQVAEAttnBlock", "ChameleonVQVAEEncoderAttnBlock", "Emu3VQVAEAttentionBlock"),
        children=("q", "k", "v"),
        library="transformers",
        why="attention over pixels with one head",
        params={"q": one_head(Q), "k": one_head(K), "v": one_head(V), "proj_out": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        children=("q_proj", "k_proj", "v_proj", "b_proj"),
        why="gated delta rule: heads of head_k_dim and head_v_dim units",
        params=_DELTA | {"o_proj": rows(Role.ATTENTION_OUT)} | {name: rows(Role.MLP_IN) for name in _EXTRA},
    ),
    Family(
        classes=("GatedDeltaNet",),
        children=("in_proj_q", "in_proj_k", "in_proj_v"),
        why="torchtitan's gated delta rule: heads of key_head_dim and value_head_dim units",
        params={
            "in_proj_q": heads(Q, dim=("key_head_dim",)),
            "in_proj_k": heads(K, dim=("key_head_dim",)),
            "in_proj_v": heads(V, dim=("value_head_dim",)),
            "out_proj": rows(Role.ATTENTION_OUT),
        }
        | {name: rows(Role.MLP_IN) for name in ("in_proj_z", "in_proj_a", "in_proj_b")},
    ),
    Family(
        classes=("ZayaCCAProjection",),
        library="transformers",
        why="Zaya: half of the values come from the current token, half from the previous one",
        params={
            "q_proj": heads(Q, query=("q_proj",), shared=True),  # the mean of queries and keys is added to both
            "k_proj": heads(K, query=("q_proj",), shared=True),
            "v_proj_current": heads(V, query=("q_proj",)),
            "v_proj_delayed": heads(V, query=("q_proj",)),
        },
    ),
    Family(
        classes=("GroupViTAssignAttention",),
        library="transformers",
        why="GroupViT: assignment of tokens to groups, one head",
        params={"q_proj": one_head(Q), "k_proj": one_head(K), "v_proj": one_head(V), "proj": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        classes=("XLNetRelativeAttention",),
        library="transformers",
        why="XLNet: (in, head, head_dim); the units of values span two axes, so values get the unit of biases",
        params={
            "q": per_slice(Q),
            "k": per_slice(K),
            "r": per_slice(K),
            "v": vector(Role.BIAS),
            "o": table_first(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("LiltSelfAttention",),
        library="transformers",
        why="LiLT: the layout stream has the same number of heads, but narrower ones",
        params={
            "layout_query": same_heads(Q),
            "layout_key": same_heads(K),
            "layout_value": same_heads(V),
        },
    ),
    Family(
        classes=("Aimv2AttentionPoolingHead",),
        library="transformers",
        why="attention pooling with a learned query",
        params={
            "k_proj": heads(K, query=("k_proj",)),
            "v_proj": heads(V, query=("k_proj",)),
            "output_proj": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        children=("sampling_offsets", "attention_weights"),
        why="deformable attention: no keys; one unit per offset and per weight of a sample",
        params={
            "sampling_offsets": rows(Role.MLP_IN),
            "attention_weights": rows(Role.MLP_IN),
            "value_proj": heads(V, query=("value_proj",)),
            "output_proj": rows(Role.ATTENTION_OUT),
        },
    ),
    _separate("wq", "wk", "wv", "Meta and torchtitan Llama: rows are (head, head_dim)"),
    _separate("q_proj", "k_proj", "v_proj", _HUGGING_FACE),
    _separate("query", "key", "value", _HUGGING_FACE, extra=_GLOBAL | _LUKE),
    _separate("q", "k", "v", _HUGGING_FACE, extra={"relative_attention_bias": table_rows(Role.POSITION_EMBEDDING)}),
    _separate("q_lin", "k_lin", "v_lin", _HUGGING_FACE),
    _separate("query_proj", "key_proj", "value_proj", _HUGGING_FACE),
    _separate("project_q", "project_k", "project_v", _HUGGING_FACE),
    _separate("projection_query", "projection_key", "projection_value", _HUGGING_FACE),
    _separate("q_head", "k_head", "v_head", _HUGGING_FACE),
    _separate("to_q", "to_k", "to_v", "diffusers: rows are (head, head_dim)", extra=_ADDED),
    Family(
        children=("add_q_proj", "add_k_proj", "add_v_proj"),
        why="diffusers: the second stream of joint attention",
        params={
            "add_q_proj": heads(Q, query=("add_q_proj",)),
            "add_k_proj": heads(K, query=("add_q_proj",)),
            "add_v_proj": heads(V, query=("add_q_proj",), key=("add_k_proj",)),
            "to_add_out": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        children=("to_q", "to_kv"),
        why="a query projection, and a fused key and value projection [K|V]",
        params={"to_q": heads(Q, query=("to_q",)), "to_kv": stacked(K, V)}
        | {name: rows(Role.ATTENTION_OUT) for name in ("to_out", "to_out.0", "to_out.1")},
    ),
    Family(
        classes=("LSHSelfAttention",),
        library="transformers",
        why="Reformer: one projection is both query and key",
        params={"query_key": heads(Q, query=("query_key",), shared=True), "value": heads(V, query=("query_key",))},
    ),
    Family(
        classes=("FunnelRelMultiheadAttention",),
        library="transformers",
        why="Funnel: keys of relative positions, (in, head, head_dim)",
        params={"r_kernel": per_slice(K)},
    ),
    Family(
        classes=("RwkvSelfAttention",),
        library="transformers",
        why="RWKV: no heads; every channel has its own exponential decay",
        params={
            "key": rows(Role.MLP_IN),
            "value": rows(Role.MLP_IN),
            "receptance": rows(Role.MLP_IN),
            "output": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("SwiftFormerEfficientAdditiveAttention",),
        library="transformers",
        why="additive attention: no products of queries and keys, so units are independent",
        params={
            "to_query": rows(Role.MLP_IN),
            "to_key": rows(Role.MLP_IN),
            "proj": rows(Role.MLP_IN),
            "final": rows(Role.ATTENTION_OUT),
            "w_g": table_rows(Role.MLP_IN),
        },
    ),
    Family(
        children=("wq_b", "wk", "weights_proj"),
        why="sparse-attention indexer: separate heads that only select tokens",
        params={
            "wq_b": heads(Q, dim=("index_head_dim", "head_dim")),
            "wk": heads(K, dim=("index_head_dim", "head_dim")),
            "weights_proj": rows(Role.MLP_IN),
        },
    ),
    Alike(why="query, key and value projections, recognised by similar names: rows are (head, head_dim)", params={}),
    Family(
        children=("o_gate", "wo"),
        why="torchtitan: one gate per output unit of the heads",
        params={"o_gate": rows(Role.MLP_IN), "wo": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        classes=("LxmertAttentionOutput",),
        library="transformers",
        why="LXMERT: output projection of a neighbouring attention module",
        params={"dense": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        classes=("LEDEncoderAttention", "BigBirdPegasusEncoderAttention"),
        library="transformers",
        why="output projection of the inner attention module",
        params={"output": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        classes=("AriaCrossAttention",),
        library="transformers",
        why="Aria: output projection after an inner MultiheadAttention",
        params={"linear": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        classes=("Gemma3nTextAttention", "Gemma4TextAttention", "Gemma4UnifiedTextAttention"),
        library="transformers",
        why="Gemma: late layers reuse the keys and values of an earlier layer",
        params={
            "q_proj": heads(Q, dim=("head_dim",)),
            "k_proj": heads(K, dim=("head_dim",)),
            "v_proj": heads(V, dim=("head_dim",)),
            "o_proj": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        children=("self.query", "output.dense"),
        why="BERT-style attention: output.dense is the output projection",
        params={"output.dense": rows(Role.ATTENTION_OUT)},
    ),
)
"""In order of precedence: a row with more conditions comes before a row with fewer."""
