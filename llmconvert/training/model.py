"""Resident teacher and student: hidden states after every block, logits for some positions at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from llmconvert.engine.skeleton import BlockCall, BlockSlot, Skeleton
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["ResidentModel"]


@dataclass
class _Output(MoeModelOutputWithPast):
    """With what heads of some classes pass on, be there such or not: a router's logits, attention across models."""

    cross_attentions: tuple[torch.Tensor, ...] | None = None


class _Decoded(nn.Module):
    """Stands in for a model's decoder once that has run: gives back what it is given."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


class ResidentModel:
    """A causal language model with all its weights in memory, in evaluation mode (no dropout).

    Args:
        checkpoint: dense weights.
        device: where.
        dtype: of weights and activations.

    Raises:
        UnsupportedError: the architecture cannot be run.
        CheckpointError: tensors are missing or have other shapes than the config says.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.skeleton = Skeleton(checkpoint, device, dtype, products="learned")
        self.skeleton.restore_buffers()
        self.skeleton.load_outer(head=True)
        for index, slot in enumerate(self.skeleton.slots):
            self.skeleton.load_block(index)
            slot.gate = self._record
        self._states: list[torch.Tensor] = []
        self._model = self.skeleton.model
        self._decoder: nn.Module = getattr(self._model, self._model.base_model_prefix)
        # From here on the model's own forward is its head: final projection, logit scale, caps.
        setattr(self._model, self._model.base_model_prefix, _Decoded())

    def decode(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What goes into the output head, ``[batch, length, hidden]``, and the hidden state after every block."""
        self._states = []
        final: torch.Tensor = self._decoder(input_ids=ids.to(self.skeleton.device), use_cache=False).last_hidden_state
        states, self._states = self._states, []
        return final, states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, length, vocabulary]`` of what :meth:`decode` gave, or of some of its positions."""
        # With the strides of a whole tensor. For some positions of a window, torch takes the head for a batch of
        # matrices and makes a transposed copy of it: 80 ms and 57 MB for 142 positions in place of 6 ms.
        hidden = hidden.flatten(0, -2).view(hidden.shape)
        logits: torch.Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
        return logits

    def train(self, names: Sequence[str], dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
        """Make the tensors that the checkpoint calls ``names`` trainable, in ``dtype``; gives them by these names."""
        found: dict[str, nn.Parameter] = {}
        wanted, skeleton = set(names), self.skeleton
        tied = {name: skeleton.names.get(source, "") for name, source in self._model.all_tied_weights_keys.items()}
        for module_name, stored in {**tied, **skeleton.names}.items():
            if stored not in wanted:
                continue
            if stored not in found:
                found[stored] = nn.Parameter(skeleton.checkpoint[stored].to(skeleton.device, dtype, copy=True))
            path, _, leaf = module_name.rpartition(".")
            setattr(self.module(path), leaf, found[stored])
        return {name: found[name] for name in names}

    def module(self, name: str) -> nn.Module:
        """A module by its name in the model, decoder and head alike."""
        base = self._model.base_model_prefix
        if name == base or name.startswith(f"{base}."):
            return self._decoder.get_submodule(name.removeprefix(base).removeprefix("."))
        found: nn.Module = self._model.get_submodule(name)
        return found

    @property
    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters of the output head that are trained."""
        return tuple(parameter for parameter in self._model.parameters() if parameter.requires_grad)

    def weights(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The values that the model has loaded of these tensors, by the names that the checkpoint has for them."""
        base = f"{self._model.base_model_prefix}."
        modules = {stored: name.removeprefix(base) for name, stored in self.skeleton.names.items()}
        return {name: self._decoder.get_parameter(modules[name]).data for name in names}

    def _record(self, slot: BlockSlot, hidden: torch.Tensor, call: BlockCall) -> Any:
        output = call(hidden)
        self._states.append(output[0] if isinstance(output, tuple) else output)
        return output
