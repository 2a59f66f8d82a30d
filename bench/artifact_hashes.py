"""Which bytes the commands make: sha256 of the artifacts of small jobs over methods, formats and steps.

Tiny seeded models, one thread, so that on one machine the same code gives the same bytes. Run before a change of
structure and after it::

    python bench/artifact_hashes.py > before.json
    python bench/artifact_hashes.py --against before.json

With ``--against``, what differs is listed by job and file, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))
# Files whose contents tell of one run: when, how long, where.
VOLATILE = ("report.json", "report.html", "README.md", "manifest.json", "recipe.yaml", ".png", ".svg")
TEXT = "--calibration pydoc-topics:train --samples 4 --length 48"
JOBS: dict[str, str] = {
    "convert float16": "convert {llama} {out} --dtype float16",
    "convert opt float16": "convert {opt} {out} --dtype float16",
    "convert yarn": "convert {llama} {out} --dtype bfloat16 --rope-scaling yarn:2.0",
    "attention svd": f"convert {{llama}} {{out}} --kv-heads 1 {TEXT}",
    "attention svd, qwen3": f"convert {{qwen3}} {{out}} --kv-heads 1 {TEXT}",
    "attention mean": "convert {llama} {out} --kv-heads 1 --gqa-method mean",
    "attention healed": f"convert {{llama}} {{out}} --kv-heads 1 --heal-steps 3 {TEXT}",
    "rtn w8a16": "quantize {llama} {out} --method rtn --scheme w8a16-g32",
    "rtn w8a8": "quantize {llama} {out} --method rtn --scheme w8a8",
    "rtn fp8": "quantize {llama} {out} --method rtn --scheme fp8",
    "rtn nf4": "quantize {llama256} {out} --method rtn --scheme nf4 --format bitsandbytes",
    "rtn nf4-dq": "quantize {llama256} {out} --method rtn --scheme nf4-dq --format bitsandbytes",
    "rtn llm.int8": "quantize {llama} {out} --method rtn --scheme llm.int8 --format bitsandbytes",
    "hqq": "quantize {llama} {out} --method hqq --scheme w4a16-g32-asym",
    "gptq": f"quantize {{llama}} {{out}} --scheme w4a16-g32 {TEXT}",
    "gptq 3 bits": f"quantize {{qwen3}} {{out}} --scheme w3a16-g32-asym {TEXT}",
    "gptq format gptq": f"quantize {{llama}} {{out}} --scheme w4a16-g32 --format gptq {TEXT}",
    "gptq overrides": f"quantize {{llama}} {{out}} --scheme w4a16-g32 --override *down_proj=w8a16-g32 {TEXT}",
    "gptq rotated": f"quantize {{llama}} {{out}} --scheme w4a16-g32 --rotate {TEXT}",
    "gptq budget": f"quantize {{llama}} {{out}} --bits-per-weight 5 {TEXT}",
    "gptaq": f"quantize {{llama}} {{out}} --method gptaq --scheme w4a16-g32 {TEXT}",
    "awq": f"quantize {{llama}} {{out}} --method awq --scheme w4a16-g32-asym --format awq {TEXT}",
    "smoothquant": f"quantize {{llama}} {{out}} --method smoothquant --scheme w8a8 {TEXT}",
    "signround": f"quantize {{llama}} {{out}} --method signround --scheme w4a16-g32 {TEXT}",
    "gguf q8_0": "quantize {llama256} {out}.gguf --format gguf --scheme q8_0",
    "gguf q4_k_m": "quantize {llama256} {out}.gguf --format gguf --scheme q4_k_m",
    "gguf q4_k_m imatrix": f"quantize {{llama256}} {{out}}.gguf --format gguf --scheme q4_k_m {TEXT}",
    "gguf carried": f"quantize {{llama256}} {{out}}.gguf --format gguf --scheme w4a16-g32-sym --method gptq {TEXT}",
    "gguf read": "convert {gguf q8_0}.gguf {out}",
    "quantized read": "convert {gptq format gptq} {out}",
}


def make_models(directory: Path) -> dict[str, Path]:
    """The sources, by the name that jobs use."""
    from support.tiny_architectures import tiny_model
    from support.tiny_models import tiny_llama_dir, tiny_tokenizer

    models = {
        name: tiny_model(directory / name, name, dtype=torch.bfloat16, vocab_size=320)
        for name in ("llama", "qwen3", "opt")
    }
    for path in models.values():
        tiny_tokenizer().save_pretrained(path)
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "dtype": torch.bfloat16}
    return {**models, "llama256": tiny_llama_dir(directory / "llama256", **wide)}


def hashes(path: Path) -> Iterator[tuple[str, str]]:
    """Name and sha256 of every file below ``path``, or of the file itself."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if not file.name.endswith(VOLATILE):
            name = file.relative_to(path).as_posix() if path.is_dir() else file.suffix
            yield name, hashlib.sha256(file.read_bytes()).hexdigest()


def run(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Job → file → sha256; a job that fails tells its error instead."""
    from llmconvert.cli import main

    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        places = {name: str(path) for name, path in make_models(Path(name)).items()}
        for job in names:
            out = Path(name) / "out" / job.replace(" ", "-")
            places[job] = str(out)
            out.parent.mkdir(exist_ok=True)
            arguments = [part.format(out=out, **places) for part in _split(JOBS[job])]
            try:
                main(arguments, standalone_mode=False)
                made = out if out.exists() else out.with_name(out.name + ".gguf")
                found[job] = dict(hashes(made))
            except Exception as error:
                print(f"{job}: {error}", file=sys.stderr)
                found[job] = {"error": f"{type(error).__name__}: {error}".replace(name, "…")}
    return found


def _split(command: str) -> list[str]:
    """Words of a command; a placeholder may hold spaces."""
    words: list[str] = []
    for word in command.split(" "):
        if words and words[-1].count("{") > words[-1].count("}"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def compare() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="hashes that an earlier call printed")
    parser.add_argument("--only", action="append", help="one job, instead of all; may be repeated")
    options = parser.parse_args()
    stdout, sys.stdout = sys.stdout, sys.stderr  # what the commands print is not the result
    found = run(options.only or list(JOBS))
    sys.stdout = stdout
    if options.against is None:
        print(json.dumps(found, indent=1, sort_keys=True))
        return 0
    before = json.loads(options.against.read_text())
    changed = [
        f"{job}: {file}"
        for job in found
        for file in sorted(found[job].keys() | before[job].keys())
        if found[job].get(file) != before[job].get(file)
    ]
    print("\n".join(changed) or f"{len(found)} jobs, all bytes the same")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(compare())
