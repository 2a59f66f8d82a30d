"""LoRA adapters merged into checkpoints, against the definition computed here, and against peft where it is there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.multimodal_families import save_family
from support.tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from llmconvert.api import convert_model, quantize_model
from llmconvert.cli import main
from llmconvert.convert.adapter.files import open_adapter
from llmconvert.convert.adapter.tokenizer import other_tokenizer
from llmconvert.convert.adapter.view import AdapterView
from llmconvert.errors import CheckpointError, LlmconvertError, RecipeError, SourceError, UnsupportedError
from llmconvert.report.report import Report
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

Tensors = dict[str, torch.Tensor]
Tiny = Callable[..., Path]
BLOCK = "model.layers.0"
Q, DOWN = f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.mlp.down_proj"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def lora(module: str, weight: torch.Tensor, rank: int, seed: int = 0) -> Tensors:
    rows, columns = weight.shape
    name = f"base_model.model.{module}"
    return {
        f"{name}.lora_A.weight": noise(rank, columns, seed=seed),
        f"{name}.lora_B.weight": noise(rows, rank, seed=seed + 1),
    }


def gpt2(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=48, n_head=4, n_layer=2, vocab_size=96, n_positions=64)
    GPT2LMHeadModel(config).to(dtype).save_pretrained(directory)
    return directory


def write(directory: Path, tensors: Tensors, **config: Any) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def view(model: Path, adapter: Path) -> AdapterView:
    return AdapterView(SafetensorsCheckpoint(model), open_adapter(str(adapter)))


def summed(weight: torch.Tensor, tensors: Tensors, module: str, scale: float) -> torch.Tensor:
    a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
    return weight.double() + scale * (b @ a)


def test_sums_and_scales(tiny_llama: Path, tmp_path: Path) -> None:
    """Rank-stabilized or not, by pattern or not; what isn't named keeps its bytes, and rows are those of the whole."""
    base = load_file(tiny_llama / "model.safetensors")
    tensors = {**lora(Q, base[f"{Q}.weight"], 4), **lora(DOWN, base[f"{DOWN}.weight"], 2, seed=5)}
    patterns = {"rank_pattern": {"mlp.down_proj": 2}, "alpha_pattern": {r"layers\.0\.mlp\.down_proj": 32}}
    for index, (stable, q, down) in enumerate(((False, 8 / 4, 32 / 2), (True, 8 / math.sqrt(4), 32 / math.sqrt(2)))):
        merged = view(tiny_llama, write(tmp_path / str(index), tensors, use_rslora=stable, **patterns))
        assert merged.merged == 2
        for name, weight in base.items():
            expected = weight
            if name == f"{Q}.weight":
                expected = summed(weight, tensors, Q, q).to(weight.dtype)
            elif name == f"{DOWN}.weight":
                expected = summed(weight, tensors, DOWN, down).to(weight.dtype)
            assert torch.equal(merged[name], expected), name
            assert torch.equal(merged.read_rows(name, 3, 17), expected[3:17])


def test_dora(tiny_llama: Path, tmp_path: Path) -> None:
    weight = load_file(tiny_llama / "model.safetensors")[f"{Q}.weight"]
    tensors = lora(Q, weight, 4)
    magnitude = noise(len(weight), seed=9).abs() + 1
    key = f"base_model.model.{Q}.lora_magnitude_vector.weight"
    merged = view(tiny_llama, write(tmp_path / "a", {**tensors, key: magnitude}, use_dora=True))
    plain = summed(weight, tensors, Q, 2.0)
    expected = plain / plain.norm(dim=1, keepdim=True) * magnitude.double()[:, None]
    assert torch.equal(merged[f"{Q}.weight"], expected.to(weight.dtype))
    assert torch.equal(merged.read_rows(f"{Q}.weight", 5, 9), expected[5:9].to(weight.dtype))


@pytest.mark.parametrize("dora", [False, True])
def test_weights_that_are_stored_inputs_first(tmp_path: Path, dora: bool) -> None:
    """Of GPT-2, whose checkpoints may leave out what its class calls the model inside."""
    model = gpt2(tmp_path / "gpt2")
    base = load_file(model / "model.safetensors")
    stored = next(name for name in base if name.endswith("h.0.attn.c_attn.weight"))
    weight, module = base[stored], f"transformer.{stored.removeprefix('transformer.').removesuffix('.weight')}"
    tensors, magnitude = lora(module, weight.T, 4), noise(weight.shape[1], seed=3).abs() + 1
    extra = {f"base_model.model.{module}.lora_magnitude_vector.weight": magnitude} if dora else {}
    merged = view(model, write(tmp_path / "a", {**tensors, **extra}, fan_in_fan_out=True, use_dora=dora))
    expected = summed(weight.T, tensors, module, 2.0)
    if dora:
        expected = expected / expected.norm(dim=1, keepdim=True) * magnitude.double()[:, None]
    torch.testing.assert_close(merged[stored], expected.T.to(weight.dtype), rtol=1e-6, atol=1e-7)
    assert torch.equal(merged.read_rows(stored, 2, 7), merged[stored][2:7])


def test_embeddings_and_what_was_saved_whole(tiny_llama: Path, tmp_path: Path) -> None:
    """A head that was trained beside an embedding that it was tied to becomes one of its own."""
    base = load_file(tiny_llama / "model.safetensors")
    embedding, name = base["model.embed_tokens.weight"], "base_model.model.model.embed_tokens"
    tensors = {
        f"{name}.lora_embedding_A": noise(4, len(embedding)),
        f"{name}.lora_embedding_B": noise(embedding.shape[1], 4, seed=1),
        "base_model.model.lm_head.weight": noise(*embedding.shape, seed=2),
        f"base_model.model.{BLOCK}.input_layernorm.weight": noise(embedding.shape[1], seed=3),
    }
    merged = view(tiny_llama, write(tmp_path / "a", tensors, modules_to_save=["lm_head", "input_layernorm"]))
    a, b = tensors[f"{name}.lora_embedding_A"].double(), tensors[f"{name}.lora_embedding_B"].double()
    expected = (embedding.double() + 2.0 * (b @ a).T).to(embedding.dtype)
    assert torch.equal(merged["model.embed_tokens.weight"], expected)
    assert torch.equal(merged["lm_head.weight"], tensors["base_model.model.lm_head.weight"])
    assert torch.equal(
        merged[f"{BLOCK}.input_layernorm.weight"], tensors[f"base_model.model.{BLOCK}.input_layernorm.weight"]
    )
    assert merged.config["tie_word_embeddings"] is False and set(merged) == {*base, "lm_head.weight"}


def test_embedding_and_head_that_were_one_and_are_trained_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """peft trains each as if there were two, and so the merged model has two; what was not trained keeps its values."""
    base = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
    name, head = "base_model.model.model.embed_tokens", lora("lm_head", base, 4)
    inside = {f"{name}.lora_embedding_A": noise(4, len(base)), f"{name}.lora_embedding_B": noise(base.shape[1], 4)}
    moved = (
        base.double()
        + 2.0 * (inside[f"{name}.lora_embedding_B"].double() @ inside[f"{name}.lora_embedding_A"].double()).T
    ).float()
    whole, other = noise(*base.shape), summed(base, head, "lm_head", 2.0).float()
    cases: list[tuple[Tensors, torch.Tensor, torch.Tensor]] = [
        (inside, moved, base),
        (head, base, other),
        ({**inside, **head}, moved, other),
        ({f"{name}.weight": whole}, whole, base),
    ]
    for index, (tensors, embedding, own) in enumerate(cases):
        merged = view(tiny_llama, write(tmp_path / str(index), tensors))
        assert torch.equal(merged["model.embed_tokens.weight"], embedding)
        assert torch.equal(merged["lm_head.weight"], own) and torch.equal(
            merged.read_rows("lm_head.weight", 3, 9), own[3:9]
        )
        assert merged.config["tie_word_embeddings"] is False and "lm_head.weight of its own" in merged.notes[0]
    plain = view(tiny_llama, write(tmp_path / "plain", lora(Q, noise(64, 64), 4)))
    assert (
        "lm_head.weight" not in plain and not plain.notes and plain.config == SafetensorsCheckpoint(tiny_llama).config
    )


def test_embedding_and_head_that_are_trained_together_stay_one(tiny_llama: Path, tmp_path: Path) -> None:
    base = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
    name, whole = "base_model.model.model.embed_tokens", noise(*base.shape)
    a, b = noise(4, len(base)), noise(base.shape[1], 4)
    head = {
        "base_model.model.lm_head.lora_A.weight": b.T.contiguous(),
        "base_model.model.lm_head.lora_B.weight": a.T.contiguous(),
    }
    saved = {f"{name}.weight": whole, "base_model.model.lm_head.weight": whole.clone()}
    for index, tensors in enumerate((saved, {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b, **head})):
        merged = view(tiny_llama, write(tmp_path / str(index), tensors, ensure_weight_tying=True, target_modules=[]))
        assert "lm_head.weight" not in merged and merged.config["tie_word_embeddings"] and not merged.notes
        assert not torch.equal(merged["model.embed_tokens.weight"], base)
    saved["base_model.model.lm_head.weight"] = base
    with pytest.raises(CheckpointError, match=r"has ensure_weight_tying, and .*lm_head.* is not what its embedding is"):
        view(tiny_llama, write(tmp_path / "apart", saved, ensure_weight_tying=True))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_a_decoder_is_found_by_each_of_its_names(tmp_path: Path, family: str) -> None:
    """That of the checkpoint, that of the class, and that which it has alone, in a class for text."""
    model = save_family(tmp_path / "model", family)
    stored = SafetensorsCheckpoint(model)
    (weight,) = (name for name in stored if name.endswith("layers.0.self_attn.q_proj.weight") and "vis" not in name)
    inner = "layers.0.self_attn.q_proj"
    for index, name in enumerate((weight.removesuffix(".weight"), f"model.language_model.{inner}", f"model.{inner}")):
        tensors = lora(name, stored[weight], 4)
        merged = view(model, write(tmp_path / str(index), tensors))
        expected = summed(stored[weight], tensors, name, 2.0).to(stored[weight].dtype)
        assert torch.equal(merged[weight], expected) and merged.merged == 1 and set(merged) == set(stored)


def test_commands_merge(tiny_llama: Path, tmp_path: Path) -> None:
    """Converted, and quantized from that or in one go: the same; the recipe, the report and the card name it."""
    base = load_file(tiny_llama / "model.safetensors")
    adapter = write(tmp_path / "lora", lora(Q, base[f"{Q}.weight"], 4))
    convert_model(tiny_llama, tmp_path / "merged", adapter=adapter)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    expected = view(tiny_llama, adapter)
    assert all(torch.equal(written[name], expected[name].bfloat16()) for name in base)
    quantize_model(tiny_llama, tmp_path / "w4", scheme="w4a16-g32", method="rtn", adapter=adapter)
    quantize_model(tmp_path / "merged", tmp_path / "same", scheme="w4a16-g32", method="rtn")
    ours, same = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("w4", "same"))
    assert ours == same
    assert Report.read(tmp_path / "w4" / "llmconvert/report.json").model.adapter == "lora"
    assert "The adapter `lora` was merged into it first." in (tmp_path / "w4" / "README.md").read_text()
    with pytest.raises(RecipeError, match="an adapter is merged into a model that is there; leave out stream"):
        convert_model("org/name", tmp_path / "no", adapter=adapter, stream=True)


def test_what_a_config_names_and_its_file_lacks_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    named = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
    adapter = write(tmp_path / "lora", lora(Q, noise(64, 64), 4), **named)
    first, second = view(tiny_llama, adapter).notes
    assert "names v_proj in target_modules, and its file has nothing of it" in first and "lm_head" in second
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(SourceError, match=r"weights as pickle \(adapter_model\.bin\), which can run code"):
        open_adapter(str(adapter))


def test_a_tokenizer_of_its_own_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    """Trainers put the tokenizer beside an adapter, mostly the model's own."""
    adapter, model = write(tmp_path / "lora", lora(Q, noise(64, 64), 4)), SafetensorsCheckpoint(tiny_llama)
    tiny_tokenizer().save_pretrained(adapter)
    assert not other_tokenizer(model, open_adapter(str(adapter)))
    tiny_tokenizer(340).save_pretrained(adapter)
    (adapter / "chat_template.jinja").write_text("another")
    (said,) = other_tokenizer(model, open_adapter(str(adapter)))
    assert "comes with other tokens (tokenizer.json) and another chat template (chat_template.jinja) than" in said
    log = CliRunner().invoke(main, ["convert", str(tiny_llama), str(tmp_path / "out"), "--adapter", str(adapter)])
    assert said in " ".join(log.output.split())


FAULTS: list[tuple[dict[str, Any], Tensors, type[LlmconvertError], str]] = [
    ({"peft_type": "IA3"}, {}, UnsupportedError, "peft_type is 'IA3'"),
    ({"use_qalora": True}, {}, UnsupportedError, "adapter_config.json has use_qalora: True"),
    ({"target_parameters": ["experts.down_proj"]}, {}, UnsupportedError, "has target_parameters"),
    ({"init_lora_weights": "pissa_niter_4"}, {}, UnsupportedError, "changed the base's weights too"),
    ({"r": 8}, {}, CheckpointError, "has rank 4, adapter_config.json says 8"),
    ({"use_dora": True}, {}, UnsupportedError, "DoRA is read of linears that have its magnitudes"),
    ({}, {f"base_model.model.{Q}.lora_B.bias": noise(4)}, UnsupportedError, "is a bias of LoRA's own"),
    ({}, {f"base_model.model.{BLOCK}.mlp.up_proj.lora_A.weight": noise(4, 64)}, CheckpointError, "one of its two"),
    ({}, lora("model.layers.9.mlp.up_proj", noise(8, 8), 4), UnsupportedError, "the model has no model.layers.9"),
    ({}, lora("lm_head", noise(128, 32), 4), CheckpointError, "the adapter is of another model"),
    ({}, lora(f"{BLOCK}.mlp.up_proj", noise(8, 8), 4), CheckpointError, "the adapter is of another model"),
    ({}, {"base_model.model.model.norm.weight": noise(3)}, UnsupportedError, "has shape [3], the model's [64]"),
    ({"lora_alpha": "many"}, {}, CheckpointError, "adapter_config.json: lora_alpha is 'many', expected a number"),
    ({"lora_alpha": math.nan}, {}, CheckpointError, "lora_alpha is nan, expected a number"),
    ({"r": 0}, {}, CheckpointError, "r is 0, expected a whole number above 0"),
    ({"use_rslora": "yes"}, {}, CheckpointError, "use_rslora is 'yes', expected true or false"),
    ({"alpha_pattern": [1]}, {}, CheckpointError, "alpha_pattern is [1], expected names of modules with numbers"),
    ({"alpha_pattern": {"q_proj[": 3}}, {}, CheckpointError, "alpha_pattern: 'q_proj[' is no pattern"),
    ({}, {"base_model.model.model.norm.weight": torch.full((64,), math.inf)}, CheckpointError, "are infinite or no"),
    ({}, {"base_model.model.model.norm.weight": torch.ones(64).int()}, UnsupportedError, "is int32; expected floating"),
    ({}, {"base_model.model.a.token_adapter.trainable_tokens_delta": noise(3)}, UnsupportedError, "is not known here"),
]


@pytest.mark.parametrize(("config", "more", "error", "message"), FAULTS, ids=[fault[3] for fault in FAULTS])
def test_what_cannot_be_merged_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path, config: dict[str, Any], more: Tensors, error: type[LlmconvertError], message: str
) -> None:
    base = load_file(tiny_llama / "model.safetensors")
    adapter = write(tmp_path / "a", {**lora(Q, base[f"{Q}.weight"], 4), **more}, **config)
    with pytest.raises(error, match=re.escape(message)):
        view(tiny_llama, adapter)


def test_an_adapter_is_inspected_as_one(tiny_llama: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_llama / "model.safetensors")
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"]
    tensors = {name: one for module in modules for name, one in lora(module, weights[f"{module}.weight"], 4).items()}
    whole = "base_model.model.model.norm.weight"
    written = write(tmp_path / "lora", {**tensors, whole: noise(64)}, base_model_name_or_path="org/name")
    said = json.loads(CliRunner().invoke(main, ["inspect", str(written), "--json"]).output)["adapter"]
    count = sum(one.numel() for one in tensors.values()) + 64
    assert (said["kind"], said["base"], said["ranks"], said["alpha"]) == ("LoRA", "org/name", [4], 8)
    assert said["modules"] == {"self_attn.q_proj": [0, 1], "self_attn.v_proj": [0, 1]}
    assert said["whole"] == ["model.norm.weight"]
    assert (said["parameters"], said["stored_bytes"], said["dtypes"]) == (count, 4 * count, {"float32": count})
    text = CliRunner().invoke(main, ["inspect", str(written)]).output
    assert "self_attn.q_proj, self_attn.v_proj in layers 0 to 1" in text
    assert "llmconvert convert org/name OUTPUT --adapter" in text
    with pytest.raises(SourceError, match=r"is an adapter and no model; name the model that it was trained on"):
        convert_model(str(written), tmp_path / "out")


def test_what_is_no_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such directory, and no Hub id"):
        open_adapter("./nowhere")
    with pytest.raises(SourceError, match=r"has no adapter_config\.json; expected a directory that peft wrote"):
        open_adapter(str(tmp_path))


def test_a_merge_computes_what_the_adapter_did(tiny_llama: Path, tmp_path: Path) -> None:
    """Before peft merges it: that adds what the embedding learned to the head as well, which is the same tensor."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    settings = {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    convert_model(tiny_llama, tmp_path / "merged", adapter=tmp_path / "lora", dtype="float32")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        theirs, ours = (one(ids).logits for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "stable, by pattern": {
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "dora": {"target_modules": ["k_proj", "gate_proj"], "use_dora": True},
    "embedding and norms": {"target_modules": ["embed_tokens", "o_proj"], "modules_to_save": ["input_layernorm"]},
}


@pytest.mark.parametrize("kind", [*KINDS, "inputs first"])
def test_peft_merges_the_same(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """What peft saved is read; merged in float32 it differs by the order of sums, in bfloat16 next to never."""
    peft = pytest.importorskip("peft")
    settings = KINDS.get(kind, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True})
    for dtype in (torch.float32, torch.bfloat16):
        directory = gpt2(tmp_path / f"gpt2-{dtype}", dtype) if kind == "inputs first" else tiny("llama", dtype)
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        torch.manual_seed(0)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_magnitude" in name or "modules_to_save" in name:
                    parameter.mul_(1.1)
        model.save_pretrained(tmp_path / str(dtype))
        expected = model.merge_and_unload().state_dict()
        merged, changed = view(directory, tmp_path / str(dtype)), 0
        for name, weight in SafetensorsCheckpoint(directory).items():
            reference = expected[name] if name in expected else expected[f"transformer.{name}"]
            if dtype == torch.float32:
                torch.testing.assert_close(merged[name], reference, rtol=2e-6, atol=2e-6)
            else:
                # Of embeddings peft rounds what it adds to bfloat16 first.
                assert "embed" in name or (merged[name] != reference).float().mean() < 1e-3
                close = 2e-3 if "embed" in name else 1e-6
                torch.testing.assert_close(merged[name].float(), reference.float(), rtol=0.008, atol=close)
            changed += not torch.equal(merged[name], weight)
        assert changed >= 4, "nothing was merged"
