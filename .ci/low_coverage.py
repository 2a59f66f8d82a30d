"""Lists the files that the last `make coverage` saw less than 90 % of, from what `pytest --cov` wrote.

python .ci/low_coverage.py
"""

from __future__ import annotations

import os
import sys

import click
import coverage

WANTED = 90


def main() -> None:
    measured = coverage.Coverage()
    measured.load()
    files = measured.get_data().measured_files()
    if not files:
        sys.exit("nothing was measured; run `make coverage`")
    low = []
    for file in files:
        _, statements, _, missing, _ = measured.analysis2(file)
        seen = 100 * (1 - len(missing) / len(statements)) if statements else 100.0
        if seen < WANTED:
            low.append((seen, os.path.relpath(file), len(missing)))
    for seen, path, missing_lines in sorted(low):
        click.echo(f"{seen:5.1f} %  {path}: {missing_lines} lines that no test runs")
    if not low:
        click.echo(f"every file is run by tests to {WANTED} % or more")


if __name__ == "__main__":
    main()
