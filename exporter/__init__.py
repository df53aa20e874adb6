"""Turn a trained PyTorch model into a verified QDQ ONNX file.

    graph = fold(capture(model, example))                  # torch in
    emit(calibrate(graph, batches), "model.onnx")          # ONNX out
    export(model, batches, out="build/")                   # all of it, with the bundle

The public names are imported on first use, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from exporter.dry_run import dry_run as dry_run
    from exporter.emission.build_model import emit as emit
    from exporter.folding.fold_regions import fold as fold
    from exporter.frontend.capture import capture as capture
    from exporter.pipeline import export as export
    from exporter.several import export_for as export_for
    from exporter.sweeping.run import sweep as sweep
    from exporter.verify import verify as verify

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "about": ["__version__"],
        "dry_run": ["dry_run"],
        "emission.build_model": ["emit"],
        "folding.fold_regions": ["fold"],
        "frontend.capture": ["capture"],
        "pipeline": ["export"],
        "several": ["export_for"],
        "sweeping.run": ["sweep"],
        "verify": ["verify"],
    },
)
