"""Numbers and what their codes stand for, against torch's own casts, a search over all levels, and bitsandbytes.

Numbers that this package does not have are made here too: what quantizes and reads weights asks a number, whichever.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from support.quantized import every_code, hessian_of, random_inputs, random_weight

from llmconvert.errors import SchemeError, UnsupportedError
from llmconvert.quantize.matrix import check_method
from llmconvert.quantize.methods.base import Target, load_method
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.numbers import E4M3, FP4, LLM_INT8, MXFP8, NF4, NVFP4, Int, Levels, Number
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True)
class MxInt(Int):
    """MXINT8 and narrower kin (OCP microscaling formats 1.0): integers whose scales are powers of two, E8M0."""

    def round_scale(self, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return powers_of_two(scale).to(dtype)


@dataclass(frozen=True, slots=True)
class MxLevels(Levels):
    """MXFP4 (OCP microscaling formats 1.0): E2M1 under scales that are powers of two."""

    def round_scale(self, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return powers_of_two(scale).to(dtype)


_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_SIZES, *(-size for size in _SIZES))
E2M1 = Levels(4, name="e2m1", levels=_E2M1)
MXFP4 = MxLevels(4, name="mxfp4", levels=_E2M1)
_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_NL = Levels(4, name="iq4_nl", levels=tuple(map(float, _TABLE)))
MXINT4 = MxInt(4, name="mxint4")
NUMBERS = [Int(2), Int(4), Int(8), E4M3, NF4, FP4, LLM_INT8, E2M1, MXFP4, IQ4_NL, MXINT4]
numbers = pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{number.name}{number.bits}")


def powers_of_two(scale: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.log2(scale).ceil())


def rounded(number: Number, weight: torch.Tensor, size: int, *, search: bool = False) -> QuantizedTensor:
    target = Target("layer", weight, Scheme(number, size))
    return Rtn(search=search).quantize([target], None, torch.float32)["layer"].tensor


@numbers
def test_the_nearest_of_all_levels_is_chosen(number: Number) -> None:
    values = 1.1 * number.largest * torch.linspace(-1, 1, 5001)
    found = number.values(number.nearest(values)).double()
    levels = number.values(every_code(number)).double()
    nearest = (values.double()[:, None] - levels).abs().amin(1)
    torch.testing.assert_close((values.double() - found).abs(), nearest, rtol=0, atol=1e-6 * number.largest)


@numbers
def test_every_code_stands_for_itself(number: Number) -> None:
    codes = every_code(number)
    assert codes.dtype == number.code_dtype
    levels = number.values(codes)
    assert (float(levels.min()), float(levels.max())) == number.limits
    assert torch.equal(number.values(number.nearest(levels)), levels)


def test_zero_points_move_integers_inside_their_range() -> None:
    number = Int(4, symmetric=False)
    codes = number.nearest(torch.tensor([-20.0, -3.0, 0.0, 20.0]), torch.tensor(-5))
    assert codes.tolist() == [-8, -8, -5, 7]


def test_float_codes_are_those_of_compressed_tensors() -> None:
    weight = random_weight(40, 96)
    ours = Rtn().quantize([Target("layer", weight, Scheme.parse("fp8"))], None, torch.float32)["layer"].tensor
    arguments = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    zero = torch.zeros_like(ours.scale)
    theirs = quantize(weight, ours.scale, zero, arguments, dtype=E4M3.code_dtype)
    assert torch.equal(ours.codes.view(torch.int8), theirs.view(torch.int8))
    assert torch.equal(ours.dequantize(torch.float32), dequantize(theirs, ours.scale, zero, arguments, torch.float32))
    torch.testing.assert_close(ours.scale, weight.abs().amax(1, keepdim=True) / 448)


@pytest.mark.parametrize("number", [NF4, FP4], ids=lambda number: number.name)
def test_the_levels_of_bitsandbytes(number: Levels) -> None:
    assert torch.equal(get_4bit_type(number.name, device="cpu"), torch.tensor(number.levels))


@pytest.mark.parametrize("number", [E2M1, MXFP4, IQ4_NL, MXINT4], ids=lambda number: number.name)
def test_a_number_that_is_new_is_rounded_and_read(number: Number) -> None:
    """Against its definition: scales that cover each group, as they can be stored, and the nearest of all levels."""
    weight = random_weight(20, 96)
    found = rounded(number, weight, 32)
    grouped = weight.double().reshape(20, 3, 32)
    scale = number.round_scale((grouped.abs().amax(-1) / number.largest).float(), torch.float32)
    torch.testing.assert_close(found.scale, scale)
    levels = number.values(every_code(number)).double()
    errors = (grouped.unsqueeze(-1) - levels * found.scale.double()[..., None, None]).abs().amin(-1)
    dense = found.dequantize(torch.float64).reshape(grouped.shape)
    torch.testing.assert_close((grouped - dense).abs(), errors, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [E4M3, E2M1, MXFP4, IQ4_NL, MXINT4], ids=lambda number: number.name)
def test_scales_are_searched_under_the_levels_of_the_number(number: Number) -> None:
    weight = random_weight(64, 96)
    losses = [
        (rounded(number, weight, 32, search=search).dequantize(torch.float32) - weight).square().sum(1)
        for search in (False, True)
    ]
    assert (losses[1] <= losses[0] * (1 + 1e-5)).all()
    assert losses[1].sum() < 0.98 * losses[0].sum()
    assert torch.equal(
        number.round_scale(rounded(number, weight, 32, search=True).scale, torch.float32),
        (rounded(number, weight, 32, search=True).scale),
    )


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("number", [MXINT4, Int(4, name="narrow", narrow=True)], ids=lambda number: number.name)
def test_solvers_take_every_number_with_even_levels(number: Number, sweeps: int) -> None:
    """GPTQ's columns, and the sweeps after, keep to its codes and to scales that it can store."""
    inputs, weight = random_inputs(400, 96), random_weight(48, 96)
    hessian = hessian_of(inputs)
    targets = [Target("layer", weight, Scheme(number, 32))]
    solved = Gptq(sweeps=sweeps).quantize(targets, hessian, torch.float32)["layer"].tensor
    low, high = number.limits
    assert int(solved.codes.min()) >= low and int(solved.codes.max()) <= high
    assert torch.equal(number.round_scale(solved.scale, torch.float32), solved.scale)
    losses = [
        float((inputs @ (tensor.dequantize(torch.float64) - weight).T).square().sum())
        for tensor in (rounded(number, weight, 32), solved)
    ]
    assert losses[1] < 0.7 * losses[0]


def test_other_levels_are_left_to_methods_that_choose_any() -> None:
    check_method(load_method("rtn", {}), Scheme(E2M1, 32))
    with pytest.raises(
        UnsupportedError, match=r"gptq chooses int, float and GGUF codes only; methods for e2m1 are rtn$"
    ):
        check_method(load_method("gptq", {}), Scheme(E2M1, 32))


def test_numbers_say_what_schemes_they_go_with() -> None:
    assert str(Scheme(E2M1, 32)) == "w4a16-g32-e2m1"
    with pytest.raises(SchemeError, match="fp4 weights have 4 bits, a group size and no zero point"):
        Scheme(FP4)
    with pytest.raises(SchemeError, match="only nf4 weights have quantized scales"):
        Scheme(E2M1, 32, nested=True)


def test_bitsandbytes_integers_are_read_as_plain_ones() -> None:
    assert LLM_INT8.stored == Int(8) and not LLM_INT8.even
    assert all(number.stored == number for number in (Int(4), E4M3, NF4))


def test_e2m1_rounds_half_to_even_and_keeps_signs() -> None:
    """As compressed-tensors casts, ties and zeros of both signs included."""
    values = torch.cat((torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 4, torch.arange(-28, 29) / 4))
    found = NVFP4.values(NVFP4.nearest(values))
    expected = cast_to_fp4(values.clone())
    assert torch.equal(found, expected) and torch.equal(torch.signbit(found), torch.signbit(values))
    codes = torch.arange(16).to(torch.int8)
    assert torch.equal(NVFP4.nearest(NVFP4.values(codes)), codes)


def test_scales_of_few_bits_are_rounded_to_what_can_be_stored() -> None:
    scale = torch.tensor([0.3, 1.0, 3.0])
    assert MXFP8.round_scale(scale, torch.float32).tolist() == [0.5, 1.0, 4.0]
    assert NVFP4.round_scale(scale, torch.bfloat16).tolist() == [0.3125, 1.0, 3.0]
