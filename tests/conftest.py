"""Fixtures of every test: the allocator as in an export, one torch thread and a seeded generator."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from calibrators.allocator import keep_freed_memory


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Workers run side by side: more threads than cores only make them wait for each other."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


SLOW = re.compile(
    "|".join(
        (
            r"/test_cuda_graphs\.py::test_methods_on_a_device\[(?!gptq)",  # every method on the pretend device
            r"/test_several_targets\.py::test_files_are\w+\[(?!openvino)",
            r"/test_shared\.py::test_methods_read\w+\[(?!mse|gptq)",
            r"/test_resume\.py::test_(ten_kills|interrupted_runs_give_the_same_bits\[(?!qdrop))",
            r"/test_zoo\.py",  # trained networks
            r"/test_ranks\.py::test_integers_are_the_same_for_any_number_of_processes\[(?!gptq\]|minmax)",
            r"/test_proof\.py::test_counts_of_processes_add_up_to_those_of_one\[un",
            r"/test_processes\.py::test_(?!a_shared_export\w*\[gptq-2)",
            r"/test_raw_ends\.py::test_bytes_are_the_codes\w+\[nchw",
            r"/test_second\.py::test_every_kernel\w+\[(?!residual-8|gpt-8|pooled-3)",  # the grid of OpenVINO
            r"/test_architectures\.py::test_\w+\[(?!gpt|slices|lstm|mobilenetv3)",
            r"/test_reconstruct\.py::test_training_improves_on_nearest_rounding\[(?!mlp|residual-qdrop|residual-brecq\])",
            r"/test_reconstruct\.py::test_every_method_is_proved_in_the_runtime\[(?!qdrop|pdquant\])",
            r"/test_packing\.py::test_every_storage_is_the_same_network\[(?!.*-[24]-bit-channel)",
            r"/test_packing\.py::test_openvino_reads_four_bits_and_not_two\[(?!conv-|linear-)",
            r"/test_wide_activations\.py::test_the_runtime_computes_the_reference\[.*(-unoptimized|moves-(left|cut|\*)|(head|left|layers\.2)-opt)",
            r"/test_identity_taps\.py::test_(the_runtime_computes_it|packed_codes)\w*\[mobileone",
            r"/test_lapq\.py::test_four_bits_are_better_than_every_range_compared\[(?!cobyqa-per-channel)",
            r"/test_blocks\.py::test_published_partitions\[re(snet50|gnet)",
            r"/test_grouping\.py::test_capacity_ratios_find_the_published_boundaries",
            r"/test_low_bits\.py::test_integers_are_those_of_the_reference\[(pooled-[28]|transformer-2|residual-[47]|mlp-[78])",
            r"/test_weight_only\.py::test_the_runtime_computes_the_reference\[.*(-128-|8-block-32|6-channel|8-tensor|3-block)",
            r"/test_pipeline\.py::test_runtime_computes_the_reference\[(?!transformer-w8a8|residual-w4a4)",
            r"/test_build_model\.py::test_file_computes_the_program\[(?!transformer-w8a8|residual-w4a4)",
            r"/test_cli_export\.py::test_an_interrupt_half_way_leaves_nothing\[15",
            r"/test_html\.py::test_a_missing_block_is_not_drawn\[(?!rules|layers|environment)",
            r"/test_html\.py::test_page_is_well_formed_small_and_offline\[300",
            r"/test_html\.py::test_degenerate_searches_are_drawn\[(?!flat|nothing finite)",
            r"/test_html\.py::test_degenerate_layers_are_drawn\[(?!.*(nan|: \[\]))",
            r"/test_html\.py::test_degenerate_units_are_drawn\[(?!.*inf)",
            r"/test_bundle\.py::test_a_stop_half_way_leaves_nothing\[(?!new-full-disk|overwrite-ctrl-c)",
            r"/test_bundle\.py::test_every_changed_file_is_named\[(?!longer)",
            r"/test_reconstruct\.py::test_eight_bits_lose_nothing_against_nearest_rounding\[(?!qdrop|brecq\])",
            r"/test_reconstruct\.py::test_units_never_get_worse_and_say_so\[(?!qdrop)",
            r"/test_identity_taps\.py::test_(the_runtime_computes_it|packed_codes)\w*\[repvgg-(W3A3|first|per-tensor\])",
            r"/test_lapq\.py::test_the_runtime_computes_the_result\[pooled",
            r"/test_gptq\.py::test_no_layer_is_worse_than_with_nearest_rounding\[(unet|densenet|residual|two-inputs)",
            r"/test_limits\.py::test_an_export_holds_without_vnni\[(?!transformer-gptq)",
            r"/test_gptq\.py::test_layers_of_which_weights_only_are_quantized\[(?!per-block)",
            r"/test_gptq\.py::test_(layers_come_closer|the_float_target_comes|batches_may_be|eight_bits_lose)\w*\[(?!pooled)",
            r"/test_gptq\.py::test_no_layer_is_worse_than_with_nearest_rounding\[transformer",
            r"/test_wide_activations\.py::test_the_runtime_computes_the_reference\[(transformer-proj|moves-padded|pooled-last)",
            r"/test_wide_activations\.py::test_(only_wide_activations_raise_the_opset\[narrow|methods_that_train_take_it)",
            r"/test_cli_export\.py::test_(a_package_beside_the_user|a_disk_that_fills_at_the_bundle|rules_for_layers_are_kept)",
            r"/test_second\.py::test_(a_second_runtime_changes|where_openvino|a_violation)",
            r"/test_second\.py::test_every_kernel\w+\[(residual-8|pooled-3)",
            r"benchmarks/test_accuracy\.py::test_(?!a_table|without_eval)",
            r"/test_downstream\.py::test_(absolute_errors|gains_are_absorbed_into_scales\[per-channel|stages_of_resnet18)",
            r"/test_downstream\.py::test_the_prediction_is_kept_better_than_by_the_units_error_alone",
            r"/test_downstream\.py::test_(predictions_of_any_kind|the_float_way_ahead)\w*\[(unet|densenet|two-inputs|transformer)",
            r"/test_low_bits\.py::test_integers_are_those_of_the_reference\[(transformer-4|residual-2|pooled-4)",
            r"/test_low_bits\.py::test_codes_of_a_method\[transformer",
            r"/test_low_bits\.py::test_other_grids\[reduce-range-7-bit",
            r"/test_mixed\.py::test_readings_are_those_of_the_program\[(pooled|transformer)",
            r"/test_mixed\.py::test_mean_bits_are_kept_and_better_than_uniform_ones\[(transformer|residual-2)",
            r"/test_reconstruct\.py::test_where_activations_are_cached_changes_nothing\[4\.0",
            r"/test_gptq\.py::test_no_layer_is_worse_than_with_nearest_rounding\[pooled",
            r"/test_reconstruct\.py::test_streamed_activations_equal_a_full_run_from_the_input\[transformer",
            r"/test_reconstruct\.py::test_training_improves_on_nearest_rounding\[.*(l-brecq|squares|pdquant all)",
            r"/test_reconstruct\.py::test_every_method_is_proved_in_the_runtime\[pdquant",
            r"/test_reconstruct\.py::test_eight_bits_lose_nothing_against_nearest_rounding\[brecq",
            r"/test_weight_only\.py::test_the_runtime_computes_the_reference\[(4-block-32|8-block-16|4-tensor)",
            r"/test_weight_only\.py::test_all_linear_layers_of_networks\[(pooled|residual)",
            r"/test_weight_only\.py::test_an_independent_reader_finds_the_same_weights\[block-(32|128)",
            r"/test_weight_only\.py::test_(openvino_computes_it_too|level_0\w*)\[8-bit",
            r"/test_build_model\.py::test_stored_integers_are_the_calibrated_ones\[(pooled|mlp)",
            r"/test_blocks\.py::test_(order_of_branches|merged_neighbours|chained_blocks)\w*\[(?!slices|pools|residual|detector)",
            r"/test_pipeline\.py::test_verify_knows_outputs_by_their_names\[(one|odd)",
            r"/test_gptq\.py::test_the_float_target_comes_closer_still",
            r"/test_gptq\.py::test_options\[(?!.*(act_order|output_target))",
            r"/test_html\.py::test_(page_is_well_formed\w*\[(?!60)|degenerate_allocations_are_drawn\[(?!no front))",
            r"/test_unusual_models\.py::test_a_fixed_batch\[lapq-5",
            r"/test_identity_taps\.py::test_methods_keep_the_others_to_their_bits_and_the_taps_to_theirs\[lapq-tensor",
            r"/test_equalize\.py::test_the_runtime_computes_it_in_integers\[tensor",
            r"/test_packing\.py::test_every_storage_is_the_same_network\[.*(tokens-2|depthwise|conv1d-2)",
            r"/test_accuracy\.py::test_without_evaluation_data",
            r"/test_simulation\.py::test_chained_blocks_are_the_program\[(?!gpt|slices|pools|mobilenetv3|transformer|residual)",
            r"/test_unusual_models\.py::test_a_fixed_batch\[(?!gptq|lapq|qdrop|mse).*-5",
            r"/test_unusual_models\.py::test_outputs_of_every_kind\[(?!siamese).*-lapq",
            r"/test_canonical\.py::test_average_pools_of_every_kind_are_plain_ones\[(sequence|ceiling-cut|resnet-d-odd)",
            r"/test_identity_taps\.py::test_wide_taps_are_worth_more_than_a_bit\[(?!.*-[36])",
            r"/test_identity_taps\.py::test_packing_says_what_it_takes",
            r"/test_html\.py::test_(degenerate_layers_are_drawn\[.*histogram|a_missing_block_is_not_drawn\[(layers|environment))",
            r"/test_weight_only\.py::test_among_integer_kernels\[(before|behind)",
            r"/test_weight_only\.py::test_(all_linear_layers_of_networks\[mlp|level_0\w*\[4-bit-64|storage\w*\[[45])",
            r"/test_weight_only\.py::test_the_runtime_computes_the_reference\[.*4-channel-no-bias",
            r"/test_blocks\.py::test_published_partitions\[resnet18-folded",
            r"/test_golden\.py::test_the_tolerance_is_the_same_each_time",
            r"/test_golden\.py::test_integers_are_bit_identical\[(residual|mlp)",
            r"/test_reconstruct\.py::test_training_improves_on_nearest_rounding\[mlp-(brecq|pdquant|mrecg)",
            r"/test_grouping\.py::test_(the_method_trains_joined_units\[.*options[23]|boundaries_are_where)",
            r"/test_cli_export\.py::test_preparations_are_done_and_told",
            r"/test_freeze\.py::test_codes_(stay_inside_their_grid|of_a_method_are_kept)\[[36]",
            r"/test_equalize\.py::test_any_network_is_prepared\[(transformer|pooled)",
            r"/test_packing\.py::test_(the_opset_is_the_first|alternatives_differ|codes_beyond_the_width)",
            r"/test_packing\.py::test_openvino_reads_four_bits_and_not_two\[conv",
            r"/test_training\.py::test_(sensitivity_alone|wide_taps_are_told|a_search_keeps)",
            r"/test_mixed\.py::test_(methods_that_train_start|bit_operations_open)",
            r"/test_blocks\.py::test_published_partitions\[mobilenetv2-folded",
            r"/test_identity_taps\.py::test_(packed_codes|the_runtime_computes)\w*\[repvgg-per-tensor-reduced",
            r"/test_capture\.py::test_core_operators_are_those_that_modules_call\[(?!pooled)",
            r"/test_html\.py::test_(units_that_were_joined|names_are_escaped_everywhere\[(?!\$))",
            r"/test_spellings\.py::test_spelling_does_not_matter\[(?!products)",
            r"/test_new_target\.py::test_files_are_exact_where_their_target_says\[(?!ort-cpu-vnni)",
            r"/test_proofs\.py::test_(openvino_is_a_runtime|a_runtime_that_refuses|a_process_that_ends)",
            r"/test_compare\.py::test_integer_networks_agree_in_every_code_and_bit\[(mobile|gated)",
            r"/test_simplifier\.py::test_the_stage_prints_nothing",
            r"/test_low_bits\.py::test_layers_of_different_grids\[(?!residual)",
            r"/test_build_model\.py::test_reference_program_with_two_inputs",
            r"/test_reconstruct\.py::test_every_kind_of_network_is_proved_in_the_runtime\[(?!transformer)",
            r"/test_lapq\.py::test_eight_bits_lose_nothing\[(?!residual)",
            r"/test_network_loss\.py::test_loss_is_that_of_the_program_at_every_point\[(?!residual)",
            r"/test_cuda_graphs\.py::test_methods_on_a_device\[",
            r"/test_demo\.py::test_training_is_deterministic_and_learns",
            r"/test_grouping\.py::test_(capacities_of_resnet18|the_curve_before|the_first_member_of_a_group)",
            r"/test_blocks\.py::test_published_partitions\[",
            r"/test_lapq\.py::test_(four_bits|eight_bits|the_smallest_budget|cross_entropy_with_labels|time_limit)",
            r"/test_reconstruct\.py::test_(where_activations_are_cached|training_improves\w*\[(?!mlp-qdrop))",
            r"/test_identity_taps\.py::test_methods_keep_the_others\w*\[(?!gptq-channel|mse-tensor|qdrop-channel)",
            r"/test_identity_taps\.py::test_wide_taps_are_worth_more_than_a_bit\[(?!repvgg-3)",
            r"/test_unusual_models\.py::test_outputs_of_every_kind\[(?!.*-gptq|siamese-lapq)",
            r"/test_unusual_models\.py::test_a_fixed_batch\[(?!gptq|mse-5|qdrop-1)",
            r"/test_unusual_models\.py::test_their_sensitivities\[(?!twice|with-table)",
            r"/test_fold_regions\.py::test_block_becomes_one_convolution\[diverse-branches",
            r"/test_bn_statistics\.py::test_several_norms\w*\[diverse-branches",
            r"/test_place\.py::test_weight_grid\[[2-7]-(reduce-range-per-tensor|full-range-per-channel)",
            r"/test_canonical\.py::test_average_pools_of_every_kind_are_plain_ones\[(divisor|ceiling-uncounted)",
            r"/test_packing\.py::test_(the_bytes_are_packed\[(int8|int2)|every_storage\w*\[(grouped|linear-2|conv-2))",
            r"/test_downstream\.py::test_gains_are_absorbed_into_scales",
            r"/test_build_model\.py::test_same_input_same_bytes",
            r"/test_gptq\.py::test_(large_depthwise|every_kind_of_layer\[(point|patches|strided|dilated|conv1d))",
            r"/test_weight_only\.py::test_methods_that_train_take_it",
            r"/test_pipeline\.py::test_(verify_notices_a_changed_weight|excluded_layer_stays_in_float)",
            r"/test_second\.py::test_export_and_verify",
            r"/test_proofs\.py::test_an_export_and_its_bundle",
            r"/test_reconstruct\.py::test_rounding_is_decided_at_the_end",
            r"/test_limits\.py::test_the_target_with_vnni_limits_nothing",
            r"/test_(mixed|lapq)\.py::test_same_seed",
            r"/test_training\.py::test_memory_changes_where_activations_lie",
            r"/test_choices\.py::test_suppression_by_hand_is_proved\[8",
            r"/test_recurrences\.py::test_the_file_computes_any_length\[(?!tanh|lstm)",
            r"/test_random_networks\.py::test_a_random_network_is_exported\[(?!(7|31|34)\])",
            r"/test_integer_forms\.py::test_(every_node\w+\[(?!hard-swish|transposed)|methods_see)",
            r"/test_network_loss\.py::test_(little_memory_changes|what_is_left_out)",
            r"/test_spellings\.py::test_few_spellings_are_left",
            r"/test_limits\.py::test_an_export_holds_without_vnni",
            r"/test_gptq\.py::test_(layers_come_closer|a_network_that_takes_one_sample|options\[.*output_target)",
            r"/test_downstream\.py::test_(methods_compose_with_grouping|in_a_stage_of_one_unit)",
            r"/test_downstream\.py::test_the_float_way_ahead\w*\[pooled",
            r"/test_proofs\.py::test_(proving_changes_no_byte|a_kernel_that_writes_floats)",
            r"/test_blocks\.py::test_dense_block_is_divided",
            r"/test_unusual_models\.py::test_(outputs_of_every_kind\[siamese-lapq|batches_that_do_not_fit\[qdrop)",
            r"/test_simulation\.py::test_chained_blocks_are_the_program\[(slices|pools)",
            r"/test_mixed\.py::test_mean_bits_are_kept\w*\[(pooled-3|residual-6)",
            r"/test_mixed\.py::test_(layers_of_which\w*\[bops|what_cannot_be_met\w*\[budgets[02])",
            r"/test_pipeline\.py::test_(an_excluded_transposed|fixed_batches_are_never_cut|weights_that_stay_int8)",
            r"/test_reconstruct\.py::test_(eight_bits_lose|units_never_get_worse|streamed_activations\w*\[pooled)",
            r"/test_wide_activations\.py::test_it_is_the_escape",
            r"/test_grouping\.py::test_the_method_trains_joined_units\[mrecg",
        )
    )
)
"""Combinations that are marked slow: of every grid, `make test` runs some members and `make test-all` all of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker("slow")
