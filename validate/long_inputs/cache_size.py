"""KV cache size: transformers' own cache, filled on the ``meta`` device, against the formula.

The model's own forward fills transformers' own cache on the ``meta`` device: every tensor has its shape and dtype and
no memory, so any context and batch can be measured, whatever the machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmconvert.convert.inspection import describe_model
from llmconvert.convert.kv_cache import CacheLayout, cache_layout
from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.architecture.model import build_meta_model
from llmconvert.errors import LlmconvertError
from llmconvert.machine import of_machine
from llmconvert.report.report import Check
from llmconvert.report.section import Column, Section
from llmconvert.validate.long_inputs.prefill import cache_nbytes
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.runtimes.isolated import UnmeasuredError

__all__ = ["CACHE_DTYPES", "CacheCheck", "measured_cache_nbytes"]

#: Cache dtypes: name → bytes per number.
CACHE_DTYPES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "fp8": 1}


def measured_cache_nbytes(config: Mapping[str, Any], context: int, batch: int = 1, dtype: str = "bfloat16") -> int:
    """Bytes of the cache that a model of ``config`` fills when it reads ``batch`` prompts of ``context`` tokens.

    Args:
        config: parsed ``config.json``.
        dtype: one of :data:`CACHE_DTYPES`.

    Raises:
        UnmeasuredError: the model can't run on shapes alone, or transformers has no such cache for it.
    """
    built = build_config(config)
    wide = torch.float32 if dtype == "float32" else torch.bfloat16
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build_meta_model(built, wide, "sdpa")
            arguments: dict[str, Any] = {}
            if dtype == "fp8":
                from transformers import QuantizedCache

                arguments["past_key_values"] = QuantizedCache("fp8", built)
            with torch.inference_mode():
                ids = torch.zeros((batch, context), dtype=torch.int64, device="meta")
                output = model(input_ids=ids, use_cache=True, **arguments)
    except (RuntimeError, ValueError, NotImplementedError, TypeError, AttributeError, LlmconvertError) as error:
        if of_machine(error):
            raise
        text = str(error).strip()
        raise UnmeasuredError(text.splitlines()[0] if text else type(error).__name__) from error
    return cache_nbytes(output.past_key_values)


@dataclass(frozen=True, slots=True)
class CacheCheck(Measurement):
    """Bytes of the key-value cache as a measurement.

    Attributes:
        contexts: tokens that the cache holds; those beyond the model's positions are left out.
        batches: sequences in it.
    """

    contexts: tuple[int, ...] = (2048, 8192, 32768)
    batches: tuple[int, ...] = (1, 8)

    def measure(self, subject: Subject) -> list[Check]:
        """One check: bytes per token in 16 bits, or in 8 if the artifact has scales for it; with a table by context,
        batch and dtype."""
        layout = cache_layout(Architecture.of(subject.stored.config))
        rows: list[tuple[float | str | None, ...]] = []
        wrong: list[str] = []
        reason = ""
        summary = describe_model(subject.stored)
        limit = summary.position_limit
        contexts = [context for context in self.contexts if limit is None or context <= limit]
        for dtype, itemsize in CACHE_DTYPES.items():
            for batch in self.batches:
                for context in contexts:
                    computed = layout.nbytes(context, batch, itemsize)
                    try:
                        measured = measured_cache_nbytes(subject.dense.config, context, batch, dtype)
                    except UnmeasuredError as error:
                        reason = reason or str(error)
                        rows.append((dtype, float(batch), float(context), float(computed), None, "computed"))
                        continue
                    if measured != computed:
                        wrong.append(
                            f"{dtype}, batch {batch}, {context:,} tokens: {measured:,} instead of {computed:,}"
                        )
                    rows.append((dtype, float(batch), float(context), float(computed), float(measured), "measured"))
        heads = f"{summary.attention}, {summary.query_heads} query heads over {summary.kv_heads} key-value heads"
        itemsize = 1 if subject.dense.quantized_cache else 2
        text = f"{heads}; keys and values in E4M3, by the artifact's own scales" if itemsize == 1 else heads
        if len(contexts) < len(self.contexts):
            text += f"; contexts beyond the model's {limit:,} positions are left out"
        if wrong:
            text += f"; the cache of transformers is not what the formula says: {wrong[0]}"
        if reason:
            text += f"; not measured where the table says computed: {reason}"
        return [
            Check(
                name="kv_cache.bytes_per_token",
                label=f"KV cache per token, {8 * itemsize} bits",
                value=layout.bytes_per_token(itemsize),
                reference=_reference(subject),
                ok=not wrong,
                unit="bytes",
                detail={"text": text, "differences": wrong, "attention": summary.attention},
                sections=(_section(heads, rows, layout),),
            )
        ]


def _reference(subject: Subject) -> float | None:
    if subject.reference is None:
        return None
    return float(cache_layout(Architecture.of(subject.reference.config)).bytes_per_token())


def _section(heads: str, rows: list[tuple[float | str | None, ...]], layout: CacheLayout) -> Section:
    sliding = sum(layer.tokens is not None for layer in layout.layers)
    text = f"{heads}. Measured: transformers' cache, filled by the model's own forward on shapes alone."
    if sliding:
        text += f" {sliding} of {len(layout.layers)} layers keep a sliding window only."
    return Section(
        name="kv-cache",
        title="KV cache",
        text=text,
        columns=(
            Column(heading="dtype"),
            Column(heading="batch"),
            Column(heading="tokens"),
            Column(heading="formula", unit="bytes"),
            Column(heading="cache", unit="bytes"),
            Column(heading=""),
        ),
        rows=tuple(rows),
    )
