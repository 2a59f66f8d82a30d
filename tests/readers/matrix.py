"""Write what the readers' tests have seen into ``runtimes.json`` and README's table.

    python tests/readers/matrix.py SEEN.json

``SEEN.json`` is what the tests leave where ``LLMCONVERT_SEEN`` says: the rows of which every scheme passed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from llmconvert.quantize.runtimes import RUNTIMES, Run, markdown_table

ROOT = Path(__file__).parent.parent.parent
TABLE = re.compile(r"(?<=<!-- runtimes -->\n).*?(?=\n<!-- /runtimes -->)", re.DOTALL)


def main(seen: Path) -> None:
    """Rows that were not run this time keep their date."""
    path = ROOT / "quantize" / "runtimes.json"
    runs = json.loads(path.read_text()) | json.loads(seen.read_text())
    path.write_text(json.dumps({runtime.key: runs[runtime.key] for runtime in RUNTIMES}, indent=2) + "\n")
    table = markdown_table({key: Run(**run) for key, run in runs.items()})
    readme = ROOT / "README.md"
    readme.write_text(TABLE.sub(lambda _: table, readme.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
