"""What comparing an artifact with its original takes, against what is stated, where logits are most of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.peak import on_linux, peak
from support.tiny_models import tiny_llama_dir, tiny_tokenizer

PROGRAM = """
import sys
from pathlib import Path
import torch
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.artifact import plan_validation
from llmconvert.validate.predictions.quality import QualityCheck

original, artifact = map(Path, sys.argv[1:])
generator = torch.Generator().manual_seed(0)
windows = tuple(torch.randint(32_000, (1, 4096), generator=generator) for _ in range(3))
text = TokenWindows(windows, 3, 12_288, "text", "", "", False, 4096)
with SafetensorsCheckpoint(original) as reference:
    plan = plan_validation(artifact, [QualityCheck()], reference=reference, windows=text)
    assert all(check.ok for check in plan.run())
print(plan.needs.memory)
"""


@pytest.mark.slow
@on_linux
def test_logits_of_long_windows_are_stated(tmp_path: Path) -> None:
    """Freed memory that is kept meanwhile is none that they could take up."""
    directories = [tmp_path / "original", tmp_path / "artifact"]
    for seed, directory in enumerate(directories):
        tiny_llama_dir(
            directory,
            seed=seed,
            dtype=torch.bfloat16,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=4,
            max_position_embeddings=4096,
            vocab_size=32_000,
            tokenizer=False,
        )
        tiny_tokenizer().save_pretrained(directory)
    stated, used = peak(PROGRAM, *map(str, directories))
    assert 0.6 * stated < used < 1.03 * stated, (stated, used)
