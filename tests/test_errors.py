"""What a library says, in one line of ours: bounded, harmless to a terminal, without advice to run a model's code."""

from __future__ import annotations

import pytest

from llmconvert.errors import CheckpointError, LlmconvertError, UnsupportedError, advising, one_line

CUSTOM = (
    "The repository m contains custom code which must be executed to correctly load the model.\n"
    "Please pass the argument `trust_remote_code=True` to allow custom code to be run."
)
PICKLED = (
    "Weights only load failed. Re-running `torch.load` with `weights_only` set to `False` will likely succeed. Do so."
)


def test_advice_that_is_never_followed_is_left_out() -> None:
    custom = one_line(ValueError(CUSTOM))
    assert custom.startswith("ValueError: The repository m contains custom code") and "trust_remote_code" not in custom
    assert "weights_only" not in one_line(RuntimeError(PICKLED)) and "load failed" in one_line(RuntimeError(PICKLED))


def test_a_message_commands_no_terminal() -> None:
    assert str(LlmconvertError("tensor \x1b[2J")) == "tensor \\x1b[2J"


def test_a_refusal_from_inside_ends_with_what_to_do_instead() -> None:
    with pytest.raises(UnsupportedError, match=r"^no such layout; take another$"), advising("take another"):
        raise UnsupportedError("no such layout")
    with pytest.raises(CheckpointError, match=r"^truncated$"), advising("take another"):
        raise CheckpointError("truncated")
