"""Behaviour in transformers: loading, logits against our reader's, greedy text against the original's, speed.

One measurement, because loading is what takes long: the artifact is loaded once, and the original after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmconvert.errors import GateError, SourceError, UnsupportedError
from llmconvert.needs import Needs
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.text.tokenizer import has_tokenizer, load_tokenizer
from llmconvert.validate.generation.greedy import PROMPTS, Continuation, Generations, compare, encode, generate
from llmconvert.validate.generation.streamed import Scored, score_continuations, stream_continuations
from llmconvert.validate.measurement import Measurement, Planned, Subject
from llmconvert.validate.runtimes.fidelity import Fidelity, Probe, fidelity, probe_nbytes, take_probe
from llmconvert.validate.runtimes.transformers import Runtime, loading_needs, not_loaded, runtime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BehaviourCheck", "GenerationOptions"]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Greedy continuations of each prompt, this many tokens at most; ``min_agreement`` is the gate on equal tokens."""

    max_new_tokens: int = 64
    min_agreement: float | None = None
    prompts: tuple[str, ...] = PROMPTS


@dataclass(frozen=True, slots=True)
class BehaviourCheck(Measurement):
    """Behaviour in transformers as a measurement; without ``generation`` loading and fidelity alone, which need a text.

    An artifact too large for the memory is continued by the streaming engine, a few tokens per prompt; one whose
    quantizer is not installed gives a check that says so and holds no number. An artifact that transformers refuses, or
    loads with tensors missing, is a failed check.
    """

    generation: GenerationOptions | None = None

    def accept(self, original: Checkpoint) -> None:
        """Refuse a tokenizer or a chat template that fails on the prompts; a model without tokenizer has no texts."""
        if self.generation is None or not has_tokenizer(original):
            return
        try:
            encode(load_tokenizer(original), self.generation.prompts)
        except SourceError as error:
            raise SourceError(f"{error}; without validate.generation it would not be needed") from error

    def needs(self, planned: Planned) -> Needs:
        """That of loading the artifact whole, and for continuations the original, where that is done."""
        if not planned.loadable or (planned.windows is None and self.generation is None):
            return Needs()
        original = planned.compared and self.generation is not None
        return loading_needs(planned, original=original, logits=probe_nbytes(planned) if planned.windows else 0)

    def measure(self, subject: Subject) -> list[Check]:
        """Load the artifact, then the original, by transformers, one at a time; nothing for GGUF, which it is not for.

        An original that is a directory and fits in memory writes its own continuations; one that cannot write reads the
        artifact's instead.
        """
        if not (subject.artifact / "config.json").exists():
            return []
        if unloadable := subject.unloadable:
            return [Check.unmeasured("runtime", unloadable, asked=False)]
        probe, options = take_probe(subject), self.generation
        if probe is None and options is None:
            return []
        # The runtime computes in the probe's dtype, in that of the config without one.
        if subject.dtype is None and probe is not None:
            subject = replace(subject, dtype=probe.logits.dtype)
        held = 2 * probe.logits.nbytes if probe is not None else 0
        if oversized := not_loaded(subject.dense, subject.device, subject.memory, beside=held):
            loading = Check.unmeasured("runtime", oversized, asked=False)
            return [loading] if options is None else [loading, *_streamed(subject, options)]
        try:
            with runtime(subject.artifact, device=subject.device, dtype=subject.dtype) as loaded:
                checks = [_loading_check(loaded)]
                if probe is not None:
                    checks.append(_fidelity_check(loaded, probe))
                if options is None:
                    return checks
                ours, tokenizer = _generate(loaded, options, subject), loaded.tokenizer
        except UnsupportedError as error:
            if isinstance(error.__cause__, ImportError):
                loading = Check.unmeasured("runtime", str(error), asked=False)
                asked = () if options is None else (Check.unmeasured("generation.agreement", str(error), asked=True),)
                return [loading, *asked]
            return [Check(name="runtime", ok=False, detail={"text": str(error)})]
        return checks + _against_original(subject, options, ours, tokenizer)


def _against_original(
    subject: Subject, options: GenerationOptions, ours: Generations, tokenizer: PreTrainedTokenizerBase
) -> list[Check]:
    """The artifact's continuations beside the original's own, or read by it, or alone."""
    about = {"runtime": ours.runtime}
    if subject.original is None:
        return [*_alone(ours.continuations, about, options), *_pace(ours, None)]
    try:
        note = not_loaded(subject.original, subject.device, subject.memory)
        if isinstance(subject.reference, SafetensorsCheckpoint) and not note:
            with runtime(subject.reference.directory, device=subject.device, dtype=subject.dtype) as loaded:
                theirs = _generate(loaded, options, subject)
            return _generation_checks(ours, theirs, options)
        note = note or "it is no directory that the runtime could load"
    except UnsupportedError as error:
        note = str(error)
    scored = _score(subject, subject.original, tokenizer, ours.continuations)
    return [*_scored_checks(ours.continuations, scored, options, about, note), *_pace(ours, None)]


def _streamed(subject: Subject, options: GenerationOptions) -> list[Check]:
    """Continuations of an artifact that can't be loaded whole, written and judged by the streaming engine."""
    tokenizer = load_tokenizer(subject.stored)
    texts = stream_continuations(
        subject.dense,
        tokenizer,
        options.prompts,
        max_new_tokens=options.max_new_tokens,
        device=subject.device,
        dtype=subject.dtype,
        progress=subject.progress,
    )
    about = {"runtime": "llmconvert, streamed"}
    if subject.original is None:
        return _alone(texts, about, options)
    scored = _score(subject, subject.original, tokenizer, texts)
    return _scored_checks(texts, scored, options, about, "the models don't fit in memory")


def _score(
    subject: Subject, original: Checkpoint, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Continuation]
) -> Scored:
    return score_continuations(
        original, tokenizer, texts, device=subject.device, dtype=subject.dtype, progress=subject.progress
    )


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


def _generate(loaded: Runtime, options: GenerationOptions, subject: Subject) -> Generations:
    return generate(loaded, options.prompts, max_new_tokens=options.max_new_tokens, progress=subject.progress)


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
