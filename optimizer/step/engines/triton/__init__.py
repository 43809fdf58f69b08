"""The step for CUDA devices: a few Triton launches for all tensors of a group.

How a tensor is worked through depends on where its blocks lie in memory (``tables.py``):

    each      every element its own block                    one launch
    rows      blocks contiguous, up to 32,768 elements       one launch per class of length
    spans     blocks of long contiguous pieces               sums, second moments, update: three launches
    columns   blocks of short pieces across memory           the same

and one small launch before them advances the counters and makes the bias corrections. Launches do not grow in number
with the tensors: a program finds its tensor in a table of addresses, its work in tables made once per set of layouts.
Sums have a fixed order, so a step is deterministic.

What was never run on a device, for there was none: all of it. Every kernel ran under Triton's interpreter on a CPU
(numerics, masks, addresses, the tables, the operator under ``torch.compile``), and was compiled by Triton and ptxas to
cubins for compute capability 8.0 and 9.0. Not seen are: speed, tile sizes and numbers of warps (chosen, not tuned);
ordering between launches and copies on streams, pinned uploads of the address table included; threads of one program
beside each other (the barrier before second moments are stored); loads of 16 bytes, which a compiler was promised are
aligned; rounding to bf16 (the interpreter cuts off), and of division and square root; capture into CUDA graphs; several
devices in one process.
"""

from .launch import accepts, available, triton_update

__all__ = ["accepts", "available", "triton_update"]
