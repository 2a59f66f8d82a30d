"""Which of transformers' classes work: a tiny checkpoint of each is quantized, read back, and held against its twin.

    python bench/census.py [--only PATTERN ...] [--kind causal|image-text] [--state FILE] [--again VERDICT ...]
        [--side-by-side 1] [--page docs/families.md]

Every class of transformers' automatic mappings for causal language models and for image-text-to-text gets a random
checkpoint with the structure of the real one. It is quantized to ``w4a16-g32`` by rtn and by gptq; the artifact is read
by the class that its config names, and must give the logits of its dense twin: the artifact's own weights, written out
dense, in the original class. What the engine computes must be what transformers computes. Verdicts:

- ``works``: by both methods;
- ``as advised``: what is asked for is refused by name, and works by both methods with the override that the refusal
  names: the experts of some classes stay dense, the other linears are quantized;
- ``not in transformers``: the same, and with ``runtime: vllm``, which the refusal names too, experts are quantized one
  by one under names that vLLM and llm-compressor have for them. No runtime here runs such an artifact, so this is
  proven otherwise: compressed-tensors' own decompression gives bit for bit what is read here, and the engine computes
  from the artifact what transformers does from the dense twin;
- ``refused``: by name, before the work; the message is in the table;
- ``wrong``: it went through, and logits, kept tensors or names are not what they should be;
- ``crash``: anything else but a refusal: an exception of another kind, a signal, or out of time or memory;
- ``not built``: transformers itself cannot build, save or run such a model on text alone.

Classes with a tower of timm's can be built where timm is installed, and torchvision for the same torch; Inkling wants
scipy. Without them they are not built.

Each class runs in a process of its own, forked before anything was computed. Results are kept in ``--state``, and a
later run goes on with what is missing there.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from census_cases import CLASSES, METHODS, SCHEME, Case, Finding
from census_page import markdown_page
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, logging

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.tiny_checkpoints import FIRST_TEXT_TOKEN, VOCABULARY, save_tiny_checkpoint

from llmconvert.convert.source import open_source
from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import LlmconvertError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import Override, RuntimeName
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["examine", "examine_all"]

SECONDS = 150
MEMORY = 6 << 30
LENGTH = 24
CPU = torch.device("cpu")
# Logits of the artifact against its twin's, and streamed against resident ones: norm of the difference by the latter's.
TOLERANCE = 2e-4
# What a refusal tells to leave dense, and for which runtime it would write all.
_ADVISED = re.compile(r"\(match: '(?P<match>[^']+)', scheme: none\)")
_ELSEWHERE = re.compile(r"\(runtime: (?P<runtime>vllm)\)")


class _WrongError(Exception):
    """Something went through and is not what it should be."""


def examine(case: Case, directory: Path) -> Finding:
    """Build, quantize, read back and compare in this process."""
    source = directory / "model"
    try:
        save_tiny_checkpoint(source, case.model_type, case.class_name)
        expected = _logits(source)
    except Exception as error:
        return Finding("not built", _line(error), trace=traceback.format_exc())
    finding = _by_all_methods(source, directory, expected)
    advised = _ADVISED.search(finding.detail) if finding.verdict == "refused" else None
    if advised is not None:
        again = _by_all_methods(source, directory / "advised", expected, [Override(advised["match"], None)])
        if again.verdict != "works":
            return replace(again, detail=again.detail or finding.detail)
        if _ELSEWHERE.search(finding.detail):
            other = _by_all_methods(source, directory / "elsewhere", expected, runtime="vllm")
            verdict = "not in transformers" if other.verdict == "works" else other.verdict
            return replace(other, verdict=verdict, detail=other.detail or finding.detail)
        return replace(again, verdict="as advised", detail=finding.detail)
    return finding


def _by_all_methods(
    source: Path,
    directory: Path,
    expected: torch.Tensor,
    overrides: Sequence[Override] = (),
    runtime: RuntimeName | None = None,
) -> Finding:
    finding = Finding("works")
    directory.mkdir(exist_ok=True)
    for method in METHODS:
        try:
            finding = _quantized(source, directory / method, method, expected, overrides, runtime)
        except LlmconvertError as error:
            return Finding("refused", str(error), method, finding.weights, finding.quantized)
        except _WrongError as error:
            return Finding("wrong", str(error), method, finding.weights, finding.quantized)
        except Exception as error:
            return Finding("crash", _line(error), method, trace=traceback.format_exc())
    return finding


def _quantized(
    source: Path,
    output: Path,
    method: str,
    expected: torch.Tensor,
    overrides: Sequence[Override],
    runtime: RuntimeName | None,
) -> Finding:
    checkpoint = open_source(str(source)).checkpoint
    generator = torch.Generator().manual_seed(1)
    windows = [_ids(generator) for _ in range(4)]
    scheme = Scheme.parse(SCHEME)
    quantize_checkpoint(
        checkpoint, output, method=method, scheme=scheme, windows=windows, overrides=overrides, runtime=runtime
    )
    (streamed,) = stream_logits(checkpoint, [_ids()], device=CPU)
    _same("what the engine computes of the unquantized model", streamed, expected)
    written = open_dense(open_source(str(output)).checkpoint)
    dense = {name: written[name] for name in written}
    _put_experts_together(checkpoint, dense)
    before_all = {**{name: checkpoint[name] for name in checkpoint}, **_joined(source, checkpoint, dense)}
    apart = {name for name in checkpoint if name not in dense}
    if sum(before_all[name].numel() for name in apart) != sum(
        value.numel() for name, value in before_all.items() if name not in checkpoint
    ):
        raise _WrongError(f"the artifact has no {min(apart)}")
    weights = quantized = 0
    tensors = {}
    for name in sorted(before_all.keys() - apart):
        before, after = before_all[name], dense[name]
        weights += before.numel()
        if before.shape != after.shape or before.dtype != after.dtype:
            raise _WrongError(f"{name} was {before.dtype} {list(before.shape)}, is {after.dtype} {list(after.shape)}")
        if not torch.equal(before, after):
            quantized += before.numel()
            if _distance(after, before) > 0.3:
                raise _WrongError(f"{name} is another than it was: {_distance(after, before):.0%} away")
        tensors[name] = after
    if not quantized:
        raise _WrongError("nothing is quantized")
    twin = output.with_name(f"{output.name}-twin")
    twin.mkdir()
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    (twin / "config.json").write_bytes((source / "config.json").read_bytes())
    right = _logits(twin)
    if runtime is None:
        _same("what the artifact gives in transformers", _logits(output), right)
    else:
        (found,) = stream_logits(written, [_ids()], device=CPU)
        _same("what the engine computes of the artifact", found, right)
        _decompressed_alike(output, written)
    if torch.equal(right, expected):
        raise _WrongError("logits are the unquantized model's: what is quantized takes no part")
    return Finding("works", weights=weights, quantized=quantized)


def _decompressed_alike(output: Path, written: Checkpoint) -> None:
    """Whether compressed-tensors itself makes of an artifact's packed weights what is read here."""
    declared = json.loads((output / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(declared)
    (scheme,) = config.config_groups.values()
    compressor: Any = BaseCompressor.get_value_from_registry(config.format)
    stored = load_file(output / "model.safetensors")
    packed = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    for name in packed:
        parts = {part: stored[f"{name}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
        if not torch.equal(compressor.decompress(parts, scheme)["weight"], written[f"{name}.weight"]):
            raise _WrongError(f"compressed-tensors makes another weight of {name}")
    if not any(".experts." in name for name in packed):
        raise _WrongError("no expert is packed")


class _Places(dict[str, torch.Tensor]):
    """In the place of a checkpoint: tensors that hold the places of their numbers."""

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self[name][start:stop].clone()


def _put_experts_together(checkpoint: Checkpoint, dense: dict[str, torch.Tensor]) -> None:
    """Let experts that the checkpoint has in one tensor, and the artifact one by one, be in one tensor again."""
    if all(name in dense for name in checkpoint):
        return
    skeleton = Skeleton(checkpoint, CPU)
    sites = [site for site in skeleton.sites.values() if site.tensor not in dense and not site.stored_alone]
    apart = [site for site in sites if f"{site.stored}.weight" in dense]
    for name in dict.fromkeys(site.tensor for site in apart):
        info = skeleton.checkpoint.infos[name]
        shape = info.shape
        places: Any = _Places({name: torch.arange(torch.Size(shape).numel()).view(shape)})
        whole = torch.full(shape, torch.nan, dtype=info.dtype)
        for site in apart:
            if site.tensor == name:
                whole.view(-1)[site.read(places).reshape(-1)] = dense.pop(f"{site.stored}.weight").reshape(-1)
        dense[name] = whole


def _joined(source: Path, checkpoint: Checkpoint, dense: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the artifact has in one and the checkpoint apart, as transformers makes it."""
    names = [name for name in dense if name not in checkpoint]
    states = _class_of(source).from_pretrained(source, dtype=torch.float32).state_dict() if names else {}
    for name in names:
        if name not in states:
            raise _WrongError(f"the artifact has {name}, which is neither the checkpoint's nor the class's")
    return {name: states[name] for name in names}


def _class_of(directory: Path) -> type[PreTrainedModel]:
    """The class that the config names."""
    kind: type[PreTrainedModel] = getattr(
        transformers, json.loads((directory / "config.json").read_text())["architectures"][0]
    )
    return kind


def _logits(directory: Path) -> torch.Tensor:
    """What the class that the config names computes.

    Raises:
        _WrongError: it finds tensors missing, or does not know some of those that are there.
    """
    kind = _class_of(directory)
    model, info = kind.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise _WrongError(f"{kind.__name__} finds {what.replace('_', ' ')}: {sorted(map(str, info[what]))[:2]}")
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=_ids(), use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise ValueError("logits are not finite")
    return logits.float()


def _ids(generator: torch.Generator | None = None) -> torch.Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    return torch.randint(FIRST_TEXT_TOKEN, VOCABULARY, (1, LENGTH), generator=generator)


def _same(what: str, found: torch.Tensor, right: torch.Tensor) -> None:
    if found.shape != right.shape:
        raise _WrongError(f"{what}: {list(found.shape)}, expected {list(right.shape)}")
    if (distance := _distance(found, right)) > TOLERANCE:
        raise _WrongError(f"{what} is {distance:.2g} away from what it should be")


def _distance(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _child(case: Case, result: Path) -> None:
    """In a process of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    with tempfile.TemporaryDirectory() as directory:
        result.write_text(json.dumps(asdict(examine(case, Path(directory)))))


def examine_all(cases: Sequence[Case], state: Path, processes: int = 1) -> dict[str, Finding]:
    """Every case that ``state`` doesn't know yet, so many side by side; returns all that are known."""
    known, code = read_state(state), _code()
    waiting = [case for case in cases if case.key not in known]
    running: dict[Case, tuple[BaseProcess, Path, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        while waiting or running:
            while waiting and len(running) < processes:
                case = waiting.pop(0)
                result = Path(directory) / f"{case.key.replace('/', '-')}.json"
                process: BaseProcess = multiprocessing.get_context("fork").Process(target=_child, args=(case, result))
                process.start()
                running[case] = process, result, time.monotonic()
            time.sleep(0.05)
            for case, (process, result, begin) in list(running.items()):
                late = time.monotonic() - begin > 8 * SECONDS
                if late:
                    process.kill()
                if process.is_alive() and not late:
                    continue
                process.join()
                del running[case]
                finding = replace(_finding(process, result, late), code=code)
                known[case.key] = finding
                with contextlib.suppress(FileNotFoundError):
                    result.unlink()
                state.write_text(json.dumps({key: asdict(value) for key, value in known.items()}, indent=1))
                print(f"{case.key:40} {finding.verdict:10} {finding.method:5} {finding.detail[:150]}", flush=True)
    return known


def _finding(process: BaseProcess, result: Path, late: bool) -> Finding:
    if result.exists() and (text := result.read_text()):
        return Finding(**json.loads(text))
    return Finding("crash", "out of time" if late else f"the process ended with {process.exitcode}")


def _code() -> str:
    """The commit of this checkout, with a plus behind it if files differ; empty if it is none."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def read_state(state: Path) -> dict[str, Finding]:
    """What is known."""
    if not state.exists():
        return {}
    return {key: Finding(**value) for key, value in json.loads(state.read_text()).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="of model types or classes")
    parser.add_argument("--kind", choices=["causal", "image-text"])
    parser.add_argument("--state", type=Path, default=Path("build/census.json"))
    parser.add_argument("--again", action="append", default=[], metavar="VERDICT", help="examine these anew; or all")
    parser.add_argument("--side-by-side", type=int, default=1)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    cases = [
        case
        for case in CLASSES
        if options.kind in (None, case.kind)
        and (
            not options.only
            or any(fnmatch.fnmatch(name, one) for one in options.only for name in (case.model_type, case.class_name))
        )
    ]
    options.state.parent.mkdir(parents=True, exist_ok=True)
    known = read_state(options.state)
    again = {
        case.key
        for case in cases
        if case.key in known and ("all" in options.again or known[case.key].verdict in options.again)
    }
    if again:
        kept = {key: asdict(value) for key, value in known.items() if key not in again}
        options.state.write_text(json.dumps(kept, indent=1))
    findings = examine_all(cases, options.state, options.side_by_side)
    for kind in ("causal", "image-text"):
        counts = Counter(finding.verdict for key, finding in findings.items() if key.startswith(kind))
        print(kind, dict(counts))
    if options.page:
        options.page.write_text(markdown_page(findings, datetime.now(UTC).date().isoformat()))


if __name__ == "__main__":
    main()
