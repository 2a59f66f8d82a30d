"""GGUF's types chosen tensor by tensor: what embedding and head cost, and whole files within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from support.tiny_gguf import tiny_model
from support.tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM

from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import SchemeError
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods.imatrix import Imatrix
from llmconvert.quantize.mixed_precision.budget import Budget
from llmconvert.quantize.mixed_precision.job import Allocation, plan_choice
from llmconvert.quantize.mixed_precision.sensitivity import Subject, measure_sensitivity
from llmconvert.quantize.mixed_precision.units import outer_units
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.scheme import Scheme, parse_scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

VOCABULARY = 320
WINDOWS = [torch.randint(3, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(i)) for i in range(12)]
SCHEMES = (Scheme.of_block("Q4_0"), Scheme.of_block("Q5_0"))


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("budget") / "model"
    tiny_model(request.param).save_pretrained(directory)
    tiny_tokenizer(VOCABULARY).save_pretrained(directory)
    return directory


@torch.no_grad()
def log_probabilities(model: torch.nn.Module) -> list[torch.Tensor]:
    return [model(window).logits[0].log_softmax(-1) for window in WINDOWS]


def test_embedding_and_head_cost_what_their_types_bring(source: Path, tmp_path: Path) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(source), torch.device("cpu"))
    units = outer_units(skeleton)
    blocks = discover(skeleton, 48)
    about = Subject(skeleton, blocks, dict.fromkeys(units, SCHEMES), Imatrix(), torch.float16, WINDOWS)
    found = measure_sensitivity(about, tmp_path / "work", "key")
    assert measure_sensitivity(about, tmp_path / "work", "key") == found  # from what was kept
    assert set(found) == set(units)
    for unit, costs in found.items():
        for scheme, predicted in costs.items():
            assert predicted == pytest.approx(brought(source, unit.outer or "", scheme), rel=0.4)


def brought(source: Path, outer: str, scheme: Scheme) -> float:
    """KL per token of the resident model with embedding or head in a type."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, values: seen.append(values[0][0]))
    before = log_probabilities(model)
    hook.remove()
    weight = (model.lm_head if outer == "head" else model.model.embed_tokens).weight
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    squares = torch.cat(seen).square().mean(0) if tied or outer == "head" else torch.ones(weight.shape[1])
    codec = load_codec(scheme.block or "")
    stored = codec.decode(codec.encode(weight.detach().numpy(), squares.numpy()))
    with torch.no_grad():
        weight.copy_(torch.from_numpy(stored))
    pairs = zip(before, log_probabilities(model), strict=True)
    return float(torch.cat([(then.exp() * (then - now)).sum(-1) for then, now in pairs]).mean())


def choose(source: Path, work: Path, budget: Budget, overrides: Sequence[Override] = ()) -> Allocation:
    request = QuantizeRequest("imatrix", parse_scheme("q4_k_m"), "gguf", tuple(overrides))
    with SafetensorsCheckpoint(source) as checkpoint:
        return plan_choice(checkpoint, work, budget, request, windows=WINDOWS).run()


def test_a_file_keeps_to_its_bytes_and_has_what_was_chosen(source: Path, tmp_path: Path) -> None:
    largest = 80_000
    given = Override("*.0.self_attn.v_proj", Scheme.of_block("Q8_0"))
    allocation = choose(source, tmp_path / "work", Budget(None, max_bytes=largest), [given])
    with SafetensorsCheckpoint(source) as checkpoint:
        result = quantize_checkpoint(
            checkpoint,
            tmp_path / "tiny.gguf",
            method="imatrix",
            scheme=allocation.scheme,
            format="gguf",
            name="tiny",
            overrides=allocation.overrides,
            windows=WINDOWS,
        )
    tied = AutoModelForCausalLM.from_pretrained(source).config.tie_word_embeddings
    assert len(allocation.choices) == 13 + (1 if tied else 2)
    assert largest - 2_000 < result.nbytes <= largest
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert types["blk.0.attn_v.weight"] == "Q8_0"
    chosen = {choice.unit.linears[0]: choice.scheme.block for choice in allocation.choices}
    assert types["token_embd.weight"] == chosen["embedding"]
    assert types["blk.1.ffn_down.weight"] == chosen["model.layers.1.mlp.down_proj"]
    assert len(set(chosen.values())) > 1
    with pytest.raises(SchemeError, match=r"budget.max_bytes 30,000: the smallest .* already take .* with all else"):
        choose(source, tmp_path / "work", Budget(None, max_bytes=30_000))
