"""Class logits from the whole Qwen2.5-VL, without training: how likely it is to answer with each class name.

The score of a class is the summed log-probability of the tokens of its name, and of the end of the turn after it,
as the answer to a question about the image, averaged over several questions. The end token makes the scores those
of whole answers: without it a name would beat every longer name that it begins ("car", "car mirror").

Sharing: an image is read once; each question continues its key-value cache; all names continue the question in one
packed forward pass, in which a token sees the shared prefix and its own name only.

Shapes: `B` images, `C` classes, `P` prompts, `Q` packed tokens, `h w` the tower's grid, `D` its width,
`T` tokens, `E` the language model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from extract.teachers.base import TeacherError
from imaging.geometry import PADDING_COLOR

if TYPE_CHECKING:
    from PIL.Image import Image

    from extract.teachers.base import Teacher


# Rows of the vocabulary's logits held at once: 256 × 152,064 float32 is 156 MB.
LOGIT_ROWS = 256


# -- the language model: embeddings in, log-probabilities out --------------------------------------------


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


# -- the scores ------------------------------------------------------------------------------------------


PROMPTS = (
    "What is in this image? Answer with one word or a short phrase.",
    "Name the main object in the picture. Answer with its name only.",
    "Which category does this image belong to? Answer with the category only.",
)
# Qwen2.5-VL's chat format, as its chat template writes it.
BEFORE_IMAGE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)
AFTER_IMAGE = "<|vision_end|>"
AFTER_QUESTION = "<|im_end|>\n<|im_start|>assistant\n"
END_OF_TURN = "<|im_end|>"
MAX_PACKED_TOKENS = 1024


class PackedAnswers(NamedTuple):
    """Tokens of several class names, one after the other; all int64 [Q].

    inputs: a token; targets: the one that follows it in its name; steps: its place in the name; owners: its class.
    """

    inputs: Tensor
    targets: Tensor
    steps: Tensor
    owners: Tensor


class ZeroShotScorer:
    """Scores the class names for images that the teacher has encoded."""

    def __init__(
        self,
        language: LanguageModel,
        teacher: Teacher,
        class_names: Sequence[str],
        *,
        prompts: Sequence[str] = PROMPTS,
        calibrate: bool = False,
    ) -> None:
        """calibrate: subtract the score of the same names for an empty (mean gray) image, so that names that are
        likely whatever the image shows do not win by that (contextual calibration, arXiv 2102.09690).

        Raises:
            TeacherError: without class names or prompts.
        """
        if not class_names or not prompts:
            raise TeacherError("zero-shot logits need at least one class name and one prompt")
        self.language, self.teacher, self.calibrate = language, teacher, calibrate
        self.class_names, self.prompts = tuple(class_names), tuple(prompts)
        words = [" ".join(name.replace("_", " ").split()) for name in class_names]
        answers = [language.tokens(text + END_OF_TURN) for text in words]
        self.first_tokens = torch.tensor([tokens[0] for tokens in answers], device=language.device)
        self.packs = pack_answers(answers, language.device)
        self.priors: dict[tuple[int, int], Tensor] = {}

    @torch.inference_mode()
    def score(self, grid: Tensor) -> Tensor:
        """Logits float32 [B, C] of images, given the tower's features [B, h, w, D] (`Encoded.grid`)."""
        scores = self.score_names(grid)
        return scores - self.prior(grid.shape[1], grid.shape[2]) if self.calibrate else scores

    def score_images(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Logits float32 [B, C] of images as `Teacher.encode` takes them."""
        return self.score(self.teacher.encode(images).grid)

    def prior(self, h: int, w: int) -> Tensor:
        """float32 [1, C]: the scores of the names for an empty image with a grid of h × w; kept per size."""
        if (h, w) not in self.priors:
            size = self.teacher.preprocessing.image_size
            patch = size // self.teacher.grid_size(size, size)[0]
            color = torch.tensor(PADDING_COLOR, dtype=torch.uint8).view(1, 3, 1, 1)
            empty = color.expand(1, 3, h * patch, w * patch)
            self.priors[h, w] = self.score_names(self.teacher.encode(empty).grid)
        return self.priors[h, w]

    def score_names(self, grid: Tensor) -> Tensor:
        """float32 [B, C]: log-probability of each name as the answer, averaged over the prompts."""
        cache = self.language.new_cache()
        position = self.read_images(grid, cache)
        seen = cache.get_seq_length()
        scores = []
        for prompt in self.prompts:
            scores.append(self.answer_prompt(prompt, position, cache, len(grid)))
            cache.crop(seen - cache.get_seq_length())  # a negative number: so many tokens are dropped
        return torch.stack(scores).mean(dim=0)

    def read_images(self, grid: Tensor, cache: Any) -> int:
        """Fill the cache with the turn up to the image's end; returns the next rotary position."""
        language = self.language
        before, after = language.tokens(BEFORE_IMAGE), language.tokens(AFTER_IMAGE)
        h, w = grid.shape[1] // language.merge_size, grid.shape[2] // language.merge_size
        image = image_positions(len(before), h, w, language.device)
        end = len(before) + max(h, w)
        embeddings = torch.cat(
            [
                language.embed_tokens(before, len(grid)),
                language.embed_images(grid),
                language.embed_tokens(after, len(grid)),
            ],
            dim=1,
        )
        positions = torch.cat(
            [
                text_positions(0, len(before), language.device),
                image,
                text_positions(end, len(after), language.device),
            ],
            dim=1,
        )
        language.run(embeddings, positions, cache)
        return end + len(after)

    def answer_prompt(self, prompt: str, position: int, cache: Any, batch: int) -> Tensor:
        """float32 [B, C]: log-probability of each name as the answer to one prompt. Leaves its tokens in the cache."""
        language = self.language
        question = language.tokens(prompt + AFTER_QUESTION)
        embeddings = language.embed_tokens(question, batch)
        hidden = language.run(embeddings, text_positions(position, len(question), language.device), cache)
        position += len(question)
        scores = language.next_log_probabilities(hidden[:, -1], self.first_tokens)
        shared: int = cache.get_seq_length()
        for pack in self.packs:
            embedded = language.embed_tokens(pack.inputs, batch)
            hidden = language.run(
                embedded, (position + pack.steps).expand(3, -1), cache, mask_of(pack, shared)
            )
            scores.index_add_(1, pack.owners, language.log_probabilities(hidden, pack.targets))
            cache.crop(-len(pack.inputs))
        return scores


def pack_answers(answers: Sequence[Sequence[int]], device: torch.device) -> list[PackedAnswers]:
    """All tokens but the last of every answer, in packs of at most MAX_PACKED_TOKENS (or one long answer)."""
    packs: list[list[tuple[int, int, int, int]]] = [[]]
    for owner, tokens in enumerate(answers):
        if packs[-1] and len(packs[-1]) + len(tokens) - 1 > MAX_PACKED_TOKENS:
            packs.append([])
        packs[-1] += [(tokens[i], tokens[i + 1], i, owner) for i in range(len(tokens) - 1)]
    columns = (torch.tensor(pack, device=device).unbind(dim=1) for pack in packs if pack)
    return [PackedAnswers(*column) for column in columns]


def mask_of(pack: PackedAnswers, shared: int) -> Tensor:
    """bool [Q, shared + Q]: a token sees the shared prefix, itself, and what precedes it in its own name."""
    own = (pack.owners[:, None] == pack.owners) & (pack.steps[:, None] >= pack.steps)
    return torch.cat([own.new_ones(len(own), shared), own], dim=1)


def text_positions(start: int, count: int, device: torch.device) -> Tensor:
    """int64 [3, count]: text counts on in all three axes alike."""
    return torch.arange(start, start + count, device=device).expand(3, -1)


def image_positions(start: int, h: int, w: int, device: torch.device) -> Tensor:
    """int64 [3, h·w]: one moment in time, rows and columns counted from `start` (multimodal rotary positions)."""
    rows, columns = torch.meshgrid(
        torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
    )
    return start + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1)
