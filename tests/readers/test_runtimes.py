"""Artifacts in the runtimes that serve them: their logits and greedy tokens are those of our own dequantized forward.

Runtimes of the package's own environment always run, the others where ``make readers`` has built theirs. Each opens the
artifacts with the lines of ``docs/formats.md``. ``agreement`` says what counts as the same; quantization itself changes
several times what is allowed, in all but the 8-bit schemes.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from environments import interpreter, run_script
from forward import our_forward
from samples import PROMPTS, VOCABULARY, artifact, sample_model
from snippets import ARTIFACT, loading_snippets
from support.agreement import compare, joined

from llmconvert.compute.activations import ActivationRuntime
from llmconvert.compute.precision import cpu_has
from llmconvert.quantize.runtimes import Pair, Runtime, pairs
from llmconvert.quantize.scheme import Scheme

NEW_TOKENS = 16
#: Root mean square that llama.cpp's attention, in less than float32, adds to log-probabilities here.
ATTENTION = 0.002
PAIRS = [pytest.param(pair, id=f"{pair.runtime.name}-{pair.runtime.format}-{pair.scheme}") for pair in pairs()]

Reports = Callable[[Pair], tuple[Path, dict[str, Any]]]
Seen = dict[Runtime, dict[str, dict[str, str]]]


def snippet(pair: Pair, path: Path) -> str:
    """The documented lines for a pair, with the artifact's place in them."""
    if pair.runtime.format == "gguf":
        return ""  # the lines for llama.cpp print text; tests/gguf/test_real.py runs them
    asymmetric = isinstance(pair.scheme, Scheme) and not pair.scheme.symmetric
    asymmetric = asymmetric and pair.runtime.format == "compressed-tensors"
    name = pair.runtime.name.split(" ")[0] + (" asymmetric" if asymmetric and pair.runtime.environment == "" else "")
    (code,) = [
        code
        for title, code in loading_snippets().items()
        if title.partition(":")[0] == name and pair.runtime.format in title
    ]
    return code.replace(ARTIFACT, str(path))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """``reports(pair)``: the artifact and what the runtime said of it. Each environment runs once over all it reads."""
    root = tmp_path_factory.mktemp("readers")
    source = sample_model(root / "model", torch.bfloat16)

    @cache
    def made(layout: str, scheme: str) -> Path:
        return artifact(source, root / f"{layout}-{scheme}", layout, scheme)

    def place(pair: Pair) -> Path:
        return made(pair.runtime.format, str(pair.scheme))

    @cache
    def run(script: str, environment: str) -> str:
        mine = [pair for pair in pairs() if (pair.runtime.script, pair.runtime.environment) == (script, environment)]
        output = root / f"{script}-{environment}"
        models = {
            str(place(pair)): {"report": str(output / f"{place(pair).name}.json"), "code": snippet(pair, place(pair))}
            for pair in mine
        }
        job = {"prompts": PROMPTS, "new": NEW_TOKENS, "vocabulary": VOCABULARY, "models": models}
        return run_script(f"run_{script}", environment, output, job)

    def find(pair: Pair) -> tuple[Path, dict[str, Any]]:
        script, environment = pair.runtime.script, pair.runtime.environment
        log = run(script, environment)
        path = root / f"{script}-{environment}" / f"{place(pair).name}.json"
        assert path.exists(), log[-3000:]
        return place(pair), json.loads(path.read_text())

    return find


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """Scheme → versions for each runtime, of what was found right; written down for ``matrix.py`` when it is a row."""
    found: Seen = defaultdict(dict)
    yield found
    if place := os.environ.get("LLMCONVERT_SEEN"):
        wanted: dict[Runtime, set[str]] = defaultdict(set)
        for pair in pairs():
            wanted[pair.runtime].add(str(pair.scheme))
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        whole = {runtime: by for runtime, by in found.items() if set(by) == wanted[runtime]}
        rows = {runtime.key: {"date": today, "versions": next(iter(by.values()))} for runtime, by in whole.items()}
        Path(place).write_text(json.dumps(rows, indent=2))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_runtime_computes_what_we_read(pair: Pair, reports: Reports, seen: Seen) -> None:
    interpreter(pair.runtime.environment)
    path, report = reports(pair)
    refused = report.get("refused", "")
    if pair.runtime.script == "vllm" and not cpu_has("avx512_vnni"):
        if refused:
            pytest.skip(f"vLLM's CPU build lacks kernels for this processor: {refused}")
        if pair.scheme == Scheme.parse("w8a8"):
            pytest.skip("without AVX-512 VNNI oneDNN adds products of 8 bits in pairs in 16 bits, which overflow")
    assert not refused
    tokens = torch.tensor(report["tokens"])
    assert tokens.shape == (len(PROMPTS), NEW_TOKENS)
    served: ActivationRuntime = "vllm" if pair.runtime.script == "vllm" else "transformers"
    ours = our_forward(path, joined(PROMPTS, tokens), served)
    floor = ATTENTION if pair.runtime.format == "gguf" else 0.0
    found = compare(torch.tensor(report["logprobs"]), tokens, ours, prompt=len(PROMPTS[0]), floor=floor)
    assert found.holds, (found, report["versions"], report["linears"])
    # Or else the rule would let any token pass. With inputs in 4 bits roundings leave nothing decided, but what a
    # runtime computes may be ours to the last bit.
    assert found.decided > 0.1 or found.distance == 0.0, found
    seen[pair.runtime][str(pair.scheme)] = {
        name: report["versions"][name].partition("+")[0] for name in pair.runtime.packages
    }
