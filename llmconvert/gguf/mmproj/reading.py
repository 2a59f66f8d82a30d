"""What an ``mmproj`` file says, in Hugging Face terms: settings of the model around a decoder, and where tensors go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from llmconvert.engine.architecture.config import build_config
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.architectures.architecture import Reading
from llmconvert.gguf.architectures.reading import FOREIGN
from llmconvert.gguf.architectures.writing import INERT, differences
from llmconvert.gguf.header import GgufHeader, GgufTensor, shown
from llmconvert.gguf.mmproj.projector import Entry, Images, Projector, Settings, activation_of
from llmconvert.gguf.mmproj.registry import described_as
from llmconvert.gguf.rope import shortest

__all__ = ["TowerPlace", "check_read_back", "place_tower", "read_images", "read_projector", "same_settings"]

_CLIP = "clip.vision"
_LAYERS = f"{_CLIP}.block_count"


def read_projector(header: GgufHeader, decoder: str) -> Projector:
    """The kind that a file is of.

    Args:
        header: of the file.
        decoder: the architecture of the decoder's file.

    Raises:
        UnsupportedError: a kind that is not read, or not with such a decoder.
        CheckpointError: no file of this kind, or an incomplete one.
    """
    metadata = header.metadata
    if metadata.text("general.architecture") != "clip":
        raise CheckpointError(
            f"{header.path}: is called mmproj, and is a model of architecture "
            f"{shown(metadata['general.architecture'])}; a part for images is of architecture 'clip'"
        )
    if not metadata.flag("clip.has_vision_encoder", False) or metadata.flag("clip.has_audio_encoder", False):
        raise UnsupportedError(f"{header.path}: has a part for sound, or none for images; such files are not read")
    layers = metadata.integer(_LAYERS)
    if not 0 < layers <= len(header.tensors):
        raise CheckpointError(f"{header.path}: {_LAYERS} is {layers:,}, with {len(header.tensors)} tensors")
    try:
        return described_as(Reading(header, _CLIP, {}, lambda name: None), decoder)
    except FOREIGN as error:
        raise _senseless(header, error) from error


def read_images(header: GgufHeader, projector: Projector, text: Mapping[str, Any]) -> Images:
    """The settings of the model around a decoder.

    Args:
        header: of the file beside the decoder's.
        projector: its kind.
        text: the decoder's settings.

    Returns:
        The model's, without its decoder's and without the numbers of tokens, its tower's, and its image processor's.

    Raises:
        CheckpointError: a setting is missing, makes no sense, or is not the decoder's.
        UnsupportedError: a setting that transformers' class cannot express.
    """
    metadata, width = header.metadata, text["hidden_size"]
    projected = metadata.integer(f"{_CLIP}.projection_dim")
    if projected != width:
        raise CheckpointError(
            f"{header.path}: projects images to {projected:,} values, the decoder beside it takes {width:,} "
            f"(embedding_length): it belongs to another model"
        )
    file = Reading(header, _CLIP, text, lambda name: None)
    whole = projector.whole
    try:
        found: Settings = projector.read(file)
        vision: dict[str, Any] = {"model_type": whole.tower, **_sizes(header, projector)}
        vision |= {"hidden_act": activation_of(file, whole.gelu), **found.vision}
        config = {"model_type": whole.model_type, **found.whole}
        if lacking := [name for name, value in {**config, **vision}.items() if value is None]:
            raise CheckpointError(f"{header.path}: no key of the metadata says {lacking[0]}; the file is incomplete")
        processor = {"image_processor_type": whole.processor, **_colours(header), **found.processor}
        return Images(config, vision, text, processor)
    except FOREIGN as error:
        raise _senseless(header, error) from error


def _sizes(header: GgufHeader, projector: Projector) -> dict[str, Any]:
    metadata = header.metadata
    sizes = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "image_size": "image_size",
        "patch_size": "patch_size",
    }
    found: dict[str, Any] = {}
    for name, key in sizes.items():
        called = projector.keys.get(name, name)
        value = metadata.integer(f"{_CLIP}.{key}")
        if value < 1:
            raise CheckpointError(f"{header.path}: metadata {_CLIP}.{key} is {value}, expected a positive number")
        if isinstance(called, str):
            found[called] = value
    epsilon = shortest(metadata.number(f"{_CLIP}.attention.layer_norm_epsilon"))
    if isinstance(projector.epsilon, str):
        found[projector.epsilon] = epsilon
    elif not np.isclose(epsilon, projector.epsilon):
        raise UnsupportedError(
            f"{header.path}: norms add {epsilon:g} ({_CLIP}.attention.layer_norm_epsilon), those of "
            f"{projector.whole.model_class} {projector.epsilon:g}"
        )
    return found


def _colours(header: GgufHeader) -> dict[str, Any]:
    """Mean and deviation of colours, and what llama.cpp does with every image."""
    found = {key: header.metadata.numbers(f"{_CLIP}.{key}", 3) for key in ("image_mean", "image_std")}
    if lacking := [key for key, values in found.items() if values is None]:
        raise CheckpointError(f"{header.path}: metadata has no {_CLIP}.{lacking[0]}; the file is incomplete")
    lists = {key: [shortest(float(value)) for value in values] for key, values in found.items() if values is not None}
    return {**lists, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True}


def same_settings(header: GgufHeader, projector: Projector, config: Mapping[str, Any], images: Images) -> None:
    """See that a file of the model as it was read would have the keys of the one that was read.

    Args:
        header: of the file.
        projector: its kind.
        config: the model's ``config.json``.
        images: what was read.

    Raises:
        UnsupportedError: a key says what the class of its kind cannot, or llama.cpp computes otherwise.
        CheckpointError: a value makes no sense.
    """
    try:
        built = build_config(config)
        complete = Images(built.to_dict(), built.vision_config.to_dict(), images.text, images.processor)
        written = projector.settings(complete)
    except FOREIGN as error:
        raise _senseless(header, error) from error
    for key, value in written.items():
        found = header.metadata.get(key)
        if found is None and key in projector.optional:
            continue
        if found is None:
            raise CheckpointError(f"{header.path}: metadata has no {key}; the file is incomplete")
        if not np.array_equal(np.asarray(value), np.asarray(found)):
            raise UnsupportedError(
                f"{header.path}: {key} is {shown(found)}; of a {projector.whole.model_class} it is {shown(value)}"
            )


# What no image of a checkpoint is computed with: numbers of tokens, which the vocabulary says; what training and
# processors take; a head that pools; how long a film's moments are.
_NAMES: Final = """
attention_dropout boi_token_index eoi_token_index hidden_dropout_prob image_seq_length image_token_id image_token_index
layer_scale_init_value projection_dropout text_config tokens_per_second use_mask_token video_token_id vision_config
vision_end_token_id vision_start_token_id vision_use_head
"""
_INERT: Final = INERT | frozenset(_NAMES.split())


def check_read_back(header: GgufHeader, projector: Projector, images: Images) -> None:
    """Refuse a model that would be read back as another one.

    Args:
        header: of the file to be written.
        projector: its kind.
        images: what the checkpoint says.

    Raises:
        UnsupportedError: a setting that llama.cpp computes otherwise, or that a file cannot say.
    """
    again = read_images(header, projector, images.text)
    text = {key: value for key, value in images.text.items() if key != "vision_config"}
    built = build_config({**again.config, "text_config": text, "vision_config": dict(again.vision)})
    found = built.to_dict()
    for place, ours, theirs in (("", images.config, found), ("vision_config: ", images.vision, found["vision_config"])):
        for name, wanted, given in differences(ours, theirs, _INERT):
            raise UnsupportedError(f"{place}{name} is {wanted!r}; llama.cpp's {projector.name} computes {given!r}")


@dataclass(frozen=True, slots=True)
class TowerPlace:
    """A tensor of the model around the decoder, and the file's tensors that it comes of.

    Attributes:
        name: the model's.
        shape: of it.
        entry: the first of those that say how the file has it.
        parts: the file's tensors, in the entries' order.
    """

    name: str
    shape: tuple[int, ...]
    entry: Entry
    parts: tuple[GgufTensor, ...]

    @property
    def exact(self) -> bool:
        """Whether it is what the file has, in another place and shape at most."""
        return self.entry.form.exact


def place_tower(header: GgufHeader, projector: Projector, images: Images) -> dict[str, TowerPlace]:
    """Where a file's tensors go, by the model's names; rows of the decoder's embedding go nowhere.

    Raises:
        CheckpointError: one is missing, or has a shape that does not fit the others.
        UnsupportedError: one that the kind has no place for.
    """
    groups: dict[str, list[tuple[Entry, str]]] = {}
    for name, stored, entry in projector.of_layers(header.metadata.integer(_LAYERS)):
        groups.setdefault(name, []).append((entry, stored))
    places: dict[str, TowerPlace] = {}
    used = set(projector.embedded)
    for name, group in groups.items():
        lacking = [stored for _, stored in group if stored not in header.tensors]
        if lacking and (len(lacking) < len(group) or group[0][0].needed):
            raise CheckpointError(
                f"{header.path}: has no tensor {lacking[0]!r}, which files of kind {projector.name!r} have; it is "
                "incomplete"
            )
        if lacking:
            continue
        entry, parts = group[0][0], tuple(header.tensors[stored] for _, stored in group)
        used |= {part.name for part in parts}
        called = projector.whole.tower_name(name)
        places[called] = TowerPlace(called, _shape(header, entry, parts, images), entry, parts)
    if unknown := [name for name in header.tensors if name not in used]:
        raise UnsupportedError(f"{header.path}: tensor {unknown[0]!r} has no place in {projector.whole.model_class}")
    return places


def _shape(header: GgufHeader, entry: Entry, parts: tuple[GgufTensor, ...], images: Images) -> tuple[int, ...]:
    try:
        values = entry.form.restore(images, [torch.empty(part.shape, device="meta") for part in parts])
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{header.path}: tensor {parts[0].name!r} has shape {list(parts[0].shape)}, which does not fit the "
            "metadata; the file is inconsistent"
        ) from error
    return tuple(values.shape)


def _senseless(header: GgufHeader, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{header.path}: the metadata lacks a value, or has one that makes no sense beside the others "
        f"({type(error).__name__}: {error}); the file is incomplete or corrupt"
    )
