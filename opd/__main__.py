"""The command line: `opd <command> key=value ...`. The only file that knows Hydra.

Hydra composes `conf/` and the overrides onto the dataclasses of `opd.config`; what comes out is a plain `Config`.
A mistake of the user's is one message and exit status 2, with nothing written over. A run that is asked to stop
(SIGTERM, SIGINT) saves, and ends with status 0 and the command that goes on with it.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.stop import Stop

COMMANDS = {
    "quickstart": "the whole chain on three small domains, from nothing to a distilled student",
    "tokenizer": "train the run's tokenizer on the domains' text",
    "base": "build the base model and give it a short SFT on all domains",
    "specialist": "train the teacher of one domain: SFT, then GRPO (needs domain=NAME)",
    "distill": "distil all teachers into one student, on-policy",
    "evaluate": "score base, teachers and student; write summary.json and report.html",
    "report": "write report.html again from what the run has logged",
    "cost": "print cache bytes and FLOPs per token of V4-Flash, V4-Pro, the model and V3.2 (context=N, out=FILE.html)",
    "check": "print routing, teachers and memory, and refuse what cannot work; starts nothing",
}


def main() -> None:
    """Entry point of the console script; exits with 0 (done, or stopped on request), 1 (something broke), 2 (the user's
    mistake) or 130 (interrupted at once)."""
    arguments = _parse(sys.argv[1:])
    _quieten()
    from opd.config import ConfigError
    from opd.stop import Stop, Stopped

    stop = Stop()
    try:
        with stop.signals():
            status = _run(arguments, stop)
        sys.exit(status)
    except Stopped:
        print(f"opd {arguments.command}: stopped. To go on:\n{_resuming(sys.argv[1:])}")
        sys.exit(0)
    except ConfigError as error:
        print(f"opd {arguments.command}: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        from teachers.remote import TeacherError

        if not isinstance(error, TeacherError):
            raise
        again = f"To go on when that is mended:\n{_resuming(sys.argv[1:])}"
        print(f"opd {arguments.command}: {error}\n{again}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"opd {arguments.command}: interrupted", file=sys.stderr)
        sys.exit(130)


def _parse(argv: list[str]) -> argparse.Namespace:
    commands = "\n".join(f"  {name:<11} {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="opd",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Many domain specialists into one student.\n\ncommands:\n{commands}",
        epilog="Overrides are Hydra's: key=value sets, +key=value adds, group=name or group=[a,b] selects YAML files "
        "of conf/.\nExample: opd distill experiment=quickstart runtime=local stages.distill.steps=50",
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="command")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--cfg", choices=["job"], help="print the composed configuration and stop")
    parser.add_argument("--config-dir", help="a further folder with data/, teachers/, ... of YAML files")
    return parser.parse_intermixed_args(argv)


def compose(command: str, overrides: list[str], config_dir: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The typed `Config` and the same as plain containers. Raises ConfigError for what Hydra or the schema refuses."""
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    import conf
    from opd.config import Config, ConfigError, check_config, check_keys

    OmegaConf.register_new_resolver("cores", lambda most: min(int(most), _num_cores()), replace=True)
    ConfigStore.instance().store(name="schema", node=Config)
    if command == "quickstart" and not any(override.lstrip("+~").startswith("experiment") for override in overrides):
        overrides = ["experiment=quickstart", *overrides]
    folders = [os.path.dirname(os.path.abspath(conf.__file__))]
    if config_dir is not None:
        _check_config_dir(config_dir, folders[0])
        folders.append(os.path.abspath(config_dir))
        overrides = [*overrides, f"hydra.searchpath=[file://{folders[1]}]"]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(folders[0], version_base="1.3"):
            composed = hydra_compose("config", overrides)
        config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
        plain: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        raise ConfigError(
            f"{group}={name} selects no file; {group} has: {', '.join(_options(folders, group))}"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"a configuration file is not YAML: {_in_one_line(error)}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra on some overrides
        raise ConfigError(_in_one_line(error)) from error
    check_keys(plain, config)
    check_config(config)
    return config, plain


def _options(folders: list[str], group: str) -> list[str]:
    """Names of the YAML files of a configuration group."""
    files = {file for folder in folders for _, _, found in os.walk(os.path.join(folder, group)) for file in found}
    return sorted(file.removesuffix(".yaml") for file in files if file.endswith(".yaml"))


def _check_config_dir(config_dir: str, built_in: str) -> None:
    """Raises ConfigError for a folder that is not there, and for files in it that Hydra would find in conf/ instead."""
    from opd.config import ConfigError

    if not os.path.isdir(config_dir):
        raise ConfigError(f"--config-dir {config_dir} is not a folder")
    for folder, _, files in os.walk(config_dir):
        for file in files:
            name = os.path.relpath(os.path.join(folder, file), config_dir)
            if file.endswith(".yaml") and os.path.exists(os.path.join(built_in, name)):
                raise ConfigError(f"--config-dir {config_dir}: {name} is also a file of conf/; give it another name")


def _resuming(argv: list[str]) -> str:
    """The command that goes on with the run that `argv` began."""
    kept = [argument for argument in argv if not argument.startswith(("resume=", "run.overwrite="))]
    return shlex.join(["opd", *kept, "resume=auto"])


def _run(arguments: argparse.Namespace, stop: Stop) -> int:
    overrides, own = _split_own(arguments.command, arguments.overrides)
    config, resolved = compose(arguments.command, overrides, arguments.config_dir)
    if arguments.cfg:
        import yaml

        print(yaml.safe_dump(resolved, sort_keys=False), end="")
        return 0
    if arguments.command == "cost":
        from opd.cost import run_cost

        print("\n".join(run_cost(config, own.get("context", "1048576"), own.get("out"))))
        return 0
    from opd import pipeline
    from opd.actors import open_runtime
    from opd.config import ConfigError
    from opd.report import format_table, write_report

    command: str = arguments.command
    pipeline.check_resume(config, command)
    if command == "check":
        print("\n".join(pipeline.check(config)))
        return 0
    if command == "report":
        if not os.path.isdir(config.run.dir):
            raise ConfigError(f"run.name={config.run.name}: {config.run.dir} is not the folder of a run")
        print(write_report(config.run.dir))
        return 0
    if command == "specialist" and config.domain is None:
        raise ConfigError(f"domain is null; choose one of {', '.join(config.data.domains)}")
    if command == "tokenizer":
        with pipeline.open_run(config):
            pipeline.run_tokenizer(config)
        return 0
    with pipeline.open_run(config), open_runtime(config.runtime) as runtime:
        match command:
            case "base":
                pipeline.run_base(config, runtime, stop)
            case "specialist":
                pipeline.run_specialist(config, runtime, config.domain, stop)
            case "distill":
                pipeline.run_distill(config, runtime, stop)
            case _:  # evaluate, quickstart
                if command == "quickstart":
                    summary = pipeline.run_quickstart(config, runtime, stop)
                else:
                    summary = pipeline.run_evaluate(config, runtime)
                print(format_table(summary))
                print(f"report: {os.path.join(config.run.dir, 'report.html')}")
    return 0


def _split_own(command: str, overrides: list[str]) -> tuple[list[str], dict[str, str]]:
    """Hydra's overrides, and the keys that are a question to one command rather than settings of a run."""
    names = {"cost": ("context", "out")}.get(command, ())
    own = [override for override in overrides if override.partition("=")[0] in names]
    settings = {key: value for key, _, value in (override.partition("=") for override in own)}
    return [override for override in overrides if override not in own], settings


def _in_one_line(error: BaseException) -> str:
    """The first lines of a library's message and of its cause, which is where OmegaConf says what it expected."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines[:5])
    return f"{message}: {_in_one_line(error.__cause__)}" if error.__cause__ is not None else message


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quieten() -> None:
    """One log format for ours, silence for the libraries' chatter; errors of all come through."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for name in ("opd", "rollout", "teachers"):
        logging.getLogger(name).setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
