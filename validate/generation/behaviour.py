"""What the artifact does in the runtime its users have: fidelity to our reader, continuations, pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmconvert.errors import GateError, UnsupportedError
from llmconvert.progress import SILENT, Progress
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.validate.generation.greedy import PROMPTS, Continuation, Generations, compare, generate
from llmconvert.validate.generation.streamed import Scored, score_continuations, stream_continuations
from llmconvert.validate.runtimes.fidelity import Fidelity, fidelity
from llmconvert.validate.runtimes.transformers import Runtime, runtime, too_large

__all__ = ["GenerationOptions", "Probe", "runtime_checks"]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Greedy continuations of each prompt, this many tokens at most; ``min_agreement`` is the gate on equal tokens."""

    max_new_tokens: int = 64
    min_agreement: float | None = None
    prompts: tuple[str, ...] = PROMPTS


@dataclass(frozen=True)
class Probe:
    """Token ids ``[1, L]``, and the logits ``[1, L, V]`` that our reader computes for them from the artifact."""

    window: torch.Tensor
    logits: torch.Tensor


def runtime_checks(
    artifact: Path,
    dense: Checkpoint,
    reference: Checkpoint | None,
    original: Checkpoint | None,
    *,
    probe: Probe | None,
    generation: GenerationOptions | None,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress = SILENT,
) -> list[Check]:
    """Load the artifact, then the original, by transformers, one at a time.

    An artifact too large for the memory is continued by the streaming engine, a few tokens per prompt; one whose
    quantizer is not installed gives a check that says so and holds no number. An artifact that transformers refuses,
    or loads with tensors missing, is a failed check.

    Args:
        dense: the artifact seen as dense weights, for its size.
        reference: the original as stored. One that is a directory and fits in memory writes its own continuations.
        original: it as dense weights. One that cannot write reads the artifact's continuations instead.
        dtype: what the runtime computes in; that of the probe, or of the config, by default.
    """
    oversized = too_large(dense, device)
    dtype = probe.logits.dtype if dtype is None and probe is not None else dtype
    if oversized:
        runtime_check = Check(name="runtime", detail={"text": f"not measured: {oversized}"})
        if generation is None:
            return [runtime_check]
        return [runtime_check, *_streamed_checks(artifact, dense, original, generation, device, dtype, progress)]
    try:
        with runtime(artifact, device=device, dtype=dtype) as loaded:
            checks = [_loading_check(loaded)]
            if probe is not None:
                checks.append(_fidelity_check(loaded, probe))
            ours = None if generation is None else _generate(loaded, generation, progress)
            tokenizer = loaded.tokenizer
    except UnsupportedError as error:
        missing = isinstance(error.__cause__, ImportError)
        return [Check(name="runtime", ok=missing, detail={"text": f"not measured: {error}" if missing else str(error)})]
    if ours is None or generation is None:
        return checks
    if original is None:
        return [*checks, *_alone(ours.continuations, {"runtime": ours.runtime}, generation), *_pace(ours, None)]
    try:
        note = too_large(original, device)
        if isinstance(reference, SafetensorsCheckpoint) and not note:
            with runtime(reference.directory, device=device, dtype=dtype) as loaded:
                theirs = _generate(loaded, generation, progress)
            return checks + _generation_checks(ours, theirs, generation)
        note = note or "it is no directory that the runtime could load"
    except UnsupportedError as error:
        note = str(error)
    scored = score_continuations(original, tokenizer, ours.continuations, device=device, dtype=dtype, progress=progress)
    about = {"runtime": ours.runtime}
    return [*checks, *_scored_checks(ours.continuations, scored, generation, about, note), *_pace(ours, None)]


def _streamed_checks(
    artifact: Path,
    dense: Checkpoint,
    original: Checkpoint | None,
    options: GenerationOptions,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress,
) -> list[Check]:
    """Continuations of an artifact that can't be loaded whole, written and judged by the streaming engine."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact, local_files_only=True, trust_remote_code=False)
    texts = stream_continuations(
        dense,
        tokenizer,
        options.prompts,
        max_new_tokens=options.max_new_tokens,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    about = {"runtime": "llmconvert, streamed"}
    if original is None:
        return _alone(texts, about, options)
    scored = score_continuations(original, tokenizer, texts, device=device, dtype=dtype, progress=progress)
    return _scored_checks(texts, scored, options, about, "the models don't fit in memory")


def _alone(texts: Sequence[Continuation], about: dict[str, Any], options: GenerationOptions) -> list[Check]:
    """Continuations without an original to compare with."""
    detail = {**about, "max_new_tokens": options.max_new_tokens, "text": "no original to compare with"}
    shown = [{"prompt": text.prompt, "artifact": text.text} for text in texts]
    looping = sum(text.looping for text in texts)
    return [Check(name="generation.looping", value=looping, unit="texts", detail={**detail, "texts": shown})]


def _scored_checks(
    texts: Sequence[Continuation], scored: Scored, options: GenerationOptions, about: dict[str, Any], why: str
) -> list[Check]:
    """Continuations that the original has read, because it could not write its own."""
    agreed = options.min_agreement is None or scored.agreement >= options.min_agreement
    text = (
        "share of the artifact's tokens that the original, reading its text in one streamed pass, finds most likely; "
        f"the original wrote none of its own: {why}"
    )
    shown = [{"prompt": item.prompt, "artifact": item.text, "looping": item.looping} for item in texts]
    count = len(texts)
    return [
        Check(
            name="generation.agreement",
            value=scored.agreement,
            limit=options.min_agreement,
            ok=agreed,
            unit="share",
            detail={
                **about,
                "judged_by": "scoring",
                "prefix": scored.prefix,
                "max_new_tokens": max(len(item.ids) for item in texts),
                "texts": shown,
                "text": text,
            },
        ),
        *(
            Check(name=f"generation.{name}", value=value, unit="texts", detail={"of": count})
            for name, value in (
                ("looping", sum(item.looping for item in texts)),
                ("ended", sum(item.ended for item in texts)),
            )
        ),
    ]


def _generate(loaded: Runtime, options: GenerationOptions, progress: Progress) -> Generations:
    return generate(loaded, options.prompts, max_new_tokens=options.max_new_tokens, progress=progress)


def _loading_check(loaded: Runtime) -> Check:
    problems = loaded.problems
    text = f"{len(problems)} tensors did not load, first: {problems[0]}" if problems else f"loads in {loaded.name}"
    return Check(
        name="runtime",
        value=len(problems),
        limit=0,
        ok=not problems,
        unit="tensors",
        detail={"text": text, "runtime": loaded.name, "problems": list(problems)},
    )


def _fidelity_check(loaded: Runtime, probe: Probe) -> Check:
    name = "fidelity.max_abs_diff"
    try:
        found: Fidelity = fidelity(loaded, [probe.window], [probe.logits])
    except GateError as error:
        return Check(name=name, ok=False, detail={"text": str(error)})
    differ = f"differ from our reader's by {100 * found.relative:.2g} % of their own size"
    equal = "equal our reader's bit for bit"
    text = f"logits of {loaded.name} {differ if found.max_abs_diff else equal}, on {found.tokens} tokens"
    detail: dict[str, Any] = {
        "text": text,
        "runtime": loaded.name,
        "relative": found.relative,
        "top1_agreement": found.top1_agreement,
        "tokens": found.tokens,
    }
    return Check(name=name, value=found.max_abs_diff, ok=found.ok, detail=detail)


def _generation_checks(ours: Generations, theirs: Generations, options: GenerationOptions) -> list[Check]:
    about = {"runtime": ours.runtime, "max_new_tokens": options.max_new_tokens}
    result = compare(theirs, ours)
    agreed = options.min_agreement is None or result.agreement >= options.min_agreement
    detail = {**about, "prefix": result.prefix, "texts": _side_by_side(theirs, ours)}
    if not agreed:
        detail["text"] = (
            f"{100 * result.agreement:.0f} % of the tokens of greedy continuations are the original's, "
            f"required are {100 * (options.min_agreement or 0):g} %"
        )
    count = len(ours.continuations)
    # A few loops come and go with any change; half of all texts more than before is a broken model.
    stuck = result.looping[1] - result.looping[0] >= count / 2
    endless = result.ended[0] - result.ended[1] >= count / 2
    endless_text = f"{result.ended[1]} of {count} texts end by themselves, {result.ended[0]} before"
    stuck_text = f"{result.looping[1]} of {count} texts repeat one phrase without end, {result.looping[0]} before"
    return [
        Check(
            name="generation.agreement",
            value=result.agreement,
            limit=options.min_agreement,
            ok=agreed,
            unit="share",
            detail=detail,
        ),
        _count("generation.looping", result.looping, not stuck, {"of": count, "text": stuck_text if stuck else ""}),
        _count("generation.ended", result.ended, not endless, {"of": count, "text": endless_text if endless else ""}),
        *_pace(ours, theirs),
    ]


def _count(name: str, counts: tuple[int, int], ok: bool, detail: dict[str, Any]) -> Check:
    """A number of texts, ``(reference, artifact)``."""
    return Check(name=name, value=counts[1], reference=counts[0], ok=ok, unit="texts", detail=detail)


def _pace(ours: Generations, theirs: Generations | None) -> list[Check]:
    paces: Sequence[tuple[str, float, float | None]] = (
        ("prefill", ours.prefill_tokens_per_second, theirs.prefill_tokens_per_second if theirs else None),
        ("decode", ours.decode_tokens_per_second, theirs.decode_tokens_per_second if theirs else None),
    )
    return [
        Check(name=f"speed.{name}", value=value, reference=before, unit="tokens/s", detail={"runtime": ours.runtime})
        for name, value, before in paces
    ]


def _side_by_side(theirs: Generations, ours: Generations) -> list[dict[str, Any]]:
    return [
        {
            "prompt": before.prompt,
            "reference": before.text,
            "artifact": after.text,
            "same": before.ids == after.ids,
            "looping": after.looping,
        }
        for before, after in zip(theirs.continuations, ours.continuations, strict=True)
    ]
