"""GPTAQ: the moved weight is the least-squares answer, and its rounding is nearer to the original's outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.quantized import random_inputs, random_weight

from llmconvert.engine.statistics import Hessian, accumulate_hessian
from llmconvert.errors import CalibrationError
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.gptaq import Gptaq
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.scheme import Scheme

COLUMNS = 64


def streams(tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """What a linear sees in the quantized and in the original model: alike, but not the same."""
    original = random_inputs(tokens, COLUMNS)
    return original + 0.3 * random_inputs(tokens, COLUMNS, seed=1), original


def statistics(inputs: torch.Tensor, original: torch.Tensor) -> Hessian:
    return Hessian(inputs.T @ inputs / len(inputs), len(inputs), original.T @ inputs / len(inputs))


def least_squares(inputs: torch.Tensor, outputs: torch.Tensor, weight: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """The weight with these outputs on the inputs, and with its own on tokens of one column each, which stand for κ."""
    share = min(1.5, shrinkage * COLUMNS / len(inputs))
    agreed = (share * inputs.square().sum(0)).sqrt().diag()
    rows, wanted = torch.cat([inputs, agreed]), torch.cat([outputs, agreed @ weight.T])
    return torch.linalg.lstsq(rows, wanted).solution.T


@pytest.mark.parametrize("shrinkage", [0.0, 2.0])
@pytest.mark.parametrize("residual", [0.0, 0.5, 1.0])
def test_weights_move_to_the_least_squares_answer(residual: float, shrinkage: float) -> None:
    """Aimed at what the residual stream has lost, too."""
    inputs, original = streams()
    weight = random_weight(24, COLUMNS).double()
    lost = 0.1 * inputs @ random_weight(24, COLUMNS, seed=3).double().T + random_inputs(512, 24, seed=2)
    method = Gptaq(shift_damping=1e-12, residual=residual, shrinkage=shrinkage)
    wanted = original @ weight.T + method.residual * lost
    moments = replace(statistics(inputs, original), cross=None, aim=wanted.T @ inputs / len(inputs))
    moved = weight + method.shift("layer", weight, moments)
    expected = least_squares(inputs, original @ weight.T + residual * lost, weight, shrinkage)
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-9)


def test_an_aim_without_a_residual_is_what_the_inputs_alone_say() -> None:
    inputs, original = streams()
    weight = random_weight(24, COLUMNS).double()
    plain = statistics(inputs, original)
    aimed = replace(plain, cross=None, aim=weight @ original.T @ inputs / len(inputs))
    expected = Gptaq().shift("layer", weight, plain)
    torch.testing.assert_close(Gptaq().shift("layer", weight, aimed), expected, rtol=1e-9, atol=1e-12)


def test_nothing_moves_where_both_models_see_the_same() -> None:
    inputs, _ = streams()
    weight = random_weight(24, COLUMNS).double()
    shift = Gptaq().shift("layer", weight, statistics(inputs, inputs))
    assert float(shift.abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["w4a16-g16", "w3a16-g32-asym"])
def test_outputs_are_nearer_to_the_original_than_gptq_comes(name: str) -> None:
    inputs, original = (values.float() for values in streams())
    targets = [
        Target(part, random_weight(40, COLUMNS, seed=seed), Scheme.parse(name)) for seed, part in enumerate("ab")
    ]
    errors = []
    for method, others in ((Gptq(), None), (Gptaq(), [original])):
        hessian = accumulate_hessian("layer", [inputs], COLUMNS, torch.device("cpu"), others)
        solutions = method.quantize(targets, hessian, torch.float32)
        errors.append(
            sum(
                float(
                    (inputs @ solutions[t.name].tensor.dequantize(torch.float32).T - original @ t.weight.T).norm() ** 2
                )
                for t in targets
            )
        )
    assert errors[1] < 0.8 * errors[0]


def test_without_strength_it_is_gptq() -> None:
    inputs, original = (values.float() for values in streams())
    target = Target("layer", random_weight(40, COLUMNS), Scheme.parse("w4a16-g16"))
    device = torch.device("cpu")
    same = Gptq(damping=Gptaq().damping, sweeps=Gptaq().sweeps)
    plain = same.quantize([target], accumulate_hessian("layer", [inputs], COLUMNS, device), torch.float32)
    hessian = accumulate_hessian("layer", [inputs], COLUMNS, device, [original])
    ours = Gptaq(strength=0).quantize([target], hessian, torch.float32)
    assert torch.equal(ours["layer"].tensor.codes, plain["layer"].tensor.codes)


def test_a_matrix_that_cannot_be_inverted_is_named() -> None:
    broken = Hessian(-torch.eye(COLUMNS), 10, torch.zeros(COLUMNS, COLUMNS))
    with pytest.raises(CalibrationError, match=r"a\.b: the Hessian of its inputs \(10 tokens, 64 columns\) cannot be"):
        Gptaq().shift("a.b", random_weight(4, COLUMNS), broken)
