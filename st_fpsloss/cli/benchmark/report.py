"""The report of a benchmark: one Markdown file, and one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from st_fpsloss.cli.benchmark.charts import interval_chart, line_chart
from st_fpsloss.cli.benchmark.contenders import OURS
from st_fpsloss.cli.benchmark.measure import METRICS, Result
from st_fpsloss.cli.benchmark.verdict import METRIC, Verdict, best_of_others, difference, give_verdict, mean_of
from st_fpsloss.evaluation import bootstrap_interval
from st_fpsloss.utils.files import write_whole

_NAMES = {"ndcg@10": "NDCG@10", "hr@10": "HR@10", "recall@100": "recall@100"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #0f172a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
.verdict { border-left: 6px solid #64748b; background: #f1f5f9; padding: .8rem 1.2rem; border-radius: 4px }
.verdict.yes { border-color: #15803d } .verdict.no { border-color: #c2410c }
.verdict strong { font-size: 1.25rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e2e8f0; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #94a3b8 } tr.ours td { font-weight: 600 }
svg { display: block; width: 100%; max-width: 48rem; margin: 1rem 0 } .scroll { overflow-x: auto }
"""


@dataclass(frozen=True)
class Table:
    """Rows of texts under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(one.replace("|", "\\|") for one in line) + " |" for line in lines)

    def html(self) -> str:
        """As HTML."""
        head = "".join(f"<th>{escape(one)}</th>" for one in self.header)
        body = "".join(
            f"<tr{' class=ours' * (row[0] == OURS)}>{''.join(f'<td>{escape(one)}</td>' for one in row)}</tr>"
            for row in self.rows
        )
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Section:
    """A heading, and under it a text, a table, and, on the HTML page, a chart."""

    title: str
    text: str
    table: Table
    chart: str = ""


def write_report(folder: Path, facts: Mapping[str, Any], results: Sequence[Result]) -> Verdict:
    """Writes ``report.md`` and ``report.html``.

    Args:
        folder: Where they go.
        facts: What is said of the log and of the settings, name -> value.
        results: Of the contenders that are measured.

    Returns:
        The verdict that they give.
    """
    verdict = give_verdict(results)
    sections = [_ranking(results), _differences(results), _deciles(results)]
    sections += [section for section in (_cold(results), _cost(results), _facts(facts)) if section is not None]
    write_whole(folder / "report.md", _markdown(verdict, sections))
    write_whole(folder / "report.html", _html(verdict, sections))
    return verdict


def _ranking(results: Sequence[Result]) -> Section:
    """The metrics of all contenders, best first."""
    ranked = sorted(results, key=mean_of, reverse=True)
    rows = [
        [result["contender"], *(_interval(result["metrics"][metric]) for metric in METRICS), result["about"]]
        for result in ranked
    ]
    chart = interval_chart([(one["contender"], *_three(one["metrics"][METRIC])) for one in ranked], OURS)
    return Section(
        "How well each ranks",
        "Mean over the test's rankings, with its 95% bootstrap interval. Ties count against a contender. The chart "
        "shows NDCG@10.",
        Table(["contender", *_NAMES.values(), "what it is"], rows),
        chart,
    )


def _differences(results: Sequence[Result]) -> Section:
    """Each against the best baseline."""
    best = best_of_others(results) or results[0]
    others = [result for result in sorted(results, key=mean_of, reverse=True) if result is not best]
    rows = [
        [
            result["contender"],
            *(str(difference(result, best, metric)).replace("95% interval ", "") for metric in METRICS),
        ]
        for result in others
    ]
    points = [(result["contender"], difference(result, best)) for result in others]
    chart = interval_chart([(name, by.mean, by.low, by.high) for name, by in points], OURS, "{:+.3f}") if points else ""
    return Section(
        f"Difference from {best['contender']}, on the same queries",
        f"{best['contender']} is the best contender beside {OURS}. An interval that leaves out 0 says that the two "
        "differ. The chart shows NDCG@10.",
        Table(["contender", *_NAMES.values()], rows),
        chart,
    )


def _deciles(results: Sequence[Result]) -> Section:
    """Who finds what is rarely clicked."""
    found = sorted({int(decile) for result in results for decile in result["deciles"]})
    rows = [
        [
            result["contender"],
            *(f"{result['deciles'][str(decile)]:.3f}" if str(decile) in result["deciles"] else "-" for decile in found),
            f"{result['coverage@10']:.1%}",
        ]
        for result in results
    ]
    lines = {one["contender"]: [(float(d), one["deciles"][str(d)]) for d in found] for one in results}
    return Section(
        "By popularity",
        "NDCG@10 by the popularity of the clicked document: each decile is a tenth of the training clicks, 1 that of "
        "the many rarely clicked documents, 10 that of the few most clicked ones. Coverage is the share of all "
        "documents that stand among the first ten of any ranking.",
        Table(["contender", *map(str, found), "coverage@10"], rows),
        line_chart(lines, OURS, "popularity decile of the clicked document", "NDCG@10", ticks_at_points=True),
    )


def _cold(results: Sequence[Result]) -> Section | None:
    """Documents that training never saw."""
    measured = [result for result in results if result["cold"]]
    if not measured:
        return None
    count = len(measured[0]["cold"]["ndcg@10"])
    return Section(
        "Cold documents",
        f"The {count} rankings whose clicked documents include some without a click in training; these alone count as "
        "relevant. Contenders that know documents by their ids cannot rank them.",
        Table(
            ["contender", "NDCG@10", "recall@100"],
            [
                [one["contender"], *(_interval(one["cold"][metric]) for metric in ("ndcg@10", "recall@100"))]
                for one in measured
            ],
        ),
    )


def _cost(results: Sequence[Result]) -> Section:
    """Seconds, what was chosen, and the learning curves."""
    rows = [
        [
            result["contender"],
            f"{result['seconds']['learning']:.1f}",
            f"{result['seconds']['ranking']:.1f}",
            ", ".join(f"{name} {value}" for name, value in result["settings"].items()),
        ]
        for result in results
    ]
    curves = {result["contender"]: [tuple(point) for point in result["curve"]] for result in results if result["curve"]}
    chart = (
        line_chart(curves, OURS, "seconds of training", "NDCG@10 on validation", ticks_at_points=False)
        if curves
        else ""
    )
    return Section(
        "Cost",
        "Seconds to learn (the choice of settings included, evaluations in training not) and to rank the test. "
        "Settings and the best moment of a training are chosen by NDCG@10 on the validation.",
        Table(["contender", "learning", "ranking", "chosen or learned"], rows),
        chart,
    )


def _facts(facts: Mapping[str, Any]) -> Section:
    rows = [[name, f"{value:,}" if isinstance(value, int) else str(value)] for name, value in facts.items()]
    return Section("The log and the protocol", "Figures of another protocol do not compare.", Table(["", ""], rows))


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    return (float(np.mean(values)), *bootstrap_interval(values))


def _interval(values: Sequence[float]) -> str:
    mean, low, high = _three(values)
    return f"{mean:.4f} ({low:.4f} to {high:.4f})"


def _markdown(verdict: Verdict, sections: Sequence[Section]) -> str:
    parts = ["# Is it worth it on this log?", f"**{verdict.headline}**", " ".join(verdict.sentences)]
    for section in sections:
        parts += [f"## {section.title}", section.text, section.table.markdown()]
    return "\n\n".join(filter(None, parts)) + "\n"


def _html(verdict: Verdict, sections: Sequence[Section]) -> str:
    kind = {True: "yes", False: "no", None: ""}[verdict.worth]
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict.sentences)
    body = "".join(
        f"<h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>{section.chart}{section.table.html()}"
        for section in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Is it worth it on this log?</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>Is it worth it on this log?</h1>"
        f'<div class="verdict {kind}"><strong>{escape(verdict.headline)}</strong>{sentences}</div>'
        f"{body}</body></html>\n"
    )
