"""Overrides of the rules on whole models: through every door alike, and refused where they would do nothing."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from optimizer import AdamMini, Layout, Rules, Unit, explain, partition, tag
from optimizer.partition.names import clean
from tests.optimizer.models import GPT, Llama, batch, loss_of, wrap_compiled

RULES = Rules("adam_mini").override({"*.output.weight": Unit.ELEMENT, "layers.1.*.wv.weight": "TENSOR"})


def layouts(optimizer: AdamMini) -> dict[int, Layout]:
    return {
        id(p): layout
        for group, row in zip(optimizer.param_groups, optimizer.layouts, strict=True)
        for p, layout in zip(group["params"], row, strict=True)
    }


def test_they_change_what_they_name_and_nothing_else() -> None:
    model = Llama()
    before, after = partition(model), partition(model, RULES)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"output.weight", "layers.1.attention.wv.weight"}
    assert after["output.weight"].n_blocks == 11 * 16 and after["layers.1.attention.wv.weight"].n_blocks == 1


def test_every_door_gives_the_same_partition() -> None:
    model = Llama()
    expected = partition(model, RULES)
    wanted = {id(p): expected[name] for name, p in model.named_parameters()}
    pairs = list(model.named_parameters())
    compiled = wrap_compiled(model)
    prefixed = [(f"module._fsdp_wrapped_module.{name}", p) for name, p in tag(Llama()).named_parameters()]
    assert layouts(AdamMini(model, rules=RULES)) == wanted
    assert layouts(AdamMini(model.named_parameters(), rules=RULES)) == wanted
    assert layouts(AdamMini(model.parameters(), rules=RULES)) == wanted
    assert layouts(AdamMini(compiled, rules=RULES)) == wanted
    assert {clean(name): layout for name, layout in partition(compiled, RULES).items()} == expected
    assert list(layouts(AdamMini(prefixed, rules=RULES)).values()) == [expected[name] for name, _ in pairs]
    tag(model)
    assert layouts(AdamMini(list(model.parameters()), rules=RULES)) == wanted
    assert layouts(AdamMini([{"params": list(model.parameters()), "lr": 1e-4}], rules=RULES)) == wanted
    assert layouts(AdamMini([{"params": pairs[:5]}, {"params": pairs[5:]}], rules=RULES)) == wanted


def test_parameters_without_names_are_refused_not_guessed() -> None:
    model = Llama()
    with pytest.raises(ValueError, match=r"\*\.output\.weight.*no name.*named_parameters.*tag"):
        AdamMini(list(model.parameters()), rules=RULES)
    optimizer = AdamMini(list(tag(model).parameters()), rules=RULES)
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="no name"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})
    assert len(optimizer.param_groups) == groups == len(optimizer.layouts), "a refused group leaves nothing behind"
    extra = tag(nn.ModuleDict({"output": nn.Linear(3, 3, bias=False)}))
    optimizer.add_param_group({"params": list(extra.parameters())})
    assert optimizer.layouts[-1][0].n_blocks == 9


def test_a_pattern_that_matches_nothing_names_the_closest() -> None:
    model, rules = Llama(), Rules("adam_mini").override({"layers.*.attention.wqq.weight": Unit.ELEMENT})
    doors = (
        partition,
        explain,
        lambda m, r: AdamMini(m, rules=r),
        lambda m, r: AdamMini(m.named_parameters(), rules=r),
    )
    for door in doors:
        with pytest.raises(ValueError) as error:
            door(model, rules)
        text = str(error.value)
        assert "'layers.*.attention.wqq.weight'" in text and "layers.0.attention.wq.weight" in text
        assert "layers.1." not in text, "one name of each kind of layer"
        assert "Correct or remove" in text
    with pytest.raises(ValueError, match=r"lm_head\.weight.*tied"):
        partition(GPT(tied=True), Rules("adam_mini").override({"*.lm_head.weight": Unit.ELEMENT}))


def test_frozen_parameters_count_as_matched() -> None:
    model = Llama()
    model.output.requires_grad_(False)
    assert AdamMini(model, rules=RULES).param_groups


def test_heads_only_where_there_are_heads() -> None:
    model = GPT(dim=12, n_head=3)
    name = "transformer.h.0.attn.c_attn.weight"
    heads = partition(model, Rules("adam_mini").override({name: Unit.ATTENTION_HEAD}))[name]
    assert list(heads.runs) == [4] * 9, "values, too: an override is for every part"
    columns = partition(model, Rules("adam_mini").override({name: Unit.IN_NEURON}))[name]
    assert (columns.axis, columns.n_blocks) == (1, 12)
    with pytest.raises(ValueError, match=r"'\*\.c_fc\.weight'.*transformer\.h\.0\.mlp\.c_fc.*MLP_IN.*OUT_NEURON"):
        partition(model, Rules("adam_mini").override({"*.c_fc.weight": Unit.ATTENTION_HEAD}))
    with pytest.raises(ValueError, match=r"QUERY.*head_dim.*pass the model"):
        AdamMini(
            [("wq.weight", nn.Parameter(torch.zeros(4, 4)))],
            rules=Rules("elementwise").override({"wq.weight": Unit.ATTENTION_HEAD}),
        )


def test_an_elementwise_override_steps_as_adamw() -> None:
    ours, theirs = Llama().double(), Llama().double()
    optimizer = AdamMini(ours, lr=1e-2, rules=Rules("pytorch_default").override({"*.wq.weight": Unit.ELEMENT}))
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    loss_of(ours, batch(11, 0)).backward()
    loss_of(theirs, batch(11, 0)).backward()
    optimizer.step()
    reference.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        same = torch.allclose(p, q, rtol=1e-12, atol=1e-14)
        assert same == name.endswith("wq.weight"), name
    assert optimizer.state[ours.output.weight]["exp_avg_sq"].numel() == 11


def test_another_partition_s_state_is_refused() -> None:
    model = Llama()
    optimizer = AdamMini(model, rules=RULES)
    loss_of(model, batch(11, 0)).backward()
    optimizer.step()
    wv = r"adam_mini#.*layers\.1\.attention\.wv\.weight.* kept for blocks larger than"
    with pytest.raises(ValueError, match=wv):
        AdamMini(Llama(), rules="adam_mini").load_state_dict(optimizer.state_dict())
    head = Rules("adam_mini").override({"*.output.weight": Unit.ELEMENT})
    optimizer = AdamMini(model, rules=head)
    optimizer.step()
    with pytest.raises(ValueError, match=r"output\.weight.*\(11, 16\).*\(11, 1\)"):
        AdamMini(Llama(), rules="adam_mini").load_state_dict(optimizer.state_dict())


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.zeros(4, 6))
        self.plain = nn.Linear(3, 3)


def test_an_override_settles_an_unknown_weight(caplog: pytest.LogCaptureFixture) -> None:
    rules = Rules("adam_mini").override({"mixing": Unit.ELEMENT})
    with pytest.raises(ValueError, match="mixing"):
        AdamMini(Odd(), strict=True)
    with caplog.at_level(logging.WARNING, logger="optimizer"):
        optimizer = AdamMini(Odd(), rules=rules, strict=True)
    assert not caplog.records and optimizer.layouts[0][0].n_blocks == 24
    first = explain(Odd(), rules).splitlines()[2]
    assert first.startswith("! mixing") and "override 'mixing'" in first, "still nobody knows what it is"
