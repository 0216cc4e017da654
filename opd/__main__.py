"""The command line: `opd <command> key=value ...`. The only file that knows Hydra.

Hydra composes `conf/` and the overrides onto the dataclasses of `opd.config`; what comes out is a plain `Config`.
A mistake of the user's is one message and exit status 2, with nothing written over.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

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
    """Entry point of the console script; exits with 0, 1 (something broke) or 2 (the user's mistake)."""
    arguments = _parse(sys.argv[1:])
    _quieten()
    from opd.config import ConfigError

    try:
        sys.exit(_run(arguments))
    except ConfigError as error:
        print(f"opd {arguments.command}: {error}", file=sys.stderr)
        sys.exit(2)
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


def _run(arguments: argparse.Namespace) -> int:
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
                pipeline.run_base(config, runtime)
            case "specialist":
                pipeline.run_specialist(config, runtime, config.domain)
            case "distill":
                pipeline.run_distill(config, runtime)
            case _:  # evaluate, quickstart
                run = pipeline.run_quickstart if command == "quickstart" else pipeline.run_evaluate
                print(format_table(run(config, runtime)))
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
