"""A checkpoint with a LoRA adapter merged: a view whose weights are ``W + s·BA``, equal to peft's ``merge_and_unload``.

Adapters of linears and of embeddings, weights that are stored inputs first, DoRA of linears, and parameters that were
trained and saved whole (``modules_to_save``, biases, embeddings).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from llmconvert.convert.adapter.files import CONFIG, Adapter
from llmconvert.convert.adapter.merge import Merge, Update
from llmconvert.convert.adapter.places import Places
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
_Parts = dict[str, dict[str, str]]


class AdapterView(CheckpointView):
    """A dense checkpoint with an adapter merged: each read adds what belongs to its rows.

    Args:
        base: dense weights.
        adapter: open.

    Attributes:
        notes: what is otherwise than in the base beside its weights, a sentence each.

    Raises:
        UnsupportedError: a tensor of the adapter can't be merged into this model.
        CheckpointError: parts are missing, or of another shape.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        super().__init__(base)
        self._adapter = adapter
        self._places = Places(base)
        self._last: Merge | None = None
        self._updates: dict[str, Update] = {}
        self._replaced: dict[str, str] = {}
        self._copied: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()
        parts, whole = sorted_tensors(adapter)
        trained = [*parts, *(name.rpartition(".")[0] for name in whole.values())]
        if adapter.config.get("ensure_weight_tying") and self._places.tied is not None:
            parts, whole = self._together(parts, whole)
        else:
            self._split(parts, whole)
        for module, found in parts.items():
            weight = self._place(f"{module}.weight")
            if weight is None:
                raise _unplaced(adapter, f"{module}.weight")
            self._updates[weight] = Update.of(adapter, module, weight, found, self.infos[weight].shape)
        for stored, name in whole.items():
            place, info = self._place(name), adapter.tensors.infos[stored]
            if place is None:
                raise _unplaced(adapter, name)
            if self.infos[place].shape != info.shape:
                raise UnsupportedError(
                    f"adapter {adapter.origin}: its {name} has shape {list(info.shape)}, the model's "
                    f"{list(self.infos[place].shape)}; merge it with peft, which makes the vocabulary grow"
                )
            self._replaced[place] = stored
        self.notes += _not_stored(adapter, trained)
        self.quantized_inputs, self.quantized_cache = {}, {}
        self.identity = f"{base.identity} + {adapter.fingerprint}"

    def _split(self, parts: Mapping[str, object], whole: Mapping[str, str]) -> None:
        """Give the model a head of its own if embedding and head are one, and one of them was trained alone.

        peft trains each of them as if there were two, so the other one keeps its values.
        """
        names = [*(f"{module}.weight" for module in parts), *whole.values()]
        outside = [name for name in names if name.endswith(HEADS) or any(part in name for part in EMBEDDINGS)]
        tied = self._places.tied if outside else None
        if tied is None or not any(name.endswith(HEADS) or self._places.of(name) == tied[0] for name in outside):
            return
        embedding, head = tied
        info = self.base.infos[embedding]
        self._copied[head] = embedding
        self.infos = {**self.infos, head: TensorInfo(head, info.dtype, info.shape, info.shard)}
        self.config = with_split_embeddings(self.base.config)
        self.notes = (
            "the adapter was trained with a head that is not the embedding any more, and so is the merged model: it "
            f"has {head} of its own beside {embedding}",
        )

    def _together(self, parts: _Parts, whole: dict[str, str]) -> tuple[_Parts, dict[str, str]]:
        """An adapter's tensors without those of a head that is its embedding, and stays it.

        Raises:
            CheckpointError: they are another head's.
        """
        tensors = self._adapter.tensors

        def same(head: Mapping[str, str], embedding: Mapping[str, str]) -> bool:
            """B is what A is of the other, turned around."""
            pairs = ((head.get(f"lora_{one}"), embedding.get(f"lora_embedding_{other}")) for one, other in ("AB", "BA"))
            return all(one and other and torch.equal(tensors[one].T, tensors[other]) for one, other in pairs)

        saved = [stored for stored, name in whole.items() if not name.endswith(HEADS)]
        kept = {stored: name for stored, name in whole.items() if not name.endswith(HEADS)}
        for stored in whole.keys() - kept.keys():
            if not any(torch.equal(tensors[stored], tensors[one]) for one in saved if "embed" in one or "wte" in one):
                raise _apart(self._adapter, stored)
        others = {module: found for module, found in parts.items() if not f"{module}.weight".endswith(HEADS)}
        for module in parts.keys() - others.keys():
            if not any(same(parts[module], found) for found in others.values()):
                raise _apart(self._adapter, module)
        return others, kept

    def _place(self, name: str) -> str | None:
        """What this calls a parameter: the base's name, or that of a head that it has besides."""
        head = next(iter(self._copied), None)
        return head if head is not None and name.endswith(HEADS) else self._places.of(name)

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
            return super().read_rows(self._copied.get(name, name), start, stop)
        return self._adapter.tensors.read_rows(saved, start, stop).to(self.infos[name].dtype)

    def _merge_of(self, name: str, update: Update) -> Merge:
        """The merge of one weight, whose matrices are held until another one is read."""
        if self._last is None or self._last.name != name:
            count = self.infos[name].shape[0]
            self._last = Merge.of(name, update, self._adapter.tensors, partial(self._unmerged, name), count)
        return self._last


def sorted_tensors(adapter: Adapter) -> tuple[_Parts, dict[str, str]]:
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


def _not_stored(adapter: Adapter, modules: Sequence[str]) -> tuple[str, ...]:
    """What is said of modules that a config names as trained and that its file has nothing of."""
    said = []
    for key in ("target_modules", "modules_to_save"):
        named = adapter.config.get(key)
        lacking = [one for one in named if not _among(str(one), modules)] if isinstance(named, list) else []
        if lacking:
            said.append(f"{CONFIG} names {', '.join(map(str, lacking))} in {key}, and its file has nothing of it")
    return tuple(f"adapter {adapter.origin}: {one}; it changes nothing there" for one in said)


def _among(name: str, modules: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)


def _apart(adapter: Adapter, name: str) -> CheckpointError:
    return CheckpointError(
        f"adapter {adapter.origin}: {CONFIG} has ensure_weight_tying, and {name} is not what its embedding is; save it "
        "anew with the peft that trained it"
    )


def _unplaced(adapter: Adapter, name: str) -> UnsupportedError:
    tied = (
        "; its head is its embedding, which would change with it: merge it with peft (merge_and_unload)"
        if name.endswith(HEADS)
        else "; the adapter is of another model, or of one whose checkpoint has its weights together"
    )
    return UnsupportedError(f"adapter {adapter.origin}: the model has no {name}{tied}")
