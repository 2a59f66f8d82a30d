"""GGUF files of several methods against llama.cpp's own quantization: bytes, perplexity, KL divergence, in llama.cpp.

    python bench/gguf_quality.py MODEL --work DIR --calibration FILE --text FILE --text pydoc-topics:test
        [--mix q4_0 …] [--method imatrix …] [--samples 32] [--length 512] [--windows 8] [--window 512]

Every file of a mix has the same tensors in the same types, and so the same size. llama.cpp's own file is made with
``ggml_quantize_chunk``, which ``llama-quantize`` calls, by the mix's rules and with the importance matrix of the same
calibration tokens. ``floor`` leaves the linears of the blocks as they are and quantizes embedding and head alone:
what no method for linears can get below. ``chosen-METHOD`` is a file of at most the mix's bytes whose types are chosen
tensor by tensor (``quantize.budget``), embedding and head included. All files are run by llama.cpp
(``peers/llama_cpp.py``), the unquantized one in bfloat16 too, from whose logits the divergence is taken. What is done
is kept in DIR, and not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llmconvert.gguf.architectures.pieces import source_rows
from llmconvert.gguf.export import tensor_types
from llmconvert.gguf.file import plan_file
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.gguf.ggml.mix import FLOATS, GgmlMix
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.mixed_precision.budget import Budget
from llmconvert.quantize.mixed_precision.job import Allocation, plan_choice
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.scheme import parse_scheme
from llmconvert.recipes.schema.measuring import PerplexitySettings
from llmconvert.recipes.schema.recipe import CalibrateSettings
from llmconvert.recipes.stages.windows import WindowRequest
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, SafetensorsCheckpoint

sys.path += [str(Path(__file__).parent / "peers"), str(Path(__file__).parent.parent / "tests")]
from llama_cpp import llama_cpp_logits  # type: ignore[import-not-found]  # beside it, in peers/
from measured import markdown_table
from support.ggml_reference import ggml_quantize
from support.importance import collect_importance

MARKS = {"q4_0": 0.3, "q4_k_m": 0.5, "iq4_xs": 0.5, "q3_k_m": 0.4, "q2_k": 0.35}
Encoder = Callable[[np.ndarray, str, np.ndarray | None], np.ndarray]
THEIRS, FLOOR, CHOSEN = "llama.cpp", "floor", "chosen-"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--mix", action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    with SafetensorsCheckpoint(options.model) as source:
        bench = Bench(source, options)
        for mix in options.mix or MARKS:
            for side in options.method or [THEIRS, "imatrix", "gptq", "gptaq", FLOOR]:
                bench.run(mix, side)
        print(bench.table())


def encode(values: np.ndarray, kind: str, importance: np.ndarray | None) -> np.ndarray:
    return load_codec(kind).encode(values, importance)


class Bench:
    """What is measured, kept in a file of the work directory."""

    def __init__(self, source: Checkpoint, options: argparse.Namespace) -> None:
        self.source, self.options, self.work = source, options, options.work
        self.record = self.work / "results.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self.record.read_text()) if self.record.exists() else {}
        calibration = WindowRequest.calibration(
            CalibrateSettings(dataset=options.calibration, samples=options.samples, length=options.length)
        )
        self.calibration = calibration.draw(source, calibration.corpus()).windows
        self.windows: list[tuple[str, torch.Tensor]] = []
        for text in options.text:
            request = WindowRequest.evaluation(
                PerplexitySettings(dataset=text, window=options.window, max_windows=options.windows)
            )
            self.windows += [(text, window) for window in request.draw(source, request.corpus()).windows]

    def run(self, mix: str, side: str) -> None:
        """Make a file and score it, if that was not done before."""
        key = f"{mix} {side}"
        if key in self.results:
            return
        path = self.work / f"{mix}-{side}.gguf"
        begin = time.perf_counter()
        if not path.exists():
            self.make(mix, side, path)
        seconds = time.perf_counter() - begin
        self.results[key] = {"bytes": path.stat().st_size, "seconds": seconds, **self.score(path)}
        self.record.write_text(json.dumps(self.results, indent=1))
        print(key, json.dumps(self.results[key]), flush=True)
        path.unlink()

    def make(self, mix: str, side: str, path: Path) -> None:
        part = path.with_name(f"part-{path.name}")
        part.unlink(missing_ok=True)
        if side == THEIRS:
            self.write(part, mix, ggml_quantize)
        elif side == "imatrix":
            self.write(part, mix, encode)
        elif side == FLOOR:
            self.write_floor(part, mix)
        else:
            method, scheme = side.removeprefix(CHOSEN), parse_scheme(mix)
            overrides: tuple[Override, ...] = ()
            if side.startswith(CHOSEN):
                allocation = self.choose(mix, method)
                scheme, overrides = allocation.scheme, allocation.overrides
            quantize_checkpoint(
                self.source,
                part,
                method=method,
                scheme=scheme,
                format="gguf",
                overrides=overrides,
                name="bench",
                windows=self.calibration,
            )
        part.rename(path)

    def choose(self, mix: str, method: str) -> Allocation:
        """Types for no more bytes than a mix takes."""
        nbytes = plan_file(self.source, "x.gguf", "bench", GgmlMix.parse(mix), importance=True).layout.nbytes
        request = QuantizeRequest(method, parse_scheme("q4_k_m"), "gguf")
        allocation = plan_choice(
            self.source,
            self.work / f".{mix}-{method}.sensitivity",
            Budget(None, max_bytes=nbytes),
            request,
            windows=self.calibration,
        ).run()
        counts = Counter(f"{'' if c.unit.outer is None else c.unit.outer + ' '}{c.scheme}" for c in allocation.choices)
        print(mix, method, f"expected {allocation.divergence:.4f}", dict(counts), flush=True)
        return allocation

    def write(self, path: Path, mix: str, encoder: Encoder) -> None:
        """A file whose tensors an encoder has encoded with the importance matrix; it has no tensor of settings."""
        file = plan_file(self.source, path.name, "bench", GgmlMix.parse(mix), importance=True)
        assert not file.settings
        (shard,) = file.layout.shards
        with path.open("wb") as out:
            out.write(shard.header)
            for planned in file.tensors.values():
                kind, spec = planned.spec.qtype, planned.spec
                for piece in planned.exported.pieces:
                    weights = self.importance.get(piece.name)
                    given = None if weights is None else weights.numpy()
                    length = self.source.infos[piece.name].shape[0]
                    read = partial(self.source.read_rows, piece.name)
                    for first, values in source_rows(piece, read, length, file.config, max(1, piece.rows)):
                        matrix = values.reshape(-1, spec.shape[-1]).contiguous().numpy()
                        raw = (encode if kind in FLOATS else encoder)(matrix, kind, given)
                        out.seek(shard.offsets[spec.name] + first * spec.row_nbytes)
                        out.write(raw.tobytes())
            out.truncate(shard.nbytes)

    def write_floor(self, path: Path, mix: str) -> None:
        """A bfloat16 file whose embedding and head have been through the types that a mix has for them."""
        types = tensor_types(self.source, GgmlMix.parse(mix), importance=True).linears
        outer = {name: kind for name, kind in types.items() if not name.startswith("model.layers.")}

        class Outer(CheckpointView):
            def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
                rows = super().read_rows(name, start, stop)
                codec = load_codec(outer.get(name, "F32"))
                if codec.name in FLOATS:
                    return rows
                return torch.from_numpy(codec.decode(codec.encode(rows.float().numpy()))).to(rows.dtype)

        quantize_checkpoint(
            Outer(self.source), path, method="rtn", scheme=parse_scheme("bf16"), format="gguf", name="bench"
        )

    @cached_property
    def importance(self) -> dict[str, torch.Tensor]:
        """Of every linear's weight; computed once."""
        path = self.work / "importance.safetensors"
        if not path.exists():
            found = collect_importance(self.source, self.calibration)
            save_file({name: squares.clone() for name, squares in found.items()}, path)
        return load_file(path)

    def score(self, path: Path) -> dict[str, float]:
        """Perplexity and mean KL divergence (nats) of each text."""
        vocabulary = self.source.config["vocab_size"]
        ids = [window for _, window in self.windows]
        expected = self.reference(ids, vocabulary)
        self.results.setdefault("bf16", {"bytes": 0, "seconds": 0.0, **self.compare(expected, expected)})
        found = llama_cpp_logits(path, ids, vocabulary, threads=torch.get_num_threads())
        return self.compare((logits.log_softmax(-1) for logits in found), expected)

    def compare(self, found: Iterable[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, float]:
        texts: dict[str, list[tuple[float, float]]] = {}
        for (text, window), ours, theirs in zip(self.windows, found, expected, strict=True):
            loss = -ours[:-1].gather(-1, window[0, 1:, None]).mean()
            divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
            texts.setdefault(text, []).append((float(loss), float(divergence)))
        result: dict[str, float] = {}
        for text, pairs in texts.items():
            losses, divergences = np.array(pairs).T
            result |= {f"ppl {text}": float(np.exp(losses.mean())), f"kl {text}": float(divergences.mean())}
        return result

    def reference(self, ids: Sequence[torch.Tensor], vocabulary: int) -> Sequence[torch.Tensor]:
        """Log probabilities of the unquantized model, computed once."""
        path, length = self.work / "reference.npy", sum(window.shape[1] for window in ids)
        if not path.exists():
            model, part = self.work / "bf16.gguf", self.work / "reference.part.npy"
            model.unlink(missing_ok=True)
            self.write(model, "bf16", encode)
            lines = np.lib.format.open_memmap(part, "w+", np.float32, (length, vocabulary))
            position = 0
            for logits in llama_cpp_logits(model, ids, vocabulary, threads=torch.get_num_threads()):
                lines[position : position + len(logits)] = logits.log_softmax(-1).numpy()
                position += len(logits)
            lines.flush()
            os.replace(part, path)
            model.unlink()
        stored = torch.from_numpy(np.load(path, mmap_mode="c"))
        return stored.split([window.shape[1] for window in ids])

    def table(self) -> str:
        rows = []
        texts = list(dict.fromkeys(text for text, _ in self.windows))
        for key, found in self.results.items():
            mix, _, side = key.partition(" ")
            cells = [mix, side, f"{found['bytes'] / 1e6:.1f}", f"{found['seconds']:.0f}"]
            for text in texts:
                theirs = self.results.get(f"{mix} {THEIRS}", {}).get(f"kl {text}")
                share = f"{found[f'kl {text}'] / theirs:.2f}" if theirs else ""
                cells += [f"{found[f'ppl {text}']:.2f}", f"{found[f'kl {text}']:.4f}", share]
            rows.append([*cells, str(MARKS.get(mix, "")) if side not in ("", THEIRS, FLOOR) else ""])
        names = [Path(text).stem for text in texts]
        columns = [f"{name}: {what}" for name in names for what in ("perplexity", "KL", "of llama.cpp's")]
        return markdown_table(["mix", "by", "MB", "s", *columns, "mark"], rows)


if __name__ == "__main__":
    main()
