"""Where subjects fall short of the contract today: one table, every entry held by a strict xfail."""

from __future__ import annotations

from fnmatch import fnmatchcase

FAILING: dict[str, dict[str, str]] = {}
"""check -> {subject, as a pattern -> why}. An entry that does not fail any more fails the suite: take it out."""

_IGNORES_STRIDES = "torch's fused CPU kernel ignores strides and reads whatever lies there"

TORCH_FAULTS: dict[str, dict[str, str]] = {
    "transposed_gradients_are_right": {"AdamW fused": _IGNORES_STRIDES},
    "expanded_gradients_are_right": {"AdamW fused": _IGNORES_STRIDES},
    "sliced_gradients_are_right": {"AdamW fused": _IGNORES_STRIDES},
    "channels_last_gradients_are_right": {"AdamW fused": _IGNORES_STRIDES},
    "transposed_parameters_with_plain_gradients_are_right": {"AdamW fused": _IGNORES_STRIDES},
    "a_parameter_that_changed_shape_is_refused": {
        "AdamW fused": "torch's fused CPU kernel believes the parameter's size; a larger one ends the process"
    },
    "a_parameter_that_changed_device_is_refused": {"AdamW fused": "torch's fused step goes by the parameter alone"},
    "autograd_notices_the_step": {"AdamW fused": "torch's fused kernel does not bump the version of what it writes"},
    "a_compiled_step_is_one_graph": {"AdamW fused": "torch does not trace its fused step: two breaks, empty graphs"},
}
"""The same, for what torch 2.13's own fused AdamW does not hold: not to be inherited, and there is nothing else."""


def matches(pattern: str, subject: str) -> bool:
    """Whether a table's pattern means this subject."""
    return fnmatchcase(subject, pattern)


def reason(check: str, subject: str) -> str | None:
    """Why this subject is known to fail this check, or None where it is to pass."""
    for table in (FAILING, TORCH_FAULTS):
        for pattern, why in table.get(check, {}).items():
            if matches(pattern, subject):
                return why
    return None
