"""Where a checkpoint has what an adapter names: peft names parameters of the class that was trained.

That is the checkpoint's name, or one with more or less at its beginning, or one that transformers changes while it
loads; or the decoder's alone, of a model that reads images beside text.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Final

from transformers import PreTrainedModel

from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.expert_storage import Conversions
from llmconvert.engine.architecture.families import HEADS
from llmconvert.engine.architecture.model import build_meta_model, find_decoder
from llmconvert.errors import UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.dense import main_dtype

__all__ = ["Places"]

# What classes call the model inside, of which checkpoints leave some out.
_BASES: Final = ("model", "transformer", "language_model", "gpt_neox", "backbone")


class Places:
    """Finds the tensors of a checkpoint by the names of parameters; its class is built where names alone don't do.

    Args:
        base: of which only the config and headers are looked at.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base

    def of(self, name: str) -> str | None:
        """What the checkpoint calls a parameter of the model's modules; None if it has no such tensor."""
        infos, shorter = self._base.infos, name
        while shorter not in infos and shorter.partition(".")[0] in _BASES:
            shorter = shorter.partition(".")[2]
        if shorter in infos:
            return shorter
        if self._conversions is None:
            longer = [stored for stored in infos if stored.endswith(f".{name}")]
            return longer[0] if len(longer) == 1 else None
        target, conversion = self._conversions.target(name)
        found = self._tensors.get(target) if conversion is None else None
        return found or self._tensors.get(f"{self._decoder}.{name.partition('.')[2]}")

    @cached_property
    def tied(self) -> tuple[str, str] | None:
        """The embedding, where it is the head too, as the checkpoint calls it, and what a head is called; else None."""
        if self._model is None or any(name.endswith(HEADS) for name in self._base):
            return None
        head, embedding = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        names = {id(module): f"{name}.weight" for name, module in self._model.named_modules()}
        parameter, stored = names.get(id(head), ""), self._tensors.get(names.get(id(embedding), ""))
        return (stored, parameter) if parameter in self._model.all_tied_weights_keys and stored is not None else None

    @cached_property
    def _model(self) -> PreTrainedModel | None:
        """Without weights; None of a class that transformers does not have."""
        try:
            return build_meta_model(build_config(self._base.config), main_dtype(self._base), "sdpa")
        except UnsupportedError:
            return None

    @cached_property
    def _conversions(self) -> Conversions | None:
        return None if self._model is None else Conversions(self._model)

    @cached_property
    def _tensors(self) -> Mapping[str, str]:
        """Parameter → tensor, of those that are loaded as they are."""
        assert self._conversions is not None
        loaded = ((name, *self._conversions.target(name)) for name in self._base)
        return {target: name for name, target, conversion in loaded if conversion is None}

    @cached_property
    def _decoder(self) -> str:
        """What the class calls its decoder."""
        assert self._model is not None
        decoder = find_decoder(self._model)
        names: list[str] = [name for name, module in self._model.named_modules() if module is decoder]
        return names[0]
