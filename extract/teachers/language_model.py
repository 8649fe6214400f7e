"""The language model of Qwen2.5-VL as zero-shot scoring needs it: embeddings in, log-probabilities out.

Shapes: `B` images, `T` tokens, `h w` the tower's patch grid, `D` its width, `E` the language model's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the vocabulary's logits held at once: 256 × 152,064 float32 is 156 MB.
LOGIT_ROWS = 256


class LanguageModel:
    """transformers' model, tokenizer and cache behind the five calls that scoring makes."""

    def __init__(self, model: Any, tokenizer: Any, new_cache: Callable[[], Any]) -> None:
        self.tokenizer, self.new_cache = tokenizer, new_cache
        self.text, self.head, self.merger = (
            model.model.language_model,
            model.lm_head,
            model.model.visual.merger,
        )
        self.merge_size: int = model.config.vision_config.spatial_merge_size
        self.device: torch.device = self.head.weight.device
        self.dtype: torch.dtype = self.head.weight.dtype

    def tokens(self, text: str) -> list[int]:
        """Token numbers of `text`; special tokens may be written out in it."""
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]

    def embed_tokens(self, tokens: list[int] | Tensor, batch: int) -> Tensor:
        """Embeddings [B, T, E] of the same tokens for every image."""
        embedded: Tensor = self.text.embed_tokens(torch.as_tensor(tokens, device=self.device))
        return embedded.expand(batch, -1, -1)

    def embed_images(self, grid: Tensor) -> Tensor:
        """What the language model sees of images: [B, h·w/4, E] of the tower's features [B, h, w, D]."""
        batch, h, w, width = grid.shape
        side = self.merge_size
        cells = grid.to(self.device, self.dtype).reshape(batch, h // side, side, w // side, side, width)
        merged: Tensor = self.merger(cells.permute(0, 1, 3, 2, 4, 5).reshape(-1, width))
        return merged.view(batch, h * w // side**2, -1)

    def run(self, embeddings: Tensor, positions: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, E]; the tokens join the cache.

        positions: int64 [3, T], the rotary positions in time, row and column. mask: bool [T, cached + T], what each
        token may look at; None: everything before it.
        """
        masks = (
            None if mask is None else dict.fromkeys(("full_attention", "sliding_attention"), mask[None, None])
        )
        out = self.text(
            inputs_embeds=embeddings,
            position_ids=positions[:, None].expand(-1, embeddings.shape[0], -1),
            attention_mask=masks,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def log_probabilities(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """float32 [B, T]: log-probability of the target [T] that follows each hidden state [B, T, E]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        wanted = targets.expand(hidden.shape[0], -1).reshape(-1)
        parts = [
            -F.cross_entropy(self.head(rows).float(), numbers, reduction="none")
            for rows, numbers in zip(flat.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True)
        ]
        return torch.cat(parts).view(hidden.shape[:2])

    def next_log_probabilities(self, hidden: Tensor, candidates: Tensor) -> Tensor:
        """float32 [B, C]: log-probability of each candidate token [C] right after the state [B, E]."""
        return self.head(hidden).float().log_softmax(dim=-1)[:, candidates]
