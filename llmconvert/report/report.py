"""The report: every number measured, with its limit and verdict.

It is written to ``llmconvert/report.json`` of an artifact in the stable schema ``llmconvert.report/1``::

    {"schema": "llmconvert.report/1",
     "outcome": "passed", "failed" or "not measured",
     "model": {"name", "source", "revision", "architecture", "parameters", ...},
     "environment": {"python": "3.12.1", "torch": "2.13.0", ...},
     "steps": [{"name", "seconds", "peak_rss_bytes", "sections", "details", ...}],
     "checks": [{"name", "value", "reference", "limit", "ok", "unit", "detail", "sections"}]}

``value`` is the artifact's, ``reference`` the original's, and ``limit`` what the recipe allows; any of them may be
null. ``unit`` names what they count: ``bytes``, ``bits``, ``nats``, ``share`` (0 to 1), ``relative`` (an error's size
relative to what it is an error of), ``tokens``, ``tokens/s``, ``seconds``, ``tensors``, ``texts``, ``rounds``, or
nothing. A check that could not be made says ``"measured": false``. ``detail`` holds a sentence under ``text`` where
one helps, intervals under ``low`` and ``high``, and whatever else belongs to that check; tables and plots are
``sections`` (:mod:`llmconvert.report.section`). A check without a limit passes unless something is broken.
``docs/report.md`` has it all.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, computed_field, model_validator

from llmconvert.errors import GateError, SourceError
from llmconvert.report.section import Section, Value
from llmconvert.report.steps import Step
from llmconvert.storage.writer import write_file

__all__ = ["Check", "ModelInfo", "Report", "Step", "environment", "json_schema", "require_passed"]

# What the names of checks begin with that tell how well a model predicts; the others tell of files, speed and memory.
_OF_PREDICTIONS = ("perplexity", "kl_", "top1_", "block_divergence", "generation.", "task.", "positions.")
_PACKAGES = ("llmconvert", "torch", "transformers", "safetensors", "compressed-tensors", "numpy", "numba")


def _is_empty(value: object) -> bool:
    return not value


def _is_usual(value: object) -> bool:
    return value == "AutoModelForCausalLM"


class CalibrationSource(Value):
    """What one dataset of a calibration mix gave.

    Attributes:
        dataset: its name.
        digest: of its content.
        samples: windows from it.
        tokens: in these.
    """

    dataset: str
    digest: str
    samples: int
    tokens: int


class ModelInfo(Value):
    """What was made of what.

    Attributes:
        name: what the artifact calls itself.
        source: Hub id, path or ``package:`` name of the original.
        revision: commit hash of a Hub source.
        architecture: the transformers class, ``LlamaForCausalLM``.
        parameters: numbers in the original.
        beside: how many of them text never meets: towers for images and sound, and what joins them to the decoder.
        loader: transformers' class that loads the whole, where it is not ``AutoModelForCausalLM``.
        license: identifier inherited from the original.
        base_model: Hub id of the original, where the source or the recipe says so.
        parents: Hub ids of the models that the original was made from, where only these are known.
        stored: what the original itself was quantized in, ``fp8, w8a8-g128x128-fp8``; None if it was dense.
        adapter: the LoRA that was merged into the original, as given or with its commit on the Hub; None without one.
        requantized: whether that was made for deployment, so that weights were rounded twice.
        method, scheme, format: of the quantization, ``gptq``, ``w4a16-g64-sym``, ``compressed-tensors``.
        calibration: dataset and amount in words.
        calibration_digest: of the dataset's content, to tell the same text under another name; of a mix that of all.
        calibration_sources: of a mix, what each dataset gave.
    """

    name: str
    source: str
    revision: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    beside: int = Field(default=0, exclude_if=_is_empty)
    loader: str = Field(default="AutoModelForCausalLM", exclude_if=_is_usual)
    license: str | None = None
    base_model: str | None = None
    parents: tuple[str, ...] = ()
    stored: str | None = None
    requantized: bool = False
    adapter: str | None = None
    method: str | None = None
    scheme: str | None = None
    format: str | None = None
    calibration: str | None = None
    calibration_digest: str | None = None
    calibration_sources: tuple[CalibrationSource, ...] = ()


class Check(Value):
    """One measurement, the limit it had to keep, and whether it did.

    Attributes:
        name: what was measured, ``perplexity`` or ``speed.decode``; ``docs/report.md`` lists them.
        value: the artifact's; None where it could not be had, and ``detail`` says why.
        reference: the original's; None without one.
        limit: what the recipe allows: at least this for shares, at most this for everything else.
        ok: whether the limit was kept; without one False only if something is broken, or was asked for by name and
            could not be measured.
        unit: of value, reference and limit: ``bytes``, ``nats``, ``share`` (0 to 1), …; empty for plain numbers.
        detail: what belongs to it as JSON values: ``text``, ``low`` and ``high`` of a 95 % interval, and more.
        label: the name in words, where the package has none of its own for it.
        measured: false if it could not be made; ``detail`` says why.
        quiet: whether terminal and model card leave it out unless it fails.
        sections: what it has to show besides a number.
    """

    name: str
    label: str = Field(default="", exclude_if=_is_empty)
    value: float | None = None
    reference: float | None = None
    limit: float | None = None
    ok: bool = True
    unit: str = ""
    quiet: bool = Field(default=False, exclude_if=_is_empty)
    measured: bool = Field(default=True, exclude_if=bool)
    detail: Mapping[str, Any] = Field(default_factory=dict)
    sections: tuple[Section, ...] = Field(default=(), exclude_if=_is_empty)

    @property
    def text(self) -> str:
        """The sentence that goes with it, if any."""
        return str(self.detail.get("text", ""))

    @classmethod
    def unmeasured(cls, name: str, why: str, *, asked: bool, **about: Any) -> Check:
        """A check that could not be made, for the reason ``why``; it fails if it was ``asked`` for."""
        advice = "; leave it out to do without" if asked else ""
        detail = {**about.pop("detail", {}), "text": f"not measured: {why}{advice}"}
        return cls(name=name, ok=not asked, measured=False, detail=detail, **about)


class Report(Value):
    """Everything measured about one artifact: ``report["perplexity"]`` is a check by its name.

    Attributes:
        schema_: name and version of the JSON schema.
        model: what was made of what.
        environment: name → version of what the numbers depend on.
        steps: stages of the run, in order; empty for an artifact that was measured alone.
        checks: what was measured, in order.
    """

    schema_: Literal["llmconvert.report/1"] = Field(default="llmconvert.report/1", alias="schema")
    model: ModelInfo
    environment: Mapping[str, str] = Field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    checks: tuple[Check, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_outcome(cls, values: Any) -> Any:
        """What was read from a file says its outcome, which follows from the checks."""
        return {key: value for key, value in values.items() if key != "outcome"} if isinstance(values, dict) else values

    @computed_field  # type: ignore[prop-decorator]
    @property
    def outcome(self) -> Literal["passed", "failed", "not measured"]:
        """``not measured`` where no check failed and none tells how well the artifact predicts."""
        if self.failed:
            return "failed"
        told = any(check.measured and check.name.startswith(_OF_PREDICTIONS) for check in self.checks)
        return "passed" if told else "not measured"

    @property
    def verdict(self) -> bool:
        """Whether no check failed; :attr:`outcome` tells whether that says anything."""
        return not self.failed

    @property
    def unmeasured(self) -> tuple[Check, ...]:
        """The checks that could not be made."""
        return tuple(check for check in self.checks if not check.measured)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.ok)

    @property
    def sections(self) -> tuple[Section, ...]:
        """The sections of all steps, then those of all checks.

        What a repair quantized anew says the last word on a subject.
        """
        by_step = {section.name: section for step in self.steps for section in step.sections}
        return *by_step.values(), *(section for check in self.checks for section in check.sections)

    def check(self, name: str) -> Check | None:
        """The check of that name, or None."""
        return next((check for check in self.checks if check.name == name), None)

    def __getitem__(self, name: str) -> Check:
        """The check of that name: ``report["perplexity"].value``.

        Raises:
            KeyError: nothing of that name was measured; it lists what was.
        """
        found = self.check(name)
        if found is None:
            raise KeyError(f"{name!r} was not measured; there are {', '.join(check.name for check in self.checks)}")
        return found

    def __contains__(self, name: object) -> bool:
        """Whether something of that name was measured; it may have no value."""
        return any(check.name == name for check in self.checks)

    def to_json(self) -> str:
        """Indented JSON. Numbers that are not finite become null."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    def write(self, path: Path | str) -> None:
        """Write the JSON, whole or not at all."""
        write_file(Path(path), self.to_json().encode())

    @classmethod
    def from_json(cls, text: str | bytes, *, origin: str = "report") -> Report:
        """Read what :meth:`to_json` wrote.

        Raises:
            SourceError: not a report of this schema; ``origin`` names it.
        """
        try:
            found = json.loads(text)
            if not isinstance(found, dict) or found.get("schema") != "llmconvert.report/1":
                schema = found.get("schema") if isinstance(found, dict) else type(found).__name__
                raise SourceError(f"{origin}: schema is {schema!r}, expected 'llmconvert.report/1'")
            return cls.model_validate(found)
        except (ValueError, ValidationError) as error:
            raise SourceError(f"{origin}: is not a report: {error}") from error

    @classmethod
    def read(cls, path: Path | str) -> Report:
        """Read a report file.

        Raises:
            SourceError: it cannot be read, or is no report.
        """
        try:
            return cls.from_json(Path(path).read_bytes(), origin=str(path))
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from error


def json_schema() -> str:
    """The JSON Schema (2020-12) of ``report.json``, indented."""
    values = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    values |= Report.model_json_schema(by_alias=True, mode="serialization")
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def environment() -> dict[str, str]:
    """Versions and the machine that the numbers depend on; nothing that names the machine or its user."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    found["cpus"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def require_passed(checks: Iterable[Check], blame: str = "") -> None:
    """The gate. ``blame`` (:func:`llmconvert.validate.render.blame.blame`) is added to what it says.

    Raises:
        GateError: naming every check that failed, its value and its limit.
    """
    failed = [check for check in checks if not check.ok]
    if failed:
        reasons = "; ".join(check.text or f"{check.name} is {check.value}, allowed {check.limit}" for check in failed)
        advice = f". To blame: {blame}; give these layers more bits or smaller groups" if blame else ""
        raise GateError(f"the artifact did not pass: {reasons}{advice}. It is kept and was not published")
