"""What every test shares: one torch thread and a seeded generator."""

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
            r"/test_packing\.py::test_every_storage_is_the_same_network\[(?!.*-channel)",
            r"/test_packing\.py::test_openvino_reads_four_bits_and_not_two\[(?!conv-|linear-)",
            r"/test_wide_activations\.py::test_the_runtime_computes_the_reference\[.*(-unoptimized|moves-(left|cut|\*))",
            r"/test_identity_taps\.py::test_(the_runtime_computes_it|packed_codes)\w*\[mobileone",
            r"/test_lapq\.py::test_four_bits_are_better_than_every_range_compared\[(?!cobyqa)",
            r"/test_blocks\.py::test_published_partitions\[re(snet50|gnet)",
            r"/test_grouping\.py::test_capacity_ratios_find_the_published_boundaries",
            r"/test_low_bits\.py::test_integers_are_those_of_the_reference\[(pooled-[28]|transformer-2|residual-4)",
            r"/test_weight_only\.py::test_the_runtime_computes_the_reference\[.*(-128-|8-block-32|6-channel)",
        )
    )
)
"""Combinations that are marked slow: of every grid, `make test` runs some members and `make test-all` all of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker("slow")
