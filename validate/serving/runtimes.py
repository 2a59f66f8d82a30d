"""The runtimes that a model can be timed in, and one turn of one of them in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.matrix import refused_by
from llmconvert.quantize.runtimes import runtimes_of
from llmconvert.quantize.scheme import SchemeOrMix
from llmconvert.validate.runtimes.isolated import UnmeasuredError, require_not_killed
from llmconvert.validate.serving import worker

__all__ = ["NAMES", "ServedBy", "Turn", "require_readers", "run_turn"]

# By what a recipe calls it: the module that is imported, the package that has it, and its name among readers.
_KNOWN: Mapping[str, tuple[str, str, str]] = {
    "vllm": ("vllm", "vllm", "vllm"),
    "llama.cpp": ("xllamacpp", "xllamacpp", "llama_cpp"),
    "mlx": ("mlx_lm", "mlx-lm", "mlx"),
    "transformers": ("transformers", "transformers", "transformers"),
}
#: What a recipe may name.
NAMES = tuple(_KNOWN)
_TIMEOUT = 3600.0
_ASKING_TIMEOUT = 120.0
_TAIL = 300
# Lines of an error's message: vLLM says on lines of their own which kernels there are, and why none of them will do.
_CONTINUED = 4
# vLLM on a CPU: GiB of its cache, 4-bit kernels that leave activations at 16 bits, and all of it in one process.
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True, slots=True)
class ServedBy:
    """A runtime.

    Attributes:
        name: one of :data:`NAMES`.
        python: of the environment that has it; this one's by default.
    """

    name: str
    python: str | None = None

    @classmethod
    def parse(cls, text: str) -> ServedBy:
        """``mlx``, or ``mlx=/path/to/python``.

        Raises:
            UnsupportedError: no runtime of that name is known, with those that are.
        """
        name, _, python = (part.strip() for part in text.partition("="))
        if name not in NAMES:
            raise UnsupportedError(f"{name!r} is no runtime that can be timed here; there are {', '.join(NAMES)}")
        return cls(name, python or None)

    @property
    def key(self) -> str:
        """Its name in the names of checks."""
        return _KNOWN[self.name][2]

    def require(self) -> None:
        """Refuse a runtime that is not there.

        Raises:
            UnsupportedError: with what would have it.
        """
        module, package, _ = _KNOWN[self.name]
        how = f"install {package}, name the Python that has it ({self.name}=/path/to/python), or leave it out"
        if self.python is None:
            if importlib.util.find_spec(module) is None:
                raise UnsupportedError(f"validate.serve: {self.name} cannot be imported here ({module}); {how}")
            return
        ask = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        try:
            done = subprocess.run([self.python, "-P", "-c", ask], capture_output=True, timeout=_ASKING_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnsupportedError(f"validate.serve: {self.python} is no Python that can be run; {how}") from error
        if done.returncode:
            raise UnsupportedError(f"validate.serve: {self.python} does not have {self.name} ({module}); {how}")

    def reads(self, format: str | None) -> bool:
        """Whether it reads a format, as far as the record of runs goes; None is of dense weights in safetensors."""
        if format is None:
            return self.name != "llama.cpp"
        return any(runtime.script == self.key for runtime in runtimes_of(format))

    def lacks(self, format: str | None, schemes: Collection[SchemeOrMix] = (), *, accelerated: bool) -> str:
        """Why it cannot run an artifact, as far as the record of runs goes; empty where nothing speaks against it.

        Args:
            format: of the artifact, None for dense weights in safetensors.
            schemes: that are in it, as far as they are known.
            accelerated: whether there is a GPU: what a runtime refuses was seen on CPUs.
        """
        if not self.reads(format):
            return f"does not read {format or 'dense weights in safetensors'}"
        refused = () if format is None or accelerated else refused_by(self.key, format, schemes)
        return f"does not load {', '.join(refused)} in {format} on a CPU" if refused else ""


def require_readers(
    runtimes: Sequence[ServedBy], format: str | None, schemes: Collection[SchemeOrMix] = (), *, accelerated: bool
) -> dict[str, str]:
    """Refuse, before any work, an artifact that none of the runtimes can run.

    Args:
        runtimes: those asked for.
        format, schemes, accelerated: see :meth:`ServedBy.lacks`.

    Returns:
        Names of runtimes that are left out, since others can, and what each lacks.

    Raises:
        UnsupportedError: with the runtimes that can.
    """
    lacks = {name: ServedBy(name).lacks(format, schemes, accelerated=accelerated) for name in NAMES}
    lacking = {served.name: lacks[served.name] for served in runtimes if lacks[served.name]}
    if len(lacking) == len({served.name for served in runtimes}):
        able = [name for name in NAMES if not lacks[name]]
        instead = f"{' and '.join(able)} can: name one of them, or leave it out" if able else "leave it out"
        told = "; ".join(f"{name} {lack}" for name, lack in lacking.items())
        raise UnsupportedError(f"validate.serve: {told}; {instead}")
    return lacking


@dataclass(frozen=True, slots=True)
class Turn:
    """What one process found.

    Attributes:
        version: of the runtime.
        load: seconds until the model answered for the first time.
        memory: bytes of the process at most.
        reading, writing: tokens per second by tokens of context: of a prompt that long, and behind it.
    """

    version: str
    load: float
    memory: int
    reading: Mapping[int, float] = field(default_factory=dict)
    writing: Mapping[int, float] = field(default_factory=dict)


def run_turn(
    served: ServedBy,
    model: Path,
    contexts: Sequence[int],
    tokens: int,
    *,
    vocabulary: int,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Turn:
    """Load a model in a runtime, read random prompts and write behind them, in a process of its own.

    Args:
        served: where.
        model: directory, or a GGUF file.
        contexts: tokens of the prompts, one after the other.
        tokens: written behind each.
        vocabulary: from which tokens are drawn.
        seed: of the draw.
        options: of transformers: ``device``, and ``dequantize`` for weights that it can't run packed.

    Raises:
        UnmeasuredError: it failed, with the runtime's last words, or took too long.
        MachineError: it was killed.
    """
    with tempfile.TemporaryDirectory(prefix="llmconvert-") as directory:
        question, answer = Path(directory) / "request.json", Path(directory) / "answer.json"
        request = {
            "model": str(model.absolute()),
            "contexts": list(contexts),
            "tokens": tokens,
            "seed": seed,
            "vocabulary": vocabulary,
            "options": dict(options or {}),
        }
        question.write_text(json.dumps(request))
        command = [served.python or sys.executable, "-P", str(worker.__file__), served.name, str(question), str(answer)]
        # Another environment has packages of its own, which the paths of this one would hide.
        hidden = ("PYTHONPATH", "PYTHONHOME") if served.python is not None else ()
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment = {**_SETTINGS, **environment, "PYTHONSAFEPATH": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise UnmeasuredError(f"{served.name} took longer than {_TIMEOUT:,.0f} s", by_limit=True) from None
        if not answer.is_file():
            require_not_killed(done.returncode, f"{served.name}, serving {model.name}")
            raise UnmeasuredError(f"{served.name} cannot run {model.name}: {_reason(done.stderr)}")
        found: dict[str, Any] = json.loads(answer.read_text())
    turns = found["turns"]
    reading, writing = ({one["context"]: one[kind] for one in turns} for kind in ("reading", "writing"))
    return Turn(found["version"], found["load"], found["memory"], reading, writing)


def _reason(log: str) -> str:
    """The last line of a log that names an error, with those that continue it; without what was printed before."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = next((index for index in reversed(range(len(lines))) if "Error" in lines[index]), None)
    if last is None:
        return " ".join(lines)[-_TAIL:] or "it ended without a word"
    return " ".join(lines[last : last + _CONTINUED])[:_TAIL]
