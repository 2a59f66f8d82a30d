"""What healing trains, by name, and the memory and disk that it takes: known from headers, refused before the work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from llmconvert.compute.precision import compute_dtype
from llmconvert.context import Context
from llmconvert.convert.gqa.geometry import read_geometry
from llmconvert.convert.gqa.weights import attention_tensors
from llmconvert.convert.heal.options import HealOptions
from llmconvert.engine.memory import BASE_NBYTES, tokenizer_nbytes
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.training.needs import backward_nbytes, require_memory

__all__ = ["Targets", "attention_names", "heal_nbytes", "read_targets"]

# Bytes of a trained number in float32: itself and the best so far; its running means, Muon's one and Adam's two.
_OWN, _MUON, _ADAM = 8, 4, 8
_GRADIENT = 4


@dataclass(frozen=True, slots=True)
class Targets:
    """What is trained of a merged model.

    Attributes:
        attention: names of the tensors of its attention, which are not the original's.
        names: of the tensors that change.
        heads: numbers that Muon trains, head by head.
        others: numbers that Adam trains: those of other tensors, or of adapters.
    """

    attention: tuple[str, ...]
    names: tuple[str, ...]
    heads: int
    others: int

    @property
    def state_nbytes(self) -> int:
        """Bytes of the state on disk, twice while one replaces the last."""
        return 2 * ((_OWN + _MUON) * self.heads + (_OWN + _ADAM) * self.others)

    @property
    def trained_nbytes(self) -> int:
        """Bytes of all that is trained in memory, with gradients."""
        return (_OWN + _MUON + _GRADIENT) * self.heads + (_OWN + _ADAM + _GRADIENT) * self.others


def attention_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors of a checkpoint's attention that a rewrite to fewer key-value heads changes."""
    geometry = read_geometry(checkpoint)
    names = [name for layer in range(geometry.layers) for name in attention_tensors(checkpoint, geometry, layer)]
    return tuple(name for name in names if name in checkpoint)


def read_targets(merged: Checkpoint, options: HealOptions, device: torch.device) -> Targets:
    """What is trained of ``merged``, from headers.

    Raises:
        UnsupportedError: all weights of a mixture of experts, or of a model some of whose parameters are several
            tensors of the checkpoint.
    """
    attention = attention_names(merged)
    numel = {name: math.prod(info.shape) for name, info in merged.infos.items()}
    heads = sum(numel[name] for name in attention)
    if options.train == "attention":
        return Targets(attention, attention, heads, 0)
    skeleton = Skeleton(merged, device)
    if options.train == "lora":
        names = _linears(skeleton)
        sides = (min(options.rank, *merged.infos[name].shape) * sum(merged.infos[name].shape) for name in names)
        return Targets(attention, names, 0, sum(sides))
    _require_whole(skeleton)
    loaded = {
        stored
        for name, stored in skeleton.names.items()
        if skeleton.reach.needs(name) and _is_parameter(skeleton.model, name)
    }
    names = tuple(name for name, info in merged.infos.items() if name in loaded and info.dtype.is_floating_point)
    return Targets(attention, names, heads, sum(numel[name] for name in names) - heads)


def _is_parameter(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return isinstance(getattr(model.get_submodule(path), leaf), nn.Parameter)


def _linears(skeleton: Skeleton) -> tuple[str, ...]:
    """The weights of all linears of the blocks, but for experts."""
    found = [
        skeleton.names[f"{name}.weight"]
        for linears in skeleton.linears
        for name, module in linears.items()
        if isinstance(module, nn.Linear)
    ]
    return tuple(dict.fromkeys(found))


def _require_whole(skeleton: Skeleton) -> None:
    kind = skeleton.architecture.model_type
    if any(skeleton.experts):
        raise UnsupportedError(
            f"healing: architecture {kind!r} is a mixture of experts, of which attention or adapters can be trained; "
            "set attention.heal.train to attention or lora"
        )
    if skeleton.joined:
        raise UnsupportedError(
            f"healing: {next(iter(skeleton.joined))} of architecture {kind!r} is made of several tensors of the "
            "checkpoint; set attention.heal.train to attention or lora"
        )


def heal_nbytes(merged: Checkpoint, targets: Targets, options: HealOptions, length: int, context: Context) -> int:
    """Bytes that healing takes; refuses, before any work, what does not fit."""
    dtype = compute_dtype(context.device)
    numel = {name: math.prod(info.shape) for name, info in merged.infos.items()}
    total, attention = sum(numel.values()), sum(numel[name] for name in targets.attention)
    # The teacher's and the student's weights where they are not the same; of trained ones, what a pass multiplies by.
    apart = sum(numel[name] for name in targets.names) if options.train == "all" else attention
    # With trained embeddings hidden states are in their dtype.
    activations = backward_nbytes(merged, length, torch.float32 if options.train == "all" else dtype)
    needed = BASE_NBYTES + tokenizer_nbytes(merged) + (total + apart) * dtype.itemsize
    needed += targets.trained_nbytes + activations
    if options.train == "all":
        needed += 2 * _GRADIENT * max(numel[name] for name in targets.names)  # one more gradient on its way, cast
    require_memory(
        needed,
        "healing",
        f"both models with what they share held once, the optimizer, {activations / 1e6:,.0f} MB of activations",
        _advice(options),
        context,
    )
    return needed


def _advice(options: HealOptions) -> str:
    less = "" if options.train == "attention" else "train attention alone (attention.heal.train: attention), "
    return f"{less}use shorter windows or a machine with more memory, or leave out attention.heal"
