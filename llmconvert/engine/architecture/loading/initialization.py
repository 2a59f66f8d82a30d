"""Weights that a class asks its linears for while transformers loads a checkpoint into it.

transformers lets every module initialize what the checkpoint didn't hold. Some classes set the weights of their linears
there by name, whether they are to be set or not. A linear whose weight is packed into other tensors has none, and such
a class cannot be loaded with it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["weights_asked_for"]

_WEIGHT = "weight"


def weights_asked_for(model: PreTrainedModel, linears: Collection[str]) -> frozenset[str]:
    """Those of some linears without which the class of ``model`` fails where it initializes weights.

    Args:
        model: on the meta device; of no use afterwards.
        linears: names of its modules whose weights are packed.
    """
    packed: dict[nn.Module, str] = {}
    asked: list[nn.Module] = []
    # Where none of them is inside, none can be asked for.
    holders = {name[:end] for name in linears for end, letter in enumerate(name) if letter == "."} | {"", *linears}
    around = {model.get_submodule(name) for name in holders}
    for name in linears:
        module = model.get_submodule(name)
        packed[module] = name
        del module._parameters[_WEIGHT]
        module.__class__ = _without_weight(type(module), asked)
    found: set[str] = set()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for owner, module in _owners(model):
            while module in around:
                asked.clear()
                try:
                    owner._init_weights(module)
                except AttributeError:
                    if not asked or packed.get(asked[-1]) in (None, *found):
                        break  # it fails for another reason: not ours to tell
                    found.add(packed[asked[-1]])
                    asked[-1]._parameters[_WEIGHT] = nn.Parameter(torch.empty(0, 0, device="meta"), requires_grad=False)
                except Exception:
                    break
                else:
                    break
    return frozenset(found)


def _without_weight(kind: type[nn.Module], asked: list[nn.Module]) -> type[nn.Module]:
    """The class of a linear that notes whenever somebody asks for the weight that it doesn't have."""

    def missing(self: nn.Module, name: str) -> Any:
        if name == _WEIGHT and _WEIGHT not in self._parameters:
            asked.append(self)
        return nn.Module.__getattr__(self, name)

    return type(kind.__name__, (kind,), {"__getattr__": missing})


def _owners(model: PreTrainedModel) -> list[tuple[PreTrainedModel, nn.Module]]:
    """Every module, with the model that initializes it: the innermost that holds it."""
    owners: list[tuple[PreTrainedModel, nn.Module]] = []

    def walk(owner: PreTrainedModel, module: nn.Module) -> None:
        for child in module.children():
            walk(child if isinstance(child, PreTrainedModel) else owner, child)
        owners.append((owner, module))

    walk(model, model)
    return owners
