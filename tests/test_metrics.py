from __future__ import annotations

import io
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.config import TrackingConfig
from opd.metrics import CATALOGUE, Metrics, describe, read_metrics, redact

DISABLED = TrackingConfig(wandb="disabled")

EMITTED = [
    "train/loss", "train/grad_norm", "train/lr", "train/skipped_steps", "train/tokens",
    "train/balance_loss", "train/index_loss", "train/index_recall", "train/load_imbalance",
    "distill/kl_to_reference/{d}", "distill/topk_student_mass/{d}", "distill/topk_teacher_mass/{d}",
    "distill/advantage_clip_share/{d}", "distill/special_share/{d}", "distill/ratio_truncated_share/{d}",
    "distill/ratio_masked_share/{d}", "distill/geometric_share/{d}", "distill/k3_share/{d}", "distill/veto_share/{d}",
    "grpo/geometric_share/{d}", "grpo/k3_share/{d}", "grpo/veto_share/{d}", "grpo/opsm_share/{d}",
    "sft/nll/{d}", "sft/entropy/{d}", "sft/mtp_nll",
    "grpo/entropy/{d}", "distill/reverse_kl",
    "distill/reverse_kl/{d}", "distill/kl_max/{d}", "distill/student_entropy/{d}", "distill/teacher_entropy/{d}",
    "distill/top1_agreement/{d}", "distill/top16_overlap/{d}", "teacher/{d}/top16_overlap",
    "teacher/{d}/student_entropy", "teacher/{d}/teacher_entropy",
    "distill/head_loads", "teacher/{d}/tokens", "teacher/{d}/token_share",
    "teacher/{d}/reverse_kl", "teacher/{d}/score_seconds", "teacher/{d}/load_seconds", "gap/k1", "gap/k3",
    "teacher/{d}/wait_seconds", "teacher/{d}/entropy_share", "teacher/{d}/repeat_error",
    "gap/max_logprob_gap", "gap/ess", "gap/outside_share", "gap/mean_ratio", "gap/rerouted_share",
    "rollout/tokens", "rollout/mean_length", "rollout/staleness", "rollout/max_staleness", "rollout/max_length",
    "rollout/truncated_share",
    "rollout/mean_length/{d}", "rollout/truncated_share/{d}",
    "reward/mean", "reward/mean/{d}", "reward/pass_rate/{d}", "reward/verifier_errors", "grpo/clip_share",
    "grpo/kl_to_reference", "grpo/zero_advantage_share", "fp4/changed_code_share", "eval/pass_at_1/{d}",
    "eval/pass_at_k/{d}", "eval/mean_length/{d}", "phase/rollout_seconds", "phase/score_seconds",
    "phase/train_seconds", "phase/publish_seconds", "phase/evaluate_seconds", "phase/checkpoint_seconds",
    "phase/total_seconds", "perf/tokens_per_second", "perf/rollout_tokens_per_second", "policy/version",
]  # fmt: skip


def start(folder: Path, **config: object) -> Metrics:
    return Metrics(str(folder), DISABLED, config, "distill", 100, quiet=True)


@pytest.mark.parametrize("domain", ["chain_sum", "math-500.v2", "a/b"])
def test_catalogue_covers_what_the_project_emits(domain: str) -> None:
    for key in EMITTED:
        assert describe(key.format(d=domain)) is not None, key
    for key in ("train/los", "distill/reverse_kl/", "teacher/tokens", "loss", "phase/other_seconds", "eval/pass_at_1"):
        assert describe(key) is None, key


def test_catalogue_has_nothing_that_nobody_emits() -> None:
    assert {key.replace("{d}", "<teacher>" if key.startswith("teacher/") else "<domain>") for key in EMITTED} == set(
        CATALOGUE
    )
    assert all(key == key.lower() and "/" in key for key in CATALOGUE)


def test_lines_are_strict_json_and_keep_numbers_exactly(tmp_path: Path) -> None:
    values = {
        "train/loss": 0.1 + 0.2,
        "train/tokens": 2**60 + 1,
        "gap/k3": np.float32(0.25),
        "gap/k1": torch.tensor(1.5),
        "train/grad_norm": math.nan,
        "gap/ess": -math.inf,
    }
    with start(tmp_path) as metrics:
        metrics.log(7, values)
        (record,) = read_metrics(metrics.path)  # written before close
    raw = Path(metrics.path).read_text()
    json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["step"] == 7 and record["stage"] == "distill" and "domain" not in record
    assert record["train/loss"] == 0.1 + 0.2 and record["train/tokens"] == 2**60 + 1
    assert record["gap/k3"] == 0.25 and record["gap/k1"] == 1.5
    assert record["train/grad_norm"] is None and record["train/grad_norm/nonfinite"] == "nan"
    assert record["gap/ess"] is None and record["gap/ess/nonfinite"] == "-inf"


def test_cut_at_any_byte_loses_at_most_the_last_line(tmp_path: Path) -> None:
    with start(tmp_path, domain="sum") as metrics:
        for step in range(1, 4):
            metrics.log(step, {"train/loss": 1 / step})
    whole = Path(metrics.path).read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole) + 1):
        Path(metrics.path).write_bytes(whole[:cut])
        survivors = sum(cut >= len(b"".join(lines[: count + 1])) for count in range(3))
        assert [record["step"] for record in read_metrics(metrics.path)] == list(range(1, survivors + 1))
    for cut in (0, len(lines[0]), len(lines[0]) + 9, len(whole) - 1):
        Path(metrics.path).write_bytes(whole[:cut])
        with start(tmp_path) as resumed:
            resumed.log(9, {})
        steps = [record["step"] for record in read_metrics(metrics.path)]
        assert steps == [*range(1, whole[:cut].count(b"\n") + 1), 9]


def test_damage_inside_the_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(str(path))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is list"):
        read_metrics(str(path))


def test_reserved_names_and_non_numbers_are_refused(tmp_path: Path) -> None:
    with start(tmp_path) as metrics:
        with pytest.raises(ValueError, match="'stage' has a reserved name"):
            metrics.log(1, {"stage": 1.0})
        with pytest.raises(TypeError):
            metrics.log(1, {"train/loss": None})  # pyright: ignore[reportArgumentType]
        assert read_metrics(metrics.path) == []
    metrics.close()  # a second close does nothing


def test_redact_hides_secrets_and_nothing_else() -> None:
    config = {
        "tokenizer": {"vocab_size": 300},
        "max_tokens": 128,
        "micro_batch_tokens": 5,
        "remote": [{"api_key": "s3cret", "hf_token": "s3cret", "url": "https://me:s3cret@host/x", "password": None}],
    }
    hidden = redact(config)
    assert "s3cret" not in json.dumps(hidden)
    assert hidden["tokenizer"] == {"vocab_size": 300} and hidden["max_tokens"] == 128
    assert hidden["remote"][0]["url"] == "https://***@host/x" and hidden["remote"][0]["password"] is None


def test_plain_progress_says_about_every_tenth_and_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="opd.metrics")
    with Metrics(str(tmp_path), DISABLED, {"domain": "sum"}, "grpo", 200) as metrics:
        for step in range(1, 201):
            metrics.log(step, {"reward/mean": step / 200, "train/loss": 1.0})
            metrics.log(step, {"eval/pass_at_1/a": 0.5, "eval/pass_at_1/b": 0.7})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 11
    assert said[0].startswith("grpo sum 1/200") and "left" in said[4]
    assert "200/200" in said[-1] and "reward 1.000" in said[-1] and "accuracy 0.600" in said[-1]
    assert "left" not in said[-1] and "loss" not in said[-1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_progress_is_one_line_and_log_lines_go_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        with Metrics(str(tmp_path), DISABLED, {}, "distill", 50) as metrics:
            for step in range(1, 51):
                metrics.log(step, {"distill/reverse_kl": 1.0 / step})
                if step == 25:
                    logging.getLogger("elsewhere").warning("look at this")
        assert handler.stream is screen
    finally:
        logging.getLogger().removeHandler(handler)
    shown = screen.getvalue()
    # What stays on the screen: each return erases the line that it goes back over.
    kept = [line.split("\x1b[2K")[-1] for line in shown.split("\n")]
    assert len(kept) == 3 and kept[0].strip().endswith("look at this")
    assert "50/50" in kept[1] and "reverse KL 0.0200" in kept[1]


def test_wandb_offline_is_silent_stays_in_the_run_and_hides_secrets(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    config = {"run": {"name": "demo"}, "domain": "sum", "remote": {"api_key": "s3cret"}}
    with Metrics(str(tmp_path), TrackingConfig(project="proj"), config, "grpo", 10, quiet=True) as metrics:
        run = metrics._wandb
        assert run is not None
        assert (run.group, run.job_type, run.name, run.project, run.offline) == (
            "demo",
            "grpo",
            "grpo-sum",
            "proj",
            True,
        )
        metrics.log(1, {"train/loss": 1.0, "train/grad_norm": math.nan})
    tracking, known = TrackingConfig(project="proj"), metrics.wandb_id
    with Metrics(str(tmp_path), tracking, config, "grpo", 10, quiet=True, wandb_id=known) as metrics:
        assert metrics._wandb is not None and metrics._wandb.id == metrics.wandb_id == known == run.id
        metrics.log(2, {"train/loss": 0.5})
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not any(secret in path.read_bytes() for path in files for secret in (b"s3cret", b"k" * 40))
    assert capfd.readouterr() == ("", "")
    assert "WANDB_MODE=online is ignored: tracking.wandb=offline decides" in caplog.text


def test_wandb_online_without_login_is_refused_and_never_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    program = """
        import sys
        from opd.config import ConfigError, TrackingConfig
        from opd.metrics import Metrics
        try:
            Metrics(sys.argv[1], TrackingConfig(wandb="online"), {}, "sft", 1)
        except ConfigError as error:
            print(error)
    """
    done = run_python(program, tmp_path)
    assert "tracking.wandb=online found no W&B API key" in done.stdout
    assert "WANDB_API_KEY" in done.stdout and "tracking.wandb=offline" in done.stdout


def test_run_goes_on_when_wandb_dies_or_can_not_start(tmp_path: Path) -> None:
    program = """
        import sys, time
        import psutil
        from opd.config import TrackingConfig
        from opd.metrics import Metrics, read_metrics
        metrics = Metrics(sys.argv[1], TrackingConfig(), {}, "sft", 10, quiet=True)
        metrics.log(1, {"train/loss": 1.0})
        helpers = psutil.Process().children()
        assert helpers
        for helper in helpers:
            helper.kill()
        for step in range(2, 8):
            time.sleep(0.1)
            metrics.log(step, {"train/loss": 1.0})
        metrics.close()
        assert metrics._wandb is None
        # The helper process of this session is gone, so a second start fails.
        with Metrics(sys.argv[1], TrackingConfig(), {}, "grpo", 10, quiet=True) as second:
            second.log(1, {})
        print([record["step"] for record in read_metrics(metrics.path)])
    """
    done = run_python(program, tmp_path)
    assert done.stdout.strip() == "[1, 2, 3, 4, 5, 6, 7, 1]", done.stderr
    assert "the run goes on" in done.stderr and "can not start offline" in done.stderr


def run_python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
    # WANDB_SERVICE would make the new process share the helper process of this one.
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, env=env)


def test_disabled_tracking_never_imports_wandb(tmp_path: Path) -> None:
    program = """
        import sys
        from opd.config import TrackingConfig
        from opd.metrics import Metrics
        with Metrics(sys.argv[1], TrackingConfig(wandb="disabled"), {}, "sft", 1) as metrics:
            metrics.log(1, {"train/loss": 1.0})
        print("wandb" in sys.modules)
    """
    assert run_python(program, tmp_path).stdout.strip() == "False"
