"""Decoding speed at long context, original and artifact in turns, each in processes of its own.

A token takes the reading of all weights and of the whole cache of keys and values, so fewer key-value heads show here.
transformers writes, greedily, one sequence, with its default cache, which it copies for every token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.inspection import describe_model
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.report.report import Check
from llmconvert.report.section import Cell, Column, Section
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.validate.long_inputs.prefill import cache_nbytes
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.runtimes.isolated import UnmeasuredError, run_isolated
from llmconvert.validate.runtimes.transformers import not_loaded, runtime

__all__ = ["DecodingCheck", "measure_decoding"]

# Before the times count: kernels and allocations of first use.
_WARMUP = 4
# Read by the model itself; its cache is then repeated, because time does not depend on what a cache holds.
_SEED_TOKENS = 256
_TIMEOUT = 1800.0


def measure_decoding(
    directory: str, context: int, tokens: int, *, device: str, dtype: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Write ``tokens`` tokens greedily after a random text of ``context`` tokens.

    Args:
        directory: of the model.
        context: tokens in the cache when writing begins.
        dtype: what to compute in; the config's own by default.

    Returns:
        ``seconds`` per token, in order, and ``cache_bytes`` when they begin.
    """
    where = torch.device(device)
    kind = getattr(torch, dtype) if dtype is not None else None
    with runtime(Path(directory), device=where, dtype=kind) as loaded, torch.inference_mode():
        model = loaded.model
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(Architecture.of(model.config).vocab_size, (1, context), generator=generator).to(where)
        cache, last = _fill(model, ids)
        held, seconds = cache_nbytes(cache), []
        for _ in range(_WARMUP + tokens):
            begin = time.perf_counter()
            output = model(input_ids=last, past_key_values=cache, use_cache=True)
            last = output.logits[:, -1:].argmax(-1)
            last.cpu()  # waits for a device that works on its own
            seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds[_WARMUP:], "cache_bytes": held}


def _fill(model: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A cache of as many tokens as ``ids``, and the token to go on with.

    Layers that keep everything are filled by repeating what a short text leaves; if any keeps a window only, the whole
    text is read.
    """
    from transformers.cache_utils import DynamicLayer

    context = ids.shape[1]
    output = model(input_ids=ids[:, :_SEED_TOKENS], use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    if context > _SEED_TOKENS:
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            repeats = -(-context // _SEED_TOKENS)
            for layer in cache.layers:
                layer.keys, layer.values = (
                    part.repeat(1, 1, repeats, 1)[:, :, :context].contiguous() for part in (layer.keys, layer.values)
                )
        else:
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
    return cache, output.logits[:, -1:].argmax(-1)


@dataclass(frozen=True, slots=True)
class DecodingCheck(Measurement):
    """Tokens per second at long context as a measurement.

    Attributes:
        context: tokens in the cache.
        tokens: written and timed, per turn.
        rounds: turns of original and artifact.
        asked: whether the recipe asks for it; where it is measured by default it may be left out.
    """

    context: int = 4096
    tokens: int = 32
    rounds: int = 2
    asked: bool = True

    def measure(self, subject: Subject) -> list[Check]:
        """One check, the artifact's speed beside the original's, or the reason why there is none."""
        name, label = "decoding.tokens_per_second", f"Speed of writing after {self.context:,} tokens"
        try:
            found = self._turns(subject)
        except UnmeasuredError as error:
            return [Check.unmeasured(name, str(error), asked=self.asked, label=label, quiet=True)]
        speed = {model: 1 / statistics.median(turn["median"] for turn in turns) for model, turns in found.items()}
        ratio = f"{speed['artifact'] / speed['original']:.2f} × the original's, " if "original" in speed else ""
        runs = "one sequence, greedy, by transformers with its default cache"
        return [
            Check(
                name=name,
                label=label,
                value=speed["artifact"],
                reference=speed.get("original"),
                unit="tokens/s",
                detail={"text": f"{ratio}{runs}", "context": self.context, "turns": found},
                sections=(self._section(found, subject),),
            )
        ]

    def _turns(self, subject: Subject) -> dict[str, list[dict[str, float]]]:
        """Median, fastest and slowest seconds per token of every turn, and the bytes of the cache, by model."""
        if unloadable := subject.unloadable:
            raise UnmeasuredError(unloadable)
        models: dict[str, tuple[Path, Checkpoint]] = {}
        if isinstance(subject.reference, SafetensorsCheckpoint) and subject.original is not None:
            models["original"] = subject.reference.directory, subject.original
        models["artifact"] = subject.artifact, subject.dense
        for directory, dense in models.values():
            limit = describe_model(dense).position_limit
            if limit is not None and self.context + _WARMUP + self.tokens > limit:
                raise UnmeasuredError(f"{directory.name} takes {limit:,} positions")
            if reason := not_loaded(dense, subject.device, subject.memory):
                raise UnmeasuredError(reason)
        found: dict[str, list[dict[str, float]]] = {model: [] for model in models}
        with subject.progress.task("decoding", self.rounds * len(models)) as task:
            for _ in range(self.rounds):
                for model, (directory, _dense) in models.items():
                    answer: Mapping[str, Any] = run_isolated(
                        "llmconvert.validate.long_inputs.decoding:measure_decoding",
                        {
                            "directory": str(directory),
                            "context": self.context,
                            "tokens": self.tokens,
                            "device": str(subject.device),
                            "dtype": str(subject.dtype).removeprefix("torch.") if subject.dtype is not None else None,
                            "seed": subject.seed,
                        },
                        timeout=_TIMEOUT,
                    )
                    seconds = answer["seconds"]
                    found[model].append(
                        {
                            "median": statistics.median(seconds),
                            "fastest": min(seconds),
                            "slowest": max(seconds),
                            "cache_bytes": answer["cache_bytes"],
                        }
                    )
                    task.advance(1, f"{model}: {1 / found[model][-1]['median']:.1f} tokens/s")
        return found

    def _section(self, found: Mapping[str, list[dict[str, float]]], subject: Subject) -> Section:
        rows: list[tuple[Cell, ...]] = [
            (
                model,
                float(number + 1),
                1 / turn["median"],
                1 / turn["slowest"],
                1 / turn["fastest"],
                turn["cache_bytes"],
            )
            for number in range(self.rounds)
            for model, turns in found.items()
            for turn in turns[number : number + 1]
        ]
        return Section(
            name="decoding",
            title=f"Speed of writing after {self.context:,} tokens",
            text=f"{self.tokens} tokens of one sequence, greedy, by transformers on {subject.device}, a process for "
            "every turn, after a cache of that many tokens. transformers unpacks weights of fewer bits, maybe slower "
            "with them; what a smaller cache gains shows where the weights are the same.",
            columns=(
                Column(heading="model"),
                Column(heading="turn"),
                Column(heading="median", unit="tokens/s"),
                Column(heading="slowest", unit="tokens/s"),
                Column(heading="fastest", unit="tokens/s"),
                Column(heading="cache", unit="bytes"),
            ),
            rows=tuple(rows),
        )
