"""Parts of a vocabulary on several ranks give what one process gives: values, gradients, refusals."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opd.divergence import compare, jensen_shannon
from opd.logits import Shard, Tiling, gather_ids, shift
from opd.losses import likeliest, token_logprobs
from opd.softmax import Softmax
from tests.test_divergence import DETACHED, DIFFERENTIABLE, Inputs, random_inputs, random_weights, relative

NUM_RANKS = 2
VOCAB, CUT = 37, 21  # ids 0 to 20 on rank 0, the rest on rank 1
TILES = ((1024, 8192), (3, 8))


def everything(inputs: Inputs, shard: Shard | None, tile_tokens: int, tile_vocab: int) -> dict[str, Tensor]:
    """What the functions of a vocabulary give, with gradients of a mixture of all that have one."""
    hidden, head, teacher_hidden, teacher_head, _ = inputs
    targets = torch.randint(VOCAB, (len(hidden), 3), generator=torch.Generator().manual_seed(4))
    arguments = (hidden, head, teacher_hidden, teacher_head, targets)
    mixture, result = jensen_shannon(
        *arguments, beta=0.3, temperature=0.8, tile_tokens=tile_tokens, tile_vocab=tile_vocab, shard=shard
    )
    logprobs, entropy = token_logprobs(
        hidden, head, targets[:, 0], tile_tokens=tile_tokens, tile_vocab=tile_vocab, shard=shard
    )
    found = {name: getattr(result, name) for name in (*DIFFERENTIABLE, *DETACHED)}
    found |= {"mixture": mixture, "logprobs": logprobs, "entropy": entropy}
    found["top1_agree"] = result.top1_agree.double()
    found["likeliest"] = likeliest(
        teacher_hidden, teacher_head, 5, tile_tokens=tile_tokens, tile_vocab=tile_vocab, shard=shard
    ).double()
    loss = torch.zeros((), dtype=torch.float64)
    for seed, name in enumerate((*DIFFERENTIABLE, "mixture", "logprobs")):
        loss = loss + (random_weights(*found[name].shape, seed=seed) * found[name]).sum()
    found["hidden_grad"], found["head_grad"] = torch.autograd.grad(loss, (hidden, head))
    return {name: value.detach() for name, value in found.items()}


def of_rank(inputs: Inputs, rank: int) -> Inputs:
    rows = slice(0, CUT) if rank == 0 else slice(CUT, VOCAB)
    hidden, head, teacher_hidden, teacher_head, targets = inputs
    return hidden, head.detach()[rows].clone().requires_grad_(), teacher_hidden, teacher_head[rows], targets


def refusal(inputs: Inputs, shard: Shard) -> str:
    try:
        compare(*inputs, shard=shard)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def run_rank(rank: int, rendezvous: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=NUM_RANKS)
    assert dist.group.WORLD is not None
    shard = Shard(first_id=0 if rank == 0 else CUT, group=dist.group.WORLD)
    inputs = of_rank(random_inputs(7, VOCAB, 5, 9, torch.float64), rank)
    results = [everything(inputs, shard, *tiles) for tiles in TILES]
    hidden, head, teacher_hidden, teacher_head, targets = inputs
    bad = teacher_hidden.clone(), teacher_head.clone()
    if rank == 1:
        bad[1][4] = float("inf")
    refusals = [
        refusal((hidden, head, *bad, targets), shard),
        refusal((hidden, head, teacher_hidden, teacher_head, torch.full_like(targets, VOCAB)), shard),
    ]
    sender.send(([{name: value.numpy() for name, value in result.items()} for result in results], refusals))
    dist.destroy_process_group()


def test_a_divided_vocabulary_is_the_whole_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    receivers, processes = [], []
    for rank in range(NUM_RANKS):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=run_rank, args=(rank, str(tmp_path / "rendezvous"), sender)))
        processes[-1].start()
        sender.close()
        receivers.append(receiver)
    answers = [receiver.recv() for receiver in receivers]
    for process in processes:
        process.join()
    whole = everything(random_inputs(7, VOCAB, 5, 9, torch.float64), None, *TILES[0])
    for part, tiles in enumerate(TILES):
        ranks = [{name: torch.from_numpy(value) for name, value in answer[0][part].items()} for answer in answers]
        joined = torch.cat([rank.pop("head_grad") for rank in ranks])
        assert relative(joined, whole["head_grad"]) <= 1e-12, tiles
        for found in ranks:
            assert found.keys() == whole.keys() - {"head_grad"}
            for name, value in found.items():
                torch.testing.assert_close(value, whole[name], atol=1e-12, rtol=1e-12, msg=f"{name} {tiles}")
    for refusals in (answer[1] for answer in answers):
        assert f"ids from {VOCAB} to {VOCAB}, of which some lie in no shard" in refusals[1]
    assert "a logit of the teacher is not finite on another rank" in answers[0][1][0]
    assert f"token id {CUT + 4} is" in answers[1][1][0]


def test_parts_merge_in_any_grouping() -> None:
    logits = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 30

    def part(start: int, stop: int) -> Softmax:
        z = logits[:, start:stop].clone()
        at_ids = gather_ids(z, torch.tensor([[3, 17]]).expand(5, -1) - start)
        top = shift(z)
        return Softmax(top, z.exp2().sum(-1), (z.exp2() * z).sum(-1), at_ids)

    whole = part(0, 24)
    for merged in (
        part(0, 7).merge(part(7, 16)).merge(part(16, 24)),
        part(16, 24).merge(part(7, 16).merge(part(0, 7))),
    ):
        torch.testing.assert_close(merged.logprobs(), whole.logprobs())
        torch.testing.assert_close(merged.entropy(), whole.entropy(), atol=1e-12, rtol=1e-9)
    log_p = (logits * torch.log(torch.tensor(2.0, dtype=torch.float64))).log_softmax(-1)
    torch.testing.assert_close(whole.logprobs(), log_p[:, [3, 17]])
    torch.testing.assert_close(whole.entropy(), -(log_p.exp() * log_p).sum(-1), atol=1e-12, rtol=1e-9)


def test_tiling_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="temperature=0 is not allowed; it must be positive"):
        Tiling(temperature=0)
    with pytest.raises(ValueError, match="tile_tokens=-1 is not allowed; it must be positive"):
        Tiling(tile_tokens=-1)
