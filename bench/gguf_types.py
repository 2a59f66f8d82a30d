"""GGUF types against llama.cpp's own quantization of the same weights: size, perplexity, speed.

    python bench/dither.py MODEL build/dithered
    python bench/gguf_types.py build/dithered --calibration wikitext2-valid.txt --text wikitext2-test.txt

Both sides quantize the same tensors into the same types with the same importance matrix. llama.cpp's side is
``ggml_quantize_chunk`` out of xllamacpp's library, which is what ``llama-quantize`` calls. One evaluator runs both
sides' decoded weights. Speed is measured on random normal weights, in one thread, in alternating rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from llmconvert.checkpoint import Checkpoint, CheckpointView, SafetensorsCheckpoint
from llmconvert.convert.gguf_export import export_checkpoint
from llmconvert.engine.stream import stream_logits
from llmconvert.quantize.ggml.blocks import load_codec
from llmconvert.quantize.ggml.mix import GgmlMix, MixContext
from llmconvert.quantize.importance import collect_importance
from llmconvert.recipes.recipe import CalibrateSettings, PerplexitySettings
from llmconvert.recipes.windows import WindowRequest
from llmconvert.validate.perplexity import perplexity

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from ggml_reference import ggml_quantize

Encoder = Callable[[str, np.ndarray, np.ndarray | None], np.ndarray]


def ours(name: str, values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return load_codec(name).encode(values, importance)


def theirs(name: str, values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return ggml_quantize(values, name, importance)


class QuantizedAs(CheckpointView):
    """A checkpoint whose matrices have been through GGUF types."""

    def __init__(
        self, base: Checkpoint, mix: GgmlMix, encode: Encoder, importance: dict[str, torch.Tensor] | None
    ) -> None:
        super().__init__(base)
        export = export_checkpoint(base, "bench")
        context = MixContext(export.layers, export.tied, importance is not None)
        self.types = {t.source: mix.type_of(t.name, t.shape, context) for t in export.tensors}
        self.encode, self.importance = encode, importance or {}
        self.size = sum(
            int(np.prod(t.shape)) // load_codec(self.types[t.source]).size * load_codec(self.types[t.source]).nbytes
            for t in export.tensors
        )

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = super().read_rows(name, start, stop)
        kind = self.types.get(name, "F32")
        if kind in ("F32", "F16", "BF16") or rows.ndim < 2:
            return rows
        weights = self.importance.get(name)
        raw = self.encode(kind, rows.float().contiguous().numpy(), weights.numpy() if weights is not None else None)
        return torch.from_numpy(load_codec(kind).decode(raw)).to(rows.dtype)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--mixes", default="q4_0,q4_k_s,q4_k_m,q5_k_m")
    options = parser.parse_args()
    with SafetensorsCheckpoint(options.model) as model:
        evaluation = WindowRequest.evaluation(
            PerplexitySettings(dataset=options.text, window=options.window, max_windows=options.windows)
        )
        windows = evaluation.draw(model, evaluation.corpus()).windows
        calibration = WindowRequest.calibration(
            CalibrateSettings(dataset=options.calibration, samples=options.samples, length=options.window)
        )
        importance = collect_importance(model, calibration.draw(model, calibration.corpus()).windows)
        print(f"unquantized: perplexity {score(model, windows):.3f}\n", flush=True)
        print("| type | MB | ours | llama.cpp | ours, imatrix | llama.cpp, imatrix |")
        print("|---|--:|--:|--:|--:|--:|", flush=True)
        for name in options.mixes.split(","):
            mix = GgmlMix.parse(name)
            views = [
                QuantizedAs(model, mix, encode, weights) for weights in (None, importance) for encode in (ours, theirs)
            ]
            scores = [f"{score(view, windows):.3f}" for view in views]
            print(f"| {name} | {views[0].size / 1e6:.1f} | {' | '.join(scores)} |", flush=True)
    speed()


def score(checkpoint: Checkpoint, windows: tuple[torch.Tensor, ...]) -> float:
    logits = stream_logits(checkpoint, windows, device=torch.device("cpu"), dtype=torch.bfloat16)
    return perplexity(logits, windows).ppl


def speed(rows: int = 1024, columns: int = 4096, rounds: int = 5) -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    values = (random.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    weights = np.exp(random.standard_normal(columns)).astype(np.float32)
    print("\n| type | ours, million weights/s | llama.cpp | ours, imatrix | llama.cpp, imatrix |")
    print("|---|--:|--:|--:|--:|")
    for name in ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K"):
        cases = [(encode, given) for given in (None, weights) for encode in (ours, theirs)]
        times: list[list[float]] = [[] for _ in cases]
        for round_ in range(rounds + 1):
            for (encode, given), spent in zip(cases, times, strict=True):
                begin = time.perf_counter()
                encode(name, values, given)
                if round_:  # the first compiles
                    spent.append(time.perf_counter() - begin)
        print(f"| {name} | {' | '.join(f'{values.size / median(spent) / 1e6:.0f}' for spent in times)} |", flush=True)


if __name__ == "__main__":
    main()
