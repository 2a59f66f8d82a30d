"""The table of what goes together agrees with methods, formats and runtimes; refusals name what does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.quantized import random_weight

from llmconvert.engine.statistics import Hessian
from llmconvert.errors import UnsupportedError
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.gguf.ggml.mix import GgmlMix, MixContext
from llmconvert.quantize.catalog.formats import FORMATS
from llmconvert.quantize.catalog.methods import METHODS, usual_method
from llmconvert.quantize.catalog.schemes import USUAL
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.matrix import (
    Combination,
    check_combination,
    combinations,
    methods_for,
    readers_of,
    readership,
)
from llmconvert.quantize.methods.base import GgmlQuantizer, Quantizer, Target, load_method
from llmconvert.quantize.runtimes import RUNTIMES
from llmconvert.quantize.scheme import Scheme, parse_scheme

EVERY = list(combinations())


@pytest.mark.parametrize("one", EVERY, ids=lambda one: f"{one.method}-{one.scheme}-{one.format}")
def test_what_is_listed_can_be_made(one: Combination) -> None:
    """The method chooses codes that the format packs, as it said it would, and unpacks to the bit."""
    method, layout = load_method(one.method, {}), load_format(one.format)
    check_combination(method, one.scheme, layout)
    weight, scheme = random_weight(64, 256), one.scheme
    if isinstance(scheme, GgmlMix) and isinstance(method, GgmlQuantizer):
        codec = load_codec(scheme.type_of("blk.0.ffn_up.weight", (64, 256), MixContext(2, False, False)))
        raw = method.encode(codec, random_weight(64, 256).float(), torch.ones(256))
        assert raw.dtype == torch.uint8 and raw.shape == (64, 256 // codec.size * codec.nbytes)
        return
    assert isinstance(method, Quantizer)
    if isinstance(scheme, GgmlMix):
        scheme = Scheme.of_block(scheme.type_of("blk.0.ffn_up.weight", (64, 256), MixContext(2, False, True)))
    hessian = Hessian(torch.eye(256), 256, torch.eye(256)) if method.calibration != "none" else None
    scale_dtype = layout.scale_dtype(scheme, torch.bfloat16)
    found = method.quantize([Target("l", weight, scheme)], hessian, scale_dtype)["l"].tensor
    if scheme.fixes_inputs:
        kind = scheme.input_kind
        assert kind is not None
        found = replace(found, input_scale=kind.scale_for(1.0, torch.bfloat16))
    stored = layout.pack("l", found)
    specs = {spec.name: (spec.dtype, spec.shape) for spec in layout.specs("l", (64, 256), scheme, scale_dtype)}
    assert {name: (part.dtype, tuple(part.shape)) for name, part in stored.items()} == specs
    again = layout.unpack("l", stored, scheme)
    assert torch.equal(again.codes.view(torch.uint8), found.codes.view(torch.uint8))
    assert torch.equal(again.scale, found.scale)


def test_what_is_not_listed_is_refused() -> None:
    listed = {(one.method, one.scheme, one.format) for one in EVERY}
    for text in USUAL:
        scheme = parse_scheme(text)
        for method in METHODS:
            for format in FORMATS:
                if (method, scheme, format) not in listed:
                    told = r"methods for .* are |formats that hold .*: |needs format: gguf"
                    with pytest.raises(UnsupportedError, match=told):
                        check_combination(load_method(method, {}), scheme, load_format(format))
    assert len(listed) < len(USUAL) * len(METHODS) * len(FORMATS)


def test_every_method_and_format_is_in_the_table() -> None:
    assert {one.method for one in EVERY} == set(METHODS)
    assert {one.format for one in EVERY} == set(FORMATS)


def test_runtimes_are_those_that_were_run_with_such_a_scheme() -> None:
    for runtime in RUNTIMES:
        for text in runtime.schemes:
            assert runtime in readers_of(runtime.format, parse_scheme(text))
    names = {runtime.name for runtime in readers_of("gptq", Scheme.parse("w4a16-g32"))}
    assert "GPTQModel" in names
    assert not readers_of("compressed-tensors", Scheme.parse("w5a16-g64"))
    assert methods_for(Scheme.parse("nf4")) == ("rtn",)


def test_the_usual_method_suits_the_scheme() -> None:
    assert usual_method("w4a16-g64", text=True) == "gptq"
    assert usual_method(None, text=True) == usual_method("q4_x", text=True) == "gptq"
    assert usual_method("q4_k_m", text=True) == "gptq"
    assert usual_method("bf16", text=True) == "rtn"
    assert usual_method("q4_k_m", text=False) == "rtn"


def test_who_reads_an_artifact_is_who_reads_all_its_schemes() -> None:
    """A budget of 4 and 8 bits is one example: vLLM on CPU refuses groups of 8 bits."""
    four, eight = Scheme.parse("w4a16-g32"), Scheme.parse("w8a16-g64")
    alone, both = readership("compressed-tensors", [four]), readership("compressed-tensors", [four, eight, four])
    assert alone.read == ("transformers", "vLLM on CPU") and not alone.unseen
    assert str(alone) == "schemes read by transformers, vLLM on CPU"
    assert both.read == ("transformers",) and both.refused == {"vLLM on CPU": ("w8a16-g64-sym",)} and not both.unseen
    assert str(both) == "schemes read by transformers; vLLM on CPU does not load w8a16-g64-sym"
    assert str(readership("gptq", [Scheme.parse("w3a16-g64")])).startswith("schemes read by GPTQModel, transformers")
    assert readership("gguf", [parse_scheme("q4_k_m")]).read == ("llama.cpp",)
    nobody = readership("compressed-tensors", [Scheme.parse("w3a16-g64")])
    assert not nobody.read and str(nobody).startswith("schemes read by no runtime but ours; vLLM on CPU does not load")
    assert "transformers was never run with w3a16-g64-sym" in str(nobody)


def test_who_reads_a_mix_reads_the_codes_of_its_types() -> None:
    """What a method chose for the tensors of a mix are schemes of block types."""
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q8_0", "IQ4_NL", "IQ4_XS"):
        assert [runtime.name for runtime in readers_of("gguf", Scheme.of_block(kind))] == ["llama.cpp"], kind
