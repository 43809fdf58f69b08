"""Feed-forward blocks: dense, gated, and those of experts."""

from __future__ import annotations

from ..roles import Anatomy, Part, Role
from .table import Context, Family, Maker


def into(context: Context, why: str) -> Anatomy:
    """Describe a matrix that leads to the hidden neurons; with three axes, axis 0 counts experts."""
    return _dense_or_expert(context, why, Role.MLP_IN, Role.EXPERT_IN)


def back(context: Context, why: str) -> Anatomy:
    """Describe a matrix that leads from the hidden neurons to the output; with three axes, axis 0 counts experts."""
    return _dense_or_expert(context, why, Role.MLP_OUT, Role.EXPERT_OUT)


def _dense_or_expert(context: Context, why: str, dense: Role, expert: Role) -> Anatomy:
    """Describe a matrix with the role ``dense``, or a stack of matrices with the role ``expert``."""
    shape = context.shape
    if len(shape) != 3:
        return context.plain(dense, why)
    if _has_inputs_first(context):
        why = f"{why}; experts are (expert, in, out)"
        return Anatomy(shape, (Part(expert, shape[2]),), why, axis=2, in_axis=1, leading=1)
    why = f"{why}; experts are (expert, out, in)"
    return Anatomy(shape, (Part(expert, shape[1]),), why, axis=1, in_axis=2, leading=1)


def _has_inputs_first(context: Context) -> bool:
    """Whether experts are (expert, in, out): from the module's flag, otherwise from the size of its bias."""
    if context.flag("is_transposed") or type(context.owner).__name__ in _TRANSPOSED:
        return True
    siblings = dict(context.owner.named_parameters(recurse=False))
    leaf = next((name for name, tensor in siblings.items() if tensor is context.tensor), "")
    bias_names = (f"{leaf}_bias", leaf.replace("weight", "bias"))
    bias = next((siblings[name] for name in bias_names if name in siblings and name != leaf), None)
    _, first, second = context.shape
    return bias is not None and first != second and bias.shape[-1] == second


_TRANSPOSED = ("Llama4TextExperts", "GptOssExperts")
"""Classes of experts that are (expert, in, out) but have no attribute ``is_transposed``."""


def folded(role: Role, *, transposed: bool) -> Maker:
    """Describe experts that are concatenated along axis 0, (experts x ffn, hidden), as in DBRX.

    Args:
        role: the role of the experts.
        transposed: whether the matrix is used transposed (DBRX's w2), so that its columns are the output units.
    """

    def make(context: Context, why: str) -> Anatomy:
        experts = context.ask("moe_num_experts", "num_experts")
        if context.shape[0] % experts:
            raise ValueError(f"{experts} experts do not divide {context.shape[0]} rows")
        axis = 2 if transposed else 1
        units = context.shape[1] if transposed else context.shape[0] // experts
        return Anatomy(context.shape, (Part(role, units),), why, axis=axis, in_axis=3 - axis, leading=1, fold=experts)

    return make


def _mlp(up: tuple[str, ...], down: str, why: str, classes: tuple[str, ...] = ()) -> Family:
    """Return a family of feed-forward blocks, identified by the names of their children.

    Args:
        up: names of the matrices that lead to the hidden neurons.
        down: name of the matrix that leads back.
        why: the reason shown by ``explain``.
        classes: class names that a block must have; empty for any class.
    """
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
    _mlp(("w12",), "w3", "SwiGLU, gate and up fused"),
    _mlp(("gate_proj", "up_proj"), "down_proj", "gated feed-forward"),
    _mlp(("gate_up_proj",), "down_proj", "gated feed-forward, gate and up fused"),
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
    _mlp(("linear_fc1",), "linear_fc2", "Megatron's feed-forward"),
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
"""Roles distinguish the matrices to and from the hidden neurons, because rules such as ``slim_adam`` may need it."""
