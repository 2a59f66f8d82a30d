"""Chat templates: the text that transformers renders, and one line in bounded time about every template that fails."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

from llmconvert.errors import MachineError, SourceError
from llmconvert.text import confinement
from llmconvert.text.chat import ChatRenderer, ChatTemplate, render_prompts
from llmconvert.text.confinement import Confinement

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short.", "name": None},
    {"role": "user", "content": "Grüße, 你好 🙂"},
    {"role": "assistant", "content": "Hi."},
]
#: Templates that render.
RIGHT = (
    CHAT_TEMPLATE,
    "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}",
    "{%- if messages[0].role == 'system' -%}{{ messages[0].content | trim }}{%- endif -%}\n{{ add_generation_prompt }}",
    "{% for m in messages %}{% if m.name is defined %}{{ m.name }}{% endif %}{% break %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
)
#: Templates that fail, with what is said of them.
WRONG = {
    "raises": ("\n\n{{ raise_exception('roles must\nalternate') }}", r"line 3: TemplateError: roles must alternate"),
    "undefined": ("a\n{{ nothing.there }}", r"line 2: UndefinedError: 'nothing' is undefined"),
    "syntax": ("a\n{% for %}", r"line 2: TemplateSyntaxError: "),
    "filter": ("{{ messages | nofilter }}", r"line 1: TemplateAssertionError: No filter named 'nofilter'"),
    "sandbox": ("\n{{ ''.__class__.__mro__ }}", r"line 2: SecurityError: "),
    "division": ("a\n{% set x = 1 / 0 %}", r"line 2: ZeroDivisionError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", r"RecursionError"),
    "nested": ("{% if 1 %}" * 500 + "{% endif %}" * 500, r"RecursionError"),
    "doubling": (
        "{% set ns = namespace(s='x' * 16) %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        r"takes more than 512 MiB of memory",
    ),
    "padding": ("{{ 'a' | center(10 ** 10) }}", r"takes more than 512 MiB of memory"),
    "half a pair": ("{{ '\\ud800' }}", r"UnicodeEncodeError"),
    "long": ("{% for a in range(9000) %}{{ 'x' * 2000 }}{% endfor %}", r"renders 18,000,000 characters"),
}


@pytest.fixture(scope="module")
def confined() -> Iterator[Confinement]:
    """A child for all tests of the module: what fails in it doesn't end it, but for a loop."""
    with Confinement("render") as child:
        yield child


def renderer(template: str, child: Confinement | None = None) -> ChatRenderer:
    made = ChatRenderer(ChatTemplate(template, (("bos_token", "<s>"),)))
    made._confinement = child or made._confinement
    return made


@pytest.mark.parametrize("template", RIGHT)
def test_what_is_rendered_is_what_transformers_renders(confined: Confinement, template: str) -> None:
    tokenizer = tiny_tokenizer()
    found = ChatTemplate.of(tokenizer)
    assert found is not None and found.text == CHAT_TEMPLATE
    rendering = ChatRenderer(dataclasses.replace(found, text=template))
    rendering._confinement = confined
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(
            MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        assert rendering.render(MESSAGES, prompt=prompt) == expected


@pytest.mark.parametrize("case", WRONG)
def test_a_template_that_fails_is_one_line(confined: Confinement, case: str) -> None:
    template, reason = WRONG[case]
    with pytest.raises(SourceError, match=f"chat template: .*{reason}") as caught:
        renderer(template, confined).render(MESSAGES)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.slow
def test_loops_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(confinement._KINDS, "render", confinement._Kind(1, 1 << 29))
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    started = time.process_time()
    with renderer(loop) as rendering, pytest.raises(SourceError, match="chat template: takes more than 1 s"):
        rendering.render(MESSAGES)
    assert time.process_time() - started < 1, "it runs in another process"


def test_a_renderer_goes_on_after_a_conversation_that_its_template_refuses() -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0].content }}"
    with renderer(template) as rendering:
        with pytest.raises(SourceError, match="line 1: TemplateError: one only"):
            rendering.render(MESSAGES)
        assert rendering.render(MESSAGES[:1]) == "Be short."


def test_prompts_are_rendered_once() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, ())
    first = render_prompts(template, ("Say hello.", "Say good night."))
    assert first[0] == "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompts(ChatTemplate(CHAT_TEMPLATE, ()), ("Say hello.", "Say good night.")) is first


@pytest.mark.parametrize(
    ("declared", "message"),
    [(5, "is no text, but a int"), ({"rag": "x", "tool": "y"}, "are rag, tool; none is the default")],
)
def test_templates_of_another_kind(declared: object, message: str) -> None:
    class Declares:
        chat_template = declared
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    with pytest.raises(SourceError, match=message):
        ChatTemplate.of(Declares())
    Declares.chat_template = {"default": "x", "tool": "y"}
    assert ChatTemplate.of(Declares()) == ChatTemplate("x", ())
    Declares.chat_template = None
    assert ChatTemplate.of(Declares()) is None


def test_a_machine_that_starts_no_process_is_no_fault_of_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "confined.py"
    broken.write_text("raise SystemExit('no such library')\n")
    for child, reason in ((broken, "no such library"), (tmp_path / "nothing.py", "No such file")):
        monkeypatch.setattr(confinement, "_CHILD", child)
        with Confinement("render") as confined, pytest.raises(MachineError, match=reason):
            confined.ask(template="x", messages=[], tokens={}, prompt=False)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with Confinement("render") as confined, pytest.raises(MachineError, match="no process can be started"):
        confined.ask(template="x", messages=[], tokens={}, prompt=False)
