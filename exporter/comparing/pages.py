"""The difference of two exports as a Markdown text and as an HTML page.

Must not know: how differences are found, terminals.
"""

from __future__ import annotations

from pathlib import Path

import jinja2

from exporter.reporting.difference import Difference
from exporter.reporting.difference_tables import Section, sections, summary
from exporter.reporting.markdown import escaped, markdown_table
from exporter.reporting.templates import environment

__all__ = ["html_page", "markdown_page"]


def markdown_page(found: Difference) -> str:
    """Return the comparison in GitHub's Markdown."""
    title = f"# {escaped(Path(found.before).name)} → {escaped(Path(found.after).name)}"
    sentences = "\n".join(f"- {escaped(sentence)}" for sentence in summary(found))
    return "\n\n".join([title, sentences, *map(_section, sections(found))]) + "\n"


def html_page(found: Difference) -> str:
    """Return the comparison as one HTML file without a script."""
    pages = environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return pages.get_template("compare.html.j2").render(
        before=Path(found.before).name,
        after=Path(found.after).name,
        summary=summary(found),
        sections=sections(found),
        verdict=found.verdicts[1],
    )


def _section(section: Section) -> str:
    more = f"\n\n{section.more} more are in the JSON." if section.more else ""
    return f"## {section.title}\n\n{markdown_table(section.columns, section.rows)}{more}"
