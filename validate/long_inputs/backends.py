"""Attention backends that transformers can run a model with, and whether a given model can run with them.

``eager`` writes out the matrix of scores, length × length for every head. ``math`` is the same inside PyTorch's
``scaled_dot_product_attention``. ``flash`` (Dao et al. 2022, arXiv 2205.14135; 2023, arXiv 2307.08691) computes the
same output tile by tile and never holds the matrix: on CUDA and on CPU as a kernel of PyTorch, on CUDA also from the
packages flash-attn 2 and 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llmconvert.engine.architecture.decoder import Architecture

__all__ = ["BACKENDS", "Backend", "Kernels", "activate", "best_backend", "refusal"]


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation.

    Attributes:
        attention: what transformers calls it.
        kernel: the one SDPA backend that may run (a name in ``torch.nn.attention.SDPBackend``); None for any.
        proof: what must occur in the name of an operator that ran; empty where nothing can be told.
        package: the Python package it comes from, if not PyTorch.
        quadratic: whether its memory grows with the square of the length.
    """

    attention: str
    kernel: str | None = None
    proof: str = ""
    package: str | None = None
    quadratic: bool = False

    @property
    def cuda_only(self) -> bool:
        """Whether it has no CPU kernel."""
        return self.package is not None or self.kernel in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION")


BACKENDS: Mapping[str, Backend] = {
    "eager": Backend("eager", quadratic=True),
    "math": Backend("sdpa", "MATH", quadratic=True),
    "flash": Backend("sdpa", "FLASH_ATTENTION", "flash_attention"),
    "efficient": Backend("sdpa", "EFFICIENT_ATTENTION", "efficient_attention"),
    "cudnn": Backend("sdpa", "CUDNN_ATTENTION", "cudnn_attention"),
    "sdpa": Backend("sdpa"),
    "flash_attention_2": Backend("flash_attention_2", package="flash_attn"),
    "flash_attention_3": Backend("flash_attention_3", package="flash_attn_interface"),
}


def refusal(name: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Why a model can't run with the backend ``name`` here; empty if it can, as far as the config tells."""
    backend = BACKENDS[name]
    if backend.cuda_only and device.type != "cuda":
        return f"{name} has kernels for CUDA only; this is {device.type}"
    if backend.package is not None and find_spec(backend.package) is None:
        return f"the package {backend.package} is not installed"
    if backend.package is not None and dtype not in (torch.float16, torch.bfloat16):
        return f"{name} computes in 16 bits only; the model is in {str(dtype).removeprefix('torch.')}"
    if backend.attention == "eager":
        return ""
    found = Architecture.of(config)
    cap = found.softcap
    if cap and backend.attention == "sdpa":
        return f"the model caps its attention scores at ±{cap:g}, which no SDPA kernel does"
    if found.uses_alibi and not backend.quadratic:
        return "the model adds ALiBi biases to its scores, a matrix of length × length that this kernel is to avoid"
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    flag = "_supports_sdpa" if backend.attention == "sdpa" else "_supports_flash_attn"
    if model is not None and not getattr(model, flag, True):
        return f"transformers has no {backend.attention} attention for {config.model_type!r}"
    return ""


def best_backend(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The backend with the least memory that the model can run with: flash if it can, else eager."""
    return "eager" if refusal("flash", config, device, dtype) else "flash"


@contextlib.contextmanager
def activate(model: Any, name: str) -> Iterator[None]:
    """Run ``model`` (of transformers) with the backend ``name``, and no other kernel, while the context is open."""
    backend = BACKENDS[name]
    before = model.config._attn_implementation
    model.set_attn_implementation(backend.attention)
    try:
        if backend.kernel is None:
            yield
        else:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel([getattr(SDPBackend, backend.kernel)]):
                yield
    finally:
        model.set_attn_implementation(before)


class Kernels(TorchDispatchMode):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """Context manager that notes which attention operators of PyTorch ran, in :attr:`names`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "attention" in name or "softmax" in name:
            self.names.add(name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))
