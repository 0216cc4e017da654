r"""The tokenizer and the chat encoding: everything that turns messages into token ids and completions back into text.

The one idea: the layout of a conversation is a Jinja chat template that travels inside the tokenizer's own folder, so
a saved checkpoint opens in any tool that reads chat templates and every prompt of a run is rendered in one place. The
layout of the tokenizers trained here is DeepSeek-V4's: BOS, system text, then per turn the user tag, text, the
assistant tag, `<think>` reasoning `</think>` (or `</think>` alone when effort is none), answer, EOS, with no newlines.
A model's own tokenizer keeps its own template. Left out: tool calls, and what an answer is worth
(`opd.verifiers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
import jinja2.meta
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd.config import EFFORTS, ConfigError

# V4's special strings. U+FF5C is a full-width bar and U+2581 a low block: neither occurs in ordinary text.
_BAR = "\uff5c"
BOS = f"<{_BAR}begin\u2581of\u2581sentence{_BAR}>"
EOS = f"<{_BAR}end\u2581of\u2581sentence{_BAR}>"
USER = f"<{_BAR}User{_BAR}>"
ASSISTANT = f"<{_BAR}Assistant{_BAR}>"
REMINDER = f"<{_BAR}latest_reminder{_BAR}>"
THINK = "<think>"
END_THINK = "</think>"
_TASKS = ("action", "query", "authority", "domain", "title", "read_url", "extracted_url")
SPECIAL_TOKENS = (
    *(BOS, EOS, USER, ASSISTANT, THINK, END_THINK, REMINDER, f"{_BAR}DSML{_BAR}"),
    *(f"<{_BAR}{task}{_BAR}>" for task in _TASKS),
)

MAX_EFFORT_INSTRUCTION = (
    "Spend as much reasoning as the problem can use. Split it into parts, try more than one way where you are unsure, "
    "and check the result against the question before you give the answer."
)

# Reasoning of turns before the last user message is dropped, and those turns then read as if effort had been none.
_TEMPLATE = r"""
{%- set effort = effort | default("none") -%}
{%- if effort not in ["none", "high", "max"] -%}
    {{- raise_exception("effort must be none, high or max, not " ~ effort) -}}
{%- endif -%}
{%- if tools -%}
    {{- raise_exception("this chat template has no tool calls") -}}
{%- endif -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
    {%- if message["role"] == "user" -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- "@BOS@" -}}
{%- if effort == "max" -%}{{- "@MAX@\n\n" -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message["role"] == "system" -%}
        {%- if not loop.first -%}{{- raise_exception("a system message must be the first message") -}}{%- endif -%}
        {{- message["content"] -}}
    {%- elif message["role"] == "user" -%}
        {{- "@USER@" ~ message["content"] -}}
    {%- elif message["role"] == "latest_reminder" -%}
        {{- "@REMINDER@" ~ message["content"] -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "@ASSISTANT@" -}}
        {%- if effort != "none" and loop.index0 > last.user -%}
            {{- "<think>" ~ (message["reasoning_content"] or "") -}}
        {%- endif -%}
        {{- "</think>" ~ message["content"] ~ "@EOS@" -}}
    {%- else -%}
        {{- raise_exception("unknown role " ~ message["role"]) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "@ASSISTANT@" ~ ("</think>" if effort == "none" else "<think>") -}}
{%- endif -%}
"""


def _v4_template() -> str:
    template = _TEMPLATE.strip()
    for name, text in (
        ("BOS", BOS),
        ("EOS", EOS),
        ("USER", USER),
        ("ASSISTANT", ASSISTANT),
        ("REMINDER", REMINDER),
        ("MAX", MAX_EFFORT_INSTRUCTION),
    ):
        template = template.replace(f"@{name}@", text)
    return template


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with V4's special tokens first (BOS 0, EOS 1, pad is EOS) and V4's layout as its chat template.

    Every byte is in the vocabulary, so any text round-trips; each digit is a token of its own; nothing adds BOS (the
    template renders it). The same texts give the same tokenizer. The result may hold fewer than `vocab_size` entries
    when the texts run out of pairs to merge. Raises ConfigError when `vocab_size` is below the bytes plus specials.
    """
    lowest = len(SPECIAL_TOKENS) + 256
    if vocab_size < lowest:
        raise ConfigError(
            f"tokenizer.vocab_size={vocab_size} is too small; {len(SPECIAL_TOKENS)} special tokens and 256 bytes need "
            f"at least {lowest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        chat_template=_v4_template(),
    )


class Chat:
    """A tokenizer together with its conversation layout.

    Attributes: `name` (where it came from, for messages), `tokenizer`, `vocab_size` (entries, added tokens included),
    `bos_id` (None when the tokenizer has none), `eos_id`, `pad_id`, `end_id` (closes an assistant turn: EOS in V4's
    layout, the template's own end-of-turn token elsewhere), `stop_ids` (`end_id`, then EOS if different), `efforts`
    (what the template can render).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str = "tokenizer") -> None:
        """Raises ConfigError for a tokenizer that is not a fast one, has no EOS or has no chat template."""
        self.name = name
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"tokenizer {name!r} is a {type(tokenizer).__name__}; a fast tokenizer is needed")
        eos_id = _special_id(tokenizer, "eos_token_id")
        if eos_id is None:
            raise ConfigError(f"tokenizer {name!r} has no EOS token")
        if tokenizer.chat_template is None and _known_ids(tokenizer, (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)):
            # DeepSeek publishes V4's tokenizer without a template: its layout is code in that release.
            tokenizer.chat_template = _v4_template()
        if not isinstance(tokenizer.chat_template, str):
            found = "several, by name" if tokenizer.chat_template else "none"
            raise ConfigError(f"tokenizer {name!r} must have one chat template; it has {found}")
        self.vocab_size = len(tokenizer)
        self.bos_id = _special_id(tokenizer, "bos_token_id")
        self.eos_id = eos_id
        pad_id = _special_id(tokenizer, "pad_token_id")
        self.pad_id = eos_id if pad_id is None else pad_id
        self._variables = _template_variables(tokenizer.chat_template)
        end_think = _known_ids(tokenizer, (END_THINK,))
        self._end_think_id = end_think[0] if end_think else None
        self.efforts = self._find_efforts()
        self.end_id = self._find_end()
        self.stop_ids = (self.end_id,) if self.end_id == self.eos_id else (self.end_id, self.eos_id)

    @classmethod
    def load(cls, path: str, revision: str | None = None) -> Chat:
        """From a local folder or hub id. Code that a hub repository ships is never run. Raises ConfigError."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        except (
            Exception
        ) as error:  # the library raises OSError, ValueError, KeyError and bare Exception, by file format
            where = (
                "has no tokenizer that loads" if Path(path).is_dir() else "is neither a folder nor a readable hub id"
            )
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"tokenizer {path!r} {where} ({type(error).__name__}: {reason})") from error
        return cls(tokenizer, name=path)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer files and chat template, as `AutoTokenizer.from_pretrained(folder)` reads them."""
        self.tokenizer.save_pretrained(str(folder))

    def render(self, messages: Sequence[dict[str, str]], effort: str, generation_prompt: bool = True) -> str:
        """The conversation as the one string the model sees, BOS included.

        `messages` have "role" and "content", an assistant's may have "reasoning_content". Raises ConfigError for an
        effort that the template does not know and ValueError when the template refuses the messages.
        """
        if effort not in self.efforts:
            raise ConfigError(
                f"effort={effort!r} is not known to the chat template of {self.name!r}; it has: "
                f"{', '.join(self.efforts)}"
            )
        thinking = effort != "none"
        variables = {"effort": effort, "enable_thinking": thinking, "thinking": thinking}
        if thinking:
            variables["reasoning_effort"] = effort
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **{key: value for key, value in variables.items() if key in self._variables},
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {self.name!r} refuses the messages: {error}") from error
        assert isinstance(text, str)
        return text

    def encode_prompt(self, messages: Sequence[dict[str, str]], effort: str) -> tuple[int, ...]:
        """Ids of the rendered conversation, BOS and generation tag included; raises as `render` does."""
        return self.encode_text(self.render(messages, effort))

    def encode_completion(self, text: str, effort: str, reasoning: str = "") -> tuple[int, ...]:
        """Ids of an answer as the model should sample it after `encode_prompt(..., effort)`, `end_id` last.

        With effort none the answer follows the prompt at once and `reasoning` is dropped; else `reasoning` (may be
        empty), closed by `</think>`, comes first, opened by `<think>` where the template leaves that to the model.
        """
        if effort not in self.efforts:
            raise ConfigError(f"effort={effort!r} is not known to {self.name!r}; it has: {', '.join(self.efforts)}")
        if effort != "none" and "effort" in self._variables:
            text = f"{reasoning}{END_THINK}{text}"
        elif effort != "none":
            is_open = self.render([{"role": "user", "content": "?"}], effort).rstrip().endswith(THINK)
            text = f"{'' if is_open else THINK + chr(10)}{reasoning}\n{END_THINK}\n\n{text}"
        return (*self.encode_text(text), self.end_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of completion ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def answer_text(self, ids: Sequence[int], effort: str) -> str | None:
        """The answer in sampled completion ids (stop token included), or None when there is none.

        As in V4's parser, an unfinished completion (last id not in `stop_ids`) has no answer, and with effort other
        than none neither has one without `</think>`; what follows the first `</think>` is the answer.
        """
        ids = list(ids)
        if not ids or ids[-1] not in self.stop_ids:
            return None
        if effort != "none":
            if self._end_think_id not in ids:
                return None
            ids = ids[ids.index(self._end_think_id) + 1 :]
        return self.decode(ids[:-1])

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of the text as it stands: no BOS added, special strings in it become special tokens."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _find_efforts(self) -> tuple[str, ...]:
        if "effort" in self._variables or (self._end_think_id is not None and "reasoning_effort" in self._variables):
            return EFFORTS
        if self._end_think_id is not None and self._variables & {"enable_thinking", "thinking"}:
            return ("none", "high")  # a switch: max could not be told from high
        return ("none",)

    def _find_end(self) -> int:
        """The first special token that the template puts after an assistant's text; EOS when it puts none.

        Base checkpoints often name one EOS and close turns with another token; sampling has to stop at either.
        """
        marker = "2c1f"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        tail = self.render(messages, "none", generation_prompt=False).rpartition(marker)[2]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        for token_id in self.encode_text(tail):
            if token_id in special:
                return token_id
        return self.eos_id


def tokenizer_difference(a: Chat, b: Chat) -> str | None:
    """The first difference that makes ids of `a` mean something else in `b`, as a sentence; None when there is none.

    Compared by content, in this order: the token of every id (for byte-level and byte-fallback vocabularies the token
    string is its bytes), special ids, and a probe conversation rendered and encoded at every effort.
    """
    for token_id in range(max(a.vocab_size, b.vocab_size)):
        token_a, token_b = (_token(chat, token_id) for chat in (a, b))
        if token_a != token_b:
            return f"id {token_id} is {token_a} in {a.name!r} but {token_b} in {b.name!r}"
    for key in ("bos_id", "eos_id", "pad_id", "stop_ids"):
        if getattr(a, key) != getattr(b, key):
            return f"{key} is {getattr(a, key)} in {a.name!r} but {getattr(b, key)} in {b.name!r}"
    if a.efforts != b.efforts:
        return f"the chat template of {a.name!r} knows the efforts {a.efforts} but that of {b.name!r} {b.efforts}"
    for effort in a.efforts:
        text_a, text_b = _probe(a, effort), _probe(b, effort)
        if text_a != text_b:
            at = next((i for i, (x, y) in enumerate(zip(text_a, text_b, strict=False)) if x != y), None)
            at = min(len(text_a), len(text_b)) if at is None else at
            return (
                f"the chat templates differ for effort {effort}: after {text_a[max(0, at - 24) : at]!r} comes "
                f"{text_a[at : at + 24]!r} in {a.name!r} but {text_b[at : at + 24]!r} in {b.name!r}"
            )
        ids_a, ids_b = a.encode_text(text_a), b.encode_text(text_b)
        if ids_a != ids_b:
            return f"the same prompt encodes to {ids_a} in {a.name!r} but to {ids_b} in {b.name!r}"
    return None


def _token(chat: Chat, token_id: int) -> str:
    token = chat.tokenizer.convert_ids_to_tokens(token_id) if token_id < chat.vocab_size else None
    return "absent" if token is None else repr(token)


def _probe(chat: Chat, effort: str) -> str:
    """A conversation with every role rendered, or the template's refusal, so that two refusals compare too."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1234 + 5?"},
        {"role": "assistant", "content": "1239", "reasoning_content": "Add 5 to 4."},
        {"role": "user", "content": " And\tna\u00efve \u4f60\u597d?\n"},
    ]
    try:
        return chat.render(messages, effort)
    except ValueError:
        return chat.render(messages[1:], effort)  # some templates take no system message


def _special_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int | None:
    value = getattr(tokenizer, name)
    assert value is None or isinstance(value, int)
    return value


def _known_ids(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens, or () unless every one of them is in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return tuple(vocabulary[token] for token in tokens) if all(token in vocabulary for token in tokens) else ()


def _template_variables(template: str) -> set[str]:
    """Names that a chat template reads from outside."""
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tag, unknown to plain Jinja
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    return jinja2.meta.find_undeclared_variables(environment.parse(plain))
