"""Perplexity and divergence against formulas written another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmconvert.errors import CalibrationError, GateError, UsageError
from llmconvert.validate.predictions import perplexity as module
from llmconvert.validate.predictions.perplexity import compare_logits, perplexity


def make(
    windows: int, length: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Token windows, and the logits of two related models for them."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, vocabulary, (1, length), generator=generator) for _ in range(windows)]
    first = [torch.randn(1, length, vocabulary, generator=generator) * 3 for _ in range(windows)]
    second = [logits + torch.randn(logits.shape, generator=generator) * 0.3 for logits in first]
    return ids, [logits.to(dtype) for logits in first], [logits.to(dtype) for logits in second]


def numpy_log_softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


@settings(deadline=None, max_examples=20)
@given(windows=st.integers(1, 4), length=st.integers(2, 40), vocabulary=st.integers(2, 300), seed=st.integers(0, 99))
def test_perplexity_is_the_formula(windows: int, length: int, vocabulary: int, seed: int) -> None:
    ids, logits, _ = make(windows, length, vocabulary, seed)
    losses = [
        -numpy_log_softmax(scores)[0, np.arange(length - 1), window[0, 1:].numpy()]
        for scores, window in zip(logits, ids, strict=True)
    ]
    result = perplexity(logits, ids)
    assert result.nll == pytest.approx(np.concatenate(losses).mean(), rel=1e-5, abs=1e-6)
    assert result.ppl == pytest.approx(math.exp(np.concatenate(losses).mean()), rel=1e-4)
    assert result.window_nlls == pytest.approx([loss.mean() for loss in losses], rel=1e-5, abs=1e-6)
    assert result.tokens == windows * (length - 1)


def test_a_tiny_model_scores_as_its_own_loss(tiny_llama_model: torch.nn.Module) -> None:
    ids = torch.randint(0, 320, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = tiny_llama_model(ids, labels=ids)
    assert perplexity([output.logits], [ids]).nll == pytest.approx(output.loss.item(), rel=1e-5)


def test_divergence_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pieces of three rows: the result must not depend on where the pieces end.
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 3 * 257)
    ids, first, second = make(3, 32, 257, seed=3)
    result = compare_logits(zip(first, second, strict=True), ids)
    p = torch.cat([x[0, :-1] for x in first]).double().log_softmax(-1)
    q = torch.cat([x[0, :-1] for x in second]).double().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert result.kl_mean == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert result.kl_p99 == pytest.approx(divergence.quantile(0.99).item(), rel=1e-4)
    assert result.kl_p999 == pytest.approx(divergence.quantile(0.999).item(), rel=1e-4)
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result.reference == perplexity(first, ids)
    assert result.artifact == perplexity(second, ids)
    assert result.increase == pytest.approx(result.artifact.ppl / result.reference.ppl - 1)
    worst = int(divergence.argmax())
    assert (result.worst[0].window, result.worst[0].position) == divmod(worst, 31)
    assert [token.kl for token in result.worst] == pytest.approx(divergence.topk(10).values.tolist(), rel=1e-4)
    target = torch.cat([window[0, 1:] for window in ids])[worst]
    assert result.worst[0].artifact_nll == pytest.approx(-q[worst, target].item(), rel=1e-4)


def test_a_model_does_not_diverge_from_itself() -> None:
    ids, logits, _ = make(2, 24, 100, seed=5, dtype=torch.bfloat16)
    result = compare_logits(zip(logits, logits, strict=True), ids)
    assert (result.kl_mean, result.kl_p99, result.top1_agreement, result.increase) == (0, 0, 1, 0)


def test_logits_are_left_alone() -> None:
    ids, first, second = make(1, 8, 50, seed=6)
    before = first[0].clone(), second[0].clone()
    compare_logits(zip(first, second, strict=True), ids)
    assert torch.equal(first[0], before[0]) and torch.equal(second[0], before[1])


def test_the_interval_covers_the_truth() -> None:
    """Of 200 samples drawn from a known distribution, about 95 % of the intervals must hold its mean."""
    covered = 0
    for seed in range(200):
        losses = np.random.default_rng(seed).normal(2.0, 0.3, (40, 1))
        low, high = module._interval(losses[:, 0], np.full(40, 7), seed)
        assert low is not None and high is not None
        covered += low <= 2.0 <= high
    assert 180 <= covered <= 199


def test_the_interval_is_reproducible_and_absent_for_one_window() -> None:
    ids, logits, _ = make(16, 16, 60, seed=7)
    first, again, other = perplexity(logits, ids), perplexity(logits, ids), perplexity(logits, ids, seed=1)
    assert first == again and first.low != other.low
    assert first.low is not None and first.high is not None and first.low < first.ppl < first.high
    assert perplexity(logits[:1], ids[:1]).low is None


def naive_strided(model: torch.nn.Module, text: torch.Tensor, length: int, stride: int) -> list[float]:
    """The losses of transformers' perplexity guide: windows ``stride`` apart, labels of what came before masked."""
    losses: list[float] = []
    done = 0
    for begin in range(0, len(text) - length + 1, stride):
        ids = text[begin : begin + length].unsqueeze(0)
        labels = ids.clone()
        labels[:, : done - begin] = -100
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none", ignore_index=-100)
        losses += loss[labels[0, 1:] != -100].tolist()
        done = begin + length
    return losses


@pytest.mark.parametrize("stride", [1, 5, 16, 31, 32])
def test_overlapping_windows_score_each_prediction_once(tiny_llama_model: torch.nn.Module, stride: int) -> None:
    text = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(11))
    windows = [text[begin : begin + 32].unsqueeze(0) for begin in range(0, 150 - 32 + 1, stride)]
    scored = [31] + [min(stride, 31)] * (len(windows) - 1)
    with torch.no_grad():
        logits = [tiny_llama_model(window).logits for window in windows]
    expected = naive_strided(tiny_llama_model, text, 32, stride)
    result = perplexity(logits, windows, scored=scored)
    assert result.tokens == len(expected)
    assert result.nll == pytest.approx(np.mean(expected), rel=1e-5)
    # The interval is one over windows, each weighing as many tokens as were scored in it.
    ends = np.cumsum(scored)
    parts = [expected[end - count : end] for end, count in zip(ends, scored, strict=True)]
    assert result.window_nlls == pytest.approx([np.mean(part) for part in parts], rel=1e-4)
    assert (result.low, result.high) == pytest.approx(bootstrap(parts, seed=0), rel=1e-6)


def bootstrap(parts: list[list[float]], seed: int) -> tuple[float, float]:
    """Percentiles of the perplexity over resampled windows, one resample at a time."""
    drawn = np.random.default_rng(seed).integers(0, len(parts), (10_000, len(parts)))
    found = [math.exp(sum(sum(parts[i]) for i in row) / sum(len(parts[i]) for i in row)) for row in drawn.tolist()]
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def test_divergence_too_counts_only_what_is_scored() -> None:
    ids, first, second = make(3, 32, 257, seed=12)
    scored = [31, 7, 7]
    result = compare_logits(zip(first, second, strict=True), ids, scored=scored)
    pairs = list(zip(first, scored, strict=True)), list(zip(second, scored, strict=True))
    p, q = (torch.cat([x[0, -1 - count : -1] for x, count in side]).double().log_softmax(-1) for side in pairs)
    divergence = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert result.kl_mean == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert result.kl_p99 == pytest.approx(divergence.quantile(0.99).item(), rel=1e-4)
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert (result.reference.tokens, result.artifact.tokens) == (45, 45)
    worst = int(divergence.argmax())
    place = (0, worst) if worst < 31 else (1 + (worst - 31) // 7, 24 + (worst - 31) % 7)
    assert (result.worst[0].window, result.worst[0].position) == place
    last = compare_logits(zip(first, second, strict=True), ids, scored=[1, 1, 1])
    assert {token.position for token in last.worst} == {30}
    with pytest.raises(ValueError, match="can't be scored"):
        perplexity(first, ids, scored=[31, 0, 7])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_infinite_logits_are_no_number(value: float) -> None:
    ids, first, second = make(2, 16, 50, seed=8)
    second[1][0, 5, 3] = value
    with pytest.raises(GateError, match="artifact's logits are not finite at token 5 of window 1"):
        perplexity(second, ids)
    with pytest.raises(CalibrationError, match="reference's logits"):
        compare_logits(zip(second, first, strict=True), ids)
    with pytest.raises(GateError, match="artifact's logits"):
        compare_logits(zip(first, second, strict=True), ids)


def test_other_vocabularies_are_refused() -> None:
    ids, first, _ = make(1, 8, 50, seed=9)
    _, other, _ = make(1, 8, 51, seed=9)
    with pytest.raises(UsageError, match="50 tokens, the artifact 51"):
        compare_logits(zip(first, other, strict=True), ids)


def test_logits_must_belong_to_the_windows() -> None:
    ids, logits, _ = make(2, 8, 50, seed=10)
    with pytest.raises(ValueError, match="don't belong"):
        perplexity([x[:, :-1] for x in logits], ids)
    with pytest.raises(ValueError, match="fewer logits than windows"):
        perplexity(logits[:1], ids)
