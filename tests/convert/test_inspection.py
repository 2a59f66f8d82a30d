"""What is said about a model from its config and headers."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save
from support.every_architecture import save_tiny
from support.hub_client import Client
from support.hub_server import HubServer
from support.multimodal_families import save_family
from support.tiny_checkpoints import save_tiny_checkpoint
from support.tiny_models import tiny_llama, tiny_llama_dir
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.cli import main
from llmconvert.convert.inspection import ModelSummary, describe_model, inspect_model
from llmconvert.errors import CheckpointError, SourceError, UnsupportedError
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import Override
from llmconvert.quantize.scheme import Scheme, parse_scheme
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorInfo


class Headers(Checkpoint):
    """The headers of a transformers model built on the meta device."""

    def __init__(self, model_type: str, **settings: Any) -> None:
        config = AutoConfig.for_model(model_type, **settings)
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(config).state_dict()
        self.infos = {name: TensorInfo(name, t.dtype, tuple(t.shape), "m.safetensors") for name, t in state.items()}
        self.config = config.to_dict()
        self.files = {}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("inspection reads headers only")


def summary(model_type: str, **settings: Any) -> ModelSummary:
    return describe_model(Headers(model_type, **settings))


SMALL = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 100}
GPT = {"n_embd": 64, "n_head": 4, "n_layer": 2}


def test_a_directory(tiny_llama: Path) -> None:
    found = inspect_model(str(tiny_llama))
    assert (found.architecture, found.layers, found.hidden_size) == ("LlamaForCausalLM", 2, 64)
    assert (found.query_heads, found.kv_heads, found.head_dim, found.attention) == (4, 2, 16, "GQA")
    assert found.kv_bytes_per_token == 2 * 2 * 16 * 2 * 2, "keys and values × heads × width × layers × 2 bytes"
    assert found.parameters == sum(math.prod(info.shape) for info in SafetensorsCheckpoint(tiny_llama).infos.values())
    assert found.stored_bytes == found.weight_bytes["float32"] == 2 * found.weight_bytes["bfloat16"]
    assert sum(found.kinds.values()) == found.parameters and set(found.kinds) >= {"embeddings", "attention", "MLP"}
    assert found.devices == "over 2 and 4 devices (vLLM, SGLang); not 8: 4 query heads" and found.chat_template
    assert found.tied and found.quantization is None and found.experts == 0 and found.windows is None
    assert found.quantizable is not None and str(found.quantizable.scheme) == "w4a16-g64-sym"
    assert 0 < found.quantizable.weights < found.parameters


def test_a_chat_template_that_fails_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    assert inspect_model(str(model)).chat_template_fault == ""
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }")
    result = CliRunner().invoke(main, ["inspect", str(model)])
    assert "one that fails, which runs refuse: line 1: TemplateSyntaxError" in " ".join(result.output.split())
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "{{ bos_token }}{{ raise_exception('no ' + eos_token) }}"}
    ]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    fault = inspect_model(str(model)).chat_template_fault
    assert fault.startswith("line 1: TemplateError: no ") and config["eos_token"] in fault


@pytest.mark.slow
def test_what_lies_on_the_hub_is_known_by_ranges_and_small_files(tiny_llama: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir() if path.is_file()}
    card = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
    adapter = {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 64)}
    with HubServer().running() as hub, Client(hub.url, tmp_path / "home") as terminal:
        hub.add_repo("org/tiny", {**files, "README.md": card})
        hub.add_repo("org/ggufs", {"a.gguf": b"GGUF", "README.md": card})
        config = b'{"peft_type": "LORA", "r": 2, "base_model_name_or_path": "org/tiny"}'
        hub.add_repo("org/lora", {"adapter_config.json": config, "adapter_model.safetensors": save(adapter)})
        said = json.loads(terminal("cli", "inspect", "org/tiny", "--json")["out"])
        assert (said["license"], said["chat_template"], said["quantizable"]["taken"]) == ("apache-2.0", True, True)
        weights = [line for line in hub.log if line.startswith("GET") and ".safetensors" in line]
        assert weights and all("bytes=" in line for line in weights)
        assert "LoRA of peft, for org/tiny" in terminal("cli", "inspect", "org/lora")["out"]
        refused = terminal("cli", "inspect", "org/ggufs")
        assert refused["code"] == 4 and "download one of its GGUF files (a.gguf) and name its path" in refused["text"]


def test_a_model_that_quantize_refuses_is_told_with_the_same_words(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model", "gpt_oss", "GptOssForCausalLM")
    with pytest.raises(UnsupportedError) as refused:
        quantize_checkpoint(
            SafetensorsCheckpoint(tmp_path / "model"), tmp_path / "out", method="rtn", scheme=Scheme.parse("w4a16-g64")
        )
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "model"), "--json"])
    said = json.loads(result.output)["quantizable"]
    assert (said["taken"], said["scheme"], said["weights"]) == (False, None, 0)
    assert said["reason"] == str(refused.value) and "match: '*.experts.*'" in said["reason"]


def test_what_text_does_not_go_through_is_told(tmp_path: Path) -> None:
    """Without a tokenizer, and where blocks get more hidden states than the text has tokens."""
    found = inspect_model(str(tiny_llama_dir(tmp_path / "bare", tokenizer=False))).quantizable
    assert found is not None and "no tokenizer" in found.notes[0] and "rtn and hqq alone" in found.notes[0]
    save_tiny_checkpoint(tmp_path / "model", "cpmant", "CpmAntForCausalLM")
    found = inspect_model(str(tmp_path / "model")).quantizable
    assert found is not None and found.scheme is None and "use method: rtn or hqq" in found.reason


def test_the_size_in_a_scheme_counts_codes_scales_and_the_rest() -> None:
    found = summary("llama", **SMALL, intermediate_size=128, num_key_value_heads=8, tie_word_embeddings=False)
    linear = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    assert found.parameters is not None
    rest = found.parameters - linear
    assert found.weight_bytes["w4a16-g128-sym"] == linear // 2 + 2 * 4 * (4 * 64 + 2 * 128 + 64) + 2 * rest
    assert not found.tied


@pytest.mark.parametrize(
    ("model_type", "settings", "attention", "positions"),
    [
        ("llama", {**SMALL, "num_key_value_heads": 8}, "MHA", "RoPE, θ = 10,000"),
        ("llama", {**SMALL, "num_key_value_heads": 1}, "MQA", "RoPE, θ = 10,000"),
        ("gpt2", {**GPT, "n_positions": 128}, "MHA", "learned, 128"),
        ("opt", {**SMALL, "max_position_embeddings": 128, "word_embed_proj_dim": 64}, "MHA", "learned, 130"),
        ("bloom", {"hidden_size": 64, "n_head": 4, "n_layer": 2}, "MHA", "ALiBi"),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "MHA", "ALiBi"),
        ("falcon", {**SMALL, "alibi": True}, "MQA", "ALiBi"),
        ("gpt_neox", SMALL, "MHA", "RoPE, θ = 10,000, 25% of each head"),
        (
            "gptj",
            {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8},
            "MHA",
            "RoPE, θ = 10,000, 50% of each head",
        ),
        (
            "llama",
            {**SMALL, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
            "MHA",
            "RoPE, θ = 500,000, linear ×4",
        ),
    ],
)
def test_attention_and_positions(model_type: str, settings: dict[str, Any], attention: str, positions: str) -> None:
    found = summary(model_type, **settings)
    assert (found.attention, found.positions) == (attention, positions)


def test_sliding_windows() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    found = summary("gemma2", **SMALL, head_dim=16, num_key_value_heads=2, sliding_window=32, layer_types=kinds)
    assert found.windows == (2, 32)
    assert summary("qwen2", **SMALL).windows is None, "its config has a window that is switched off"


def test_a_compressed_cache() -> None:
    settings = {**SMALL, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_routed_experts": 8}
    sizes = {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    }
    found = summary("deepseek_v3", **settings, **sizes)
    assert found.attention == "MLA" and found.kv_bytes_per_token == 4 * (16 + 8) * 2 and found.experts == 8


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "rwkv", "xlstm"])
def test_models_without_attention(tmp_path: Path, model_type: str) -> None:
    found = inspect_model(str(save_tiny(tmp_path, model_type)))
    assert (found.attention, found.query_heads, found.kv_heads, found.kv_bytes_per_token) == ("none", 0, 0, 0)
    assert found.layers == 3 and found.parameters


def test_heads_that_differ_between_layers(tmp_path: Path) -> None:
    """Gemma 4's layers of full attention have larger heads than those with a sliding window."""
    save_tiny(tmp_path, "gemma4_text")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    cache = model(input_ids=torch.zeros((1, 1), dtype=torch.long)).past_key_values
    values = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert inspect_model(str(tmp_path)).kv_bytes_per_token == 2 * values


def test_a_quantized_model_says_so(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "m", tokenizer=False, quantization_config=None)
    checkpoint = SafetensorsCheckpoint(directory)
    checkpoint.config = {**checkpoint.config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    found = describe_model(checkpoint)
    assert found.quantization == "gptq" and found.weight_bytes == {}


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        inspect_model(str(tmp_path / "nothing"))
    headers = Headers("llama", **SMALL)
    headers.config = {"model_type": "no_such_model"}
    with pytest.raises(UnsupportedError, match="no_such_model"):
        describe_model(headers)
    headers.config = {"model_type": "clip_text_model", "num_attention_heads": None}
    with pytest.raises((CheckpointError, UnsupportedError)):
        describe_model(headers)


def test_parameters_are_those_of_the_model() -> None:
    model = tiny_llama(num_hidden_layers=3)
    headers = Headers("llama", **{k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "dtype")})
    expected = {name for name, _ in model.named_parameters()}
    headers.infos = {name: info for name, info in headers.infos.items() if name in expected}
    assert describe_model(headers).parameters == model.num_parameters()


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        ("w4a16-g32", "compressed-tensors"),
        ("w3a16-g32-asym", "gptq"),
        ("w4a16-g32-asym", "awq"),
        ("nf4", "bitsandbytes"),
        ("w8a8", "compressed-tensors"),
    ],
)
def test_a_quantized_models_parameters_are_those_of_the_original(
    tiny_llama: Path, tmp_path: Path, scheme: str, format: str
) -> None:
    """Not its packed words; and its bits, groups and mixture are told."""
    original, name = inspect_model(str(tiny_llama)), str(Scheme.parse(scheme))
    source = SafetensorsCheckpoint(tiny_llama)
    quantize_checkpoint(source, tmp_path / "out", method="rtn", scheme=Scheme.parse(scheme), format=format)
    found = inspect_model(str(tmp_path / "out"))
    linear = sum(math.prod(i.shape) for i in source.infos.values() if i.name.endswith("proj.weight"))
    assert (found.parameters, found.quantization, found.unread) == (original.parameters, format, None)
    assert original.parameters is not None
    counted = {way: (one.tensors, one.weights) for way, one in found.mixture.items()}
    assert counted == {name: (14, linear), "float32": (6, original.parameters - linear)}
    assert list(found.mixture) == [name, "float32"]
    assert found.stored_bytes == sum(info.nbytes for info in SafetensorsCheckpoint(tmp_path / "out").infos.values())
    assert found.bits_per_weight == pytest.approx(8 * found.stored_bytes / original.parameters)
    assert original.bits_per_weight == 32 and original.mixture["float32"].weights == original.parameters
    assert (found.tied, found.vocabulary, found.weight_bytes) == (original.tied, original.vocabulary, {})


def test_a_mixture_is_told_by_scheme(tiny_llama: Path, tmp_path: Path) -> None:
    overrides = [Override("*.down_proj", Scheme.parse("w8a16-g64")), Override("*.0.self_attn.o_proj", None)]
    quantize_checkpoint(
        SafetensorsCheckpoint(tiny_llama),
        tmp_path / "out",
        method="rtn",
        scheme=Scheme.parse("w4a16-g32"),
        overrides=overrides,
    )
    found = inspect_model(str(tmp_path / "out")).mixture
    assert {way: stored.tensors for way, stored in found.items()} == {
        "w4a16-g32-sym": 11,
        "w8a16-g64-sym": 2,
        "float32": 7,
    }
    assert found["w8a16-g64-sym"].where == {"model.layers.*.mlp.down_proj": (0, 1)}
    assert found["float32"].where["model.layers.*.self_attn.o_proj"] == (0,)
    lines = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")]).output
    assert max(map(len, lines.splitlines())) <= 80
    told = re.sub(r"\n {3,}", " ", lines)  # what goes on under itself, in one line
    assert re.search(r"^quantized +compressed-tensors, 0\.\d MB, \d+\.\d{3} bits per weight in all$", told, re.M)
    in_8_bits = "16,384 weights in 2 tensors: 8-bit integers, one scale per 64 columns mlp.down_proj in all layers"
    assert re.search(rf"^  w8a16-g64-sym +{in_8_bits}$", told, re.M)
    assert "self_attn.o_proj in layer 0" in told and "self_attn.o_proj in layer 1" in told
    assert "takes it with --requantize" in told


def test_a_gguf_files_types_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    source = SafetensorsCheckpoint(tiny_llama)
    quantize_checkpoint(source, path, method="rtn", scheme=parse_scheme("q4_0"), format="gguf")
    found, original = inspect_model(str(path)), inspect_model(str(tiny_llama))
    assert (found.parameters, found.quantization) == (original.parameters, "gguf")
    embedding = "q8_0"  # its rows are too short for q6_k
    assert {way: stored.tensors for way, stored in found.mixture.items()} == {"q4_0": 14, embedding: 1, "f32": 5}
    assert found.bits_per_weight is not None and 4.5 < found.bits_per_weight < 8.5
    assert found.weight_bytes, "it can be converted and quantized"
    quantize_checkpoint(source, tmp_path / "f.gguf", method="rtn", scheme=parse_scheme("f16"), format="gguf")
    assert inspect_model(str(tmp_path / "f.gguf")).quantization is None


def test_weights_that_cannot_be_read_are_not_counted(tiny_llama: Path, tmp_path: Path) -> None:
    """And the rest is told all the same."""
    directory = tmp_path / "m"
    quantize_checkpoint(
        SafetensorsCheckpoint(tiny_llama), directory, method="rtn", scheme=Scheme.parse("w4a16-g32"), format="gptq"
    )
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqq"
    (directory / "config.json").write_text(json.dumps(config))
    found = inspect_model(str(directory))
    assert (found.parameters, found.bits_per_weight, found.mixture, found.layers) == (None, None, {}, 2)
    assert found.quantization == "hqq" and "quantized with 'hqq'" in str(found.unread)
    lines = CliRunner().invoke(main, ["inspect", str(directory)]).output
    assert re.search(r"^parameters +not known", lines, re.M) and re.search(
        r"^not read here +quantized with 'hqq'", lines, re.M
    )


@pytest.mark.parametrize(
    ("name", "parts", "loader"),
    [
        ("llava", ("vision_tower", "multi_modal_projector"), "AutoModelForImageTextToText"),
        ("phi4_multimodal", ("embed_tokens_extend",), "AutoModelForCausalLM"),
    ],
)
def test_of_a_multimodal_model_the_parts_for_images_are_counted_apart(
    tmp_path: Path, name: str, parts: tuple[str, ...], loader: str
) -> None:
    found = inspect_model(str(save_family(tmp_path, name)))
    stored = SafetensorsCheckpoint(tmp_path).infos
    beside = {tensor: info for tensor, info in stored.items() if any(part in tensor for part in parts)}
    assert found.beside == sum(math.prod(info.shape) for info in beside.values()) == sum(found.parts.values()) > 0
    assert set(found.parts) == {tensor.removeprefix("model.").partition(".")[0] for tensor in beside}
    assert (found.vocabulary, found.loader) == (320, loader)
    # Scales stand for groups of the decoder's linears alone, and nothing else leaves 16 bits.
    linear = [info for tensor, info in stored.items() if tensor not in beside and len(info.shape) == 2]
    inside = [info for info in linear if not any(word in info.name for word in ("embed", "lm_head"))]
    eight = sum(math.prod(info.shape) for info in inside)
    scales = sum(info.shape[0] for info in inside)
    assert found.weight_bytes["w8a16-channel-sym"] == eight + 2 * scales + 2 * ((found.parameters or 0) - eight)
    assert "met by no text" in CliRunner().invoke(main, ["inspect", str(tmp_path)]).output
