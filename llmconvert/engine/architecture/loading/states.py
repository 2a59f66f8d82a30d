"""Parameters and buffers of a module by their names: those that checkpoints hold, and how they are set."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["assign", "dtype_of", "own_states"]


def own_states(module: nn.Module, recurse: bool = True) -> list[str]:
    """Names of the parameters and persistent buffers of a module, and of all in it."""
    states = [name for name, _ in module.named_parameters(recurse=recurse)]
    for prefix, child in module.named_modules() if recurse else [("", module)]:
        persistent = set(child._buffers) - child._non_persistent_buffers_set
        states += [f"{prefix}.{name}" if prefix else name for name in sorted(persistent)]
    return states


def dtype_of(module: nn.Module, name: str) -> torch.dtype:
    """Of a parameter or buffer; some classes keep routers in float32 whatever the model's dtype is."""
    path, _, leaf = name.rpartition(".")
    state: torch.Tensor = getattr(module.get_submodule(path), leaf)
    return state.dtype


def assign(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Set a parameter or buffer; None returns it to the meta device."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    current = getattr(owner, leaf)
    if value is None:
        value = torch.empty_like(current, device="meta")
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        owner._parameters[leaf] = parameter
