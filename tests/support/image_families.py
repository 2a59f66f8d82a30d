"""How tiny models of families for images look at one, in transformers and in llama.cpp.

Images have the size that a model looks at, so that neither resizes them; what each makes of other sizes is its own.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.multimodal_families import save_family
from support.tiny_models import VOCABULARY, tiny_tokenizer
from transformers import AutoModelForMultimodalLM, PreTrainedTokenizerFast

__all__ = ["LOOKS", "TEXT", "after_image", "picture", "png", "save_images_family"]

TEXT = "what is it"
_PATCH = 8
_MEAN, _DEVIATION = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
_TOKENS = (
    *("<image>", "\n\n", "\n", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"),
    *("[IMG_BREAK]", "[IMG_END]", "<|vision_start|>", "<|vision_end|>", "<start_of_image>", "<end_of_image>"),
    *("<img>", "</img>", "<image_soft_token>", "[IMG]", "<IMG_CONTEXT>", "<|image_pad|>", "<|video_pad|>"),
)
_Inputs = Callable[[torch.Tensor], Mapping[str, Any]]


def _pixels(values: torch.Tensor) -> Mapping[str, Any]:
    return {"pixel_values": values[None]}


def _tiles(values: torch.Tensor) -> Mapping[str, Any]:
    return {"pixel_values": values.expand(1, 2, *values.shape)}


def _sized(values: torch.Tensor) -> Mapping[str, Any]:
    return {"pixel_values": values[None], "image_sizes": torch.tensor([values.shape[1:]])}


def _patches(values: torch.Tensor) -> Mapping[str, Any]:
    """Qwen's: two moments of the same, squares of two by two patches one behind the other."""
    rows, columns = values.shape[1] // _PATCH, values.shape[2] // _PATCH
    cut = values.reshape(3, rows // 2, 2, _PATCH, columns // 2, 2, _PATCH).permute(1, 4, 2, 5, 0, 3, 6)
    cut = cut[..., None, :, :].expand(*cut.shape[:5], 2, _PATCH, _PATCH)
    grid = torch.tensor([[1, rows, columns]])
    return {"pixel_values": cut.reshape(rows * columns, -1), "image_grid_thw": grid}


@dataclass(frozen=True)
class Looks:
    """How a family looks at an image.

    Attributes:
        size: of the image, in pixels.
        around: tokens before and behind those of the image.
        count: tokens of the image; of a row, where something stands between rows.
        token: which they are.
        between: what stands between rows.
        inputs: of transformers' model.
        changes: of the tiny family's settings.
        family: where it is not what the model is called.
    """

    size: int
    around: tuple[Sequence[str], Sequence[str]] = ((), ())
    count: int = 16
    rows: int = 1
    between: Sequence[str] = ()
    inputs: _Inputs = _pixels
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    family: str = ""
    token: str = "<image>"


_TOWER = {"image_size": 64}
# llama.cpp looks at an image of one tile twice, as at a tile and as at the whole.
_IDEFICS = Looks(
    64,
    (
        ("<fake_token_around_image>", "<row_1_col_1>"),
        ("<fake_token_around_image>",),
    ),
    16,
    2,
    ("\n\n", "<fake_token_around_image>", "<global-img>"),
    _tiles,
    {"tower": _TOWER},
)
_QWEN = Looks(64, (("<|vision_start|>",), ("<|vision_end|>",)), inputs=_patches, token="<|image_pad|>")
_QWEN3 = replace(_QWEN, changes={"tower": {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}})
_PIXTRAL = Looks(64, ((), ("[IMG_END]",)), 8, 8, ("[IMG_BREAK]",), _sized, token="[IMG]")
LOOKS: Mapping[str, Looks] = {
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "gemma3": Looks(
        64,
        (("<start_of_image>",), ("<end_of_image>",)),
        4,
        changes={"tower": _TOWER, "text": {"sliding_window": 64}},
        token="<image_soft_token>",
    ),
    "pixtral": replace(
        _PIXTRAL,
        changes={
            "tower": {**_TOWER, "model_type": "pixtral", "hidden_act": "silu"},
            "whole": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        },
        family="llava",
    ),
    "mistral3": replace(_PIXTRAL, count=4, rows=4, changes={"tower": _TOWER, "text": {"rms_norm_eps": 1e-5}}),
    "internvl": Looks(64, (("<img>",), ("</img>",)), changes={"tower": _TOWER}, token="<IMG_CONTEXT>"),
    "qwen2_vl": _QWEN,
    # Two windows to a side.
    "qwen2_5_vl": replace(_QWEN, size=128, count=64, changes={"tower": {"fullatt_block_indexes": [1]}}),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
}


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer(VOCABULARY - len(_TOKENS)))
    tokenizer.add_special_tokens({"additional_special_tokens": list(_TOKENS)})
    return tokenizer


def save_images_family(directory: Path, name: str) -> Path:
    looks, tokenizer = LOOKS[name], _tokenizer()
    number = tokenizer.convert_tokens_to_ids(looks.token)
    whole = {"image_token_id": number, **looks.changes.get("whole", {})}
    if name.startswith("qwen"):
        whole |= {"vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>")}
    save_family(directory, looks.family or name, changes={**looks.changes, "whole": whole}, tokenizer=tokenizer)
    side = {"longest_edge": looks.size}
    processor = {"image_mean": _MEAN, "image_std": _DEVIATION, "size": side, "max_image_size": side}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def picture(size: int) -> np.ndarray:
    """uint8 ``[size, size, 3]``."""
    return np.random.default_rng(3).integers(0, 256, (size, size, 3), np.uint8)


def png(image: np.ndarray) -> bytes:
    raw = io.BytesIO()
    Image.fromarray(image).save(raw, "PNG")
    return raw.getvalue()


@torch.no_grad()
def after_image(directory: Path, name: str, image: np.ndarray) -> tuple[torch.Tensor, int]:
    """transformers' log probabilities of the token after the image and the text, and how many tokens these are."""
    looks, tokenizer = LOOKS[name], _tokenizer()
    scaled = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    scaled = (scaled - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_DEVIATION)[:, None, None]
    row = [looks.token] * looks.count
    tokens = [*looks.around[0], *row]
    for _ in range(looks.rows - 1):
        tokens += [*looks.between, *row]
    tokens += looks.around[1]
    ids = torch.tensor([[*tokenizer.convert_tokens_to_ids(tokens), *tokenizer(TEXT).input_ids]])
    marked = (ids == tokenizer.convert_tokens_to_ids(looks.token)).long()
    model = AutoModelForMultimodalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    more = {}
    if name.startswith("qwen"):
        more["mm_token_type_ids"] = marked
    elif name == "gemma3":
        more["token_type_ids"] = marked
    logits = model(input_ids=ids, **looks.inputs(scaled), **more).logits
    return logits[0, -1].float().log_softmax(-1), ids.shape[1]
