"""The picture of the ladder: a model from float32 to fewer key-value heads and 4 bits, on one page.

::

    python bench/ladder.py "bf16=DIR:REPORT" "GQA=DIR:REPORT" "GQA + W4=DIR:REPORT" --picture docs/ladder.png

``DIR`` is a model's directory, ``REPORT`` what ``llmconvert validate DIR --text … --json REPORT`` wrote about it. The
first is also shown in float32, by its number of weights; nobody measured that one's perplexity.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measured import markdown_table

from llmconvert.convert.kv_cache import cache_layout
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.report.report import Report
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.long_inputs.ladder import Rung, memory_needs, rungs_section
from llmconvert.validate.render.display import section_table
from llmconvert.validate.render.section_plot import section_plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rungs", nargs="+", metavar="LABEL=DIR:REPORT")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    rungs: list[Rung] = []
    for text in options.rungs:
        label, _, rest = text.partition("=")
        directory, _, report = rest.rpartition(":")
        check = Report.read(Path(report)).check("perplexity")
        with SafetensorsCheckpoint(Path(directory)) as stored:
            layout = cache_layout(Architecture.of(stored.config))
            if not rungs:
                weights = memory_needs(open_dense(stored))[0].weight_bytes
                rungs.append(Rung("float32", weights, layout.nbytes(options.context, 1, 4), None))
            quality = check.value if check is not None else None
            rungs.append(Rung(label, stored.nbytes, layout.nbytes(options.context), quality))
    section = rungs_section("memory-ladder", rungs, options.context)
    picture = section_plot(section, "png")
    assert picture is not None
    options.picture.write_bytes(picture)
    table = section_table(section)
    print(markdown_table(table.headings, table.rows))


if __name__ == "__main__":
    main()
