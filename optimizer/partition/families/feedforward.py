"""Feed-forward blocks: dense, gated, and in experts."""

from __future__ import annotations

from ..roles import Anatomy, Part, Role
from .makers import rows
from .table import Context, Family, Maker


def into(context: Context, why: str) -> Anatomy:
    """A matrix up to the hidden neurons; with three axes, one per expert."""
    return _dense_or_expert(context, why, Role.MLP_IN, Role.EXPERT_IN)


def back(context: Context, why: str) -> Anatomy:
    """The matrix back from the hidden neurons; with three axes, one per expert."""
    return _dense_or_expert(context, why, Role.MLP_OUT, Role.EXPERT_OUT)


def _dense_or_expert(context: Context, why: str, dense: Role, expert: Role) -> Anatomy:
    shape = context.shape
    if len(shape) != 3:
        return context.plain(dense, why)
    if _keeps_inputs_first(context):
        why = f"{why}; experts keep (expert, in, out)"
        return Anatomy(shape, (Part(expert, shape[2]),), why, axis=2, in_axis=1, leading=1)
    return Anatomy(shape, (Part(expert, shape[1]),), f"{why}; experts keep (expert, out, in)", axis=1, in_axis=2,
                   leading=1)  # fmt: skip


def _keeps_inputs_first(context: Context) -> bool:
    """Whether experts keep (expert, in, out): as the module says, else as its bias, one per output, shows."""
    if context.flag("is_transposed") or type(context.owner).__name__ in _TRANSPOSED:
        return True
    own = dict(context.owner.named_parameters(recurse=False))
    leaf = next((name for name, tensor in own.items() if tensor is context.tensor), "")
    bias = next((own[n] for n in (f"{leaf}_bias", leaf.replace("weight", "bias")) if n in own and n != leaf), None)
    _, first, second = context.shape
    return bias is not None and first != second and bias.shape[-1] == second


_TRANSPOSED = ("Llama4TextExperts", "GptOssExperts")
"""Experts that say nothing of ``is_transposed`` and are."""


def folded(role: Role, *, transposed: bool) -> Maker:
    """DBRX: (experts x ffn, hidden) in one matrix; w2 is used transposed, so that its outputs are the columns."""

    def make(context: Context, why: str) -> Anatomy:
        experts = context.ask("moe_num_experts", "num_experts")
        if context.shape[0] % experts:
            raise ValueError(f"{experts} experts do not divide {context.shape[0]} rows")
        axis = 2 if transposed else 1
        units = context.shape[1] if transposed else context.shape[0] // experts
        return Anatomy(context.shape, (Part(role, units),), why, axis=axis, in_axis=3 - axis, leading=1, fold=experts)

    return make


def _mlp(up: tuple[str, ...], down: str, why: str, classes: tuple[str, ...] = ()) -> Family:
    """A feed-forward block: matrices up to the hidden neurons, one back; known by its children."""
    params: dict[str, Maker] = dict.fromkeys(up, into)
    params[down] = back
    return Family(why=why, params=params, classes=classes, children=(*up, down))


FEEDFORWARD: tuple[Family, ...] = (
    _mlp(("linear1",), "linear2", "torch Transformer layer's feed-forward"),
    Family(
        children=("w1", "v1", "w2"),
        why="DBRX experts: (experts x ffn, hidden)",
        params={
            "w1": folded(Role.EXPERT_IN, transposed=False),
            "v1": folded(Role.EXPERT_IN, transposed=False),
            "w2": folded(Role.EXPERT_OUT, transposed=True),
        },
    ),
    _mlp(("w1", "w3"), "w2", "Llama feed-forward: w1 gate, w3 up, w2 down"),
    _mlp(("w1",), "w2", "feed-forward w1, w2"),
    _mlp(("w12",), "w3", "SwiGLU, gate and up in one"),
    _mlp(("gate_proj", "up_proj"), "down_proj", "gated feed-forward"),
    _mlp(("gate_up_proj",), "down_proj", "gated feed-forward, gate and up in one"),
    _mlp(("up_proj",), "down_proj", "feed-forward up, down"),
    _mlp(("gate_proj",), "down_proj", "feed-forward gate, down"),
    _mlp(("c_fc",), "c_proj", "GPT-2 feed-forward"),
    _mlp(("c_fc_0", "c_fc_1"), "c_proj", "gated feed-forward"),
    _mlp(("fc1",), "fc2", "feed-forward fc1, fc2"),
    _mlp(("fc1_g", "fc1_x"), "fc2", "timm's SwiGLU"),
    _mlp(("fc_in",), "fc_out", "GPT-J feed-forward"),
    _mlp(("fc_1", "fc_2"), "proj", "litgpt's gated feed-forward"),
    _mlp(("fc",), "proj", "litgpt's feed-forward"),
    _mlp(("wi_0", "wi_1"), "wo", "T5's gated feed-forward"),
    _mlp(("wi",), "wo", "T5's feed-forward"),
    _mlp(("Wi",), "Wo", "ModernBERT's feed-forward"),
    _mlp(("w_in", "w_gated"), "w_out", "CPM-Ant's gated feed-forward"),
    _mlp(("lin1",), "lin2", "DistilBERT's feed-forward"),
    _mlp(("linear_1",), "linear_2", "feed-forward linear_1, linear_2"),
    _mlp(("linear_fc1",), "linear_fc2", "Megatron's names"),
    _mlp(("layer_1",), "layer_2", "feed-forward layer_1, layer_2"),
    _mlp(("dense1",), "dense2", "feed-forward dense1, dense2"),
    _mlp(("intermediate_dense",), "output_dense", "feed-forward of speech encoders"),
    _mlp(("dense_h_to_4h",), "dense_4h_to_h", "feed-forward h, 4h, h"),
    _mlp(("intermediate.dense",), "output.dense", "BERT-style feed-forward"),
    _mlp(("input_linear",), "output_linear", "experts in parallel"),
    _mlp(("w1_EFD", "w3_EFD"), "w2_EDF", "torchtitan's experts: (expert, out, in)"),
    _mlp(("mlp1_weight",), "mlp2_weight", "torchtitan's GPT-OSS experts"),
    _mlp(("mlp1_weight_EGD",), "mlp2_weight_EDF", "torchtitan's GPT-OSS experts: (expert, out, in)"),
    _mlp(("fc1_weight",), "fc2_weight", "TransformerEngine LayerNormMLP (from its documentation)"),
    _mlp(("net.0.proj",), "net.2", "diffusers feed-forward; GEGLU's projection is [hidden|gate]"),
    _mlp(("key",), "value", "RWKV's channel mixing", classes=("RwkvFeedForward",)),
)
"""The context where hidden neurons begin and end matters to rule sets that share along inputs."""

ROUTER = rows(Role.MLP_IN)
"""Routers: one row per expert."""
