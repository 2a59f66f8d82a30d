"""The rule itself: roundings pass, another model or another token where ours is decided does not."""

from __future__ import annotations

import torch
from support.agreement import Forward, compare

PROMPT, STEPS = 6, 8


def forward(noise: float = 1e-3) -> Forward:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, PROMPT + STEPS, 50, generator=generator)
    rounded = logits + noise * torch.randn(logits.shape, generator=generator)
    return Forward(logits.log_softmax(-1), rounded.log_softmax(-1))


def steps_of(ours: Forward) -> torch.Tensor:
    return ours.rounded[:, PROMPT - 1 : PROMPT - 1 + STEPS]


def test_roundings_pass_and_twice_as_many_of_another_model_do_not() -> None:
    ours = forward()
    tokens = steps_of(ours).argmax(-1)
    same = compare(ours.exact[:, :PROMPT], tokens, ours, prompt=PROMPT)
    assert same.holds and same.equal == 1 and same.lost == 0 and same.decided > 0.9
    off = ours.exact[:, :PROMPT] + 3e-3 * torch.randn(4, PROMPT, 50, generator=torch.Generator().manual_seed(1))
    assert not compare(off, tokens, ours, prompt=PROMPT).holds


def test_only_ties_may_be_broken_otherwise() -> None:
    ours = forward()
    tokens = steps_of(ours).argmax(-1)
    second = tokens.clone()
    second[1, -1] = steps_of(ours)[1, -1].topk(2).indices[1]
    wrong = compare(ours.exact[:, :PROMPT], second, ours, prompt=PROMPT)
    assert not wrong.holds and wrong.equal == 31 / 32
    place = PROMPT - 2 + STEPS
    for values in (ours.exact, ours.rounded):
        best, other = tokens[1, -1], second[1, -1]
        values[1, place, other] = values[1, place, best] - wrong.tie / 2
    tied = compare(ours.exact[:, :PROMPT], second, ours, prompt=PROMPT)
    assert tied.holds and 0 < tied.lost <= tied.tie
