"""First moments in eight and four bits: the planned bytes are those of ``AdamMini.state_bytes()``.

``test_plan.py`` compares states whose size follows from a dtype alone. Here it follows from blocks, from rows, and from
what is too small to quantise. ``test_plan_shards`` has the ranks of FSDP2 and ZeRO.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimizer import AdamMini
from optimizer.__main__ import main
from optimizer.tools.plan import Setup, make_plan, parameters_of
from optimizer.tools.targets import load_target
from tests.optimizer.test_plan import measured, with_gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def llama(hidden: int, dtype: torch.dtype, **changes: Any) -> nn.Module:
    import transformers

    keys = {"vocab_size": 8192, "hidden_size": hidden, "intermediate_size": 896, "num_hidden_layers": 2,
            "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": hidden // 5}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**keys, **changes})).to(dtype)


def planned(model: nn.Module, dtype: str, moment: str) -> Any:
    return make_plan(parameters_of(model), Setup(dtype=dtype, exp_avg_dtype=moment), ("adam_mini",)).rows[-1].state


def held(optimizer: AdamMini) -> dict[str, int]:
    """Bytes of the state that exists after it was made, by kind."""
    optimizer.init_state()
    out: dict[str, int] = {}
    for state in optimizer.state.values():
        for kind, tensor in state.items():
            out[kind] = out.get(kind, 0) + tensor.numel() * tensor.element_size()
    return out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("moment", ["int8", "int4"])
@pytest.mark.parametrize("hidden", [320, 40, 250, 330])
def test_quantised_moments_are_planned_as_they_are_kept(hidden: int, moment: str, dtype: str) -> None:
    model = llama(hidden, DTYPES[dtype])
    state, optimizer = planned(model, dtype, moment), AdamMini(model, exp_avg_dtype=moment)
    counted = optimizer.state_bytes()
    assert state.exp_avg + state.scales == counted["exp_avg"]
    assert (state.exp_avg_sq, state.step) == (counted["exp_avg_sq"], counted["step"])
    assert state.total == sum(counted.values())
    kept = held(optimizer)
    assert (state.exp_avg, state.scales) == (kept["exp_avg"], kept["exp_avg_scale"])


def test_the_number_that_was_wrong() -> None:
    """Rows of 320 are two and a half blocks of 128: 3 scales a row, where 256 divides no row and every tensor was left
    in its own dtype."""
    state = planned(llama(320, torch.float32, vocab_size=1000), "fp32", "int8")
    rows = 2 * 1000 + 2 * (320 + 2 * 64 + 320 + 2 * 896)
    assert state.exp_avg == 320 * rows + 2 * 320 * 896 + 4 * 5 * 320  # one byte each, norms in fp32
    assert state.scales == 4 * (3 * rows + 2 * 320 * 7)


@pytest.mark.parametrize("moment", ["int8", "int4"])
def test_convolutions_have_rows_of_several_axes(moment: str) -> None:
    model = nn.Sequential(nn.Conv2d(24, 32, 3), nn.Conv2d(32, 3, 1), nn.Linear(8, 1024), nn.Linear(100, 64))
    state, counted = planned(model, "fp32", moment), AdamMini(model, exp_avg_dtype=moment).state_bytes()
    assert state.total == sum(counted.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("moment", ["int8", "int4"])
@pytest.mark.parametrize(("rules", "shape"), [("adam_mini", (600, 1000)), ("slim_adam", (40000, 64)),
                                              ("elementwise", (3000, 1000))])  # fmt: skip
def test_temporaries_of_quantised_moments_are_bounded_and_not_by_much(
    rules: str, shape: tuple[int, int], moment: str, dtype: str
) -> None:
    linear = with_gradients(nn.Sequential(nn.Linear(*shape, bias=False, dtype=DTYPES[dtype])))
    optimizer = AdamMini(linear, rules=rules, fused=False, exp_avg_dtype=moment)
    optimizer.step()
    top = measured(optimizer.step)
    setup = Setup(dtype=dtype, exp_avg_dtype=moment)
    bound = make_plan(parameters_of(linear), setup, (rules,)).rows[-1].state.temporary
    assert top <= bound <= 2.1 * top


@pytest.mark.parametrize(("moment", "bound"), [("int8", 1.05), ("int4", 0.60)])
@pytest.mark.parametrize("how", [{"sharding": "fsdp"}, {"sharding": "zero3"}, {"sharding": "fsdp", "tp": 2}])
def test_bytes_per_parameter_of_a_shard(moment: str, bound: float, how: dict[str, Any]) -> None:
    setup = Setup(world=8, exp_avg_dtype=moment, **how)
    row = make_plan(parameters_of(load_target("llama-3-8b")), setup, ("adam_mini",)).rows[-1]
    assert row.state.total <= bound * row.parameters / 2, "bytes per parameter, which has two in bf16"


@pytest.mark.parametrize("how", [["--world", "8"], ["--fsdp"], ["--zero", "3"], ["--world", "2", "--zero", "0"]])
def test_where_nothing_is_sharded_it_is_as_on_one_device(how: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "gpt2-125m", "--rules", "adam_mini", "--exp-avg-dtype", "int8", *how])
    sharded = capsys.readouterr().out.split("Adam-mini, adam_mini")[1].splitlines()[0]
    main(["plan", "gpt2-125m", "--rules", "adam_mini", "--exp-avg-dtype", "int8"])
    assert sharded == capsys.readouterr().out.split("Adam-mini, adam_mini")[1].splitlines()[0]
