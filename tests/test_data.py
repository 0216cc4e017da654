"""Domains: nothing held out is trained on, streams resume, and a table that does not fit is named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from opd.chat import ASSISTANT, BOS, USER, Chat, train_tokenizer
from opd.config import Config, ConfigError, DataConfig, DomainConfig, ModelConfig
from opd.data import Domain, PromptStream, domain_texts, load_domains, stable_hash
from opd.types import Prompt
from opd.verifiers import verify

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # a space of 200 questions


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(["State the final answer to the following arithmetic problem"] * 9, 320))


@pytest.fixture(autouse=True)
def table_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def config_of(max_tokens: int = 1024, /, **domains: DomainConfig) -> Config:
    return Config(data=DataConfig(domains=domains), model=ModelConfig(max_tokens=max_tokens))


def load(chat: Chat, max_tokens: int = 1024, /, **settings: Any) -> Domain:
    return load_domains(config_of(max_tokens, d=DomainConfig(**settings)), chat)["d"]


def sums(**settings: Any) -> DomainConfig:
    return DomainConfig(**{"task": "chain_sum", "params": ONE_DIGIT, "num_train": 300, "num_eval": 20} | settings)


def write(path: Path, table: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pandas.DataFrame(table).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return str(path)


def questions(prompts: list[Prompt]) -> list[str]:
    return [prompt.reference["question"] for prompt in prompts]


def all_train(domain: Domain) -> list[Prompt]:
    return [domain.train(index) for index in range(domain.train_size)]


# --- reasoning-gym tasks


def test_no_held_out_question_is_trained_on(chat: Chat) -> None:
    domain = load_domains(config_of(d=sums(num_eval=60)), chat)["d"]
    held_out, trained = questions(domain.eval), questions(all_train(domain))
    assert len(set(held_out)) == len(held_out) == 60
    assert domain.train_size == len(trained) == 300
    assert not set(held_out) & set(trained)
    assert len({prompt.id for prompt in domain.eval + all_train(domain)}) == 360
    # Drawn from 200 questions, 300 training draws would have met a held-out one: the filter had work to do.
    assert any(prompt.reference["metadata"]["source_index"] != i for i, prompt in enumerate(all_train(domain)))


def test_questions_depend_on_seed_and_index_alone(chat: Chat) -> None:
    first = load_domains(config_of(a=sums(), b=sums(effort="high"), c=sums(seed=1)), chat)
    again = load_domains(config_of(c=sums(seed=1), a=sums()), chat)
    assert [again["a"].train(i) for i in (7, 3, 299)] == [first["a"].train(i) for i in (7, 3, 299)]
    assert again["c"].eval == first["c"].eval
    assert questions(first["a"].eval) == questions(first["b"].eval)  # same task and seed: held out for both
    assert questions(first["a"].eval) != questions(first["c"].eval)


def test_prompts_and_demonstrations_of_a_task(chat: Chat) -> None:
    domain = load_domains(config_of(d=sums(answer_format="tags", effort="high", instruction="Think.")), chat)["d"]
    prompt = domain.train(5)
    reference = prompt.reference
    assert (prompt.id, prompt.domain, prompt.effort) == ("d/train/5", "d", "high")
    text = f"{BOS}Think.{USER}{reference['question']}{ASSISTANT}<think>"
    assert prompt.token_ids == chat.encode_text(text)
    demonstration = domain.demonstration(prompt)
    size = len(prompt.token_ids)
    assert (demonstration.id, demonstration.prompt_id) == ("d/train/5#demo", "d/train/5")
    assert (demonstration.version_spans, demonstration.finish_reason) == ((), "stop")
    assert demonstration.token_ids.dtype == np.int32 and demonstration.sampler_logprobs.dtype == np.float32
    assert tuple(demonstration.token_ids[:size]) == prompt.token_ids
    assert not demonstration.loss_mask[:size].any() and demonstration.loss_mask[size:].all()
    assert not demonstration.sampler_logprobs.any() and len(demonstration.sampler_logprobs) == len(
        demonstration.loss_mask
    )
    assert demonstration.token_ids[-1] == chat.eos_id
    answer = chat.answer_text(demonstration.token_ids[size:].tolist(), "high")
    assert answer == f"<answer>{reference['answer']}</answer>"
    assert verify(domain.config, prompt, answer).passed


def test_too_few_questions_to_hold_out(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    params = ONE_DIGIT | {"max_terms": 1, "min_terms": 1}  # ten questions
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.num_eval=50 leaves nothing to train on"):
        load(chat, task="chain_sum", params=params, num_eval=50)
    assert "there are 10 distinct questions" in caplog.text
    assert len(load(chat, task="chain_sum", params=params, num_eval=9).eval) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"task": "chain_sums"},
            r"data\.domains\.d\.task='chain_sums' is not a reasoning-gym task; close: .*chain_sum",
        ),
        ({"task": "zzz"}, r"it has .*chain_sum"),
        ({"params": {"min_term": 2}}, r"d\.params\.min_term is not a setting of chain_sum; it has: min_terms,"),
        ({"params": {"min_terms": 3, "max_terms": 2}}, r"d\.params=.*refused by chain_sum: .*max_terms must be >="),
        ({"params": {"seed": 1}}, r"d\.params\.seed is set by data\.domains\.d\.seed"),
        (
            {"task": "spell_backward", "params": {"min_word_len": 40, "max_word_len": 50}},
            r"spell_backward with params=.* cannot generate question 0: IndexError",
        ),
        ({"source": "web"}, r"d\.source='web' is not one of"),
    ],
)
def test_bad_tasks_are_named(chat: Chat, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(chat, **{"task": "chain_sum"} | settings)


def test_prompts_that_do_not_fit_are_named(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.domains\.d: prompt d/eval/0 has \d+ tokens; at most 8 fit"):
        load(chat, 40, task="chain_sum")
    table = [{"prompt": f"{i}?", "answer": "x" * 60 if i == 3 else "x"} for i in range(4)]
    table[2]["prompt"] = "2 " * 60
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "7", "answer": "7"}])
    domain = load(chat, 64, source="rows", path=write(tmp_path / "a.jsonl", table), eval_path=held_out)
    domain.demonstration(domain.train(0))
    with pytest.raises(ConfigError, match=r"prompt d/train/2 has \d+ tokens; at most 32 fit \(model.max_tokens=64 - "):
        domain.train(2)
    with pytest.raises(ConfigError, match=r"demonstration of prompt d/train/3 has \d+ tokens; model.max_tokens=64"):
        domain.demonstration(domain.train(3))


def test_unknown_domains_and_efforts_are_named(chat: Chat) -> None:
    with pytest.raises(ConfigError, match=r"domain 'x' is unknown; data\.domains has: d"):
        load_domains(config_of(d=sums()), chat, ["x"])
    assert list(load_domains(config_of(d=sums(), e=sums()), chat, ["e"])) == ["e"]
    plain = train_tokenizer(["a"], 300)
    plain.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.effort='high' is not known .*; it has: none"):
        load_domains(config_of(d=sums(effort="high")), Chat(plain))


# --- rows

PLAIN = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(200)]


def test_rows_are_split_by_a_hash_of_the_question(chat: Chat, tmp_path: Path) -> None:
    # Every question twice, the second time written differently: both land on the same side.
    table = PLAIN + [{**row, "prompt": f"  what IS {row['prompt'][8:]}"} for row in PLAIN]
    path = write(tmp_path / "a.jsonl", table)
    domain = load(chat, source="rows", path=path, eval_fraction=0.3)
    held_out, trained = questions(domain.eval), questions(all_train(domain))
    assert 80 < 2 * len(held_out) < 160 and len(trained) == 400 - 2 * len(held_out)
    assert not {" ".join(q.lower().split()) for q in held_out} & {" ".join(q.lower().split()) for q in trained}
    half = load(chat, source="rows", path=write(tmp_path / "b.jsonl", table[:100]), eval_fraction=0.3, num_eval=5)
    assert questions(half.eval) == held_out[:5]
    assert set(questions(all_train(half))) == set(trained) & {row["prompt"] for row in table[:100]}
    assert load(chat, source="rows", path=path, num_train=20, eval_fraction=0.3).train_size < 20


def test_eval_path_is_held_out_of_path(chat: Chat, tmp_path: Path) -> None:
    path, held_out = write(tmp_path / "a.jsonl", PLAIN), write(tmp_path / "e.jsonl", PLAIN[50:60])
    domain = load(chat, source="rows", path=path, eval_path=held_out, num_eval=4)
    assert [prompt.id for prompt in domain.eval] == [f"d/eval/{i}" for i in range(4)]
    assert domain.train_size == 190
    assert domain.train(50).reference["question"] == "What is 60 + 1?"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_verl_rows(chat: Chat, tmp_path: Path, suffix: str) -> None:
    table = [
        {
            "data_source": "d" if i % 2 else "other",
            "prompt": [{"role": "system", "content": "Sys."}, {"role": "user", "content": f"Q{i}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra_info": {"index": i},
        }
        for i in range(60)
    ]
    path = write(tmp_path / f"a{suffix}", table)
    domain = load(chat, source="rows", path=path, answer_format="boxed", verifier="number")
    prompts = domain.eval + all_train(domain)
    assert sorted(prompt.reference["metadata"]["index"] for prompt in prompts) == list(range(1, 60, 2))
    prompt = domain.train(0)
    index = prompt.reference["metadata"]["index"]
    instruction = r"Put the final answer in \boxed{}."
    assert prompt.token_ids == chat.encode_text(f"{BOS}Sys.\n\n{instruction}{USER}Q{index}{ASSISTANT}</think>")
    assert prompt.reference["completion"] == rf"\boxed{{{index}}}"
    assert verify(domain.config, prompt, prompt.reference["completion"]).passed
    other = load(chat, source="rows", path=path, where="other")
    assert all(int(prompt.reference["answer"]) % 2 == 0 for prompt in other.eval + all_train(other))


def test_message_rows_are_demonstrated_as_they_stand(chat: Chat, tmp_path: Path) -> None:
    def row(i: int, content: str, **more: Any) -> dict[str, Any]:
        history = [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello"}]
        target = {"role": "assistant", "content": content, **more}
        return {"messages": [*history, {"role": "user", "content": f"Q{i}"}, target]}

    table = [
        row(0, r"It is \boxed{4}.", reasoning_content="2 and 2"),
        row(1, r"<think>3 and 3</think>So \boxed{6}"),
        row(2, "8"),
    ]
    held_out = write(tmp_path / "e.jsonl", [row(9, "9")])
    path = write(tmp_path / "a.jsonl", table)
    domain = load(
        chat, source="rows", path=path, eval_path=held_out, answer_format="boxed", effort="high", instruction=""
    )
    expected = [("4", r"It is \boxed{4}.", "2 and 2"), ("6", r"So \boxed{6}", "3 and 3"), ("8", r"\boxed{8}", "")]
    for index, (answer, completion, reasoning) in enumerate(expected):
        prompt = domain.train(index)
        reference = prompt.reference
        assert (reference["answer"], reference["completion"], reference["reasoning"]) == (answer, completion, reasoning)
        text = (
            f"{BOS}{USER}Hi {index}{ASSISTANT}</think>Hello{chat.tokenizer.eos_token}{USER}Q{index}{ASSISTANT}<think>"
        )
        assert prompt.token_ids == chat.encode_text(text)
        tail = domain.demonstration(prompt).token_ids[len(prompt.token_ids) :]
        assert tuple(tail) == (*chat.encode_text(f"{reasoning}</think>{completion}"), chat.eos_id)
        assert verify(domain.config, prompt, completion).passed


def test_messages_with_an_answer_of_their_own(chat: Chat, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Four, I think."}]
    path = write(tmp_path / "a.jsonl", [{"messages": messages, "label": 4}])
    held_out = write(tmp_path / "e.jsonl", [{"messages": [{"role": "user", "content": "P"}, messages[1]], "label": 4}])
    settings = {"source": "rows", "path": path, "eval_path": held_out, "columns": {"answer": "label"}}
    reference = load(chat, **settings, answer_format="tags").train(0).reference
    assert (reference["answer"], reference["completion"]) == ("4", "Four, I think.\n\n<answer>4</answer>")
    reference = load(chat, **settings).train(0).reference
    assert (reference["answer"], reference["completion"]) == ("4", "Four, I think.")


def test_renamed_nested_columns_and_steps_before_the_number(chat: Chat, tmp_path: Path) -> None:
    table = [{"q": {"text": f"Q{i}"}, "a": f"First {i}.\nThen.\n#### 1,{i:03}", "kind": "sum"} for i in range(50)]
    path = write(tmp_path / "a.json", table)
    columns = {"prompt": "q.text", "answer": "a", "data_source": "kind"}
    settings = {"source": "rows", "path": path, "columns": columns, "where": "sum", "answer_format": "boxed"}
    domain = load(chat, **settings, verifier="number", effort="high")
    prompt = domain.train(3)
    index = int(prompt.reference["question"][1:])
    assert prompt.reference["answer"] == f"1,{index:03}"
    assert prompt.reference["reasoning"] == f"First {index}.\nThen."
    assert verify(domain.config, prompt, rf"\boxed{{{1000 + index}}}").passed
    tail = domain.demonstration(prompt).token_ids[len(prompt.token_ids) :]
    assert chat.decode(tail.tolist()) == rf"First {index}.{chr(10)}Then.\boxed{{1,{index:03}}}"


def test_reasoning_column_counts_only_with_effort(chat: Chat, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**row, "reasoning": "because"} for row in PLAIN])
    for effort, expected in (("high", "because"), ("none", "")):
        domain = load(chat, source="rows", path=path, effort=effort)
        prompt = domain.train(0)
        tail = domain.demonstration(prompt).token_ids[len(prompt.token_ids) :].tolist()
        assert chat.decode(tail) == expected + prompt.reference["answer"]
        assert chat.answer_text(tail, effort) == prompt.reference["answer"]


MESSAGES = [{"role": "user", "content": "Q"}, {"role": "user", "content": "R"}]


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ([{"question": "Q", "answer": "A"}], {}, r"has no column 'prompt' .*; it has: question, answer"),
        ([{"prompt": "Q", "label": "A"}], {}, r"has no column 'answer' .*columns\.answer.*; it has: prompt, label"),
        (
            PLAIN,
            {"columns": {"prompt": "text"}},
            r"no column 'text' \(data\.domains\.d\.columns\.prompt\); it has: prompt,",
        ),
        (PLAIN, {"columns": {"prompts": "prompt"}}, r"d\.columns\.prompts is not a column we read; those are prompt,"),
        (PLAIN, {"where": "x"}, r"no column 'data_source' \(which data\.domains\.d\.where='x' selects by\)"),
        ([{**PLAIN[0], "data_source": "s"}], {}, r"d\.where='d' selects an empty dataset: .* has: s"),
        (PLAIN, {"eval_fraction": 0.0}, r"d\.eval_fraction=0\.0 holds out an empty dataset"),
        (PLAIN[:3], {"eval_fraction": 0.9999999}, r"d\.path=.* is an empty dataset for training: all of its 3 rows"),
        (PLAIN, {"split": "validation[:3]", "path": "none.jsonl"}, r"d\.path='none\.jsonl' does not exist"),
        (PLAIN, {"path": __file__}, r"test_data\.py' is not a \.jsonl, \.json or \.parquet file"),
        ([{"prompt": "Q", "answer": None}, PLAIN[0]], {}, r"row 0 of .*: column 'answer' is empty"),
        ([{"prompt": "Q", "answer": ["1"]}], {}, r"row 0 of .*: column 'answer' is a list; it must be one value"),
        (
            [{"prompt": 3, "answer": "1"}],
            {},
            r"row 0 of .*: column 'prompt' must be a text or a list of messages, not 3",
        ),
        ([{"prompt": [{"text": "Q"}], "answer": "1"}], {}, r"a message of 'prompt' must have text as role and content"),
        ([{"messages": MESSAGES}], {}, r"row 0 of .*: the last of 'messages' must be an assistant's"),
    ],
)
def test_tables_that_do_not_fit_are_named(
    chat: Chat, tmp_path: Path, table: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", table)
    with pytest.raises(ConfigError, match=message):
        load(chat, **{"source": "rows", "path": path} | settings)


def test_unreadable_and_empty_tables_are_named(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Q", \n')
    with pytest.raises(ConfigError, match=r"d\.path='.*a\.jsonl' \(split 'train'\) cannot be read: "):
        load(chat, source="rows", path=str(path))
    path = write(tmp_path / "b.jsonl", PLAIN)
    assert load(chat, source="rows", path=path, split="test[:100]").train_size < 100
    with pytest.raises(ConfigError, match=r"d\.path='.*b\.jsonl' \(split 'train\[:0\]'\) cannot be read: .*no data"):
        load(chat, source="rows", path=path, split="train[:0]")
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"d\.path='.*c\.jsonl' is an empty dataset"):
        load(chat, source="rows", path=str(tmp_path / "c.jsonl"))


def test_conversations_the_template_refuses_are_named(chat: Chat, tmp_path: Path) -> None:
    held_out = write(tmp_path / "e.jsonl", [{"prompt": [{"role": "tool", "content": "Q"}], "answer": "1"}])
    with pytest.raises(ConfigError, match=r"data\.domains\.d: prompt d/eval/0: the chat template .* unknown role tool"):
        load(chat, source="rows", path=write(tmp_path / "a.jsonl", PLAIN), eval_path=held_out)


# --- the stream


@pytest.fixture(scope="module")
def mixed(chat: Chat) -> dict[str, Domain]:
    domains = {"a": sums(weight=2), "b": sums(seed=1, num_train=7), "c": sums(weight=0.5), "zero": sums(weight=0)}
    return load_domains(config_of(**domains), chat)


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_stream_mixes_in_exact_shares(mixed: dict[str, Domain]) -> None:
    stream = PromptStream(mixed, seed=0)
    counts: Counter[str] = Counter()
    for drawn in range(1, 141):
        counts.update(prompt.domain for prompt in stream.next(1))
        for name, weight in (("a", 2), ("b", 1), ("c", 0.5)):
            assert abs(counts[name] - drawn * weight / 3.5) < 1
    assert counts == {"a": 80, "b": 40, "c": 20}


def test_stream_is_the_same_however_it_is_cut_and_resumed(mixed: dict[str, Domain]) -> None:
    unbroken = ids(PromptStream(mixed, seed=3).next(120))
    stream = PromptStream(mixed, seed=3)
    drawn = ids(stream.next(1) + stream.next(50))
    state = json.loads(json.dumps(stream.state()))
    drawn_ahead = ids(stream.next(30))
    resumed = PromptStream(mixed, seed=3)
    resumed.load_state(state)
    assert drawn + ids(resumed.next(69)) == unbroken
    assert drawn + drawn_ahead == unbroken[:81]
    assert ids(PromptStream(mixed, seed=4).next(120)) != unbroken


def test_every_epoch_is_another_permutation_and_ids_stay_unique(mixed: dict[str, Domain]) -> None:
    stream = PromptStream({"b": mixed["b"]}, seed=0)
    drawn = stream.next(35)
    epochs = [[prompt.id.partition("~")[0] for prompt in drawn[at : at + 7]] for at in range(0, 35, 7)]
    assert all(sorted(epoch) == [f"b/train/{i}" for i in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(set(ids(drawn))) == 35
    assert drawn[7].id.endswith("~1")


def test_stream_refuses_another_mix(mixed: dict[str, Domain], chat: Chat) -> None:
    state = PromptStream(mixed, seed=0).state()
    with pytest.raises(ConfigError, match=r"saved with seed 0, but the run now has 1"):
        PromptStream(mixed, seed=1).load_state(state)
    with pytest.raises(ConfigError, match=r"saved with shares .*'a': '4/7'.* but the run now has"):
        PromptStream({"a": mixed["a"]}, seed=0).load_state(state)
    larger = mixed | {"b": load_domains(config_of(b=sums(seed=1, num_train=8, weight=1)), chat)["b"]}
    with pytest.raises(ConfigError, match=r"saved with sizes .*'b': 7.* but the run now has .*'b': 8"):
        PromptStream(larger, seed=0).load_state(state)
    with pytest.raises(ConfigError, match="weight is 0 for every domain of zero"):
        PromptStream({"zero": mixed["zero"]}, seed=0)


def test_stable_hash_is_the_same_in_every_process() -> None:
    assert stable_hash("a", 1) == 13924241962069754241
    assert stable_hash("a", 1) != stable_hash("a1") != stable_hash("1", "a")


def test_domain_texts_are_training_text_alone(tmp_path: Path, chat: Chat) -> None:
    path = write(tmp_path / "a.jsonl", [{**row, "reasoning": f"add to {row['answer']}"} for row in PLAIN])
    rows = DomainConfig(source="rows", path=path, answer_format="tags", effort="high")
    config = config_of(s=sums(num_eval=60), r=rows)
    texts = list(domain_texts(config, 100))
    domains = load_domains(config, chat)
    held_out = {question for domain in domains.values() for question in questions(domain.eval)}
    assert not held_out & set(texts)
    assert len(texts) == 100 * 2 + 100 * 4
    assert texts[:2] == [domains["s"].train(0).reference[key] for key in ("question", "answer")]
    answer = domains["r"].train(0).reference["answer"]
    assert texts[201:204] == [f"What is {int(answer) - 1} + 1?", f"add to {answer}", f"<answer>{answer}</answer>"]
