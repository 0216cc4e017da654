from __future__ import annotations

import json
import math
import random
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from opd.report import format_table, write_report

DOMAINS = ("chain_sum", "spell_backward", "number_sorting")
BASE, TEACHER = (0.21, 0.08, 0.34), (0.93, 0.81, 0.88)
PHASES = {"rollout": 3.1, "score": 0.8, "train": 2.2, "publish": 0.2, "evaluate": 0.1, "checkpoint": 0.05}


def phases(share: float) -> dict[str, float]:
    spent = {f"phase/{name}_seconds": seconds * share for name, seconds in PHASES.items()}
    return {**spent, "phase/total_seconds": sum(spent.values()) * 1.03}


def write_lines(path: Path, stage: str, domain: str | None, rows: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"stage": stage} if domain is None else {"stage": stage, "domain": domain}
    with path.open("a") as file:
        for step, row in enumerate(rows, start=1):
            file.write(json.dumps({"step": step, **head, "time": 1.7e9 + 6.5 * step, **row}) + "\n")


def write_run(folder: Path, *, seed: int = 0) -> Path:
    """A run of all stages as it lies on disk, with plausible curves."""
    noise = random.Random(seed)
    base = [{"train/loss": 3 * math.exp(-step / 60) + 0.4, **phases(0.4)} for step in range(200)]
    write_lines(folder / "base" / "metrics.jsonl", "base", None, base)
    for domain, low, high in zip(DOMAINS, BASE, TEACHER, strict=True):
        path = folder / "specialists" / domain / "metrics.jsonl"
        write_lines(path, "sft", domain, [{"train/loss": math.exp(-s / 20), **phases(0.3)} for s in range(60)])
        grpo: list[dict[str, float]] = []
        for step in range(120):
            reward = low + (high - low) * (1 - math.exp(-step / 35)) + noise.gauss(0, 0.025)
            length = 9 + 4 * (high - low) * step / 120 + noise.gauss(0, 0.4)
            gap = 2e-6 * math.exp(noise.gauss(0, 0.4))
            grpo.append({"reward/mean": reward, "rollout/mean_length": length, "gap/k3": gap, **phases(0.7)})
        write_lines(path, "grpo", domain, grpo)
    distill: list[dict[str, float]] = []
    for step in range(150):
        row: dict[str, float] = {"gap/k3": 1e-6 * math.exp(noise.gauss(0, 0.5)), **phases(1.0)}
        for index, domain in enumerate(DOMAINS):
            decay = math.exp(-step / (18 + 9 * index))
            row[f"distill/reverse_kl/{domain}"] = (0.6 * decay + 0.008 * (index + 1)) * math.exp(noise.gauss(0, 0.08))
            row[f"distill/student_entropy/{domain}"] = 0.25 + 0.1 * index + 0.5 * decay + noise.gauss(0, 0.01)
            row[f"distill/teacher_entropy/{domain}"] = 0.24 + 0.1 * index + 0.1 * decay + noise.gauss(0, 0.01)
            row[f"rollout/mean_length/{domain}"] = 10 + 2 * index + 2 * decay + noise.gauss(0, 0.3)
            if step % 25 == 24:
                gained = (TEACHER[index] - BASE[index]) * (0.97 - 0.05 * index) * (1 - decay)
                row[f"eval/pass_at_1/{domain}"] = BASE[index] + gained
        distill.append(row)
    write_lines(folder / "metrics.jsonl", "distill", None, distill)
    (folder / "summary.json").write_text(json.dumps(summary()))
    (folder / "config.yaml").write_text("seed: 0\nrun:\n  name: demo\nmodel:\n  path: <b>weights</b>\napi_key: hush\n")
    return folder


def summary() -> dict[str, Any]:
    domains: dict[str, Any] = {}
    for domain, low, high, recovery in zip(DOMAINS, BASE, TEACHER, (0.97, 0.9, 0.81), strict=True):
        student = low + recovery * (high - low)
        models = {"base": low, "teacher": high, "student": student}
        domains[domain] = {
            "teacher_name": f"{domain}_specialist",
            **{
                model: {"pass@1": score, "pass@k": min(score + 0.08, 1.0), "mean_length": 11.0}
                for model, score in models.items()
            },
            "recovery": recovery,
        }
    finding = {"rule": "distant_teacher", "severity": "info", "stage": "distill", "subject": "chain_sum"}
    spike = {"rule": "grad_norm_spike", "severity": "warning", "stage": "distill", "subject": ""}
    return {
        "run": "demo",
        "seed": 0,
        "finished": "2026-11-25T10:00:00+00:00",
        "domains": domains,
        "mean_recovery": 0.893,
        "eval": {"prompts_per_domain": 200, "k": 4},
        "seconds": {"tokenizer": 4.2, "base": 610.0, "specialists": 2150.0, "distill": 1003.5, "evaluate": 88.0},
        "findings": [
            {
                **finding,
                "step": 1,
                "message": "domain chain_sum: distillation starts at a reverse KL of 0.608 nats/token",
            },
            {**spike, "step": 12, "message": "gradient norm 3.1 is 12 times the median 0.26"},
            {**spike, "step": 40, "message": "gradient norm 2.9 is 11 times the median 0.25"},
        ],
        "versions": {"opd": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Path(write_report(str(write_run(tmp_path_factory.mktemp("run"))))).read_text()


class Tags(HTMLParser):
    """Checks that tags nest, and keeps ids and attributes that load something."""

    VOID = ("meta", "br", "link", "img", "path", "use", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.loads.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    return tags


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    tags = parse(page)
    assert all(target.startswith("#") for target in tags.loads)
    assert not tags.names & {"script", "link", "img", "iframe", "object"}
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in page and "url(http" not in page


def test_figures_are_valid_svg_with_real_text_and_unique_ids(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(figures) == 7
    for figure in figures:
        assert ET.fromstring(figure).findall(".//{http://www.w3.org/2000/svg}text")
    tags = parse(page)
    assert len(tags.ids) == len(set(tags.ids))
    targets = {target[1:] for target in tags.loads} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert targets <= set(tags.ids)


def test_figures_hold_no_fixed_colour(page: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert not re.findall(r"(?:fill|stroke): #", drawn)
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", page))
    light, dark = re.findall(r":root \{([^}]*)\}", page)
    assert {"--ink", "--s0", "--s1", "--s2"} <= used
    for theme in (light, dark):
        assert used - {"--tone"} <= set(re.findall(r"(--[a-z0-9]+):", theme))


def test_domain_has_one_colour_in_all_figures(page: str) -> None:
    pattern = r"border-top-color:var\(--s(\d)\)\"></i>\s*(\w+)</span>"
    colours: dict[str, set[str]] = {}
    for colour, label in re.findall(pattern, page):
        colours.setdefault(label, set()).add(colour)
    assert [colours[domain] for domain in DOMAINS] == [{"0"}, {"1"}, {"2"}]


def test_report_is_deterministic(tmp_path: Path, page: str) -> None:
    assert Path(write_report(str(write_run(tmp_path)))).read_text() == page


def test_page_says_results_findings_and_config(page: str) -> None:
    text = re.sub(r"<[^>]+>", " ", page)
    for expected in ("0.89", "chain_sum_specialist", "0.930", "16 min 44 s", "2.13.0", "2026-11-25 10:00"):
        assert expected in text
    assert '<div class="card verdict good">' in page
    assert "steps 12-40, 2 times" in page and "12 times the median 0.26" not in page
    assert "&lt;b&gt;weights&lt;/b&gt;" in page and "<b>weights" not in page
    assert "hush" not in page and "***" in page


def test_missing_data_leaves_figures_out_with_a_sentence(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", "base", None, [{"train/loss": 1.0}])
    page = Path(write_report(str(tmp_path))).read_text()
    parse(page)
    assert "<svg" not in page
    assert page.count("left out, ") == 7
    assert "summary.json is missing" in page and "config.yaml is missing" in page


def test_partial_run_draws_what_it_has(tmp_path: Path) -> None:
    rows = [{"distill/reverse_kl/chain_sum": 0.5 / step, "gap/k3": 0.0} for step in range(1, 20)]
    write_lines(tmp_path / "metrics.jsonl", "distill", None, rows)
    page = Path(write_report(str(tmp_path))).read_text()
    assert page.count("<svg") == 1
    assert "Gap between sampler and learner: left out" in page


def test_step_written_again_after_resume_counts_once(tmp_path: Path) -> None:
    rows = [{"distill/reverse_kl/a": 0.5 / step, "phase/train_seconds": 1.0} for step in range(1, 11)]
    write_lines(tmp_path / "once" / "metrics.jsonl", "distill", None, rows)
    write_lines(
        tmp_path / "twice" / "metrics.jsonl", "distill", None, [{**row, "phase/train_seconds": 9.0} for row in rows]
    )
    write_lines(tmp_path / "twice" / "metrics.jsonl", "distill", None, rows)
    pages = [Path(write_report(str(tmp_path / name))).read_text() for name in ("once", "twice")]
    figures = [re.findall(r"<svg.*?</svg>", page, flags=re.S) for page in pages]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("recoveries", "tone"),
    [((0.97, 0.9, 0.81), "good"), ((0.7, 0.6, 0.5), "fair"), ((0.95, 0.9, 0.1), "bad"), ((0.3, 0.3, 0.3), "bad"),
     ((None, None, None), "none"), ((1.0, 1.0, 0.55), "fair")],
)  # fmt: skip
def test_verdict(tmp_path: Path, recoveries: tuple[float | None, ...], tone: str) -> None:
    result = summary()
    known = [recovery for recovery in recoveries if recovery is not None]
    for domain, recovery in zip(DOMAINS, recoveries, strict=True):
        result["domains"][domain]["recovery"] = recovery
    result["mean_recovery"] = sum(known) / len(known) if known else None
    (tmp_path / "summary.json").write_text(json.dumps(result))
    page = Path(write_report(str(tmp_path))).read_text()
    assert f'<div class="card verdict {tone}">' in page
    assert ("Recovery is undefined where" in page) == (len(known) < 3)


def test_damaged_summary_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_report(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(str(tmp_path / "nowhere"))


def test_table_is_aligned_and_drops_what_was_not_measured() -> None:
    result = summary()
    result["domains"]["chain_sum"]["recovery"] = None
    lines = format_table(result).split("\n")
    assert len(lines) == 3 + 3 + 1
    assert "student pass@4" in lines[0]
    end = lines[0].index("student pass@1") + len("student pass@1")
    for line, domain in zip(lines[2:5], DOMAINS, strict=True):
        assert line.startswith(domain) and re.fullmatch(r"0\.\d{3}", line[end - 5 : end])
    assert lines[2].endswith(" -") and lines[-1].split() == ["mean", "0.89"]
    for row in result["domains"].values():
        for model in ("base", "teacher", "student"):
            del row[model]["pass@k"]
    assert "pass@4" not in format_table(result)
    assert len({len(line) for line in format_table(result).split("\n")}) == 1
