"""How many variants are compared with the original at once."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmconvert.needs import Needs
from llmconvert.recipes.stages.windows import EVALUATION_TEXT
from llmconvert.recipes.sweep import comparing


def test_as_many_are_compared_at_once_as_memory_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(memory=1000, device=torch.device("cpu"))
    original = SimpleNamespace(open=lambda: nullcontext(None))
    work = SimpleNamespace(
        context=context, texts={EVALUATION_TEXT: SimpleNamespace(length=8, drawn=2)}, original=original
    )
    variants: dict[str, Any] = {name: SimpleNamespace(running=SimpleNamespace(work=work)) for name in "abcdefg"}
    monkeypatch.setattr(comparing, "open_dense", lambda model, **options: model)
    monkeypatch.setattr(comparing, "comparing_needs", lambda model, text, count, context: Needs(memory=count * 300))

    def portions(names: str, memory: int) -> list[str]:
        context.memory = memory
        return ["".join(portion) for portion, _ in comparing._portions(dict.fromkeys(names, Path()), variants)]

    assert portions("abcdefg", 10_000) == ["abcdefg"]
    assert portions("abcdefg", 1000) == ["ab", "cd", "efg"], "as alike as they come"
    assert portions("abc", 700) == ["bc"], "what is left over goes by itself"
    assert portions("abcdefg", 599) == [] and portions("a", 10_000) == []
