"""Quantized mixtures: moments against their definition, artifacts that transformers computes alike, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantize_process import start
from support.tiny_architectures import ids
from support.tiny_checkpoints import save_tiny_checkpoint
from support.tiny_mixtures import WHOLE, fuse_experts, load_mixture, tiny_mixture, visits
from transformers import AutoModelForCausalLM

from llmconvert.engine.discovery import discover
from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CalibrationError, SchemeError, UnsupportedError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import judge_model, quantize_checkpoint
from llmconvert.quantize.mixed_precision.budget import Budget
from llmconvert.quantize.mixed_precision.job import plan_choice
from llmconvert.quantize.mixed_precision.units import fused_units
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.rotate import rotate_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((48, 40, 56))
Mixture = Callable[[str], Path]


def quantize(source: Path, output: Path, scheme: str = "w4a16-g16", **options: Any) -> SafetensorsCheckpoint:
    options = {"method": "gptq", "windows": WINDOWS, **options}
    quantize_checkpoint(SafetensorsCheckpoint(source), output, scheme=Scheme.parse(scheme), **options)
    return SafetensorsCheckpoint(output)


def test_an_expert_without_tokens_gets_the_layers_moments(mixture: Mixture, tmp_path: Path) -> None:
    """One short window leaves most experts of a layer unseen; all are quantized, and from finite moments."""
    source = tiny_mixture(tmp_path / "source", "qwen3_moe", num_experts=16, num_experts_per_tok=1)
    artifact = quantize(source, tmp_path / "out", windows=ids((6,)))
    assert sum(name.endswith("weight_packed") for name in artifact) == 2 * (4 + 3 * 16)


@pytest.mark.parametrize("statistics", ["sequential", "original"])
def test_results_say_how_many_tokens_each_expert_got(mixture: Mixture, tmp_path: Path, statistics: Any) -> None:
    options: dict[str, Any] = {"method": "gptq", "windows": WINDOWS, "statistics": statistics}
    scheme = Scheme.parse("w4a16-g16")
    result = quantize_checkpoint(
        SafetensorsCheckpoint(mixture("mixtral")), tmp_path / "out", scheme=scheme, min_tokens_per_expert=1, **options
    )
    seen = visits(load_mixture(mixture("mixtral")), 0, WINDOWS)
    for number in range(6):
        name = f"model.layers.0.mlp.experts.{number}"
        counts = {layer.tokens for layer in result.layers if layer.expert == name}
        if statistics == "original":  # attention is not quantized before the routers see what it gives
            assert counts == {sum(int((index == number).sum()) for _, index in seen)}
        assert len(counts) == 1
    assert all(layer.tokens is None for layer in result.layers if layer.expert is None)


def test_too_few_tokens_for_an_expert_are_told_before_anything_is_written(mixture: Mixture, tmp_path: Path) -> None:
    seen = visits(load_mixture(mixture("mixtral")), 0, WINDOWS)
    counts = {number: sum(int((index == number).sum()) for _, index in seen) for number in range(6)}
    fewest = min(counts, key=lambda number: counts[number])
    with pytest.raises(
        CalibrationError, match=r"min_tokens_per_expert is 90,.* of the 144 calibration.*experts: all"
    ) as told:
        quantize(mixture("mixtral"), tmp_path / "out", min_tokens_per_expert=90)
    assert f"model.layers.0.mlp.experts.{fewest} ({counts[fewest]})" in str(told.value)
    assert not list(tmp_path.iterdir())
    quantize(mixture("mixtral"), tmp_path / "all", min_tokens_per_expert=90, experts="all")
    assert (tmp_path / "all").exists()
    with pytest.raises(CalibrationError, match="the calibration text has 144 tokens in all"):
        quantize(mixture("mixtral"), tmp_path / "more", min_tokens_per_expert=145, experts="all")


def test_what_is_asked_of_experts_is_refused_where_there_are_none(
    tiny: Mixture, mixture: Mixture, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="experts: all: the overrides leave every expert dense"):
        quantize(mixture("mixtral"), tmp_path / "out", experts="all", overrides=[Override("*.experts.*", None)])
    for asked, words in (({"experts": "all"}, "experts: all"), ({"min_tokens_per_expert": 1}, "min_tokens_per_expert")):
        with pytest.raises(UnsupportedError, match=f"{words}: architecture 'llama' has no experts"):
            quantize(tiny("llama"), tmp_path / "out", **asked)
    with pytest.raises(UnsupportedError, match="'rtn' does not"):
        quantize(tiny("llama"), tmp_path / "out", method="rtn", experts="all")


SETTINGS = {"signround": {"steps": 5, "batch": 2}}
CASES = [
    ("mixtral", "gptq", "w4a16-g16"),
    ("mixtral", "rtn", "fp8"),
    ("qwen2_moe", "gptaq", "w4a16-g32"),
    ("deepseek_v3", "gptq", "w3a16-g16"),
    ("lfm2_moe", "hqq", "w8a16-g32"),
    ("hunyuan_v1_moe", "gptq", "w4a16"),
    ("ernie4_5_moe", "rtn", "w4a16-g32"),
    ("deepseek_v2", "awq", "w4a16-g16"),
    ("qwen3_moe", "smoothquant", "w8a16-g32"),
    ("glm4_moe_lite", "rtn", "w4a16-g16"),
    ("minimax_m2", "rtn", "w4a16-g32"),
    ("exaone_moe", "rtn", "w4a16-g32"),
    ("afmoe", "rtn", "w4a16-g32"),
    ("flex_olmo", "rtn", "w4a16-g32"),
    ("solar_open", "rtn", "w4a16-g32"),
    ("nemotron_h", "gptq", "w4a16-g16"),
    ("nemotron_h", "awq", "w4a16-g16"),
    ("llama4_text", "gptq", "w4a16-g16"),
    ("qwen3_5_moe_text", "hqq", "w4a16-g32"),
    ("qwen2_moe", "signround", "w4a16-g16"),
]


@pytest.mark.parametrize(("kind", "method", "scheme"), CASES)
def test_transformers_computes_what_the_engine_does(
    mixture: Mixture, tmp_path: Path, kind: str, method: str, scheme: str
) -> None:
    artifact = quantize(mixture(kind), tmp_path / "out", scheme, method=method, options=SETTINGS.get(method))
    skeleton = Skeleton(SafetensorsCheckpoint(mixture(kind)), CPU)
    experts = [site for site in skeleton.sites.values() if site.kind == "expert"]
    assert experts and all(f"{site.stored}.weight_scale" in artifact for site in experts)
    ours = next(stream_logits(open_dense(artifact), WINDOWS[:1], device=CPU))
    with torch.no_grad():
        theirs = load_mixture(tmp_path / "out")(WINDOWS[0]).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("qwen3_5_moe_text", "gptq"), ("mixtral", "rtn"), ("nemotron_h", "gptaq"), ("deepseek_v3", "hqq")],
)
def test_of_a_tensor_with_all_experts_comes_what_comes_of_single_ones(
    mixture: Mixture, tmp_path: Path, kind: str, method: str
) -> None:
    fused = fuse_experts(mixture(kind), tmp_path / "fused")
    artifacts = [
        quantize(source, tmp_path / name, method=method) for source, name in ((mixture(kind), "a"), (fused, "b"))
    ]
    single, of_fused = ({name.rsplit("layers.", 1)[-1]: found[name] for name in found} for found in artifacts)
    single = {name.replace("block_sparse_moe", "mlp"): value for name, value in single.items()}
    single, of_fused = ({n: v for n, v in found.items() if n[0].isdigit()} for found in (single, of_fused))
    assert single.keys() == of_fused.keys()
    assert all(torch.equal(value, of_fused[name]) for name, value in single.items())
    with torch.no_grad():
        theirs = [load_mixture(tmp_path / name)(WINDOWS[0]).logits for name in ("a", "b")]
    assert torch.equal(*theirs)
    assert torch.equal(theirs[0], next(stream_logits(open_dense(artifacts[1]), WINDOWS[:1], device=CPU)))


DENSE = [Override("*.experts.*", None)]


@pytest.mark.parametrize("kind", WHOLE)
def test_experts_that_no_reader_takes_one_by_one_are_refused_or_left_dense(
    mixture: Mixture, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(UnsupportedError, match=rf"'{kind}': transformers reads .* one tensor .*match: '\*\.experts\."):
        quantize(mixture(kind), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    artifact, source = quantize(mixture(kind), tmp_path / "out", overrides=DENSE), SafetensorsCheckpoint(mixture(kind))
    experts = {site.tensor for site in Skeleton(source, CPU).sites.values() if site.kind == "expert"}
    assert experts and all(torch.equal(artifact[name], source[name]) for name in experts)
    assert any("attn" in name and name.endswith(".weight_packed") for name in artifact)
    ours = next(stream_logits(open_dense(artifact), WINDOWS[:1], device=CPU))
    with torch.no_grad():
        assert torch.equal(ours, load_mixture(tmp_path / "out")(WINDOWS[0]).logits)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama4_text", {"scheme": "fp8", "method": "rtn"}, "quantizes what comes to them, which is not measured here"),
        ("llama4_text", {"method": "gptaq"}, "gptaq compares what comes to an expert .* use gptq, awq"),
        ("llama4_text", {"overrides": DENSE}, "finds no weights for dense ones; quantize the experts too"),
        (
            "longcat_flash",
            {},
            r"others without weights behind them; leave them dense .*match: '\*\.experts\..* are quantized$",
        ),
        ("gpt_oss", {}, r"leave them dense .* are quantized; or take one of llama\.cpp's types, .*scheme: q4_k_m"),
        (
            "mixtral",
            {"scheme": "nf4", "format": "bitsandbytes", "method": "rtn"},
            "reads bitsandbytes in ordinary linears alone",
        ),
    ],
)
def test_experts_that_a_class_or_a_format_has_otherwise_are_refused(
    mixture: Mixture, tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        quantize(mixture(kind), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_experts_count_into_how_much_of_a_block_is_in_linears(tmp_path: Path) -> None:
    """Shared experts in a layout of their own are no reason to refuse a mixture that has many others."""
    source = SafetensorsCheckpoint(save_tiny_checkpoint(tmp_path, "inkling_text", "InklingForCausalLM"))
    assert "transformers reads the experts of a layer from one tensor" in judge_model(source).reason


def test_dense_experts_beside_fp8(mixture: Mixture, tmp_path: Path) -> None:
    artifact = quantize(mixture("qwen3_moe"), tmp_path / "out", "fp8", method="rtn", overrides=DENSE)
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in artifact
    assert len(artifact.config["quantization_config"]["ignore"]) == 4  # experts, two routers, the head
    ours = next(stream_logits(open_dense(artifact), WINDOWS[:1], device=CPU))
    with torch.no_grad():
        assert torch.equal(ours, load_mixture(tmp_path / "out")(WINDOWS[0]).logits)


@pytest.mark.parametrize("kind", ["mixtral", "longcat_flash"])
def test_dense_experts_beside_integers_are_in_one_tensor(mixture: Mixture, tmp_path: Path, kind: str) -> None:
    """As the class holds them: transformers looks for codes in tensors of each, and drops what has none."""
    artifact = quantize(mixture(kind), tmp_path / "out", method="rtn", overrides=DENSE)
    whole = AutoModelForCausalLM.from_pretrained(mixture(kind), dtype=torch.bfloat16).state_dict()
    experts = {name for name in artifact if ".experts." in name}
    assert experts and all(torch.equal(artifact[name], whole[name]) for name in experts)
    ours = next(stream_logits(open_dense(artifact), WINDOWS[:1], device=CPU))
    with torch.no_grad():
        assert torch.equal(ours, load_mixture(tmp_path / "out")(WINDOWS[0]).logits)


@pytest.mark.parametrize(("rest", "attention"), [("w4a16-g16", "w8a16-g16"), ("w4a16-g16", None)])
def test_attention_may_have_another_scheme(mixture: Mixture, tmp_path: Path, rest: str, attention: str | None) -> None:
    overrides = [Override("*.self_attn.*", Scheme.parse(attention) if attention else None)]
    for kind in ("mixtral", "qwen3_moe"):
        artifact = quantize(mixture(kind), tmp_path / kind, rest, method="rtn", overrides=overrides)
        ours = next(stream_logits(open_dense(artifact), WINDOWS[:1], device=CPU))
        with torch.no_grad():
            theirs = load_mixture(tmp_path / kind)(WINDOWS[0]).logits
        assert torch.equal(ours, theirs)


def test_routers_and_gates_of_shared_experts_stay_dense(mixture: Mixture, tmp_path: Path) -> None:
    artifact = quantize(mixture("qwen2_moe"), tmp_path / "out", method="rtn")
    source = SafetensorsCheckpoint(mixture("qwen2_moe"))
    for gate in ("gate", "shared_expert_gate"):
        name = f"model.layers.0.mlp.{gate}.weight"
        assert torch.equal(artifact[name], source[name])
    assert "model.layers.0.mlp.shared_expert_gate" in artifact.config["quantization_config"]["ignore"]


@pytest.mark.slow
def test_lockstep_and_replay_give_the_same_bytes(mixture: Mixture, tmp_path: Path) -> None:
    for method in ("gptq", "gptaq", "awq", "signround"):
        for mode in ("lockstep", "replay"):
            output, options = tmp_path / f"{method}-{mode}", SETTINGS.get(method)
            quantize(mixture("qwen2_moe"), output, method=method, mode=mode, options=options)
        first, second = (tmp_path / f"{method}-{mode}" / "model.safetensors" for mode in ("lockstep", "replay"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w4a16-g16-asym"}, "transformers reads experts in symmetric integers"),
        ({"scheme": "w8a8"}, "transformers reads experts in symmetric integers"),
        (
            {"format": "gptq", "overrides": [Override("*.self_attn.*", None)]},
            "no reader of this format .* use format: compressed-tensors",
        ),
        ({"overrides": [Override("*.experts.1.*", None)]}, "experts get different schemes"),
    ],
)
def test_what_no_reader_has_is_refused(mixture: Mixture, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsupportedError, SchemeError), match=message):
        quantize(mixture("mixtral"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_rotations_and_budgets_over_experts_are_refused(mixture: Mixture, tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(mixture("mixtral"))
    with pytest.raises(
        UnsupportedError,
        match=r"'mixtral': rotations are not folded into mixtures of experts .*leave rotate out",
    ):
        rotate_checkpoint(source)
    request = QuantizeRequest("gptq", Scheme.parse("w4a16"))
    with pytest.raises(SchemeError, match=r"one scheme for all experts.*say what experts have with an override"):
        plan_choice(source, tmp_path / "work", Budget(5.0), request, windows=WINDOWS)


def test_all_experts_are_one_unit_and_gates_are_in_none(mixture: Mixture) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(mixture("hunyuan_v1_moe")), CPU)
    units = fused_units(skeleton, discover(skeleton))
    (experts,) = (unit for unit in units if unit.experts)
    assert set(experts.linears) == {site.name for site in skeleton.sites.values() if site.kind == "expert"}
    assert experts.weights == sum(site.weights for site in skeleton.sites.values() if site.kind == "expert")
    assert not any(".gate." in name for unit in units for name in unit.linears)


def test_a_budget_chooses_for_what_is_no_expert(mixture: Mixture, tmp_path: Path) -> None:
    """What experts have counts into the mean, and transformers computes with the result what the engine does."""
    source, wanted = SafetensorsCheckpoint(mixture("qwen2_moe")), Scheme.parse("w4a16-g32")
    request = QuantizeRequest("gptq", wanted, overrides=(Override("*.experts.*", wanted),))
    budget = Budget(5.5, (3, 4, 8), (16, 32))
    found = plan_choice(source, tmp_path / "work", budget, request, windows=WINDOWS).run()
    assert 5.0 < found.bits_per_weight <= 5.5 and len({choice.scheme for choice in found.choices}) > 1
    artifact = quantize(mixture("qwen2_moe"), tmp_path / "out", str(found.scheme), overrides=found.overrides)
    nbytes = sum(info.nbytes for name, info in artifact.infos.items() if ".weight_" in name and "shape" not in name)
    skeleton = Skeleton(source, CPU)
    weights = sum(unit.weights for unit in fused_units(skeleton, discover(skeleton)))
    assert 8 * nbytes / weights == pytest.approx(found.bits_per_weight, rel=0.05)
    ours = next(stream_logits(open_dense(artifact), WINDOWS[:1], device=CPU))
    with torch.no_grad():
        theirs = load_mixture(tmp_path / "out")(WINDOWS[0]).logits
    assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kills"), [("gptq", 5), ("awq", 2), ("signround", 2)])
def test_killed_among_experts_it_continues_to_the_same_bytes(tmp_path: Path, method: str, kills: int) -> None:
    source = tiny_mixture(tmp_path / "source", "mixtral", num_hidden_layers=3)

    def run(output: str, kill_at: int = 0) -> int:
        options = {"method": method, "settings": SETTINGS.get(method)}
        process = start(source, tmp_path / output, tmp_path / f"{output}.log", kill_at=kill_at, **options)
        process.join()
        assert process.exitcode is not None and process.exitcode != 1, (tmp_path / f"{output}.log").read_text()
        return process.exitcode

    assert run("whole") == 0
    steps = int((tmp_path / "whole.log").read_text().rsplit("steps ", 1)[1])
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for number in range(1, kills + 1):
        output = f"killed-{number}"
        assert run(output, kill_at=number * steps // (kills + 1)) != 0
        assert run(output) == 0
        assert {path.name: path.read_bytes() for path in (tmp_path / output).iterdir()} == wanted
