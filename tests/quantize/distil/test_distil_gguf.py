"""Distillation of GGUF files: formulas against the blocks' bytes, files of which nothing else changes, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import save_file
from support.distilling import QUICK, distil, held_out_divergence, quantized
from support.gguf_families import GGUF_FAMILIES, save_family
from support.image_families import save_images_family
from support.tiny_gguf import tiny_model
from support.tiny_models import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmconvert.context import Context
from llmconvert.errors import CapacityError, UnsupportedError, UsageError
from llmconvert.gguf.architectures.decoder import DecoderView
from llmconvert.gguf.checkpoint import GgufCheckpoint, open_artifact
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.gguf.split import model_files
from llmconvert.gguf.stored import StoredGguf
from llmconvert.progress import SILENT, Task
from llmconvert.quantize.distil import job
from llmconvert.quantize.distil.memory import DistilMemory, foresee_distil
from llmconvert.quantize.distil.optimizer import StoredAdam
from llmconvert.quantize.distil.weights import LearnedWeight
from llmconvert.quantize.formats.gguf import Gguf
from llmconvert.quantize.job import plan_quantize
from llmconvert.quantize.plan import QuantizeRequest
from llmconvert.quantize.scheme import Override, Scheme, parse_scheme
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME
from llmconvert.storage.writer import write_json

#: Of each type: bytes of a block, where its float16 scale is, and where its minimum is (ggml-common.h).
STRUCTS = {
    "Q4_0": (18, 0, None),
    "Q4_1": (20, 0, 2),
    "Q5_0": (22, 0, None),
    "Q5_1": (24, 0, 2),
    "Q8_0": (34, 0, None),
    "IQ4_NL": (18, 0, None),
    "Q2_K": (84, 80, 82),
    "Q3_K": (110, 108, None),
    "Q4_K": (144, 0, 2),
    "Q5_K": (176, 0, 2),
    "Q6_K": (210, 208, None),
    "IQ4_XS": (136, 0, None),
}
GENTLE = replace(QUICK, code_rate=0.0, learning_rate=5e-3)


def start_of(kind: str, rows: int) -> tuple[np.ndarray, LearnedWeight, nn.Parameter]:
    """Random weights in a type: their bytes, and in training; rows of the model's tensor in reverse."""
    generator = torch.Generator().manual_seed(0)
    raw = load_codec(kind).encode(torch.randn(rows, 512, generator=generator).numpy())
    start = Gguf().unpack("w", {"w.weight": torch.from_numpy(raw)}, Scheme.of_block(kind))
    value = nn.Parameter(start.dequantize(torch.float32).flip(0))
    order = torch.arange(rows - 1, -1, -1)
    return raw, LearnedWeight(start, value, torch.float32, torch.float16, None, order), value


@pytest.mark.parametrize("kind", STRUCTS)
def test_what_is_computed_with_is_what_the_bytes_dequantize_to(kind: str) -> None:
    raw, learned, value = start_of(kind, 4)
    state = learned.begin()
    for part in state.values():
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    learned.write(state)
    nbytes, scale_at, minimum_at = STRUCTS[kind]
    expected = raw.reshape(4, -1, nbytes).copy()

    def field(position: int) -> np.ndarray:
        return expected[:, :, position : position + 2].copy().view(np.float16)[..., 0]

    def put(position: int, values: np.ndarray) -> None:
        expected[:, :, position : position + 2] = values.astype(np.float16)[..., None].view(np.uint8)

    scale, factor = field(scale_at).astype(np.float32), state["factor"].numpy()
    put(scale_at, scale * (1 + factor))
    if minimum_at is not None:
        least, shift = field(minimum_at).astype(np.float32), state["shift"].numpy()
        # Minima of super-blocks are products; others are added as they are, and shifts are counted in scales.
        put(minimum_at, least * (1 + shift) if kind.endswith("_K") else least + scale * shift)
    rows = expected.reshape(4, -1)
    assert (rows != raw).any()
    packed = Gguf().pack("w", learned.tensor(learned.stored(state)))["w.weight"].numpy()
    np.testing.assert_array_equal(packed, rows)
    theirs = dequantize(rows, GGMLQuantizationType[kind])
    np.testing.assert_array_equal(value.detach().flip(0).numpy(), theirs)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_steps_are_adams_on_what_autograd_passes_through_the_float16_of_super_blocks(kind: str) -> None:
    _, learned, value = start_of(kind, 8)
    generator = torch.Generator().manual_seed(2)
    inputs, wanted = torch.randn(20, 512, generator=generator), torch.randn(20, 8, generator=generator)
    ours = StoredAdam({"w": learned}, lr=0.02, code_rate=0.0)
    nested, (rows, columns) = learned.start.nested, learned.start.shape
    codes = learned.start.codes.float().view(rows, 2, -1, Scheme.of_block(kind).group_size or 1)
    scale, subs = vars_of(nested, "scale", "subs", rows)
    factor = torch.zeros(rows, 2, requires_grad=True)
    shift = torch.zeros(rows, 2, requires_grad=True)
    minima = learned.start.offset is not None
    adam = torch.optim.Adam([factor, shift] if minima else [factor], lr=0.02, betas=(0.9, 0.95), eps=1e-12)

    def through(exact: torch.Tensor) -> torch.Tensor:
        return exact + (exact.half().float() - exact).detach()

    for _ in range(4):
        (inputs @ value.T - wanted).square().mean().backward()
        ours.step()
        ours.zero_grad()
        weight = codes * (through(scale * (1 + factor))[:, :, None] * subs)[..., None]
        if minima:
            least, lower = vars_of(nested, "minimum", "sub_minima", rows)
            weight = weight - (through(least * (1 + shift))[:, :, None] * lower)[..., None]
        (inputs @ weight.reshape(rows, columns).flip(0).T - wanted).square().mean().backward()
        adam.step()
        adam.zero_grad()
    torch.testing.assert_close(ours.state[value]["factor"], factor.detach(), rtol=0, atol=2e-3)
    if minima:
        torch.testing.assert_close(ours.state[value]["shift"], shift.detach(), rtol=0, atol=2e-3)


def vars_of(nested: object, outer: str, inner: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 of a super-block's number ``[rows, 2]`` and of its integers ``[rows, 2, sub-blocks]``."""
    return getattr(nested, outer).float(), getattr(nested, inner).float().view(rows, 2, -1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole super-blocks."""
    directory = tmp_path_factory.mktemp("wide")
    tiny_model("llama", hidden_size=256, intermediate_size=512).save_pretrained(directory)
    tiny_tokenizer(320).save_pretrained(directory)
    return directory


def test_scales_and_norms_learn_and_no_other_byte_changes(wide: Path, tmp_path: Path) -> None:
    kinds = [kind for kind in STRUCTS if kind != "Q4_K"]
    parts = [f"*layers.{i}.*{part}" for i in (0, 1) for part in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")]
    overrides = tuple(Override(match, Scheme.of_block(kind)) for match, kind in zip(parts, kinds, strict=False))
    before = tmp_path / "q4"
    request = QuantizeRequest("rtn", parse_scheme("q4_k_m"), "gguf", overrides, split_nbytes=1 << 19)
    with SafetensorsCheckpoint(wide) as source:
        plan_quantize(source, before, request).run()
    (before / "mmproj-model-f16.gguf").write_bytes(b"the part for images")
    report = distil(wide, before, tmp_path / "out", GENTLE)
    assert report.before is not None and report.after is not None and report.after < report.before
    assert (report.moved, report.norms) == (0, 5)
    files = sorted(path.name for path in before.iterdir())
    assert len(files) > 2 and sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert (tmp_path / "out" / "mmproj-model-f16.gguf").read_bytes() == b"the part for images"
    seen: set[str] = set()
    with open_artifact(before) as first, open_artifact(tmp_path / "out") as second:
        assert isinstance(first, GgufCheckpoint) and isinstance(second, GgufCheckpoint)
        assert second.tensors == first.tensors
        for one, two in zip(model_files(first.path), model_files(second.path), strict=True):
            assert two.name == one.name
            theirs, ours = (np.frombuffer(path.read_bytes(), np.uint8) for path in (one, two))
            may_change = np.zeros(len(theirs), bool)
            for tensor in first.tensors.values():
                if first.parts[tensor.part] != one or tensor.name == "token_embd.weight":
                    continue
                inside = may_change[tensor.offset : tensor.offset + tensor.nbytes]
                kind = tensor.qtype.name
                if kind in STRUCTS and tensor.name != "output.weight":
                    nbytes, *fields = STRUCTS[kind]
                    for position in fields:
                        if position is not None:
                            inside.reshape(-1, nbytes)[:, position : position + 2] = True
                    seen.add(kind)
                elif "norm" in tensor.name:
                    inside[:] = True
            assert len(ours) == len(theirs) and not (ours != theirs)[~may_change].any()
            assert (ours != theirs)[may_change].any()
        assert seen == set(STRUCTS) - set(kinds[len(parts) :])
    measured = divergence(wide, tmp_path / "out")
    assert measured == pytest.approx(report.after, rel=0.02)


@torch.no_grad()
def divergence(original: Path, artifact: Path) -> float:
    """Of what transformers makes of both, the file read again, on the windows that are held out."""
    with open_artifact(artifact) as stored, SafetensorsCheckpoint(original) as source:
        teacher, student = (loaded(checkpoint) for checkpoint in (DecoderView(source), stored))
    return held_out_divergence(teacher, student)


def loaded(checkpoint: Checkpoint) -> PreTrainedModel:
    with TemporaryDirectory() as directory:
        tensors = {name: tensor.float().contiguous() for name, tensor in checkpoint.items()}
        save_file(tensors, Path(directory) / SINGLE_NAME, {"format": "pt"})
        write_json(Path(directory) / "config.json", dict(checkpoint.config))
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


HEAVY = [pytest.param(name, marks=pytest.mark.slow) for name in ("granitemoehybrid-dense", "smolvlm")]


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", *HEAVY])
def test_norms_and_rows_that_a_file_has_otherwise(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms plus one; matrices turned over; rows of fused heads in another order; halves in two tensors; a decoder
    inside a model for images. Both models in memory, and one block at a time."""
    original = tmp_path / "model"
    if family in GGUF_FAMILIES:
        save_family(original, *GGUF_FAMILIES[family])
    else:
        save_images_family(original, family)
    before = quantized(original, tmp_path / "q4", "q4_1", "gguf")
    options = replace(GENTLE, learning_rate=2e-3, batch=8, clip=1e9)
    report = distil(original, before, tmp_path / "out", options)
    assert report.before is not None and report.after is not None and report.after < report.before
    assert divergence(original, before) == pytest.approx(report.before, rel=0.02)
    assert divergence(original, tmp_path / "out") == pytest.approx(report.after, rel=0.02)
    monkeypatch.setattr(job, "distil_memory", lambda *_: DistilMemory(10**9, 10**6, streamed=True))
    streamed = distil(original, before, tmp_path / "streamed", options)
    assert streamed.streamed and streamed.after == pytest.approx(report.after, rel=2e-2)
    assert divergence(original, tmp_path / "streamed") == pytest.approx(streamed.after, rel=0.02)
    beside = list(before.glob("mmproj*"))
    assert len(beside) == (family == "smolvlm")
    assert all((tmp_path / "out" / path.name).read_bytes() == path.read_bytes() for path in beside)


@pytest.mark.parametrize(
    ("family", "rate", "clip"), [("mixtral", 5e-3, 1.0), pytest.param("qwen2_moe", 2e-3, 1e9, marks=pytest.mark.slow)]
)
def test_experts_that_a_file_has_in_one_tensor_and_the_model_one_by_one(
    family: str, rate: float, clip: float, tmp_path: Path
) -> None:
    original = save_family(tmp_path / "model", *GGUF_FAMILIES[family])
    before = quantized(original, tmp_path / "q4", "q4_1", "gguf")
    options = replace(GENTLE, steps=4, evaluate_every=2, batch=4, learning_rate=rate, clip=clip)
    report = distil(original, before, tmp_path / "out", options)
    assert report.streamed and report.before is not None and report.after is not None and report.after < report.before
    assert divergence(original, before) == pytest.approx(report.before, rel=0.02)
    assert divergence(original, tmp_path / "out") == pytest.approx(report.after, rel=0.02)
    with open_artifact(before) as first, open_artifact(tmp_path / "out") as second:
        assert isinstance(first, GgufCheckpoint) and isinstance(second, GgufCheckpoint)
        files = StoredGguf(first), StoredGguf(second)
        assert files[0].infos == files[1].infos
        for name in files[0]:
            apart = files[0][name] != files[1][name]
            if "_exps" not in name:
                assert not apart.any() or "norm" in name or first.tensors[name].qtype.name == "Q4_1"
                continue
            blocks = apart.view(apart.shape[0], -1, STRUCTS["Q4_1"][0])
            assert not blocks[..., 4:].any()  # codes
            experts = first.tensors[name].shape[0]
            assert blocks[..., :4].reshape(experts, -1).any(1).all(), name


class _StoppedError(Exception):
    pass


class _Stopping:
    """Progress that is stopped by force."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise _StoppedError

    def log(self, message: str) -> None:
        SILENT.log(message)


def test_what_was_stopped_continues_to_the_bit(tiny_llama: Path, tmp_path: Path) -> None:
    before = quantized(tiny_llama, tmp_path / "q4", "q4_1", "gguf")
    options = replace(GENTLE, code_rate=0.15, held_out=0)
    whole = distil(tiny_llama, before, tmp_path / "whole", options)
    with pytest.raises(_StoppedError):
        distil(tiny_llama, before, tmp_path / "out", options, context=Context(progress=_Stopping(6)))
    assert not (tmp_path / "out").exists()
    report = distil(tiny_llama, before, tmp_path / "out", options)
    assert report.resumed_at == 4 and report.moved == whole.moved > 0
    (ours,), (theirs,) = ((tmp_path / name).iterdir() for name in ("out", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_refusals_come_before_the_work(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="stores floats alone"):
        distil(tiny_llama, quantized(tiny_llama, tmp_path / "f16", "f16", "gguf"), out, GENTLE)
    nl = quantized(tiny_llama, tmp_path / "nl", "iq4_nl", "gguf")
    with pytest.raises(UnsupportedError, match="only codes of integers can move"):
        distil(tiny_llama, nl, out, QUICK)
    with pytest.raises(CapacityError, match="leave out"):
        distil(tiny_llama, nl, out, GENTLE, context=Context(memory=1000))
    experts = save_family(tmp_path / "mixture", *GGUF_FAMILIES["mixtral"])
    with pytest.raises(UnsupportedError, match=r"mixture of experts.*set quantize\.distil\.code_rate to 0"):
        distil(experts, quantized(experts, tmp_path / "moe", "q4_0", "gguf"), out, QUICK)
    joint = save_family(tmp_path / "joint", *GGUF_FAMILIES["granitemoe"])
    with pytest.raises(UnsupportedError, match=r"input_linear\.weight has the experts .*in one tensor"):
        distil(joint, quantized(joint, tmp_path / "joint-q4", "q4_0", "gguf"), out, GENTLE)
    with SafetensorsCheckpoint(joint) as source, pytest.raises(UnsupportedError, match="one tensor"):
        foresee_distil(source, GENTLE, 32, context=Context(), outer=True)  # before anything is quantized
    with SafetensorsCheckpoint(experts) as source:
        assert foresee_distil(source, GENTLE, 32, context=Context(), outer=True).memory
    made = ["f16", "joint", "joint-q4", "mixture", "moe", "nl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made
