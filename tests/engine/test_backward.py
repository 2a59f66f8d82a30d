"""Going back through a model block by block gives what autograd gives for the model as a whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from support.tiny_architectures import ids
from torch import nn
from transformers import AutoModelForCausalLM

from llmconvert.engine import backward
from llmconvert.engine.backward import Passage, sampled_gradient, walk_back
from llmconvert.engine.discovery import BlockPlan, discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import DiskStates, TapeStates
from llmconvert.engine.stream import Stream
from llmconvert.errors import CalibrationError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

Tiny = Callable[..., Path]
WINDOWS = ids((24, 16, 24))
LENGTHS = [24, 16, 24]


def record(directory: Path, work: Path) -> tuple[Skeleton, tuple[BlockPlan, ...], TapeStates, DiskStates]:
    """Run the text forward, so that the tape has every block's inputs."""
    skeleton = Skeleton(SafetensorsCheckpoint(directory), torch.device("cpu"))
    plans = discover(skeleton, 24)
    shape = (LENGTHS, skeleton.hidden_size, skeleton.dtype)
    tape = TapeStates(work, *shape)
    stream = Stream(skeleton, WINDOWS, plans, mode="replay", states=tape)
    for _ in stream.blocks():
        pass
    stream.close()
    return skeleton, plans, tape, DiskStates(work, *shape, name="gradients")


def pick(rows: int) -> slice:
    return slice(None, None, 3)


def resident(directory: Path) -> Mapping[str, Passage]:
    """The same from the whole model in memory, by autograd alone."""
    attention = "eager" if "gemma2" in directory.name else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", attn_implementation=attention).eval()
    model.requires_grad_(False)
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.register_forward_hook(lambda _, args, out, name=name: calls.__setitem__(name, (args[0], out)))
    found: dict[str, Passage] = {}
    for batch, window in enumerate(WINDOWS):
        embedded = model.get_input_embeddings()(window).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        direction = sampled_gradient(logits, torch.Generator().manual_seed(batch))
        gradients = torch.autograd.grad(logits, [output for _, output in calls.values()], direction)
        for (name, (inputs, _)), gradient in zip(calls.items(), gradients, strict=True):
            passage = found.setdefault(name, Passage(squares=torch.zeros(gradient.shape[-1])))
            passage.inputs.append(inputs[0].detach())
            passage.gradients.append(gradient[0])
            assert passage.squares is not None
            passage.squares = passage.squares + gradient[0].square().sum(0)
    return found


def walk(directory: Path, work: Path) -> Iterator[tuple[int, Mapping[str, Passage]]]:
    skeleton, plans, tape, gradients = record(directory, work)
    return walk_back(skeleton, WINDOWS, plans, tape, gradients, pick=pick)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3", "phi3", "gemma2", "gpt_neox"])
def test_inputs_and_gradients_are_those_of_the_resident_model(tiny: Tiny, name: str, tmp_path: Path) -> None:
    directory = tiny(name)
    expected = resident(directory)
    blocks, linears = [], set()
    for index, seen in walk(directory, tmp_path):
        blocks.append(index)
        linears |= set(seen)
        for linear, passage in seen.items():
            other = expected[linear]
            for ours, theirs in zip(passage.inputs, other.inputs, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            for ours, theirs in zip(passage.gradients, other.gradients, strict=True):
                torch.testing.assert_close(ours, theirs[:, ::3], rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
            assert passage.squares is not None
            torch.testing.assert_close(passage.squares, other.squares, rtol=1e-3, atol=1e-6)
    assert blocks == list(reversed(range(len(blocks))))
    assert linears == set(expected)


def test_it_goes_on_from_a_block_with_the_gradients_that_reached_it(tiny: Tiny, tmp_path: Path) -> None:
    skeleton, plans, tape, gradients = record(tiny("llama-tied"), tmp_path)
    whole = {
        index: {name: passage.squares for name, passage in seen.items()}
        for index, seen in walk_back(skeleton, WINDOWS, plans, tape, gradients, pick=pick)
    }
    first = walk_back(skeleton, WINDOWS, plans, tape, gradients, pick=pick)
    assert next(first)[0] == skeleton.block_count - 1
    first.close()
    begin = skeleton.block_count - 2
    for index, seen in walk_back(skeleton, WINDOWS, plans, tape, gradients, pick=pick, begin=begin):
        assert index == begin
        begin -= 1
        for name, passage in seen.items():
            assert passage.squares is not None
            expected = whole[index][name]
            assert expected is not None and torch.equal(passage.squares, expected)
    assert begin == -1


def test_gradients_that_are_not_finite_are_refused_with_their_block(tiny: Tiny, tmp_path: Path) -> None:
    skeleton, plans, tape, gradients = record(tiny("llama-tied"), tmp_path)
    walk = walk_back(skeleton, WINDOWS, plans, tape, gradients, pick=pick)
    last, _ = next(walk)
    spoilt = gradients.get(last, 1)
    spoilt[0, 3, 0] = torch.inf
    gradients.put(last, 1, spoilt)
    with pytest.raises(CalibrationError, match=rf"block {last - 1} .*gradients of batch 1 are not finite"):
        next(walk)


def test_logits_of_a_window_are_gone_when_those_of_the_next_come(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what a budget takes most memory for."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def sampled(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        assert [one for one in seen if one() is not None] == []
        gradient = sampled_gradient(logits, generator)
        seen.extend(map(weakref.ref, (logits, gradient)))
        return gradient

    monkeypatch.setattr(backward, "sampled_gradient", sampled)
    list(walk(tiny("llama-tied"), tmp_path))
    assert len(seen) == 2 * len(WINDOWS)


def test_samples_have_the_fisher_information_as_covariance() -> None:
    logits = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]).expand(1, 200_000, 4)
    samples = sampled_gradient(logits, torch.Generator().manual_seed(0))[0].double()
    probabilities = logits[0, 0].double().softmax(-1)
    fisher = probabilities.diag() - probabilities.outer(probabilities)
    torch.testing.assert_close(samples.T @ samples / len(samples), fisher, rtol=0.02, atol=2e-3)
    # What adds the same to all logits changes no probability, and costs nothing.
    torch.testing.assert_close(samples.sum(-1), torch.zeros(len(samples), dtype=torch.float64), rtol=0, atol=1e-5)


def test_gradients_pass_through_experts_one_at_a_time(mixture: Tiny, tmp_path: Path) -> None:
    """Those of the resident model, in float32; attention's have passed the experts of its block and those behind."""
    source = mixture("qwen2_moe")
    directory = tmp_path / "float32"
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(directory)
    expected = resident(directory)
    blocks = []
    for index, seen in walk(directory, tmp_path):
        blocks.append(index)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = f"model.layers.{index}.self_attn.{part}"
            passage = seen[linear]
            for ours, theirs in zip(passage.gradients, expected[linear].gradients, strict=True):
                tolerance = 1e-4 * float(theirs.abs().max())
                torch.testing.assert_close(ours, theirs[:, ::3], rtol=1e-3, atol=tolerance)
    assert blocks == [1, 0]
