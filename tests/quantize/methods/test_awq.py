"""AWQ against the textbook: scales found by running every candidate forward, on given inputs and inside whole jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized import random_inputs, random_weight
from support.tiny_architectures import ids
from transformers import AutoModelForCausalLM

from llmconvert.engine.statistics import Hessian
from llmconvert.errors import UnsupportedError
from llmconvert.progress import SILENT
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods.awq import Awq
from llmconvert.quantize.methods.base import ScaledEdge, Target, load_method
from llmconvert.quantize.methods.nearest import NearestCodes
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.plan import Override
from llmconvert.quantize.requantize import RequantizeRequest, plan_requantize
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

COLUMNS = 64
WINDOWS = ids((24, 16, 24))
Tiny = Callable[..., Path]


def rounded(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Nearest levels between each group's least and greatest value, zero included."""
    groups = weight.reshape(len(weight), scheme.groups(weight.shape[1]), -1)
    low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
    if scheme.symmetric:
        step = torch.maximum(-low, high) / (2**scheme.bits - 1) * 2
        codes = (groups / step).round().clamp(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
        return (codes * step).reshape(weight.shape)
    step = (high - low) / (2**scheme.bits - 1)
    zero = (-low / step).round()
    codes = ((groups / step).round() + zero).clamp(0, 2**scheme.bits - 1)
    return ((codes - zero) * step).reshape(weight.shape)


def textbook(
    weights: Sequence[torch.Tensor], inputs: torch.Tensor, scheme: Scheme, channels: torch.Tensor, *, use: bool
) -> tuple[torch.Tensor, float]:
    """The scale with the least error of outputs, each candidate run forward; and by how much it beats the next."""
    groups = [weight.abs().reshape(len(weight), scheme.groups(weight.shape[1]), -1) for weight in weights]
    share = torch.cat([(group / (group.amax(-1, True) + 1e-6)).flatten(1) for group in groups]).mean(0)
    size = inputs.abs().mean(0)
    for column in range(len(channels)):
        alike = channels == channels[column]
        size[alike], share[alike] = size[alike].mean(), share[alike].mean()
    tried = [torch.ones_like(size)]
    for step in range(20):
        scale = size ** (step / 20) / ((share ** (1 - step / 20) + 1e-4) if use else 1)
        scale = scale.clamp(min=1e-4)
        tried.append(scale / (scale.max() * scale.min()).sqrt())
    losses = []
    for scale in tried:
        outputs = [inputs / scale @ rounded(weight * scale, scheme).T - inputs @ weight.T for weight in weights]
        losses.append(float(sum(output.square().sum() for output in outputs)))
    order = sorted(range(len(tried)), key=losses.__getitem__)
    return tried[order[0]], losses[order[1]] / losses[order[0]]


def edge_of(
    weights: Sequence[torch.Tensor], inputs: torch.Tensor, scheme: Scheme, channels: torch.Tensor
) -> ScaledEdge:
    targets = [Target(f"linear{number}", weight, scheme) for number, weight in enumerate(weights)]
    hessian = Hessian(inputs.T @ inputs / len(inputs), len(inputs))
    return ScaledEdge(targets, channels, hessian, inputs.abs().mean(0), inputs.abs().amax(0))


@pytest.mark.parametrize("use", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["w4a16-g16-asym", "w3a16-g32", "w4a16"])
def test_scales_are_those_of_the_textbook(name: str, shared: bool, use: bool) -> None:
    scheme = Scheme.parse(name)
    channels = torch.arange(COLUMNS) % 16 if shared else torch.arange(COLUMNS)
    weights = [random_weight(rows, COLUMNS, seed=rows) for rows in (40, 24)]
    for seed in range(20):
        inputs = random_inputs(512, COLUMNS, seed=seed).float()
        expected, margin = textbook(weights, inputs, scheme, channels, use=use)
        if margin < 1.01:  # too close for the precision of products
            continue
        found = Awq(weights=use).scales(edge_of(weights, inputs, scheme, channels), torch.float32)
        torch.testing.assert_close(found, expected)
        if float(expected.std()) > 0:
            return
    pytest.fail("no inputs tell the candidates apart")


def test_both_ways_are_tried_where_asked_for() -> None:
    weights, inputs = [random_weight(40, COLUMNS)], random_inputs(512, COLUMNS).float()
    edge = edge_of(weights, inputs, Scheme.parse("w3a16-g16"), torch.arange(COLUMNS))

    def loss(scale: torch.Tensor) -> float:
        error = inputs / scale @ rounded(weights[0] * scale, next(iter(edge.targets)).scheme).T - inputs @ weights[0].T
        return float(error.square().sum())

    one, other, both = (loss(Awq(weights=use).scales(edge, torch.float32)) for use in (True, False, "both"))
    assert both <= 1.005 * min(one, other)


def test_scaled_weights_lose_less_than_plain_ones() -> None:
    inputs = random_inputs(512, COLUMNS).float()
    scheme = Scheme.parse("w3a16-g32-asym")
    edge = edge_of([random_weight(40, COLUMNS)], inputs, scheme, torch.arange(COLUMNS))
    target, hessian = next(iter(edge.targets)), edge.hessian
    assert hessian is not None
    scale = Awq().scales(edge, torch.float32)
    scaled = Target("linear0", target.weight * scale, scheme)
    small = Hessian(hessian.matrix / scale / scale.unsqueeze(1), hessian.tokens)
    ours = Awq().quantize([scaled], small, torch.float32)["linear0"]
    assert ours.error is not None
    outputs = inputs @ target.weight.T
    actual = float((inputs / scale @ ours.tensor.dequantize(torch.float32).T - outputs).square().sum())
    assert ours.error == pytest.approx(actual / float(outputs.square().sum()), rel=0.02)
    plain = Rtn().quantize([target], None, torch.float32)["linear0"].tensor
    clipped = NearestCodes().quantize([target], hessian, torch.float32)["linear0"]
    assert ours.error < clipped.error  # type: ignore[operator]
    assert actual < 0.7 * float((inputs @ plain.dequantize(torch.float32).T - outputs).square().sum())


def quantize(source: Path, output: Path, name: str = "w4a16-g16-asym", **options: Any) -> Path:
    settings: dict[str, Any] = {"method": "awq", "windows": WINDOWS, **options}
    quantize_checkpoint(SafetensorsCheckpoint(source), output, scheme=Scheme.parse(name), **settings)
    return output


@pytest.mark.parametrize(
    ("name", "norm", "offset"),
    [("llama", "input_layernorm", 0.0), ("gemma2", "input_layernorm", 1.0), ("opt", "self_attn_layer_norm", 0.0)],
)
def test_a_job_folds_the_textbooks_scales_into_the_norm(
    tiny: Tiny, tmp_path: Path, name: str, norm: str, offset: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(name), attn_implementation="eager").eval()
    layer = next(part for path, part in model.named_modules() if path.endswith("layers.0"))
    inputs: list[torch.Tensor] = []
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window)
    linears = [getattr(layer.self_attn, part).weight.detach() for part in ("q_proj", "k_proj", "v_proj")]
    scheme, channels = Scheme.parse("w4a16-g16-asym"), torch.arange(64)
    expected, margin = textbook(linears, torch.cat(inputs), scheme, channels, use=True)
    assert margin > 1.002
    quantize(tiny(name), tmp_path / "out")
    before, after = SafetensorsCheckpoint(tiny(name)), SafetensorsCheckpoint(tmp_path / "out")
    key = next(key for key in before if f"layers.0.{norm}.weight" in key)
    torch.testing.assert_close((before[key] + offset) / (after[key] + offset), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("then", ["nearest", "gptq"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gemma2", "phi3", "opt"])
def test_artifacts_are_near_the_original_and_norms_make_up_for_the_scales(
    tiny: Tiny, tmp_path: Path, name: str, then: str
) -> None:
    """At 8 bits nearly nothing is lost, so whatever is folded wrong shows in the logits."""
    quantize(tiny(name), tmp_path / name, "w8a16-g16", options={"then": then})
    attention = "eager" if name == "gemma2" else "sdpa"
    logits = []
    for directory in (tiny(name), tmp_path / name):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", attn_implementation=attention).eval()
        with torch.no_grad():
            logits.append(torch.cat([model(input_ids=window).logits[0] for window in WINDOWS]))
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.02


def test_linears_left_dense_are_folded_too(tiny: Tiny, tmp_path: Path) -> None:
    """``up_proj`` stays dense, and takes what ``down_proj`` is scaled by; no scale moves to linears that stay dense."""
    overrides = [Override("*.gate_proj", None), Override("*.up_proj", None), Override("*.1.self_attn.*", None)]
    quantize(tiny("llama"), tmp_path / "out", "w8a16-g16", overrides=overrides)
    before, after = SafetensorsCheckpoint(tiny("llama")), SafetensorsCheckpoint(tmp_path / "out")
    kept = [name for name in before if name in after and torch.equal(before[name], after[name])]
    assert "model.layers.0.post_attention_layernorm.weight" in kept
    assert "model.layers.0.input_layernorm.weight" not in kept
    assert "model.layers.1.self_attn.v_proj.weight" in kept and "model.layers.1.input_layernorm.weight" in kept
    up = "model.layers.0.mlp.up_proj.weight"
    ratios = (before[up] / after[up]).float()
    scale = ratios.mean(1, keepdim=True)
    assert float(scale.std()) > 0.01
    torch.testing.assert_close(ratios, scale.expand_as(ratios), rtol=1e-4, atol=1e-5)
    view = open_dense(after)
    down = "model.layers.0.mlp.down_proj.weight"
    assert float((view[down] / scale.T - before[down]).norm() / before[down].norm()) < 0.01


def test_where_scales_move_is_told(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(type(SILENT), "log", lambda self, message: lines.append(message))
    quantize(tiny("llama"), tmp_path / "out")
    start = "awq: scales move from self_attn.q_proj, self_attn.k_proj, self_attn.v_proj to input_layernorm; "
    assert lines[0].startswith(start)


def test_single_linears_of_a_finished_artifact_cannot_change(tiny: Tiny, tmp_path: Path) -> None:
    """Their originals don't go with the artifact's norms any more."""
    quantize(tiny("llama"), tmp_path / "out")
    source = SafetensorsCheckpoint(tiny("llama"))
    linears = (name.removesuffix(".weight") for name in source if "_proj" in name)
    before = dict.fromkeys(linears, Scheme(Int(4, symmetric=False), 16))
    changes = {"model.layers.0.mlp.down_proj": Scheme(Int(8))}
    request = RequantizeRequest("awq", "compressed-tensors", before, changes)
    again, record = tmp_path / "again", tmp_path / "record.json"
    with pytest.raises(UnsupportedError, match="'awq' changes norms along with the linears"):
        plan_requantize(tmp_path / "out", source, again, request, record=record, windows=WINDOWS)
    assert not (tmp_path / "again").exists()


def test_wrong_options_are_refused() -> None:
    for options in ({"weights": "maybe"}, {"then": "hqq"}, {"grid": 0}):
        with pytest.raises(UnsupportedError, match="weights is true, false or both, then is nearest or gptq"):
            load_method("awq", options)
