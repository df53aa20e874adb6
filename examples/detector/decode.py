"""Run a bundle's model in onnxruntime and decode its outputs to boxes: python decode.py out/detector/model.onnx"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[np.float32]
STRIDES = (8, 16)


def decode(outputs: dict[str, Array], stride: int) -> tuple[Array, Array]:
    """Return boxes [cells, 4] (left, top, right, bottom) and scores [cells, classes] of the first image."""
    scores = outputs[f"scores_{stride}"][0] * outputs[f"centreness_{stride}"][0]  # [classes, height, width]
    distances = outputs[f"boxes_{stride}"][0] * stride  # [4, height, width]
    rows, columns = np.indices(distances.shape[1:], np.float32)
    x, y = (columns + 0.5) * stride, (rows + 0.5) * stride
    left, top, right, bottom = distances
    boxes = np.stack([x - left, y - top, x + right, y + bottom], -1)
    return boxes.reshape(-1, 4), scores.reshape(len(scores), -1).T


def main() -> None:
    """Print the best box of a random image."""
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {session.get_inputs()[0].name: image}), strict=True))
    decoded = [decode(outputs, stride) for stride in STRIDES]
    boxes, scores = (np.concatenate(parts) for parts in zip(*decoded, strict=True))
    best = int(scores.max(1).argmax())
    print(
        f"{len(boxes)} boxes; class {scores[best].argmax()} at {boxes[best].round(1)}, score {scores[best].max():.2f}"
    )


if __name__ == "__main__":
    main()
