"""What this machine has for the work: versions, processor, kernels, GPUs, memory, disk, readers, the Hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch

from llmconvert.compute.dot_products import use_dot_products
from llmconvert.compute.precision import compute_dtype, cpu_has
from llmconvert.hub.retry import TRANSPORT_ERROR
from llmconvert.memory import available_nbytes
from llmconvert.quantize.catalog.formats import FORMATS, library_of, loaders_of
from llmconvert.quantize.runtimes import RUNTIMES
from llmconvert.report.report import environment
from llmconvert.validate.long_inputs.backends import BACKENDS

__all__ = ["Finding", "examine"]

_INSTRUCTIONS = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "sve", "bf16")
# Packages that something asks for, and what for.
_OPTIONAL = {
    "datasets": "texts from the Hub (pip install 'llmconvert[datasets]')",
    "lm_eval": "validate.tasks (pip install 'llmconvert[lm-eval]')",
    "vllm": "logits of vLLM beside ours",
    "xllamacpp": "GGUF files in llama.cpp, in the tests",
    "mlx_lm": "MLX artifacts (pip install mlx-lm)",
    "triton": "compiled kernels on a GPU",
    "flash_attn": "flash attention 2",
}
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and whether something has to be done about it.

    Attributes:
        topic: ``memory``, ``hub``, …
        found: in words.
        advice: what to do; empty where all is well.
    """

    topic: str
    found: str
    advice: str = ""


def examine(directory: Path, *, network: bool = True) -> Iterator[Finding]:
    """Look at everything; nothing is written.

    Args:
        directory: where work would be kept, whose disk counts.
        network: ask the Hub whether it is there, and who one is.
    """
    yield Finding("versions", ", ".join(f"{name} {version}" for name, version in environment().items()))
    yield from _processor()
    yield from _devices()
    yield Finding("memory", f"{available_nbytes(torch.device('cpu')) / 1e9:,.1f} GB free")
    usage = shutil.disk_usage(directory)
    yield Finding("disk", f"{usage.free / 1e9:,.1f} GB free of {usage.total / 1e9:,.1f} GB in {directory.resolve()}")
    yield from _attention()
    yield from _readers()
    yield from _packages()
    yield _hub(network=network)


def _processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    has = [name for name in _INSTRUCTIONS if cpu_has(name)]
    yield Finding(
        "processor", f"{platform.machine()}, {cores} cores for this process, {', '.join(has) or 'no vectors'}"
    )
    if compute_dtype(torch.device("cpu")) != torch.bfloat16:
        kernels = "products and attention in float32 (no instructions for bfloat16)"
    elif use_dot_products():
        kernels = "products in bfloat16, moments by vdpbf16ps, attention in tiles"
    else:
        kernels = "products and attention in bfloat16 by oneDNN (AMX)"
    threads = torch.get_num_threads()
    yield Finding("kernels", f"{kernels}; {threads} thread{'s' if threads > 1 else ''}")


def _devices() -> Iterator[Finding]:
    if not torch.backends.cuda.is_built():
        yield Finding("gpu", "none: this torch is built without CUDA")
        return
    count = torch.cuda.device_count()
    if not count:
        yield Finding("gpu", "none found", "check the driver and CUDA_VISIBLE_DEVICES, if there should be one")
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("gpu", f"cuda:{index}: {name}, {free / 1e9:,.1f} GB free of {total / 1e9:,.1f} GB")


def _attention() -> Iterator[Finding]:
    here, gpu = [], torch.cuda.is_available()
    for name, backend in BACKENDS.items():
        installed = backend.package is None or importlib.util.find_spec(backend.package) is not None
        if installed and (gpu or not backend.cuda_only):
            here.append(name)
    yield Finding("attention", ", ".join(here))


def _readers() -> Iterator[Finding]:
    """Which formats can be loaded here by the library that cards name, and which runtimes there are."""
    for name in FORMATS:
        library, *packages = library_of(name), *loaders_of(name)
        if library != "transformers":
            continue  # what reads it is among the readers, or is not installed
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        advice = f"pip install {' '.join(missing)}" if missing else ""
        yield Finding(
            f"format {name}", f"transformers {'lacks ' + ', '.join(missing) if missing else 'loads it'}", advice
        )
    versions = {runtime.packages[0]: _version(runtime.packages[0]) for runtime in RUNTIMES}
    found = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    yield Finding("readers", found or "none")


def _packages() -> Iterator[Finding]:
    missing = {name: what for name, what in _OPTIONAL.items() if importlib.util.find_spec(name) is None}
    if missing:
        yield Finding("not installed", "; ".join(f"{name}, for {what}" for name, what in missing.items()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hub(*, network: bool) -> Finding:
    endpoint, token = huggingface_hub.constants.ENDPOINT, huggingface_hub.get_token()
    login = "hf auth login, or HF_TOKEN, for models that ask for it and to publish"
    if huggingface_hub.constants.HF_HUB_OFFLINE or not network:
        return Finding("hub", f"not asked, {'a token is set' if token else 'no token'}", "" if token else login)
    try:
        if token is None:
            response = huggingface_hub.get_session().get(f"{endpoint}/api/models?limit=1", timeout=_PATIENCE_SECONDS)
            response.raise_for_status()
            return Finding("hub", f"{endpoint} answers, not logged in", login)
        name = huggingface_hub.HfApi().whoami()["name"]
    except (huggingface_hub.errors.HfHubHTTPError, TRANSPORT_ERROR, OSError) as error:
        said = type(error).__name__
        return Finding("hub", f"{endpoint} can't be used ({said})", "check the network, HF_ENDPOINT and HF_TOKEN")
    return Finding("hub", f"{endpoint} answers, logged in as {name}")
