"""Where artifacts are served: turns alternate, gains and losses are told alike, and what was not measured fails."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_llama_dir

from llmconvert.errors import RecipeError, UnsupportedError
from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import parse_scheme
from llmconvert.recipes.loading import make_recipe
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.measurement import Subject
from llmconvert.validate.runtimes.isolated import UnmeasuredError
from llmconvert.validate.serving import check as serving
from llmconvert.validate.serving import runtimes as serving_runtimes
from llmconvert.validate.serving.check import ServingCheck
from llmconvert.validate.serving.runtimes import ServedBy, Turn, require_readers, run_turn

TRANSFORMERS, LLAMA_CPP = ServedBy("transformers"), ServedBy("llama.cpp")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("model") / "original", dtype=torch.bfloat16, hidden_size=64)


@pytest.fixture(scope="module")
def artifacts(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("artifacts")
    made = {"compressed-tensors": root / "packed", "gguf": root / "model.gguf"}
    for format, path in made.items():
        scheme = parse_scheme("q8_0" if format == "gguf" else "w4a16-g32")
        with SafetensorsCheckpoint(original) as checkpoint:
            quantize_checkpoint(checkpoint, path, method="rtn", scheme=scheme, format=format)
    return made


def measure_all(artifact: Path, original: Path, check: ServingCheck) -> list[Check]:
    with open_artifact(artifact) as stored, SafetensorsCheckpoint(original) as reference:
        subject = Subject(artifact, stored, open_dense(stored), reference, reference, None, torch.device("cpu"))
        return check.measure(subject)


def measure(artifact: Path, original: Path, check: ServingCheck) -> Check:
    (found,) = measure_all(artifact, original, check)
    return found


def test_original_and_artifact_take_turns(
    artifacts: dict[str, Path], original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(served: ServedBy, model: Path, contexts: Any, tokens: int, **_: Any) -> Turn:
        asked.append(model.name)
        pace = {"original": 10.0, "packed": 8.0}[model.name]
        of = {context: pace * context for context in contexts}
        return Turn("1.0", 20 / pace, int(100 / pace), of, dict.fromkeys(contexts, pace))

    monkeypatch.setattr(serving, "run_turn", run)
    check = measure(artifacts["compressed-tensors"], original, ServingCheck((TRANSFORMERS,), (16, 24), tokens=4))
    assert asked == ["original", "packed"] * 2
    assert (check.name, check.value, check.reference) == ("serve.transformers.tokens_per_second", 8.0, 10.0)
    assert "writes 0.80 × and reads 0.80 × as fast as the original at 24 tokens" in check.text
    assert "takes 1.20 × its memory, 1.25 × to load" in check.text
    (section,) = check.sections
    assert [row[:4] for row in section.rows[:2]] == [("original", 1.0, 2.0, 10.0), ("artifact", 1.0, 2.5, 12.0)]
    assert "card" in section.shown and len(section.columns) == 8


def test_what_was_asked_for_and_not_measured_fails(
    artifacts: dict[str, Path], original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(served: ServedBy, model: Path, *_: Any, **__: Any) -> Turn:
        if model.name == "original":
            return Turn("1.0", 1.0, 1, {16: 1.0}, {16: 1.0})
        raise UnmeasuredError("it cannot run packed")

    monkeypatch.setattr(serving, "run_turn", run)
    packed = artifacts["compressed-tensors"]
    failed = measure(packed, original, ServingCheck((TRANSFORMERS,), (16,), tokens=4))
    assert not failed.ok and failed.value is None and "it cannot run packed" in failed.text
    other = measure(packed, original, ServingCheck((LLAMA_CPP,), (16,), tokens=4))
    assert not other.ok and "llama.cpp does not read compressed-tensors" in other.text
    beside = measure_all(packed, original, ServingCheck((LLAMA_CPP, TRANSFORMERS), (16,), tokens=4))
    assert [check.ok for check in beside] == [True, False] and not beside[0].measured
    long = measure(packed, original, ServingCheck((TRANSFORMERS,), (1 << 20,), tokens=4))
    assert not long.ok and "fewer than any context asked for" in long.text


def test_a_runtime_that_is_missing_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"vllm cannot be imported here .*vllm=/path/to/python"):
        ServingCheck((ServedBy.parse("vllm"),)).require()
    with pytest.raises(UnsupportedError, match="is no Python that can be run"):
        ServedBy.parse(f"mlx={tmp_path / 'python'}").require()
    with pytest.raises(UnsupportedError, match="does not have vllm"):
        ServedBy.parse(f"vllm={sys.executable}").require()
    ServedBy.parse(f"transformers={sys.executable}").require()
    with pytest.raises(RecipeError, match="serve"):
        make_recipe({"model": "m", "validate": {"serve": ["sglang"]}}, "validate")


@pytest.mark.parametrize(
    ("asked", "format", "scheme", "told"),
    [
        ("llama.cpp", "compressed-tensors", "w4a16-g64", "llama.cpp does not read .*vllm and transformers can: name"),
        ("mlx", "gguf", "q4_0", "mlx does not read gguf; llama.cpp can"),
        ("vllm", "compressed-tensors", "nvfp4", "vllm does not load .*nvfp4 .* on a CPU; transformers can"),
        ("vllm", "compressed-tensors", "w8a16-g32", "vllm does not load w8a16-g32-sym .* on a CPU"),
        ("llama.cpp", None, None, "llama.cpp does not read dense weights in safetensors; vllm and mlx and"),
    ],
)
def test_what_no_runtime_asked_for_can_run_is_refused(
    asked: str, format: str | None, scheme: str | None, told: str
) -> None:
    schemes = [parse_scheme(scheme)] if scheme is not None else []
    with pytest.raises(UnsupportedError, match=rf"validate\.serve: {told}"):
        require_readers([ServedBy(asked)], format, schemes, accelerated=False)
    if asked == "vllm":
        assert not require_readers([ServedBy(asked)], format, schemes, accelerated=True)
    beside = [ServedBy(asked), ServedBy("llama.cpp" if format == "gguf" else "transformers")]
    assert list(require_readers(beside, format, schemes, accelerated=False)) == [asked]


@pytest.mark.slow
def test_a_real_turn_in_transformers_and_llama_cpp(artifacts: dict[str, Path], original: Path) -> None:
    for served, format in ((TRANSFORMERS, "compressed-tensors"), (LLAMA_CPP, "gguf")):
        check = measure(artifacts[format], original, ServingCheck((served,), (16, 40), tokens=4, rounds=1))
        assert check.ok and check.value is not None and check.value > 0, check.text
        assert check.reference is not None and check.reference > 0, check.text
        (section,) = check.sections
        assert all(isinstance(cell, float) and cell > 0 for row in section.rows for cell in row[1:])
        assert {row[0] for row in section.rows} == {"original", "artifact"}
        if served == LLAMA_CPP:  # without torch it is smaller than this process, whose peak a child may inherit
            here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            assert all(isinstance(row[3], float) and row[3] < 0.8 * here for row in section.rows)


def test_an_error_s_message_is_told_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM: one line says that there is no kernel, and the next ones why."""
    script = tmp_path / "worker.py"
    message = "Failed to find a kernel. Reasons: \n KernelA requires AMX.\n KernelB requires CUDA."
    script.write_text(f"print('loading'); raise ValueError({message!r})")
    monkeypatch.setattr(serving_runtimes.worker, "__file__", str(script))
    with pytest.raises(UnmeasuredError) as raised:
        run_turn(ServedBy("vllm"), tmp_path, (16,), 4, vocabulary=96, seed=0)
    told = "ValueError: Failed to find a kernel. Reasons: KernelA requires AMX. KernelB requires CUDA."
    assert str(raised.value).endswith(told)


def test_vllm_s_prompt_is_told_from_what_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By when the first token comes, in one request: two requests' times may differ by more than writing takes."""
    clock, left = [0.0], ["prompt", "prompt", "token", "token", "token"]

    class Engine:
        def add_request(self, request_id: str, prompt: dict[str, list[int]], sampling: int) -> None:
            assert prompt == {"prompt_token_ids": [3, 1, 4]} and sampling == 3

        def has_unfinished_requests(self) -> bool:
            return bool(left)

        def step(self) -> list[SimpleNamespace]:
            kind = left.pop(0)
            clock[0] += 5.0 if kind == "prompt" else 0.25
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])])] if kind == "token" else []

    fake = SimpleNamespace(
        LLM=lambda **_: SimpleNamespace(llm_engine=Engine()), SamplingParams=lambda max_tokens, **_: max_tokens
    )
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(serving_runtimes.worker.time, "perf_counter", lambda: clock[0])
    turn = serving_runtimes.worker._vllm({"model": "m", "contexts": [3], "tokens": 2})
    assert turn([3, 1, 4], 2) == (10.25, 0.5)
