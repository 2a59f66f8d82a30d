"""Loading a model directory with transformers and its own quantizers, as users will.

Loading must be silent about nothing: weights that a file lacks are filled with random numbers by the loader, so what
it reports as missing, unexpected or mismatched is kept.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmconvert.engine.architecture.expert_names import first_elsewhere
from llmconvert.engine.memory import BASE_NBYTES, tokenizer_nbytes
from llmconvert.errors import MachineError, UnsupportedError, one_line
from llmconvert.machine import of_machine
from llmconvert.memory import available_nbytes, release_freed_memory
from llmconvert.needs import Needs
from llmconvert.quantize.formats.compressed.config import has_zero_points
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.directory import read_config
from llmconvert.text.tokenizer import try_tokenizer
from llmconvert.validate.measurement import Planned

__all__ = ["Runtime", "end_tokens", "loading_needs", "not_loaded", "runtime"]

T = TypeVar("T")
# What transformers takes while loading, relative to the dense weights it ends up with: these, and the file that they
# are copied from, which is mapped and as large at most.
_LOADING_FACTOR = 2


@dataclass(frozen=True)
class Runtime:
    """A loaded model.

    Attributes:
        model, tokenizer: what transformers made of the directory.
        name: the runtime in words, for records: ``transformers 5.23.0 on cpu, bfloat16``.
        problems: tensors that were missing, unexpected or of another shape.
    """

    model: Any
    tokenizer: Any
    name: str
    problems: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return torch.device(self.model.device)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a text: those of the generation config, and the tokenizer's."""
        return end_tokens(self.model.generation_config.eos_token_id, self.tokenizer)


def end_tokens(declared: object, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: one or several that a config declares, and the tokenizer's; what is no id is left out."""
    found = [*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id]
    return frozenset(token for token in found if isinstance(token, int))


@contextlib.contextmanager
def runtime(directory: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Runtime]:
    """Load a model directory whole, and free its weights at the end.

    Code that comes with a model is never run.

    Args:
        dtype: what it computes in; the dtype of its config by default.

    Raises:
        UnsupportedError: transformers cannot load it, with its reason.
        CheckpointError: there is no ``config.json``, or it is damaged.
        SourceError: its tokenizer ends the process that runs it.
        MachineError: a file could not be read, or memory is out.
    """
    release_freed_memory()
    # Imported here, and before standard error is replaced: its log handler keeps the stream it finds.
    import transformers

    from llmconvert.engine.architecture.model import loaded_class

    config = read_config(directory)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    loading: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True, **options}
    if has_zero_points(config.get("quantization_config")):
        # What compressed-tensors prepares for the first forward has no room for zero points that are packed.
        loading["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    # Users get what config.json names: with a vision tower, where the class that is asked for text has none.
    model_class: Any = loaded_class(config) or transformers.AutoModelForCausalLM
    if (directory / "tokenizer.json").is_file():
        try_tokenizer(directory / "tokenizer.json")

    def load() -> tuple[Any, Any, Any]:
        # Progress bars of the loader and of compressed-tensors, which have no other switch, go to the buffer.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **options)
            model, info = model_class.from_pretrained(directory, **loading)
            model = model.to(device).eval()
            # Quantized weights are unpacked by the first forward, which belongs to loading and not to what is timed.
            with torch.inference_mode():
                model(torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
        return tokenizer, model, info

    tokenizer, model, info = _twice(load, directory)
    release_freed_memory()
    problems = [
        f"{kind.removesuffix('_keys')}: {entry if isinstance(entry, str) else entry[0]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for entry in sorted(info[kind], key=str)
    ]
    name = f"transformers {transformers.__version__} on {device}, {str(model.dtype).removeprefix('torch.')}"
    try:
        yield Runtime(model, tokenizer, name, tuple(problems))
    finally:
        # The caller's variable and cycles between modules would keep the weights until some later collection.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        release_freed_memory()


def _twice(load: Callable[[], T], directory: Path) -> T:
    """What ``load`` gives. Only what fails twice is blamed on the model: transformers asks whether files are there in
    ways that take a disk's error for a no."""
    import transformers

    last = False
    while True:
        try:
            return load()
        except Exception as error:  # whatever goes wrong inside a loader of many architectures and quantizers
            if of_machine(error):
                raise MachineError(
                    f"{directory}: transformers cannot load it now: {one_line(error)}; run the same command again"
                ) from error
            if last or isinstance(error, ImportError):
                name, version = directory.name, transformers.__version__
                raise UnsupportedError(f"{name}: transformers {version} cannot load it: {one_line(error)}") from error
        last = True


def loading_needs(planned: Planned, *, original: bool, logits: int = 0) -> Needs:
    """What :func:`runtime` takes for a model like that; nothing where it is too large to be tried.

    A file is mapped while its weights are copied, or unpacked, into dense ones; both are resident then.

    Args:
        original: whether the original is loaded too, after the artifact.
        logits: bytes of those that are held beside the model.
    """
    device, dense = planned.context.device, planned.dense
    if not_loaded(dense, device, planned.context.memory, beside=logits):
        return Needs()
    loaded = dense.nbytes + (dense.nbytes if original else min(planned.stored, dense.nbytes))
    held = dense.nbytes + logits if device.type != "cpu" else 0
    return Needs(_own_nbytes(dense) + loaded + logits, held)


def not_loaded(dense: Checkpoint, device: torch.device, memory: int | None = None, *, beside: int = 0) -> str:
    """Why transformers is not asked to load a checkpoint; empty if it is.

    It can't be loaded whole in ``memory`` bytes, or in what is free on ``device``; or its experts have names that
    transformers does not know, which would leave them random.

    Args:
        beside: bytes that are held beside it.
    """
    if expert := first_elsewhere(dense.config.get("model_type"), dense):
        return f"it was not loaded, since transformers has no names for single experts of its class ({expert}, …)"
    # What may be used is said of the whole process; what is free, beside what that has by now.
    free = available_nbytes(device) if memory is None else max(0, memory - _own_nbytes(dense))
    needed = _LOADING_FACTOR * dense.nbytes + beside
    words = "are free" if memory is None else "may be used"
    return f"loading it whole takes about {needed:,} bytes, {free:,} {words}" if needed > free else ""


def _own_nbytes(dense: Checkpoint) -> int:
    """What the process takes without the model."""
    return BASE_NBYTES + tokenizer_nbytes(dense)
