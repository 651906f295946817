"""`make bench`: what tapes costs beside other libraries, as ratios of one interleaved run.

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

What recording costs compared with other libraries, and which budgets are held. `make bench` writes this page.
This run: {python}, {cores} cores, {versions}.

{summary}

## Budgets

{budgets}
**How to read it.** *Folding* is deferred work: it turns recorded values into counts and bins, in batches.
All figures of a table come from one run in which the libraries take turns. They are medians of ratios to
an empty method call that is measured beside each, so compare ratios; the nanoseconds are for orientation.
`benchmarks/measure.py` describes the method.

## The hot path

![nanoseconds per call](benchmarks.svg)

Nanoseconds per call of one thread, folding included. The ratio to prometheus_client is in brackets.
ddsketch is the sketch alone and isn't safe from several threads. promrs is written in Rust, works for one
process, and needs CPython 3.12 or later.

{hot}
## Adapters

What a middleware adds to a request, measured in one process. The other column is a middleware written by
hand over prometheus_client, with a counter and a histogram.

{adapters}
Under gunicorn with 4 workers of 4 threads, compared with the same application without metrics:

{under_gunicorn}
## Threads

Nanoseconds per call over all threads.

{threads}
## Folding and reading

{works}
## Writing for Prometheus

Time to write all values as text and as OpenMetrics: with nothing new, and after every series was recorded
into (folding included). The ratio to prometheus_client with the same names, labels, values and buckets is
in brackets.

{rendering}
## Many processes

Time from an event in one worker until another worker's `/metrics` shows it, with default settings:

{visibility}
Processor time of the worker that is asked, over all its threads. The aggregator writes the answer. All
series are counters, which have one line each.

{scraping}
[How far one aggregator goes](scale.md) has the costs of the aggregator.

## Memory

{memory}
## Import

{imports}
## Quantiles

The worst relative error of p50, p75, p90, p95, p98, p99 and p99.9 of 100,000 values.

{quantiles}"""


def summary(budgets: list[list[str]]) -> str:
    """Return which budgets are not held, for the head of the page."""
    missed = [
        f"\n- {what}: {measured}, budget {budget}"
        for what, measured, budget, held in budgets
        if held != "yes"
    ]
    if not missed:
        return f"All {len(budgets)} budgets are held."
    return f"{len(missed)} of {len(budgets)} budgets are not held (figures are rounded):\n{''.join(missed)}"


def main() -> None:
    figures, rows = hot_path()
    rows = [*calls_alone(), *rows, *connected()]
    sections: dict[str, str] = {"hot": hot_table(figures)}
    heads = {
        "adapters": ["added to a request", "tapes", "hand-written prometheus_client"],
        "under_gunicorn": ["recorded", "requests per second", "processor time per request"],
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
    sections["summary"] = summary(budgets)
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
