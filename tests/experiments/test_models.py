"""The hand-written models: causal, seeded without touching the global generator, and under the names others rely on."""

from __future__ import annotations

import pytest
import torch

from experiments.models import GPTConfig, LlamaConfig, MLPConfig, build, lm_loss
from experiments.models.llama import rotary
from optimizer import partition

LLAMA = LlamaConfig(vocab=11, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden=24)
GPT = GPTConfig(vocab=11, block_size=12, n_embd=16, n_layer=2, n_head=4)


@pytest.mark.parametrize("config", [LLAMA, GPT])
def test_later_tokens_do_not_reach_earlier_logits(config: LlamaConfig | GPTConfig) -> None:
    model = build(config, 0).double()
    tokens = torch.arange(10)[None] % 11
    changed = tokens.clone()
    changed[0, 6] = 10
    a, b = model(tokens), model(changed)
    assert a.shape == (1, 10, 11)
    assert torch.equal(a[0, :6], b[0, :6])
    assert (a[0, 6:] - b[0, 6:]).abs().amax(-1).min() > 1e-6  # and every later one sees the change


@pytest.mark.parametrize("config", [LLAMA, GPT, MLPConfig()])
def test_weights_are_a_function_of_the_seed(config: LlamaConfig | GPTConfig | MLPConfig) -> None:
    state = torch.get_rng_state()
    first, again, other = build(config, 3), build(config, 3), build(config, 4)
    assert torch.equal(torch.get_rng_state(), state)
    flat = [torch.nn.utils.parameters_to_vector(m.parameters()) for m in (first, again, other)]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])


def test_grouped_heads_equal_full_heads_with_repeated_keys() -> None:
    grouped, full = build(LLAMA, 0).double(), build(LlamaConfig(**{**vars(LLAMA), "n_kv_heads": 4}), 0).double()
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("wk.weight", "wv.weight")):
            state[name] = state[name].view(2, 4, 16).repeat_interleave(2, dim=0).reshape(16, 16)
    full.load_state_dict(state)
    tokens = torch.arange(8)[None]
    assert torch.allclose(grouped(tokens), full(tokens), atol=1e-12, rtol=0)


def test_rotary_scores_depend_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator, dtype=torch.float64).expand(1, 1, 10, 8) for _ in range(2))
    scores = (rotary(q, 10_000.0) @ rotary(k, 10_000.0).transpose(-1, -2))[0, 0]
    for distance in range(10):
        diagonal = scores.diagonal(-distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-6  # angles are float32
    assert scores[9].std() > 1e-3


def test_tied_output_is_one_parameter() -> None:
    tied = build(GPTConfig(**{**vars(GPT), "tied": True}), 0)
    assert tied.lm_head.weight is tied.transformer["wte"].weight
    assert "lm_head.weight" not in dict(tied.named_parameters())


def test_untrained_loss_is_near_uniform_and_a_mean() -> None:
    model, tokens = build(LLAMA, 0), torch.arange(90).remainder(11).view(9, 10)
    batch = tokens[:, :-1], tokens[:, 1:]
    loss = lm_loss(model, batch)
    assert 1.5 < loss.item() < 4.0  # log 11 = 2.4
    doubled = tuple(torch.cat([t, t]) for t in batch)
    assert torch.allclose(lm_loss(model, doubled), loss)


@pytest.mark.parametrize("config", [LLAMA, GPT])
def test_names_carry_their_roles(config: LlamaConfig | GPTConfig) -> None:
    layouts = partition(build(config, 0))
    wanted = (
        {"layers.0.attention.wq.weight": 4, "layers.0.attention.wk.weight": 2, "layers.0.attention.wv.weight": 8}
        if isinstance(config, LlamaConfig)
        else {"transformer.h.0.attn.c_attn.weight": 4 + 4 + 16, "lm_head.weight": 11}
    )
    assert {name: layouts[name].n_blocks for name in wanted} == wanted


@pytest.mark.parametrize("sizes", [{"n_heads": 3}, {"n_kv_heads": 3}])
def test_heads_that_do_not_divide_are_named(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(sizes))}=3"):
        build(LlamaConfig(**{**vars(LLAMA), **sizes}), 0)
