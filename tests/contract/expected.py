"""Where subjects fall short of the contract today: one table, every entry held by a strict xfail."""

from __future__ import annotations

from fnmatch import fnmatchcase

_STRIDES = "the native step takes contiguous tensors alone and says so"
_DOOR_NAMES = "the published package's constructor takes names alone"
_DOOR_HOOKS = "Adam_mini.step calls AdamMini.step, and torch hooks both"

FAILING: dict[str, dict[str, str]] = {
    "transposed_gradients_are_right": {"AdamMini* fused": _STRIDES},
    "expanded_gradients_are_right": {"AdamMini* fused": _STRIDES},
    "sliced_gradients_are_right": {"AdamMini* fused": _STRIDES},
    "channels_last_gradients_are_right": {"AdamMini* fused": _STRIDES},
    "channels_last_parameters_are_right": {"AdamMini* fused": _STRIDES},
    "transposed_parameters_are_right": {"AdamMini* fused": _STRIDES},
    "transposed_parameters_with_plain_gradients_are_right": {"AdamMini* fused": _STRIDES},
    "foreach_takes_no_tensor_learning_rate_later": {"AdamMini*": "a tensor lr is refused when groups are made only"},
    "capturable_changes_nothing_when_fused": {"AdamMini* fused": "capturable=True is refused on CPU with fused=True"},
    "takes_a_list_of_parameters": {"Adam_mini": _DOOR_NAMES},
    "has_no_names_where_none_were_given": {"Adam_mini": _DOOR_NAMES},
    "refuses_a_bare_tensor": {"Adam_mini": _DOOR_NAMES},
    "hooks_before_and_after_the_step": {"Adam_mini": _DOOR_HOOKS},
    "hooks_on_every_optimizer": {"Adam_mini": _DOOR_HOOKS},
    "the_step_is_hooked_once": {"Adam_mini": _DOOR_HOOKS},
}
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
