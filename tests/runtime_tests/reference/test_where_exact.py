"""Where a file is exact follows from its constants: pairs of weights, the order of steps, operators in float."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.grid.processors import PROCESSORS
from calibrators.targets import get_target
from exporter.emission.build_model import to_onnx
from exporter.frontend.capture import capture
from runtime_tests.ort.saturation import Cpu, saturation
from runtime_tests.reference.execute import plan
from runtime_tests.reference.where_exact import REFERENCE, Holds, exact_on, holds_on, with_proofs
from tests.runtime_tests.reference.programs import Program, file_of

ORT_CPU = get_target("ort-cpu")


class Net(nn.Module):
    """Two convolutions and a linear layer, with a sum or a float operator between them if wanted."""

    def __init__(self, *, adds: bool = False, floats: bool = False) -> None:
        super().__init__()
        self.adds, self.floats = adds, floats
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        y = x + y if self.adds else y
        y = torch.erf(y) if self.floats else y
        out: Tensor = self.head(torch.nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))
        return out


def derived(target: str = "ort-cpu", **changes: bool) -> dict[str, Holds]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    result = calibrate(capture(Net(**changes).eval(), x), [x], method="minmax", target=target)
    model = ir.to_proto(to_onnx(result.program, opset=20))
    return {each.processor: each for each in holds_on(plan(result.program), saturation(model), ORT_CPU)}


def test_without_saturation_and_sums_a_file_is_exact_everywhere() -> None:
    found = derived()
    assert {each.status for each in found.values()} == {"follows"}
    assert found.keys() == PROCESSORS.keys() == set(exact_on(found.values()))
    assert "no pair of weights saturates in any of 3 layers" in found["x86-avx2"].condition
    assert not any("float" in each.condition for each in found.values())


def test_pairs_that_saturate_differ_without_vnni_alone() -> None:
    found = derived("ort-cpu-vnni")
    assert [name for name, each in found.items() if each.status == "differs"] == ["x86-avx2"]
    assert "pairs of weights can saturate in" in found["x86-avx2"].condition
    assert {each.status for name, each in found.items() if name != "x86-avx2"} == {"follows"}


def test_float_operators_are_left_out_of_what_follows() -> None:
    found = derived(floats=True)
    assert {each.status for each in found.values()} == {"follows"}
    assert all("values after float operators may differ" in each.condition for each in found.values())


def test_a_settled_sum_is_exact_everywhere() -> None:
    assert {each.status for each in derived(adds=True).values()} == {"follows"}


def test_ties_of_a_sum_differ_where_its_steps_have_another_order() -> None:
    """a + b / 2 lies on a tie for every odd b, which ARM rounds away from zero and x86 to the even code."""
    p = Program()
    a, b = (p.quantized(p.input(2, 4), scale=scale) for scale in (0.5, 0.25))
    program = p.build(p.quantized(p.call(torch.ops.aten.add.Tensor, a, b), scale=0.5))
    model = file_of(program)
    found = {each.processor: each for each in holds_on(plan(program), saturation(model), ORT_CPU)}
    assert found["x86-avx2"].status == "follows"
    assert found["arm64"].status == "differs"
    assert "ties round otherwise in 1 kernel, first for" in found["arm64"].condition


def test_nothing_follows_for_a_runtime_whose_arithmetic_is_not_known() -> None:
    p = Program()
    program = p.build(p.quantized(p.input(2, 4)))
    entries = holds_on(plan(program), saturation(file_of(program)), replace(ORT_CPU, runtime="other"))
    assert {each.status for each in entries} == {"unknown"}
    assert exact_on(entries) == ()


def test_a_proof_settles_what_is_unknown_but_not_what_differs() -> None:
    entries = (
        Holds("arm64", "unknown", "ties"),
        Holds("x86-avx2", "differs", "pairs"),
        Holds(REFERENCE, "follows", "r"),
    )
    proofs = dict.fromkeys(("arm64", "x86-avx2"), "onnxruntime 1.32")
    assert with_proofs(entries, proofs, {}) == (Holds("arm64", "proved", "in onnxruntime 1.32"), *entries[1:])
    assert with_proofs(entries, {}, {}) == entries
    refuted = with_proofs(entries, {}, {REFERENCE: "ort 1.19.2"})[2]
    assert refuted == Holds(REFERENCE, "differs", "codes or outputs differed in ort 1.19.2")


@pytest.mark.parametrize(
    ("arch", "flags", "family"),
    [
        ("X86_64", ("avx2", "avx512_vnni"), "x86-vnni"),
        ("X86_64", ("avx2", "avx_vnni"), "x86-vnni"),
        ("X86_64", ("avx2", "fma"), "x86-avx2"),
        ("X86_64", ("sse4_2",), "x86-sse"),
        ("ARM_8", ("asimd",), "arm64"),
        ("X86_64", (), None),
        ("RISCV_64", (), None),
    ],
)
def test_family_of_a_processor(arch: str, flags: tuple[str, ...], family: str | None) -> None:
    cpu = Cpu(arch, "", flags)
    assert cpu.family == family
    assert cpu.saturates == (family == "x86-avx2")
