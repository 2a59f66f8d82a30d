"""Datasets and token windows: what is loaded, how it is cut, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer

from llmconvert.errors import DatasetError
from llmconvert.text.datasets import Corpus, load_dataset_text, require_dataset
from llmconvert.text.tokens import Overlap, TokenWindows, check_disjoint, draw_windows
from llmconvert.text.topics import split_topics, topics_text


def corpus(*documents: Any, name: str = "made:up", digest: str | None = None) -> Corpus:
    return Corpus(name, documents, digest or f"digest of {name}")


def windows_of(ids: np.ndarray, length: int, name: str) -> TokenWindows:
    cut = tuple(torch.from_numpy(ids[i : i + length]).unsqueeze(0) for i in range(0, len(ids) - length + 1, length))
    return TokenWindows(cut, len(cut), len(ids), name, f"digest of {name}", f"ids of {name}", False, length)


def paragraphs(text: str) -> set[str]:
    return {re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text)}


def test_topics_splits_share_no_paragraph() -> None:
    train, test = topics_text("train"), topics_text("test")
    assert not {part for part in paragraphs(train) & paragraphs(test) if len(part) >= 60}
    # Enough for 32 windows of 512 tokens and 16 of 2,048 at four characters per token.
    assert len(train) > 32 * 512 * 4 and len(test) > 16 * 2048 * 4
    assert load_dataset_text("pydoc-topics:test") == load_dataset_text("pydoc-topics:test")


def test_topics_that_only_repeat_others_are_left_out() -> None:
    sentence = {name: f"A paragraph about {name}, which is long enough to be told from a heading." for name in "abcd"}
    topics = {
        "whole": f"{sentence['a']}\n\n{sentence['b']}",
        "part": sentence["a"],
        "related": f"{sentence['b']}\n\n{sentence['c']}",
        "other": sentence["d"],
    }
    assert split_topics(topics) == {"train": ["related", "whole"], "test": ["other"]}


@pytest.mark.parametrize("name", ["pydoc-topics", "pydoc-topics:validation"])
def test_topics_need_a_split(name: str) -> None:
    with pytest.raises(DatasetError, match=r"pydoc-topics:train or pydoc-topics:test"):
        load_dataset_text(name)


def test_files(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("Grüße")
    assert load_dataset_text(str(text)).documents == ("Grüße",)
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "Hi"}]
    chats.write_text(json.dumps({"messages": messages, "id": 3}) + "\n\n" + json.dumps({"text": "plain"}) + "\n")
    assert load_dataset_text(str(chats)).documents == (messages, "plain")


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_are_no_text(tmp_path: Path, end: str) -> None:
    """The same text from another system gives the same tokens, and is known for the same text."""
    lines = ["", " = Robert Boulter = ", "", " Robert is an actor . ", "\u2028 no line end \x0b\x0c\x85"]
    plain, foreign = tmp_path / "plain.txt", tmp_path / "foreign.txt"
    plain.write_bytes("\n".join(lines).encode())
    foreign.write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
    one, other = load_dataset_text(str(plain)), load_dataset_text(str(foreign))
    assert one.documents == other.documents == ("\n".join(lines),)
    assert one.digest == other.digest
    tokenizer = byte_tokenizer()
    first, second = (draw_windows(tokenizer, text, samples=4, length=8, order="sequential") for text in (one, other))
    assert first.digest == second.digest
    with pytest.raises(DatasetError, match="the same text"):
        check_disjoint(first, second)


def test_the_text_is_that_of_the_datasets_library(tmp_path: Path) -> None:
    """What Hugging Face's loader of text files makes of carriage returns, document by document."""
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\n\r\ntwo \rthree\nfour")
    rows = datasets.load_dataset(
        "text", data_files=str(path), split="train", sample_by="document", cache_dir=str(tmp_path / "cache")
    )
    assert load_dataset_text(str(path)).documents == tuple(rows["text"])


def test_lines_of_json_keep_what_their_strings_hold(tmp_path: Path) -> None:
    """A line ends at a line end; separators inside a string, escaped or not, are the author's."""
    texts = ["one\r\ntwo", "a\u2028b\x85c", "end"]
    path = tmp_path / "texts.jsonl"
    path.write_bytes("\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode())
    assert load_dataset_text(str(path)).documents == tuple(texts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/dev/zero", "is a device"),
        ("./" + "n" * 300, "cannot be read: File name too long"),
        ("./a\0b", "cannot be read"),
        ("~no-such-user-here/text.txt", "cannot be read"),
        ("./", "is a directory"),
    ],
)
def test_what_is_no_file_costs_nothing(name: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_dataset_text(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot be read"),
        ("nested.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("empty.txt", b"  \n", "no text"),
        ("latin.txt", b"caf\xe9", "byte 3 is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
        ("list.jsonl", b"[1]", "line 1: a JSON list"),
        ("fields.jsonl", b'{"content": "a"}', r"found fields \['content'\]"),
        ("messages.jsonl", b'{"messages": ["a"]}', "'role' and 'content'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        load_dataset_text(str(path))
    assert str(path) in str(caught.value)


def test_hub_datasets_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"pip install 'datasets>=3\.0'"):
        load_dataset_text("wikitext-2")
    with pytest.raises(DatasetError, match="neither a file nor a name"):
        load_dataset_text("what is this?")


def test_a_text_that_cannot_be_there_is_found_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_dataset("pydoc-topics:test")
    (tmp_path / "a.txt").write_text("a")
    require_dataset(str(tmp_path / "a.txt"))
    monkeypatch.setattr("llmconvert.text.datasets.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    for name, reason in (
        ("pydoc-topics:dev", "expected pydoc-topics:train"),
        ("./gone.txt", "no such file"),
        ("wikitext-2", r"pip install 'datasets>=3\.0'"),
    ):
        with pytest.raises(DatasetError, match=reason):
            require_dataset(name)


def test_hub_datasets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    class Rows(list[dict[str, Any]]):
        _fingerprint = "f"

        def __getitem__(self, key: Any) -> Any:
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def load_dataset(repo: str, config: str | None, *, split: str) -> Rows:
        asked.append((repo, config, split))
        if split == "none":
            raise ValueError("Unknown split")
        return Rows([{"text": "one"}, {"text": "two"}])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert load_dataset_text("wikitext-2").documents == ("one\n\ntwo",)
    assert list(load_dataset_text("org/name/en:validation").documents) == ["one", "two"]
    assert load_dataset_text("org/name").dataset == "org/name:train"
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("org/name", "en", "validation"),
        ("org/name", None, "train"),
    ]
    with pytest.raises(DatasetError, match="org/name:none: ValueError: Unknown split"):
        load_dataset_text("org/name:none")


def test_sequential_windows_are_the_text() -> None:
    tokenizer = byte_tokenizer()
    text = "abcdefghijklmnopqrstuvwxyz"
    drawn = draw_windows(tokenizer, corpus(text), samples=3, length=5, order="sequential")
    assert [tokenizer.decode(window[0]) for window in drawn.windows] == ["abcde", "fghij", "klmno"]
    assert (drawn.drawn, drawn.length, drawn.tokens_total, drawn.bos) == (3, 5, 26, False)
    everything = draw_windows(tokenizer, corpus(text), samples=None, length=5, order="sequential")
    assert (everything.drawn, everything.requested) == (5, 5)


@pytest.mark.parametrize("bos", [False, True])
def test_overlapping_windows_give_every_prediction_once(bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    text = "abcdefghijklmnopqrstuvwxyz"
    drawn = draw_windows(tokenizer, corpus(text), samples=None, length=6, stride=2, order="sequential")
    start = "<s>" if bos else ""
    shown = [tokenizer.decode(window[0]) for window in drawn.windows]
    assert shown[:3] == ([f"{start}abcde", f"{start}cdefg", f"{start}efghi"] if bos else ["abcdef", "cdefgh", "efghij"])
    assert drawn.scored == (5, *[2] * (drawn.drawn - 1)) and drawn.stride == 2
    scored = "".join(text[-count:] for text, count in zip(shown, drawn.scored, strict=True))
    assert scored == text[0 if bos else 1 :][: len(scored)] and len(scored) >= len(text) - 2
    few = draw_windows(tokenizer, corpus(text), samples=3, length=6, stride=2, order="sequential")
    assert few.drawn == 3 and all(map(torch.equal, few.windows, drawn.windows[:3]))
    apart = draw_windows(tokenizer, corpus(text), samples=None, length=6, order="sequential")
    assert apart.stride == 6 and set(apart.scored) == {5}
    for stride, order in ((0, "sequential"), (7, "sequential"), (2, "shuffled")):
        with pytest.raises(ValueError, match="stride"):
            draw_windows(tokenizer, corpus(text), samples=None, length=6, stride=stride, order=order)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=25)
@given(tokens=st.integers(8, 200), samples=st.integers(1, 30), length=st.integers(2, 8), seed=st.integers(0, 2**32))
def test_shuffled_windows_come_from_everywhere_once(tokens: int, samples: int, length: int, seed: int) -> None:
    text = "".join(chr(33 + i % 90) for i in range(tokens))
    tokenizer = byte_tokenizer()
    drawn = draw_windows(tokenizer, corpus(text), samples=samples, length=length, seed=seed)
    possible = [text[i : i + length] for i in range(0, tokens - length + 1, length)]
    found = [tokenizer.decode(window[0]) for window in drawn.windows]
    assert len(found) == drawn.drawn == min(samples, len(possible))
    for window in set(found):
        assert found.count(window) <= possible.count(window)
    again = draw_windows(tokenizer, corpus(text), samples=samples, length=length, seed=seed)
    assert again.digest == drawn.digest


def test_seed_and_order_matter() -> None:
    text = corpus("".join(map(chr, range(40, 120))))
    digests = {draw_windows(byte_tokenizer(), text, samples=4, length=4, seed=seed).digest for seed in range(4)}
    digests.add(draw_windows(byte_tokenizer(), text, samples=4, length=4, order="sequential").digest)
    assert len(digests) == 5


def test_every_window_starts_with_the_bos_that_the_tokenizer_adds() -> None:
    tokenizer = byte_tokenizer(bos=True)
    drawn = draw_windows(tokenizer, corpus("abcdefgh"), samples=2, length=4, order="sequential")
    assert drawn.bos
    assert [tokenizer.decode(window[0]) for window in drawn.windows] == ["<s>abc", "<s>def"]


def test_documents_are_packed_with_an_end_between() -> None:
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    drawn = draw_windows(tokenizer, corpus("ab", chat, "never read"), samples=1, length=20, order="sequential")
    assert tokenizer.decode(drawn.windows[0][0]) == "ab</s><|user|>hi<|assistant|>yo"[: 20 + 3]


def test_shuffled_documents_follow_the_seed() -> None:
    documents = corpus(*(chr(65 + i) * 4 for i in range(20)))
    firsts = {
        int(draw_windows(byte_tokenizer(), documents, samples=2, length=4, seed=seed).windows[0][0, 0])
        for seed in range(10)
    }
    assert len(firsts) > 3


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        (("short",), {"samples": 1, "length": 6}, "5 tokens of text don't fill one window of 6"),
        (("long enough",), {"samples": 1, "length": 4, "vocab_size": 10}, "belongs to another model"),
        (([{"role": "user", "content": "hi"}],), {"samples": 1, "length": 2}, "no chat template"),
    ],
)
def test_useless_text_is_refused(documents: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        draw_windows(byte_tokenizer(), corpus(*documents), **options)


def test_a_template_that_raises_is_named() -> None:
    tokenizer = byte_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DatasetError, match="roles must alternate"):
        draw_windows(tokenizer, corpus([{"role": "user", "content": "hi"}]), samples=1, length=2)


def test_evaluating_on_calibration_text_is_refused() -> None:
    ids = np.random.default_rng(0).integers(0, 1000, 1024)
    train = windows_of(ids, 128, "train")
    with pytest.raises(DatasetError, match="same text"):
        check_disjoint(train, windows_of(ids[::-1].copy(), 128, "train"))
    # 7 whole windows of 97 runs and 33 of the eighth, out of 929.
    with pytest.raises(DatasetError, match="77 % of the evaluation text was calibrated on"):
        check_disjoint(train, windows_of(ids[:960], 960, "copy"))


def test_overlap_is_measured() -> None:
    random = np.random.default_rng(1)
    ids, other = random.integers(0, 1000, 1024), random.integers(0, 1000, 1024)
    train = windows_of(ids, 128, "train")
    assert check_disjoint(train, windows_of(other, 128, "other")) == Overlap(0, 0.0)
    mixed = check_disjoint(train, windows_of(np.concatenate([ids[:128], other[:384]]), 128, "mixed"))
    assert (mixed.windows, mixed.fraction) == (1, 0.25)
