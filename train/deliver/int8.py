"""int8 students through torchao's pt2e flow: where values are quantized, with which ranges, and the ONNX file.

Activations are unsigned 8-bit per tensor, weights signed 7-bit ("reduced range") per output channel: without
VNNI instructions, x86 adds pairs of 8-bit products in 16 bits, and full-range weights can overflow there.
ONNX Runtime fuses a convolution to int8 only when its input and its output are quantized, so the placement is
that of torchao's XNNPACK quantizer (both are), not of its x86 one (inputs only: measured slower than float).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from train.deliver.export import OPSET, add_card, exporting, quiet
from train.deliver.model import ModelCard, OnnxModel
from train.deliver.packages import require_torchao
from train.errors import DeliveryError
from train.students.base import Student

WEIGHT_LIMITS = (-64, 63)
SMALLEST_SCALE = 2.0**-12
HIGHEST = 255
Ranges = dict[str, tuple[float, float]]


def prepare_int8(module: nn.Module, example: torch.Tensor, *, training: bool) -> nn.Module:
    """The module as a graph with observers (or, for `training`, fake quantization) where int8 values will be.

    The module itself is changed (`plain_upsampling`): pass a copy. `example` is a float32 batch [B, …] to trace with; the batch stays dynamic.
    Raises DeliveryError when torchao is missing or the module cannot be traced.
    """
    require_torchao()
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

    plain_upsampling(module)
    module.train(training)
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    graph = exporting(
        lambda: torch.export.export(module, (example,), dynamic_shapes=dynamic).module(check_guards=False),
        "the student for quantization",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare = prepare_qat_pt2e if training else prepare_pt2e
        prepared: nn.Module = exporting(
            lambda: prepare(graph, make_quantizer(training)), "quantized operators"
        )
    return prepared


def plain_upsampling(module: nn.Module) -> None:
    """Put a 1×1 convolution and a pixel shuffle, which compute the same, in the place of transposed convolutions.

    Neither torchao's quantizer nor ONNX Runtime has an int8 transposed convolution: a U-Net's would stay float and
    hold a quarter of the file. Those with overlapping windows or padding are left as they are.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.ConvTranspose2d) and is_tiling(child):
            setattr(module, name, shuffled_convolution(child))
        else:
            plain_upsampling(child)


def is_tiling(up: nn.ConvTranspose2d) -> bool:
    """Each input pixel makes one square of output pixels, and no two squares overlap."""
    side = up.kernel_size[0]
    square = up.kernel_size == (side, side) == up.stride
    rest = (up.padding, up.output_padding, up.dilation)
    return square and rest == ((0, 0), (0, 0), (1, 1)) and up.groups == 1


def shuffled_convolution(up: nn.ConvTranspose2d) -> nn.Sequential:
    """The convolution [out·side², in, 1, 1] and pixel shuffle that equal `up`, whose weight is [in, out, side, side]."""
    side = up.kernel_size[0]
    convolution = nn.Conv2d(up.in_channels, up.out_channels * side**2, 1, bias=up.bias is not None)
    with torch.no_grad():
        convolution.weight.copy_(up.weight.permute(1, 2, 3, 0).reshape(convolution.weight.shape))
        if up.bias is not None and convolution.bias is not None:
            convolution.bias.copy_(up.bias.repeat_interleave(side**2))
    return nn.Sequential(convolution, nn.PixelShuffle(side))


def make_quantizer(training: bool) -> Any:
    """Which operators become int8, and how their ranges are found."""
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer
    from torchao.testing.pt2e._xnnpack_quantizer_utils import QuantizationConfig

    activation, weight = specs(training)
    return XNNPACKQuantizer().set_global(QuantizationConfig(activation, activation, weight, None, training))


def specs(training: bool) -> tuple[Any, Any]:
    """Quantization specifications of activations (uint8, asymmetric) and weights (int8, symmetric)."""
    import torchao.quantization.pt2e as pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

    low, high = WEIGHT_LIMITS
    unsigned: dict[str, Any] = {"dtype": torch.uint8, "quant_min": 0, "quant_max": HIGHEST}
    signed: dict[str, Any] = {"dtype": torch.int8, "quant_min": low, "quant_max": high}
    if training:
        fake = pt2e.FusedMovingAvgObsFakeQuantize
        observe_activation = fake.with_args(
            observer=pt2e.MovingAverageMinMaxObserver, eps=SMALLEST_SCALE, **unsigned
        )
        observe_weight = fake.with_args(
            observer=pt2e.MovingAveragePerChannelMinMaxObserver,
            qscheme=torch.per_channel_symmetric,
            eps=SMALLEST_SCALE,
            **signed,
        )
    else:
        observe_activation = pt2e.HistogramObserver.with_args(eps=SMALLEST_SCALE)
        observe_weight = pt2e.PerChannelMinMaxObserver.with_args(eps=SMALLEST_SCALE)
    activation = QuantizationSpec(
        **unsigned, qscheme=torch.per_tensor_affine, observer_or_fake_quant_ctr=observe_activation
    )
    weight = QuantizationSpec(
        **signed, qscheme=torch.per_channel_symmetric, ch_axis=0, observer_or_fake_quant_ctr=observe_weight
    )
    return activation, weight


def quantized_training_graph(student: Student, example: torch.Tensor) -> nn.Module:
    """The student as a graph with fake quantization that can be trained: logits and features out.

    `train()` and `eval()` work on it as on a module.
    """
    graph = prepare_int8(LogitsAndFeatures(copy.deepcopy(student)), example, training=True)
    from torchao.quantization.pt2e import allow_exported_model_train_eval

    allow_exported_model_train_eval(graph)
    return graph


class LogitsAndFeatures(nn.Module):
    """The traced face of a student for fine-tuning."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.student(images)
        assert output.logits is not None  # students without a head are refused before
        return output.logits, output.features


def activation_ranges(calibrated: nn.Module) -> Ranges:
    """What the observers of a calibrated graph have found: lowest and highest value of each observed activation."""
    found: Ranges = {}
    children: Iterable[tuple[str, Any]] = calibrated.named_children()
    for name, observer in children:
        if getattr(observer, "qscheme", None) == torch.per_tensor_affine:
            scale, zero_point = (float(value) for value in observer.calculate_qparams())
            found[name] = (-zero_point * scale, (HIGHEST - zero_point) * scale)
    return found


@torch.no_grad()
def start_from(ranges: Ranges, graph: nn.Module) -> None:
    """Let fake quantization go on from the ranges that post-training quantization has found.

    torchao gives the same activation the same name in both graphs. Raises DeliveryError when it does not.
    """
    places: dict[str, Any] = {
        name: fake.activation_post_process
        for name, fake in graph.named_children()
        if getattr(fake, "qscheme", None) == torch.per_tensor_affine
    }
    if places.keys() != ranges.keys():
        odd = sorted(places.keys() ^ ranges.keys())
        raise DeliveryError(
            f"cannot train quantized: activations differ from calibration: {', '.join(odd[:4])}"
        )
    for name, observer in places.items():
        observer.min_val.fill_(ranges[name][0])
        observer.max_val.fill_(ranges[name][1])


@torch.no_grad()
def calibrate(prepared: nn.Module, inputs: Iterable[NDArray[np.float32]]) -> None:
    """Run batches [B, 3, S, S] through the observers, which learn the ranges from them."""
    for batch in inputs:
        prepared(torch.from_numpy(batch))


def write_int8(prepared: nn.Module, card: ModelCard, example: torch.Tensor, path: Path) -> OnnxModel:
    """Convert a calibrated (or trained) graph and write it as ONNX with QuantizeLinear and DequantizeLinear."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    with quiet():
        converted = exporting(lambda: convert_pt2e(prepared), "the quantized student")
        program = exporting(
            lambda: torch.onnx.export(
                keep_first_output(converted),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
            ),
            f"the quantized {card.student} to ONNX",
        )
    add_card(program.model_proto, card, path)
    return OnnxModel(path)


def keep_first_output(graph: Any) -> Any:
    """The traced module without the outputs behind the logits: graphs for fine-tuning also return features."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    (values,) = output.args
    if isinstance(values, (tuple, list)):
        output.args = (values[0],)
        # The plain code generator: the traced one would still pack two outputs into their structure.
        graph.graph.set_codegen(torch.fx.graph.CodeGen())
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return graph
