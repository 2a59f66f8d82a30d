"""Which model types mlx-lm loads as they are written here: a tiny checkpoint of each is quantized and run by both.

    python bench/mlx_families.py --python ENV/bin/python [--only TYPE …] [--work DIR]

ENV has ``pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2``. Every model type that both transformers and mlx-lm know gets
a random checkpoint in float32, which is rounded to ``w4a16-g32-affine``, embedding and head included. mlx-lm loads it,
and its logits must be those of our engine. What passes is ``SEEN`` in ``quantize/formats/mlx/model_types.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.tiny_checkpoints import FIRST_TEXT_TOKEN, VOCABULARY, save_tiny_checkpoint

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import LlmconvertError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.formats.mlx.model_types import KNOWN
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

SCHEME = Scheme.parse("w4a16-g32-affine")
# Norm of the difference of the logits by theirs; approximations of GELU differ by less.
TOLERANCE = 1e-3
_THEIRS = """
import sys, numpy as np, mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
model, _ = load_model(Path(sys.argv[1]))
logits = model(mx.array(np.load(sys.argv[2])))
np.save(sys.argv[3], np.array(logits.astype(mx.float32)))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", required=True)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = options.work or Path(directory)
        work.mkdir(parents=True, exist_ok=True)
        for kind in sorted(KNOWN & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()):
            if options.only is None or kind in options.only:
                print(f"{kind:24} {examine(kind, work / kind, options.python)}", flush=True)


def examine(model_type: str, directory: Path, python: str) -> str:
    """``works``, or what was in the way."""
    directory.mkdir()
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        save_tiny_checkpoint(directory / "model", model_type, named if isinstance(named, str) else named[0])
        source = SafetensorsCheckpoint(directory / "model")
        quantize_checkpoint(source, directory / "mlx", method="rtn", scheme=SCHEME, format="mlx")
        view = open_dense(SafetensorsCheckpoint(directory / "mlx"))
        ids = torch.randint(FIRST_TEXT_TOKEN, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
        ours = next(stream_logits(view, [ids], device=torch.device("cpu"))).float().numpy()
    except LlmconvertError as error:
        return f"refused: {error}"
    except Exception as error:  # of transformers, which can't build some
        return f"not built: {type(error).__name__}: {error}".partition("\n")[0]
    np.save(directory / "ids.npy", ids.numpy())
    command = [python, "-c", _THEIRS, *(str(directory / name) for name in ("mlx", "ids.npy", "theirs.npy"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}").splitlines()
        return f"mlx-lm fails: {said[-1][:150]}"
    theirs = np.load(directory / "theirs.npy")
    distance = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    return "works" if distance < TOLERANCE else f"differs by {distance:.2g}"


if __name__ == "__main__":
    main()
