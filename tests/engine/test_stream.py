"""The contract of the streaming engine, over every architecture: its numbers are the resident model's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_architectures import ARCHITECTURES, ids, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmconvert.engine.discovery import discover
from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import DiskStates, MemoryStates, States
from llmconvert.engine.stream import Mode, Stream
from llmconvert.errors import CalibrationError
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint

CPU = torch.device("cpu")
#: Different lengths, all longer than the sliding windows of the models that have one.
WINDOWS = ids((24, 16, 24))
MODES: tuple[Mode, ...] = ("lockstep", "replay")
Tiny = Callable[..., Path]


def resident(directory: Path) -> PreTrainedModel:
    """The whole model as transformers loads it; Gemma 2's reference is eager attention."""
    attention = "eager" if "gemma2" in directory.name else "sdpa"
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", attn_implementation=attention).eval()


def logits_of(model: PreTrainedModel, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=window, use_cache=False).logits for window in windows]


@contextmanager
def streaming(
    directory: Path, mode: Mode, *, states: States | None = None, start: int = 0, residuals: bool = False
) -> Iterator[Stream]:
    skeleton = Skeleton(SafetensorsCheckpoint(directory), CPU)
    plans = discover(skeleton, max(window.shape[1] for window in WINDOWS))
    stream = Stream(skeleton, WINDOWS, plans, mode=mode, states=states, start=start, head=True, residuals=residuals)
    try:
        yield stream
    finally:
        stream.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_logits_are_those_of_the_resident_model(tiny: Tiny, name: str, dtype: torch.dtype) -> None:
    directory = tiny(name, dtype)
    expected = logits_of(resident(directory), WINDOWS)
    streamed = list(stream_logits(SafetensorsCheckpoint(directory), WINDOWS, device=CPU))
    assert len(streamed) == len(WINDOWS)
    for ours, theirs in zip(streamed, expected, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linears_stand_before_the_inputs_that_the_model_gives_them(tiny: Tiny, name: str, mode: Mode) -> None:
    directory = tiny(name)
    model = resident(directory)
    seen: dict[str, list[torch.Tensor]] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, key=module_name: seen.setdefault(key, []).append(args[0].flatten(0, -2).clone())
            )
    logits_of(model, WINDOWS)
    visited = 0
    with streaming(directory, mode) as stream:
        for run in stream.blocks():
            for stop in run.plan.stops:
                inputs = [value.clone() for value in run.inputs(stop.linears[0])]
                for linear in stop.linears:
                    assert all(map(torch.equal, inputs, seen[linear]))
                    assert len(inputs) == len(seen[linear]) == len(WINDOWS)
                    visited += 1
    assert visited == len(seen) - ("lm_head" in seen) - ("embed_out" in seen) - _projections(seen)


def _projections(seen: dict[str, list[torch.Tensor]]) -> int:
    """OPT's linears between its word embeddings and its blocks."""
    return sum("project_" in name for name in seen)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "last"), [("llama", "mlp.down_proj"), ("phi3", "mlp.down_proj"), ("opt", "fc2")])
def test_what_an_output_is_added_to_comes_with_the_inputs(tiny: Tiny, name: str, last: str, mode: Mode) -> None:
    """The last linear's output, added to what is said to come with it, is what leaves the block."""
    directory = tiny(name)
    model = resident(directory)
    with streaming(directory, mode, residuals=True) as stream:
        hidden: list[list[torch.Tensor]] = [[] for _ in range(stream.skeleton.block_count)]
        for index, block in enumerate(model.get_submodule(stream.skeleton.reach.blocks)):
            block.register_forward_hook(
                lambda _, args, output, found=hidden[index]: found.append(
                    (output[0] if isinstance(output, tuple) else output).flatten(0, -2)
                )
            )
        logits_of(model, WINDOWS)
        for run in stream.blocks():
            *_, stop = run.plan.stops
            assert stop.linears[0].endswith(last)
            for arrival, expected in zip(run.arrivals(stop), hidden[run.plan.index], strict=True):
                assert arrival.residual is not None
                torch.testing.assert_close(arrival.residual + run.module(stop.linears[0])(arrival.inputs), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_what_linears_that_add_to_the_residual_stream_give(tiny: Tiny, name: str, mode: Mode) -> None:
    """All other stops are asked for their inputs, and batches end where they would have."""
    directory = tiny(name)
    model, seen = resident(directory), dict[str, list[torch.Tensor]]()
    for module_name, module in model.named_modules():
        bias = getattr(module, "bias", None)

        def note(
            _: object, __: object, output: torch.Tensor, key: str = module_name, bias: torch.Tensor | None = bias
        ) -> None:
            found = output.flatten(0, -2) if bias is None else output.flatten(0, -2) - bias
            seen.setdefault(key, []).append(found)

        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(note)
    expected = logits_of(model, WINDOWS)
    with streaming(directory, mode, residuals=True) as stream:
        for run in stream.blocks():
            for stop in run.plan.stops:
                if stop.residual is None:
                    assert sum(1 for _ in run.arrivals(stop)) == len(WINDOWS)
                    continue
                for departure, output in zip(run.outputs(stop), seen[stop.linears[0]], strict=True):
                    assert torch.equal(departure.outputs, output)
                    assert departure.residual.shape == output.shape
        for ours, theirs in zip(stream.logits(), expected, strict=True):
            assert torch.equal(ours, theirs)


def perturbed(weight: torch.Tensor) -> torch.Tensor:
    """Another weight, far enough from the first to be seen in the logits."""
    return weight * 0.75 + 0.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_installed_weights_are_met_by_all_that_follows(tiny: Tiny, name: str, mode: Mode) -> None:
    """Each linear is replaced before the next is looked at: the result is a model with all of them replaced."""
    directory = tiny(name)
    with streaming(directory, mode) as stream:
        for run in stream.blocks():
            for stop in run.plan.stops:
                for _ in run.inputs(stop.linears[0]):
                    pass
                for linear in stop.linears:
                    run.install(linear, perturbed(run.weight(linear)))
        streamed = list(stream.logits())
        replaced = {linear for linears in stream.skeleton.linears for linear in linears}
    model = resident(directory)
    for module_name, module in model.named_modules():
        if module_name in replaced:
            module.weight.data = perturbed(module.weight.data)
    for ours, theirs in zip(streamed, logits_of(model, WINDOWS), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-untied"])
def test_a_stream_starts_anywhere_from_kept_states(tiny: Tiny, name: str, mode: Mode, tmp_path: Path) -> None:
    directory = tiny(name)
    lengths = [window.shape[1] for window in WINDOWS]
    states = DiskStates(tmp_path, lengths, 64, torch.float32)
    with streaming(directory, "lockstep", states=states) as stream:
        for run in stream.blocks():
            if run.plan.index == 2:
                break
    states.close()
    states = DiskStates(tmp_path, lengths, 64, torch.float32)
    with streaming(directory, mode, states=states, start=2) as stream:
        assert [run.plan.index for run in stream.blocks()] == [2]
        streamed = list(stream.logits())
    states.close()
    for ours, theirs in zip(streamed, logits_of(resident(directory), WINDOWS), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_can_be_called_as_the_model_calls_them(tiny: Tiny, name: str, mode: Mode) -> None:
    """Entries and calls give what leaves the block, with other weights too, and with gradients to them."""
    states = MemoryStates()
    with streaming(tiny(name), mode, states=states) as stream:
        for run in stream.blocks():
            index = run.plan.index
            outputs = [call.output(hidden) for hidden, call in run.entries(range(len(WINDOWS)))]
            hidden, call = next(run.entries([1]))
            weights = {key: value.detach().clone() for key, value in call.block.named_parameters()}
            linear = next(key for key, value in weights.items() if value.dim() == 2)
            weights[linear].requires_grad_()
            again = call.output(hidden, weights)
            assert torch.equal(again.detach(), outputs[1])
            again.square().sum().backward()
            gradient = weights[linear].grad
            assert gradient is not None and float(gradient.norm()) > 0
            stream.cross(index)
            assert all(torch.equal(states.get(index + 1, batch), outputs[batch]) for batch in range(len(WINDOWS)))
        assert all(map(torch.equal, stream.logits(), logits_of(resident(tiny(name)), WINDOWS)))


def test_only_the_current_block_is_in_memory(tiny: Tiny) -> None:
    with streaming(tiny("llama"), "replay") as stream:
        for run in stream.blocks():
            present = [not next(block.parameters()).is_meta for block in stream.skeleton.blocks]
            assert present == [index == run.plan.index for index in range(3)]
    assert all(next(block.parameters()).is_meta for block in stream.skeleton.blocks)


def test_logits_are_computed_in_the_dtype_that_is_asked_for(tiny: Tiny) -> None:
    directory = tiny("qwen3", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    checkpoint = SafetensorsCheckpoint(directory)
    streamed = list(stream_logits(checkpoint, WINDOWS, device=CPU, dtype=torch.float32))
    assert all(map(torch.equal, streamed, logits_of(model, WINDOWS)))


def test_streaming_reports_one_unit_per_block(tiny: Tiny) -> None:
    progress = RecordingProgress()
    list(stream_logits(SafetensorsCheckpoint(tiny("llama")), WINDOWS, device=CPU, progress=progress))
    assert (progress.total, progress.done) == (3, 3)


class RecordingProgress:
    total = 0.0
    done = 0.0

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[RecordingProgress]:
        self.total = total
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount

    def log(self, message: str) -> None:
        """Nothing is said."""


def damaged(directory: Path, tensor: str, row: int, value: float) -> Checkpoint:
    """A copy of a tiny Llama with one row of one tensor set to ``value``."""
    tiny_model(directory, "llama")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[tensor][row] = value
    save_file(tensors, path, {"format": "pt"})
    return SafetensorsCheckpoint(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_block_and_batch(tmp_path: Path, value: float) -> None:
    checkpoint = damaged(tmp_path / "weight", "model.layers.1.mlp.down_proj.weight", 3, value)
    with pytest.raises(CalibrationError, match=r"block 1 \(model\.layers\.1\): batch 0 .* not finite"):
        list(stream_logits(checkpoint, WINDOWS, device=CPU))
    checkpoint = damaged(tmp_path / "embedding", "model.embed_tokens.weight", 7, value)
    windows = [window.clamp(min=8) for window in WINDOWS]
    windows[2][0, 5] = 7
    with pytest.raises(CalibrationError, match=r"block 0 \(model\.layers\.0\): batch 2 .* not finite"):
        list(stream_logits(checkpoint, windows, device=CPU))


def test_the_last_block_is_checked_as_well(tmp_path: Path) -> None:
    checkpoint = damaged(tmp_path / "last", "model.layers.2.mlp.down_proj.weight", 3, float("nan"))
    with pytest.raises(CalibrationError, match="block 2"):
        list(stream_logits(checkpoint, WINDOWS, device=CPU))
