"""Other schemes for some linears of a finished artifact: what they are fitted to, and what a kill leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_architectures import ids
from transformers import AutoModelForCausalLM

from llmconvert.engine.statistics import Aim, Arrival, Departure, HessianSum
from llmconvert.quantize import requantize
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods.base import BlockData, Solution, Target
from llmconvert.quantize.methods.gptaq import Gptaq
from llmconvert.quantize.methods.signround import SignRound
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.passes.run import LayerResult, read_layers
from llmconvert.quantize.requantize import RequantizeRequest, plan_requantize
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((32, 24, 32))
W2, W4 = Scheme(Int(2), 32), Scheme(Int(4), 32)
LINEARS: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
#: Changed in these tests: behind a block of two bits, and before one.
CHANGED = "model.layers.1.mlp.down_proj"
BEFORE = {f"model.layers.{index}.{name}": W2 for index in range(3) for name in LINEARS}

Tiny = Callable[..., Path]


def artifact(source: Path, output: Path, method: str, options: Mapping[str, Any]) -> Path:
    quantize_checkpoint(
        SafetensorsCheckpoint(source), output, method=method, scheme=W2, windows=WINDOWS, options=options, device=CPU
    )
    return output


def change(
    stored: Path, source: Path, output: Path, method: str, options: Mapping[str, Any], **changes: Scheme | None
) -> tuple[LayerResult, ...]:
    request = RequantizeRequest(method, "compressed-tensors", BEFORE, changes or {CHANGED: W4}, options)
    record = output.with_suffix(".json")
    return plan_requantize(stored, SafetensorsCheckpoint(source), output, request, record=record, windows=WINDOWS).run()


def resident(source: Path, weights: Mapping[str, torch.Tensor] | None = None) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return model


def mixture(source: Path, stored: Path) -> torch.nn.Module:
    """The artifact with the original's weights in the linear that changes, all of it in memory."""
    dense = open_dense(SafetensorsCheckpoint(stored))
    weights = {name: dense[name] for name in dense}
    weights[f"{CHANGED}.weight"] = SafetensorsCheckpoint(source)[f"{CHANGED}.weight"]
    return resident(source, weights)


def seen(model: torch.nn.Module, name: str, of: str = "input") -> list[torch.Tensor]:
    """What a module gets, or gives, window after window."""
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        found.append((args[0] if of == "input" else result).detach().clone())

    handle = model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        for window in WINDOWS:
            model(window, use_cache=False)
    handle.remove()
    return found


def arrivals(model: torch.nn.Module) -> list[Arrival]:
    """What the linear that changes gets, and what its output is added to."""
    residuals = seen(model, CHANGED.replace("mlp.down_proj", "post_attention_layernorm"))
    return [Arrival(x.flatten(0, 1), y.flatten(0, 1)) for x, y in zip(seen(model, CHANGED), residuals, strict=True)]


def test_a_second_stream_runs_the_original_and_not_the_mixture(tiny: Tiny, tmp_path: Path) -> None:
    """GPTAQ on what resident models see: the quantized inputs of the artifact, the outputs of the original."""
    source = tiny("llama-tied")
    stored = artifact(source, tmp_path / "w2", "gptaq", {})
    change(stored, source, tmp_path / "out", "gptaq", {})
    original, mixed = resident(source), mixture(source, stored)
    weight = original.get_parameter(f"{CHANGED}.weight").detach()

    def solved(other: torch.nn.Module) -> torch.Tensor:
        total = HessianSum(CHANGED, weight.shape[1], CPU, original=True, aim=Aim(len(weight), Gptaq().residual))
        for here, there in zip(arrivals(mixed), arrivals(other), strict=True):
            assert there.residual is not None
            total.add(here, Departure(there.inputs @ weight.T, there.residual))
        solution = Gptaq().quantize([Target(CHANGED, weight.clone(), W4)], total.hessian(), torch.float32)
        return solution[CHANGED].tensor.dequantize(torch.float32)

    found = open_dense(SafetensorsCheckpoint(tmp_path / "out"))[f"{CHANGED}.weight"]
    torch.testing.assert_close(found, solved(original))
    assert not torch.allclose(found, solved(mixed)), "the test would not see which stream ran"


def test_signround_aims_at_the_originals_block(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny("llama-tied")
    stored = artifact(source, tmp_path / "w2", "signround", {"steps": 2})
    given: dict[str, tuple[list[torch.Tensor], ...]] = {}
    quantize_block = SignRound.quantize_block

    def watch(self: SignRound, targets: Sequence[Target], data: BlockData, dtype: torch.dtype) -> dict[str, Solution]:
        numbers = range(len(WINDOWS))
        entries, originals = (
            [hidden.clone() for hidden, _ in enter(numbers)] for enter in (data.entries, data.originals)
        )
        solutions = quantize_block(self, targets, data, dtype)
        given[data.prefix] = entries, originals, [output.clone() for output in data.outputs(numbers)]
        return solutions

    monkeypatch.setattr(SignRound, "quantize_block", watch)
    change(stored, source, tmp_path / "out", "signround", {"steps": 2})
    assert list(given) == ["model.layers.1."], "blocks without a change are left alone"
    entries, originals, outputs = given["model.layers.1."]
    original, mixed = resident(source), mixture(source, stored)
    for found, expected in zip(entries, seen(mixed, "model.layers.1"), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(originals, seen(original, "model.layers.1"), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(outputs, seen(original, "model.layers.1", "output"), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["gptq", "gptaq", "signround", "rtn"])
def test_everything_else_keeps_its_bytes(tiny: Tiny, method: str, tmp_path: Path) -> None:
    source = tiny("llama-tied")
    options = {"steps": 2} if method == "signround" else {}
    stored = artifact(source, tmp_path / "w2", method, options)
    dense = "model.layers.0.self_attn.o_proj"
    layers = change(stored, source, tmp_path / "out", method, options, **{CHANGED: W4, dense: None})
    assert {layer.name: layer.scheme for layer in layers} == {CHANGED: str(W4), dense: "none"}
    assert read_layers(tmp_path / "out.json") == layers
    old, new = (load_file(path / "model.safetensors") for path in (stored, tmp_path / "out"))
    kept = [name for name in old if not name.startswith((f"{CHANGED}.", f"{dense}."))]
    assert kept and all(old[name].equal(new[name]) for name in kept)
    assert torch.equal(new[f"{dense}.weight"], SafetensorsCheckpoint(source)[f"{dense}.weight"])
    if method == "gptaq":  # whose weights move to mend what came before
        return
    before, after = (
        open_dense(SafetensorsCheckpoint(path))[f"{CHANGED}.weight"] for path in (stored, tmp_path / "out")
    )
    exact = SafetensorsCheckpoint(source)[f"{CHANGED}.weight"]
    assert (after - exact).norm() < (before - exact).norm()


@pytest.mark.parametrize("step", ["write_layers", "_merge"])
def test_killed_before_the_parts_were_merged_it_knows_what_came_of_them(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source = tiny("llama-tied")
    stored = artifact(source, tmp_path / "w2", "gptq", {})
    expected = change(stored, source, tmp_path / "whole", "gptq", {})
    assert expected[0].error

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(requantize, step, killed)
        with pytest.raises(KeyboardInterrupt):
            change(stored, source, tmp_path / "out", "gptq", {})
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(requantize.QuantizePlan, "run", killed)  # which is done
        assert change(stored, source, tmp_path / "out", "gptq", {}) == expected
    assert read_layers(tmp_path / "out.json") == expected
    files = [(path / "model.safetensors").read_bytes() for path in (tmp_path / "out", tmp_path / "whole")]
    assert files[0] == files[1]
    assert not list(tmp_path.glob(".*"))
