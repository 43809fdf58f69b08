"""A single layer inside any wrapper is the layer itself: in the partition, in both optimizers, on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from adam_mini import Adam_mini
from optimizer import AdamMini, explain, partition
from optimizer.__main__ import main
from optimizer.tools.verify import verify
from tests.optimizer.models import wrap_compiled


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": wrap_compiled,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "ModuleDict": lambda layer: nn.ModuleDict({"module": layer}),
    "twice": lambda layer: AveragedModel(wrap_compiled(layer)),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(4, 6),
    "Embedding": lambda: nn.Embedding(5, 4),
    "Conv1d": lambda: nn.Conv1d(3, 4, 2),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2),
}
compiled = wrap_compiled(nn.Linear(4, 6))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_layer_has_the_layers_blocks(wrap: str, layer: str) -> None:
    plain = LAYERS[layer]()
    wrapped = WRAPS[wrap](plain)
    assert list(partition(wrapped).values()) == list(partition(plain).values())
    for name in (name for name, _ in wrapped.named_parameters()):
        assert name in explain(wrapped)
    AdamMini(wrapped, strict=True)
    AdamMini(wrapped.named_parameters(), strict=True)
    AdamMini(wrapped.parameters(), strict=True)
    Adam_mini(wrapped.named_parameters(), dim=8, n_heads=2)
    AdamMini(list(wrapped.named_parameters()))
    Adam_mini(list(wrapped.named_parameters()), dim=8, n_heads=2).init_state()


def test_verify_has_nothing_to_say_of_a_wrapped_layer() -> None:
    with pytest.raises(ValueError, match="nothing to verify"):
        verify(nn.DataParallel(nn.Linear(4, 6)))


def test_the_command_line_explains_a_wrapped_layer(capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", f"{__name__}:compiled"])
    assert "_orig_mod.weight" in capsys.readouterr().out
