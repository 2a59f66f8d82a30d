"""GGUF types against llama.cpp's own quantization of the same weights: size, perplexity, speed.

    python bench/dither.py MODEL build/dithered
    python bench/gguf_types.py build/dithered --calibration wikitext2-valid.txt --text wikitext2-test.txt

Both sides quantize the same tensors into the same types with the same importance matrix. llama.cpp's side is
``ggml_quantize_chunk`` out of xllamacpp's library, which is what ``llama-quantize`` calls. Errors are those of all
matrices whose rows are whole super-blocks, squared, weighted by the importance matrix (or not), relative to the
weights' own squares. One evaluator runs both sides' decoded weights. Speed is measured on random normal weights, in one
thread, in alternating rounds.
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

from llmconvert.convert.cast import CastView
from llmconvert.engine.evaluation import stream_logits
from llmconvert.gguf.export import export_checkpoint
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.gguf.ggml.mix import GgmlMix, MixContext
from llmconvert.recipes.schema.measuring import PerplexitySettings
from llmconvert.recipes.schema.recipe import CalibrateSettings
from llmconvert.recipes.stages.windows import WindowRequest
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, SafetensorsCheckpoint
from llmconvert.validate.predictions.perplexity import perplexity

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from support.ggml_reference import ggml_quantize
from support.importance import collect_importance

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
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--mixes", default="q4_0,q4_k_m,q6_k")
    parser.add_argument("--parts", default="errors,perplexity,speed")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if parts != ["speed"]:
        with SafetensorsCheckpoint(options.model) as source:
            # In float32, so that decoded values stay as they are.
            model = CastView(source, torch.float32)
            calibration = WindowRequest.calibration(
                CalibrateSettings(dataset=options.calibration, samples=options.samples, length=options.window)
            )
            importance = collect_importance(model, calibration.draw(model, calibration.corpus()).windows)
            if "errors" in parts:
                errors(model, importance)
            if "perplexity" in parts:
                evaluation = WindowRequest.evaluation(
                    PerplexitySettings(dataset=options.text, window=options.window, max_windows=options.windows)
                )
                windows = evaluation.draw(model, evaluation.corpus()).windows
                perplexities(model, importance, windows, options.mixes.split(","))
    if "speed" in parts:
        speed()


def errors(model: Checkpoint, importance: dict[str, torch.Tensor]) -> None:
    names = [name for name in importance if model.infos[name].shape[1] % 256 == 0]
    print(f"relative squared error of {len(names)} matrices, in millionths\n")
    print("| type | ours | llama.cpp | ours, imatrix, weighted | llama.cpp, imatrix, weighted |")
    print("|---|--:|--:|--:|--:|", flush=True)
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"):
        lost, total = np.zeros(4), np.zeros(4)
        for name in names:
            values, weights = model[name].float().numpy(), importance[name].numpy()
            for index, (given, encode) in enumerate((g, e) for g in (None, weights) for e in (ours, theirs)):
                weighting = np.ones(values.shape[1]) if given is None else given
                difference = load_codec(kind).decode(encode(kind, values, given)) - values
                lost[index] += float((weighting * difference.astype(np.float64) ** 2).sum())
                total[index] += float((weighting * values.astype(np.float64) ** 2).sum())
        print(f"| {kind} | {' | '.join(f'{1e6 * value:,.0f}' for value in lost / total)} |", flush=True)


def perplexities(
    model: Checkpoint, importance: dict[str, torch.Tensor], windows: tuple[torch.Tensor, ...], mixes: list[str]
) -> None:
    print(f"\nunquantized: perplexity {score(model, windows):.3f}\n", flush=True)
    print("| type | MB | ours | llama.cpp | ours, imatrix | llama.cpp, imatrix |")
    print("|---|--:|--:|--:|--:|--:|", flush=True)
    for name in mixes:
        mix = GgmlMix.parse(name)
        views = [
            QuantizedAs(model, mix, encode, weights) for weights in (None, importance) for encode in (ours, theirs)
        ]
        scores = [f"{score(view, windows):.3f}" for view in views]
        print(f"| {name} | {views[0].size / 1e6:.1f} | {' | '.join(scores)} |", flush=True)


def score(checkpoint: Checkpoint, windows: tuple[torch.Tensor, ...]) -> float:
    logits = stream_logits(checkpoint, windows, device=torch.device("cpu"), dtype=torch.float32)
    return perplexity(logits, windows).ppl


def speed(rows: int = 1024, columns: int = 4096, rounds: int = 5) -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    values = (random.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    weights = np.exp(random.standard_normal(columns)).astype(np.float32)
    print("\n| type | ours, million weights/s | llama.cpp | ours, imatrix | llama.cpp, imatrix |")
    print("|---|--:|--:|--:|--:|")
    for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"):
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
