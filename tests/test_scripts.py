"""The scripts as a user meets them: what they print, what they return, and what scripts/setup asks of pip.

Python's installer is the outside world here, so a small program stands in for the interpreter: it writes down what
pip is asked for and otherwise is the real one.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from scripts.benchmarks import Figure, interleaved, main, peak_memory, report, split_arguments

ROOT = Path(__file__).parent.parent
SCRIPTS = ("setup", "quickstart", "test", "check", "bench")

INTERPRETER = """#!/bin/sh
# Stands in for python: "-m venv" makes a folder that holds a copy of this file, "-m pip" is written down.
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python"
elif [ "$1 $2" = "-m pip" ]; then
    shift 2
    echo "$DS_BUILD_OPS pip $*" >> "$PIP_LOG"
    test ! -e "$PIP_LOG.refuse"
else
    exec "$REAL_PYTHON" "$@"
fi
"""

TOY = '''"""Times nothing at all.

The second paragraph is not in the listing.
"""

from scripts.benchmarks import Figure, report, split_arguments


def main(argv: list[str]) -> int:
    as_json, overrides = split_arguments(argv)
    speed = float(dict(override.split("=", 1) for override in overrides).get("speed", "2"))
    return report("toy", [Figure(name="speed", value=speed, unit="x", bar=">= 2", ok=speed >= 2)], as_json)
'''


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder of no meaning."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


class Tree:
    """A copy of what scripts/setup reads, its environment and the stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a project"
        (self.folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/setup", self.folder / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        self.venv = self.folder / ".venv"
        self.python = self.program("python-stand-in", INTERPRETER)
        self.log = folder / "pip.log"
        # Without the folders of this machine's own nvidia-smi, if it has one.
        tools = ("bash", "sh", "env", "dirname", "sed", "ls", "mkdir", "touch", "cp", "cat")
        self.path = folder / "bin"
        self.path.mkdir()
        for tool in tools:
            found = shutil.which(tool)
            assert found is not None
            (self.path / tool).symlink_to(found)

    def program(self, name: str, source: str) -> Path:
        path = self.folder / name
        path.write_text(source)
        path.chmod(0o755)
        return path

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "PYTHON": str(self.python),
            "OPD_VENV": "",
            "PATH": str(self.path),
            "PIP_LOG": str(self.log),
            "REAL_PYTHON": sys.executable,
            "DS_BUILD_OPS": "",
        }
        return run(self.folder / "scripts/setup", **{**settings, **environment})

    def requests(self) -> list[str]:
        """What pip was asked for since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def torch_pin() -> str:
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(pin for pin in pins if pin.startswith("torch=="))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself_without_doing_anything(name: str, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    done = run(ROOT / "scripts" / name, "--help", OPD_VENV=str(venv))
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: scripts/{name}")
    assert not venv.exists()


def test_ci_runs_the_tests() -> None:
    done = run("bash", ROOT / ".ci/run", PYTHON="/nowhere", OPD_VENV="/nowhere/venv")
    assert done.returncode == 1
    assert "PYTHON=/nowhere does not run" in done.stderr, "it begins with the set-up, and fails with it"


def test_setup_installs_torch_first_and_then_keeps_it(tree: Tree, torch_pin: str) -> None:
    done = tree.setup()
    assert done.returncode == 0, done.stderr
    torch_request, project_request = tree.requests()
    assert torch_request.endswith(
        f"--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15 {torch_pin}"
    )
    assert f"--editable {tree.folder}[dev]" in project_request
    assert project_request.startswith("0 pip"), "DeepSpeed must not be asked to compile its own kernels"
    constraints = tree.venv / "opd-constraints.txt"
    assert f"--constraint {constraints}" in project_request
    assert constraints.read_text().startswith(torch_pin)
    assert done.stdout == "", "standard output belongs to the script that called setup"


def test_a_second_setup_asks_pip_nothing_and_is_quick(tree: Tree) -> None:
    tree.setup()
    tree.requests()
    seconds: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        done = tree.setup()
        seconds.append(time.perf_counter() - start)
        assert (done.returncode, done.stderr, tree.requests()) == (0, "", [])
    assert min(seconds) < 1.0


def test_setup_runs_again_when_pyproject_or_the_folder_changes(tree: Tree) -> None:
    tree.setup()
    tree.requests()
    with (tree.folder / "pyproject.toml").open("a") as file:
        file.write("# another pin\n")
    assert tree.setup().returncode == 0
    assert len(tree.requests()) == 2
    tree.folder = tree.folder.rename(tree.folder.with_name("moved"))
    assert tree.setup(PYTHON=str(tree.folder / "python-stand-in")).returncode == 0
    assert len(tree.requests()) == 2


def test_a_machine_with_a_gpu_gets_the_default_build(tree: Tree, torch_pin: str) -> None:
    (tree.path / "nvidia-smi").symlink_to("/bin/true")
    assert tree.setup().returncode == 0
    *_, torch_request, _ = tree.requests()
    assert torch_request.endswith(f" install {torch_pin}")
    (tree.path / "nvidia-smi").unlink()
    (tree.path / "nvidia-smi").symlink_to("/bin/false")
    assert tree.setup().returncode == 0
    assert "download.pytorch.org/whl/cpu" in tree.requests()[0], "a driver that does not answer is no GPU"


def test_a_setup_that_failed_says_why_and_is_tried_again(tree: Tree, torch_pin: str) -> None:
    refusal = Path(f"{tree.log}.refuse")
    refusal.touch()
    done = tree.setup()
    assert done.returncode == 1
    assert f"could not install {torch_pin}" in done.stderr
    refusal.unlink()
    tree.requests()
    assert tree.setup().returncode == 0
    assert len(tree.requests()) == 2


@pytest.mark.parametrize(
    ("version", "suits"),
    [("2, 7", False), ("3, 10", False), ("3, 11", True), ("3, 13", True), ("3, 14", False)],
)
def test_setup_refuses_a_python_outside_the_range(tree: Tree, version: str, suits: bool) -> None:
    """The other Python can tell its version and no more: one that suits gets as far as the making."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    pretend = f"import sys; sys.version_info = ({version}); $4"
    other = tree.program("other-python", f'#!/bin/sh\n[ "$3" = -c ] && exec "$REAL_PYTHON" -c "{pretend}" "$5" "$6"\n')
    done = tree.setup(PYTHON=str(other))
    assert done.returncode == 1
    assert (f"could not make {tree.venv}" in done.stderr) == suits
    assert (f"PYTHON={other} does not run, or is not Python {wanted}" in done.stderr) != suits
    assert not tree.venv.exists()


def test_setup_refuses_to_ignore_another_python(tree: Tree) -> None:
    tree.setup()
    tree.requests()
    minor = 12 if sys.version_info.minor != 12 else 13
    pretend = f"import sys; sys.version_info = (3, {minor}); $4"
    other = tree.program("other-python", f'#!/bin/sh\nexec "$REAL_PYTHON" -c "{pretend}"\n')
    done = tree.setup(PYTHON=str(other))
    assert done.returncode == 1
    assert f"PYTHON={other} is another Python" in done.stderr
    assert not tree.requests()


def test_setup_without_any_python_names_what_it_needs(tree: Tree) -> None:
    done = tree.setup(PYTHON="")
    assert done.returncode == 1
    assert "PYTHON=/path/to/python" in done.stderr


def test_setup_leaves_a_folder_that_is_no_environment_alone(tree: Tree) -> None:
    precious = tree.folder / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    done = tree.setup(OPD_VENV=str(precious))
    assert done.returncode == 1
    assert str(precious) in done.stderr
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_setup_refuses_arguments(tree: Tree) -> None:
    assert run(tree.folder / "scripts/setup", "now").returncode == 2
    assert not tree.venv.exists()


def test_bench_lists_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    for argv in ([], ["toys"]):
        assert main(argv, tmp_path) == 2
        listing = capsys.readouterr().err
        assert "toy             Times nothing at all.\n" in listing
        assert "second paragraph" not in listing


def test_bench_runs_the_named_one_with_its_overrides(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    assert main(["toy", "--json", "speed=2.5"], tmp_path) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"speed": {"value": 2.5, "unit": "x", "bar": ">= 2", "ok": True}}
    assert main(["toy", "speed=1.5"], tmp_path) == 1
    assert "MISSED" in capsys.readouterr().out
    for wrong in ("--jsn", "speed"):
        assert main(["toy", wrong], tmp_path) == 2
        assert wrong in capsys.readouterr().err


def test_bench_without_a_name_exits_with_two() -> None:
    done = run(ROOT / "scripts/bench", OPD_VENV=sys.prefix)
    assert done.returncode == 2
    assert "usage: scripts/bench NAME" in done.stderr


def test_the_json_flag_may_stand_anywhere() -> None:
    assert split_arguments(["a=1", "--json", "b=x=y"]) == (True, ["a=1", "b=x=y"])
    assert split_arguments([]) == (False, [])


def test_the_table_is_aligned_and_only_a_missed_bar_fails(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [
        Figure(name="step", value=0.123456, unit="s"),
        Figure(name="tokens per second", value=1234567.8, unit="1/s", bar=">= 1000", ok=True),
    ]
    assert report("a step", figures, as_json=False) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a step",
        "  figure                 value  unit  bar",
        "  step                  0.1235  s     -",
        "  tokens per second  1,234,568  1/s   >= 1000  ok",
    ]
    assert report("a step", [*figures, Figure(name="x", value=1, unit="", bar="0", ok=False)], as_json=False) == 1


def test_report_refuses_two_figures_of_one_name() -> None:
    with pytest.raises(ValueError, match="share a name"):
        report("twice", [Figure(name="a", value=1, unit="")] * 2, as_json=True)


def test_interleaved_takes_turns_and_drops_the_warmup() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.01)

    seconds = interleaved({"fast": lambda: calls.append("fast"), "slow": slow}, repeats=3, warmup=2)
    assert calls == ["fast", "slow"] * 5
    assert {name: len(times) for name, times in seconds.items()} == {"fast": 3, "slow": 3}
    assert min(seconds["slow"]) >= 0.01 > min(seconds["fast"])
    with pytest.raises(ValueError, match="repeats=0"):
        interleaved({"slow": slow}, repeats=0)


def touch(num_bytes: int) -> np.ndarray:
    return np.ones(num_bytes, np.uint8)


def touch_twice(num_bytes: int) -> None:
    """The second array comes after the first has gone, so the peak is one array."""
    touch(num_bytes)
    touch(num_bytes)


def fail() -> None:
    raise SystemExit(7)


def test_peak_memory_sees_the_highest_moment_and_not_the_sum() -> None:
    size = 64 << 20
    growth = peak_memory(functools.partial(touch_twice, size), prepare=functools.partial(touch, 2 * size))
    assert 0.95 * size < growth < 1.2 * size  # the kernel counts pages in batches


def test_peak_memory_reports_a_process_that_died() -> None:
    with pytest.raises(RuntimeError, match="exit code 7"):
        peak_memory(fail)
