"""Sentences on the runtimes in which a file was proved, which the terminal, the page and the test cases share.

Must not know: pages, files, how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calibrators.errors import counted
from exporter.reporting.number_format import differ, significant
from runtime_tests.parity.results import ProvedOn

__all__ = ["OPENVINO_DIFFERS", "UNOPTIMIZED_DIFFERS", "UNPROVED", "found_on", "not_proved", "proof_rows"]

UNPROVED = "unproved_runtimes"
"""Name of the metric that counts the runtimes in which the file is not proved."""

UNOPTIMIZED_DIFFERS = (
    "without optimizations onnxruntime computes in float32, whose sums fall on the other side of a rare tie between "
    "two codes; later values inherit that. Deployed files run optimized, so nothing here is gated"
)
OPENVINO_DIFFERS = (
    "OpenVINO's own kernels round ties between two codes otherwise; single steps are allowed, at the rate that its "
    "kernels are known for, and more fails the gate parity.openvino.violations"
)
"""Why codes may differ there, said where the differences are shown."""

SHOWN_AS_PARITY = ("ort", "openvino")
"""Runtimes with lines of their own, because the report holds their comparison site by site."""


def proof_rows(entries: Sequence[ProvedOn]) -> Iterator[tuple[str, str]]:
    """Yield lines on the runtimes in which the file ran: title and text.

    The first names those in which it is proved. One line for each further runtime says what was found.
    """
    proved = [_name(each) for each in entries if each.is_proved]
    if proved:
        yield "proved on", ", ".join(proved)
    for each in entries:
        if each.runtime not in SHOWN_AS_PARITY:
            yield each.runtime, found_on(each)


def not_proved(entries: Sequence[ProvedOn]) -> str | None:
    """Return in which runtimes the file is not proved, and what was found there; None if it is proved in all."""
    found = []
    for each in entries:
        if not each.is_proved:
            first = f"; most at {each.worst[0].site}" if each.worst else ""
            found.append(f"not proved in {each.runtime}: {found_on(each)}{first}")
    return "; ".join(found) or None


def found_on(entry: ProvedOn) -> str:
    """Return what was found in a runtime: codes compared and differing, and the outputs."""
    if entry.refused is not None:
        return entry.refused
    text = f"{differ(entry)} integers of {counted(entry.samples, 'sample')} differ"
    if entry.mismatched:
        text += f" end to end; kernel by kernel {entry.kernel_mismatched:,}"
        if entry.float_values:
            text += f", and {entry.float_mismatched:,} after float operators"
    if entry.outputs_identical:
        return f"{text}; outputs identical"
    return f"{text}; outputs differ by up to {significant(entry.largest_difference, 3, missing='infinity')}"


def _name(entry: ProvedOn) -> str:
    return f"{entry.runtime.removesuffix(f'=={entry.version}')} {entry.version} ({entry.processor})"
