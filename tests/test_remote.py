"""Remote teachers against a real server in a process of its own: right numbers, and every fault named, none believed.

The server has a tiny model and speaks vLLM's and SGLang's formats. The first part of a URL's path says how it behaves:
`/v1` as it should, `/hang/v1`, `/drip/v1` and so on as their names say.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.chat import Chat, train_tokenizer
from opd.config import Config, ConfigError, DomainConfig, RemoteConfig, TeacherConfig, check_config
from opd.types import Group, Prompt, TeacherHidden, TeacherLogprobs, Trajectory
from teachers.local import TeacherHost
from teachers.pool import TeacherPool, check_teachers, place
from teachers.remote import RemoteTeacher, TeacherError
from tests.test_teachers import TRAJECTORIES, VOCAB, InProcess, MemoryStore, save_checkpoint, trajectory, v4

KEY = "sk-a-secret-of-ours"

SERVER = r"""
import json, math, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
asked, keys = {}, []
planned = {"mode": "", "requests": 0}  # how it behaves, whatever the URL says, for so many requests more


def scores(ids, k, shift):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logits *= 1 + shift
    rows = [None]
    for token, row in zip(ids[1:], logits[:-1].log_softmax(-1)):
        top = row.topk(k).indices.tolist()
        own = [] if token in top else [token]
        rank = lambda t: int((row > row[t]).sum()) + 1
        rows.append([(t, row[t].item(), rank(t)) for t in [*own, *top]])
    return rows


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, body, status=200, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        if self.path == "/control":
            return self.send({"asked": asked, "keys": keys})
        models = ["tiny", "large"] if "/several/" in self.path else ["tiny"]
        room = {"max_model_len": 64} if "/small/" in self.path else {}
        self.send({"object": "list", "data": [{"id": name, "object": "model", **room} for name in models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        keys.append(self.headers.get("Authorization"))
        if self.path == "/control":
            planned.update(body)
            return self.send({})
        mode = self.path.split("/")[1]
        if planned["requests"] > 0 and self.path.endswith("/completions"):
            planned["requests"] -= 1
            mode = planned["mode"]
        number = asked[mode] = asked.get(mode, 0) + 1
        if self.path.endswith("/tokenize"):
            if mode == "v0":
                return self.send({"detail": "Not Found"}, 404)
            ids = tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            return self.send({"tokens": ids[::-1] if mode == "reversed" else ids, "count": len(ids)})
        if mode == "hang":
            time.sleep(5)
            return
        if mode == "dies":
            self.close_connection = True
            return self.connection.close()
        if mode == "busy" and number % 3:
            return self.send({"error": "try again"}, 503, [("Retry-After", "0")])
        if mode == "broken":
            return self.send({"error": "CUDA error " + str(keys[-1])}, 500)
        if mode == "forbidden":
            return self.send({"error": "bad key " + str(keys[-1])}, 401)
        if mode == "moved":
            return self.send({}, 307, [("Location", "/v1/completions")])
        if mode == "text":
            return self.send(b"<html>gateway</html>")
        if mode == "list":
            return self.send([1])
        if mode == "empty":
            return self.send({"choices": []})
        shift = {"other": 1.0, "close": 0.005}.get(mode, 0.0)
        if mode == "changes" and number > 4:
            shift = 1.0
        if mode == "jitter":
            shift = number * 0.5  # concurrent requests come in any order: no two of them get the same
        k = body["top_logprobs_num"] if "input_ids" in body else body["prompt_logprobs"]
        ids = body["input_ids"] if "input_ids" in body else body["prompt"]
        rows = scores(ids, k, shift)
        if mode == "short":
            rows = rows[:-1]
        if mode == "shifted":
            rows = [None, *rows[2:], rows[1]]
        if mode == "logits":
            rows = [row and [(t, value + 9.0, rank) for t, value, rank in row] for row in rows]
        if mode == "nan":
            rows[-1] = [(t, math.nan, rank) for t, _, rank in rows[-1]]
        if mode == "few":
            rows[-1] = rows[-1][:1]
        if mode == "foreign":
            rows[-1] = [*rows[-1][:-1], (99999, rows[-1][-1][1], rows[-1][-1][2])]
        if mode == "uniform":
            rows = [row and [(t, -math.log(model.config.vocab_size), 1) for t, _, _ in row] for row in rows]
        if "input_ids" in body:
            top = [row and [[value, t, None] for t, value, rank in row if rank <= k] for row in rows]
            own = [[dict((t, value) for t, value, _ in row)[token] if row else None, token, None]
                   for token, row in zip(ids, rows)]
            answer = {"text": "", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top if k else None}}
        else:
            listed = [row and {str(t): {"logprob": value, "rank": rank, "decoded_token": tokenizer.decode([t])}
                               for t, value, rank in row} for row in rows]
            answer = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": body["model"],
                      "choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length",
                                   "stop_reason": None, "prompt_logprobs": listed}],
                      "usage": {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}}
        content = json.dumps(answer).encode()
        if mode == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        if mode == "drip":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            try:
                for index in range(0, len(content), 20):
                    self.wfile.write(content[index : index + 20])
                    self.wfile.flush()
                    time.sleep(0.1)
            except OSError:
                self.close_connection = True
            return
        self.send(content)


server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 0), Handler)
server.daemon_threads = True
print(server.server_port, flush=True)
server.serve_forever()
"""

FORWARDER = r"""
import sys, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = urllib.request.Request(sys.argv[1] + self.path, body, {"Content-Type": "application/json"})
        content = urllib.request.urlopen(request).read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@dataclass
class Server:
    process: subprocess.Popen[str]
    root: str

    @classmethod
    def start(cls, source: str, *arguments: str) -> Server:
        process = subprocess.Popen([sys.executable, "-c", source, *arguments], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the server did not start"
        return cls(process, f"http://127.0.0.1:{port}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(["how much is one and one, and how do you spell it"], VOCAB))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, chat: Chat) -> str:
    folder = tmp_path_factory.mktemp("served")
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    model.save_pretrained(folder)
    chat.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(checkpoint: str) -> Iterator[Server]:
    started = Server.start(SERVER, checkpoint)
    yield started
    started.stop()


@pytest.fixture
def remote(server: Server, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes remote teachers whose URLs are the server's, by mode; pauses are short."""
    monkeypatch.setattr("teachers.remote.FIRST_PAUSE_SECONDS", 0.01)
    opened: list[RemoteTeacher] = []

    def make(*modes: str, vocab_size: int | None = VOCAB, **settings: Any) -> RemoteTeacher:
        opened.append(RemoteTeacher("far", config_of(server.root, *modes, **settings), vocab_size))
        return opened[-1]

    yield make
    for teacher in opened:
        teacher.close()


def url_of(root: str, mode: str, kind: str = "vllm") -> str:
    if mode.startswith("http"):
        return mode
    return "/".join(filter(None, (root, mode, "v1" if kind == "vllm" else "")))


def config_of(root: str, *modes: str, **settings: Any) -> TeacherConfig:
    kind = settings.get("server", "vllm")
    urls = [url_of(root, mode, kind) for mode in modes or ("",)]
    defaults: dict[str, Any] = {"timeout_seconds": 10.0, "max_retries": 1, "replicas": urls[1:]}
    return TeacherConfig(family="remote", path=urls[0], remote=RemoteConfig(**{**defaults, **settings}))


def oracle(checkpoint: str, given: Trajectory) -> torch.Tensor:
    """Log-probabilities float64 [T - 1, V] of each next token."""
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    with torch.no_grad():
        return model(torch.from_numpy(given.token_ids.astype("int64"))[None]).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("top_k", [0, 1, 7])
def test_scores_are_the_models_own(kind: str, top_k: int, remote: Any, checkpoint: str) -> None:
    silent = trajectory(1, 6)
    silent.loss_mask[:] = False
    given = [*TRAJECTORIES, silent]
    signals = remote(server=kind, top_k=top_k, concurrency=3).score(given, 0.25)
    for one, found in zip(given, signals, strict=True):
        num = one.num_loss_tokens
        assert (found.teacher, found.weight) == ("far", 0.25)
        assert found.logprobs.shape == (num,) and found.logprobs.dtype == np.float32
        assert found.top_ids.shape == found.top_logprobs.shape == (num, top_k)
        if not num:
            continue
        at = one.loss_mask.nonzero()[0]
        rows = oracle(checkpoint, one)[at - 1]
        expected = rows[torch.arange(num), torch.from_numpy(one.token_ids[at]).long()]
        assert np.allclose(found.logprobs, expected.numpy(), atol=1e-4)
        best = rows.topk(top_k)
        assert np.array_equal(found.top_ids, best.indices.numpy())
        assert np.allclose(found.top_logprobs, best.values.numpy(), atol=1e-4)
        tail = torch.log1p(-best.values.exp().sum(-1))
        assert np.allclose(found.tail_logprobs, tail.numpy(), atol=1e-3)


def test_the_tail_is_what_the_top_leaves() -> None:
    log = np.log(np.array([[0.5, 0.25], [0.75, 0.25], [0.1, 0.05]], dtype=np.float32))
    signal = TeacherLogprobs(
        teacher="t", weight=1.0, logprobs=log[:, 0], top_ids=np.zeros((3, 2), np.int32), top_logprobs=log
    )
    assert np.allclose(np.exp(signal.tail_logprobs), [0.25, 1e-7, 0.85])
    none = TeacherLogprobs(
        teacher="t", weight=1.0, logprobs=log[:, 0], top_ids=np.zeros((3, 0), np.int32), top_logprobs=log[:, :0]
    )
    assert np.array_equal(none.tail_logprobs, np.zeros(3, np.float32))


RUBBISH = {
    "text": "an answer that is not JSON: <html>gateway</html>",
    "list": "JSON list, not an object",
    "empty": r"without log-probabilities of the prompt \(IndexError",
    "short": r"\d+ positions for a prompt of \d+ tokens",
    "shifted": r"position \d+ has no log-probability of the prompt's token \d+|prompt_logprobs|TypeError",
    "logits": r"position \d+ has probabilities that sum to \d",
    "nan": r"position \d+ has a log-probability that is not finite",
    "few": r"position \d+ has \d tokens where 3 were asked for",
    "foreign": r"position \d+ names token 99999; the tokenizer has 300",
    "cut": "Error: |not JSON",
    "broken": r"HTTP 500: .*CUDA error Bearer \*\*\*",
    "moved": "HTTP 307",
    "forbidden": r"HTTP 401: .*bad key Bearer \*\*\*",
    "dies": "Error: ",
    "hang": r"no answer within 0\.5 s \(ReadTimeout\)",
    "drip": r"no whole answer within 0\.5 s",
}


@pytest.mark.parametrize("mode", RUBBISH)
def test_every_fault_is_named_and_a_healthy_replica_makes_up_for_it(
    mode: str, remote: Any, checkpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    timeout = 0.5 if mode in ("hang", "drip") else 10.0
    settings = {"top_k": 3, "api_key_env": "THE_KEY", "timeout_seconds": timeout}
    caplog.set_level(logging.DEBUG)
    with pytest.raises(TeacherError, match=RUBBISH[mode]) as caught:
        remote(mode, **settings).score(TRAJECTORIES[:2], 1.0)
    assert "teacher 'far' could not score" in str(caught.value) and f"/{mode}/v1" in str(caught.value)
    assert KEY not in str(caught.value) and KEY not in caplog.text

    healthy = remote(**settings | {"timeout_seconds": 10.0})
    expected = healthy.score(TRAJECTORIES[:4], 1.0)
    both = remote(mode, "", max_retries=3, concurrency=2, **settings)
    both._reference = healthy._reference  # at the start both must answer; here one fails later
    for one, other in zip(expected, both.score(TRAJECTORIES[:4], 1.0), strict=True):
        assert np.array_equal(one.logprobs, other.logprobs) and np.array_equal(one.top_ids, other.top_ids)
    assert KEY not in caplog.text


def test_a_busy_server_is_waited_for(remote: Any, server: Server) -> None:
    teacher = remote("busy", max_retries=3, concurrency=1)
    assert len(teacher.score(TRAJECTORIES, 1.0)) == len(TRAJECTORIES)


def test_replicas_must_agree(remote: Any) -> None:
    for modes in (("", "other"), ("", "", "other")):
        with pytest.raises(TeacherError, match=r"/v1 and http.*/other/v1 differ by up to \d.* nats .*allowed: 0\.1"):
            remote(*modes).score(TRAJECTORIES[:1], 1.0)
    assert remote("", "close", "").score(TRAJECTORIES[:1], 1.0)
    with pytest.raises(TeacherError, match=r"allowed: 1e-05"):
        remote("", "close", tolerance=1e-5).score(TRAJECTORIES[:1], 1.0)
    with pytest.raises(TeacherError, match=r"the agreement of its replicas in 2 attempts: .*/hang/v1: no answer"):
        remote("", "hang", timeout_seconds=0.5).score(TRAJECTORIES[:1], 1.0)


def test_a_server_that_comes_to_say_something_else_is_named(remote: Any) -> None:
    teacher = remote("changes", concurrency=1)
    teacher.score(TRAJECTORIES[:1], 1.0)  # two questions
    teacher.score(TRAJECTORIES[:1], 1.0)  # two more
    with pytest.raises(TeacherError, match=r"scored before with log-probabilities that differ by up to .*was changed"):
        teacher.score(TRAJECTORIES[:1], 1.0)


def test_the_key_comes_from_the_environment_and_goes_to_the_server_only(
    remote: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    teacher = remote(api_key_env="THE_KEY")
    teacher.score(TRAJECTORIES[:1], 1.0)
    seen = teacher._exchange("GET", f"{server.root}/control", None)["keys"]
    assert seen[-1] == f"Bearer {KEY}" and KEY not in repr(vars(teacher)["_client"])
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(ConfigError, match=r"teachers\.far\.remote\.api_key_env=THE_KEY: .* not set"):
        remote(api_key_env="THE_KEY")


def test_which_model_is_asked(remote: Any) -> None:
    with pytest.raises(
        TeacherError, match=r"serves 2 models \(tiny, large\); name one in teachers\.far\.remote\.model"
    ):
        remote("several").score(TRAJECTORIES[:1], 1.0)
    assert remote("several", model="large").score(TRAJECTORIES[:1], 1.0)


def groups_of(indices: list[int], domain: str = "a") -> list[Group]:
    prompt = Prompt(id=f"{domain}/train/0", domain=domain, effort="none", token_ids=(0,), reference={})
    return [Group(prompt=prompt, trajectories=tuple(trajectory(i, 8 + i, domain) for i in indices))]


def test_a_server_that_dies_for_good_costs_no_rollout(
    server: Server, checkpoint: str, tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.remote.FIRST_PAUSE_SECONDS", 0.01)
    save_checkpoint(tmp_path / "near", v4(0), chat)
    first = Server.start(FORWARDER, server.root, "0")
    far = config_of(server.root, f"{first.root}/v1", top_k=2, model="tiny")
    far.domains = {"a": 0.5}
    teachers_ = {"far": far, "near": TeacherConfig(path=str(tmp_path / "near"), domains={"a": 0.5})}
    placement = place(teachers_, 3)
    assert placement == {"near": 0, "far": 1}  # of its own, whatever the number of hosts
    settings: Any = {"fp4": "none", "threads": 1, "device": "cpu", "micro_batch_tokens": 64, "vocab_size": VOCAB}
    store = MemoryStore()
    hosts = [TeacherHost({name: teachers_[name]}, store, **settings) for name in ("near", "far")]
    actors = [InProcess(str(number), host) for number, host in enumerate(hosts)]
    pool = TeacherPool(list(actors), {"a": (("far", 0.5), ("near", 0.5))}, placement)
    assert list(pool.heads()) == ["near"]
    expected = pool.score(groups_of([1, 2]))
    first.stop()
    for actor in actors:
        actor.asked.clear()
    for _ in range(2):
        with pytest.raises(TeacherError, match=r"teacher 'far' could not score .*ConnectError"):
            pool.score(groups_of([1, 2, 3]))
    assert actors[0].asked.count("score near") == 1  # what was scored is not scored again
    second = Server.start(FORWARDER, server.root, first.root.rpartition(":")[2])
    try:
        found = pool.score(groups_of([1, 2, 3]))
    finally:
        second.stop()
        for host in hosts:
            host.close()
    assert actors[0].asked.count("score near") == 1 and len(found[0]) == 3
    for one, other in zip(expected[0], found[0], strict=False):
        assert [signal.teacher for signal in other] == ["far", "near"]
        assert isinstance(one[0], TeacherLogprobs) and isinstance(other[0], TeacherLogprobs)
        assert isinstance(one[1], TeacherHidden) and isinstance(other[1], TeacherHidden)
        assert np.array_equal(one[0].logprobs, other[0].logprobs)
        assert torch.equal(store.get(one[1].hidden), store.get(other[1].hidden))


def test_host_examines_remote_teachers(server: Server, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.remote.FIRST_PAUSE_SECONDS", 0.01)
    student = TeacherConfig(path=checkpoint, family="hf")
    configs = {"good": config_of(server.root, "close"), "own": config_of(server.root, "")}
    configs |= {name: config_of(server.root, name, tolerance=9.0) for name in ("uniform", "jitter")}
    host = TeacherHost(
        configs, MemoryStore(), fp4="none", threads=1, device="cpu", micro_batch_tokens=64, vocab_size=VOCAB
    )
    numbers = host.examine(dict.fromkeys(configs, TRAJECTORIES[:3]), student)
    host.close()
    assert numbers["own"]["distance"] < 1e-4 < 1e-3 < numbers["good"]["distance"] < 0.1
    assert numbers["uniform"]["entropy_share"] == 1.0 and "entropy_share" not in numbers["good"]
    assert numbers["jitter"]["repeat_error"] > 0.1 and numbers["good"]["repeat_error"] < 1e-5


def test_check_compares_what_the_server_encodes(server: Server, checkpoint: str, chat: Chat) -> None:
    def check(mode: str, **settings: Any) -> list[str]:
        teacher = config_of(server.root, mode, model="tiny", **settings)
        teacher.tokenizer = checkpoint
        return check_teachers(chat, VOCAB, {"far": teacher}, 64)

    assert check("")[0] == f"far: vllm at {server.root}/v1"
    assert check("v0")[0].endswith("v0/v1, which does not say how it encodes")
    with pytest.raises(ConfigError, match=r"teachers\.far\.path=.*reversed.*: its server encodes the same prompt oth"):
        check("reversed")
    with pytest.raises(ConfigError, match=r"small/v1: its server takes 64 tokens, .*max_tokens=64 need 65"):
        check("small")
    with pytest.raises(ConfigError, match=r"its server takes 64 tokens"):
        check("", replicas=[f"{server.root}/small/v1"])
    with pytest.raises(ConfigError, match=r"teachers\.far\.path=http://127\.0\.0\.1:1/v1: .*does not answer"):
        check("http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "host:8000"}, r"teachers\.far\.path=host:8000 is not the base URL of a server"),
        ({"path": "http://me:pw@host/v1"}, r"path=http://\*\*\*@host/v1 is not the base URL .*api_key_env names"),
        ({"path": "http://host/v1?key=1"}, "is not the base URL"),
        ({"tokenizer": None}, r"teachers\.far\.tokenizer is null; family=remote needs"),
        ({"precision": "fp8"}, r"teachers\.far\.precision=fp8 would be ignored"),
        ({"remote": RemoteConfig(replicas=["ftp://x"])}, r"far\.remote\.replicas=ftp://x is not the base URL"),
        ({"remote": RemoteConfig(server="tgi")}, r"far\.remote\.server=tgi is not allowed; choose one of vllm, sglang"),
        ({"remote": RemoteConfig(concurrency=0)}, r"far\.remote\.concurrency=0 is too small"),
        ({"remote": RemoteConfig(timeout_seconds=0)}, r"far\.remote\.timeout_seconds=0 is too small"),
        ({"remote": RemoteConfig(server="sglang", model="x")}, r"far\.remote\.model=x would be ignored"),
        ({"family": "hf", "remote": RemoteConfig(top_k=3)}, r"far\.remote\.top_k=3 would be ignored.*family=hf"),
    ],
)
def test_configurations_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    config = Config()
    config.run.name = "try"
    config.data.domains = {"a": DomainConfig(task="chain_sum")}
    plain: dict[str, Any] = {"family": "remote", "path": "http://h:1/v1", "tokenizer": "x", "domains": {"a": 1.0}}
    config.teachers = {"far": TeacherConfig(**{**plain, **settings})}
    with pytest.raises(ConfigError, match=message):
        check_config(config)


def test_the_exact_loss_says_why_it_needs_the_weights() -> None:
    config = Config()
    config.run.name = "try"
    config.data.domains = {"a": DomainConfig(task="chain_sum")}
    config.teachers = {"far": TeacherConfig(path="http://h:1/v1", family="remote", tokenizer="x", domains={"a": 1.0})}
    with pytest.raises(
        ConfigError, match=r"loss=reverse_kl needs hidden states, and teachers\.far\.family=remote sends"
    ):
        check_config(config)
    config.stages.distill.loss = "sampled_reverse_kl"
    check_config(config)
