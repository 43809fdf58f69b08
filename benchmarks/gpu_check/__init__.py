"""What a person with a GPU runs first: ``python -m benchmarks.gpu_check`` (``make gpu-check``).

Every engine that exists for a device is compared with the reference in float64, timed beside torch's AdamW, and used in
a short training run. The result is one page, out/gpu_check.md, with one verdict:

    PASSED      every check ran on tensors of the CUDA device, and passed
    FAILED      a check failed, or its tensors were not on the device
    INCOMPLETE  a check did not run, or the device is no CUDA device

Only PASSED ends with exit code 0. ``verdict`` decides, ``correctness`` has the checks of a step, ``work`` those of
training, graphs and memory, ``speed`` the times, ``page`` the text.
"""
