"""Types of single tensors in a GGUF file: as they were wanted, and head and embedding by an importance of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from support.gguf_models import IDS, built, next_token
from support.llama_cpp import LlamaCpp
from support.tiny_gguf import tiny_model
from support.tiny_models import tiny_tokenizer

from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.quantize.job import plan_quantize, quantize_checkpoint
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.scheme import Scheme, parse_scheme
from llmconvert.quantize.solve.group_scales import block_scales_nbytes
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

VOCABULARY = 320
SIZES = {"hidden_size": 256, "intermediate_size": 512}
WINDOWS = [torch.randint(3, VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(i)) for i in range(4)]
OVERRIDES = (
    Override("head", Scheme.of_block("Q8_0")),
    Override("embedding", Scheme.of_block("Q5_K")),
    Override("blk.0.attn_v", Scheme.of_block("Q3_K")),
    Override("*.1.mlp.down_proj", None),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", **SIZES).save_pretrained(directory)
    tiny_tokenizer(VOCABULARY).save_pretrained(directory)
    return directory


def made(model: Path, path: Path, method: str, overrides: tuple[Override, ...] = (), **options: Any) -> GGUFReader:
    with SafetensorsCheckpoint(model) as source:
        quantize_checkpoint(
            source,
            path,
            method=method,
            scheme=parse_scheme("q4_k_m"),
            format="gguf",
            name="tiny",
            overrides=overrides,
            windows=() if method == "rtn" else WINDOWS,
            **options,
        )
    return GGUFReader(path)


@pytest.mark.parametrize("method", ["rtn", "imatrix", "gptq"])
def test_single_tensors_have_the_types_they_were_given(method: str, model: Path, tmp_path: Path) -> None:
    plain = {tensor.name: tensor for tensor in made(model, tmp_path / "plain.gguf", method).tensors}
    found = {tensor.name: tensor for tensor in made(model, tmp_path / "tiny.gguf", method, OVERRIDES).tensors}
    types = {name: tensor.tensor_type.name for name, tensor in found.items()}
    wanted = {"output": "Q8_0", "token_embd": "Q5_K", "blk.0.attn_v": "Q3_K", "blk.1.ffn_down": "F32"}
    assert types == {name: tensor.tensor_type.name for name, tensor in plain.items()} | {
        f"{name}.weight": kind for name, kind in wanted.items()
    }
    with open_gguf(tmp_path / "tiny.gguf") as checkpoint:
        ours = next_token(built(checkpoint))
    theirs = LlamaCpp(tmp_path / "tiny.gguf").log_probabilities(IDS[0].tolist(), VOCABULARY)
    assert float((ours - theirs).square().mean().sqrt()) < 0.1  # a wrong layout is off by more than 1


@pytest.mark.parametrize("statistics", ["sequential", "original"])
def test_the_head_is_weighed_by_what_comes_to_it(statistics: str, model: Path, tmp_path: Path) -> None:
    # The blocks stay as they are: whichever model the statistics are of, it is the original.
    dense = (Override("model.layers.*", None), Override("head", Scheme.of_block("Q4_K")))
    reader = made(model, tmp_path / "tiny.gguf", "imatrix", dense, statistics=statistics)
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    original = tiny_model("llama", **SIZES)
    inputs: list[torch.Tensor] = []
    hook = original.lm_head.register_forward_pre_hook(lambda _, values: inputs.append(values[0][0]))
    with torch.no_grad():
        for window in WINDOWS:
            original(window)
    hook.remove()
    squares = torch.cat(inputs).double().square().mean(0).float().numpy()
    codec, weight = load_codec("Q4_K"), original.lm_head.weight.detach().numpy()
    assert np.array_equal(stored["output.weight"], codec.encode(weight, squares))
    assert not np.array_equal(stored["output.weight"], codec.encode(weight, np.ones_like(squares)))


def test_scales_of_block_types_are_stated(tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=1024, intermediate_size=1024, num_hidden_layers=1).save_pretrained(tmp_path / "m")
    tiny_tokenizer(VOCABULARY).save_pretrained(tmp_path / "m")
    with SafetensorsCheckpoint(tmp_path / "m") as source:

        def work(scheme: str) -> int:
            request = QuantizeRequest("gptq", parse_scheme(scheme), "gguf")
            return plan_quantize(source, tmp_path / "x.gguf", request, windows=WINDOWS).inputs.work

        # Of gate and up, whose stop takes the most: their scales stand beside what they are joined to.
        scales = 2 * block_scales_nbytes(Scheme.of_block("Q2_K"), 2 * 1024, 1024)
        assert work("q2_k_s") - work("w8a16-g32-sym") == scales
