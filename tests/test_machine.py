"""Failures of the machine: told from others by what is behind them, and ended in one line."""

from __future__ import annotations

import errno

import pytest

from llmconvert.errors import CheckpointError, LlmconvertError, MachineError
from llmconvert.machine import machine_errors, of_machine, out_of_memory


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def met(error: BaseException, context: BaseException) -> BaseException:
    error.__context__ = context
    return error


FAILURES = [
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    Exception("I/O error: Input/output error (os error 5)"),
    caused(CheckpointError("reading x"), OSError(errno.EIO, "Input/output error")),
    met(KeyError("x"), OSError(errno.EMFILE, "Too many open files")),
]


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_it_is_told_by_what_is_behind_an_error(error: BaseException) -> None:
    assert of_machine(error)
    with pytest.raises(LlmconvertError) as caught, machine_errors():
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value is error or (isinstance(caught.value, MachineError) and caught.value.exit_code == 5)


@pytest.mark.parametrize(
    "error",
    [
        OSError("transformers finds no tokenizer"),
        caused(ValueError("no config"), FileNotFoundError(errno.ENOENT, "No such file")),
        RuntimeError("shapes differ"),
        Exception("No such file or directory (os error 2)"),
        CheckpointError("model.safetensors: the header is corrupt"),
    ],
    ids=repr,
)
def test_what_is_wrong_with_a_model_is_not_the_machines(error: BaseException) -> None:
    assert not of_machine(error)
    with pytest.raises(type(error)) as caught, machine_errors():
        raise error
    assert caught.value is error


def test_a_file_that_is_gone_is_named_in_one_line() -> None:
    with pytest.raises(MachineError, match=r"^work/a: No such file or directory; ") as caught, machine_errors():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "work/a")
    assert not of_machine(caught.value.__cause__)


def test_memory_that_is_out_is_told_from_a_disk_that_fails() -> None:
    assert [out_of_memory(error) for error in FAILURES] == [False, False, True, True, False, False, False]


def test_a_pipe_that_was_closed_is_none() -> None:
    with pytest.raises(BrokenPipeError), machine_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
