"""Changes that let torchtitan 0.3 train on CPUs with gloo. None of them concerns the optimizer.

torchtitan is made for accelerators and newer releases of torch. Without an accelerator it looks for CUDA. Its attention
kernels have no backward pass on CPUs. FSDP scales gradients by a reduction that gloo does not have. Its default backend
for sharding, "spmd_types", and a call that shortens time-outs need torch 2.14.
"""

from __future__ import annotations

import os
import resource
from types import SimpleNamespace
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule


def use_processors() -> None:
    """Make the CPU torchtitan's device. Call this before you import any other module of torchtitan."""
    from torchtitan.tools import utils

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    utils.device_type = "cpu"
    utils.device_module = SimpleNamespace(
        set_device=lambda device: None,
        device_count=lambda: 1,
        current_device=lambda: 0,
        synchronize=lambda: None,
        empty_cache=lambda: None,
        get_device_name=lambda device: "processor",
        get_device_properties=lambda device: SimpleNamespace(total_memory=memory),
        reset_peak_memory_stats=lambda: None,
        memory_stats=lambda device: {
            f"{kind}_bytes.all.peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for kind in ("active", "reserved")
        },
    )
    if not hasattr(torch.distributed, "set_timeout"):  # In torch 2.13 the function is private.
        torch.distributed.set_timeout = distributed_c10d._set_pg_timeout


def for_processors(config: Any) -> Any:
    """Change a trainer's configuration for CPUs: fp32, short sequences and plain attention.

    Plain attention also attends across the borders of documents within a sequence.
    """
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention

    for _, _, parent, name in list(config.model_spec.model.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())
    config.model_spec.parallelize_fn = _Summing(config.model_spec.parallelize_fn)
    config.training.mixed_precision_param = "float32"
    config.training.disable_cuda_graphs = True
    config.training.local_batch_size, config.training.seq_len = 2, 128
    config.parallelism.spmd_backend = "partial_dtensor"
    config.metrics.disable_color_printing = True
    return config


class _Summing:
    """A model's function ``parallelize``, followed by a setting that makes FSDP reduce gradients by plain sums."""

    def __init__(self, parallelize: Any) -> None:
        self._parallelize = parallelize

    def __call__(self, model: Any, **options: Any) -> Any:
        model = self._parallelize(model, **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model
