"""Fidelity of vLLM: its log-probabilities of a prompt against our reader's.

vLLM gives no logits but log-probabilities of the prompt's tokens, the most likely ones at each position and the one
that came (``prompt_logprobs``). They are compared with those of our reader. Its kernels sum in other orders, and some
quantize activations, so the comparison is of the mean.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmconvert.errors import GateError, UnsupportedError
from llmconvert.quantize.formats.dense_view import served_by
from llmconvert.report.report import Check
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.runtimes import vllm_worker
from llmconvert.validate.runtimes.fidelity import Probe, take_probe
from llmconvert.validate.runtimes.isolated import require_not_killed

__all__ = ["LogprobFidelity", "VllmCheck", "compare_logprobs", "vllm_is_installed", "vllm_logprobs"]

_TOP = 20
# bfloat16 carries 8 bits, so that logits near 16 move by 1/16 with the order of a sum; a layer read wrongly moves
# them by whole nats.
_MAX_MEAN = 0.1
_MIN_TOP1 = 0.9
_TIMEOUT_SECONDS = 3600
# On a CPU: GiB of its key-value cache (by default it takes half of the memory), and 4-bit kernels that leave
# activations at 16 bits, as the schemes say.
_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0", "VLLM_LOGGING_LEVEL": "WARNING"}

#: Of each position but the first: token id → log-probability given the tokens before.
Logprobs = Sequence[Mapping[int, float]]


@dataclass(frozen=True, slots=True)
class LogprobFidelity:
    """How far the runtime's log-probabilities are from ours, over the tokens that it finds most likely.

    Attributes:
        max_abs_diff, mean_abs_diff: of a log-probability, in nats.
        top1_agreement: share of positions with the same most likely token.
        tokens: positions compared.
    """

    max_abs_diff: float
    mean_abs_diff: float
    top1_agreement: float
    tokens: int

    @property
    def ok(self) -> bool:
        """Whether roundings explain the difference."""
        return self.mean_abs_diff <= _MAX_MEAN and self.top1_agreement >= _MIN_TOP1


def vllm_is_installed() -> bool:
    """Whether vLLM can be imported in this environment."""
    return importlib.util.find_spec("vllm") is not None


def vllm_logprobs(
    artifact: Path, window: torch.Tensor, dtype: torch.dtype, *, python: str = sys.executable
) -> tuple[Logprobs, str]:
    """Let vLLM read a window of token ids ``[1, L]``, in a process of its own.

    Args:
        dtype: what it computes in.
        python: the interpreter of the environment in which vLLM is installed.

    Returns:
        The log-probabilities of ``L - 1`` positions, and the runtime's name.

    Raises:
        UnsupportedError: it cannot load the artifact, with its reason.
        MachineError: its process was killed.
    """
    with tempfile.TemporaryDirectory(prefix="llmconvert-") as directory:
        question, answer = Path(directory) / "request.json", Path(directory) / "answer.json"
        request = {
            "model": str(artifact.absolute()),
            "dtype": str(dtype).removeprefix("torch."),
            "top": _TOP,
            "windows": window.tolist(),
        }
        question.write_text(json.dumps(request))
        # -P: the script's directory holds modules named like those of the standard library.
        command = [python, "-P", str(vllm_worker.__file__), str(question), str(answer)]
        # What it starts in turn must not import from the working directory either.
        environment = {**_SETTINGS, **os.environ, "PYTHONSAFEPATH": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise UnsupportedError(f"{artifact.name}: vLLM took longer than {_TIMEOUT_SECONDS:,} s") from None
        if not answer.is_file():
            require_not_killed(done.returncode, f"vLLM, reading {artifact.name}")
            raise UnsupportedError(f"{artifact.name}: vLLM cannot run it: {_reason(done.stderr)}")
        found: dict[str, Any] = json.loads(answer.read_text())
    (scored,) = found["windows"]
    device = "CPU" if window.device.type == "cpu" and not torch.cuda.is_available() else "GPU"
    name = f"vLLM {found['version']} on {device}, {request['dtype']}"
    return [{int(token): value for token, value in position.items()} for position in scored], name


def _reason(log: str) -> str:
    """The last line of a log that names an error, without what was printed before it."""
    lines = [line.strip() for line in log.splitlines() if "Error" in line]
    return (lines[-1] if lines else log.strip()[-300:] or "it ended without a word").split(") ")[-1]


def compare_logprobs(found: Logprobs, logits: torch.Tensor) -> LogprobFidelity:
    """Compare a runtime's log-probabilities with our reader's logits ``[1, L, V]`` for the same window.

    Raises:
        GateError: the runtime's are not finite, or of other positions.
    """
    ours = logits[0, :-1].float().log_softmax(-1)
    if len(found) != len(ours):
        raise GateError(f"the runtime scored {len(found)} positions, our reader {len(ours)}")
    largest = total = 0.0
    same = count = 0
    for position, reference in zip(found, ours, strict=True):
        ids = torch.tensor(list(position))
        theirs = torch.tensor(list(position.values()))
        if not torch.isfinite(theirs).all():
            raise GateError("the runtime's log-probabilities are not finite, our reader's are")
        difference = (theirs - reference[ids]).abs()
        largest, total, count = max(largest, float(difference.max())), total + float(difference.sum()), count + len(ids)
        same += int(ids[theirs.argmax()] == reference.argmax())
    return LogprobFidelity(largest, total / count, same / len(ours), len(ours))


@dataclass(frozen=True, slots=True)
class VllmCheck(Measurement):
    """Fidelity of vLLM as a measurement, where it is installed; nothing where it is not.

    vLLM reads fewer schemes than there are, so an artifact that it can't run is no failed check; one that it runs and
    computes something else from is.
    """

    def measure(self, subject: Subject) -> list[Check]:
        """One check, the mean difference of a log-probability in nats; nothing without a text."""
        if not vllm_is_installed():
            return []
        probe = take_probe(replace(subject, dense=served_by(subject.dense, "vllm")))
        return [] if probe is None else [_compared(subject, probe)]


def _compared(subject: Subject, probe: Probe) -> Check:
    name, label = "fidelity.vllm_mean_abs_diff", "Mean difference of a log-probability, vLLM to reader"
    with subject.progress.task("vLLM", 1) as task:
        try:
            found, runtime = vllm_logprobs(subject.artifact, probe.window, probe.logits.dtype)
            result = compare_logprobs(found, probe.logits)
        except UnsupportedError as error:
            return Check.unmeasured(name, str(error), asked=False, label=label, quiet=True)
        except GateError as error:
            return Check(name=name, label=label, ok=False, detail={"text": str(error)})
        task.advance(1)
    agreed = f"{100 * result.top1_agreement:.1f} % of {result.tokens} positions"
    text = f"{runtime} gives the same most likely token at {agreed}"
    detail = {"text": text, "runtime": runtime, **asdict(result)}
    return Check(
        name=name, label=label, value=result.mean_abs_diff, ok=result.ok, unit="nats", quiet=True, detail=detail
    )
