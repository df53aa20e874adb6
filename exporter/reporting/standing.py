"""The meaning of a passed verdict for accuracy: "exact" alone is no claim that the model is still good.

Must not know: gates, pages, how accuracy is measured.
"""

from __future__ import annotations

from typing import Final, Literal

from calibrators.errors import counted
from calibrators.intervals import share_interval
from runtime_tests.measure.accuracy import Accuracy

__all__ = ["Standing", "remark", "standing"]

Standing = Literal["gated", "uncertain", "ungated", "unmeasured"]
"""gated: gates judged it; uncertain: they did, on few samples; ungated: no gate did; unmeasured: no evaluation data."""

WIDEST: Final = 0.1
"""Width of a 95 % interval of a share from which on it says little: gates pass whatever lies within. 54 labelled
samples, or 35 decisions, that all agree have a narrower one."""


def standing(accuracy: Accuracy | None, *, gated: bool) -> Standing:
    """Return what is known about accuracy; gated: whether a gate is on it."""
    if accuracy is None:
        return "unmeasured"
    if not gated:
        return "ungated"
    ends = accuracy.drop_ci
    if ends is None and accuracy.agreement is not None:
        ends = share_interval(accuracy.agreement, accuracy.samples)
    return "gated" if ends is None or ends[1] - ends[0] <= WIDEST else "uncertain"


def remark(found: Standing | None, accuracy: Accuracy | None, *, claimed: bool = False) -> str:
    """Return what stands beside a pass, empty where gates judged the accuracy.

    claimed: whether the accuracy was measured elsewhere.
    """
    samples = 0 if accuracy is None else accuracy.samples
    return {
        "unmeasured": "exact; accuracy not measured",
        "ungated": "exact; accuracy not gated",
        "uncertain": f"exact; accuracy measured on {counted(samples, 'sample')} only",
        "gated": "accuracy as the exporter states it" if claimed and accuracy is not None else "",
    }[found or "gated"]
