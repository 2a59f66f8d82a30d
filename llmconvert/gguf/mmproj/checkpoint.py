"""A decoder's file and the ``mmproj`` file beside it as the checkpoint of the whole model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.architectures.registry import described_inside
from llmconvert.gguf.checkpoint import GgufCheckpoint, check_types
from llmconvert.gguf.header import GgufHeader, read_gguf_header
from llmconvert.gguf.mmproj.projector import Projector
from llmconvert.gguf.mmproj.reading import TowerPlace, place_tower, read_images, read_projector, same_settings
from llmconvert.gguf.mmproj.shapes import check_shapes
from llmconvert.gguf.opened import OpenedGguf, read_as
from llmconvert.gguf.split import projectors_beside, read_model_header
from llmconvert.storage.checkpoint import TensorInfo
from llmconvert.storage.directory import identity_of

__all__ = ["GgufWhole", "open_whole"]

_PROCESSOR: Final = "preprocessor_config.json"


class GgufWhole(GgufCheckpoint):
    """A decoder and its part for images, under the names of the model that has both.

    Its image processor's mean, deviation and sizes are what the file says. How images are resized, padded and cut no
    file says: of that the processor has its class's defaults.

    Args:
        path: of the decoder's file, any part of a split one.
        beside: the other file.

    Raises:
        UnsupportedError: a part or a decoder that is not read; the decoder alone may be.
        CheckpointError: one of the files is corrupt or incomplete, or they don't belong together.
    """

    def __init__(self, path: Path, beside: Path) -> None:
        decoder = read_model_header(path)
        with _advising(beside):
            header = read_gguf_header(beside)
            projector = read_projector(header, decoder.metadata.text("general.architecture"))
            check_types(header)
            arch = described_inside(decoder, projector.whole.decoder)
        super().__init__(path, arch)
        try:
            with _advising(beside):
                self._add(header, projector)
        except BaseException:
            self.close()
            raise

    def _add(self, header: GgufHeader, projector: Projector) -> None:
        self.beside = header.path
        self._images = read_images(header, projector, self.decoder)
        self._tower = place_tower(header, projector, self._images)
        outer = {name: self.decoder[name] for name in ("dtype", "tie_word_embeddings")}
        outer |= {key: self.decoder[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text = {key: value for key, value in self.decoder.items() if key != "architectures"}
        self.config = {
            "architectures": [projector.whole.model_class],
            **self._images.config,
            **outer,
            **_tokens(self, header, projector),
            "text_config": text,
            "vision_config": dict(self._images.vision),
        }
        same_settings(header, projector, self.config, self._images)
        names = {projector.whole.decoder_name(name): name for name in self.places}
        self.places = {name: replace(self.places[old], name=name) for name, old in names.items()}
        self.infos = {
            **{name: replace(self.infos[old], name=name) for name, old in names.items()},
            **{name: _info(place, header.path.name) for name, place in self._tower.items()},
        }
        check_shapes(header.path, self.config, {name: info.shape for name, info in self.infos.items()})
        processor = json.dumps(self._images.processor, indent=2) + "\n"
        self.files = {**self.files, _PROCESSOR: processor.encode()}
        self.identity = identity_of((*self.parts, header.path))
        self._opened_beside = OpenedGguf(header.parts)

    @property
    def stored_nbytes(self) -> int:
        return super().stored_nbytes + sum(part.nbytes for place in self._tower.values() for part in place.parts)

    def type_of(self, name: str) -> str:
        if name in self._tower:
            return str(self._tower[name].parts[0].qtype.name).lower()
        return super().type_of(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._tower:
            return super().read_rows(name, start, stop)
        place, dtype = self._tower[name], self.infos[name].dtype
        parts = [self._opened_beside.read_rows(part, 0, part.shape[0]).to(dtype) for part in place.parts]
        whole = place.entry.form.restore(self._images, parts)
        # A slice of its own: whole tensors would stay alive for a row.
        return whole.contiguous() if start <= 0 and stop >= len(whole) else whole[max(0, start) : max(0, stop)].clone()

    def close(self) -> None:
        super().close()
        if hasattr(self, "_opened_beside"):
            self._opened_beside.close()


@contextmanager
def _advising(beside: Path) -> Iterator[None]:
    """Let what is wrong with a file beside the decoder's say what can be done without it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}. To read the decoder alone, move {beside.name} elsewhere") from error


def _info(place: TowerPlace, file: str) -> TensorInfo:
    kinds = {read_as(part.qtype) for part in place.parts}
    dtype = kinds.pop() if place.exact and len(kinds) == 1 else torch.float32
    return TensorInfo(place.name, dtype, place.shape, file)


def _tokens(checkpoint: GgufCheckpoint, header: GgufHeader, projector: Projector) -> Mapping[str, Any]:
    """The numbers of tokens that stand for images, by what they are called in the decoder's vocabulary."""
    wanted = projector.whole.tokens
    if checkpoint.without_tokenizer:
        raise UnsupportedError(
            f"{header.path}: the number of {next(iter(wanted.values()))!r}, which stands for an image, is the "
            f"vocabulary's to say, and {checkpoint.without_tokenizer}"
        )
    tokens = read_model_header(checkpoint.parts[0]).metadata.strings("tokenizer.ggml.tokens")
    numbers = {token: number for number, token in enumerate(tokens) if token in wanted.values()}
    if lacking := [token for token in wanted.values() if token not in numbers]:
        raise UnsupportedError(
            f"{checkpoint.path}: its vocabulary has no token {lacking[0]!r}, which {projector.whole.model_class} needs "
            f"(with {header.path.name})"
        )
    return {setting: numbers[token] for setting, token in wanted.items()}


def open_whole(path: Path) -> GgufCheckpoint:
    """Open a GGUF model with the part for images that lies beside it, if one does.

    Returns:
        The whole; or the decoder, which then says why it is :attr:`~GgufCheckpoint.alone`.

    Raises:
        CheckpointError: one of the files is corrupt or incomplete, they are of two models, or several lie beside it.
        UnsupportedError: the decoder cannot be read.
    """
    found = projectors_beside(path)
    if not found:
        return GgufCheckpoint(path)
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: beside it are {len(found)} files of parts for images or sound, {found[0].name} and "
            f"{found[1].name}; leave the one to be read with it, and move the others elsewhere"
        )
    try:
        return GgufWhole(path, found[0])
    except UnsupportedError as error:
        decoder = GgufCheckpoint(path)
        decoder.alone = f"{found[0].name} is not read, and what is read is the decoder alone, because {error}"
        return decoder
