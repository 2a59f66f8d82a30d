"""Going back through a model block by block gives what autograd gives for the model as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tiny_architectures import ids
from torch import nn
from transformers import AutoModelForCausalLM

from llmconvert.checkpoint import SafetensorsCheckpoint
from llmconvert.engine.backward import output_costs, sampled_gradient
from llmconvert.engine.discovery import BlockPlan, discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import DiskStates, TapeStates
from llmconvert.engine.stream import Stream
from llmconvert.errors import CalibrationError

Tiny = Callable[..., Path]
WINDOWS = ids((24, 16, 24))
LENGTHS = [24, 16, 24]


def record(directory: Path, work: Path) -> tuple[Skeleton, tuple[BlockPlan, ...], TapeStates, DiskStates]:
    """Run the text forward, so that the tape has every block's inputs."""
    skeleton = Skeleton(SafetensorsCheckpoint(directory), torch.device("cpu"))
    plans = discover(skeleton, 24)
    shape = (LENGTHS, skeleton.model.config.get_text_config().hidden_size, skeleton.dtype)
    tape = TapeStates(work, *shape)
    stream = Stream(skeleton, WINDOWS, plans, mode="replay", states=tape)
    for _ in stream.blocks():
        pass
    stream.close()
    return skeleton, plans, tape, DiskStates(work, *shape, name="gradients")


def resident_costs(directory: Path) -> Mapping[str, torch.Tensor]:
    """The same from the whole model in memory, by autograd alone."""
    attention = "eager" if "gemma2" in directory.name else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", attn_implementation=attention).eval()
    model.requires_grad_(False)
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_hook(lambda module, args, output, name=name: outputs.__setitem__(name, output))
    sums: dict[str, torch.Tensor] = {}
    for batch, window in enumerate(WINDOWS):
        embedded = model.get_input_embeddings()(window).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        direction = sampled_gradient(logits, torch.Generator().manual_seed(batch))
        found = torch.autograd.grad(logits, list(outputs.values()), direction)
        for name, gradient in zip(outputs, found, strict=True):
            squares = gradient.reshape(-1, gradient.shape[-1]).square().sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares
    return {name: total / sum(LENGTHS) for name, total in sums.items()}


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3", "phi3", "gemma2", "gpt_neox"])
def test_costs_are_those_of_the_resident_model(tiny: Tiny, name: str, tmp_path: Path) -> None:
    directory = tiny(name)
    skeleton, plans, tape, gradients = record(directory, tmp_path)
    expected = resident_costs(directory)
    blocks = []
    for index, costs in output_costs(skeleton, WINDOWS, plans, tape, gradients):
        blocks.append(index)
        assert set(costs) == set(skeleton.linears[index])
        for linear, cost in costs.items():
            torch.testing.assert_close(cost, expected[linear], rtol=1e-4, atol=1e-7 * float(expected[linear].max()))
    assert blocks == list(reversed(range(skeleton.block_count)))


def test_it_goes_on_from_a_block_with_the_gradients_that_reached_it(tiny: Tiny, tmp_path: Path) -> None:
    skeleton, plans, tape, gradients = record(tiny("llama-tied"), tmp_path)
    whole = dict(output_costs(skeleton, WINDOWS, plans, tape, gradients))
    first = output_costs(skeleton, WINDOWS, plans, tape, gradients)
    assert next(first)[0] == skeleton.block_count - 1
    first.close()
    rest = dict(output_costs(skeleton, WINDOWS, plans, tape, gradients, begin=skeleton.block_count - 2))
    assert list(rest) == list(reversed(range(skeleton.block_count - 1)))
    for index, costs in rest.items():
        for name, cost in costs.items():
            assert torch.equal(cost, whole[index][name])


def test_gradients_that_are_not_finite_are_refused_with_their_block(tiny: Tiny, tmp_path: Path) -> None:
    skeleton, plans, tape, gradients = record(tiny("llama-tied"), tmp_path)
    walk = output_costs(skeleton, WINDOWS, plans, tape, gradients)
    last, _ = next(walk)
    spoilt = gradients.get(last, 1)
    spoilt[0, 3, 0] = torch.inf
    gradients.put(last, 1, spoilt)
    with pytest.raises(CalibrationError, match=rf"block {last - 1} .*gradients of batch 1 are not finite"):
        next(walk)


def test_samples_have_the_fisher_information_as_covariance() -> None:
    logits = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]).expand(1, 200_000, 4)
    samples = sampled_gradient(logits, torch.Generator().manual_seed(0))[0].double()
    probabilities = logits[0, 0].double().softmax(-1)
    fisher = probabilities.diag() - probabilities.outer(probabilities)
    torch.testing.assert_close(samples.T @ samples / len(samples), fisher, rtol=0.02, atol=2e-3)
    # What adds the same to all logits changes no probability, and costs nothing.
    torch.testing.assert_close(samples.sum(-1), torch.zeros(len(samples), dtype=torch.float64), rtol=0, atol=1e-5)
