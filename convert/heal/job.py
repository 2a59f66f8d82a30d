"""Healing a merged checkpoint by distillation from the original, on disk: refused, resumed, or written whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from llmconvert.compute.precision import compute_dtype
from llmconvert.convert.gqa.geometry import read_geometry
from llmconvert.convert.gqa.weights import attention_tensors
from llmconvert.convert.heal.model import ResidentModel
from llmconvert.convert.heal.state import HealState, load_state, save_state
from llmconvert.convert.heal.training import Healing, HealOptions
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.memory import BASE_NBYTES
from llmconvert.errors import CapacityError, DatasetError, UsageError
from llmconvert.memory import available_nbytes, release_freed_memory
from llmconvert.progress import SILENT, Progress
from llmconvert.report.steps import HealReport
from llmconvert.storage.artifact import build_artifact, job_key
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.dense import require_dense
from llmconvert.storage.shared import share_tensors
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, check_output_directory, plan_layout

__all__ = ["HealOptions", "heal_attention"]

# What one token leaves for the backward pass, in copies of the block's widths.
_HIDDEN_COPIES, _INNER_COPIES = 12, 4
_USABLE = 0.9
_STATE = "healing.safetensors"


def heal_attention(
    original: Checkpoint,
    merged: Checkpoint,
    output: Path,
    *,
    windows: Sequence[torch.Tensor],
    options: HealOptions | None = None,
    device: torch.device | None = None,
    state: Path | None = None,
    identity: str = "",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> HealReport:
    """Write ``merged`` with attention weights that have learned from ``original`` to the directory ``output``.

    Both models are in memory, everything but attention once. Nothing but attention changes.

    Args:
        original: dense weights, the teacher.
        merged: the same model with other attention weights, the student.
        output: a directory that does not exist yet or is empty; it appears whole or not at all.
        windows: token ids, each ``[1, length]``; the last ``options.held_out`` are kept for measuring.
        options: how.
        device: where to compute, the CPU by default.
        state: a file to keep the state in; a call that finds its own continues from there. It
            stays when this returns: whoever has the report safe removes it. By default it lies in the hidden directory
            that the output is built in, and goes with it.
        identity: tells these two models from others that look alike; what is known of their files by default.
        progress: one unit per step.

    Raises:
        UsageError: models that don't go together, or an output directory that is unusable or in use.
        DatasetError: too few windows.
        CalibrationError: a loss is not finite.
        CapacityError: memory or disk do not suffice.
    """
    chosen = options or HealOptions()
    place = device or torch.device("cpu")
    check_output_directory(output)
    require_dense(original, "the original")
    require_dense(merged, "the merged model")
    names = _attention_of(merged)
    apart = frozenset((*names, *_attention_of(original)))
    _require_kin(original, merged, apart)
    _check_windows(windows, chosen)
    dtype = compute_dtype(place)
    _check_memory(merged, names, max(window.shape[1] for window in windows), dtype, place)
    layout = plan_layout((TensorSpec(i.name, i.dtype, i.shape) for i in merged.infos.values()), max_shard_bytes)
    about = {"original": original.identity if not identity else "", "dtype": str(dtype), "options": asdict(chosen)}
    job = job_key(merged, layout, about, identity=identity, windows=windows)
    with build_artifact(output, layout, job, progress=progress) as artifact:
        kept = state or artifact.work / _STATE
        found = load_state(kept, job)
        start = found.step if found is not None else 0
        teacher, student = (
            ResidentModel(view, place, dtype) for view in share_tensors((original, merged), apart, place, dtype)
        )
        healing = Healing(teacher, student, names, windows, chosen)

        def save(current: HealState) -> None:
            save_state(kept, current)
            artifact.finish(f"step {current.step}")

        with progress.task("Healing attention", chosen.steps) as task:
            final = healing.run(found, job, save, task)
        best = final.best or final.weights
        tokens = sum(windows[0].shape[1] * chosen.batch for _ in final.history)
        del healing, teacher, student
        release_freed_memory()
        for name in names:
            artifact.writer.write(name, best[name].to(merged.infos[name].dtype))
        artifact.copy(merged, (name for name in merged if name not in set(names)))
        artifact.publish(merged.config, merged.files)
    return _report(final, chosen, tokens, start)


def _report(state: HealState, options: HealOptions, tokens: int, start: int) -> HealReport:
    looks = state.held_out
    best = min(looks, key=lambda entry: entry["kl"]) if looks else None
    return HealReport(
        steps=state.step,
        asked=options.steps,
        best_step=int(best["step"]) if best is not None else state.step,
        tokens=tokens,
        trained=sum(tensor.numel() for tensor in (state.best or state.weights).values()),
        before=looks[0]["kl"] if looks else None,
        after=best["kl"] if best is not None else None,
        history=tuple(state.history),
        held_out=tuple(looks),
        seconds=state.seconds,
        resumed_at=start,
    )


def _attention_of(checkpoint: Checkpoint) -> list[str]:
    geometry = read_geometry(checkpoint)
    names = [name for layer in range(geometry.layers) for name in attention_tensors(checkpoint, geometry, layer)]
    return [name for name in names if name in checkpoint]


def _require_kin(original: Checkpoint, merged: Checkpoint, apart: frozenset[str]) -> None:
    """Refuse models that differ in more than attention.

    Raises:
        UsageError: naming a tensor.
    """
    for name in (set(original.infos) | set(merged.infos)) - apart:
        ours, theirs = merged.infos.get(name), original.infos.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise UsageError(
                f"tensor {name} is not the same in the original and in the model to heal; "
                "only models that differ in attention alone can be healed"
            )


def _check_windows(windows: Sequence[torch.Tensor], options: HealOptions) -> None:
    if len(windows) < options.held_out + 1:
        raise DatasetError(
            f"healing: {len(windows)} windows of text, of which {options.held_out} are held out, leave nothing to "
            "learn from; give more text, or shorter windows"
        )


def _check_memory(
    merged: Checkpoint, names: Sequence[str], length: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse, before any work, what does not fit."""
    numel = {name: info.nbytes // info.dtype.itemsize for name, info in merged.infos.items()}
    trained = sum(numel[name] for name in names)
    rest = sum(numel.values()) - trained
    model = Architecture.of(merged.config)
    widths = _HIDDEN_COPIES * model.hidden_size + _INNER_COPIES * model.inner_size
    activations = length * model.layers * widths * dtype.itemsize
    # Teacher's attention; the student's with its gradient, its running mean, and the best so far.
    needed = BASE_NBYTES + (rest + 2 * trained) * dtype.itemsize + 4 * 4 * trained + activations
    free = available_nbytes(device)
    if needed > _USABLE * free:
        raise CapacityError(
            f"healing needs about {needed / 1e6:,.0f} MB (both models with what they share held once, the optimizer, "
            f"{activations / 1e6:,.0f} MB of activations), {free / 1e6:,.0f} MB are free; "
            "use shorter windows or a machine with more memory, or leave out attention.heal"
        )
