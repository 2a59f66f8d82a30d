"""Recipes made wrong in many ways: each is read, or refused in an error of the package, at a bounded cost.

A longer run: ``FUZZ_EXAMPLES=20000 pytest tests/recipes/test_fuzz.py``.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmconvert.errors import LlmconvertError
from llmconvert.recipes.loading import _all_keys, load_recipe, make_recipe, parse_recipe
from llmconvert.recipes.schema.recipe import Recipe

#: Executions of each test; the suite's are few.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES == 40,
    suppress_health_check=list(HealthCheck),
)

BASE = """\
model: a/b
calibrate: &text {dataset: "pydoc-topics:train", samples: 4, length: 64}
quantize: {method: gptq, scheme: w4a16-g64, overrides: [{match: "*", scheme: w8a16}]}
validate: {perplexity: {dataset: "pydoc-topics:test", max_increase: 5%}, generation: true}
publish: {to: "file:out"}
"""
NUMBERS = [0, -1, 1, 2, 10**12, 2**63, 10**300, -(10**300), 0.5, 1e308, float("inf"), float("nan")]
NAMES = ["", "a", "n" * 300, "a\0b", "/dev/zero", "~nobody-here/x", "file:", "file:" + "n" * 300, "{scheme}", "{0.x}"]
VALUED = ["w4a16", "w9a99-g0", "w4a16-g" + "9" * 40, "q4_k_m", "yarn:0", "yarn:" + "9" * 400, "5%", "9" * 400 + "%"]
VALUED += ["4GB", "9" * 400 + "GB", "gptq", "rtn", "gguf", "bitsandbytes", "cuda:" + "9" * 99, "none", "float16"]
DATES = [datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1, 1, 1)]
KEYS = list(_all_keys(Recipe))
# Lines that no value makes.
LINES = [
    "x: " + "9" * 5_000,
    "model: " + "9" * 5_000,
    "model: 2024-99-99",
    "2024-01-01: 1",
    "? [1, 2]\n: 3",
    "? {a: 1}\n: 3",
    "model: !!python/object:os.system x",
    "model: !!binary '*'",
    "model: !!set {a}",
    "model: 1:99:99",
    "model: *nowhere",
    "model: &m [*m]",
    "validate: *text",
    "quantize: {<<: *text}",
    "<<: [*text, *text]",
    "a: &a {<<: *a}",
    "model: " + "[" * 2_000,
    "model: " + "{a: " * 2_000,
    "\0",
    "\x1b[2J: 1",
    "%YAML 9.9\n---",
    "---\n---",
    "\ud800",
]

scalars = st.sampled_from([*NUMBERS, *NAMES, *VALUED, *DATES, True, False, None]) | st.text(max_size=8)
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=6
)


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """A recipe with some of its keys set to something else, its text cut and joined with lines that are no values."""
    content = yaml.safe_load(BASE)
    for path in draw(st.lists(st.sampled_from(KEYS), max_size=4)):
        section = content
        for part in path[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[path[-1]] = draw(values)
    text = draw(st.just(BASE) | st.just(yaml.safe_dump(content, allow_unicode=True)))
    if draw(st.booleans()):
        text += "\n".join(draw(st.lists(st.sampled_from(LINES) | st.text(max_size=12), max_size=3)))
    return text[: draw(st.just(len(text)) | st.integers(0, len(text)))]


def read(text: str, overrides: list[str]) -> None:
    try:
        recipe = parse_recipe(text, "x.yaml", overrides=overrides)
    except LlmconvertError as error:
        assert len(str(error)) < 20_000
        assert all(len(line) < 1_500 for line in str(error).splitlines())
    else:
        assert make_recipe(recipe.to_mapping()) == recipe


@fuzzed
@given(text=recipes())
def test_a_recipe_is_read_or_refused(text: str) -> None:
    read(text, [])


@fuzzed
@given(key=st.sampled_from(KEYS).map(lambda path: ".".join(map(str, path))) | st.text(max_size=12), value=scalars)
def test_an_override_is_read_or_refused(key: str, value: object) -> None:
    read(BASE, [f"{key}={value}"])


BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: 1}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "merge keys"),
        ("model: 2024-99-99", "month must be in 1..12"),
        ("model: a\nmemory: " + "9" * 5_000, "x.yaml: not YAML that can be read"),
        ("model: " + "[" * 2_000, "nested too deep"),
        ('model: "a\\0b"', "holds a NUL byte"),
        ("model: " + "n" * 300, "a name of 300 bytes"),
        ("model: a\nvalidate: {generation: {max_new_tokens: 1000000000000}}", "less than or equal to 65536"),
        ("model: a\ncalibrate: {dataset: d, length: 1000000000000}", "less than or equal to 16777216"),
    ],
)
def test_what_is_absurd_is_one_line(text: str, message: str) -> None:
    with pytest.raises(LlmconvertError) as caught:
        parse_recipe(text, "x.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/dev/zero", "n" * 300, "a\0b", "~no-such-user-here/x.yaml"])
def test_what_is_no_recipe_costs_nothing(name: str) -> None:
    with pytest.raises(LlmconvertError):
        load_recipe(name)
