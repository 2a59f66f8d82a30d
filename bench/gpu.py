"""What is measured on a GPU, all of it in one go: quantizing an 8B shape, and one run each of everything else.

    python bench/gpu.py --work DIR [--parts gptq,gptaq,signround,distil,attention,healing,mixture] [--device cuda]
        [--model DIR] [--samples 128] [--length 2048] [--scheme w4a16-g128] [--calibration TEXT] [--evaluation TEXT]
        [--steps 50] [--tiny] [--markdown FILE]

Without ``--model`` the checkpoints have the shape of Llama 3 8B and random weights (``bench/random_llama.py``; 16 GB,
kept in ``--work``), and tokens are random. ``gptq`` has all of the model and of the tokens; ``gptaq`` all of the model
and 32 windows of 512; the others two of its blocks: what they take of a model goes by blocks or by steps.
``mixture`` has as many blocks with eight experts. A small model is quantized first, untimed, which compiles kernels.
``--tiny`` makes everything so small that a CPU does it in seconds: whether the script runs, not how fast.

With ``--model`` and texts, ``gptq`` and ``gptaq`` say the artifact's perplexity too.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measured import markdown_table, megabytes
from random_llama import make_config, write_checkpoint

from llmconvert.context import Context
from llmconvert.convert.gqa.job import convert_attention
from llmconvert.convert.heal.job import heal_attention
from llmconvert.convert.heal.options import HealOptions
from llmconvert.engine.evaluation import stream_logits
from llmconvert.quantize.distil.job import plan_distil
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.datasets import load_dataset_text
from llmconvert.text.tokenizer import load_tokenizer
from llmconvert.text.tokens import draw_windows
from llmconvert.validate.long_inputs.attention import AttentionOptions, measure_attention
from llmconvert.validate.predictions.perplexity import perplexity

_PHASES = ("reading", "forward", "Hessians", "solving", "packing", "writing", "copying")
_LLAMA_3 = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 128256}
_TINY = {"hidden": 128, "intermediate": 256, "heads": 4, "kv_heads": 2, "vocabulary": 256}


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the table: seconds in all and by phase, bytes of the device at the peak, and what was stated of it."""

    name: str
    seconds: float
    phases: Mapping[str, float]
    peak: int
    stated: int = 0
    note: str = ""


class Bench:
    """Models, windows and how to measure on the device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, self.work = options, options.device, options.work
        self.few = (4, 64) if options.tiny else (32, 512)
        self.work.mkdir(parents=True, exist_ok=True)

    def model(self, layers: int, experts: int = 0) -> Path:
        """A checkpoint of random weights, from an earlier call where there was one."""
        directory: Path = self.work / f"random-{layers}-{experts}{'-tiny' if self.options.tiny else ''}"
        if not (directory / "config.json").exists():
            shutil.rmtree(directory, ignore_errors=True)
            sizes = _TINY if self.options.tiny else _LLAMA_3
            shape = argparse.Namespace(**sizes, layers=layers, experts=experts, chosen=2)
            write_checkpoint(directory, make_config(shape), 0, 5_000_000_000)
        return directory

    @property
    def whole(self) -> Path:
        """The model that is asked for."""
        given: Path | None = self.options.model
        return given or self.model(2 if self.options.tiny else 32)

    def windows(self, model: Path, text: str | None, samples: int, length: int) -> Sequence[torch.Tensor]:
        """The first windows of a text, or random tokens."""
        with SafetensorsCheckpoint(model) as source:
            if text is not None:
                corpus, tokenizer = load_dataset_text(text), load_tokenizer(source)
                drawn = draw_windows(tokenizer, corpus, samples=samples, length=length, order="sequential")
                return drawn.windows
            size = int(source.config["vocab_size"])
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(size, (1, length), generator=generator) for _ in range(samples)]

    def measured(self, run: Callable[[], object]) -> tuple[float, int]:
        """Seconds, and the most that was held of the device's memory; 0 on a CPU."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        begin = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - begin
        return seconds, torch.cuda.max_memory_allocated(self.device) if cuda else 0

    def quantize(
        self, name: str, method: str, model: Path, samples: int, length: int, steps: int | None = None
    ) -> Result:
        """One artifact, whose perplexity is measured where a text is given; it stays in ``work / name``."""
        output: Path = self.work / name
        shutil.rmtree(output, ignore_errors=True)
        windows = self.windows(model, self.options.calibration, samples, length) if method != "rtn" else ()
        found = []

        def run() -> None:
            with SafetensorsCheckpoint(model) as source:
                done = quantize_checkpoint(
                    source,
                    output,
                    method=method,
                    scheme=self.options.scheme,
                    windows=windows,
                    device=self.device,
                    options={} if steps is None else {"steps": steps},
                )
            found.append(done)

        _, peak = self.measured(run)
        result = found[0]
        note = f"{len(windows)} × {length} tokens, {result.memory.mode}"
        if self.options.evaluation:
            note += f", perplexity {self.perplexity(output):.2f}"
        return Result(name, result.seconds, result.phases, peak, result.memory.total, note)

    def perplexity(self, directory: Path) -> float:
        """Of an artifact or a dense model, dequantized and streamed through the device; 16 windows of 2,048."""
        windows = self.windows(self.whole, self.options.evaluation, 16, 2048)
        with SafetensorsCheckpoint(directory) as stored:
            streamed = stream_logits(open_dense(stored), windows, device=self.device)
            pairs = zip(streamed, windows, strict=True)
            losses = [perplexity([logits.float().cpu()], [window]).nll for logits, window in pairs]
        return math.exp(sum(losses) / len(losses))


def gptq(bench: Bench) -> list[Result]:
    return [bench.quantize("gptq", "gptq", bench.whole, bench.options.samples, bench.options.length)]


def gptaq(bench: Bench) -> list[Result]:
    return [bench.quantize("gptaq", "gptaq", bench.whole, *bench.few)]


def signround(bench: Bench) -> list[Result]:
    steps = bench.options.steps
    return [bench.quantize("signround", "signround", bench.model(2), *bench.few, steps=steps)]


def mixture(bench: Bench) -> list[Result]:
    return [bench.quantize("mixture", "gptq", bench.model(2, 8), *bench.few)]


def distil(bench: Bench) -> list[Result]:
    model, output = bench.model(2), bench.work / "distilled"
    rounded = bench.quantize("rounded", "rtn", model, *bench.few)
    shutil.rmtree(output, ignore_errors=True)
    settings = DistilOptions(steps=bench.options.steps, held_out=1)
    windows = bench.windows(model, None, *bench.few)

    def run() -> None:
        with SafetensorsCheckpoint(model) as original, SafetensorsCheckpoint(bench.work / "rounded") as stored:
            plan_distil(original, stored, output, settings, windows=windows, context=Context(bench.device)).run()

    seconds, peak = bench.measured(run)
    return [rounded, Result("distil", seconds, {}, peak, note=f"{settings.steps} steps")]


def healing(bench: Bench) -> list[Result]:
    model, merged, output = bench.model(2), bench.work / "merged", bench.work / "healed"
    for directory in (merged, output):
        shutil.rmtree(directory, ignore_errors=True)
    settings = HealOptions(steps=bench.options.steps, held_out=1)
    windows = bench.windows(model, None, *bench.few)

    def merge() -> None:
        with SafetensorsCheckpoint(model) as source:
            heads = int(source.config["num_key_value_heads"]) // 2
            convert_attention(source, merged, kv_heads=heads, windows=windows, device=bench.device)

    def heal() -> None:
        with SafetensorsCheckpoint(model) as original, SafetensorsCheckpoint(merged) as student:
            heal_attention(original, student, output, windows=windows, options=settings, device=bench.device)

    return [
        Result("half the key-value heads", *_split(bench.measured(merge))),
        Result("healing", *_split(bench.measured(heal)), note=f"{settings.steps} steps"),
    ]


def attention(bench: Bench) -> list[Result]:
    lengths = (16,) if bench.options.tiny else (512, 2048, 8192)
    backends = ("eager",) if bench.options.tiny else ("eager", "math", "flash")
    settings = AttentionOptions(backends=backends, lengths=lengths, window=lengths[0], prompts=())
    found = measure_attention(bench.model(2), settings, device=bench.device)
    return [
        Result(
            f"{point.backend}, {point.length:,} tokens",
            point.seconds or 0.0,
            {},
            point.extra_bytes or 0,
            0,
            point.reason,
        )
        for point in found.points
    ]


#: What can be asked for, by name.
PARTS: Mapping[str, Callable[[Bench], list[Result]]] = {
    "gptq": gptq,
    "gptaq": gptaq,
    "signround": signround,
    "distil": distil,
    "attention": attention,
    "healing": healing,
    "mixture": mixture,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"which of {', '.join(PARTS)}")
    parser.add_argument("--model", type=Path, help="quantize this one, not an 8B shape of random weights")
    parser.add_argument("--scheme", type=Scheme.parse, default=Scheme.parse("w4a16-g128"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--calibration", help="text to calibrate on; random tokens without")
    parser.add_argument("--evaluation", help="text to measure perplexity on")
    parser.add_argument("--samples", type=int, default=128, help="windows for gptq (default 128)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each (default 2048)")
    parser.add_argument("--steps", type=int, default=50, help="of whatever trains (default 50)")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU, to see whether all of it runs")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    bench = Bench(options)
    bench.quantize("warm", "gptq", bench.model(1), *bench.few)
    rows: list[list[str]] = []
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "CPU"
    header = [name, "seconds", *_PHASES, "peak", "stated", ""]
    for part in options.parts:
        for result in PARTS[part](bench):
            phases = [f"{result.phases[phase]:.1f}" if phase in result.phases else "" for phase in _PHASES]
            memory = [megabytes(size) if size else "" for size in (result.peak, result.stated)]
            rows.append([result.name, f"{result.seconds:.1f}", *phases, *memory, result.note])
            print(" | ".join(rows[-1]), flush=True)  # at once: what comes later may be cut off
    text = markdown_table(header, rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(PARTS)}")
    return names


def _split(measured: tuple[float, int]) -> tuple[float, Mapping[str, float], int]:
    """Without phases, in a result's order."""
    return measured[0], {}, measured[1]


if __name__ == "__main__":
    main()
