"""The whole job: what it writes is what the engine computed, and what it refuses leaves nothing behind."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantize_jobs import WINDOWS, quantize, refused
from support.tiny_architectures import ARCHITECTURES, ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmconvert.compute.attention import use_attention
from llmconvert.engine import skeleton as skeleton_module
from llmconvert.engine.states import DiskStates
from llmconvert.engine.stream import Mode
from llmconvert.errors import (
    CalibrationError,
    CapacityError,
    CheckpointError,
    OutputError,
    SchemeError,
    UnsupportedError,
)
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.plan import Override
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

Tiny = Callable[..., Path]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def runtime(directory: Path) -> PreTrainedModel:
    attention = "eager" if "gemma2" in directory.name else "sdpa"
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", attn_implementation=attention).eval()


@pytest.mark.parametrize(
    ("method", "fast"),
    [("gptq", False), ("gptq", True), ("awq", False), ("awq", True)],
    ids=["gptq, 16-bit products", "gptq, float32 products", "awq, 16-bit products", "awq, float32 products"],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_artifact_computes_what_the_engine_saw(
    tiny: Tiny, name: str, method: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What entered the last block during calibration enters it again when the artifact runs in transformers.

    To the bit with transformers' products; with those of a processor that is faster in float32, up to sums that fall on
    the other side of a tie, and what becomes of them, if the runtime attends in float32 as well; by itself transformers
    rounds the weights of attention to 16 bits, and is another rounding away.
    """
    monkeypatch.setattr(skeleton_module, "compute_dtype", lambda device: torch.float32 if fast else torch.bfloat16)
    monkeypatch.setattr(skeleton_module, "use_dot_products", lambda: False)
    seen: dict[int, torch.Tensor] = {}
    put = DiskStates.put

    def record(self: DiskStates, block: int, batch: int, hidden: torch.Tensor) -> None:
        if block == 2:
            seen[batch] = hidden.clone()
        put(self, block, batch, hidden)

    monkeypatch.setattr(DiskStates, "put", record)
    result = quantize(tiny(name, torch.bfloat16), tmp_path / name, method=method)
    assert [layer.name.rpartition(".layers.")[2] for layer in result.layers] == [
        f"{block}.{linear}" for block in range(3) for stop in ARCHITECTURES[name].shared for linear in stop
    ]
    damping = 0.01 if method == "gptq" else None
    assert all(layer.scheme == "w4a16-g32-sym" and layer.damping == damping for layer in result.layers)
    assert all(layer.error is not None and 0 < layer.error < 0.2 for layer in result.layers)
    model = runtime(tmp_path / name)
    own = entering_last_block(model)
    assert len(own) == len(seen) == 3
    if not fast:
        assert all(torch.equal(hidden, seen[batch]) for batch, hidden in enumerate(own))
        return
    use_attention(model, "float32")
    for roundings, entering in ((2, own), (1, entering_last_block(model))):
        for batch, hidden in enumerate(entering):
            difference = (hidden.float() - seen[batch].float()).abs()
            assert difference.norm() < roundings * torch.finfo(torch.bfloat16).eps * hidden.float().norm()


def entering_last_block(model: PreTrainedModel) -> list[torch.Tensor]:
    """The hidden states that enter the last of three blocks, for every window."""
    found: list[torch.Tensor] = []
    last = next(module for path, module in model.named_modules() if path.endswith("layers.2"))
    hook = last.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window, use_cache=False)
    hook.remove()
    return found


def test_layer_errors_are_those_of_the_outputs(tiny: Tiny, tmp_path: Path) -> None:
    """The first linears see the original model's activations, so their error can be measured from outside."""
    result = quantize(tiny("llama"), tmp_path / "out", "w3a16-g32")
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    inputs: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window, use_cache=False)
    view = open_dense(SafetensorsCheckpoint(tmp_path / "out"))
    rows = torch.cat(inputs)
    for layer in result.layers[:3]:
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        output, ours = rows @ weight.T, rows @ view[f"{layer.name}.weight"].T
        actual = float((output - ours).square().sum() / output.square().sum())
        assert layer.error == pytest.approx(actual, rel=0.02)


@pytest.mark.parametrize("method", ["gptq", "gptaq", "awq"])
@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "phi3", "gpt_neox", "opt-untied"])
def test_lockstep_and_replay_write_the_same_bytes(tiny: Tiny, name: str, method: str, tmp_path: Path) -> None:
    modes: tuple[Mode, ...] = ("lockstep", "replay")
    for mode in modes:
        assert quantize(tiny(name, torch.bfloat16), tmp_path / mode, mode=mode, method=method).memory.mode == mode
    assert files(tmp_path / "lockstep") == files(tmp_path / "replay")


def test_two_runs_write_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    for run in ("first", "second"):
        quantize(tiny("qwen2"), tmp_path / run)
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_the_budget_decides_between_the_modes(tiny: Tiny, tmp_path: Path) -> None:
    windows = ids((64,) * 40)
    roomy = quantize(tiny("llama"), tmp_path / "roomy", windows=windows).memory
    assert roomy.mode == "lockstep"
    least = roomy.total - roomy.parts["kept"]
    tight = quantize(tiny("llama"), tmp_path / "tight", windows=windows, memory_budget=least - 1).memory
    assert tight.mode == "replay" and tight.total < roomy.total
    assert files(tmp_path / "roomy") == files(tmp_path / "tight")


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_everything_that_is_not_quantized_is_carried_over(tmp_path: Path, method: str) -> None:
    source = tiny_model(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    path = source / "model.safetensors"
    extra = {"model.mtp.weight": torch.arange(6.0).reshape(2, 3), "model.count": torch.tensor(7)}
    save_file({**load_file(path), **extra}, path, {"format": "pt"})
    (source / "tokenizer.json").write_text('{"a": 1}')
    quantize(source, tmp_path / "out", method=method)
    old, new = SafetensorsCheckpoint(source), SafetensorsCheckpoint(tmp_path / "out")
    for name, tensor in old.items():
        if name in new:
            assert torch.equal(new[name], tensor) and new.infos[name].dtype == tensor.dtype
        else:
            assert name.endswith("proj.weight") and name.replace(".weight", ".weight_packed") in new
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    declared = new.config["quantization_config"]
    assert {**new.config, "quantization_config": None} == {**old.config, "quantization_config": None}
    assert declared["ignore"] == ["lm_head", "model.mtp"]
    assert sorted(files(tmp_path / "out")) == sorted({*files(source)})


def test_tied_embeddings_stay_tied(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("llama-tied", torch.bfloat16), tmp_path / "out", method="rtn")
    assert "lm_head.weight" not in SafetensorsCheckpoint(tmp_path / "out")
    model = runtime(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_shards_are_read_by_transformers(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama", torch.bfloat16)
    quantize(source, tmp_path / "whole")
    result = quantize(source, tmp_path / "shards", max_shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert result.nbytes == sum(
        path.stat().st_size for path in (tmp_path / "shards").iterdir() if path.name.startswith("model")
    )
    with torch.no_grad():
        whole, parts = (
            runtime(tmp_path / name)(input_ids=WINDOWS[0], use_cache=False).logits for name in ("whole", "shards")
        )
    assert torch.equal(whole, parts)


def schemes(directory: Path) -> Mapping[str, str | None]:
    view = open_dense(SafetensorsCheckpoint(directory))
    assert isinstance(view, QuantizedView)
    return {
        name.removesuffix(".weight"): str(view.scheme_of(name)) if view.scheme_of(name) else None
        for name in view
        if "layers." in name and "proj" in name
    }


def test_the_first_override_that_matches_wins(tiny: Tiny, tmp_path: Path) -> None:
    overrides = [
        Override("*.1.mlp.down_proj", None),
        Override("*.down_proj", Scheme.parse("w8a16-channel")),
        Override("*.2.*", Scheme.parse("w3a16-g16")),
    ]
    result = quantize(tiny("llama"), tmp_path / "out", overrides=overrides)
    found = schemes(tmp_path / "out")
    assert found["model.layers.0.mlp.up_proj"] == "w4a16-g32-sym"
    assert found["model.layers.0.mlp.down_proj"] == "w8a16-channel-sym"
    assert found["model.layers.1.mlp.down_proj"] is None
    assert found["model.layers.2.mlp.down_proj"] == "w8a16-channel-sym"
    assert found["model.layers.2.self_attn.q_proj"] == "w3a16-g16-sym"
    assert {layer.name: layer.scheme for layer in result.layers} == {name: text for name, text in found.items() if text}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_linears_left_dense_keep_their_bytes(tiny: Tiny, tmp_path: Path, method: str) -> None:
    quantize(tiny("llama"), tmp_path / "out", method=method, overrides=[Override("*.mlp.*", None)])
    old, new = SafetensorsCheckpoint(tiny("llama")), SafetensorsCheckpoint(tmp_path / "out")
    kept = [name for name in old if ".mlp." in name]
    assert len(kept) == 9 and all(torch.equal(old[name], new[name]) for name in kept)
    assert set(new.config["quantization_config"]["ignore"]) == {name.removesuffix(".weight") for name in kept} | {
        "lm_head"
    }


def test_a_group_size_that_does_not_divide_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    message = r"group size 64 does not divide the 96 columns of model\.layers\.0\.mlp\.down_proj; .*fit it: 16, 32"
    refused(tmp_path, SchemeError, message, tiny("llama"), name="w4a16-g64")


def test_an_override_that_matches_nothing_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    overrides = [Override("*.donw_proj", None)]
    refused(
        tmp_path,
        SchemeError,
        r"'\*\.donw_proj' matches no linear .*like model\.layers\.0",
        tiny("llama"),
        overrides=overrides,
    )


@pytest.mark.parametrize("pattern", ["*.q_proj", "*.1.mlp.up_proj"])
@pytest.mark.parametrize("scheme", [None, Scheme(Int(8))])
def test_fused_linears_are_not_split(tiny: Tiny, tmp_path: Path, pattern: str, scheme: Scheme | None) -> None:
    overrides = [Override(pattern, scheme)]
    refused(tmp_path, SchemeError, "share one input and are fused by runtimes", tiny("llama"), overrides=overrides)


def test_a_quantized_source_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("llama"), tmp_path / "once", method="rtn")
    refused(tmp_path, UnsupportedError, "already quantized .compressed-tensors", tmp_path / "once")


def test_calibrating_without_text_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    refused(tmp_path, CalibrationError, "'gptq' needs calibration text and was given none", tiny("llama"), windows=())


def test_a_model_without_linears_is_refused_by_name(tmp_path: Path) -> None:
    settings = AutoConfig.for_model("gpt2", vocab_size=128, n_embd=64, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(settings).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    message = r"architecture 'gpt2': .* of the weights of block 0 are not in linear layers"
    refused(tmp_path, UnsupportedError, message, tmp_path / "source", method="rtn")


def test_unknown_methods_options_and_formats_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    for options, message in (
        ({"method": "gtpq"}, "method 'gtpq' is not known; known are rtn, gptq"),
        ({"options": {"dampign": 0.1}}, "method 'gptq' has no option 'dampign'"),
        ({"format": "gptq9"}, "format 'gptq9' is not known"),
        ({"name": "w4a8-g32"}, "int8 activations with w8a8"),
    ):
        (tmp_path / message[:12]).mkdir()
        refused(tmp_path / message[:12], UnsupportedError, message, tiny("llama"), **options)


def test_a_budget_too_small_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    message = r"needs .* MB \(replay.*10 MB may be used"
    refused(tmp_path, CapacityError, message, tiny("llama"), memory_budget=10_000_000)


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq"])
def test_damaged_weights_are_named(tmp_path: Path, method: str) -> None:
    source = tiny_model(tmp_path / "source")
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.o_proj.weight"][2, 2] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    refused(
        tmp_path,
        CheckpointError,
        r"layers\.1\.self_attn\.o_proj' has values that are not finite",
        source,
        method=method,
    )


def test_an_output_that_is_not_empty_is_refused_and_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        quantize(tiny("llama"), tmp_path / "out")
    assert files(tmp_path / "out") == {"thesis.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_but_the_artifact_is_left(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(files(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert json.loads(files(tmp_path / "out")["config.json"])["quantization_config"]["format"] == "pack-quantized"


def test_a_device_that_runs_out_of_memory_gets_one_batch_at_a_time(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call goes on behind the last finished block, to the same bytes; where that fails too, a later one."""
    quantize(tiny("llama"), tmp_path / "whole")
    solve = Gptq.quantize
    calls, failing = itertools.count(), {9}  # in the third block of four stops each

    def fail(self: Gptq, *arguments: Any) -> Any:
        if next(calls) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has more to say")
        return solve(self, *arguments)

    monkeypatch.setattr(Gptq, "quantize", fail)
    result = quantize(tiny("llama"), tmp_path / "out")
    assert (result.memory.mode, result.resumed_blocks) == ("replay", 2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")

    calls, failing = itertools.count(), {9, 11}
    with pytest.raises(CapacityError, match=r"cpu ran out of memory \(CUDA out of memory\), .* MB .*replay.*continues"):
        quantize(tiny("llama"), tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert quantize(tiny("llama"), tmp_path / "again").resumed_blocks == 2
    assert files(tmp_path / "again") == files(tmp_path / "whole")
