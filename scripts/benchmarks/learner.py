"""One whole step of on-policy distillation beside TRL's DistillationTrainer: seconds, memory, and the KL reached.

Both distil the same Qwen3-shaped teacher into the same student with random weights, in FP32 and one process each, on
the same prompts with completions of the same length and the exact reverse KL, by AdamW under the same settings. A run
is a fresh process and the two take turns. A step is everything between the end of one and that of the next: sampling,
scoring, learning, and here also publishing. Memory is the highest resident size until the end of the last step, above
what was resident once everything was imported. What students then are worth is measured from outside, by transformers
and dense logits alone: the exact reverse KL per token on what they sample for held-out prompts.

Settings: vocabulary (131072), prompts of a step (8), tokens of a completion (64), steps (10), runs of each (5), the
first run's seed (0), torch threads (1). Needs trl, which this project does not: pip install --no-deps trl==1.16.0
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from opd.chat import train_tokenizer
from opd.config import ConfigError
from scripts.benchmarks import (
    Figure,
    high_water_mark,
    in_process,
    report,
    reset_high_water_mark,
    split_arguments,
    whole_numbers,
)

DEFAULTS = {"vocabulary": 131072, "prompts": 8, "tokens": 64, "steps": 10, "runs": 5, "seed": 0, "threads": 1}
WARM_UP = 2  # steps of a run that are not timed
STUDENT, TEACHER = (64, 2), (128, 4)  # hidden size and layers
SPREAD = 0.1  # of the teacher's weights: logits that spread by about one nat, as those of a model that knows something
HELD_OUT = 32
LEARNING_RATE, BETAS, EPSILON, CLIP = 1e-3, (0.9, 0.95), 1e-8, 1.0
WORDS = ("ask", "tell", "give", "take", "north", "south", "east", "west", "red", "blue", "one", "two", "three", "four")


@dataclass(slots=True, kw_only=True, frozen=True)
class Run:
    """What one process reports."""

    seconds: list[float]  # of every step after the first ones
    peak: int  # bytes above imports


def main(argv: list[str]) -> int:
    """The exit status of `report`. Raises ConfigError for settings that are refused, and without trl."""
    as_json, overrides = split_arguments(argv)
    settings = whole_numbers(overrides, DEFAULTS, 0)
    for name, least in (("steps", WARM_UP + 1), ("runs", 2), ("prompts", 1), ("tokens", 1), ("threads", 1)):
        if settings[name] < least:
            raise ConfigError(f"{name}={settings[name]} is too small; it must be at least {least}")
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("trl is not installed, and is what this compares with: pip install --no-deps trl==1.16.0")
    with tempfile.TemporaryDirectory(prefix="opd_learner_") as folder:
        prepare(Path(folder), settings)
        runs: dict[str, list[Run]] = {"ours": [], "trl": []}
        divergences: dict[str, list[float]] = {"ours": [], "trl": []}
        for seed in range(settings["seed"], settings["seed"] + settings["runs"]):
            for name, steps in (("trl", trl_steps), ("ours", our_steps)):
                runs[name].append(in_process(steps, Path(folder), settings, seed))
                divergences[name].append(in_process(held_out_kl, Path(folder) / f"{name}_{seed}", settings, seed))
        start = in_process(held_out_kl, Path(folder) / "student", settings, 0)
    return report(
        f"one step of distillation: {settings['prompts']} prompts, {settings['tokens']} new tokens each, vocabulary "
        f"{settings['vocabulary']}, {settings['threads']} thread(s)",
        figures(runs, divergences, start),
        as_json,
    )


def figures(runs: dict[str, list[Run]], divergences: dict[str, list[float]], start: float) -> list[Figure]:
    seconds = {name: median(median(run.seconds) for run in found) for name, found in runs.items()}
    peaks = {name: median(run.peak for run in found) for name, found in runs.items()}
    faster, smaller = seconds["trl"] / seconds["ours"], peaks["ours"] / peaks["trl"]
    gaps = [ours - trl for ours, trl in zip(divergences["ours"], divergences["trl"], strict=True)]
    error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return [
        Figure(name="step", value=seconds["ours"], unit="s"),
        Figure(name="step of TRL", value=seconds["trl"], unit="s"),
        Figure(name="faster", value=faster, unit="x", bar=">= 3", ok=faster >= 3),
        Figure(name="memory", value=peaks["ours"] / 2**20, unit="MiB"),
        Figure(name="memory of TRL", value=peaks["trl"] / 2**20, unit="MiB"),
        Figure(name="memory over TRL's", value=smaller, unit="x", bar="<= 0.5", ok=smaller <= 0.5),
        Figure(name="held-out KL before", value=start, unit="nats/token"),
        Figure(name="held-out KL after", value=mean(divergences["ours"]), unit="nats/token"),
        Figure(name="held-out KL after, of TRL", value=mean(divergences["trl"]), unit="nats/token"),
        Figure(
            name="KL above TRL's",
            value=mean(gaps),
            unit="nats/token",
            bar=f"<= 2 standard errors ({2 * error:.2g})",
            ok=mean(gaps) <= 2 * error,
        ),
    ]


# --- what both start from ---------------------------------------------------------------------------------------------


def prepare(folder: Path, settings: dict[str, int]) -> None:
    """Tokenizer, student, teacher and prompts."""
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=8)) for _ in range(2000)]
    tokenizer = wide_tokenizer(prompts, settings["vocabulary"])
    for name, (width, layers), spread, seed in (("student", STUDENT, 0.02, 0), ("teacher", TEACHER, SPREAD, 1)):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=settings["vocabulary"],
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 32,
            head_dim=16,
            max_position_embeddings=1024,
            initializer_range=spread,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(str(folder / name))
    rows = [json.dumps({"prompt": prompt, "answer": prompt}) + "\n" for prompt in prompts]
    (folder / "held_out.jsonl").write_text("".join(rows[:HELD_OUT]))
    (folder / "train.jsonl").write_text("".join(rows[HELD_OUT:]))


def wide_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE with as many entries as asked for: no text has so many pairs, so most are made up."""
    tokenizer = train_tokenizer(texts, 512)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, merges = described["model"]["vocab"], described["model"]["merges"]
    special = set(tokenizer.all_special_tokens) | {entry["content"] for entry in described["added_tokens"]}
    entries = [entry for entry in vocab if entry not in special]
    longer = list(entries)
    for first, second in ((first, second) for first in longer for second in entries):  # the list grows meanwhile
        if len(vocab) >= vocab_size:
            break
        if first + second not in vocab:
            vocab[first + second] = len(vocab)
            merges.append([first, second])
            longer.append(first + second)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))
    return tokenizer


# --- one run --------------------------------------------------------------------------------------------------------


class Meter:
    """Seconds and memory of a run, from here to the end of its last step."""

    def __init__(self) -> None:
        reset_high_water_mark()
        self.before = psutil.Process().memory_info().rss
        self.peak = 0
        self.ends: list[float] = []

    def end_of_step(self) -> None:
        self.ends.append(time.perf_counter())
        self.peak = high_water_mark() - self.before

    def run(self) -> Run:
        seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        return Run(seconds=seconds[WARM_UP - 1 :], peak=self.peak)


def trl_steps(folder: Path, settings: dict[str, int], seed: int) -> Run:
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from datasets import Dataset
    from transformers import TrainerCallback

    trl: Any = importlib.import_module("trl")  # by name: it is none of the project's packages
    trainer_class = trl.DistillationTrainer  # is only now imported
    torch.set_num_threads(settings["threads"])
    lines = (folder / "train.jsonl").read_text().splitlines()
    meter = Meter()
    rows = [{"prompt": [{"role": "user", "content": json.loads(line)["prompt"]}]} for line in lines]

    class Metered(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.end_of_step()

    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    config = trl.DistillationConfig(
        output_dir=str(folder / f"trl_{seed}_output"),
        seed=seed,
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["prompts"],
        max_completion_length=settings["tokens"],
        beta=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Metered()],
    )
    trainer.train()
    trainer.save_model(str(folder / f"trl_{seed}"))
    return meter.run()


def our_steps(folder: Path, settings: dict[str, int], seed: int) -> Run:
    import datasets  # noqa: F401  what is imported is not counted
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import opd.train
    import rollout.hub_engine  # noqa: F401
    from opd import pipeline
    from opd.__main__ import compose
    from opd.actors import open_runtime
    from opd.engine import prepare_deepspeed

    prepare_deepspeed("cpu")
    import deepspeed  # noqa: F401

    meter = Meter()
    (folder / "conf" / "data").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "teachers").mkdir(exist_ok=True)
    (folder / "conf" / "data" / "words.yaml").write_text(
        f"# @package data.domains.words\nsource: rows\npath: {folder}/train.jsonl\n"
        f"eval_path: {folder}/held_out.jsonl\nnum_eval: 8\n"
    )
    (folder / "conf" / "teachers" / "words.yaml").write_text(
        f"# @package teachers.words\npath: {folder}/teacher\nfamily: hf\n"
    )
    overrides = [
        f"run.root={folder}/runs",
        f"run.name=ours_{seed}",
        f"seed={seed}",
        *("~experiment", "data=[words]", "teachers=[words]", "runtime=local", "tracking.wandb=disabled"),
        f"runtime.actor_threads={settings['threads']}",
        *("model=hf", f"model.path={folder}/student", f"model.max_tokens={settings['tokens'] + 192}"),
        f"rollout.sampling.max_new_tokens={settings['tokens']}",
        *("learner=adamw", f"learner.optimizer.betas=[{BETAS[0]},{BETAS[1]}]", f"learner.optimizer.eps={EPSILON}"),
        *("learner.optimizer.weight_decay=0", f"learner.grad_clip={CLIP}"),
        *(f"stages.distill.steps={settings['steps']}", f"stages.distill.prompts_per_step={settings['prompts']}"),
        *(f"stages.distill.learning_rate={LEARNING_RATE}", "stages.distill.warmup_steps=0"),
        *("stages.distill.hidden_dtype=float32", "stages.distill.checkpoint_every=0"),
    ]
    config = compose("distill", overrides, config_dir=str(folder / "conf"))[0]
    settle = opd.train.Saver.settle

    def settling(saver: opd.train.Saver) -> None:
        """Called when a step has published, and once more by the checkpoint that ends the run and is no part of it."""
        if len(meter.ends) < settings["steps"]:
            meter.end_of_step()
        settle(saver)

    opd.train.Saver.settle = settling  # type: ignore[method-assign]
    with pipeline.open_run(config), open_runtime(config.runtime) as runtime:
        pipeline.run_distill(config, runtime)
    os.symlink(Path(pipeline.student_path(config)).resolve(), folder / f"ours_{seed}")
    return meter.run()


# --- from outside -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def held_out_kl(student: Path, settings: dict[str, int], seed: int) -> float:
    """KL(student || teacher) in nats per token over the whole vocabulary, of samples for the held-out prompts."""
    folder = student.parent
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    policy: Any
    teacher: Any
    policy, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, folder / "teacher")
    )
    prompts = [json.loads(line)["prompt"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    torch.manual_seed(1000 + seed)
    total, count = 0.0, 0
    for begin in range(0, len(prompts), 16):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[begin : begin + 16]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        length = inputs["input_ids"].shape[1]
        sampled = policy.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=settings["tokens"]
        )
        is_end = sampled[:, length:] == tokenizer.eos_token_id
        counted = is_end.cumsum(1) - is_end.long() == 0  # the end itself counts, what follows does not
        mask = torch.cat([inputs["attention_mask"], counted.long()], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = [
            model.model(input_ids=sampled, attention_mask=mask, position_ids=positions).last_hidden_state
            for model in (policy, teacher)
        ]
        for row in range(len(chats)):
            log_p, log_q = (
                model.lm_head(states[row, length - 1 : -1][counted[row]]).double().log_softmax(-1)
                for model, states in zip((policy, teacher), hidden, strict=True)
            )
            total += (log_p.exp() * (log_p - log_q)).sum().item()
            count += int(counted[row].sum())
    return total / count
