"""A checkpoint with a LoRA adapter merged: a view whose weights are ``W + s·BA``, equal to peft's ``merge_and_unload``.

Adapters of linears and of embeddings, weights that are stored inputs first, DoRA of linears, and parameters that were
trained and saved whole (``modules_to_save``, biases, embeddings).
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import partial
from typing import Final

import torch

from llmconvert.convert.adapter.files import Adapter
from llmconvert.convert.adapter.merge import Merge, Update
from llmconvert.engine.architecture.config import with_split_embeddings
from llmconvert.engine.architecture.families import EMBEDDINGS, HEADS
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, TensorInfo

__all__ = ["AdapterView", "sorted_tensors"]

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
# What classes call the model inside, of which checkpoints leave some out.
_BASES: Final = ("model", "transformer", "language_model", "gpt_neox", "backbone")


class AdapterView(CheckpointView):
    """A dense checkpoint with an adapter merged: each read adds what belongs to its rows.

    Args:
        base: dense weights.
        adapter: open.

    Raises:
        UnsupportedError: a tensor of the adapter can't be merged into this model.
        CheckpointError: parts are missing, or of another shape.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        super().__init__(base)
        self._adapter = adapter
        self._last: Merge | None = None
        self._updates: dict[str, Update] = {}
        self._replaced: dict[str, str] = {}
        infos = dict(base.infos)
        parts, whole = sorted_tensors(adapter)
        for module, found in parts.items():
            weight = _place(base, f"{module}.weight")
            if weight is None:
                raise _unplaced(adapter, f"{module}.weight")
            self._updates[weight] = Update.of(adapter, module, weight, found, base.infos[weight].shape)
        for stored, name in whole.items():
            place, info = _whole_place(base, name), adapter.tensors.infos[stored]
            if place in base.infos and base.infos[place].shape != info.shape:
                raise UnsupportedError(
                    f"adapter {adapter.origin}: its {name} has shape {list(info.shape)}, the model's "
                    f"{list(base.infos[place].shape)}; merge it with peft, which makes the vocabulary grow"
                )
            if place not in base.infos:
                if not place.endswith(HEADS):
                    raise _unplaced(adapter, name)
                # A head that was trained by itself, of a model whose head was its embedding.
                self.config = with_split_embeddings(base.config)
                embedding = next(one for one in base.infos.values() if any(part in one.name for part in EMBEDDINGS))
                infos[place] = TensorInfo(place, embedding.dtype, info.shape, embedding.shard)
            self._replaced[place] = stored
        self.infos = infos
        self.quantized_inputs, self.quantized_cache = {}, {}
        self.identity = f"{base.identity} + {adapter.fingerprint}"

    @property
    def merged(self) -> int:
        """How many weights it changes."""
        return len(self._updates) + len(self._replaced)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        update = self._updates.get(name)
        if update is None or stop <= start:
            return self._unmerged(name, start, stop)
        return self._merge_of(name, update).rows(start, stop).to(self.infos[name].dtype)

    def _unmerged(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of the base, or of what was saved in its place."""
        saved = self._replaced.get(name)
        if saved is None:
            return super().read_rows(name, start, stop)
        return self._adapter.tensors.read_rows(saved, start, stop).to(self.infos[name].dtype)

    def _merge_of(self, name: str, update: Update) -> Merge:
        """The merge of one weight, whose matrices are held until another one is read."""
        if self._last is None or self._last.name != name:
            count = self.infos[name].shape[0]
            self._last = Merge.of(name, update, self._adapter.tensors, partial(self._unmerged, name), count)
        return self._last


def sorted_tensors(adapter: Adapter) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The parts by module, and what was saved whole: its name in the file → the parameter's name.

    Raises:
        UnsupportedError: a tensor that no LoRA of linears and embeddings has.
        CheckpointError: there is none.
    """
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    whole: dict[str, str] = {}
    for name in adapter.tensors:
        if not name.startswith(_PREFIX):
            raise UnsupportedError(
                f"adapter {adapter.origin}: tensor {name!r} is none that peft's LoRA has; merge it with peft "
                "(merge_and_unload)"
            )
        inner = name.removeprefix(_PREFIX)
        match = _PART.fullmatch(inner)
        if match is None and ("lora_" in inner or "token_adapter" in inner):
            raise UnsupportedError(
                f"adapter {adapter.origin}: tensor {name!r}: what it does to the weights is not known here; merge it "
                "with peft (merge_and_unload)"
            )
        if match is None:
            whole[name] = _WRAPPER.sub("", inner)
        elif match["leaf"] == ".bias":
            raise UnsupportedError(
                f"adapter {adapter.origin}: tensor {name!r} is a bias of LoRA's own; merge it with peft "
                "(merge_and_unload)"
            )
        else:
            parts[_WRAPPER.sub("", f"{match['module']}.").removesuffix(".")][match["part"]] = name
    if not parts and not whole:
        raise CheckpointError(f"adapter {adapter.origin}: has no tensors")
    return parts, whole


def _place(base: Checkpoint, name: str) -> str | None:
    """What the checkpoint calls a parameter of the model's modules: itself, or less or more at the beginning."""
    shorter = name
    while shorter not in base.infos and shorter.partition(".")[0] in _BASES:
        shorter = shorter.partition(".")[2]
    if shorter in base.infos:
        return shorter
    longer = [stored for stored in base.infos if stored.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None


def _whole_place(base: Checkpoint, name: str) -> str:
    return _place(base, name) or name


def _unplaced(adapter: Adapter, name: str) -> UnsupportedError:
    tied = (
        "; its head is its embedding, which would change with it: merge it with peft (merge_and_unload)"
        if name.endswith(HEADS)
        else "; the adapter is of another model, or of one whose checkpoint has its weights together"
    )
    return UnsupportedError(f"adapter {adapter.origin}: the model has no {name}{tied}")
