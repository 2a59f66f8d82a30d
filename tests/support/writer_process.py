"""The writers that need no Hub, on tiny models: each call in a process of its own, to be held or killed at any step."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from support.disguised_heads import grouped_model
from support.quantize_process import FileLog, FileSteps
from support.tiny_architectures import ids
from support.tiny_models import tiny_tokenizer

from llmconvert.context import Context
from llmconvert.convert.dtype import convert_dtype
from llmconvert.convert.gqa.job import convert_attention
from llmconvert.convert.heal.job import heal_attention
from llmconvert.convert.heal.options import HealOptions
from llmconvert.errors import OutputError
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.progress import Progress
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.requantize import RequantizeRequest, plan_requantize
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage import artifact
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

__all__ = ["REFUSED", "WRITERS", "make_sources", "start"]

#: What a process ends with when it is refused; its log says why.
REFUSED = 2
_CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["llmconvert.quantize.job", "transformers.models.llama.modeling_llama"])
_CPU = torch.device("cpu")
_WINDOWS = ids((24,) * 6, seed=3)
_W4, _W8 = Scheme(Int(4), 32), Scheme(Int(8), 32)
_CHANGED = "model.layers.1.mlp.down_proj"
_SHARD_NBYTES = 40_000


def make_sources(directory: Path) -> None:
    """The models that the writers read: an original, itself with one key-value head, and a quantized one."""
    model = grouped_model(directory / "model", "llama", kv_heads=4, hidden_size=64, vocab_size=320)
    tiny_tokenizer().save_pretrained(model)
    with SafetensorsCheckpoint(model) as source:
        convert_attention(source, directory / "merged", kv_heads=1)
        quantize_checkpoint(source, directory / "quantized", method="gptq", scheme=_W4, windows=_WINDOWS)


def _dtype(sources: Path, output: Path, progress: Progress) -> None:
    source = SafetensorsCheckpoint(sources / "model")
    convert_dtype(source, output, dtype=torch.float16, max_shard_bytes=_SHARD_NBYTES, progress=progress)


def _attention(sources: Path, output: Path, progress: Progress) -> None:
    source = SafetensorsCheckpoint(sources / "model")
    convert_attention(source, output, kv_heads=1, max_shard_bytes=_SHARD_NBYTES, progress=progress)


def _refit(sources: Path, output: Path, progress: Progress) -> None:
    source = SafetensorsCheckpoint(sources / "model")
    convert_attention(source, output, kv_heads=1, windows=_WINDOWS, progress=progress)


def _heal(sources: Path, output: Path, progress: Progress) -> None:
    original, merged = (SafetensorsCheckpoint(sources / name) for name in ("model", "merged"))
    options = HealOptions(steps=4, held_out=2, evaluate_every=2, save_every=1)
    heal_attention(original, merged, output, windows=_WINDOWS, options=options, progress=progress)


def _quantize(sources: Path, output: Path, progress: Progress) -> None:
    source = SafetensorsCheckpoint(sources / "model")
    quantize_checkpoint(source, output, method="gptq", scheme=_W4, windows=_WINDOWS, progress=progress)


def _requantize(sources: Path, output: Path, progress: Progress) -> None:
    before = dict.fromkeys(_linears(sources), _W4)
    plan_requantize(
        sources / "quantized",
        SafetensorsCheckpoint(sources / "model"),
        output,
        RequantizeRequest("gptq", "compressed-tensors", before, {_CHANGED: _W8}),
        record=output.with_name("layers.json"),
        windows=_WINDOWS,
        context=Context(progress=progress),
    ).run()


def _gguf(sources: Path, output: Path, progress: Progress) -> None:
    source = SafetensorsCheckpoint(sources / "model")
    settings: dict[str, Any] = {"method": "imatrix", "scheme": MIXES["q8_0"], "format": "gguf", "name": "tiny"}
    quantize_checkpoint(source, output, windows=_WINDOWS, progress=progress, **settings)


def _carried(sources: Path, output: Path, progress: Progress) -> None:
    source = SafetensorsCheckpoint(sources / "model")
    settings: dict[str, Any] = {"method": "gptq", "scheme": _W4, "format": "gguf", "name": "tiny"}
    quantize_checkpoint(source, output, windows=_WINDOWS, progress=progress, **settings)


WRITERS: Mapping[str, Callable[[Path, Path, Progress], None]] = {
    "dtype": _dtype,
    "attention": _attention,
    "attention refitted": _refit,
    "healing": _heal,
    "quantization": _quantize,
    "requantization": _requantize,
    "GGUF": _gguf,
    "GGUF of gptq": _carried,
}


def _linears(sources: Path) -> list[str]:
    with SafetensorsCheckpoint(sources / "model") as source:
        return [name.removesuffix(".weight") for name in source if name.endswith("_proj.weight")]


def start(
    writer: str, sources: Path, output: Path, log: Path, *, kill_at: int = 0, hold_at: int = 0, held: Path | None = None
) -> ForkServerProcess:
    """Start a writer; it ends with code 0, with :data:`REFUSED`, with 1 after another exception, or is killed.

    Args:
        sources: what :func:`make_sources` filled.
        log: gets what is reported, and ``steps N`` at the end.
        kill_at, hold_at, held: see :class:`support.quantize_process.FileSteps`.
    """
    process = _CONTEXT.Process(target=_run, args=(writer, sources, output, log, kill_at, hold_at, held))
    process.start()
    return process


def _run(writer: str, sources: Path, output: Path, log: Path, kill_at: int, hold_at: int, held: Path | None) -> None:
    torch.set_num_threads(1)
    artifact._SYNC_SECONDS = 0  # so that quick pieces are journaled at all
    progress = FileLog(log)
    steps = FileSteps(kill_at, hold_at, held)
    try:
        WRITERS[writer](sources, output, progress)
    except OutputError as error:
        progress.log(str(error))
        os._exit(REFUSED)
    except BaseException:
        progress.log(traceback.format_exc())
        os._exit(1)
    progress.log(f"steps {steps.count}")
