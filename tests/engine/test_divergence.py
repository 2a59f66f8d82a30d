"""Two models side by side: the drift after each block is that of the resident models, in the memory of two blocks."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_architectures import ids
from support.tiny_mixtures import tiny_mixture
from support.tiny_models import tiny_llama_dir
from transformers import AutoModelForCausalLM

from llmconvert.engine import divergence, skeleton
from llmconvert.engine.divergence import BlockDivergence, SideBySide
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Stream
from llmconvert.errors import CalibrationError, ChangedError, CheckpointError, GateError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((24, 16))
LAYERS = 4


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("divergence") / "original", num_hidden_layers=LAYERS)


def changed(original: Path, directory: Path, name: str, factor: float | None) -> Path:
    """A copy with one tensor multiplied, or lost."""
    weights = load_file(original / "model.safetensors")
    lost = weights.pop(name)
    if factor is not None:
        weights[name] = lost * factor
    directory.mkdir()
    (directory / "config.json").write_bytes((original / "config.json").read_bytes())
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def compare(first: Path, second: Path) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], tuple[BlockDivergence, ...]]:
    with SideBySide(SafetensorsCheckpoint(first), [SafetensorsCheckpoint(second)], WINDOWS, device=CPU) as models:
        logits = [(pair.ours, pair.theirs) for pair in models.logits()]
        return logits, models.divergences()


def hidden_states(directory: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of the resident model: after each block ``[tokens, hidden]`` over all windows, and the logits per window."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", experts_implementation="eager").eval()
    after: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda module, args, output, index=index: after[index].append(
                (output[0] if isinstance(output, tuple) else output).reshape(-1, output[0].shape[-1])
            )
        )
    with torch.no_grad():
        logits = [model(input_ids=window, use_cache=False).logits for window in WINDOWS]
    return [torch.cat(states).double() for states in after], logits


def test_the_drift_is_that_of_the_resident_models(original: Path, tmp_path: Path) -> None:
    other = changed(original, tmp_path / "other", "model.layers.1.mlp.down_proj.weight", 1.3)
    logits, found = compare(original, other)
    (ours, our_logits), (theirs, their_logits) = hidden_states(original), hidden_states(other)
    for (first, second), a, b in zip(logits, our_logits, their_logits, strict=True):
        assert torch.equal(first, a) and torch.equal(second, b)
    before = 0.0
    for index, block in enumerate(found):
        h, g = ours[index], theirs[index]
        square = ((g - h).square().sum(-1) / h.square().sum(-1)).mean().item()
        assert (block.index, block.name) == (index, f"model.layers.{index}")
        assert block.error == pytest.approx(math.sqrt(square), rel=1e-5, abs=1e-9)
        assert block.added == pytest.approx(math.sqrt(max(0.0, square - before)), rel=1e-4, abs=1e-6)
        assert block.cosine == pytest.approx(torch.cosine_similarity(g, h, dim=-1).mean().item(), abs=1e-6)
        before = square
    assert found[0].error == 0 and max(found, key=lambda block: block.added).index == 1
    assert len(found) == LAYERS


def test_a_blocks_own_error_is_what_it_does_to_the_originals_state(original: Path, tmp_path: Path) -> None:
    """Against a resident original in which that block alone is the artifact's."""
    other = changed(original, tmp_path / "first", "model.layers.1.mlp.down_proj.weight", 1.3)
    other = changed(other, tmp_path / "second", f"model.layers.{LAYERS - 1}.self_attn.v_proj.weight", 0.8)
    _, found = compare(original, other)
    ours, _ = hidden_states(original)
    theirs = load_file(other / "model.safetensors")
    for index, block in enumerate(found):
        mixed = changed(original, tmp_path / f"mixed{index}", "model.norm.weight", 1.0)
        weights = load_file(mixed / "model.safetensors")
        weights |= {name: value for name, value in theirs.items() if f".layers.{index}." in name}
        save_file(weights, mixed / "model.safetensors", {"format": "pt"})
        state = hidden_states(mixed)[0][index]
        square = ((state - ours[index]).square().sum(-1) / ours[index].square().sum(-1)).mean().item()
        assert block.own == pytest.approx(math.sqrt(square), rel=1e-5, abs=1e-9)
    # Block 2 passes on what it was given, and has no part in it.
    assert found[2].error > 0 and found[2].own == 0 and found[1].own > 0 and found[LAYERS - 1].own > 0


def test_a_changed_expert_drifts_as_in_the_resident_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block alone has a part in it: the experts of both models are read one at a time, side by side."""
    # In bfloat16 as the resident ones: a drift is a difference, of which float32 products change the third digit.
    monkeypatch.setattr(skeleton, "compute_dtype", lambda device: torch.bfloat16)
    source = tiny_mixture(tmp_path / "original", "mixtral", num_hidden_layers=LAYERS)
    other = changed(source, tmp_path / "other", "model.layers.1.block_sparse_moe.experts.2.w2.weight", 2.0)
    _, found = compare(source, other)
    for block, h, g in zip(found, hidden_states(source)[0], hidden_states(other)[0], strict=True):
        square = ((g - h).square().sum(-1) / h.square().sum(-1)).mean().item()
        assert block.error == pytest.approx(math.sqrt(square), rel=1e-4, abs=1e-9)
    assert found[1].own == pytest.approx(found[1].error, rel=1e-6) and found[1].own > 0.01
    assert [block.own for block in found] == [0, found[1].own, 0, 0]


def test_blocks_are_run_alone_on_the_first_windows(original: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(divergence, "_ALONE_TOKENS", 24)
    other = changed(original, tmp_path / "other", "model.layers.1.mlp.down_proj.weight", 1.3)
    tried: list[int] = []
    try_block = Stream.try_block

    def noted(self: Stream, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        tried.append(batch)
        return try_block(self, index, batch, hidden)

    monkeypatch.setattr(Stream, "try_block", noted)
    assert compare(original, other)[1][1].own > 0 and tried == [0] * LAYERS


def unnamed_files() -> int:
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum("(deleted)" in str(path.readlink()) for path in links if path.is_symlink())


def test_states_in_a_file_give_the_same(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = changed(original, tmp_path / "other", "model.layers.1.mlp.down_proj.weight", 1.3)
    in_memory = compare(original, other)
    monkeypatch.setattr("llmconvert.engine.states.STATES_IN_MEMORY_NBYTES", 0)
    before = unnamed_files()
    in_a_file = compare(original, other)
    assert in_a_file[1] == in_memory[1]
    for found, expected in zip(in_a_file[0], in_memory[0], strict=True):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert unnamed_files() == before


def test_a_model_does_not_drift_from_itself(original: Path) -> None:
    _, found = compare(original, original)
    assert [(block.error, block.own) for block in found] == [(0.0, 0.0)] * LAYERS
    assert all(block.cosine == pytest.approx(1) for block in found)


def watch_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Gives how many blocks of all models were loaded at most, which none are by then."""
    loaded: set[tuple[int, int]] = set()
    most = 0
    load, drop = Skeleton.load_block, Skeleton.drop_block

    def count_load(self: Skeleton, index: int) -> None:
        nonlocal most
        load(self, index)
        loaded.add((id(self), index))
        most = max(most, len(loaded))

    def count_drop(self: Skeleton, index: int) -> None:
        drop(self, index)
        loaded.discard((id(self), index))

    def told() -> int:
        assert not loaded
        return most

    monkeypatch.setattr(Skeleton, "load_block", count_load)
    monkeypatch.setattr(Skeleton, "drop_block", count_drop)
    return told


def test_memory_holds_two_blocks_at_most(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = watch_blocks(monkeypatch)
    compare(original, original)
    assert most() == 2


def test_several_artifacts_are_each_compared_as_alone(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the memory of two blocks, with outer weights that are the original's there once; what can't run ends alone."""
    drifting = changed(original, tmp_path / "drifting", "model.layers.1.mlp.down_proj.weight", 1.3)
    ends = changed(original, tmp_path / "ends", f"model.layers.{LAYERS - 1}.mlp.down_proj.weight", 0.7)
    headed = changed(ends, tmp_path / "headed", "model.norm.weight", 1.5)
    broken = changed(original, tmp_path / "broken", "model.layers.2.mlp.up_proj.weight", math.nan)
    lost = changed(original, tmp_path / "lost", "model.norm.weight", None)
    deeper = tiny_llama_dir(tmp_path / "deeper", num_hidden_layers=LAYERS + 1)
    alone = {path: compare(original, path) for path in (drifting, headed, deeper)}
    most = watch_blocks(monkeypatch)
    paths = [drifting, broken, headed, lost, deeper]
    checkpoints = [SafetensorsCheckpoint(path) for path in paths]
    with SideBySide(SafetensorsCheckpoint(original), checkpoints, WINDOWS, device=CPU) as models:
        outer = [
            {id(parameter) for parameter in side.skeleton.model.parameters() if parameter.device.type != "meta"}
            for side in (models._reference, models._artifacts[0], models._artifacts[2])
        ]
        assert outer[1] == outer[0] and len(outer[2] & outer[0]) == len(outer[0]) - 1
        found: dict[Path, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for pair in models.logits():
            found.setdefault(paths[pair.artifact], []).append((pair.ours, pair.theirs))
        assert found.keys() == alone.keys() and most() == 2
        assert {paths[number] for number in models.failures} == {broken, lost}
        assert "block 2 (model.layers.2)" in str(models.failures[1])
        for path, (logits, blocks) in alone.items():
            assert models.divergences(paths.index(path)) == blocks
            for (ours, theirs), (first, second) in zip(found[path], logits, strict=True):
                assert torch.equal(ours, first) and torch.equal(theirs, second)
    with pytest.raises(GateError, match="block 2"):
        list(SideBySide(SafetensorsCheckpoint(original), [checkpoints[1]] * 2, WINDOWS, device=CPU).logits())


@pytest.mark.parametrize("layer", [1, LAYERS - 1])
def test_whoever_computes_nan_is_named_with_the_block(original: Path, tmp_path: Path, layer: int) -> None:
    broken = changed(original, tmp_path / "broken", f"model.layers.{layer}.mlp.up_proj.weight", math.nan)
    with pytest.raises(GateError, match=rf"the artifact computes .* block {layer} \(model\.layers\.{layer}\)"):
        compare(original, broken)
    with pytest.raises(CalibrationError, match=rf"the original computes .* block {layer} "):
        compare(broken, original)


def test_an_artifact_without_a_tensor_is_to_blame_for_it(original: Path, tmp_path: Path) -> None:
    lost = changed(original, tmp_path / "lost", "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(GateError, match=r"the artifact can't be run: .*'model\.layers\.1\.mlp\.up_proj\.weight'"):
        compare(original, lost)
    with pytest.raises(CheckpointError):
        compare(lost, original)


def test_a_file_that_is_cut_off_while_it_is_read_says_nothing_of_the_artifact(original: Path, tmp_path: Path) -> None:
    copy = changed(original, tmp_path / "copy", "model.norm.weight", 1.0)
    first, second = SafetensorsCheckpoint(original), SafetensorsCheckpoint(copy)
    with SideBySide(first, [second], WINDOWS, device=CPU) as models:
        weights = copy / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        with pytest.raises(ChangedError, match=r"model\.safetensors: the file ended inside"):
            list(models.logits())


def test_a_disk_that_fails_says_nothing_of_the_artifact(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = changed(original, tmp_path / "copy", "model.norm.weight", 1.0)
    first, second = SafetensorsCheckpoint(original), SafetensorsCheckpoint(copy)
    with SideBySide(first, [second], WINDOWS, device=CPU) as models:
        steps = models.logits()

        def read(*arguments: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr("llmconvert.storage.checkpoint.os.preadv", read)
        with pytest.raises(CheckpointError, match="Input/output error"):
            list(steps)


def test_models_of_different_depth_are_compared_by_their_logits_alone(original: Path, tmp_path: Path) -> None:
    deeper = tiny_llama_dir(tmp_path / "deeper", num_hidden_layers=LAYERS + 1)
    logits, found = compare(original, deeper)
    assert found == () and len(logits) == len(WINDOWS)
    model = AutoModelForCausalLM.from_pretrained(deeper, dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(logits[1][1], model(WINDOWS[1]).logits)
