"""What of a checkpoint a GGUF file is made of: its decoder, alone or inside a model with parts for images or sound.

A model with parts has its decoder's settings in a config of their own and its tensors under longer names, which differ
from release to release. Both are brought to those of the decoder alone, so that the file is the same from either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture
from llmconvert.gguf.architectures.pieces import Piece
from llmconvert.gguf.architectures.registry import architecture_of
from llmconvert.gguf.architectures.writing import complete_values
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["EMBEDDING", "HEAD", "OUTPUT", "WHOLES", "Decoder", "DecoderView", "find_decoder"]

#: In a file, and what most classes call a head.
OUTPUT, EMBEDDING, HEAD = "output.weight", "token_embd.weight", "lm_head.weight"
_AHEAD: Final = "mtp."
_VISION: Final = "vision_config"

#: Models with parts whose text llama.cpp was seen to compute from their decoder's file as transformers does from the
#: whole (docs/gguf.md). Aya's, for one, leaves out a scale that its decoder alone has.
WHOLES: Final = frozenset(
    {
        *(
            "deepseek_vl",
            "deepseek_vl_hybrid",
            "gemma3",
            "gemma3n",
            "gemma4",
            "glmasr",
            "got_ocr2",
            "idefics3",
            "internvl",
            "janus",
        ),
        *("lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3"),
        *("moss_transcribe_diarize", "ovis2", "pp_chart2table", "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_asr"),
        *("qwen3_vl", "qwen3_vl_moe", "smolvlm", "vibevoice_asr", "video_llama_3", "video_llava", "vipllava"),
        "voxtral",
    }
)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A checkpoint's decoder.

    Attributes:
        arch: the file's architecture.
        model: what the decoder's config says.
        values: that config, with transformers' defaults filled in.
        names: what the architecture calls a tensor → what the checkpoint does, for all tensors of the decoder.
        others: the checkpoint's tensors of other parts.
        declared_tied: whether any config says that the embedding is the output matrix too.
    """

    arch: GgufArchitecture
    model: Architecture
    values: Mapping[str, Any]
    names: Mapping[str, str]
    others: tuple[str, ...]
    declared_tied: bool

    def outer_name(self, stored: str) -> str:
        """What the architecture calls a tensor outside the layers; "" where there is none."""
        return _outer_name(self.arch, stored)

    @property
    def head(self) -> str:
        """What the architecture calls an output matrix of its own, though llama.cpp may have none."""
        return self.outer_name(OUTPUT) or HEAD

    @property
    def ahead(self) -> tuple[str, ...]:
        """The checkpoint's tensors of layers behind the last one, which predict several tokens at once; transformers
        does not run them."""
        prefix, layers = self.arch.layer[0].name.partition("*")[0], int(self.values["num_hidden_layers"])
        found = [name for name in self.others if name.startswith(_AHEAD)]
        for name, actual in self.names.items():
            number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
            if name.startswith(_AHEAD) or (number.isdecimal() and int(number) >= layers):
                found.append(actual)
        return tuple(found)

    @property
    def left_out(self) -> tuple[str, ...]:
        """A sentence on the tensors of layers behind the last one, which are not in a file."""
        ahead = self.ahead
        if not ahead:
            return ()
        ordinary = {re.sub(r"\d+", "*", actual) for actual in set(self.names.values()) - set(ahead)}
        if all(re.sub(r"\d+", "*", name) in ordinary for name in ahead):  # nothing of another kind is in them
            return (
                f"config.json counts {self.values['num_hidden_layers']} layers; {len(ahead)} tensors of layers behind "
                f"them ({ahead[0]}, …) are left out, as transformers leaves them out. If the model has more layers, "
                "num_hidden_layers is wrong",
            )
        return (
            f"{len(ahead)} tensors of layers that predict several tokens at once ({ahead[0]}, …) are left out; the "
            "model computes the same without",
        )

    @property
    def beside(self) -> tuple[str, ...]:
        """The checkpoint's tensors of parts for images or sound."""
        ahead = set(self.ahead)
        return tuple(name for name in self.others if name not in ahead)

    def located(self, piece: Piece) -> Piece:
        """A piece of a tensor that the architecture names, by the checkpoint's name."""
        actual = self.names[piece.name]
        module, there = piece.name.rpartition(".")[0], actual.rpartition(".")[0]
        return replace(piece, name=actual, called=piece.called.replace(module, there, 1))


class DecoderView(CheckpointView):
    """The decoder of a model with parts as a checkpoint of its own, as its file is read back; others as they are."""

    def __init__(self, base: Checkpoint) -> None:
        super().__init__(base)
        decoder = find_decoder(base)
        self._names = {name: name for name in base.infos}
        if decoder.others:
            arch = decoder.arch
            self._names = dict(decoder.names)
            self.infos = {name: replace(base.infos[actual], name=name) for name, actual in decoder.names.items()}
            config = {key: value for key, value in decoder.values.items() if key != _VISION}
            kind = arch.read_type or arch.model_type
            self.config = {**config, "model_type": kind, "architectures": [arch.model_class]}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.base.read_rows(self._names[name], start, stop)

    def prefetch(self, names: Iterable[str]) -> None:
        self.base.prefetch(self._names[name] for name in names if name in self.infos)


def find_decoder(source: Checkpoint) -> Decoder:
    """The decoder of a checkpoint.

    Raises:
        UnsupportedError: no file can be written of its architecture, or it lies in a model of a kind that was not seen
            to compute a text as the decoder alone does.
        CheckpointError: the decoder's tensors are not there, or there are those of several.
    """
    config = build_config(source.config)
    text = config.get_text_config()
    if text is config:
        arch = architecture_of(source.config)
        values = complete_values(config)
        return Decoder(arch, Architecture(config), values, _names(source, arch), (), _tied(config))
    values = complete_values(text)
    arch = architecture_of(values, of=str(config.model_type))
    if config.model_type not in WHOLES:
        raise UnsupportedError(
            f"architecture {config.model_type!r} has other parts beside its decoder, a {text.model_type!r}, and was "
            f"not tried in llama.cpp; known are {', '.join(sorted(WHOLES))}; make the decoder a checkpoint of its own "
            "(its config is text_config)"
        )
    names, others = _names_inside(source, arch, values)
    # What a file says of the other parts.
    values = {**values, _VISION: config.to_dict().get(_VISION)}
    return Decoder(arch, Architecture(text), values, names, others, _tied(config) or _tied(text))


def _tied(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _outer_name(arch: GgufArchitecture, stored: str) -> str:
    return next((entry.name for name, entry, _ in arch.entries(0) if name == stored), "")


def _names(source: Checkpoint, arch: GgufArchitecture) -> Mapping[str, str]:
    """The names that the architecture has for a checkpoint's tensors → those there, which may lack the first part.

    GPT-2 and BLOOM were published without ``transformer.``, which transformers adds as it loads.
    """
    embedding = _outer_name(arch, EMBEDDING)
    prefix, _, short = embedding.partition(".")
    if embedding in source.infos or short not in source.infos:
        return {name: name for name in source.infos}
    return {name if name == HEAD else f"{prefix}.{name}": name for name in source.infos}


def _names_inside(
    source: Checkpoint, arch: GgufArchitecture, values: Mapping[str, Any]
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """The same of a model with parts, and the names of the other parts' tensors.

    Its decoder is where an embedding of the decoder's shape is, ``model.language_model.``, ``language_model.model.`` or
    ``model.text_model.``, for example; the head lies beside it or further out.
    """
    usual, _, short = _outer_name(arch, EMBEDDING).partition(".")
    shape = (values[arch.vocabulary], values["hidden_size"])
    endings = (f".{short}", short)
    found = [name for name in source if f".{name}".endswith(endings[0]) and source.infos[name].shape == shape]
    if len(found) != 1:
        raise CheckpointError(
            f"the checkpoint has {'no embedding' if not found else f'{len(found)} embeddings'} of its decoder, a "
            f"tensor that ends with {short!r} and has shape {list(shape)}" + (f": {', '.join(found)}" if found else "")
        )
    prefix = found[0].removesuffix(short)
    names = {f"{usual}.{name.removeprefix(prefix)}": name for name in source if name.startswith(prefix)}
    head = _outer_name(arch, OUTPUT) or HEAD
    parts = prefix.split(".")
    outward = (".".join([*parts[:end], head]) for end in range(len(parts)))
    if own := next((name for name in outward if name in source.infos), None):
        names[head] = own
    inside = set(names.values())
    return names, tuple(name for name in source if name not in inside)
