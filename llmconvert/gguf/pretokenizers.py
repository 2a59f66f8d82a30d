"""Pre-tokenizers of byte-level BPE, by the value of ``tokenizer.ggml.pre``.

A vocabulary's merges are only right on the pieces they were learned on. The names are llama.cpp's
(``llama-vocab.cpp``); the patterns are those of the models' own ``tokenizer.json``, which llama.cpp rewords.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tokenizers import Regex, pre_tokenizers

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.header import shown

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "UnknownTokenizerError", "find_pre_tokenizer"]


class UnknownTokenizerError(UnsupportedError):
    """A kind of tokenizer, or a way to split, that is not known. The weights can be read without it."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to split.

    Attributes:
        patterns: applied one after the other, each to the pieces the one before left; matches and what lies between
            them both become pieces.
        whole_words: a piece that is a token itself becomes that token, whatever the merges say.
        add_bos: what llama.cpp does when the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The ``tokenizers`` object, mapping bytes to GPT-2's printable characters at the end."""
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDING = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = _CONTRACTIONS + "|" + _LETTERS + r"|\p{N}{1,3}" + _SYMBOLS + _ENDING
_QWEN2 = _CONTRACTIONS + "|" + _LETTERS + r"|\p{N}" + _SYMBOLS + _ENDING
# Words split where lower case is followed by upper case: o200k and its descendants.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = "|".join(_CASED) + r"|\p{N}" + _PATHS + _ENDING
_O200K = "|".join(pattern + _CONTRACTIONS + "?" for pattern in _CASED) + r"|\p{N}{1,3}" + _PATHS + _ENDING

_GPT2_SPLIT = PreTokenizer((_GPT2,))
_DIGITS_SPLIT = PreTokenizer((r"\p{N}", _GPT2))
_QWEN2_SPLIT = PreTokenizer((_QWEN2,))
_LLAMA3_SPLIT = PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)
_LLAMA3_PLAIN = PreTokenizer((_LLAMA3,))
_O200K_SPLIT = PreTokenizer((_O200K,))
_DEFAULT_SPLIT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))

PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = {
    # llama.cpp's fallback, also for files from before the key existed.
    "default": _DEFAULT_SPLIT,
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "exaone4"), _GPT2_SPLIT
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS_SPLIT
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0"), _LLAMA3_SPLIT),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _LLAMA3_PLAIN),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan", "solar-open", "grok-2"), _QWEN2_SPLIT
    ),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _O200K_SPLIT),
}


def find_pre_tokenizer(name: str, where: str) -> PreTokenizer:
    """The pre-tokenizer called ``name`` in a file.

    Raises:
        UnknownTokenizerError: none is; ``where`` names the file.
    """
    if name not in PRE_TOKENIZERS:
        raise UnknownTokenizerError(
            f"{where}: tokenizer.ggml.pre is {shown(name)}, and without its splitting rule the tokens would be wrong; "
            f"supported are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]
