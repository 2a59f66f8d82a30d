"""Conversations through a chat template, as transformers renders them, in a process of bounded time and memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from llmconvert.errors import SourceError
from llmconvert.text.confinement import Confinement, ConfinementError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatRenderer", "ChatTemplate", "render_prompts"]

# Far beyond any conversation: what a template makes of a short one may not fill the memory.
_LONGEST_TEXT = 1 << 24


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template, and the special tokens that it may name.

    Attributes:
        text: the template, in Jinja.
        tokens: name → token or tokens, as pairs.
    """

    text: str
    tokens: tuple[tuple[str, str | tuple[str, ...]], ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, name: str = "default") -> ChatTemplate | None:
        """The template of that name by which a tokenizer renders conversations; None without one at all.

        Raises:
            SourceError: it has others and none of that name, or one that is no text.
        """
        found = tokenizer.chat_template
        if not found:
            return None
        known = found if isinstance(found, dict) else {"default": found}
        if name not in known:
            lacking = "none is the default" if name == "default" else f"none is called {name!r}"
            raise SourceError(f"the model's chat templates are {', '.join(map(str, known))}; {lacking}")
        found = known[name]
        if not isinstance(found, str):
            raise SourceError(f"the model's chat template is no text, but a {type(found).__name__}")
        tokens = tokenizer.special_tokens_map.items()
        return cls(found, tuple((name, _plain(value)) for name, value in tokens))


class ChatRenderer:
    """Renders conversations by a template; in a process of its own, from the first conversation to the end."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._confinement = Confinement("render")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._confinement.close()

    def render(self, messages: Iterable[Mapping[str, Any]], *, prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: each with its ``role`` and ``content``.
            prompt: whether the model's turn is opened at the end.

        Raises:
            SourceError: the template refuses the conversation, fails, or takes too much time or memory; with its line.
        """
        # As transformers does it, before a template sees them.
        known = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            text: str = self._confinement.ask(
                template=self._template.text, messages=known, tokens=dict(self._template.tokens), prompt=prompt
            )
        except ConfinementError as error:
            raise SourceError(f"the model's chat template: {error}") from error
        if len(text) > _LONGEST_TEXT:
            raise SourceError(f"the model's chat template: renders {len(text):,} characters of one conversation")
        return text


@functools.lru_cache(maxsize=32)
def render_prompts(template: ChatTemplate, prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Each prompt as the only message of a user, with the model's turn opened; later calls take what is known.

    Raises:
        SourceError: as :meth:`ChatRenderer.render`.
    """
    with ChatRenderer(template) as renderer:
        return tuple(renderer.render([{"role": "user", "content": prompt}], prompt=True) for prompt in prompts)


def _plain(value: Any) -> str | tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple) else str(value)
