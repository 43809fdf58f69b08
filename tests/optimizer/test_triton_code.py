"""The machine code of the Triton kernels, which needs no device: bytes per element, width of accesses, registers.

Triton compiles to PTX, and its own ptxas to a cubin. The tools that read a cubin come with Triton, too; where they are
missing, the tests read the PTX and are then reported as skipped.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SHARED = {"addresses": "*i64", "entries": "*i64", "programs": "*i32", "factors": "*fp32", "numbers": "*fp32",
          "scratch": "*fp32", "P": "constexpr", "G": "constexpr", "M": "constexpr", "WIDTH": "constexpr",
          "EVEN": "constexpr"}  # fmt: skip
NUMBERS = ("lr", "beta1", "beta2", "weight_decay", "eps", "sign")
POINTERS = ("lr_at", "beta1_at", "beta2_at", "decay_at", "scale_at", "found_inf_at")


class Traffic(NamedTuple):
    """What a kernel moves per element: p, g, m, and v where every element has its own. ``rows`` reads g twice.

    Not counted: second moments of blocks, means and partial sums, of which there are few, and what ``column_update``
    reads of v per element, from cache.
    """

    reads: str
    writes: str
    elements: str = ""  # the constants of the kernels whose product is the number of elements of a step of the loop


KERNELS = {
    "each": Traffic("pgmv", "pmv", "BLOCK"),
    "rows": Traffic("gpgm", "pm", "TILE"),
    "span_sums": Traffic("g", "", "BLOCK"),
    "span_update": Traffic("pgm", "pm", "BLOCK"),
    "column_sums": Traffic("g", "", "16 COLUMNS"),
    "column_update": Traffic("pgm", "pm", "BLOCK"),
    "seconds": Traffic("", ""),
    "factored_sums": Traffic("g", "", "WIDE_STEP WIDE_FAST"),
    "factored_moments": Traffic("", ""),
    "factored_update": Traffic("pgm", "pm", "WIDE_STEP WIDE_FAST"),
}
SINGLE = {"fp32": {"p": 4, "g": 4, "m": 4, "v": 4}, "bf16": {"p": 2, "g": 2, "m": 4, "v": 4}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel: str, capability: int, signature: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(getattr(module_of(kernel), kernel), signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm


def module_of(kernel: str) -> Any:
    from optimizer.step.engines.triton import factored_kernels, kernels

    return factored_kernels if kernel.startswith("factored") else kernels


def elements_per_thread(kernel: str, ptx: str) -> float:
    """The elements that a thread holds in one step of the kernel's loop."""
    product = 1
    for factor in KERNELS[kernel].elements.split():
        product *= int(factor) if factor.isdigit() else getattr(module_of(kernel), factor).value
    threads = re.search(r"\.reqntid (\d+)", ptx)
    assert threads is not None
    return product / int(threads[1])


def tool_output(tool: str, *arguments: str) -> str | None:
    """What a tool of Triton's CUDA backend prints, or None if it is not installed."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    if not path.exists():
        return None
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("capability", [80, 90])
def test_prepare_compiles_with_numbers_and_with_tensors(capability: int) -> None:
    own = {"addresses": "*i64", "factors": "*fp32", "numbers": "*fp32", "n": "i32"} | dict.fromkeys(NUMBERS, "fp64")
    plain = compiled("prepare", capability, own | dict.fromkeys(POINTERS, "constexpr"), dict.fromkeys(POINTERS))
    given_tensors = compiled("prepare", capability, own | dict.fromkeys(POINTERS, "*fp32"), {})
    assert plain["cubin"][:4] == b"\x7fELF" and plain["cubin"] != given_tensors["cubin"]


@pytest.mark.parametrize("capability, dtype", [(80, "fp32"), (90, "fp32"), (90, "bf16")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code(kernel: str, capability: int, dtype: str, tmp_path: Path) -> None:
    import triton.language as tl

    traffic, size = KERNELS[kernel], SINGLE[dtype]
    narrow = tl.float32 if dtype == "fp32" else tl.bfloat16
    reads, writes = (sum(size[x] for x in names) for names in (traffic.reads, traffic.writes))
    if kernel not in ("each", "rows"):  # a value per element in v; g read again, from cache
        assert SINGLE["fp32"]["p"] * len(traffic.reads + traffic.writes) <= 20
    for width in (16, 1024) if kernel == "rows" else (0,):
        constants = {"P": narrow, "G": narrow, "M": tl.float32, "WIDTH": width, "EVEN": True}
        made = compiled(kernel, capability, SHARED, constants)
        assert made["cubin"][:4] == b"\x7fELF" and f"sm_{capability}" in made["ptx"]
        held = elements_per_thread(kernel, made["ptx"])
        loads, stores = (made["ptx"].count(f"{access}.global.v4.b32") for access in ("ld", "st"))
        assert (16 * loads, 16 * stores) == (reads * held if reads else 0, writes * held if writes else 0)
        assert not re.search(r"\b(ld|st)\.local", made["ptx"])
        if dtype == "bf16" and "p" in traffic.writes:
            assert "cvt.rn.bf16" in made["ptx"], "rounded to nearest"
        (tmp_path / "cubin").write_bytes(made["cubin"])
        usage = tool_output("cuobjdump", "-res-usage", str(tmp_path / "cubin"))
        code = tool_output("nvdisasm", "-c", str(tmp_path / "cubin"))
        if usage is None or code is None:
            pytest.skip("only the PTX was read, because Triton has no cuobjdump or nvdisasm here")
        # More than in the PTX where ptxas unrolls a loop.
        assert code.count("LDG.E.128") >= loads and code.count("STG.E.128") >= stores
        # In some forms of ``rows``, ptxas saves two registers so that more warps fit.
        spilled = max(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
        assert spilled <= (8 if kernel == "rows" else 0), f"{spilled} bytes of registers spilled"
