"""Agreement of attention backends: logits, perplexity and greedy tokens against eager attention in float32.

Runs in a process of its own.

Each backend runs twice: in float32, where anything above rounding would be another function, and in the artifact's own
dtype, where rounding alone moves the logits; eager's own distance from the reference says by how much. Flash attention
has no float32 on CUDA, and runs once there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from llmconvert.errors import UnsupportedError
from llmconvert.machine import of_machine
from llmconvert.validate.generation.greedy import encode, generate
from llmconvert.validate.long_inputs.backends import BACKENDS, Kernels, activate
from llmconvert.validate.predictions.perplexity import perplexity
from llmconvert.validate.runtimes.isolated import limit_memory
from llmconvert.validate.runtimes.transformers import Runtime, runtime

__all__ = ["compare_backends"]

_SHORT = 64
# A gap between two logits counts as a tie if rounding alone moves logits by half of it.
_TIE = 2.0


def compare_backends(
    directory: str,
    backends: Sequence[str],
    windows: Sequence[Sequence[int]],
    *,
    device: str,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 32,
    limit: int | None = None,
) -> dict[str, Any]:
    """Compare backends on token ``windows``, and their greedy continuations of ``prompts`` with eager's.

    Returns:
        ``backends``: name → ``kernels`` that ran, ``max_abs_diff``, ``mean_abs_diff``, ``perplexity``,
        ``float32_max_abs_diff``, ``float32_mean_abs_diff`` (absent where there is no kernel for float32), or
        ``reason`` if it can't run;
        ``reference``: its ``perplexity`` and ``largest`` logit; ``dtype`` of the artifact;
        ``continuations``: name → what differs from eager's, see :func:`_against`.
    """
    where = torch.device(device)
    limit_memory(limit)
    ids = [torch.tensor([window], device=where) for window in windows]
    with ExitStack() as stack:
        own = stack.enter_context(runtime(Path(directory), device=where))
        if own.model.dtype == torch.float32:
            exact = own
        else:
            exact = stack.enter_context(runtime(Path(directory), device=where, dtype=torch.float32))
        kernels = {name: _kernels(own, name, ids[0]) for name in backends}
        usable = [name for name, found in kernels.items() if not isinstance(found, str)]
        wide = usable if own is exact else [name for name in usable if isinstance(_kernels(exact, name, ids[0]), list)]
        scores, reference = _scores(own, exact, usable, wide, ids)
        found: dict[str, dict[str, Any]] = {
            name: {"reason": kernels[name]} if name not in scores else {"kernels": kernels[name], **scores[name]}
            for name in backends
        }
        texts: Mapping[str, Any] = {}
        if prompts and "eager" in scores:
            noise = scores["eager"]["max_abs_diff"] or reference["largest"] * torch.finfo(torch.float32).eps
            texts = _continuations(own, exact, usable, prompts, max_new_tokens, _TIE * noise)
    return {
        "backends": found,
        "reference": reference,
        "dtype": str(own.model.dtype).removeprefix("torch."),
        "continuations": texts,
    }


def _kernels(loaded: Runtime, name: str, window: torch.Tensor) -> list[str] | str:
    """The attention operators that run, or why the backend can't run."""
    try:
        # In inference mode PyTorch would show the whole attention as one operator.
        with torch.no_grad(), activate(loaded.model, name), Kernels() as seen:
            loaded.model(input_ids=window[:, :_SHORT], use_cache=False)
    except (RuntimeError, ValueError, ImportError) as error:
        if of_machine(error):
            raise
        return str(error).strip().splitlines()[0]
    proof = BACKENDS[name].proof
    if proof and not any(proof in kernel for kernel in seen.names):
        return f"PyTorch ran {', '.join(sorted(seen.names)) or 'no attention operator'} instead"
    return sorted(seen.names)


def _logits(loaded: Runtime, name: str, window: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), activate(loaded.model, name):
        logits: torch.Tensor = loaded.model(input_ids=window, use_cache=False).logits
    return logits


def _scores(
    own: Runtime, exact: Runtime, names: Sequence[str], wide: Sequence[str], windows: Sequence[torch.Tensor]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Window after window, so that the logits of one are held at a time; those named ``wide`` in float32 too."""
    gathered: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    losses: list[float] = []
    largest = 0.0
    for window in windows:
        reference = _logits(exact, "eager", window)
        largest = max(largest, float(reference.abs().max()))
        losses.append(perplexity([reference], [window]).nll)
        for name in names:
            logits = _logits(own, name, window)
            scores = {"nll": perplexity([logits], [window]).nll, **_distance(logits, reference)}
            if name in wide:
                same = _distance(logits if own is exact else _logits(exact, name, window), reference)
                scores |= {f"float32_{key}": value for key, value in same.items()}
            gathered[name].append(scores)
    found: dict[str, dict[str, float]] = {}
    for name, parts in gathered.items():
        means = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
        tops = {key: max(part[key] for part in parts) for key in parts[0] if "max" in key}
        nll = torch.tensor(means.pop("nll"), dtype=torch.float64)
        found[name] = {**means, **tops, "perplexity": float(nll.exp())}
    mean = torch.tensor(losses, dtype=torch.float64).mean()
    return found, {"perplexity": float(mean.exp()), "largest": largest}


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Largest and mean difference, in pieces: logits are as wide as the vocabulary."""
    largest = total = 0.0
    for part, other in zip(logits[0].split(128), reference[0].split(128), strict=True):
        difference = (part.float() - other).abs()
        largest, total = max(largest, float(difference.max())), total + float(difference.double().sum())
    return {"max_abs_diff": largest, "mean_abs_diff": total / reference.numel()}


def _continuations(
    own: Runtime, exact: Runtime, names: Sequence[str], prompts: Sequence[str], limit: int, tolerance: float
) -> dict[str, Any]:
    try:
        texts = {}
        for name in names:
            with activate(own.model, name):
                texts[name] = generate(own, prompts, max_new_tokens=limit).continuations
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(f"greedy continuations failed: {error}") from error
    eager = texts.pop("eager")
    return {
        name: _against(exact, [(ours.prompt, theirs.ids, ours.ids) for ours, theirs in zip(found, eager, strict=True)])
        | {"tolerance": tolerance}
        for name, found in texts.items()
    }


def _against(exact: Runtime, pairs: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> dict[str, Any]:
    """Where greedy texts part from eager's, and by how little the float32 reference itself prefers one of two tokens.

    Returns:
        ``texts``, how many there are; ``equal``, how many are the same to the last token; ``tokens``, how many tokens
        were compared up to where they part; ``parted``: for each of the others ``prompt``, ``position``, both tokens
        and ``gap``, the difference of their logits in the reference.
    """
    parted: list[dict[str, Any]] = []
    tokens = 0
    starts = encode(exact.tokenizer, [prompt for prompt, _, _ in pairs])
    for (prompt, theirs, ours), given in zip(pairs, starts, strict=True):
        index = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
        tokens += min(len(theirs), len(ours)) if index is None else index
        if index is None:
            continue
        start = given.to(exact.device)
        prefix = torch.cat([start, torch.tensor([list(theirs[:index])], dtype=torch.int64, device=start.device)], dim=1)
        logits = _logits(exact, "eager", prefix)[0, -1]
        parted.append(
            {
                "prompt": prompt,
                "position": index,
                "eager": exact.tokenizer.decode([theirs[index]]),
                "other": exact.tokenizer.decode([ours[index]]),
                "gap": abs(float(logits[theirs[index]] - logits[ours[index]])),
            }
        )
    return {"texts": len(pairs), "equal": len(pairs) - len(parted), "tokens": tokens, "parted": parted}
