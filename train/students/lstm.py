"""Clips: an image encoder per frame (ResNet-50 by default), then a two-layer bidirectional LSTM over time."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from train.data.prefetch import to_device
from train.distill.losses import full_precision
from train.students.base import InitialWeights, Student, StudentError, StudentOutput, StudentSpec
from train.students.families import FAMILIES, StudentName
from train.students.timm_student import check_known, create_timm_model, image_size_settings

FRAME_ENCODER = "resnet50"


class ClipLSTM(Student):
    """Frame encoder → LSTM → pooling over the valid frames → classes.

    What is distilled depends on what can learn: with the encoder trained its per-frame output [B, T, D],
    with it frozen the LSTM's outputs [B, T, 2·hidden]. Padding frames never reach encoder or LSTM, so batch
    statistics and results do not depend on how clips were padded; their features are zero.
    """

    def __init__(
        self,
        encoder: nn.Module,
        encoder_width: int,
        hidden_size: int,
        spec: StudentSpec,
        *,
        freeze_encoder: bool,
        attention_pooling: bool,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.head_prefixes = ("head.",)
        self.freeze_encoder = freeze_encoder
        self.encoder: Any = encoder
        self.lstm = nn.LSTM(encoder_width, hidden_size, num_layers=2, bidirectional=True, batch_first=True)
        self.attention = nn.Linear(2 * hidden_size, 1) if attention_pooling else None
        self.head = nn.Linear(2 * hidden_size, spec.num_classes) if spec.num_classes else nn.Identity()
        self.encoder.requires_grad_(not freeze_encoder)
        if not spec.num_classes:
            # Label-free: nothing reads the pooled clip, and with the encoder trained nothing reads the LSTM.
            if self.attention is not None:
                self.attention.requires_grad_(False)
            self.lstm.requires_grad_(freeze_encoder)

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> StudentOutput:
        """`images` float [B, T, 3, H, W], `lengths` int64 [B] (None: all T) → logits [B, C], features [B, T, D].

        Without `lengths` nothing is packed, which is what tracing and export need; the results are the same.
        """
        valid = None if lengths is None else frame_mask(lengths.cpu(), images.shape[1])
        mask = None if valid is None else to_device(valid, images.device)
        encoded = self._encode(images, valid)
        if not self.spec.num_classes and not self.freeze_encoder:
            return StudentOutput(None, encoded)
        states = self._recur(encoded, lengths)
        logits = self.head(self._pool(states, mask)) if self.spec.num_classes else None
        return StudentOutput(logits, states if self.freeze_encoder else encoded)

    def _encode(self, images: Tensor, valid: Tensor | None) -> Tensor:
        """Encode the valid frames only (`valid` bool [B, T] on the CPU); [B, T, D], zeros at padding."""
        frames, places = images.flatten(0, 1), None
        if valid is not None:
            # Places are found on the CPU: a boolean mask on a GPU would make the host wait for their number.
            places = to_device(valid.flatten().nonzero().squeeze(1), images.device)
            frames = frames.index_select(0, places)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            rows: Tensor = self.encoder(frames)
        if places is not None:
            rows = rows.new_zeros(images.shape[0] * images.shape[1], rows.shape[-1]).index_copy(
                0, places, rows
            )
        return rows.unflatten(0, images.shape[:2])  # type: ignore[no-untyped-call, no-any-return]

    def _recur(self, encoded: Tensor, lengths: Tensor | None) -> Tensor:
        """LSTM outputs float32 [B, T, 2·hidden], over packed clips when there are `lengths`; zeros at padding.

        Always computed in float32: autocast runs cuDNN's recurrent layers in float16 even when bfloat16 is asked
        for, and then there is no gradient scaler that would keep small gradients from becoming zero.
        """
        with full_precision(encoded):
            return self._recur_in_float32(encoded.float(), lengths)

    def _recur_in_float32(self, encoded: Tensor, lengths: Tensor | None) -> Tensor:
        states: Tensor
        if lengths is None:
            states, _ = self.lstm(encoded)
            return states
        # Sorted here, because pack_padded_sequence would copy the order to a GPU and wait for it.
        ordered, order = lengths.cpu().sort(descending=True)
        there, back = (to_device(index, encoded.device) for index in (order, order.argsort()))
        packed = pack_padded_sequence(encoded.index_select(0, there), ordered, batch_first=True)
        out, _ = self.lstm(packed)
        states, _ = pad_packed_sequence(out, batch_first=True, total_length=encoded.shape[1])
        return states.index_select(0, back)

    def _pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Mean over valid frames, or attention weights that sum to 1 over them; [B, 2·hidden]."""
        if self.attention is None:
            return states.mean(1) if mask is None else states.sum(1) / mask.sum(1, keepdim=True)
        scores: Tensor = self.attention(states).squeeze(-1).float()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(1).to(states.dtype).unsqueeze(-1) * states).sum(1)

    def train(self, mode: bool = True) -> ClipLSTM:
        """A frozen encoder stays in evaluation mode: its batch-norm statistics must not drift."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's blocks in the backward pass (pointless, and skipped, when it is frozen)."""
        self.encoder.set_grad_checkpointing(enable and not self.freeze_encoder)

    def lora_root(self) -> nn.Module:
        """The encoder: peft refuses recurrent layers."""
        return cast(nn.Module, self.encoder)


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """`lengths` int64 [B] → bool [B, T], true where a frame is real; ValueError outside 1..T."""
    if int(lengths.min()) < 1 or int(lengths.max()) > frames:
        raise ValueError(f"clip lengths must lie in 1..{frames}, got {lengths.tolist()}")
    return torch.arange(frames, device=lengths.device).unsqueeze(0) < lengths.unsqueeze(1)


def build_lstm(
    name: StudentName,
    *,
    num_classes: int,
    image_size: int,
    pretrained: bool = False,
    freeze_encoder: bool = False,
    attention_pooling: bool = False,
    frame_encoder: str = FRAME_ENCODER,
) -> ClipLSTM:
    """Build `lstm/small|medium|large` on timm's model `frame_encoder`, whose weights `pretrained` fetches from timm's hub."""
    hidden = FAMILIES[name.type].sizes[name.size]
    check_known(frame_encoder)  # also of a checkpoint: no hub, no folder
    settings = image_size_settings(frame_encoder, image_size)
    encoder = create_timm_model(frame_encoder, pretrained, num_classes=0, **settings)
    width = output_width(frame_encoder, image_size, settings)
    spec = StudentSpec.of(
        name,
        num_classes,
        image_size=image_size,
        feature_width=2 * hidden if freeze_encoder else width,
        feature_kind="sequence",
        feature_stride=None,
        distilled_layer="LSTM output per frame" if freeze_encoder else "frame encoder's output per frame",
        options={
            "freeze_encoder": freeze_encoder,
            "attention_pooling": attention_pooling,
            # Absent in runs of older versions.
            **({} if frame_encoder == FRAME_ENCODER else {"frame_encoder": frame_encoder}),
        },
    )
    student = ClipLSTM(
        encoder, width, hidden, spec, freeze_encoder=freeze_encoder, attention_pooling=attention_pooling
    )
    if pretrained:
        student.initial_weights = InitialWeights(origin=f"pretrained:{frame_encoder}")
    return student


def output_width(architecture: str, image_size: int, settings: dict[str, Any]) -> int:
    """Width of what timm's model makes of an image without its classifier, measured on the meta device.

    Raises StudentError when the model does not run at `image_size` or its output is no vector.
    """
    with torch.device("meta"):
        model = create_timm_model(architecture, False, num_classes=0, **settings).eval()
        try:
            shape = model(torch.zeros(1, 3, image_size, image_size)).shape
        except Exception as error:
            raise StudentError(
                f"frame_encoder {architecture} does not run at image_size {image_size}: {error}"
            ) from error
    if len(shape) != 2:
        raise StudentError(
            f"frame_encoder {architecture}: expected one vector per image, got shape {tuple(shape)}"
        )
    return int(shape[1])
