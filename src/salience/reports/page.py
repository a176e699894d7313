"""A report as a page: one HTML file with plots, for those who would rather look than read.

The file holds everything it shows, so it opens from disk and can be sent around: no script, no
address outside, and a policy that forbids the browser to load either. Everything in the report is
text of unknown origin (module names come from the model), hence escaped.
"""

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import inf, isfinite, nan
from pathlib import Path
from statistics import median
from typing import Any

from salience.errors import SalienceError
from salience.reports import plots
from salience.reports.html import document, figure, figures, seconds, size, table
from salience.reports.report import LinearReport, Report

_MAX_PLOTS = 24  # of one sort; a report may name any number of kinds
_MAX_NAMES = 30
_WORST = 20


def write_page(report: Report, out: Path, force: bool = False) -> None:
    """Write the page of a report; the file appears whole or not at all.

    Args:
        out: the file.
        force: whether it may replace a file.

    Raises:
        SalienceError: the file exists and `force` is not set, it cannot be written, or matplotlib
            is not installed.
    """
    if out.is_dir():
        raise SalienceError(f"{out} is a folder; name a file with -o")
    if out.exists() and not force:
        raise SalienceError(f"{out} exists; pass --force to replace it, or name another with -o")
    # A lone surrogate, which JSON can hold, is no character of UTF-8.
    data = page(report).encode("utf-8", "replace")
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(data)
        os.replace(part, out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SalienceError(f"writing {out} failed: {error}") from None


def page(report: Report) -> str:
    """The whole page.

    Raises:
        SalienceError: matplotlib is not installed.
    """
    title = escape(f"{Path(report.model).name or report.model} {report.scheme}")
    body = f"""<h1>{title}</h1>
<p>What <code>salience quantize</code> did to {escape(report.model)}: method
{escape(report.method)}, effort {escape(report.effort)}, format {escape(report.format)}.</p>
{_tiles(report)}
{_errors(report)}
{_exponents(report)}
{_clips(report)}
{_costs(report)}
{_bits(report)}
{_worst(report)}
{_summary(report)}"""
    return document(f"{title} - salience report", body)


def _tiles(report: Report) -> str:
    kept = sum(linear.kept_rtn for linear in report.linears)
    tiles = {
        "plain rounding's output error": f"{_ratio(report.error, report.error_rtn)} \u00d7",
        "options": _pairs({k: v for k, v in report.options.items() if v and k != "scheme"})
        or "none",
        "bits a weight": f"{report.bits_per_weight:.2f}",
        "linears quantized": f"{len(report.linears)}",
        "linears that kept plain rounding": f"{kept}",
        "whole run": seconds(report.seconds),
        "most memory": size(report.peak_rss_bytes),
    }
    cells = (f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
    return f'<div class="tiles">{"".join(cells)}</div>'


def _errors(report: Report) -> str:
    head = (
        "<h2>Output error</h2><p>Mean squared error of each linear's output, relative to the "
        "output's energy, over the blocks; the mean where a block has several of a kind. The "
        "axis is logarithmic and the same in all plots; lower is better.</p>"
        + plots.key(["what was written", "plain rounding"])
    )
    depth = _depths(report.linears)
    series = {
        kind: (
            _over_blocks(depth, ((linear, linear.error) for linear in linears)),
            _over_blocks(depth, ((linear, linear.error_rtn) for linear in linears)),
        )
        for kind, linears in _kinds(report.linears).items()
    }
    limits = plots.shared_limits([values for pair in series.values() for values in pair])
    if limits is None:
        return head + "<p>There is no error to draw.</p>"
    return head + figures(
        figure(kind, plots.lines(f"output error of {kind}", pair, log=True, limits=limits))
        for kind, pair in series.items()
    )


def _exponents(report: Report) -> str:
    head = (
        "<h2>Scales</h2><p>A scale multiplies each input channel of the linears of a fold and "
        "divides what comes before. It is (activations)<sup>alpha</sup> / "
        "(weights)<sup>beta</sup>; both 0 is no scale at all.</p>"
    )
    depth = _depths(report.linears)
    at = {(depth[linear.name], _place(linear.name)[1]): linear for linear in report.linears}
    folds = list(dict.fromkeys((str(fold.get("prev")), _sinks(fold)) for fold in report.folds))
    drawn = []
    for prev, sinks in folds[:_MAX_PLOTS]:
        # All sinks of a fold have its scale, so any of them tells.
        first = {block: linear for (block, name), linear in at.items() if name in sinks}
        if first:
            pair = [
                [getattr(first[i], name) if i in first else nan for i in range(_count(depth))]
                for name in ("alpha", "beta")
            ]
            top = max([1.0, *(v for values in pair for v in values if v < 10)])
            label = f"alpha and beta of {prev} into {', '.join(sinks)}"
            svg = plots.lines(label, pair, limits=(-0.06, top + 0.06))
            drawn.append(figure(prev, svg, f"into {', '.join(sinks)}"))
    if not drawn:
        return head + "<p>No scale was folded into this model.</p>"
    return head + plots.key(["alpha", "beta"]) + figures(drawn)


def _clips(report: Report) -> str:
    head = (
        "<h2>Clipping</h2><p>The mean step of a linear's grid, relative to plain rounding's: "
        "below 1 its ranges were clipped.</p>"
    )
    clips = {
        kind: [linear.clip for linear in linears]
        for kind, linears in _kinds(report.linears).items()
    }
    depth = _depths(report.linears)
    blocks: list[list[float]] = [[] for _ in range(_count(depth))]
    for linear in report.linears:
        if isfinite(linear.clip):
            blocks[depth[linear.name]].append(linear.clip)
    if not any(blocks):
        return head + "<p>There is no ratio to draw.</p>"
    by_kind = plots.ranges("clip ratio of each kind of linear", "clip ratio", clips)
    middle = [median(values) if values else nan for values in blocks]
    low, high = ([end(v) if v else nan for v in blocks] for end in (min, max))
    over = plots.lines("clip ratio over the blocks", [middle], band=(low, high))
    return head + figures(
        [
            figure("By kind", by_kind, "smallest to largest; thick: middle half; dot: median"),
            figure("Over depth", over, "median of the block's linears; shaded: all of them"),
        ]
    )


def _costs(report: Report) -> str:
    head = "<h2>Time and memory</h2>"
    drawn = []
    if report.phase_seconds:
        label = "seconds of each phase"
        drawn.append(figure("Phases", plots.bars(label, "seconds", report.phase_seconds)))
    if report.blocks:
        times = [block.seconds for block in report.blocks]
        rss = [block.peak_rss_bytes / 2**30 for block in report.blocks]
        vram = [block.peak_vram_bytes / 2**30 for block in report.blocks]
        svg = plots.lines("seconds of each block", [times], limits=_from_zero(times))
        drawn.append(figure("Seconds of each block", svg))
        memory = {"Process": rss} | ({"GPU": vram} if any(vram) else {})
        for name, values in memory.items():
            label = f"{name} memory, GiB"
            svg = plots.lines(label, [values], limits=_from_zero(values))
            drawn.append(figure(label, svg, "most up to the end of the block"))
    else:
        head += "<p>This report has no times of its blocks.</p>"
    return head + figures(drawn)


def _bits(report: Report) -> str:
    """The bits that were chosen, and what each width would have cost."""
    groups = report.allocation.get("groups")
    counts = report.allocation.get("linears_of_bits")
    if not isinstance(groups, list) or not isinstance(counts, dict):
        return ""
    expected = report.allocation.get("expected_kl")
    head = (
        f"<h2>Bits of each linear</h2><p>At most {_cell(report.allocation.get('target_bits'))} "
        "stored bits a weight were asked for. The cost of a width is the divergence from the float "
        f"model that is expected of it, in nats a token; all together {_cell(expected)}.</p>"
    )
    numbers = {f"{k} bits": v for k, v in counts.items() if isinstance(v, int | float)}
    drawn = figure("Linears of each width", plots.bars("linears of each width", "linears", numbers))
    widths = sorted({str(bits) for each in groups for bits in _table(each, "costs")})
    rows = []
    for each in (each for each in groups if isinstance(each, dict)):
        linears, costs = each.get("linears"), _table(each, "costs")
        named = _listed(map(str, linears)) if isinstance(linears, list) else ""
        cells = [_cell(costs.get(bits, "-")) for bits in widths]
        rows.append([f"<code>{escape(named)}</code>", _cell(each.get("bits")), *cells])
    names = ["linears", "bits", *(f"cost of {escape(bits)}" for bits in widths)]
    return head + figures([drawn]) + table(names, rows, range(1, len(names)))


def _table(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _worst(report: Report) -> str:
    # What is not a number is worst of all.
    ranked = sorted(
        report.linears, key=lambda linear: -linear.error if isfinite(linear.error) else -inf
    )
    names = ["linear", "error", "of plain rounding", "ratio", "alpha", "beta", "clip"]
    names += ["in", "out", "scheme", "kept rounding"]
    rows = [
        [
            f"<code>{escape(linear.name)}</code>",
            f"{linear.error:.3g}",
            f"{linear.error_rtn:.3g}",
            _ratio(linear.error, linear.error_rtn),
            f"{linear.alpha:.2f}",
            f"{linear.beta:.2f}",
            f"{linear.clip:.3f}",
            str(linear.in_features),
            str(linear.out_features),
            escape(linear.scheme or report.scheme),
            "yes" if linear.kept_rtn else "no",
        ]
        for linear in ranked[:_WORST]
    ]
    return "<h2>Linears with the largest output error</h2>" + table(names, rows, range(1, 9))


def _summary(report: Report) -> str:
    schemes: dict[str, int] = {}
    for linear in report.linears:
        name = linear.scheme or report.scheme
        schemes[name] = schemes.get(name, 0) + 1
    text = report.calibration
    facts = {
        "model": report.model,
        "written to": report.out,
        "method": report.method,
        "effort": report.effort,
        "format": report.format,
        "scheme": _listed(f"{name} ({count} linears)" for name, count in schemes.items()),
        "bits a weight": f"{report.bits_per_weight:.4g}",
        "output error": f"{report.error:.3g}, plain rounding {report.error_rtn:.3g}",
        "calibration": _pairs(text) if text else "none",
        "device": report.device,
        "kept float": _listed(report.kept_modules) or "none",
        "time": seconds(report.seconds),
        "phases": _pairs({k: seconds(v) for k, v in report.phase_seconds.items()}) or "unknown",
        "most memory": size(report.peak_rss_bytes),
        "versions": _pairs(report.versions) or "unknown",
    }
    rows = (f'<tr><th scope="row">{k}</th><td>{escape(v)}</td></tr>' for k, v in facts.items())
    result = f'<h2>Summary</h2><table class="facts"><tbody>{"".join(rows)}</tbody></table>'
    if report.folds:
        names = ["folded into", "for", "rule", "channels", "error of the proof"]
        folds = [
            [
                f"<code>{_cell(fold.get('prev'))}</code>",
                f"<code>{_cell(_listed(_sinks(fold)))}</code>",
                *(_cell(fold.get(name)) for name in ("rule", "channels", "error")),
            ]
            for fold in report.folds
        ]
        result += "<h3>Folds found by experiment</h3>" + table(names, folds, range(3, 5))
    return result


def _place(name: str) -> tuple[str, str]:
    """A linear's block, which ends with the first number of its path, and its name in there."""
    parts = name.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[:end]), ".".join(parts[end:]) or name


def _depths(linears: Sequence[LinearReport]) -> dict[str, int]:
    """Each linear's block, counted from the first."""
    order: dict[str, int] = {}
    return {linear.name: order.setdefault(_place(linear.name)[0], len(order)) for linear in linears}


def _count(depth: Mapping[str, int]) -> int:
    return max(depth.values(), default=-1) + 1


def _kinds(linears: Sequence[LinearReport]) -> dict[str, list[LinearReport]]:
    """Linears by the last part of their names, the rarest kinds of too many together."""
    kinds: dict[str, list[LinearReport]] = {}
    for linear in linears:
        kinds.setdefault(linear.name.rpartition(".")[2], []).append(linear)
    if len(kinds) <= _MAX_PLOTS:
        return kinds
    common = sorted(kinds, key=lambda kind: len(kinds[kind]), reverse=True)[: _MAX_PLOTS - 1]
    rest = [linear for kind in kinds if kind not in common for linear in kinds[kind]]
    return {kind: kinds[kind] for kind in common} | {"all other kinds": rest}


def _over_blocks(
    depth: Mapping[str, int], values: Iterable[tuple[LinearReport, float]]
) -> list[float]:
    """The mean of each block, nan where it has none."""
    blocks: list[list[float]] = [[] for _ in range(_count(depth))]
    for linear, value in values:
        blocks[depth[linear.name]].append(value)
    return [sum(block) / len(block) if block else nan for block in blocks]


def _sinks(fold: Mapping[str, Any]) -> tuple[str, ...]:
    sinks = fold.get("sinks")
    return tuple(str(sink) for sink in sinks) if isinstance(sinks, list) else ()


def _from_zero(values: Sequence[float]) -> plots.Limits:
    top = max((value for value in values if isfinite(value) and value < 1e30), default=0.0)
    return (0.0, 1.1 * top if top > 0 else 1.0)


def _cell(value: Any) -> str:
    return escape(f"{value:.2g}" if isinstance(value, float) else str(value))


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _listed(values: Iterable[str]) -> str:
    names = list(values)
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _ratio(error: float, error_rtn: float) -> str:
    return f"{error / error_rtn:.2f}" if error_rtn else "-"
