"""A Hugging Face student, all of it or adapters alone, that two Hugging Face teachers teach: as a user would run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from opd.chat import Chat, train_tokenizer
from opd.weights import checkpoint_hash
from tests.test_pipeline import LETTERS, World, metrics_of

STEPS = 120
SETTINGS = (
    *("model.family=hf", "model.fp4=none", "model.fp4_index=false"),
    *("teachers.copy.family=hf", "teachers.next.family=hf", "pool.examine=off"),
    *(f"stages.distill.steps={STEPS}", "stages.distill.prompts_per_step=32", "stages.distill.kl_temperature=1"),
    *("stages.distill.hidden_dtype=float32", "learner.optimizer.weight_decay=0"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The two domains of `tests.test_pipeline`; a student and two wider teachers, with weights drawn at random."""
    world = World(tmp_path_factory.mktemp("hub"))
    texts = [f"{word} {letter}{n}" for word in ("copy", "next") for letter in LETTERS for n in range(10)]
    chat = Chat(train_tokenizer([*texts, *LETTERS], 320))
    for seed, (name, width) in enumerate((("student", 64), ("copy", 96), ("next", 96))):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=chat.vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            initializer_range=0.1,
            tie_word_embeddings=False,
            bos_token_id=chat.bos_id,
            eos_token_id=chat.eos_id,
            pad_token_id=chat.pad_id,
        )
        Qwen3ForCausalLM(config).save_pretrained(world.root / name)
        chat.save(world.root / name)
    return world


@torch.no_grad()
def divergence(student: Path, teacher: Path, domain: str, world: World) -> float:
    """KL(student || teacher) of every token of a domain's questions and of an answer, in nats per token, by dense
    logits and transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    log_probs: list[Tensor] = []
    for folder in (student, teacher):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = [json.loads(line) for line in (world.root / f"{domain}.jsonl").read_text().splitlines()[::40]]
        parts = []
        for row in rows:
            messages = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([[*prompt, *tokenizer.encode(row["answer"])]])
            parts.append(model(input_ids=ids).logits[0, len(prompt) - 1 :].double().log_softmax(-1))
        log_probs.append(torch.cat(parts))
    log_p, log_q = log_probs
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("kind", "runtime"), [("full", "local"), ("lora", "local"), ("lora", "ray")])
def test_two_teachers_teach_a_student(kind: str, runtime: str, world: World, ray_cluster: Any) -> None:
    settings = [*SETTINGS, f"model.path={world.root}/student"]
    settings += [f"teachers.{name}.path={world.root}/{name}" for name in ("copy", "next")]
    settings += ["stages.distill.learning_rate=3e-3" if kind == "full" else "stages.distill.learning_rate=1e-2"]
    if kind == "lora":
        settings += ["model.lora.rank=8", "model.lora.alpha=16"]
    before = {name: checkpoint_hash(world.root / name) for name in ("student", "copy", "next")}
    folder = world.opd("distill", f"{kind}_{runtime}", *settings, runtime=runtime) / "student"

    lines = metrics_of(folder)
    assert len(lines) == STEPS and all(line["gap/k3"] < 1e-6 for line in lines)
    for domain in ("copy", "next"):
        seen = [line[f"distill/reverse_kl/{domain}"] for line in lines]
        assert sum(seen[-5:]) < 0.75 * sum(seen[:5]), domain  # adapters cannot reach the head, so not to nothing
        own, other = world.root / domain, world.root / ("next" if domain == "copy" else "copy")
        reached = divergence(folder / "hf", own, domain, world)
        assert reached < 0.75 * divergence(world.root / "student", own, domain, world), domain
        if kind == "full":
            assert reached < 0.75 * divergence(folder / "hf", other, domain, world), "its own domain's teacher"
    assert before == {name: checkpoint_hash(world.root / name) for name in before}, "what was read was not written"
    start, end = (load_file(path / "model.safetensors") for path in (world.root / "student", folder / "hf"))
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    if kind == "full":
        assert changed == set(start)
    else:
        assert changed == {name for name in start if "_proj." in name}
        assert ((folder / "hf").resolve().parent / "adapter").is_dir()
