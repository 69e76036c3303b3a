"""Any text or vision encoder of the transformers library, by its name on the hub or its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from metafit.backbones.base import Backbone, texts
from metafit.backbones.pictures import fit, stack
from metafit.errors import BadInput, unknown

POOLINGS = ("mean", "cls")


class TextEncoder(Backbone):
    """A transformers text model with its tokenizer, pooled over the tokens.

    ``forward`` takes a dict of ``input_ids`` and ``attention_mask``, both ``(N, tokens)``. It runs under
    ``torch.func.grad`` but not under vmap, where transformers looks into the attention mask.

    Args:
        name: for people and for the cache.
        model: a transformers model that gives ``last_hidden_state``.
        tokenizer: its fast tokenizer.
        pooling: "mean" over the tokens that are not padding, or "cls", the first token.
        normalize: whether to scale features to length 1.
        max_length: tokens after which a text is cut; never more than the model can take.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        pooling: str = "mean",
        normalize: bool = False,
        max_length: int = 256,
    ) -> None:
        if pooling not in POOLINGS:
            raise unknown("pooling", pooling, POOLINGS)
        config: Any = model.config
        limit = min(max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", max_length))
        recipe = f"text v1 pooling={pooling} normalize={normalize} max_length={limit} {config.to_json_string()}"
        super().__init__(name, _width(name, config), "text", recipe + tokenizer.backend_tokenizer.to_str())
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:  # causal models have none; the mask keeps it out of the pooling
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        self.pooling, self.normalize, self.max_length = pooling, normalize, limit

    def preprocess(self, raw: Sequence[Any]) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            texts(raw), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def forward(self, x: Mapping[str, Tensor]) -> Float[Tensor, "n out_dim"]:
        hidden = self.model(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state
        if self.pooling == "cls":
            features = hidden[:, 0]
        else:
            mask = x["attention_mask"].to(hidden.dtype).unsqueeze(-1)
            features = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        return F.normalize(features, dim=-1) if self.normalize else features


class ImageEncoder(Backbone):
    """A transformers vision model, with the size, mean and deviation that its image processor names.

    ``forward`` takes uint8 ``(N, 1 or 3, H, W)`` of any size, or floats of 0 to 1. Unlike some processors it resizes
    the whole image to the model's size, and crops nothing.

    Args:
        name: for people and for the cache.
        model: a transformers model that gives ``last_hidden_state``.
        processor: the content of ``preprocessor_config.json``.
        pooling: "cls", the first token, or "mean" over all tokens; feature maps are always averaged.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str, model: nn.Module, processor: Mapping[str, Any], pooling: str = "cls") -> None:
        if pooling not in POOLINGS:
            raise unknown("pooling", pooling, POOLINGS)
        config: Any = model.config
        height, width = _size(processor, config)
        recipe = f"image v1 pooling={pooling} size={height}x{width} {config.to_json_string()}"
        super().__init__(name, _width(name, config), "image", recipe)
        self.model = model.eval()
        self.height, self.width = height, width
        self.pooling = pooling
        scaled = processor.get("do_normalize", True)
        mean = (processor.get("image_mean") or [0.5] * 3) if scaled else [0.0] * 3
        deviation = (processor.get("image_std") or [0.5] * 3) if scaled else [1.0] * 3
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(-1, 1, 1))

    def preprocess(self, raw: Sequence[Any]) -> Tensor:
        return stack(raw, (self.height, self.width))

    def forward(self, x: Tensor) -> Float[Tensor, "n out_dim"]:
        dtype = next(self.parameters()).dtype
        x = (fit(x, self.height, self.width, dtype) - self.mean) / self.deviation
        hidden = self.model(pixel_values=x).last_hidden_state
        if hidden.ndim == 4:
            return hidden.mean((-2, -1))
        return hidden[:, 0] if self.pooling == "cls" else hidden.mean(1)


def load_hf(name: str, pooling: str | None = None, max_length: int = 256, normalize: bool = False) -> Backbone:
    """A text or vision encoder of transformers; of an encoder-decoder, the encoder.

    Only safetensors weights are read and no code of the repository is run.

    Args:
        name: a hub name (``org/model``), or a folder that ``save_pretrained`` wrote.
        pooling: "mean" or "cls"; by default "mean" for text and "cls" for images.
        max_length: for text, the tokens after which it is cut.
        normalize: for text, whether to scale features to length 1.

    Raises:
        BadInput: no such model, or no network and not in the hub's cache, or not a text or vision encoder.
    """
    local = Path(name).expanduser()
    if name.startswith(("/", ".", "~")) and not local.is_dir():
        raise BadInput(f"backbone 'hf:{name}': no such folder; give a folder that save_pretrained wrote, or a hub name")
    transformers = require_transformers(f"hf:{name}")
    where = str(local) if local.is_dir() else name
    try:
        model: Any = transformers.AutoModel.from_pretrained(where, trust_remote_code=False, use_safetensors=True)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        model = model.float()
        if model.main_input_name == "pixel_values":
            processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(where)
            return ImageEncoder(f"hf:{name}", model, processor, pooling or "cls")
        if model.main_input_name == "input_ids":
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False, use_fast=True)
            if not tokenizer.is_fast:
                raise BadInput(f"backbone 'hf:{name}': it has no fast tokenizer; wrap() it with your own preprocess")
            return TextEncoder(f"hf:{name}", model, tokenizer, pooling or "mean", normalize, max_length)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"backbone 'hf:{name}': transformers cannot load it ({reason}); check the name, and the network the first "
            "time; the weights must be safetensors"
        ) from error
    raise BadInput(
        f"backbone 'hf:{name}': it reads {model.main_input_name}, neither text nor images; wrap() it with a preprocess"
    )


def require_transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BadInput(f'backbone {name!r} needs transformers: pip install "metafit[text]"') from error
    return transformers


def _width(name: str, config: Any) -> int:
    stages: Any = getattr(config, "hidden_sizes", None) or [None]  # convolutional encoders name one width a stage
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or stages[-1]
    if width is None:
        raise BadInput(f"backbone {name!r}: its configuration names no hidden_size; wrap() it with out_dim=")
    return int(width)


def _size(processor: Mapping[str, Any], config: Any) -> tuple[int, int]:
    size: Any = processor.get("crop_size") if processor.get("do_center_crop") else None
    size = size or processor.get("size") or getattr(config, "image_size", 224)
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge", 224)
        return int(size.get("height", edge)), int(size.get("width", edge))
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
