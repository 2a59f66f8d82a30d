"""One pass of the original makes several artifacts: each as if alone, from the moments of the unquantized model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import VOCABULARY, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from llmconvert.context import Context
from llmconvert.engine.statistics import accumulate_hessian
from llmconvert.errors import RunInterruptedError, UnsupportedError
from llmconvert.gguf.ggml.blocks import Codec
from llmconvert.progress import SILENT
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import plan_quantize, quantize_checkpoint
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.methods.imatrix import Imatrix
from llmconvert.quantize.passes.run import QuantizePlan, quantize_together
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.scheme import Scheme, parse_scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

WINDOWS = [torch.randint(3, VOCABULARY, (1, n), generator=torch.Generator().manual_seed(n)) for n in (24, 16)]
REQUESTS = {
    "w4": QuantizeRequest("gptq", Scheme.parse("w4a16-g32"), statistics="original"),
    "mixed": QuantizeRequest(
        "gptq",
        Scheme.parse("w4a16-g32"),
        overrides=(Override("*.down_proj", Scheme.parse("w8a16-g32")),),
        statistics="original",
    ),
    "asym": QuantizeRequest("gptq", Scheme.parse("w3a16-g32-asym"), "compressed-tensors", statistics="original"),
    "swept": QuantizeRequest("gptq", Scheme.parse("w4a16-g32"), "gptq", options={"sweeps": 1}, statistics="original"),
    "int8": QuantizeRequest("gptq", Scheme.parse("w8a8"), statistics="original"),
    "gguf": QuantizeRequest("imatrix", parse_scheme("q4_0"), "gguf", name="tiny", statistics="original"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=3).to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def planned(checkpoint: SafetensorsCheckpoint, place: Path, name: str, context: Context | None = None) -> QuantizePlan:
    output = place / (f"{name}.gguf" if name == "gguf" else name)
    return plan_quantize(checkpoint, output, REQUESTS[name], windows=WINDOWS, context=context)


def content(place: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """Every artifact from a pass of its own."""
    place = tmp_path_factory.mktemp("alone")
    with SafetensorsCheckpoint(source) as checkpoint:
        for name in REQUESTS:
            planned(checkpoint, place, name).run()
    return content(place)


def test_each_artifact_is_what_it_is_alone(source: Path, alone: Mapping[str, bytes], tmp_path: Path) -> None:
    with SafetensorsCheckpoint(source) as checkpoint:
        results = quantize_together([planned(checkpoint, tmp_path, name) for name in REQUESTS])
    assert content(tmp_path) == alone
    assert [len(result.layers) > 0 for result in results] == [name != "gguf" for name in REQUESTS]
    assert len({alone[f"{name}/model.safetensors"] for name in REQUESTS if name != "gguf"}) == len(REQUESTS) - 1


def test_what_files_have_in_common_is_encoded_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set by importance: only what an override changes is encoded for the second file."""
    eights = (Override("*.down_proj", Scheme.of_block("Q8_0")),)
    requests = {"four": REQUESTS["gguf"], "mixed": replace(REQUESTS["gguf"], overrides=eights)}
    encoded: list[int] = []

    def counted(self: Imatrix, codec: Codec, rows: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
        if codec.size > 1:
            encoded.append(rows.numel())
        return torch.from_numpy(codec.encode(rows.numpy(), None if squares is None else squares.numpy()))

    monkeypatch.setattr(Imatrix, "encode", counted)
    (tmp_path / "alone").mkdir()
    with SafetensorsCheckpoint(source) as checkpoint:

        def planned_in(place: str, name: str) -> QuantizePlan:
            return plan_quantize(checkpoint, tmp_path / place / f"{name}.gguf", requests[name], windows=WINDOWS)

        planned_in("alone", "four").run()
        four = sum(encoded)
        planned_in("alone", "mixed").run()
        assert sum(encoded) == 2 * four
        quantize_together([planned_in("together", name) for name in requests])
        down = math.prod(checkpoint.infos["model.layers.0.mlp.down_proj.weight"].shape)
    assert content(tmp_path / "together") == content(tmp_path / "alone")
    assert sum(encoded) == 2 * four + four + 3 * down


class _StoppedError(RunInterruptedError):
    pass


class _StopAt:
    """Progress that interrupts a job when so many blocks are done."""

    def __init__(self, blocks: float) -> None:
        self._left = blocks

    def log(self, message: str) -> None: ...

    def task(self, description: str, total: float) -> _StopAt:
        return self

    def __enter__(self) -> _StopAt:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._left -= amount
        if self._left < 0:
            raise _StoppedError("stopped")


def test_interrupted_it_continues_to_the_same_bytes(source: Path, alone: Mapping[str, bytes], tmp_path: Path) -> None:
    with SafetensorsCheckpoint(source) as checkpoint:
        stopping = Context(progress=_StopAt(1))
        with pytest.raises(_StoppedError):
            quantize_together([planned(checkpoint, tmp_path, name, stopping) for name in REQUESTS])
        results = quantize_together([planned(checkpoint, tmp_path, name) for name in REQUESTS])
    assert {result.resumed_blocks for result in results} == {1}
    assert content(tmp_path) == alone


def test_another_variant_beside_a_stopped_one_begins_anew(
    source: Path, alone: Mapping[str, bytes], tmp_path: Path
) -> None:
    with SafetensorsCheckpoint(source) as checkpoint:
        with pytest.raises(_StoppedError):
            quantize_together([planned(checkpoint, tmp_path, "w4", Context(progress=_StopAt(1)))])
        quantize_together([planned(checkpoint, tmp_path, name) for name in ("asym", "w4")])
    assert content(tmp_path) == {name: data for name, data in alone.items() if name.startswith(("asym/", "w4/"))}


def test_codes_are_those_of_the_original_models_moments(source: Path, tmp_path: Path) -> None:
    """Against inputs that hooks catch in transformers' own resident model."""
    with SafetensorsCheckpoint(source) as checkpoint:
        planned(checkpoint, tmp_path, "w4").run()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, attn_implementation="eager")
    name = "model.layers.2.mlp.down_proj"
    linear, caught = model.get_submodule(name), []
    linear.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for window in WINDOWS:
            model(window)
    hessian = accumulate_hessian(name, caught, linear.in_features, torch.device("cpu"))
    target = Target(name, linear.weight.detach(), Scheme.parse("w4a16-g32"))
    expected = Gptq().quantize([target], hessian, torch.bfloat16)[name].tensor.dequantize(torch.bfloat16)
    with SafetensorsCheckpoint(tmp_path / "w4") as artifact:
        found = open_dense(artifact)[f"{name}.weight"]
    # Attention is summed in another order there, so a tie may fall otherwise; and in float32, as linears are multiplied
    # too, on processors without instructions for bfloat16.
    others = float((found != expected).float().mean())
    assert others < 0.05
    with SafetensorsCheckpoint(source) as checkpoint:
        quantize_checkpoint(
            checkpoint, tmp_path / "sequential", method="gptq", scheme=target.scheme, windows=WINDOWS, progress=SILENT
        )
    with SafetensorsCheckpoint(tmp_path / "sequential") as artifact:
        assert (open_dense(artifact)[f"{name}.weight"] != expected).float().mean() > max(0.01, 2 * others)


@pytest.mark.parametrize("method", ["gptaq", "awq", "signround", "rtn"])
def test_what_needs_more_than_moments_is_refused(source: Path, tmp_path: Path, method: str) -> None:
    request = QuantizeRequest(method, Scheme.parse("w4a16-g32"), statistics="original")
    with SafetensorsCheckpoint(source) as checkpoint, pytest.raises(UnsupportedError, match="leave them sequential"):
        plan_quantize(checkpoint, tmp_path / "out", request, windows=WINDOWS)
