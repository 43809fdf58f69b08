"""Which cases the tests run on how many ranks; ``python -m tests.sharding.matrix`` runs many more."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.sharding.workers import Case


class Trained(NamedTuple):
    """A model trained under a wrapper, the optimizer built in one way.

    The moment is None, or a quantised format and the largest difference that its rounding may cause: none where the
    numbers that it draws are those of one process, and no block of scales is cut.
    """

    model: str
    wrap: str
    kind: str = "model"
    dtype: str = "float64"
    rules: str = "adam_mini"
    moment: tuple[str, float] | None = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``train_case``."""
        given = {"model": self.model, "wrap": self.wrap, "kind": self.kind, "dtype": self.dtype}
        if self.rules != "adam_mini":  # the published package's class has no such argument
            given["rules"] = self.rules
        return given if self.moment is None else given | {"exp_avg_dtype": self.moment[0]}


TRAINED = {
    2: [
        Trained("wide", "fsdp2", moment=("int8", 0)), Trained("wide", "fsdp2", dtype="float32", moment=("int8", 0.005)),
        Trained("wide", "fsdp1", moment=("int8", 0)), Trained("wide", "fsdp2", rules="factored", moment=("int4", 0)),
        Trained("wide", "fsdp2-columns", moment=("int8", 0.01)), Trained("wide-parallel", "tp", moment=("int8", 0.01)),
        Trained("wide", "fsdp1-flat", rules="factored", moment=("int8", 0.01)),
        Trained("llama", "fsdp1-flat", rules="factored"), Trained("gpt2", "fsdp1", rules="factored"),
        Trained("gpt2", "fsdp2", rules="factored"), Trained("mixtral", "fsdp2", rules="factored"),
        Trained("mixtral", "fsdp2-columns", rules="factored"), Trained("llama-parallel", "tp", rules="factored"),
        Trained("llama", "ddp"), Trained("llama", "fsdp1"), Trained("llama", "fsdp1-flat"), Trained("llama", "fsdp2"),
        Trained("gpt2", "fsdp1"), Trained("gpt2", "fsdp2"), Trained("mixtral", "fsdp1"), Trained("mixtral", "fsdp2"),
        Trained("llama", "fsdp2-columns"), Trained("llama", "fsdp2-offload"), Trained("llama", "hsdp"),
        Trained("llama-parallel", "tp"), Trained("mixtral", "fsdp2-columns"),
        Trained("llama", "fsdp2", "names"), Trained("llama", "fsdp2", "tag-after"), Trained("llama", "fsdp2", "groups"),
        Trained("llama", "fsdp2", "swapped"), Trained("llama", "fsdp1", "names"),
        Trained("llama", "fsdp1", "door"), Trained("llama", "fsdp1", "tag-before"), Trained("llama", "fsdp1", "groups"),
        Trained("llama", "fsdp1-layers"),
        Trained("gpt2", "fsdp2", dtype="float32"), Trained("llama", "fsdp1", dtype="float32"),
    ],
    3: [
        Trained("wide", "fsdp2", moment=("int4", 0)), Trained("wide", "fsdp1", moment=("int8", 0.01)),
        Trained("gpt2", "fsdp2", rules="factored"), Trained("llama", "fsdp1-flat", rules="factored"),
        Trained("llama", "fsdp1"), Trained("llama", "fsdp1-flat"), Trained("llama", "fsdp2"), Trained("gpt2", "fsdp2"),
        Trained("llama-parallel", "tp"),
    ],
}  # fmt: skip

FACTS = ("nothing_cut", "missing_gradients", "partial_placement", "other_rules", "other_order", "resharded",
         "without_exchange", "bytes_of_state", "compiled_step", "partial_gradient",
         "few_bits_of_whole_rows", "few_bits_of_shared_blocks", "rounding_of_flat_ranges",
         "nothing_held", "zero_redundancy", "whole_state_through_the_door")  # fmt: skip
SAVED = ("fsdp2", "fsdp1", "fsdp1-flat")
FACTORED = "factored-"
"""Prefix of the cases with factored second moments."""
FACTORED_SAVED = ("fsdp1-flat",)
FACTORED_ACROSS = {"gpt2": ("fsdp1-flat", "fsdp2"), "llama-parallel": ("plain", "tp")}
ACROSS = {"gpt2": ("plain", "fsdp1", "fsdp1-flat", "fsdp2"), "llama-parallel": ("plain", "tp", "fsdp2-columns")}
FEW_BITS_SAVED = {"fsdp2": "int4", "fsdp1": "int8"}
"""Formats of quantised first moments whose checkpoints go on with other ranks, by wrapper."""


def on_ranks(world: int) -> pytest.MarkDecorator:
    """Tests of one world size run in one pytest worker, which starts the processes of that size once."""
    return pytest.mark.xdist_group(f"sharding on {world} ranks")


def identity(case: Trained) -> str:
    words = [case.model, case.wrap, case.kind, case.dtype, *([case.rules] if case.rules != "adam_mini" else [])]
    return "-".join(words + ([case.moment[0]] if case.moment else []))


def others(world: int, folder: str) -> dict[str, Case]:
    """Cases that are no plain training."""
    where = "tests.sharding.checkpoints:"
    adamw: dict[str, Case] = {
        f"adamw-{wrap}": (f"{where}adamw_case", {"name": "gpt2", "wrap": wrap}) for wrap in ("fsdp1", "fsdp2")
    }
    if world == 2:
        across = {
            f"across-{name}": ("tests.sharding.whole_state:across_case", {"name": name, "wraps": wraps})
            for name, wraps in ACROSS.items()
        }
        across |= {
            f"across-{FACTORED}{name}": (
                "tests.sharding.whole_state:across_case",
                {"name": name, "wraps": wraps, "rules": "factored"},
            )
            for name, wraps in FACTORED_ACROSS.items()
        }
        across["across-few-bits"] = (
            "tests.sharding.whole_state:across_case",
            {"name": "wide", "wraps": ("plain", "fsdp1", "fsdp2-columns"), "exp_avg_dtype": "int8"},
        )
        return across | adamw | {name: (f"tests.sharding.single_steps:{name}", {}) for name in FACTS}
    saved: dict[str, Any] = {
        wrap: (f"{where}checkpoint_case", {"name": "llama", "wrap": wrap, "folder": folder, "flatten": wrap == "fsdp2"})
        for wrap in SAVED
    }
    for wrap in FACTORED_SAVED:
        case = {"name": "gpt2", "wrap": wrap, "folder": f"{folder}/{FACTORED}", "flatten": wrap == "fsdp2"}
        saved[FACTORED + wrap] = (f"{where}checkpoint_case", case | {"rules": "factored"})
    for wrap, moment in FEW_BITS_SAVED.items():
        case = {"name": "wide", "wrap": wrap, "folder": folder, "flatten": False, "exp_avg_dtype": moment}
        saved[f"{wrap}-few-bits"] = (f"{where}checkpoint_case", case)
    for flatten in (False, True):
        case = {"name": "llama", "folder": folder, "flatten": flatten}
        saved[f"folder-{flatten}"] = (f"{where}converted_folder_case", case)
    return saved | adamw | {"whole": (f"{where}state_is_whole", {})}
