"""Mixtures of experts made from a dense model, whose own perplexity says what a mixture's should be; and measured.

    python bench/moe.py make DENSE OUTPUT --kind exact|routed [--experts N] [--noise 0.05] [--seed 0]
    python bench/moe.py measure MODEL --calibration FILE --evaluation FILE --work DIR [--samples 32] [--length 512]
        [--scheme w4a16-g64] [--method gptq|gptq-cut] [--shrinkage 2 --shrinkage 0] [--windows 8] [--window 1024]
        [--draws 1] [--dtype float32]
    python bench/moe.py cut MODEL OUTPUT --blocks N
    python bench/moe.py distil MODEL ARTIFACT OUTPUT --calibration FILE [--steps 6] [--batch 4] [--length 256]
        [--held-out 4] [--rate 0.002]

``exact``: four experts are quarters of the dense MLP's inner neurons, the router is zero, all four are chosen, and
what that weighs them with is in ``down_proj``: it computes what the dense model does, and every expert sees every
token. ``routed``: eight experts, each the dense MLP plus its own noise (``--noise`` of a weight's standard deviation),
a random router, two of them chosen: close to the dense model, and each expert sees a quarter of the tokens. DENSE is a
Llama checkpoint of one shard; OUTPUT has Mixtral's layout.

``measure`` quantizes and scores by perplexity and mean KL divergence from the unquantized mixture on text that the
calibration never saw. ``--shrinkage`` is how strongly moments are drawn toward their diagonal, in tokens by the columns
of an input; 0 is without. ``gptq-cut`` is for the dense model beside the exact mixture: it solves a down projection
under a Hessian of which four blocks on the diagonal are left, which is all that four experts can know of it. With
``--draws`` that is done on so many pieces of the calibration text, one behind the other: whether a difference is one
of the text.

``cut`` writes the first N blocks of a model, which are a model too, in less time.

``distil`` trains what an artifact of a mixture stores, and prints divergence on windows that it did not learn from
before and after, time, and the peak of its memory beside what was stated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from measured import markdown_table
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llmconvert.convert.cast import CastView
from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.statistics import Hessian
from llmconvert.quantize.catalog.methods import METHODS
from llmconvert.quantize.distil.job import plan_distil
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods.base import Solution, Target
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint

CPU = torch.device("cpu")
_EXACT_EXPERTS = 4


@dataclass(frozen=True)
class CutGptq(Gptq):
    """GPTQ that knows of a down projection's input what the experts of the exact mixture know."""

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        if hessian is not None and targets[0].name.endswith("down_proj"):
            matrix = torch.zeros_like(hessian.matrix)
            for part in torch.arange(len(matrix)).chunk(_EXACT_EXPERTS):
                block = slice(int(part[0]), int(part[-1]) + 1)
                matrix[block, block] = hessian.matrix[block, block]
            hessian = replace(hessian, matrix=matrix)
        return super().quantize(targets, hessian, scale_dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("dense", type=Path)
    making.add_argument("output", type=Path)
    making.add_argument("--kind", choices=["exact", "routed"], required=True)
    making.add_argument("--experts", type=int)
    making.add_argument("--noise", type=float, default=0.05)
    making.add_argument("--seed", type=int, default=0)
    measuring = commands.add_parser("measure")
    measuring.add_argument("model", type=Path)
    measuring.add_argument("--calibration", type=Path, required=True)
    measuring.add_argument("--evaluation", type=Path, required=True)
    measuring.add_argument("--work", type=Path, required=True)
    measuring.add_argument("--samples", type=int, default=32)
    measuring.add_argument("--length", type=int, default=512)
    measuring.add_argument("--windows", type=int, default=8)
    measuring.add_argument("--window", type=int, default=1024)
    measuring.add_argument("--scheme", default="w4a16-g64")
    measuring.add_argument("--method", action="append")
    measuring.add_argument("--shrinkage", type=float, action="append")
    measuring.add_argument("--draws", type=int, default=1)
    measuring.add_argument("--dtype", choices=["float32"], help="what weights are cast to first")
    cutting = commands.add_parser("cut")
    cutting.add_argument("model", type=Path)
    cutting.add_argument("output", type=Path)
    cutting.add_argument("--blocks", type=int, required=True)
    distilling = commands.add_parser("distil")
    distilling.add_argument("model", type=Path)
    distilling.add_argument("artifact", type=Path)
    distilling.add_argument("output", type=Path)
    distilling.add_argument("--calibration", type=Path, required=True)
    distilling.add_argument("--steps", type=int, default=6)
    distilling.add_argument("--batch", type=int, default=4)
    distilling.add_argument("--length", type=int, default=256)
    distilling.add_argument("--held-out", type=int, default=4)
    distilling.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    if options.command == "make":
        experts = options.experts or (4 if options.kind == "exact" else 8)
        make_mixture(options.dense, options.output, options.kind, experts, options.noise, options.seed)
    elif options.command == "cut":
        cut(options.model, options.output, options.blocks)
    elif options.command == "distil":
        distil(options)
    else:
        measure(options)


def make_mixture(dense: Path, output: Path, kind: str, experts: int, noise: float, seed: int) -> None:
    """Write the mixture."""
    output.mkdir(parents=True)
    config: dict[str, Any] = json.loads((dense / "config.json").read_text())
    exact = kind == "exact"
    width, inner = config["hidden_size"], config["intermediate_size"]
    for path in dense.iterdir():
        if path.is_file() and path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, output / path.name)
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": experts if exact else 2,
        "intermediate_size": inner // experts if exact else inner,
        "sliding_window": None,
        "head_dim": config.get("head_dim") or width // config["num_attention_heads"],
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = load_file(dense / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    made = {name: weight for name, weight in weights.items() if ".mlp." not in name}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        router = torch.randn((experts, width), generator=generator) * (0.0 if exact else 1.0)
        dtype = weights[f"{prefix}mlp.down_proj.weight"].dtype
        made[f"{prefix}block_sparse_moe.gate.weight"] = router.to(dtype)
        for expert in range(experts):
            for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                weight = weights[f"{prefix}mlp.{ours}.weight"].float()
                if exact:
                    part = slice(expert * inner // experts, (expert + 1) * inner // experts)
                    # Every expert is weighted by 1 / experts; powers of two cost nothing in bfloat16.
                    weight = weight[:, part] * experts if ours == "down_proj" else weight[part]
                else:
                    weight = weight + noise * weight.std() * torch.randn(weight.shape, generator=generator)
                name = f"{prefix}block_sparse_moe.experts.{expert}.{theirs}.weight"
                made[name] = weight.to(dtype).contiguous()
    save_file(made, output / "model.safetensors", metadata={"format": "pt"})


def cut(model: Path, output: Path, blocks: int) -> None:
    """Write the first blocks of a model of one shard."""
    output.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, output / path.name)
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": blocks}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    number = re.compile(r"model\.layers\.(\d+)\.")
    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if int((number.match(name) or [0, -1])[1]) < blocks}
    save_file(kept, output / "model.safetensors", metadata={"format": "pt"})


def measure(options: argparse.Namespace) -> None:
    """Quantize in every way asked for, and print the table."""
    cast(dict[str, str], METHODS)["gptq-cut"] = "moe:CutGptq"  # a table that lists what is shipped
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    drawn = windows_of(tokenizer, options.calibration, options.draws * options.samples, options.length)
    evaluation = windows_of(tokenizer, options.evaluation, options.windows, options.window)
    rows = []
    with SafetensorsCheckpoint(options.model) as stored:
        source = CastView(stored, torch.float32) if options.dtype else stored
        original = [logits.float().log_softmax(-1).half() for logits in stream_logits(source, evaluation, device=CPU)]
        rows.append(["unquantized", "", "", *scored(source, evaluation, original)])
        ways = itertools.product(
            options.method or ["gptq"], options.shrinkage or [Gptq().shrinkage], range(options.draws)
        )
        for method, shrinkage, draw in ways:
            calibration = drawn[draw * options.samples : (draw + 1) * options.samples]
            output = options.work / f"{method}-{options.scheme}-{shrinkage}-{options.samples}x{options.length}"
            shutil.rmtree(output, ignore_errors=True)
            begin = time.perf_counter()
            quantize_checkpoint(
                source,
                output,
                method=method,
                scheme=Scheme.parse(options.scheme),
                windows=calibration,
                options={"shrinkage": shrinkage},
            )
            seconds = f"{time.perf_counter() - begin:.0f}"
            with SafetensorsCheckpoint(output) as artifact:
                figures = scored(open_dense(artifact), evaluation, original)
            name = f"{method} {options.scheme}" + (f", draw {draw + 1}" if options.draws > 1 else "")
            rows.append([name, f"{shrinkage:g}", seconds, *figures])
            print(*rows[-1], flush=True)
    print(f"{options.model.name}, {options.samples} × {options.length} tokens")
    print(markdown_table(["", "κ / columns", "seconds", "perplexity", "KL"], rows))


def distil(options: argparse.Namespace) -> None:
    """Distil an artifact, and print the table."""
    settings = DistilOptions(
        steps=options.steps,
        batch=options.batch,
        held_out=options.held_out,
        learning_rate=options.rate,
        evaluate_every=options.steps,
        save_every=options.steps,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    count = options.steps * options.batch + options.held_out
    windows = windows_of(tokenizer, options.calibration, count, options.length)
    with SafetensorsCheckpoint(options.model) as original, SafetensorsCheckpoint(options.artifact) as artifact:
        plan = plan_distil(original, artifact, options.output, settings, windows=windows)
        begin, spent = time.perf_counter(), time.process_time()
        report = plan.run()
    seconds, processor = time.perf_counter() - begin, time.process_time() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    losses = ", ".join(f"{entry['kl']:.4f}" for entry in report.history)
    print(f"losses: {losses}; {report.trained:,} numbers learned")
    row = [options.artifact.name, f"{report.before or 0:.4f}", f"{report.after or 0:.4f}"]
    row += [f"{seconds:.0f}", f"{processor:.0f}", f"{peak / 1e6:,.0f} MB", f"{plan.needs.memory / 1e6:,.0f} MB"]
    head = ["", "held out before", "after", "seconds", "processor", "peak RSS", "stated"]
    print(markdown_table(head, [row]))


def windows_of(tokenizer: Any, path: Path, count: int, length: int) -> list[torch.Tensor]:
    """The first windows ``[1, length]`` of a text file."""
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids)
    return [ids[start : start + length][None] for start in range(0, count * length, length)]


def scored(checkpoint: Checkpoint, windows: Sequence[torch.Tensor], original: Sequence[torch.Tensor]) -> list[str]:
    """Perplexity, and the mean divergence from the original's predictions in nats."""
    loss = divergence = 0.0
    tokens = 0
    for window, logits, there in zip(windows, stream_logits(checkpoint, windows, device=CPU), original, strict=True):
        here, reference = logits.float().log_softmax(-1), there.float()
        loss -= float(here[0, :-1].gather(1, window[0, 1:, None]).sum())
        divergence += float((reference.exp() * (reference - here)).sum(-1)[0, :-1].sum())
        tokens += window.shape[1] - 1
    return [f"{torch.tensor(loss / tokens).exp():.3f}", f"{divergence / tokens:.4f}"]


if __name__ == "__main__":
    main()
