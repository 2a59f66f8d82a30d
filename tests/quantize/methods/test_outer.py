"""The head and the embedding: which moments they are solved under, tied or not, in slices, and interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import VOCABULARY, tiny_llama_dir
from transformers import AutoModelForCausalLM

from llmconvert.engine.sites import Site
from llmconvert.engine.statistics import Hessian
from llmconvert.engine.stream import Mode
from llmconvert.quantize import steps
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import plan_quantize, quantize_checkpoint
from llmconvert.quantize.methods import outer
from llmconvert.quantize.methods.base import Quantizer, Target, load_quantizer
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.plan import QuantizeRequest
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

SCHEME = Scheme.parse("w3a16-g32-affine")
WINDOWS = [torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def quantized(source: Path, output: Path, method: str, mode: Mode | None = None) -> QuantizedView:
    options = {"steps": 2} if method == "signround" else {}
    quantize_checkpoint(
        SafetensorsCheckpoint(source),
        output,
        method=method,
        scheme=SCHEME,
        format="mlx",
        windows=WINDOWS,
        mode=mode,
        options=options,
    )
    view = open_dense(SafetensorsCheckpoint(output))
    assert isinstance(view, QuantizedView)
    return view


def head_moments(model: Path, view: QuantizedView) -> Hessian:
    """``XᵀX / tokens`` of what transformers gives the head, in a model whose blocks are those of an artifact."""
    original = AutoModelForCausalLM.from_pretrained(model)
    inside = {name: view[name] for name in view if ".layers." in name}
    original.load_state_dict(inside, strict=False)
    seen: list[torch.Tensor] = []
    original.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for window in WINDOWS:
            original(window)
    inputs = torch.cat(seen)
    return Hessian((inputs.T @ inputs / len(inputs)).float(), len(inputs))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_solved_under_the_moments_of_what_comes_to_it(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Hessian | None] = {}

    def spy(site: Site, weight: torch.Tensor, scheme: Scheme, method: Quantizer, hessian: Hessian, *rest: Any) -> Any:
        given[site.name] = Hessian(hessian.matrix.clone(), hessian.tokens)
        return outer.solve_outer(site, weight, scheme, method, hessian, *rest)

    monkeypatch.setattr(steps, "solve_outer", spy)
    source = tiny_llama_dir(tmp_path / "model", tie_word_embeddings=tied)
    view = quantized(source, tmp_path / "gptq", "gptq")
    dense = SafetensorsCheckpoint(source)
    # What the embedding has become is not yet what the blocks saw.
    expected = head_moments(source, view)
    name = EMBEDDING if tied else HEAD
    moments = given[name]
    assert moments is not None and moments.tokens == expected.tokens == 160
    torch.testing.assert_close(moments.matrix, expected.matrix, rtol=1e-4, atol=1e-4)
    target = Target(name, dense[f"{name}.weight"], SCHEME)
    solved = Gptq().quantize([target], moments, torch.float32)[name].tensor
    assert torch.equal(view.read_quantized(f"{name}.weight").codes, solved.codes)
    if not tied:
        target = Target(EMBEDDING, dense[f"{EMBEDDING}.weight"], SCHEME)
        nearest = Rtn(search=True).quantize([target], None, torch.float32)[EMBEDDING].tensor
        assert torch.equal(view.read_quantized(f"{EMBEDDING}.weight").codes, nearest.codes)


@pytest.mark.parametrize("method", ["gptaq", "signround"])
def test_lockstep_and_replay_give_the_same_head(method: str, tmp_path: Path) -> None:
    source = tiny_llama_dir(tmp_path / "model", tie_word_embeddings=False)
    views = [quantized(source, tmp_path / mode, method, mode) for mode in ("lockstep", "replay")]
    for name in (EMBEDDING, HEAD):
        codes = [view.read_quantized(f"{name}.weight").codes for view in views]
        assert torch.equal(*codes)


def test_slices_are_solved_as_the_whole_and_errors_are_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 64, generator=generator) for rows in (96, 200))
    hessian = Hessian(inputs.T @ inputs / 200, 200)
    before = hessian.matrix.clone()
    site = Site(HEAD, f"{HEAD}.weight", 96, 64, 1, "head")
    whole = outer.solve_outer(site, weight, SCHEME, Gptq(), hessian, torch.float32)
    monkeypatch.setattr(outer, "_WEIGHTS_AT_ONCE", 64 * 32)
    parts = outer.solve_outer(site, weight, SCHEME, Gptq(), hessian, torch.float32)
    assert torch.equal(whole.tensor.codes, parts.tensor.codes) and torch.equal(hessian.matrix, before)
    error = whole.tensor.dequantize(torch.float32) - weight
    lost, energy = (float(((part @ before) * part).sum()) for part in (error, weight))
    assert whole.error == pytest.approx(lost / energy, rel=1e-3)
    assert parts.error == pytest.approx(lost / energy, rel=1e-3)


def test_a_tied_matrix_does_not_move_toward_what_only_the_head_would_gain_from() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 64, generator=generator) for rows in (96, 200))
    moments = inputs.T @ inputs / 200
    drifted = (inputs + 0.3 * torch.randn(200, 64, generator=generator)).T @ inputs / 200
    gptaq = load_quantizer("gptaq", {})
    found = {}
    for kind in ("tied", "head"):
        site = Site("x", "x.weight", 96, 64, 1, kind)
        hessian = Hessian(moments.clone(), 200, drifted.clone())
        found[kind] = outer.solve_outer(site, weight, SCHEME, gptaq, hessian, torch.float32).tensor
    still = Hessian(moments.clone(), 200, moments.clone())
    alone = gptaq.quantize([Target("x", weight, SCHEME)], still, torch.float32)["x"].tensor
    assert torch.equal(found["tied"].codes, alone.codes)
    assert not torch.equal(found["head"].codes, alone.codes)


def test_what_a_vocabulary_takes_is_stated(tmp_path: Path) -> None:
    """The plan's memory grows with the head, whose codes stand in it whole."""
    needs = []
    for size in (VOCABULARY, 64 * VOCABULARY):
        source = tiny_llama_dir(tmp_path / f"model{size}", vocab_size=size)
        request = QuantizeRequest("gptq", SCHEME, "mlx")
        plan = plan_quantize(SafetensorsCheckpoint(source), tmp_path / "out", request, windows=WINDOWS)
        needs.append(plan.inputs.work)
    assert needs[1] - needs[0] > 63 * VOCABULARY * 64 * 6
