"""An ``mmproj`` file to be written from a checkpoint: its header, and its tensors as the file has them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from llmconvert.engine.architecture.config import build_config
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.file import encode_rows
from llmconvert.gguf.ggml.blocks import Codec, load_codec
from llmconvert.gguf.header import parse_gguf_header
from llmconvert.gguf.layout import GgufSpec, plan_gguf
from llmconvert.gguf.mmproj.projector import Entry, Form, Images, Projector
from llmconvert.gguf.mmproj.reading import check_read_back
from llmconvert.gguf.mmproj.registry import projector_of
from llmconvert.gguf.records.general import general_metadata
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import Layout, TensorWriter
from llmconvert.text.tokenizer import load_tokenizer

__all__ = ["ImagesFile", "plan_images_file"]

_FILE_TYPES: Final[Mapping[str, int]] = {"F32": 0, "F16": 1, "BF16": 32}
# Buffers, which runtimes compute.
_COMPUTED: Final = re.compile(r".*\.(position_ids|inv_freq)")
# What llama.cpp convolves and rearranges with has to be of a type that these operations have.
_CONVOLVED: Final = ("v.patch_embd.weight", "mm.patch_merger.weight", "mm.input_projection.weight")
_EXACT: Final = ("v.position_embd.weight", "v.class_embd", "v.token_embd.img_break")
_WEIGHTS_AT_ONCE: Final = 1 << 22
_ROW: Final = Form(lambda images, values: values[0])


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the file: where it comes from."""

    spec: GgufSpec
    source: str
    entry: Entry
    row: int | None = None


@dataclass(frozen=True, slots=True)
class ImagesFile:
    """The plan of a file.

    Attributes:
        name: of the file.
        layout: where its tensors go.
        projector: llama.cpp's name of its kind.
        notes: where llama.cpp computes a little otherwise, a sentence each.
    """

    name: str
    layout: Layout
    projector: str
    notes: tuple[str, ...]
    _source: Checkpoint
    _images: Images
    _parts: tuple[_Part, ...]

    def write(self, writer: TensorWriter) -> None:
        """Write its tensors, one in memory at a time.

        Raises:
            CheckpointError: values that are not finite.
            UnsupportedError: values beyond the type's range.
        """
        for part in self._parts:
            shape = self._source.infos[part.source].shape
            first, last = (part.row, part.row + 1) if part.row is not None else (0, shape[0])
            values = part.entry.form.store(self._images, self._source.read_rows(part.source, first, last).float())
            rows = values.reshape(-1, part.spec.shape[-1]).contiguous()
            codec, step = load_codec(part.spec.qtype), max(1, _WEIGHTS_AT_ONCE // part.spec.shape[-1])
            for start in range(0, len(rows), step):
                encoded = encode_rows(part.source, codec, rows[start : start + step], _encode)
                writer.write_rows(part.spec.name, start, encoded)


def _encode(codec: Codec, rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(codec.encode(rows.numpy())).reshape(len(rows), -1)


def plan_images_file(source: Checkpoint, name: str, kind: str, others: Sequence[str]) -> ImagesFile:
    """Settle everything about a file but its weights.

    Args:
        source: the whole model, dense weights under Hugging Face names.
        name: of the model.
        kind: of its matrices: ``F32``, ``F16`` or ``BF16``.
        others: the checkpoint's tensors outside its decoder.

    Raises:
        UnsupportedError: there is no such file of the model's kind, or llama.cpp would compute something otherwise.
        CheckpointError: tensors are missing.
    """
    images = _images(source)
    projector = projector_of(images)
    names = projector.canonical(name for name in others if not _COMPUTED.fullmatch(name))
    parts: list[_Part] = []
    for called, stored, entry in projector.of_layers(_integer(images, projector, "num_hidden_layers")):
        if called in names:
            parts.append(_part(source, images, names[called], stored, entry, kind))
        elif entry.needed:
            raise CheckpointError(f"the checkpoint has no {called!r}, which an mmproj file of its kind needs")
    used = {part.source for part in parts}
    if rest := [name for name in names.values() if name not in used]:
        raise UnsupportedError(f"tensor {rest[0]!r} has no place in an mmproj file of kind {projector.name!r}")
    for stored, token in projector.embedded.items():
        parts.append(_embedded(source, stored, token))
    file_name = f"mmproj-{name}-{kind.lower()}.gguf"
    specs = [part.spec for part in parts]
    metadata = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": name,
        **general_metadata(source, [spec.rows * spec.shape[-1] for spec in specs]),
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        **_usual(images, projector),
        **projector.settings(images),
    }
    layout = plan_gguf(file_name, metadata, specs)
    (shard,) = layout.shards
    check_read_back(parse_gguf_header(Path(file_name), shard.header, shard.nbytes), projector, images)
    return ImagesFile(file_name, layout, projector.name, projector.notes(images), source, images, tuple(parts))


def _images(source: Checkpoint) -> Images:
    config = build_config(source.config)
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise UnsupportedError(f"config.json of {config.model_type!r} has no vision_config")
    processor: dict[str, Any] = {}
    for file, inside in (("preprocessor_config.json", ""), ("processor_config.json", "image_processor")):
        if file in source.files:
            found = _json(source, file)
            processor |= _mapping(found.get(inside)) if inside else found
    return Images(config.to_dict(), vision.to_dict(), config.get_text_config().to_dict(), processor)


def _json(source: Checkpoint, file: str) -> dict[str, Any]:
    try:
        return _mapping(json.loads(source.read_file(file)))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON that can be read: {error}") from None


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _part(source: Checkpoint, images: Images, name: str, stored: str, entry: Entry, kind: str) -> _Part:
    shape = tuple(entry.form.store(images, torch.empty(source.infos[name].shape, device="meta")).shape)
    if len(shape) < 2 or stored in _EXACT:
        kind = "F32"
    elif stored.removesuffix(".1") in _CONVOLVED:
        kind = "F16" if kind == "F16" else "F32"
    return _Part(GgufSpec(stored, kind, shape), name, entry)


def _embedded(source: Checkpoint, stored: str, token: str) -> _Part:
    """A token's row of the decoder's embedding."""
    numbers = {str(added): number for number, added in load_tokenizer(source).added_tokens_decoder.items()}
    if token not in numbers:
        raise UnsupportedError(f"the tokenizer has no token {token!r}, whose embedding llama.cpp puts between rows")
    name = next(name for name in source if name.endswith("embed_tokens.weight"))
    spec = GgufSpec(stored, "F32", source.infos[name].shape[1:])
    return _Part(spec, name, Entry(name, stored, _ROW), numbers[token])


def _usual(images: Images, projector: Projector) -> dict[str, Any]:
    """The keys that every file has."""
    epsilon = projector.epsilon if isinstance(projector.epsilon, float) else images.vision[projector.epsilon]
    mean, deviation = _normalization(images)
    sizes = {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
    }
    found = {key: _integer(images, projector, name) for key, name in sizes.items()}
    if found["embedding_length"] == found["feed_forward_length"]:
        raise UnsupportedError(
            "vision_config: the tower's layers are as wide inside as out; llama.cpp takes up for down projections then"
        )
    return {
        "clip.has_vision_encoder": True,
        "clip.projector_type": projector.name,
        "clip.vision.projection_dim": int(images.text["hidden_size"]),
        **{f"clip.vision.{key}": value for key, value in found.items()},
        "clip.vision.attention.layer_norm_epsilon": float(epsilon),
        "clip.vision.image_mean": mean,
        "clip.vision.image_std": deviation,
    }


def _integer(images: Images, projector: Projector, name: str) -> int:
    """A setting of the tower; of one that is said for height and width the one size."""
    called = projector.keys.get(name, name)
    value = images.vision.get(called) if isinstance(called, str) else called(images)
    sizes = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sizes) != 1 or not isinstance(size := sizes.pop(), int):
        raise UnsupportedError(f"vision_config: {name} is {value!r}; llama.cpp wants one whole number")
    return size


def _normalization(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation by colour, of values between 0 and 1."""
    processor = images.processor
    found = [processor.get(key) for key in ("image_mean", "image_std")]
    if not all(isinstance(values, list) and len(values) == 3 for values in found):
        raise UnsupportedError(
            "the checkpoint has no preprocessor_config.json or processor_config.json with image_mean and image_std of "
            "three colours; copy it from the model's repository"
        )
    scale = processor.get("rescale_factor", 1 / 255)
    usual = isinstance(scale, float) and abs(scale * 255 - 1) < 1e-6
    if not (usual and processor.get("do_rescale", True) and processor.get("do_normalize", True)):
        raise UnsupportedError(
            "the image processor does not divide by 255 and normalize (do_rescale, rescale_factor, do_normalize), as "
            "llama.cpp does"
        )
    return np.array(found[0], np.float32), np.array(found[1], np.float32)
