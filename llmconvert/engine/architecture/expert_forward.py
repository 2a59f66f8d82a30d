"""A class's own forward of experts, run with one of them, up to where something is multiplied or added."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llmconvert.engine.architecture.experts import ExpertsLayout

__all__ = ["Interrupt", "Product", "Sum", "with_own_parameters"]


def with_own_parameters(module: nn.Module, layout: ExpertsLayout) -> nn.Module:
    """A copy of the experts' module whose parameters can be set without the module's own."""
    found = copy.copy(module)
    found._parameters, found._modules = dict(module._parameters), dict(module._modules)
    for child in {leaf.rpartition(".")[0] for leaf in layout.parts} - {""}:
        inner = copy.copy(module.get_submodule(child))
        inner._parameters = dict(inner._parameters)
        found._modules[child] = inner
    return found


class Interrupt(BaseException):
    """Carries a tensor out of a forward that need not be finished."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value


class Sum(TorchFunctionMode):
    """Ends a forward where something is added to rows of its output, with what that was."""

    what = "sum over experts"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.index_add_:
            raise Interrupt(args[3])
        return func(*args, **(kwargs or {}))


class Product(TorchFunctionMode):
    """Ends a forward where something is multiplied by a parameter, with what that was."""

    what = "product with its down projection"

    def __init__(self, parameter: torch.Tensor) -> None:
        super().__init__()
        self._storage = parameter.untyped_storage().data_ptr()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factor = args[1] if len(args) > 1 else None
        if isinstance(factor, torch.Tensor) and factor.dim() > 1 and self._is_part(factor):
            raise Interrupt(args[0])
        return func(*args, **(kwargs or {}))

    def _is_part(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self._storage
