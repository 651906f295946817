"""`make bench`: where tapes stands, beside its peers, as ratios of one interleaved run.

Writes docs/benchmarks.md and docs/benchmarks.svg. Takes about three minutes, on two cores.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from adapters import adapters, under_gunicorn
from contenders import ROWS
from measure import Figure
from questions import (
    BASE,
    calls_alone,
    hot_path,
    imports,
    memory,
    quantiles,
    threads,
    works,
)
from rendering import rendering
from service import connected, scraping, visibility

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def markdown(head: list[str], table: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def hot_table(figures: dict[tuple[str, str], Figure]) -> str:
    libraries = list(dict.fromkeys(library for library, _ in figures))
    table = []
    for row, what in ROWS.items():
        line = [what]
        for library in libraries:
            figure = figures.get((library, row))
            base = figures.get((BASE, row))
            text = "" if figure is None else f"{figure.nanoseconds:,.0f}"
            if figure is not None and base is not None and library != BASE:
                text += f" ({figure.empties / base.empties:.2f} ×)"
            line.append(text)
        table.append(line)
    return markdown(["nanoseconds", *libraries], table)


def picture(figures: dict[tuple[str, str], Figure]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tapes"
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    libraries = [one for one in dict.fromkeys(library for library, _ in figures) if one != "ddsketch"]
    rows = [row for row in ROWS if (BASE, row) in figures]
    plot, axes = pyplot.subplots(figsize=(8, 4.2))
    height = 0.8 / len(libraries)
    for number, library in enumerate(libraries):
        places = [place for place, row in enumerate(rows) if (library, row) in figures]
        widths = [figures[library, rows[place]].nanoseconds for place in places]
        axes.barh([place + number * height for place in places], widths, height * 0.9, label=library)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], [ROWS[row] for row in rows])
    axes.set_xscale("log")
    axes.set_xlabel("nanoseconds per call, folding included (less is better)")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.3, 1), ncols=len(libraries))
    axes.spines[["top", "right"]].set_visible(False)
    plot.tight_layout()
    plot.savefig(DOCS / "benchmarks.svg", metadata={"Date": None})


def versions() -> str:
    shown = []
    for package in ("prometheus-client", "opentelemetry-sdk", "pyformance", "ddsketch", "promrs"):
        with contextlib.suppress(PackageNotFoundError):
            shown.append(f"{package} {version(package)}")
    return ", ".join(shown)


TEXT = """\
# Benchmarks

Written by `make bench` on {python}, {cores} cores, beside {versions}.
All figures of a table come from one run in which the contenders take turns, and are medians of ratios to an
empty method call measured beside each; nanoseconds are for reading. `benchmarks/measure.py` says more.

## Budgets

{budgets}
## The hot path

![nanoseconds per call](benchmarks.svg)

One thread, folding included; in brackets the ratio to prometheus_client. ddsketch is the sketch alone, and
not safe from several threads; promrs is Rust, for one process, and runs on CPython 3.12 and later.

{hot}
## Adapters

What a middleware adds to a request, in process; the one beside it is written by hand over prometheus_client,
with a counter and a histogram.

{adapters}
Under gunicorn with 4 workers of 4 threads, over the same application without metrics:

{under_gunicorn}
## Threads

Nanoseconds per call over all threads.

{threads}
## Folding and reading

{works}
## Writing for Prometheus

All values as text and as OpenMetrics, as they stand, and after every series was recorded into, folding
included; in brackets the ratio to prometheus_client with the same names, labels, values and buckets.

{rendering}
## Many processes

From an event in one worker to an answer of another's `/metrics` that has it, at defaults:

{visibility}
What a scrape costs the worker that is asked, all its threads; the aggregator writes the answer. All series
are counters, of one line each.

{scraping}
How far one aggregator goes is told by [a page of its own](scale.md).

## Memory

{memory}
## Import

{imports}
## Quantiles

The worst relative error of p50, p75, p90, p95, p98, p99 and p99.9 of 100,000 values.

{quantiles}"""


def main() -> None:
    figures, rows = hot_path()
    rows = [*calls_alone(), *rows, *connected()]
    sections: dict[str, str] = {"hot": hot_table(figures)}
    heads = {
        "adapters": ["added to a request", "tapes", "hand-written prometheus_client"],
        "under_gunicorn": ["a request has", "requests a second", "processor time a request"],
        "threads": ["", "1", "2", "4", "8 threads"],
        "works": ["what", "time"],
        "rendering": ["", "text", "text, all recorded into", "OpenMetrics", "OpenMetrics, all recorded into"],
        "visibility": ["", "least", "median", "95 %", "worst"],
        "scraping": ["", "answer", "processor time, median", "mean"],
        "memory": ["what", "size"],
        "imports": ["what", "time"],
        "quantiles": ["values", "one sketch", "merged over 8"],
    }
    for section in (
        adapters, under_gunicorn, visibility, scraping, threads, works, rendering, memory, imports, quantiles,
    ):  # fmt: skip
        table, more = section()
        sections[section.__name__] = markdown(heads[section.__name__], table)
        rows += more
    budgets = [[row.what, row.measured, row.budget, "yes" if row.held else "**no**"] for row in rows]
    sections["budgets"] = markdown(["what", "measured", "budget", "held"], budgets)
    text = TEXT.format(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        cores=os.cpu_count(),
        versions=versions(),
        **sections,
    )
    (DOCS / "benchmarks.md").write_text(text)
    picture(figures)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
