"""The step for CUDA devices: a few Triton launches for all tensors of a group.

The kernels for a tensor depend on how its blocks lie in memory (``tables.py``, ``factored_tables.py``):

    each      every element is a block                                  one launch
    rows      blocks are contiguous, up to 32,768 elements              one launch per power of two of lengths
    spans     blocks consist of long contiguous ranges                  three launches: sums, second moments, update
    columns   blocks consist of short ranges spread over memory         three launches: sums, second moments, update
    factored  second moments are products of row and column means       three launches: sums, means, update

One small launch before these increments the counters and computes the bias corrections. The number of launches does not
depend on the number of tensors: each program finds its tensor in a table of addresses and its work in tables that are
built once per set of layouts. Sums have a fixed order, so a step is deterministic.

This engine was never run on a device, because none was available. Every kernel ran under Triton's interpreter on a CPU,
which tested the numerics, masks, addresses, tables, and the operator under ``torch.compile``. Triton and ptxas compiled
every kernel to cubins for compute capability 8.0 and 9.0, in which tests count accesses of 16 bytes and spilled
registers. These properties were not tested:

- speed; tile sizes and numbers of warps were chosen and not tuned;
- the order of launches and copies on streams, including uploads of the address table from pinned memory;
- concurrent threads of one program, and the barrier before second moments are stored;
- whether accesses of 16 bytes, which the kernels declare to be aligned, are;
- rounding to bf16, where the interpreter truncates, and the rounding of division and square root;
- capture into CUDA graphs;
- several devices in one process.
"""

from .launch import accepts, available, obstacle, triton_update

__all__ = ["accepts", "available", "obstacle", "triton_update"]
