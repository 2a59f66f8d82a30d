"""Weights at the ends of every range, in every scheme that a format holds: refused by name, or stored exactly.

What is stored reads back to the bit, is finite, and lies as near to the weights as its bits allow.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmconvert.errors import CheckpointError, LlmconvertError, SchemeError, UnsupportedError
from llmconvert.gguf.file import encode_rows
from llmconvert.gguf.ggml.blocks import CODECS, Codec, load_codec
from llmconvert.quantize.catalog.formats import FORMATS
from llmconvert.quantize.catalog.schemes import USUAL
from llmconvert.quantize.formats.base import FileFormat, Format, load_format
from llmconvert.quantize.methods.base import GgmlQuantizer, Quantizer, Target, load_method
from llmconvert.quantize.narrow import check_kept
from llmconvert.quantize.scheme import Scheme, parse_scheme
from llmconvert.quantize.tensor import QuantizedTensor

NAME = "model.layers.0.mlp.down_proj"
ROWS, COLUMNS = 64, 256
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
#: What the error's norm may be of the weights', by bits.
NEAR = {2: 0.9, 3: 0.45, 4: 0.25}
#: Written as they are, whatever the scheme.
TAME = ("plain", "zeros", "zero groups", "one value", "constant", "outlier")


def hostile(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By what is the matter with them; those that the dtype holds."""
    normal = torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    alone, outlier, groups = torch.zeros_like(normal), 1e-3 * normal, 0.02 * normal
    alone[3, 5], outlier[2, 7], groups[:, :128] = 1.5, 1e4, 0
    rows = normal.clone()
    rows[::2], rows[1::2] = normal[::2] * 1e-30, normal[1::2] * 1e30
    largest = 0.02 * normal
    largest[0] = torch.finfo(dtype).max
    found = {
        "plain": 0.02 * normal,
        "zeros": 0 * normal,
        "zero groups": groups,
        "one value": alone,
        "constant": torch.full_like(normal, 0.5),
        "outlier": outlier,
        "beyond float16": 3e6 * normal,
        "large": 1e30 * normal,
        "huge": 1e38 * normal.clamp(-3, 3),
        "largest row": largest,
        "rows far apart": rows,
        "small": 1e-30 * normal,
        "tiny": 1e-38 * normal,
        "below normal": 1e-40 * normal,
    }
    narrow = {name: weight.to(dtype) for name, weight in found.items()}
    return {name: weight for name, weight in narrow.items() if torch.isfinite(weight).all()}


def schemes_of(layout: Format) -> list[Scheme]:
    found = []
    for name in (*USUAL, "w8a16-channel-asym", "w8a16-tensor-fp8", "mxfp8a16", "w2a16-g32-affine", "w8a16-g32-affine"):
        scheme = parse_scheme(name)
        if isinstance(scheme, Scheme):
            try:
                layout.check(scheme)
            except UnsupportedError:
                continue
            found.append(scheme)
    return found


def through(
    layout: Format, scheme: Scheme, weight: torch.Tensor, *, search: bool = False
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """What is chosen for a weight, and what is read of it."""
    rows, columns = weight.shape
    scheme.check_fits(NAME, columns)
    scale_dtype = layout.scale_dtype(scheme, weight.dtype)
    specs = layout.specs(NAME, (rows, columns), scheme, scale_dtype)
    method = load_method("rtn", {"search": search})
    assert isinstance(method, Quantizer)
    tensor = method.quantize([Target(NAME, weight, scheme)], None, scale_dtype)[NAME].tensor
    kind = scheme.input_kind
    if kind is not None and kind.calibrated:
        tensor = replace(tensor, input_scale=kind.scale_for(1.0, weight.dtype))
    check_kept(NAME, tensor, weight.dtype, lambda: weight)
    stored = layout.pack(NAME, tensor)
    found = {name: (part.dtype, tuple(part.shape)) for name, part in stored.items()}
    assert found == {spec.name: (spec.dtype, spec.shape) for spec in specs}
    return tensor, layout.unpack(NAME, stored, scheme)


LAYOUTS = {name: layout for name in FORMATS if not isinstance(layout := load_format(name), FileFormat)}


@pytest.mark.parametrize("format", LAYOUTS)
def test_weights_are_refused_by_name_or_stored_exactly(format: str) -> None:
    layout, wrong = LAYOUTS[format], list[str]()
    for scheme in schemes_of(layout):
        for dtype in DTYPES:
            for what, weight in hostile(dtype).items():
                about = f"{scheme}, {dtype}, {what}"
                try:
                    chosen, read = through(layout, scheme, weight)
                except LlmconvertError as error:
                    if NAME not in str(error) or what in TAME:
                        wrong.append(f"{about}: {error}")
                    continue
                values, expected = read.dequantize(dtype).double(), chosen.dequantize(dtype).double()
                away = float((values - weight.double()).norm() / weight.double().norm().clamp(min=1e-300))
                if not torch.equal(values, expected):
                    wrong.append(f"{about}: reads back otherwise")
                if not away <= NEAR.get(scheme.bits, 0.06):  # NaN is none
                    wrong.append(f"{about}: away by {away:.3g}")
    assert not wrong, "\n".join(wrong[:20])


def encoded(codec: Codec, weight: torch.Tensor, method: str) -> torch.Tensor:
    """What a file holds of a weight that a method encodes by itself, read back."""
    chosen, squares = load_method(method, {}), torch.ones(COLUMNS) if method == "imatrix" else None
    assert isinstance(chosen, GgmlQuantizer)
    raw = encode_rows(NAME, codec, weight.float(), lambda codec, rows: chosen.encode(codec, rows, squares))
    return torch.from_numpy(codec.decode(raw.numpy()))


@pytest.mark.parametrize("kind", CODECS)
def test_weights_are_refused_by_name_or_stored_in_gguf(kind: str) -> None:
    """Encoded as by llama.cpp, by an importance matrix, and as solvers choose blocks: scales, and codes for them."""
    codec, layout, wrong = load_codec(kind), load_format("gguf"), list[str]()
    plain = kind in ("F32", "F16", "BF16")
    for dtype in DTYPES:
        for what, whole in hostile(dtype).items():
            weight = whole[:8]
            for way in ("rtn",) if plain else ("rtn", "imatrix", "solved"):
                about = f"{way}, {dtype}, {what}"
                try:
                    if way == "solved":
                        chosen, read = through(layout, Scheme.of_block(kind), weight, search=True)
                        values = read.dequantize(torch.float32)
                        if not torch.equal(values, chosen.dequantize(torch.float32)):
                            wrong.append(f"{about}: reads back otherwise")
                    else:
                        values = encoded(codec, weight, way)
                except LlmconvertError as error:
                    if NAME not in str(error) or what in TAME:
                        wrong.append(f"{about}: {error}")
                    continue
                away = float((values.double() - weight.double()).norm() / weight.double().norm().clamp(min=1e-300))
                if not away <= NEAR.get(getattr(codec, "bits", 16), 0.06):  # NaN is none
                    wrong.append(f"{about}: away by {away:.3g}")
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("format", LAYOUTS)
def test_what_is_no_number_is_refused(format: str) -> None:
    layout = LAYOUTS[format]
    for scheme in schemes_of(layout):
        for value in (torch.nan, torch.inf, -torch.inf):
            weight = torch.full((ROWS, COLUMNS), 0.5)
            weight[5, 9] = value
            with pytest.raises(CheckpointError, match=f"{NAME}.*not finite"):
                through(layout, scheme, weight)


@pytest.mark.parametrize("format", LAYOUTS)
def test_shapes_fit_or_are_refused_by_name(format: str) -> None:
    """Widths and heights that nothing divides: of each, what is stored is the whole weight."""
    layout = LAYOUTS[format]
    generator = torch.Generator().manual_seed(1)
    for scheme in schemes_of(layout):
        for rows, columns in ((64, 250), (60, 96), (33, 128), (64, 48), (7, 40), (1, 256), (130, 192)):
            weight = torch.randn((rows, columns), generator=generator).bfloat16()
            try:
                chosen, read = through(layout, scheme, weight)
            except (SchemeError, UnsupportedError) as error:
                assert NAME in str(error), (scheme, rows, columns)
                continue
            values = read.dequantize(torch.float32)
            assert values.shape == (rows, columns) and torch.equal(values, chosen.dequantize(torch.float32))
            assert float((values - weight.float()).norm() / weight.float().norm()) <= NEAR.get(scheme.bits, 0.06)


def test_weights_too_small_beside_others_under_one_divisor_are_advised_to_what_holds_them() -> None:
    plain, small = (hostile(torch.bfloat16)[what] for what in ("plain", "small"))
    scheme = Scheme.parse("nvfp4a16")
    method = load_method("rtn", {})
    assert isinstance(method, Quantizer)
    targets = [Target("gate", plain, scheme), Target(NAME, small, scheme)]
    tensor = method.quantize(targets, None, torch.bfloat16)[NAME].tensor
    with pytest.raises(UnsupportedError, match=r"makes all of them zero; .* scales are powers of two \(mxfp4\)"):
        check_kept(NAME, tensor, small.dtype, lambda: small)
    chosen, _ = through(LAYOUTS["compressed-tensors"], Scheme.parse("mxfp4a16"), small)
    away = chosen.dequantize(torch.float64) - small.double()
    assert float(away.norm() / small.double().norm()) < NEAR[4]
