"""Post-training quantisation of an exported detector: convolutions in int8, everything else in float."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lib.onnx_file import require

if TYPE_CHECKING:
    from onnx import ModelProto


class _Calibration:
    """Batches of images as onnxruntime's calibration asks for them (its CalibrationDataReader)."""

    def __init__(self, batches: Iterable[Tensor]):
        self.batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def quantize(model: ModelProto, batches: Iterable[Tensor]) -> ModelProto:
    """`model` with quantised convolutions (QDQ): weights per channel, activations in the ranges seen on `batches`.

    Batches (B, 3, S, S) uint8 are unaugmented training images. Scores, decoding and NMS have no convolution, so they
    stay in float (Jacob et al., CVPR 2018, for the scheme).
    """
    onnx, quantization = require("onnx", "onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)  # a model in memory would be changed
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)  # advice to run a preparation that fuses what is fused here already
        try:
            quantization.quantize_static(
                source,
                target,
                _Calibration(batches),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                per_channel=True,
            )
        finally:
            logging.disable(previous)
        quantized = onnx.load(target)
    onnx.helper.set_model_props(quantized, {entry.key: entry.value for entry in model.metadata_props})
    return quantized
