"""Routing replay: recorded experts are used again, weighted by the present router, and nothing else changes.

What a layer of experts computes is tested with the whole model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opd.model import DeepseekV4
from opd.model.moe import Router, replayed_experts
from opd.model.transformer import CSA, HCA, WINDOW_ONLY, initialize, v4_config
from tests import oracles

EXPERTS, K = 7, 3
FIELDS: dict[str, Any] = {
    "vocab_size": 26, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "partial_rotary_factor": 0.25,
    "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 4, "n_routed_experts": EXPERTS,
    "num_experts_per_tok": K, "layer_types": [WINDOW_ONLY, CSA, HCA, CSA], "compress_rates": {CSA: 2, HCA: 4},
    "mlp_layer_types": ["moe", "hash_moe", "moe", "moe"], "index_n_heads": 16, "index_head_dim": 8, "index_topk": 2,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 64,
}  # fmt: skip
LENGTHS = [5, 1, 17, 12]


def make_model(**changes: Any) -> DeepseekV4:
    model = DeepseekV4(v4_config({**FIELDS, **changes}))
    initialize(model, 0)
    return model


def random_rows(lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    return torch.randint(FIELDS["vocab_size"], (len(lengths), max(lengths))), torch.tensor(lengths)


def real_of(lengths: list[int] = LENGTHS) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def random_routing(layers: int = 3) -> Tensor:
    return torch.rand(len(LENGTHS), max(LENGTHS), layers, EXPERTS).argsort(-1)[..., :K]


def gradients(model: DeepseekV4, output: Any) -> list[Tensor | None]:
    model.zero_grad()
    (output.hidden[real_of()].pow(2).sum() + output.balance_loss).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_the_same_experts_are_bitwise_the_same_model(dtype: torch.dtype) -> None:
    """Values, gradients and load; with anything at all recorded for the padding."""
    model = make_model()
    tokens, lengths = random_rows()
    plain = model(tokens, lengths, record_routing=True, mtp=True)
    assert plain.routing.dtype == torch.int16 and plain.routing.shape == (4, 17, *model.routing_shape) == (4, 17, 3, K)
    expected = gradients(model, plain)
    assert model(tokens, lengths).routing is None
    routing = plain.routing.to(dtype, copy=True)
    routing[~real_of()] = 255 if dtype == torch.uint8 else -77
    replayed = model(tokens, lengths, record_routing=True, mtp=True, routing=routing)
    for name in ("hidden", "mtp_hidden", "balance_loss", "expert_load", "routing"):
        assert torch.equal(getattr(replayed, name), getattr(plain, name)), name
    for found, wanted in zip(gradients(model, replayed), expected, strict=True):
        assert (found is None and wanted is None) or torch.equal(found, wanted)  # type: ignore[arg-type]


def test_recorded_experts_are_used_and_weighted_by_the_present_router() -> None:
    """One layer against its definition: the outputs of the recorded experts, by their share of present affinity."""
    model = make_model(num_hidden_layers=1, layer_types=[WINDOW_ONLY], mlp_layer_types=["moe"]).double()
    moe = model.blocks[0].mlp
    u = torch.randn(6, 32, dtype=torch.float64)
    given = torch.rand(6, EXPERTS).argsort(-1)[:, :K]
    given[4] = -1  # not recorded
    out, scores, chosen = moe(u, torch.zeros(6, dtype=torch.int64), given)
    gate = moe.gate.weight
    for t in range(6):
        if t == 4:
            expected, _, experts = oracles.v4_moe(model.config, 0, u[t], moe.state_dict())
            assert chosen[t].tolist() == experts
        else:
            assert torch.equal(chosen[t], given[t])
            fixed = {**moe.state_dict(), "gate.tid2eid": given}
            expected, _, _ = oracles.v4_moe(model.config, t, u[t], fixed)
        assert float((out[t] - expected).detach().abs().max()) < 1e-12
    (gradient,) = torch.autograd.grad(out.sum(), gate, retain_graph=True)
    assert all(bool(gradient[e].any()) for e in given.flatten().tolist() if e >= 0)
    assert torch.equal(scores, moe.gate(u, torch.zeros(6, dtype=torch.int64))[0])


def test_the_router_keeps_its_gradient_and_recorded_experts_need_not_be_the_best() -> None:
    torch.manual_seed(1)
    router = Router(EXPERTS, 2, 8, "sqrtsoftplus", 2.5, None).double()
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.randn(EXPERTS))
    x, ids = torch.randn(4, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    given = torch.tensor([[0, 6], [1, 2], [3, 0], [6, 5]])

    def weights(matrix: Tensor) -> Tensor:
        scores = torch.nn.functional.softplus(x @ matrix.T).sqrt().gather(1, given)
        return 2.5 * scores / scores.sum(-1, keepdim=True)

    _, found, chosen = router(x, ids, given)
    assert torch.equal(chosen, given) and not torch.equal(router(x, ids)[2].sort(-1).values, given.sort(-1).values)
    assert torch.allclose(found, weights(router.weight), rtol=1e-12)
    projection = torch.randn_like(found)
    mine, plain = (
        torch.autograd.grad((w * projection).sum(), router.weight)[0] for w in (found, weights(router.weight))
    )
    assert torch.allclose(mine, plain, rtol=1e-10) and mine.abs().max() > 1e-3


def test_every_learned_layer_takes_its_own_experts_and_hash_layers_none() -> None:
    model = make_model()
    tokens, lengths = random_rows()
    routing = random_routing()
    seen: list[Tensor] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: seen.append(out[2].view(4, 17, K)))
    output = model(tokens, lengths, routing=routing, record_routing=True)
    real = real_of()
    assert torch.equal(output.routing[real], routing[real].to(torch.int16))
    assert torch.equal(seen[1], model.blocks[1].mlp.gate.tid2eid[tokens])
    for layer, index in enumerate((0, 2, 3)):
        assert torch.equal(seen[index][real], routing[real][:, layer])
    load = [torch.bincount(routing[real][:, layer].flatten(), minlength=EXPERTS) for layer in range(3)]
    assert torch.equal(output.expert_load, torch.stack(load))
    assert not torch.allclose(output.hidden[real], model(tokens, lengths).hidden[real], atol=1e-3)


def test_a_token_that_was_not_recorded_is_routed_now() -> None:
    """A sampler never feeds its last token, so nothing is recorded there."""
    model = make_model()
    tokens, lengths = random_rows()
    recorded = model(tokens, lengths, record_routing=True).routing
    last = (torch.arange(4), lengths - 1)
    recorded[last] = -1
    assert torch.equal(model(tokens, lengths, routing=recorded).hidden, model(tokens, lengths).hidden)


@torch.no_grad()
def test_decoding_reports_what_the_whole_sequence_does() -> None:
    model = make_model().double()
    tokens, lengths = random_rows()
    whole = model(tokens, lengths, record_routing=True).routing
    cache = model.new_cache(4, 20)
    pieces, at = [], 0
    for size in (1, 4, 1, 1, 7, 3):
        counts = [max(0, min(size, length - at)) for length in LENGTHS]
        rows = [row for row, count in enumerate(counts) if count]
        step = cache.extension(rows, [at] * len(rows), [counts[row] for row in rows], size)
        record = torch.full((4, size, 3, K), -1, dtype=torch.int16)
        part = model.new_routing(len(rows), size)
        assert part.dtype == torch.int16 and part.shape == (len(rows), size, 3, K)
        model.extend(tokens[rows, at : at + size], cache, step, record=part)
        record[rows] = part
        pieces.append(record)
        at += size
    found = torch.cat(pieces, 1)
    assert at == 17 and torch.equal(found[real_of()], whole[real_of()])


def test_a_model_of_hash_layers_has_nothing_to_record() -> None:
    model = make_model(mlp_layer_types=["hash_moe"] * 4)
    tokens, lengths = random_rows()
    output = model(tokens, lengths, record_routing=True)
    assert output.routing.shape == (4, 17, 0, K)
    assert torch.equal(model(tokens, lengths, routing=output.routing).hidden, output.hidden)


def changed(index: tuple[int, ...], ids: list[int]) -> Tensor:
    routing = random_routing()
    routing[index] = torch.tensor(ids)
    return routing


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_routing(4), r"shape \(4, 17, 4, 3\); these tokens and this model ask for \(4, 17, 3, 3\)"),
        (lambda: random_routing()[:, 1:], r"shape \(4, 16, 3, 3\)"),
        (lambda: random_routing()[..., :2], r"shape \(4, 17, 3, 2\)"),
        (lambda: random_routing().float(), "dtype torch.float32; expert ids are integers"),
        (lambda: random_routing().bool(), "dtype torch.bool; expert ids are integers"),
        (lambda: changed((2, 16, 1), [0, 1, 7]), r"routing\[2, 16, 1\] = \[0, 1, 7\] .* distinct and from 0 to 6"),
        (lambda: changed((0, 4, 2), [0, -2, 1]), r"routing\[0, 4, 2\] = \[0, -2, 1\]"),
        (
            lambda: changed((0, 4, 2), [0, -1, 1]),
            r"routing\[0, 4, 2\] = \[0, -1, 1\] .* all -1 where none were recorded",
        ),
        (lambda: changed((1, 0, 0), [5, 2, 5]), r"routing\[1, 0, 0\] = \[5, 2, 5\] .* distinct"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(make: Any, message: str) -> None:
    model = make_model()
    tokens, lengths = random_rows()
    with pytest.raises(ValueError, match=message):
        model(tokens, lengths, routing=make())


def test_the_check_reads_no_padding() -> None:
    routing = random_routing()
    routing[~real_of()] = 99
    parts = replayed_experts(routing, real_of(), (3, K), EXPERTS)
    real = real_of().flatten()
    for layer, part in enumerate(parts):
        assert torch.equal(part[real], routing[:, :, layer].flatten(0, 1)[real]) and bool((part[~real] == -1).all())
