"""Distilled mixtures of experts: gradients against transformers' resident model, unmet experts, artifacts, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.distilling import QUICK, WINDOWS, distil, held_out_divergence, interrupted_at, quantized, subject_of
from support.tiny_mixtures import fuse_experts, load_mixture, tiny_mixture, visits
from torch import nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from llmconvert.context import Context
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UnsupportedError, UsageError
from llmconvert.quantize.distil import job, memory, streamed
from llmconvert.quantize.distil.memory import foresee_distil, visit_groups
from llmconvert.quantize.distil.streamed import StreamedStudent
from llmconvert.quantize.formats.dense_view import QuantizedView
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME

Mixture = Callable[[str], Path]

_STILL = replace(QUICK, code_rate=0.0)
_SCHEME = "w3a16-g16"


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (streamed, job):
        monkeypatch.setattr(module, "compute_dtype", lambda device: torch.float32)


def _resident(directory: Path) -> PreTrainedModel:
    """transformers' own in float32, with its own loop over experts."""
    model = load_mixture(directory)  # packed experts stay in 16 bits, whatever is asked for
    with torch.no_grad():
        model(WINDOWS[0])  # unpacks the linears
    return nn.Module.float(model)


def _dense(view: QuantizedView, directory: Path) -> Path:
    """The artifact's dense weights as a checkpoint that transformers loads by itself."""
    weights = {name: view[name].contiguous() for name in view}
    for stem in {name.partition(".experts.")[0] for name in weights if ".feed_forward.experts." in name}:
        # Llama 4's, of which transformers has no names for each: inputs by outputs, gate and up side by side.
        parts = [
            [weights.pop(f"{stem}.experts.{number}.{leaf}_proj.weight").T for leaf in ("gate", "up", "down")]
            for number in range(4)
        ]
        gate_up = torch.stack([torch.cat(each[:2], dim=1) for each in parts])
        down = torch.stack([each[2] for each in parts])
        weights |= {f"{stem}.experts.gate_up_proj": gate_up, f"{stem}.experts.down_proj": down}
    directory.mkdir()
    save_file({name: value.contiguous() for name, value in weights.items()}, directory / SINGLE_NAME, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(view.config))
    return directory


def _oracle(original: Path, dense: Path, numbers: list[int], positions: slice) -> tuple[float, PreTrainedModel]:
    """The divergence, and a model whose parameters have its gradients."""
    teacher, student = _resident(original), _resident(dense)
    parts = []
    for window in (WINDOWS[number] for number in numbers):
        with torch.no_grad():
            wanted = teacher(window).logits[0, positions].log_softmax(-1)
        found = student(window).logits[0, positions].log_softmax(-1)
        parts.append(kl_div(found, wanted, log_target=True, reduction="sum") / len(wanted) / len(numbers))
    loss = torch.stack(parts).sum()
    loss.backward()
    return float(loss), student


def _gradient(model: PreTrainedModel, site: str) -> torch.Tensor:
    """By a matrix: that of a linear, or rows of what transformers has of all experts of a layer."""
    stem, number, projection = site.rsplit(".", 2)
    if not number.isdecimal():
        gradient = model.get_parameter(f"{site}.weight").grad
        assert gradient is not None
        return gradient
    leaf = "down_proj" if projection == "down_proj" else "gate_up_proj"
    gradient = model.get_parameter(f"{stem}.{leaf}").grad
    assert gradient is not None
    part = gradient[int(number)]
    if type(model.get_submodule(stem)).__name__.startswith("Llama4"):  # inputs by outputs
        part = part.T
    return part if leaf == "down_proj" else part.chunk(2)[projection == "up_proj"]


@pytest.mark.parametrize(
    ("kind", "scheme", "fused"),
    [
        ("mixtral", _SCHEME, False),
        ("qwen3_moe", _SCHEME, True),  # one tensor for all of a layer, in the original
        ("qwen2_moe", "fp8", False),  # shared experts
        ("llama4_text", _SCHEME, False),  # transposed, an input for each expert
    ],
)
def test_gradients_are_those_of_transformers_resident_model(
    kind: str, scheme: str, fused: bool, mixture: Mixture, tmp_path: Path
) -> None:
    original = fuse_experts(mixture(kind), tmp_path / "fused") if fused else mixture(kind)
    artifact = quantized(original, tmp_path / "w", scheme)
    numbers, positions = [0, 2], slice(1, None, 2)
    with SafetensorsCheckpoint(original) as first, SafetensorsCheckpoint(artifact) as second:
        subject = subject_of(first, second, _STILL)
        student = StreamedStudent(subject, WINDOWS[:3], tmp_path)
        assert isinstance(subject.view, QuantizedView)
        divergence, model = _oracle(original, _dense(subject.view, tmp_path / "dense"), numbers, positions)
        losses = student.pair.differentiate(numbers, positions=positions, hidden=0.0)
        assert losses.kl == pytest.approx(divergence, rel=1e-4)
        skeleton = Skeleton(subject.view, torch.device("cpu"))
        sites = {site.tensor: site.name for site in skeleton.sites.values()}
        parameters = {stored: name for name, stored in skeleton.names.items()}
        assert any(skeleton.sites[sites[name]].kind == "expert" for name in subject.weights)
        met = 0
        for name in (*subject.weights, *subject.norms):
            found = student.learner.parameters[name].grad
            if name in subject.norms:
                wanted = model.get_parameter(parameters[name]).grad
            else:
                start = subject.view.read_quantized(name)
                product = _gradient(model, sites[name]) * start.dequantize(torch.float32)
                wanted = product.unflatten(1, (start.scale.shape[1], -1)).sum(-1).flatten()
            assert wanted is not None
            if found is None:
                assert not wanted.any(), name
                continue
            met += 1
            assert float((found - wanted).abs().max()) < 2e-3 * float(wanted.abs().max()), name
        assert met > len(subject.weights) / 2


def _copied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: part.clone() for key, part in state.items()}


def test_an_expert_that_no_token_meets_stays_where_it_is(tmp_path: Path) -> None:
    """Neither its scales nor what Adam remembers of them, though it has moved before; the others move on."""
    original = tiny_mixture(tmp_path / "source", "qwen3_moe", num_experts=12, num_experts_per_tok=1)
    artifact = quantized(original, tmp_path / "w", _SCHEME)
    windows = [WINDOWS[0][:, :10], WINDOWS[1][:, :10]]
    with SafetensorsCheckpoint(original) as first, SafetensorsCheckpoint(artifact) as second:
        subject = subject_of(first, second, _STILL)
        student = StreamedStudent(subject, windows, tmp_path)
        optimizer, parameters = student.learner.optimizer, student.learner.parameters
        seen, states = [], []
        for number in range(2):
            student.pair.differentiate([number], positions=slice(None), hidden=0.0)
            seen.append({name for name, value in parameters.items() if value.grad is not None})
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            states.append(
                {
                    name: {key: part.clone() for key, part in optimizer.state[one].items()}
                    for name, one in parameters.items()
                }
            )
        assert isinstance(subject.view, QuantizedView)
        model = load_mixture(_dense(subject.view, tmp_path / "dense")).float()
    of_first = {
        f"model.layers.0.mlp.experts.{int(one)}.up_proj.weight" for one in visits(model, 0, windows[:1])[0][1].unique()
    }
    ours = {name for name in seen[0] if name.startswith("model.layers.0.") and name.endswith("up_proj.weight")}
    assert ours == of_first and 0 < len(ours) < 12
    left, met = seen[0] - seen[1], seen[0] & seen[1]
    assert left and met and all(".experts." in name for name in left)
    for name in parameters:
        assert int(states[1][name]["step"]) == (name in seen[0]) + (name in seen[1])
    for name in left:
        assert states[0][name]["factor"].any()
        assert all(torch.equal(states[1][name][key], part) for key, part in states[0][name].items())
    assert not any(torch.equal(states[0][name]["factor"], states[1][name]["factor"]) for name in met)


def _divergence(original: Path, artifact: Path) -> float:
    return held_out_divergence(_resident(original), _resident(artifact))


def test_scales_learn_and_transformers_loads_what_was_measured(mixture: Mixture, tmp_path: Path) -> None:
    original = mixture("mixtral")
    before = quantized(original, tmp_path / "w3", _SCHEME)
    report = distil(original, before, tmp_path / "out", replace(_STILL, steps=6, evaluate_every=3))
    assert report.streamed and report.before is not None and report.after is not None
    assert report.after < 0.97 * report.before
    assert report.before == pytest.approx(_divergence(original, before), rel=0.02)
    assert report.after == pytest.approx(_divergence(original, tmp_path / "out"), rel=0.02)
    first, second = load_file(before / SINGLE_NAME), load_file(tmp_path / "out" / SINGLE_NAME)
    assert {name: (t.dtype, t.shape) for name, t in first.items()} == {n: (t.dtype, t.shape) for n, t in second.items()}
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    experts = {name for name in first if ".experts." in name and name.endswith("weight_scale")}
    assert experts <= changed and len(experts) == 2 * 6 * 3
    assert all(name.endswith("weight_scale") or "norm" in name for name in changed)  # routers stay, and codes
    assert (tmp_path / "out" / SINGLE_NAME).stat().st_size == (before / SINGLE_NAME).stat().st_size
    assert (tmp_path / "out" / "config.json").read_bytes() == (before / "config.json").read_bytes()
    kept = ("embed_tokens.weight", "lm_head.weight", "gate.weight")
    dense = load_file(original / SINGLE_NAME).items()
    assert report.codes == sum(t.numel() for name, t in dense if t.dim() == 2 and not name.endswith(kept))


def test_an_interrupted_one_continues_to_the_bit(mixture: Mixture, tmp_path: Path) -> None:
    original, options = mixture("qwen3_moe"), replace(_STILL, steps=4, save_every=1, evaluate_every=2, batch=1)
    artifact, state = quantized(original, tmp_path / "w3", _SCHEME), tmp_path / "state"
    distil(original, artifact, tmp_path / "whole", options)
    with interrupted_at(3):
        distil(original, artifact, tmp_path / "again", options, state=state)
    report = distil(original, artifact, tmp_path / "again", options, state=state)
    assert report.resumed_at == 3
    assert (tmp_path / "again" / SINGLE_NAME).read_bytes() == (tmp_path / "whole" / SINGLE_NAME).read_bytes()


def test_windows_that_wait_for_experts_go_through_in_groups(
    mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, options = mixture("mixtral"), replace(_STILL, steps=1, batch=3)
    artifact = quantized(original, tmp_path / "w3", _SCHEME)
    with SafetensorsCheckpoint(original) as source:
        skeleton = Skeleton(source, torch.device("cpu"), torch.float32)
        assert visit_groups(skeleton, [32] * 5) == [range(5)]
        with monkeypatch.context() as patched:
            patched.setattr(memory, "_VISITS_NBYTES", skeleton.visit_nbytes(64, held=True))
            assert visit_groups(skeleton, [32] * 5) == [range(2), range(2, 4), range(4, 5)]
            assert visit_groups(skeleton, [80, 32, 32, 40]) == [range(1), range(1, 3), range(3, 4)]
            parts = distil(original, artifact, tmp_path / "parts", options)
    whole = distil(original, artifact, tmp_path / "whole", options)
    assert (parts.before, parts.after) == (whole.before, whole.after)
    assert (tmp_path / "parts" / SINGLE_NAME).read_bytes() == (tmp_path / "whole" / SINGLE_NAME).read_bytes()


def test_what_takes_all_experts_together_is_refused_before_the_work(mixture: Mixture, tmp_path: Path) -> None:
    original = mixture("mixtral")
    w4 = quantized(original, tmp_path / "w4", "w4a16-g32")
    for option, options in (("code_rate", replace(_STILL, code_rate=0.1)), ("hidden", replace(_STILL, hidden=0.1))):
        with pytest.raises(UnsupportedError, match=rf"'mixtral' is a mixture.*set quantize\.distil\.{option} to 0"):
            distil(original, w4, tmp_path / "out", options)
        with SafetensorsCheckpoint(original) as source, pytest.raises(UnsupportedError, match=option):
            foresee_distil(source, options, 32, context=Context())
    other = tiny_mixture(tmp_path / "other", "mixtral", intermediate_size=64)
    with pytest.raises(UsageError, match=r"experts\.0\.w1\.weight of the artifact is not the original's"):
        distil(other, w4, tmp_path / "out", _STILL)
    assert not (tmp_path / "out").exists()


def test_memory_counts_scales_of_all_experts_and_weights_of_one(tmp_path: Path) -> None:
    options, scheme = replace(_STILL, steps=2), Scheme.parse("w4a16-g16")
    stated = []
    for count in (4, 12):
        source = tiny_mixture(tmp_path / str(count), "qwen3_moe", num_experts=count, moe_intermediate_size=256)
        with SafetensorsCheckpoint(source) as original:
            stated.append(foresee_distil(original, options, 32, context=Context(), scheme=scheme).memory)
    scales = 2 * 8 * 3 * 256 * 64 // 16  # of two layers
    router = 3 * 4 * 8 * 64  # in float32, of the block that is loaded
    kept = 2 * 8 * 3 * (64 << 10)  # holes between what is learned of 48 linears
    assert 24 * scales + kept <= stated[1] - stated[0] <= 24 * scales + kept + 2 * router
