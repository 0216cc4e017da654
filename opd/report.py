"""The report of a run: one HTML file that opens anywhere, and the same table as text for the terminal.

It is made from what a run leaves on disk (each metrics.jsonl under its folder, summary.json, config.yaml) and nothing
else, so it can be made again at any time, and for a run that has not finished. The one idea: figures are drawn in
stand-in colours that become CSS variables, so that one SVG suits a light and a dark page and a domain keeps its colour.

The file is long because it holds a page: a template, seven figures, three tables. What it leaves out: computing
accuracies and recovery (the evaluation does, into summary.json) and judging them (`opd.health`).
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import yaml
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opd.health import Levels
from opd.metrics import read_metrics, redact

STAGES = ("base", "sft", "grpo", "distill")  # in the order a pipeline runs them
_STAGE_NAMES = {"base": "base SFT", "sft": "specialist SFT", "grpo": "specialist GRPO", "distill": "distillation"}

# A stand-in colour is drawn, its CSS variable is served. Series colours start at #0a0b10.
_INK, _SOFT, _GRID = "#0a0b0c", "#0a0b0d", "#0a0b0e"
# (light, dark): Okabe and Ito's colours, which do not rely on telling red from green, darkened or lightened.
_PALETTE = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff8f45"),
    ("#008a63", "#2fc79a"),
    ("#a8518a", "#e39ac6"),
    ("#8a6d00", "#e6c229"),
    ("#5b4bb5", "#a79bf5"),
    ("#5f6b76", "#aab6c2"),
    ("#8c3b2e", "#d98876"),
)
_DASHES = ("solid", (0, (5, 1.5)), (0, (1, 1)))  # beyond the palette, by round

_PHASES = ("rollout", "score", "train", "publish", "evaluate", "checkpoint")

FIGURE_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": _INK,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}

Line = tuple[list[int], list[float]]  # steps, values


@dataclass(slots=True, kw_only=True, frozen=True)
class _Plot:
    """A figure of the page; `svg` is empty when its data is missing, and `note` then says what that is."""

    title: str
    note: str
    svg: str = ""
    legend: tuple[tuple[int, str], ...] = ()  # (colour index, label)
    wide: bool = False


class _Run:
    """The numbers of a run by (stage, domain or None of the file, key); a step logged twice counts as logged last."""

    def __init__(self, run_dir: str) -> None:
        self._values: dict[tuple[str, str | None], dict[str, dict[int, float]]] = {}
        self.seconds: dict[tuple[str, str | None], float] = {}  # from the first line of a stage to its last
        times: dict[tuple[str, str | None], list[float]] = {}
        for folder, _, files in sorted(os.walk(run_dir)):
            if "metrics.jsonl" not in files:
                continue
            for record in read_metrics(os.path.join(folder, "metrics.jsonl")):
                owner = (str(record["stage"]), record.get("domain"))
                times.setdefault(owner, []).append(float(record.get("time", math.nan)))
                of_stage = self._values.setdefault(owner, {})
                for key, value in record.items():
                    if "/" in key and isinstance(value, int | float):
                        of_stage.setdefault(key, {})[int(record["step"])] = float(value)
        for owner, stamps in times.items():
            self.seconds[owner] = max(stamps) - min(stamps)

    def owners(self, stage: str) -> list[tuple[str, str | None]]:
        """The (stage, domain) pairs that have metrics of this stage."""
        return sorted((owner for owner in self._values if owner[0] == stage), key=lambda owner: owner[1] or "")

    def line(self, owner: tuple[str, str | None], key: str) -> Line | None:
        points = sorted(self._values.get(owner, {}).get(key, {}).items())
        return ([step for step, _ in points], [value for _, value in points]) if points else None

    def by_domain(self, stage: str, key: str) -> dict[str, Line]:
        """Domain -> line: from "<key>/<domain>" if a stage logs it, else from `key` of a file that has one domain."""
        lines: dict[str, Line] = {}
        for owner in self.owners(stage):
            prefix = key + "/"
            for name in self._values[owner]:
                line = self.line(owner, name)
                if name.startswith(prefix) and line is not None:
                    lines[name[len(prefix) :]] = line
            line = self.line(owner, key)
            if owner[1] is not None and owner[1] not in lines and line is not None:
                lines[owner[1]] = line
        return dict(sorted(lines.items()))

    def total(self, owner: tuple[str, str | None], key: str) -> float:
        return sum(self._values[owner].get(key, {}).values())


def write_report(run_dir: str) -> str:
    """Writes <run_dir>/report.html and returns its path. Missing files cost their part of the page, with a sentence
    in its place. Raises FileNotFoundError when `run_dir` is no folder, ValueError for a damaged file."""
    if not os.path.isdir(run_dir):
        raise FileNotFoundError(f"{run_dir} is not a folder; a report is made from the folder of a run")
    run = _Run(run_dir)
    summary = _read(os.path.join(run_dir, "summary.json"), json.loads) or {}
    config = _read(os.path.join(run_dir, "config.yaml"), yaml.safe_load)
    domains = summary.get("domains", {})
    named = {domain for stage in STAGES for key in ("reward/mean", "distill/reverse_kl", "rollout/mean_length")
             for domain in run.by_domain(stage, key)}  # fmt: skip
    colours = {domain: index for index, domain in enumerate([*domains, *sorted(named - set(domains))])}
    with matplotlib.rc_context(FIGURE_STYLE):
        plots = [
            _accuracy(run, domains, colours),
            _reverse_kl(run, colours),
            _entropy(run, colours),
            _rewards(run, colours),
            _lengths(run, colours),
            _sampler_gap(run, colours),
            _phases(run),
        ]
    rows = [_row(domain, row) for domain, row in domains.items()]
    seconds = summary.get("seconds") or {
        f"{_STAGE_NAMES.get(stage, stage)}{f' ({domain})' if domain else ''}": value
        for (stage, domain), value in run.seconds.items()
    }
    page = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_PAGE)
        .render(
            name=summary.get("run") or os.path.basename(os.path.abspath(run_dir)),
            summary=summary,
            verdict=_verdict(summary),
            rows=rows,
            noise=_noise(summary),
            margin=Levels().teacher_margin,
            k=summary.get("eval", {}).get("k", "k"),
            findings=_grouped(summary.get("findings", [])),
            plots=[plot for plot in plots if plot.svg],
            missing=[plot for plot in plots if not plot.svg],
            seconds={stage: _duration(value) for stage, value in seconds.items()},
            config=yaml.safe_dump(redact(config), sort_keys=False) if config else "",
            style=Markup(page_style()),
            palette=len(_PALETTE),
            has_k=any(row["has_k"] for row in rows),
        )
    )
    path = os.path.join(run_dir, "report.html")
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)
    return path


def format_table(summary: Mapping[str, Any]) -> str:
    """The result per domain as aligned text: pass@1 (and pass@k) of base, teacher and student, and recovery."""
    k = summary.get("eval", {}).get("k", "k")
    header = ["domain", "teacher"]
    for metric in ("pass@1", f"pass@{k}"):
        header += [f"{model} {metric}" for model in ("base", "teacher", "student")]
    rows = [_row(domain, row) for domain, row in summary.get("domains", {}).items()]
    lines: list[list[str]] = [
        [row["domain"], row["teacher"], *row["pass@1"], *row["pass@k"], row["recovery"]] for row in rows
    ]
    mean = summary.get("mean_recovery")
    lines.append(["mean", *[""] * 7, "-" if mean is None else f"{mean:.2f}"])
    table = [[*header, "recovery"], *lines]
    if not any(row["has_k"] for row in rows):
        table = [line[:5] + line[8:] for line in table]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    texts = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in cells).rstrip()
        for cells in ([*enumerate(zip(line, widths, strict=True))] for line in table)
    ]
    rule = "-" * max(map(len, texts))
    return "\n".join([texts[0], rule, *texts[1:-1], rule, texts[-1]])


def _read(path: str, parse: Callable[[str], Any]) -> Any:
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        return parse(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can not be read: {error}") from error


def _row(domain: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A domain's line of the table as texts."""
    recovery = row.get("recovery")
    levels = Levels()

    def texts(metric: str) -> list[str]:
        values = [row.get(model, {}).get(metric) for model in ("base", "teacher", "student")]
        return ["-" if value is None else f"{value:.3f}" for value in values]

    if recovery is None:
        tone = "none"
    elif recovery >= levels.recovery_good:
        tone = "good"
    else:
        tone = "bad" if recovery < levels.recovery_collapsed else "fair"
    return {
        "domain": domain,
        "teacher": str(row.get("teacher_name") or "-"),
        "pass@1": texts("pass@1"),
        "pass@k": texts("pass@k"),
        "has_k": any(text != "-" for text in texts("pass@k")),
        "recovery": "-" if recovery is None else f"{recovery:.2f}",
        "tone": tone,
    }


def _verdict(summary: Mapping[str, Any]) -> tuple[str, str]:
    """(tone, sentence): good when the mean and no domain falls short, bad when a domain collapsed or half is lost."""
    levels = Levels()
    if not summary:
        return "none", "Not evaluated yet: summary.json is missing. The evaluation at the end of a run writes it."
    mean = summary.get("mean_recovery")
    recoveries = {
        domain: row["recovery"] for domain, row in summary.get("domains", {}).items() if row.get("recovery") is not None
    }
    if mean is None or not recoveries:
        return "none", "Recovery is undefined: no teacher is clearly better than the base."
    worst = min(recoveries, key=recoveries.__getitem__)
    tail = f" Weakest: {worst} at {recoveries[worst]:.0%}." if len(recoveries) > 1 else ""
    text = f"The student has recovered {mean:.0%} of what its teachers gained over the base."
    errors = any(finding.get("rule") == "recovery_collapsed" for finding in summary.get("findings", []))
    if errors or mean < 0.5 or recoveries[worst] < levels.recovery_collapsed:
        return "bad", text + tail
    if mean >= levels.recovery_good and max(recoveries.values()) - min(recoveries.values()) <= levels.recovery_spread:
        return "good", text + tail
    return "fair", text + tail


def _noise(summary: Mapping[str, Any]) -> str:
    prompts = summary.get("eval", {}).get("prompts_per_domain")
    if not prompts:
        return ""
    return f"{prompts} held-out prompts per domain: differences below {2 * math.sqrt(0.5 / prompts):.2f} may be chance."


def _grouped(findings: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Findings of one rule, stage and subject as one row with the newest message; errors first."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for finding in findings:
        key = tuple(finding.get(name) for name in ("severity", "stage", "rule", "subject"))
        groups.setdefault(key, []).append(finding)
    rows: list[dict[str, Any]] = []
    for (severity, stage, rule, _), group in groups.items():
        steps = [finding["step"] for finding in group if finding.get("step") is not None]
        where = [_STAGE_NAMES.get(stage, str(stage))] if stage else []
        if steps:
            where.append(
                f"step {steps[0]}" if len(steps) == 1 else f"steps {min(steps)}-{max(steps)}, {len(steps)} times"
            )
        rows.append(
            {"severity": severity, "rule": rule, "where": ", ".join(where) or "-", "message": group[-1].get("message")}
        )
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(rows, key=lambda row: order.get(row["severity"], 3))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


# ---- figures -------------------------------------------------------------------------------------------------------


def ink(index: int) -> dict[str, Any]:
    """Colour and dash of the index-th series."""
    return {
        "color": f"#0a0b{16 + index % len(_PALETTE):02x}",
        "linestyle": _DASHES[index // len(_PALETTE) % len(_DASHES)],
    }


def new_axes(width: float, height: float, rows: int = 1, columns: int = 1, **sharing: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)


def to_svg(figure: Figure, name: str) -> Markup:
    """The figure as an inline <svg>: deterministic, nothing but drawing in it, colours turned into CSS variables."""
    buffer = io.StringIO()
    # The salt makes ids unique across the figures of the page, and the same in each run of this program.
    with matplotlib.rc_context({"svg.hashsalt": f"opd {name}"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns="http://www.w3.org/2000/svg" '
                  r'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" \1>', text, count=1)  # fmt: skip
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    for colour, variable in ((_INK, "--ink"), (_SOFT, "--soft"), (_GRID, "--grid")):
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"#0a0b(1[0-9a-f])", lambda match: f"var(--s{int(match[1], 16) - 16})", text)
    return Markup(text)


def _draw(axes: Axes, line: Line, style: Mapping[str, Any], **more: Any) -> None:
    few = len(line[0]) <= 12
    axes.plot(*line, **{"marker": "o" if few else None, **style, **more})


def _steps_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _ordered(lines: Mapping[str, Line], colours: Mapping[str, int]) -> dict[str, Line]:
    return dict(sorted(lines.items(), key=lambda item: colours[item[0]]))


def _legend(domains: Iterable[str], colours: Mapping[str, int]) -> tuple[tuple[int, str], ...]:
    return tuple(sorted((colours[domain], domain) for domain in domains))


def _accuracy(run: _Run, domains: Mapping[str, Any], colours: Mapping[str, int]) -> _Plot:
    title = "Accuracy on held-out prompts during distillation"
    lines = _ordered(run.by_domain("distill", "eval/pass_at_1"), colours)
    if not lines:
        return _Plot(title=title, note="no evaluation was made inside distillation (stages.distill.eval_every)")
    columns = min(len(lines), 3)
    rows = math.ceil(len(lines) / columns)
    figure, panels = new_axes(12.2, 0.5 + 2.2 * rows, rows, columns, sharey=True)
    for axes, (domain, line) in zip(panels, lines.items(), strict=False):
        _draw(axes, line, ink(colours[domain]))
        axes.set_title(domain, color=_INK)
        axes.set_ylim(0, 1.12)  # room for the teacher's label above a level of 1
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.set_xlim(0, max(line[0]) * 1.02)
        levels = {model: domains.get(domain, {}).get(model, {}).get("pass@1") for model in ("base", "teacher")}
        for model, level in levels.items():
            if level is None:
                continue
            other = levels["base" if model == "teacher" else "teacher"]
            upper = model == "teacher" if other is None or other == level else level > other
            above = upper or level < 0.12
            axes.axhline(level, color=_SOFT, linewidth=1.0, linestyle=(0, (4, 2)))
            axes.annotate(
                f"{model} {level:.2f}",
                (1.0, level),
                (0, 3 if above else -3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="bottom" if above else "top",
                color=_SOFT,
                fontsize=8,
            )
        _steps_axis(axes)
    for axes in panels[len(lines) :]:
        axes.remove()
    panels[0].set_ylabel("pass@1")
    note = "Greedy pass@1 of the student. Dashed: the base it starts from and the teacher it learns from."
    return _Plot(title=title, note=note, svg=to_svg(figure, "accuracy"), wide=True)


def _reverse_kl(run: _Run, colours: Mapping[str, int]) -> _Plot:
    title = "Reverse KL to the teacher"
    lines = run.by_domain("distill", "distill/reverse_kl")
    positive = {domain: ([s for s, v in zip(*line, strict=True) if v > 0], [v for v in line[1] if v > 0])
                for domain, line in lines.items()}  # fmt: skip
    positive = {domain: line for domain, line in positive.items() if line[0]}
    if not positive:
        return _Plot(title=title, note="no distillation step has been logged")
    figure, (axes,) = new_axes(6, 3.3)
    for domain, line in positive.items():
        _draw(axes, line, ink(colours[domain]))
    axes.set_yscale("log")
    axes.set_ylabel("KL(student || teacher), nats/token")
    _steps_axis(axes)
    note = "Exact, over the whole vocabulary, on the student's own completions. It should fall and level off."
    return _Plot(title=title, note=note, svg=to_svg(figure, "kl"), legend=_legend(positive, colours))


def _entropy(run: _Run, colours: Mapping[str, int]) -> _Plot:
    title = "Entropy of student and teacher"
    students = run.by_domain("distill", "distill/student_entropy")
    teachers = run.by_domain("distill", "distill/teacher_entropy")
    if not students:
        return _Plot(title=title, note="no distillation step has been logged with entropies")
    figure, (axes,) = new_axes(6, 3.3)
    for domain, line in students.items():
        _draw(axes, line, ink(colours[domain]))
        if domain in teachers:
            _draw(axes, teachers[domain], ink(colours[domain]), linestyle=(0, (2, 1.5)), linewidth=1.1, marker=None)
    axes.set_ylabel("entropy, nats/token")
    axes.set_ylim(bottom=0)
    _steps_axis(axes)
    note = (
        "Solid: student. Dashed: its teacher on the same tokens. The student should meet its teacher, not fall below."
    )
    return _Plot(title=title, note=note, svg=to_svg(figure, "entropy"), legend=_legend(students, colours))


def _rewards(run: _Run, colours: Mapping[str, int]) -> _Plot:
    title = "Reward of the specialists during GRPO"
    lines = run.by_domain("grpo", "reward/mean")
    if not lines:
        return _Plot(title=title, note="no GRPO step has been logged")
    figure, (axes,) = new_axes(6, 3.3)
    for domain, line in lines.items():
        _draw(axes, line, ink(colours[domain]))
    axes.set_ylabel("mean reward")
    _steps_axis(axes)
    note = "Mean verifier score of each step's rollouts, one specialist per domain."
    return _Plot(title=title, note=note, svg=to_svg(figure, "reward"), legend=_legend(lines, colours))


def _panels(
    run: _Run, key: str, colours: Mapping[str, int], label: str, name: str, *, log: bool
) -> tuple[Markup, tuple[tuple[int, str], ...]] | None:
    """One panel per stage that rolls out, one line per domain; a line without a domain is drawn in the soft ink."""
    stages: dict[str, dict[str | None, Line]] = {}
    for stage in ("grpo", "distill"):
        lines: dict[str | None, Line] = {**run.by_domain(stage, key)}
        overall = [line for owner in run.owners(stage) if owner[1] is None and (line := run.line(owner, key))]
        if not lines and overall:
            lines[None] = overall[0]
        if log:
            lines = {d: ([s for s, v in zip(*line, strict=True) if v > 0], [v for v in line[1] if v > 0])
                     for d, line in lines.items()}  # fmt: skip
        lines = {domain: line for domain, line in lines.items() if line[0]}
        if lines:
            stages[stage] = lines
    if not stages:
        return None
    figure, panels = new_axes(6, 3.3, 1, len(stages), sharey=True)
    for axes, (stage, lines) in zip(panels, stages.items(), strict=True):
        for domain, line in lines.items():
            _draw(axes, line, {"color": _SOFT} if domain is None else ink(colours[domain]))
        axes.set_title(_STAGE_NAMES[stage])
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.08 * max(max(line[1]) for lines in stages.values() for line in lines.values()))
        _steps_axis(axes)
    panels[0].set_ylabel(label)
    drawn = {domain for lines in stages.values() for domain in lines if domain is not None}
    return to_svg(figure, name), _legend(drawn, colours)


def _lengths(run: _Run, colours: Mapping[str, int]) -> _Plot:
    title = "Completion length"
    drawn = _panels(run, "rollout/mean_length", colours, "mean length, tokens", "length", log=False)
    if drawn is None:
        return _Plot(title=title, note="no rollout has been logged")
    note = "Mean length of the rollouts. A steep rise in distillation is how a length collapse begins."
    return _Plot(title=title, note=note, svg=drawn[0], legend=drawn[1])


def _sampler_gap(run: _Run, colours: Mapping[str, int]) -> _Plot:
    title = "Gap between sampler and learner"
    drawn = _panels(run, "gap/k3", colours, "k3, nats/token", "gap", log=True)
    if drawn is None:
        return _Plot(
            title=title, note="no gap above zero has been logged: sampler and learner agree, or were not compared"
        )
    note = f"k3 estimate of the KL between the policy that sampled and the one that learns; alarm at {Levels().gap_kl}."
    return _Plot(title=title, note=note, svg=drawn[0], legend=drawn[1])


def _phases(run: _Run) -> _Plot:
    title = "Where the time went"
    bars: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        for owner in run.owners(stage):
            spent = {phase: run.total(owner, f"phase/{phase}_seconds") for phase in _PHASES}
            other = run.total(owner, "phase/total_seconds") - sum(spent.values())
            if sum(spent.values()) > 0:
                name = f"{stage} {owner[1]}" if owner[1] else stage
                bars[name] = {**spent, "other": max(other, 0.0)}
    if not bars:
        return _Plot(title=title, note="no step has been logged with its phases")
    longest = max(sum(spent.values()) for spent in bars.values())
    unit, label = (60.0, "minutes") if longest >= 180 else (1.0, "seconds")
    figure, (axes,) = new_axes(6, max(2.0, 0.9 + 0.3 * len(bars)))
    left = [0.0] * len(bars)
    used: list[tuple[int, str]] = []
    for index, phase in enumerate((*_PHASES, "other")):
        widths = [spent[phase] / unit for spent in bars.values()]
        if sum(widths) > 0:
            used.append((index, phase))
            axes.barh(list(bars), widths, left=left, color=ink(index)["color"], height=0.65)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, end in enumerate(left):
        axes.annotate(f"{end:.1f}", (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    note = "Sum over the steps of each stage, by phase."
    return _Plot(title=title, note=note, svg=to_svg(figure, "phases"), legend=tuple(used))


# ---- page ----------------------------------------------------------------------------------------------------------


def page_style() -> str:
    light = "".join(f"--s{index}:{pair[0]};" for index, pair in enumerate(_PALETTE))
    dark = "".join(f"--s{index}:{pair[1]};" for index, pair in enumerate(_PALETTE))
    return _CSS.replace("/*light*/", light).replace("/*dark*/", dark)


_CSS = """
:root { color-scheme: light dark; --page:#f6f7f9; --card:#ffffff; --ink:#1b2129; --soft:#5d6773; --grid:#e3e7ec;
  --good:#0b7a52; --fair:#8a5a00; --bad:#b3261e; --none:#5d6773; /*light*/ }
@media (prefers-color-scheme: dark) { :root { --page:#12161b; --card:#1a2027; --ink:#e4e8ed; --soft:#9aa5b1;
  --grid:#2e3741; --good:#4cc497; --fair:#e0b04a; --bad:#ff8a80; --none:#9aa5b1; /*dark*/ } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 34px 0 10px; } h3 { font-size: 15px; margin: 0; }
p { margin: 4px 0; } .soft { color: var(--soft); font-size: 13.5px; }
.card, figure { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: 14px 16px; }
.verdict { display: flex; gap: 18px; align-items: center; margin-top: 18px; border-left: 6px solid var(--tone); }
.verdict b { font-size: 34px; line-height: 1.1; color: var(--tone); font-variant-numeric: tabular-nums; }
.good { --tone: var(--good); } .fair { --tone: var(--fair); } .bad, .error { --tone: var(--bad); }
.none, .info { --tone: var(--none); } .warning { --tone: var(--fair); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); font-size: 13px; text-align: left; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
.n { text-align: right; } .tone { color: var(--tone); font-weight: 600; white-space: nowrap; }
thead th.group { text-align: center; } td.first, th.first { padding-left: 22px; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; }
figure svg { display: block; width: 100%; height: auto; margin-top: 8px; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin-top: 4px; }
.legend i { display: inline-block; width: 16px; border-top: 3px solid; vertical-align: middle; margin-right: 6px; }
.legend .dash1 { border-top-style: dashed; } .legend .dash2 { border-top-style: dotted; }
details summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: 12.5px; line-height: 1.45; margin: 10px 0 0; }
@media (max-width: 820px) { .grid { grid-template-columns: minmax(0, 1fr); } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} - opd report</title>
<style>{{ style }}</style>
</head>
<body><main>
<h1>{{ name }}</h1>
<p class="soft">Multi-teacher on-policy distillation
{%- if summary.finished %}, finished {{ summary.finished[:16] | replace("T", " ") }}{% endif %}
{%- if summary.seed is defined %}, seed {{ summary.seed }}{% endif %}</p>
<div class="card verdict {{ verdict[0] }}">
{% if summary.mean_recovery is not none and summary.mean_recovery is defined %}
<b>{{ "%.2f" | format(summary.mean_recovery) }}</b>{% endif %}
<div><p>{{ verdict[1] }}</p>
<p class="soft">Recovery is (student - base) / (teacher - base) of greedy pass@1: 0 is the base, 1 is the teacher.</p>
</div>
</div>

{% if rows %}
<h2>Results per domain</h2>
<div class="card scroll"><table>
<thead>
<tr><th colspan="2"></th><th class="group" colspan="3">pass@1</th>
{% if has_k %}<th class="group" colspan="3">pass@{{ k }}</th>{% endif %}<th></th></tr>
<tr><th>domain</th><th>teacher</th>
{% for _ in range(2 if has_k else 1) %}
<th class="n first">base</th><th class="n">teacher</th><th class="n">student</th>{% endfor %}
<th class="n">recovery</th></tr>
</thead><tbody>
{% for row in rows %}
<tr><td>{{ row.domain }}</td><td>{{ row.teacher }}</td>
{% for value in row["pass@1"] %}<td class="n{{ ' first' if loop.first }}">{{ value }}</td>{% endfor %}
{% if has_k %}
{% for value in row["pass@k"] %}<td class="n{{ ' first' if loop.first }}">{{ value }}</td>{% endfor %}{% endif %}
<td class="n {{ row.tone }}"><span class="tone">{{ "undefined" if row.recovery == "-" else row.recovery }}</span></td>
</tr>
{% endfor %}
</tbody></table>
{% if rows | selectattr("recovery", "equalto", "-") | list %}
<p class="soft">Recovery is undefined where the teacher is less than {{ margin }} better than the base: the quotient
would be noise.</p>{% endif %}
{% if noise %}<p class="soft">{{ noise }}</p>{% endif %}
</div>
{% endif %}

<h2>Findings</h2>
<div class="card scroll">
{% if findings %}
<table><thead><tr><th></th><th>rule</th><th>where</th><th>what was seen, and what to do</th></tr></thead><tbody>
{% for finding in findings %}
<tr class="{{ finding.severity }}"><td class="tone">{{ finding.severity }}</td><td>{{ finding.rule }}</td>
<td>{{ finding.where }}</td><td>{{ finding.message }}</td></tr>
{% endfor %}
</tbody></table>
{% elif summary %}<p>No rule of the health check was triggered.</p>
{% else %}<p>Findings are listed once the run is evaluated.</p>{% endif %}</div>

<h2>Figures</h2>
<div class="grid">
{% for plot in plots %}
<figure{% if plot.wide %} class="wide"{% endif %}><h3>{{ plot.title }}</h3><p class="soft">{{ plot.note }}</p>
{% if plot.legend %}<div class="legend">{% for colour, label in plot.legend %}
<span><i class="dash{{ colour // palette % 3 }}" style="border-top-color:var(--s{{ colour % palette }})"></i>
{{ label }}</span>{% endfor %}</div>{% endif %}
{{ plot.svg }}</figure>
{% endfor %}
</div>
{% for plot in missing %}<p class="soft">{{ plot.title }}: left out, {{ plot.note }}.</p>{% endfor %}

<h2>This run</h2>
<div class="grid">
<div class="card"><h3>Time per stage</h3>
{% if seconds %}<table><tbody>{% for stage, text in seconds.items() %}
<tr><td>{{ stage }}</td><td class="n">{{ text }}</td></tr>{% endfor %}</tbody></table>
{% else %}<p class="soft">No stage has been logged.</p>{% endif %}</div>
<div class="card"><h3>Versions</h3>
{% if summary.versions %}<table><tbody>{% for package, version in summary.versions.items() %}
<tr><td>{{ package }}</td><td class="n">{{ version }}</td></tr>{% endfor %}</tbody></table>
{% else %}<p class="soft">summary.json names no versions.</p>{% endif %}</div>
</div>
<h2>Configuration</h2>
<div class="card">
{% if config %}<details><summary>config.yaml, resolved</summary><pre>{{ config }}</pre></details>
{% else %}<p class="soft">config.yaml is missing.</p>{% endif %}</div>
</main></body>
</html>
"""
