"""Files for OpenVINO and for QNN in their own runtimes: no kernel is more than one step off, at the stated rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter import export
from tests.support.architectures import construct
from tests.support.elsewhere import available
from tests.support.networks import NETWORKS, build

pytestmark = pytest.mark.runtimes

CASES = [
    *(("openvino", "openvino", name) for name in ("pooled", "vit", "mobilenetv3", "slices", "unet", "detector")),
    *(("ort-qnn", "qnn", name) for name in ("residual", "pooled", "transformer", "mobilenetv3", "shufflenet")),
    *(("ort-qnn", "qnn", name) for name in ("convnext", "vit", "gpt", "detector", "unet", "elementwise")),
]


@pytest.mark.parametrize(("target", "runtime", "network"), CASES, ids=[f"{a}-{c}" for a, _, c in CASES])
def test_no_kernel_is_more_than_one_step_off(target: str, runtime: str, network: str, tmp_path: Path) -> None:
    available(runtime)
    model, inputs = (*build(network, batch=8),) if network in NETWORKS else construct(network, 8)
    data = [inputs if isinstance(inputs, tuple) else (inputs,)]
    report = export(model, data, target=target, method="minmax", latency_runs=0, out=tmp_path / "out")
    assert report["verdict"] == "pass"
    found = next(each for each in report["proved_on"] if each["runtime"] == runtime)
    assert found["violations"] == 0 and found["kernel_values"] > 0
    assert found["kernel_mismatched"] <= 0.03 * found["kernel_values"]
    assert all(site["max_lsb"] <= 1 for site in found["worst"])
