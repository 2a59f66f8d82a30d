"""What the shapes alone tell about a forward pass, checked against real forward passes."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.tiny_architectures import ARCHITECTURES, ids, tiny_model, unreached_model
from support.tiny_checkpoints import save_tiny_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel

from llmconvert.engine.discovery import BlockPlan, _trace, discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Arrival, Stream
from llmconvert.engine.tracing.alike import kinds_of
from llmconvert.engine.tracing.recorder import BlockRecorder
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
LENGTH = 64
Tiny = Callable[..., Path]


def plans_of(directory: Path, length: int = LENGTH) -> tuple[BlockPlan, ...]:
    return discover(Skeleton(SafetensorsCheckpoint(directory), CPU), length)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stops_group_the_linears_that_share_an_input(tiny: Tiny, name: str) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(tiny(name)), CPU)
    plans = discover(skeleton, LENGTH)
    assert [plan.index for plan in plans] == [0, 1, 2]
    for plan in plans:
        prefix = skeleton.prefix(plan.index)
        shared = [tuple(linear.removeprefix(prefix) for linear in stop.linears) for stop in plan.stops]
        assert shared == list(ARCHITECTURES[name].shared)
        assert plan.unreached == ()
        for stop in plan.stops:
            widths = {skeleton.linears[plan.index][linear].in_features for linear in stop.linears}
            assert widths == {stop.columns}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_outputs_are_added_to_is_named(tiny: Tiny, name: str) -> None:
    """A norm behind a linear (Gemma 2, OLMo 2) lies between its output and the residual stream."""
    skeleton = Skeleton(SafetensorsCheckpoint(tiny(name)), CPU)
    for plan in discover(skeleton, LENGTH):
        prefix = skeleton.prefix(plan.index)
        found = {stop.linears[0].removeprefix(prefix): stop.residual for stop in plan.stops if stop.residual}
        assert found == {linear: prefix + module for linear, module in ARCHITECTURES[name].residuals.items()}


def test_a_model_is_traced_once_for_all_who_ask_the_same(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plans_of(tiny("llama"))
    assert plans_of(tiny("llama")) is plans
    assert plans_of(tiny("llama"), 2 * LENGTH)[0].peak_nbytes > plans[0].peak_nbytes
    half = discover(Skeleton(SafetensorsCheckpoint(tiny("llama")), CPU, torch.bfloat16), LENGTH)
    assert half[0].peak_nbytes < plans[0].peak_nbytes
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    assert [name.rpartition(".")[2] for name in plans_of(tiny("llama"))[0].unreached] == ["gate_proj"]


def test_what_the_first_block_of_a_kind_does_stands_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third layer of this one attends to all positions, the others to the last eight."""
    settings: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 9}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    config = AutoConfig.for_model("gemma3_text", **settings, layer_types=kinds)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    run: list[int] = []
    forward = Gemma3DecoderLayer.forward

    def counted(self: Gemma3DecoderLayer, *args: Any, **kwargs: Any) -> Any:
        run.append(self.layer_idx)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Gemma3DecoderLayer, "forward", counted)
    short = plans_of(tmp_path, 32)
    assert run == [0, 1, 2]
    with monkeypatch.context() as patched:
        patched.setattr(BlockRecorder, "follows", lambda *_: False)
        _trace.cache_clear()
        assert plans_of(tmp_path, 32) == short and len(run) == 3 + 9

    def unlike(self: Gemma3DecoderLayer, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.kept = forward(self, hidden, *args, **kwargs)  # and so the next block finds more alive
        return self.kept + 1

    monkeypatch.setattr(Gemma3DecoderLayer, "forward", unlike)
    held = [plan.stops[0].held_nbytes for plan in plans_of(tmp_path, 32)]
    assert len(set(held)) == 9, "none stands for another"


def test_blocks_that_share_a_module_or_differ_in_a_setting_are_of_kinds_of_their_own(tiny: Tiny) -> None:
    config = AutoConfig.from_pretrained(tiny("llama"))
    with torch.device("meta"):
        layers = LlamaModel(config).layers
    first, second, third = kinds_of(list(layers), [config])
    assert first == second == third
    cast(LlamaDecoderLayer, layers[0]).self_attn.scaling *= 2
    cast(LlamaDecoderLayer, layers[2]).mlp = cast(LlamaDecoderLayer, layers[1]).mlp
    assert len(set(kinds_of(list(layers), [config]))) == 3
    assert len({*kinds_of(list(LlamaModel(config).layers), [config]), first}) == 1
    config.layer_kinds = ["a", "b", "a"]
    assert len(set(kinds_of(list(LlamaModel(config).layers), [config]))) == 2


def test_linears_that_are_never_called_are_told(tmp_path: Path) -> None:
    unreached_model(tmp_path)
    for plan in plans_of(tmp_path):
        names = [name.rpartition("encoder_attn.")[2] for name in plan.unreached]
        assert names == ["k_proj", "v_proj", "q_proj", "out_proj"]


@pytest.fixture
def young_objects() -> Iterator[None]:
    """Hide all objects there are so far from ``gc.get_objects``."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_nbytes(skeleton: Skeleton) -> int:
    """Bytes of the storages behind all young tensors that are not the model's."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*skeleton.model.parameters(), *skeleton.model.buffers())}
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor) and not found.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "phi3", "gpt_neox", "opt-untied", "olmo2"])
def test_held_bytes_are_those_a_waiting_batch_really_holds(
    tiny: Tiny, name: str, dtype: torch.dtype, young_objects: None
) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(tiny(name, dtype)), CPU)
    plans = discover(skeleton, LENGTH)
    gc.collect()
    stream = Stream(skeleton, ids((LENGTH,)), plans, mode="lockstep", residuals=True)
    for run in stream.blocks():
        assert run.plan.stops
        for stop in run.plan.stops:
            waiting = cast("Generator[Arrival]", run.arrivals(stop))
            next(waiting)
            held = live_nbytes(skeleton)
            assert held <= stop.held_nbytes + 1024
            # Fake tensors of a few position ids outlive the real ones.
            assert stop.held_nbytes <= held * 1.05 + 64 * LENGTH
            assert stop.held_nbytes <= run.plan.peak_nbytes
            waiting.close()
    stream.close()


@pytest.mark.parametrize(("kind", "count"), [("llama", 1), ("granite", 2)])
def test_what_lies_behind_the_last_block_are_its_logits(tmp_path: Path, kind: str, count: int) -> None:
    """One class scales them into a tensor of their own. Hidden states are a hundredth of them here."""
    settings: dict[str, Any] = {"vocab_size": 20_000, "hidden_size": 16, "intermediate_size": 16}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path)
    first, last = discover(Skeleton(SafetensorsCheckpoint(tmp_path), torch.device("cpu")), 8)
    logits = 8 * 20_000 * 4
    assert first.behind_nbytes == 0 and count * logits <= last.behind_nbytes < 1.1 * count * logits


def test_discovery_takes_no_memory_for_data(tiny: Tiny) -> None:
    """A million tokens: their attention scores alone would be terabytes."""
    plans = plans_of(tiny("llama"), 1_000_000)
    assert plans[0].stops[0].held_nbytes > 1_000_000 * 64 * 4


def save_config(directory: Path, **config: Any) -> SafetensorsCheckpoint:
    """A tiny Llama's weights under another config."""
    path = directory / "config.json"
    kept = {} if "model_type" in config else json.loads(path.read_text())
    path.write_text(json.dumps({**kept, **config}))
    return SafetensorsCheckpoint(directory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "nonesuch"},
            r"'nonesuch' is not known to the installed transformers; a newer ",
        ),
        ({"model_type": "nonesuch", "auto_map": {"AutoModel": "m.M"}}, "'nonesuch' .* code from its repository, which"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": None}, "config.json says no model_type"),
        ({"model_type": "vit"}, "architecture 'vit' has no causal language model"),
        ({"model_type": "t5"}, "architecture 't5' has no causal language model"),
    ],
)
def test_unknown_architectures_are_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    checkpoint = save_config(tiny_model(tmp_path / "model"), **config)
    with pytest.raises(UnsupportedError, match=message):
        Skeleton(checkpoint, CPU)


def test_remote_code_is_not_run_where_transformers_knows_the_architecture(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path / "model")
    (directory / "modeling_custom.py").write_text("raise SystemExit('remote code was run')")
    checkpoint = save_config(directory, auto_map={"AutoModelForCausalLM": "modeling_custom.Custom"})
    assert len(discover(Skeleton(checkpoint, CPU), LENGTH)) == 3


def test_encoder_decoders_are_refused_by_name(tmp_path: Path) -> None:
    settings = BartConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    BartForConditionalGeneration(settings).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="architecture 'bart' is an encoder-decoder"):
        Skeleton(SafetensorsCheckpoint(tmp_path), CPU)


def test_blocks_are_found_in_a_class_that_declares_none(tmp_path: Path) -> None:
    settings = AutoConfig.for_model("ctrl", vocab_size=128, n_embd=64, n_layer=2, n_head=4, dff=64)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    assert Skeleton(SafetensorsCheckpoint(tmp_path), CPU).prefix(1) == "transformer.h.1."


def test_a_decoder_whose_config_counts_an_encoders_layers_has_its_own(tmp_path: Path) -> None:
    """BART's ``num_hidden_layers`` are those of the encoder, which its causal class doesn't have."""
    settings = AutoConfig.for_model(
        "bart", vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=3, decoder_ffn_dim=96, is_decoder=True
    )
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    assert Skeleton(SafetensorsCheckpoint(tmp_path), CPU).block_count == 3


def test_a_model_whose_layers_are_several_lists_is_refused_by_name(tmp_path: Path) -> None:
    """XLM has one list of attentions and one of MLPs: neither is a decoder's blocks."""
    settings = AutoConfig.for_model("xlm", vocab_size=128, emb_dim=64, n_layers=2, n_heads=4)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"'xlm': its layers are not one list .*transformer.attentions with 2"):
        Skeleton(SafetensorsCheckpoint(tmp_path), CPU)


def test_a_forward_that_skips_blocks_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaModel.forward

    def shortened(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        self.config.num_hidden_layers = 2  # how many blocks Llama's loop takes
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", shortened)
    with pytest.raises(UnsupportedError, match=r"architecture 'llama': its forward passes the blocks in the order"):
        plans_of(tiny("llama"))


def test_a_linear_that_is_called_twice_is_no_stop(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(self.gate_proj(x) * self.up_proj(x) * self.up_proj(-x))
        return down

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    for plan in plans_of(tiny("llama")):
        assert [name.rpartition(".")[2] for name in plan.repeated] == ["up_proj"] and plan.unreached == ()
        assert not set(plan.repeated) & {name for stop in plan.stops for name in stop.linears}
        assert [stop.linears[0].rpartition(".")[2] for stop in plan.stops][-2:] == ["gate_proj", "down_proj"]


def test_a_forward_that_looks_at_data_is_passed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    before, forward = plans_of(tiny("llama")), LlamaDecoderLayer.forward

    def curious(self: LlamaDecoderLayer, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = torch.nonzero(hidden[0, :, 0])[:, 0]
        hidden = hidden[:, rows] if hidden.sum().item() == 0 else hidden[:, :0]
        return forward(self, hidden, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", curious)
    assert [[stop.linears for stop in plan.stops] for plan in plans_of(tiny("llama"))] == [
        [stop.linears for stop in plan.stops] for plan in before
    ]


def test_shapes_that_contradict_the_config_are_named(tmp_path: Path) -> None:
    checkpoint = save_config(tiny_model(tmp_path / "model"), intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\..*' has shape .*96.*, config\.json says .*128"):
        Skeleton(checkpoint, CPU)


@pytest.mark.parametrize(
    ("model_type", "class_name", "what"),
    [
        ("zaya", "ZayaForCausalLM", "prev_router_hidden_states"),
        ("hy_v4", "HYV4ForCausalLM", "prev_topk_indices"),  # tokens that the layer before has chosen
        ("glm_moe_dsa", "GlmMoeDsaForCausalLM", ""),  # hands them on, and uses its own
    ],
)
def test_blocks_that_use_more_of_each_other_than_hidden_states(
    model_type: str, class_name: str, what: str, tmp_path: Path
) -> None:
    save_tiny_checkpoint(tmp_path / "m", model_type, class_name)
    with SafetensorsCheckpoint(tmp_path / "m") as source:
        skeleton = Skeleton(source, torch.device("cpu"))
        if not what:
            assert discover(skeleton)
            return
        with pytest.raises(UnsupportedError, match=rf"'{model_type}': its blocks hand each other more .* \({what}\)"):
            discover(skeleton)
