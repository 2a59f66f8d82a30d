"""Where transformers works on settings that somebody else wrote: whatever it raises is one of our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llmconvert.errors import CapacityError, LlmconvertError, UnsupportedError, one_line
from llmconvert.machine import of_machine, out_of_memory

__all__ = ["WHOLE", "foreign_settings"]

#: What to do with a model that cannot be run block by block.
WHOLE = (
    "convert casts it to another dtype all the same; quantizing its linears takes a tool that holds the whole model, "
    "transformers with bitsandbytes for example, while it loads (BitsAndBytesConfig(load_in_4bit=True))"
)


@contextmanager
def foreign_settings(what: str, instead: str = "") -> Iterator[None]:
    """Let nothing but errors of this package out of the block.

    Configs hold any value, and classes meet them with exceptions of every kind, from ``AssertionError`` to
    ``ZeroDivisionError``; the block holds calls into transformers only, so that none of our own faults is taken for a
    config's.

    Args:
        what: what the message begins with: ``architecture 'llama' cannot be built``.
        instead: what it ends with: what to do.

    Raises:
        CapacityError: memory ran out.
        OSError: the machine failed otherwise.
        UnsupportedError: anything else.
    """
    try:
        yield
    except LlmconvertError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise CapacityError(f"{what}: {one_line(error)}") from error
        if of_machine(error):
            raise
        raise UnsupportedError(f"{what}: {one_line(error)}{f'; {instead}' if instead else ''}") from error
