"""What the HTML pages share: one style, and one file that loads nothing.

A page holds everything it shows, so it opens from disk and can be sent around: no script, no
address outside, and a policy that forbids the browser to load either. What comes from a model or a
file is text of unknown origin, hence escaped by whoever puts it in.
"""

from collections.abc import Collection, Iterable, Sequence
from html import escape

from salience.reports import plots

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1d2025; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 8px 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 4px; }
h3 { font-size: 1rem; margin: 24px 0 4px; }
p { margin: 4px 0 12px; max-width: 75ch; color: var(--muted); overflow-wrap: anywhere; }
code { font-size: .9em; overflow-wrap: anywhere; }
.tiles, .plots { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin: 16px 0; }
.tiles div { background: var(--card); border-radius: 8px; padding: 10px 14px; }
.tiles b { display: block; font-size: 1.4rem; }
.tiles span, figcaption, .key { font-size: .875rem; color: var(--muted); }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
figure { margin: 0; min-width: 0; background: var(--card); border-radius: 8px; padding: 8px 10px; }
figcaption { overflow-wrap: anywhere; margin-bottom: 4px; }
figcaption b { color: var(--ink); }
.key span { display: inline-flex; align-items: center; gap: 8px; margin-right: 20px; }
.key svg { width: 28px; height: 12px; flex: none; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 500; }
.wide td, .wide th { white-space: nowrap; }
.number { text-align: right; }
.facts { width: 100%; }
.facts th { width: 11rem; }
.facts td { overflow-wrap: anywhere; }
@media (max-width: 500px) { .facts th { width: 7rem; } }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: escaped.
        body: HTML.
        style: CSS of its own.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{plots.STYLE}{STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def figure(title: str, svg: str, note: str = "") -> str:
    """A plot with its caption."""
    note = f" {escape(note)}" if note else ""
    return f"<figure><figcaption><b>{escape(title)}</b>{note}</figcaption>{svg}</figure>"


def figures(parts: Iterable[str]) -> str:
    """Plots beside each other, as many as fit."""
    return f'<div class="plots">{"".join(parts)}</div>'


def table(names: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int]) -> str:
    """A table of cells that are HTML already; it scrolls by itself where it is too wide."""
    kinds = [' class="number"' if i in numbers else "" for i in range(len(names))]
    head = "".join(f'<th scope="col"{k}>{name}</th>' for k, name in zip(kinds, names, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{k}>{cell}</td>' for k, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def seconds(value: float) -> str:
    """Seconds for people."""
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
