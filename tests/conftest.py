"""Fixtures of every test: one torch thread and a seeded generator."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Workers run side by side: more threads than cores only make them wait for each other."""
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
            r"/test_cuda_graphs\.py::test_methods_on_a_device\[(?!qdrop)",  # every method on the pretend device
            r"/test_zoo\.py",  # trained networks
            r"/test_openvino\.py::test_every_kernel\w+\[(?!residual-8|gpt-8|pooled-3)",  # the grid of OpenVINO
            r"/test_architectures\.py::test_runtime_computes_the_reference\["
            r"(?!densenet|unet|mobilenetv3|pools|gpt|swin|slices|shufflenet-4)",
            r"/test_reconstruct\.py::test_training_improves_on_nearest_rounding\[(?!mlp|residual-qdrop|residual-brecq\])",
            r"/test_reconstruct\.py::test_every_method_is_proved_in_the_runtime\[(?!qdrop|pdquant\])",
            r"/test_packing\.py::test_every_storage_is_the_same_network\[(?!.*-[24]-bit-channel)",
            r"/test_packing\.py::test_openvino_reads_four_bits_and_not_two\[(?!conv-|linear-)",
            r"/test_wide_activations\.py::test_the_runtime_computes_the_reference\[.*(-unoptimized|moves-(left|cut|\*)|(head|left|layers\.2)-opt)",
            r"/test_identity_taps\.py::test_(the_runtime_computes_it|packed_codes)\w*\[mobileone",
            r"/test_lapq\.py::test_four_bits_are_better_than_every_range_compared\[(?!cobyqa)",
            r"/test_blocks\.py::test_published_partitions\[re(snet50|gnet)",
            r"/test_grouping\.py::test_capacity_ratios_find_the_published_boundaries",
            r"/test_low_bits\.py::test_integers_are_those_of_the_reference\[(pooled-[28]|transformer-2|residual-[47]|mlp-[78])",
            r"/test_weight_only\.py::test_the_runtime_computes_the_reference\[.*(-128-|8-block-32|6-channel|8-tensor|3-block)",
            r"/test_pipeline\.py::test_runtime_computes_the_reference\[(?!transformer-w8a8|pooled-w4a4)",
            r"/test_build_model\.py::test_file_computes_the_program\[(?!transformer-w8a8|residual-w4a4)",
            r"/test_cli_export\.py::test_an_interrupt_half_way_leaves_nothing\[15",
            r"/test_html\.py::test_a_missing_block_is_not_drawn\[(?!rules|layers|environment)",
            r"/test_html\.py::test_degenerate_searches_are_drawn\[(?!flat|nothing finite)",
            r"/test_html\.py::test_degenerate_layers_are_drawn\[(?!.*(nan|: \[\]))",
            r"/test_html\.py::test_degenerate_units_are_drawn\[(?!.*inf)",
            r"/test_bundle\.py::test_a_stop_half_way_leaves_nothing\[(?!new-full-disk|overwrite-ctrl-c)",
            r"/test_bundle\.py::test_every_changed_file_is_named\[(?!longer)",
            r"/test_reconstruct\.py::test_eight_bits_lose_nothing_against_nearest_rounding\[(?!qdrop|brecq\])",
            r"/test_reconstruct\.py::test_units_never_get_worse_and_say_so\[(?!qdrop|mrecg|repapq\])",
            r"/test_identity_taps\.py::test_(the_runtime_computes_it|packed_codes)\w*\[repvgg-(W3A3|first|per-tensor\])",
            r"/test_lapq\.py::test_the_runtime_computes_the_result\[residual",
            r"/test_gptq\.py::test_no_layer_is_worse_than_with_nearest_rounding\[(unet|densenet|residual|two-inputs)",
        )
    )
)
"""Combinations that are marked slow: of every grid, `make test` runs some members and `make test-all` all of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker("slow")
