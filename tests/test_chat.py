"""Chat encoding: bytes survive, the layout is V4's, turns extend each other, and foreign tokenizers are told apart."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd.chat import (
    ASSISTANT,
    BOS,
    EOS,
    MAX_EFFORT_INSTRUCTION,
    SPECIAL_TOKENS,
    USER,
    Chat,
    tokenizer_difference,
    train_tokenizer,
)
from opd.config import EFFORTS, ConfigError

TEXTS = [f"{i:x}{word}{i:o} {word[::-1]}" for i in range(40) for word in ("number", "backward", "what", "final")]
TEXTS += [f"{chr(97 + a)}{chr(97 + b)}" for a in range(20) for b in range(20)]

# A layout of another family: tags per message, an end-of-turn token that is not EOS, thinking behind a switch.
OTHER_TEMPLATE = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(TEXTS, 400))


def other_tokenizer(template: str | None = OTHER_TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def edited(chat: Chat, folder: Path, **changes: str) -> Chat:
    """The chat, saved, changed on disk and loaded: what a teacher with a slightly different tokenizer looks like."""
    chat.save(folder)
    for name, text in changes.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return Chat.load(str(folder))


def random_text(rng: random.Random) -> str:
    points = [
        rng.choice((rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in "x" * 40
    ]
    return "".join(map(chr, points))


def test_special_tokens_come_first_in_order(chat: Chat) -> None:
    assert [chat.tokenizer.convert_ids_to_tokens(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert (chat.bos_id, chat.eos_id, chat.pad_id, chat.stop_ids) == (0, 1, 1, (1,))
    assert chat.vocab_size == len(chat.tokenizer) == 400


def test_any_text_round_trips_and_gets_no_bos(chat: Chat) -> None:
    rng = random.Random(0)
    for text in [random_text(rng) for _ in range(200)] + [" \n\t  \r\n", "", "a  b", "e\u0301", "\U0001f600"]:
        ids = chat.encode_text(text)
        assert chat.decode(ids) == text
        assert chat.bos_id not in ids
    every_byte = {i for point in range(0x800) for i in chat.encode_text(chr(point))}
    assert max(every_byte) < 400


def test_digits_are_single_tokens(chat: Chat) -> None:
    text = "7 1234567890 12"
    tokens = chat.tokenizer.convert_ids_to_tokens(list(chat.encode_text(text)))
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


def test_training_is_deterministic() -> None:
    first, second = train_tokenizer(TEXTS, 380), train_tokenizer(iter(TEXTS), 380)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size=270 is too small.*271"):
        train_tokenizer(TEXTS, 270)


def test_golden_layout_of_the_three_efforts(chat: Chat) -> None:
    messages = [
        {"role": "system", "content": "Sys."},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1", "reasoning_content": "R1"},
        {"role": "user", "content": "Q2"},
    ]
    turns = f"Sys.{USER}Q1{ASSISTANT}</think>A1{EOS}{USER}Q2{ASSISTANT}"
    assert chat.render(messages, "none") == f"{BOS}{turns}</think>"
    assert chat.render(messages, "high") == f"{BOS}{turns}<think>"
    assert chat.render(messages, "max") == f"{BOS}{MAX_EFFORT_INSTRUCTION}\n\n{turns}<think>"
    answered = [*messages, {"role": "assistant", "content": "A2", "reasoning_content": "R2"}]
    assert chat.render(answered, "high", generation_prompt=False) == f"{BOS}{turns}<think>R2</think>A2{EOS}"
    assert chat.render(answered, "none", generation_prompt=False) == f"{BOS}{turns}</think>A2{EOS}"
    assert chat.encode_prompt(messages[1:2], "none") == (0, 2, *chat.encode_text("Q1"), 3, 5)


def test_turns_extend_each_other_token_by_token(chat: Chat) -> None:
    rng = random.Random(1)
    messages = [{"role": "system", "content": "Sys."}]
    thinking: tuple[int, ...] = ()
    for _ in range(5):
        messages.append({"role": "user", "content": random_text(rng)})
        answer = random_text(rng)
        before = chat.encode_prompt(messages, "none") + chat.encode_completion(answer, "none")
        thinking = chat.encode_prompt(messages, "high") + chat.encode_completion(answer, "high", "because")
        messages.append({"role": "assistant", "content": answer, "reasoning_content": "because"})
        assert chat.encode_text(chat.render(messages, "high", generation_prompt=False)) == thinking
        after = chat.encode_prompt([*messages, {"role": "user", "content": "next"}], "none")
        assert after[: len(before)] == before
    # With thinking the reasoning is dropped from history, so there the property must not hold.
    after = chat.encode_prompt([*messages, {"role": "user", "content": "next"}], "high")
    assert after[: len(thinking)] != thinking


def test_completions_are_read_back(chat: Chat) -> None:
    for effort in EFFORTS:
        ids = chat.encode_completion(" 12 + x\n", effort, reasoning="first 10")
        assert ids[-1] == chat.eos_id
        assert chat.answer_text(ids, effort) == " 12 + x\n"
        assert chat.answer_text(ids[:-1], effort) is None  # unfinished
    thinking = chat.encode_completion("12", "high", reasoning="first 10")
    assert chat.decode(thinking) == "first 1012"
    assert chat.answer_text([i for i in thinking if i != 5], "high") is None  # reasoning never closed
    assert chat.encode_completion("12", "high") == (5, *chat.encode_text("12"), 1)
    assert chat.encode_completion("12", "none", reasoning="dropped") == (*chat.encode_text("12"), 1)
    assert chat.answer_text([], "none") is None
    assert chat.answer_text([1], "none") == ""


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "x"}], "unknown role tool"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "system message must be the first"),
    ],
)
def test_messages_the_layout_cannot_hold_are_refused(chat: Chat, messages: list[dict[str, str]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        chat.encode_prompt(messages, "none")
    with pytest.raises(ConfigError, match=r"effort='low'.*none, high, max"):
        chat.encode_prompt([{"role": "user", "content": "x"}], "low")


def test_tools_are_refused(chat: Chat) -> None:
    with pytest.raises(Exception, match="no tool calls"):
        chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tools=[{"type": "function"}], tokenize=False
        )


def test_a_saved_folder_opens_with_autotokenizer(chat: Chat, tmp_path: Path) -> None:
    chat.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))  # as in a checkpoint folder
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == chat.tokenizer.chat_template
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True, effort="high"
    )
    assert rendered == f"{BOS}{USER}hi{ASSISTANT}<think>"
    loaded = Chat.load(str(tmp_path))
    assert tokenizer_difference(chat, loaded) is None
    assert loaded.answer_text(chat.encode_completion("12", "max", "so"), "max") == "12"


def test_swapped_ids_are_found(chat: Chat, tmp_path: Path) -> None:
    chat.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    names = {i: token for token, i in content["model"]["vocab"].items()}
    content["model"]["vocab"] |= {names[350]: 360, names[360]: 350}
    other = edited(chat, tmp_path, tokenizer__json=json.dumps(content))
    difference = tokenizer_difference(chat, other)
    assert difference is not None
    assert difference.startswith(f"id 350 is {names[350]!r} in 'tokenizer' but {names[360]!r} in")


def test_missing_ids_other_specials_and_other_templates_are_found(chat: Chat, tmp_path: Path) -> None:
    longer = edited(chat, tmp_path / "longer")
    longer.tokenizer.add_tokens(["<extra>"])
    longer = Chat(longer.tokenizer, name="longer")
    assert tokenizer_difference(chat, longer) == "id 400 is absent in 'tokenizer' but '<extra>' in 'longer'"
    padded = edited(chat, tmp_path / "padded")
    padded.tokenizer.pad_token = BOS
    padded = Chat(padded.tokenizer, name="padded")
    assert tokenizer_difference(chat, padded) == "pad_id is 1 in 'tokenizer' but 0 in 'padded'"
    template = chat.tokenizer.chat_template
    assert isinstance(template, str)
    changed = template.replace(MAX_EFFORT_INSTRUCTION, MAX_EFFORT_INSTRUCTION + " Now.")
    difference = tokenizer_difference(chat, edited(chat, tmp_path / "template", chat_template__jinja=changed))
    assert difference is not None
    assert difference.startswith("the chat templates differ for effort max: after") and "Now." in difference
    assert tokenizer_difference(chat, edited(chat, tmp_path / "same")) is None


def test_another_pre_tokenizer_over_the_same_vocabulary_is_found(chat: Chat, tmp_path: Path) -> None:
    chat.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][::-1]
    difference = tokenizer_difference(chat, edited(chat, tmp_path, tokenizer__json=json.dumps(content)))
    assert difference is not None and difference.startswith("the same prompt encodes to")


def test_a_models_own_layout(tmp_path: Path) -> None:
    other = Chat(other_tokenizer())
    assert other.efforts == ("none", "high")
    end = other.tokenizer.convert_tokens_to_ids("<|end|>")
    assert other.stop_ids == (end, other.eos_id)
    question = [{"role": "user", "content": "hi"}]
    assert other.render(question, "none") == "<|turn|>user\nhi<|end|>\n<|turn|>assistant\n<think>\n\n</think>\n\n"
    assert other.render(question, "high") == "<|turn|>user\nhi<|end|>\n<|turn|>assistant\n"
    ids = other.encode_completion("12", "high", "so")
    assert other.encode_text("<think>\nso\n</think>\n\n12<|end|>") == ids
    assert (other.answer_text(ids, "high") or "").strip() == "12"
    with pytest.raises(ConfigError, match=r"effort='max' is not known .* none, high"):
        other.encode_prompt(question, "max")
    silent = Chat(other_tokenizer(OTHER_TEMPLATE.replace("enable_thinking", "add_generation_prompt")))
    assert silent.efforts == ("none",)
    graded = Chat(other_tokenizer(OTHER_TEMPLATE + "{{ reasoning_effort | default('') }}"))
    assert graded.efforts == EFFORTS
    assert graded.render(question, "max").endswith("assistant\nmax")


def test_v4s_tokenizer_without_a_template_gets_its_layout() -> None:
    bare = Chat(other_tokenizer(template=None))
    assert bare.render([{"role": "user", "content": "hi"}], "none") == f"{BOS}{USER}hi{ASSISTANT}</think>"


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer that loads"):
        Chat.load(str(tmp_path))
    with pytest.raises(ConfigError, match="is neither a folder nor a readable hub id"):
        Chat.load(str(tmp_path / "nothing"))
    plain = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(TEXTS, 320).backend_tokenizer)
    with pytest.raises(ConfigError, match="has no EOS"):
        Chat(plain)
    plain.eos_token = "a"
    named = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, eos_token=EOS)
    named.chat_template = {"default": "x", "rag": "y"}
    with pytest.raises(ConfigError, match="must have one chat template; it has several"):
        Chat(named)
