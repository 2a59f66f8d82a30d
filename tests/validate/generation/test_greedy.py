"""Continuations and fidelity in transformers itself, on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmconvert.errors import GateError, UnsupportedError
from llmconvert.validate.generation.greedy import PROMPTS, Continuation, Generations, compare, generate, is_looping
from llmconvert.validate.runtimes.fidelity import fidelity
from llmconvert.validate.runtimes.transformers import end_tokens, runtime

CPU = torch.device("cpu")


def generations(*texts: tuple[list[int], bool]) -> Generations:
    made = (Continuation(f"prompt {i}", tuple(ids), str(ids), ended) for i, (ids, ended) in enumerate(texts))
    return Generations(tuple(made), 100.0, 10.0, "none")


def test_continuations_are_transformers_greedy_ones(original: Path) -> None:
    with runtime(original, device=CPU) as loaded:
        made = generate(loaded, PROMPTS[:3], max_new_tokens=6)
    tokenizer = AutoTokenizer.from_pretrained(original)
    model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
    for prompt, continuation in zip(PROMPTS, made.continuations, strict=False):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert continuation.ids == tuple(expected.tolist())
        assert continuation.prompt == prompt
    # The weights are gone at once, though the model is still referred to.
    assert sum(tensor.numel() for tensor in loaded.model.parameters()) == 0
    assert made.prefill_tokens_per_second > 0 and made.decode_tokens_per_second > 0
    assert made.runtime.startswith("transformers ") and made.runtime.endswith("on cpu, bfloat16")


def test_a_text_ends_at_the_end_token(original: Path, tmp_path: Path) -> None:
    with runtime(original, device=CPU) as loaded:
        (before,) = generate(loaded, PROMPTS[:1], max_new_tokens=8).continuations
    directory = tmp_path / "ending"
    shutil.copytree(original, directory)
    end = before.ids[3]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 5]}))
    with runtime(directory, device=CPU) as loaded:
        assert {end, 5} <= loaded.end_tokens
        (after,) = generate(loaded, PROMPTS[:1], max_new_tokens=8).continuations
    assert after.ended and after.ids == before.ids[: before.ids.index(end) + 1]


def test_a_prompt_without_chat_template_goes_as_it_is(original: Path, tmp_path: Path) -> None:
    directory = tmp_path / "base"
    shutil.copytree(original, directory)
    (directory / "chat_template.jinja").unlink()
    with runtime(directory, device=CPU) as loaded:
        (made,) = generate(loaded, ["The library"], max_new_tokens=3).continuations
        ids = loaded.tokenizer("The library", return_tensors="pt")["input_ids"]
        assert made.ids[0] == int(loaded.model(ids).logits[0, -1].argmax())


def test_the_quantized_model_loads_and_agrees_with_dequantized_weights(quantized: Path) -> None:
    from llmconvert.quantize.formats.dense_view import open_dense
    from llmconvert.storage.checkpoint import SafetensorsCheckpoint

    window = torch.arange(3, 60).unsqueeze(0)
    dense = open_dense(SafetensorsCheckpoint(quantized))
    with runtime(quantized, device=CPU) as loaded:
        assert loaded.problems == ()
        reference = AutoModelForCausalLM.from_config(loaded.model.config, dtype=torch.bfloat16)
        reference.load_state_dict({name: dense[name] for name in dense}, strict=False)
        expected = reference(window).logits.detach()
        found = fidelity(loaded, [window], [expected])
        assert found.ok and found.max_abs_diff == 0 and found.top1_agreement == 1 and found.tokens == 57
        other = fidelity(loaded, [window], [expected + 0.25])
        assert other.max_abs_diff == pytest.approx(0.25, abs=0.02) and not other.ok
        with pytest.raises(GateError, match=r"\(1, 57, 320\), our reader \(1, 56, 320\)"):
            fidelity(loaded, [window], [expected[:, 1:]])
        with pytest.raises(GateError, match="not finite"):
            loaded.model.lm_head.weight.data[0, 0] = float("nan")
            fidelity(loaded, [window], [expected])


def test_missing_weights_are_reported(original: Path, tmp_path: Path) -> None:
    directory = tmp_path / "incomplete"
    shutil.copytree(original, directory)
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.1.mlp.other"] = torch.ones(2)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with runtime(directory, device=CPU) as loaded:
        assert "missing: model.layers.1.mlp.up_proj.weight" in loaded.problems
        assert "unexpected: model.layers.1.mlp.other" in loaded.problems


def test_what_transformers_refuses_is_said(original: Path, tmp_path: Path) -> None:
    directory = tmp_path / "unknown"
    shutil.copytree(original, directory)
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "nonesuch"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="nonesuch"), runtime(directory, device=CPU):
        pass


@given(phrase=st.lists(st.integers(0, 3), min_size=1, max_size=8), before=st.lists(st.integers(4, 9), max_size=20))
def test_a_repeated_phrase_is_a_loop(phrase: list[int], before: list[int]) -> None:
    assert is_looping(before + phrase * max(3, -(-12 // len(phrase))))


@given(ids=st.lists(st.integers(0, 10**6), max_size=60, unique=True))
def test_text_without_repetition_is_no_loop(ids: list[int]) -> None:
    assert not is_looping(ids)
    assert not is_looping([*ids, 7, 7, 7])
    # A loop that the text got out of again is none.
    assert not is_looping([1, 2] * 20 + ids[:2] + [10**7, 10**7 + 1, 10**7 + 2])


def test_comparison_by_hand() -> None:
    loop = [9] * 12
    before = generations(([1, 2, 3, 4], False), ([5, 6], True), (loop, False))
    after = generations(([1, 2, 9, 4], False), ([5, 6, 7, 8], False), (loop, False))
    found = compare(before, after)
    assert found.prefix == pytest.approx((2 + 2 + 12) / 3)
    assert found.agreement == pytest.approx((3 / 4 + 2 / 4 + 1) / 3)
    assert (found.looping, found.ended) == ((1, 1), (1, 0))
    with pytest.raises(ValueError, match="different prompts"):
        compare(before, Generations((before.continuations[1],) * 3, 1, 1, ""))


@pytest.mark.parametrize(
    ("declared", "found"),
    [(None, {5}), (3, {3, 5}), ([3, 4], {3, 4, 5}), ([[1], {"a": 2}, None, "x"], {5}), ({"a": 1}, {5})],
)
def test_what_is_no_id_ends_no_text(declared: object, found: set[int]) -> None:
    class Tokenizer:
        eos_token_id = 5

    assert end_tokens(declared, Tokenizer()) == found
