"""The negative control: the published adam-mini 1.1.1 under the same checks, and which of them it breaks.

It gets named parameters wherever a check is not about names, so that each entry is a fault of its own and not the
constructor's alone. The project's own promises beyond torch's are not asked of it.
"""

from __future__ import annotations

import warnings

import pytest

from tests.contract import checks
from tests.contract.harness import CHECKS, ours
from tests.contract.subjects import published

assert checks.__all__, "the checks enter themselves when they are imported"

BROKEN = {
    "a_bad_eps_is_refused",
    "a_checkpoint_brings_its_options",
    "a_checkpoint_of_other_groups_is_refused",
    "a_checkpoint_speaks_of_positions",
    "a_checkpoint_takes_the_models_dtype",
    "a_compiled_step_follows_a_number",
    "a_compiled_step_follows_a_tensor_rate",
    "a_compiled_step_is_one_graph",
    "a_deep_copy_is_independent",
    "a_pickle_trains_on",
    "a_tensor_learning_rate_may_have_one_element",
    "a_users_own_key_in_a_group_stays",
    "an_added_group_gets_the_defaults",
    "an_added_group_keeps_its_names",
    "an_added_group_keeps_its_own_options",
    "an_added_group_trains",
    "an_added_group_without_names_is_refused_beside_named_ones",
    "an_option_set_in_a_group_is_followed",
    "another_order_loads_by_name",
    "betas_are_both_numbers_or_both_tensors",
    "betas_of_groups_are_their_own",
    "betas_set_between_steps_are_followed",
    "capturable_is_for_devices_that_capture",
    "channels_last_gradients_are_right",
    "channels_last_parameters_are_right",
    "complex_parameters_are_right_or_refused",
    "counters_may_be_numbers",
    "dcp_leaves_frozen_parameters_out",
    "dcp_loads_in_place",
    "dcp_makes_state_without_moving_weights",
    "dcp_speaks_of_names",
    "decay_of_groups_is_their_own",
    "differentiable_steps_are_the_plain_steps",
    "differentiable_through_the_betas",
    "differentiable_through_the_gradient_and_the_weights",
    "differentiable_through_the_learning_rate",
    "differentiable_through_the_state",
    "dtypes_mix_in_one_group",
    "engines_agree",
    "engines_can_be_changed_in_mid_training",
    "every_argument_can_be_given_by_keyword",
    "every_documented_argument_is_in_every_group",
    "every_documented_argument_is_in_the_defaults",
    "follows_cyclic_lr",
    "follows_one_cycle",
    "foreach_and_differentiable_exclude_each_other",
    "foreach_and_fused_exclude_each_other",
    "foreach_takes_no_tensor_betas",
    "foreach_takes_no_tensor_learning_rate",
    "foreach_takes_no_tensor_learning_rate_later",
    "fused_and_differentiable_exclude_each_other",
    "groups_hold_what_was_given",
    "has_no_names_where_none_were_given",
    "keeps_the_names",
    "maximize_mirrors_minimize",
    "maximize_with_every_engine",
    "named_parameters_make_one_group",
    "names_in_a_checkpoint_win",
    "old_checkpoints_lack_newer_options",
    "rates_of_groups_are_their_own",
    "refuses_a_bare_tensor",
    "refuses_a_parameter_in_two_groups",
    "refuses_a_result_of_a_computation",
    "refuses_a_set",
    "refuses_some_with_names_and_some_without",
    "refuses_what_is_no_tensor",
    "shows_its_groups",
    "sparse_gradients_are_refused",
    "state_has_adams_names",
    "state_replaced_by_hand_is_used",
    "steps_are_zero_dim_float32_tensors",
    "takes_a_generator_of_parameters",
    "takes_a_group_of_one_tensor",
    "takes_a_group_with_a_generator",
    "takes_a_list_of_parameters",
    "takes_group_dicts",
    "takes_group_dicts_of_named_parameters",
    "tensor_betas_changed_in_place_are_followed",
    "tensor_betas_may_have_one_element",
    "thawing_a_parameter_is_enough",
    "warns_of_a_parameter_listed_twice",
    "what_a_hook_after_loading_sees_is_final",
}


def test_what_the_published_package_breaks() -> None:
    subject, broken = published(), set()
    asked = [check for check in CHECKS.values() if check.applies is not ours and check.applies(subject)]
    for check in asked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check.run(subject)
            except (Exception, pytest.fail.Exception):
                broken.add(check.name)
    assert broken == BROKEN
    assert (len(broken), len(asked)) == (82, 186)
