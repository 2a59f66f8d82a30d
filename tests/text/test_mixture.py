"""Calibration mixes: shares of windows, templates by source, equal windows for equal seeds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer

from llmconvert.api import quantize_model
from llmconvert.cli.manners import calibration_option
from llmconvert.errors import DatasetError, RecipeError
from llmconvert.recipes.loading import make_recipe
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.report.report import Report
from llmconvert.text.datasets import Corpus
from llmconvert.text.mixture import MixedCorpus, draw_mixture
from llmconvert.text.shares import MixedSource, windows_by_share
from llmconvert.text.tokens import TokenWindows, check_disjoint, draw_windows

PROSE = Corpus("prose:train", ("the quick brown fox jumps over the lazy dog " * 40,), "prose")
CHATS = Corpus(
    "chats:train",
    tuple([{"role": "user", "content": f"question {n}"}, {"role": "model", "content": "answer"}] for n in range(60)),
    "chats",
)


def mix(*parts: tuple[Corpus, float, str]) -> MixedCorpus:
    return MixedCorpus(tuple((MixedSource(text.dataset, share, template), text) for text, share, template in parts))


def drawn(
    mixture: MixedCorpus, *, samples: int = 20, length: int = 16, seed: int = 0, order: str = "shuffled"
) -> TokenWindows:
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    return draw_mixture(tokenizer, mixture, samples=samples, length=length, seed=seed, order=order)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.integers(100, 400))
def test_windows_by_share_add_up_and_are_next_to_exact(weights: list[int], samples: int) -> None:
    sources = [MixedSource(str(index), weight / sum(weights)) for index, weight in enumerate(weights)]
    try:
        counts = windows_by_share(sources, samples)
    except DatasetError as error:
        assert "is none of" in str(error)
        return
    assert sum(counts) == samples
    assert all(abs(count - source.share * samples) < 1 for count, source in zip(counts, sources, strict=True))


def test_each_source_gives_what_it_would_alone(tmp_path: Path) -> None:
    mixture = mix((PROSE, 0.6, "default"), (CHATS, 0.4, "default"))
    found = drawn(mixture)
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    alone = [draw_windows(tokenizer, text, samples=count, length=16) for text, count in ((PROSE, 12), (CHATS, 8))]
    expected = {tuple(window[0].tolist()) for part in alone for window in part.windows}
    assert {tuple(window[0].tolist()) for window in found.windows} == expected
    assert [(one.dataset, one.samples, one.tokens) for one in found.sources] == [
        ("prose:train", 12, 192),
        ("chats:train", 8, 128),
    ]
    assert found.dataset == "60 % prose:train + 40 % chats:train" and found.drawn == found.requested == 20
    assert drawn(mixture).digest == found.digest != drawn(mixture, seed=1).digest
    ordered = drawn(mixture, order="sequential")
    texts = ["".join(map(chr, window[0].tolist())) for window in ordered.windows]
    assert len(texts) == 20 and ordered.digest != found.digest


def test_conversations_through_a_template_or_as_text() -> None:
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)

    def text(template: str) -> str:
        windows = draw_windows(tokenizer, CHATS, samples=4, length=64, order="sequential", template=template)
        return str(tokenizer.decode([int(token) for window in windows.windows for token in window[0]]))

    assert text("default").startswith("<|user|>question 0<|model|>answer")
    assert text("none").startswith("question 0\n\nanswer")
    with pytest.raises(DatasetError, match="the model's chat templates are default; none is called 'tools'"):
        text("tools")


def test_what_does_not_come_out_is_named() -> None:
    with pytest.raises(DatasetError, match=r"the shares 60 % \+ 30 % add up to 90 %"):
        drawn(mix((PROSE, 0.6, "default"), (CHATS, 0.3, "default")))
    with pytest.raises(DatasetError, match=r"1 % of 20 windows is none of chats:train; draw more windows"):
        drawn(mix((PROSE, 0.99, "default"), (CHATS, 0.01, "default")))
    with pytest.raises(DatasetError, match="prose:train and prose:train are the same text"):
        drawn(mix((PROSE, 0.5, "default"), (PROSE, 0.5, "default")))
    with pytest.raises(DatasetError, match="holds text and no conversations, which template 'tools' could render"):
        drawn(mix((PROSE, 1, "tools")))
    with pytest.raises(DatasetError, match=r"prose:train fills 3 windows of 512 tokens, and its 80 % are 4"):
        drawn(mix((PROSE, 0.8, "default"), (CHATS, 0.2, "default")), samples=5, length=512)
    calibration, evaluation = (
        drawn(mix((PROSE, 0.5, "default"), (CHATS, 0.5, "default"))),
        drawn(mix((CHATS, 1, "none"))),
    )
    for one in (PROSE, CHATS):
        with pytest.raises(DatasetError, match="calibration and evaluation use the same text"):
            alone = draw_windows(byte_tokenizer(chat_template=CHAT_TEMPLATE), one, samples=4, length=16)
            check_disjoint(calibration, alone)
    assert evaluation.texts == (("chats:train", "chats"),)


def recipe(mixture: object, **more: object) -> Recipe:
    quantize = {"method": "gptq", "scheme": "w4a16-g32"}
    return make_recipe({"model": "m", "quantize": quantize, "calibrate": {"dataset": mixture, "samples": 10}, **more})


def test_recipes_name_what_is_wrong() -> None:
    halves: list[dict[str, object]] = [{"name": "a.txt", "share": "50%"}, {"name": "b.txt", "share": 0.5}]
    assert recipe(halves).calibrate is not None and recipe(halves).to_mapping()["calibrate"]["dataset"][1] == {
        "name": "b.txt",
        "share": "50%",
        "template": "default",
    }
    for wrong, message in (
        ([{"name": "a.txt", "share": "50%"}], "add up to 50 %"),
        ([*halves[:1], *halves[:1]], "a.txt is there twice"),
        ([{"name": "a.txt", "share": 0}, {"name": "b.txt", "share": 1}], r"calibrate\.dataset\.0\.share: found 0: "),
        ([], r"calibrate\.dataset: found a list"),
        ({"a.txt": 0.5, "b.txt": 0.5}, r"calibrate\.dataset: found a section: expected a name, or a list of sections"),
        ([{"name": "a.txt", "share": 1, "template": None}], r"0\.template: found nothing: should be a valid string"),
        (["a.txt"], r"calibrate\.dataset\.0: found 'a.txt': should be .* for example \{name: a\.txt, share: 60%\}"),
        (
            [{"name": "a.txt", "weight": 1}],
            r"unknown key calibrate\.dataset\.0\.weight; .*\n.*dataset\.0\.share is missing",
        ),
    ):
        with pytest.raises(RecipeError, match=message) as told:
            recipe(wrong)
        assert "function-" not in str(told.value)
    with pytest.raises(RecipeError, match="a score on the calibration text flatters"):
        recipe(halves, validate={"perplexity": {"dataset": "b.txt"}})


def test_the_command_takes_shares() -> None:
    @click.command()
    @calibration_option("Text")
    def command(calibration: object) -> None:
        click.echo(json.dumps(calibration))

    def said(*values: str) -> str:
        return CliRunner().invoke(command, [part for value in values for part in ("--calibration", value)]).output

    assert json.loads(said()) is None and json.loads(said("a=b.txt")) == "a=b.txt"
    assert json.loads(said("a.txt=60%", "org/b:train=.4")) == {"a.txt": "60%", "org/b:train": ".4"}
    assert "'b.txt' has no share" in said("a.txt=60%", "b.txt")
    assert "'a.txt' is there twice" in said("a.txt=60%", "a.txt=40%")


def test_counts_are_in_report_and_card(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} thing after another and so it goes on. " * 60)
    shares: dict[str, float | str] = {str(tmp_path / "one.txt"): "75%", str(tmp_path / "two.txt"): 0.25}
    quantize_model(
        tiny_llama, tmp_path / "w4", scheme="w4a16-g32", method="gptq", calibration=shares, samples=8, length=32
    )
    info = Report.read(tmp_path / "w4" / "llmconvert/report.json").model
    assert [(one.dataset, one.samples, one.tokens) for one in info.calibration_sources] == [
        ("one.txt", 6, 192),
        ("two.txt", 2, 64),
    ]
    assert info.calibration == "one.txt (6) and two.txt (2), 8 × 32 tokens"
    assert "Calibrated on one.txt (6) and two.txt (2), 8 × 32 tokens." in (tmp_path / "w4" / "README.md").read_text()
    resolved = yaml.safe_load((tmp_path / "w4" / "llmconvert/recipe.yaml").read_text())
    assert resolved["calibrate"]["dataset"][0] == {"name": "one.txt", "share": "75%", "template": "default"}
