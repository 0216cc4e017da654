"""Slow and obvious versions of the numeric modules, one section each. They follow the definitions and share no code
with what they check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

# ---- fp4: one scalar at a time ---------------------------------------------------------------------------------------

FP4_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp4_block(values: list[float]) -> tuple[list[int], int]:
    """Codes and scale byte of one block of float32 values, by the definition."""
    amax = max(abs(value) for value in values)
    exponent = -126
    while 6.0 * 2.0**exponent < amax:
        exponent += 1
    codes = []
    for value in values:
        scaled = abs(value) / 2.0**exponent  # exact: a float32 and a power of two, in float64
        # Nearest; of two equally near ones that whose mantissa bit is 0, which is the even code.
        code = min(range(8), key=lambda c: (abs(FP4_GRID[c] - scaled), c % 2))
        codes.append(code + (8 if math.copysign(1.0, value) < 0 else 0))
    return codes, exponent + 127


def fp4_quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., K/2], scale bytes uint8 [..., K/32] and the values float64 [..., K] of a weight [..., K]."""
    packed: list[int] = []
    scales: list[int] = []
    values: list[float] = []
    for block in weight.float().reshape(-1, 32).tolist():
        codes, scale = fp4_block(block)
        packed += [codes[i] + 16 * codes[i + 1] for i in range(0, 32, 2)]
        scales.append(scale)
        values += [(-1.0 if code & 8 else 1.0) * FP4_GRID[code & 7] * 2.0 ** (scale - 127) for code in codes]
    *leading, width = weight.shape
    return (
        torch.tensor(packed, dtype=torch.uint8).reshape(*leading, width // 2),
        torch.tensor(scales, dtype=torch.uint8).reshape(*leading, width // 32),
        torch.tensor(values, dtype=torch.float64).reshape(weight.shape),
    )


# ---- losses: dense, float64, autograd --------------------------------------------------------------------------------


def dense_divergences(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> dict[str, torch.Tensor]:
    """Every field of Comparison and the mixture's divergence, from whole [N, V] distributions in float64.

    Differentiable in the student's hidden states and head, if those require it.
    """
    log_p = torch.log_softmax(student_hidden.double() @ student_head.double().T / temperature, dim=-1)
    log_q = torch.log_softmax(teacher_hidden.double() @ teacher_head.double().T / temperature, dim=-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.log(beta * q + (1 - beta) * p)
    ids = targets if targets.dim() == 2 else targets[:, None]
    return {
        "reverse_kl": (p * (log_p - log_q)).sum(dim=-1),
        "forward_kl": (q * (log_q - log_p)).sum(dim=-1),
        "jensen_shannon": (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(dim=-1),
        "student_logprobs": log_p.gather(1, ids).view(targets.shape),
        "teacher_logprobs": log_q.gather(1, ids).view(targets.shape),
        "student_entropy": -(p * log_p).sum(dim=-1),
        "teacher_entropy": -(q * log_q).sum(dim=-1),
        "top1_agree": log_p.argmax(dim=-1) == log_q.argmax(dim=-1),
    }


def dense_losses(
    log_p: torch.Tensor, log_q: torch.Tensor, targets: torch.Tensor, top_k: int, mix: float, beta: float
) -> dict[str, torch.Tensor]:
    """The loss [N] of every name of `stages.distill.loss`, one token at a time from whole rows log p, log q [N, V].

    Differentiable in log_p, except that score functions have the value of the surrogate that is differentiated.
    """
    rows: dict[str, list[torch.Tensor]] = {}
    for lp, lq, y in zip(log_p, log_q, targets.tolist(), strict=True):
        inside = sorted(range(len(lq)), key=lambda v, lq=lq: -float(lq[v]))[:top_k]
        p, q, m = lp.exp(), lq.exp(), beta * lq.exp() + (1 - beta) * lp.exp()
        reverse, forward = (p * (lp - lq)).sum(), (q * (lq - lp)).sum()
        own_p, own_q = p[inside], q[inside]
        hat_p, hat_q = own_p / own_p.sum(), own_q / own_q.sum()
        rest_p, rest_q = 1 - own_p.sum(), 1 - own_q.sum()
        gap = lp[y] - lq[y]
        score = gap.detach() * lp[y]
        values = {
            "reverse_kl": reverse,
            "forward_kl": forward,
            "mixed_kl": mix * reverse + (1 - mix) * forward,
            "jensen_shannon": beta * (q * (lq - m.log())).sum() + (1 - beta) * (p * (lp - m.log())).sum(),
            "topk_reverse_kl": (own_p * (own_p / own_q).log() - own_p + own_q).sum(),
            "topk_renormalised_reverse_kl": (hat_p * (hat_p / hat_q).log()).sum(),
            "topk_tail_reverse_kl": (own_p * (own_p / own_q).log()).sum() + rest_p * (rest_p / rest_q).log(),
            "topk_sampled_reverse_kl": (own_p * (own_p / own_q).log().detach()).sum() + (y not in inside) * score,
            "topk_forward_kl": (own_q * (own_q / own_p).log()).sum(),
            "sampled_reverse_kl": score,
            "sampled_reverse_kl_k2": gap**2 / 2,
            "sampled_forward_kl": (-gap).exp() - 1 + gap,
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in rows.items()}


def scalar_correction(
    policy: list[float], sampler: list[float], rows: list[int], ratio: str, low: float, high: float
) -> list[float]:
    """Importance weight of each token, by the table of the methods."""
    weights = []
    for logp, logmu, row in zip(policy, sampler, rows, strict=True):
        r = math.exp(logp - logmu)
        if ratio.startswith("sequence"):
            r = math.prod(math.exp(a - b) for a, b, other in zip(policy, sampler, rows, strict=True) if other == row)
        match ratio:
            case "none":
                weights.append(1.0)
            case "tis" | "sequence_tis":
                weights.append(min(r, high))
            case "mis" | "sequence_mis":
                weights.append(r if r <= high else 0.0)
            case _:  # icepop
                weights.append(r if low <= r <= high else 0.0)
    return weights


def dense_token_logprobs(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, temperature: float = 1.0
) -> dict[str, torch.Tensor]:
    """Log-probabilities, entropy, and the gradients of sum(upstream * logprobs), in float64."""
    hidden = hidden.detach().double().requires_grad_()
    head = head.detach().double().requires_grad_()
    log_p = torch.log_softmax(hidden @ head.T / temperature, dim=-1)
    logprobs = log_p[torch.arange(len(targets)), targets]
    hidden_grad, head_grad = torch.autograd.grad((upstream.double() * logprobs).sum(), (hidden, head))
    return {
        "logprobs": logprobs.detach(),
        "entropy": -(log_p.exp() * log_p).sum(dim=-1).detach(),
        "hidden_grad": hidden_grad,
        "head_grad": head_grad,
    }


def scalar_grpo(
    policy: list[float],
    sampler: list[float],
    advantages: list[float],
    weights: list[float],
    clip: float,
    reference: list[float],
    kl_coefficient: float,
) -> tuple[float, list[float]]:
    """The loss and its gradient in the policy's log-probs, token by token by the formulas (no clamp of log-ratios)."""
    loss, gradient = 0.0, []
    for logp, logmu, advantage, weight, logref in zip(policy, sampler, advantages, weights, reference, strict=True):
        ratio = math.exp(logp - logmu)
        bounded = min(max(ratio, 1.0 - clip), 1.0 + clip)
        surrogate = min(ratio * advantage, bounded * advantage)
        slope = ratio * advantage if ratio * advantage <= bounded * advantage else 0.0
        kl = ratio * (math.exp(logref - logp) - (logref - logp) - 1.0)
        loss -= weight * (surrogate - kl_coefficient * kl)
        gradient.append(-weight * (slope - kl_coefficient * ratio * (logp - logref)))
    return loss, gradient


# ---- muon: one matrix at a time, float64 -----------------------------------------------------------------------------


def polar_factor(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of one matrix [R, C], which Newton-Schulz approaches, in float64."""
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


def hybrid_newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """V4's Algorithm 1, line by line, one matrix [R, C] in float64, on whichever side it lies."""
    x = matrix.double() / matrix.double().norm()
    for step in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
        gram = x @ x.T
        x = a * x + b * (gram @ x) + c * (gram @ gram @ x)
    return x


def muon_steps(
    weight: torch.Tensor,
    gradients: list[torch.Tensor],
    learning_rate: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
) -> torch.Tensor:
    """One independent matrix [R, C] after a Muon step for each gradient, in float64."""
    weight, buffer = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        buffer = momentum * buffer + gradient.double()
        update = hybrid_newton_schulz(momentum * buffer + gradient.double()) * max(weight.shape) ** 0.5 * 0.18
        weight = weight * (1 - learning_rate * weight_decay) - learning_rate * update
    return weight


# ---- model: one sequence, one token, one head and one entry at a time, float64 ---------------------------------------
#
# `weights` is a state dict by the published names, in float64. A vector is a 1-D tensor, a sequence a list of vectors.

Weights = dict[str, torch.Tensor]
Vectors = list[torch.Tensor]


def rope_frequencies(parameters: dict[str, Any], rope_dim: int) -> list[float]:
    """Angle per position of each channel pair, plain or YaRN, pair by pair."""
    base = parameters["rope_theta"]
    frequencies = [base ** (-2 * k / rope_dim) for k in range(rope_dim // 2)]
    if parameters["rope_type"] == "default":
        return frequencies
    turns = [
        parameters["original_max_position_embeddings"] / (2 * math.pi * parameters[k])
        for k in ("beta_fast", "beta_slow")
    ]
    fast, slow = (rope_dim * math.log(turn) / (2 * math.log(base)) for turn in turns)
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), rope_dim - 1)
    for k, frequency in enumerate(frequencies):
        ramp = min(max((k - low) / (high - low if high != low else 0.001), 0.0), 1.0)
        frequencies[k] = frequency * (1 - ramp) + frequency / parameters["factor"] * ramp
    return frequencies


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).sum() / len(x) + eps)


def turn(x: torch.Tensor, position: int, frequencies: list[float]) -> torch.Tensor:
    """The last channels, two by two, as points of a plane that is turned by position * frequency."""
    x, first = x.clone(), len(x) - 2 * len(frequencies)
    for k, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        a, b = float(x[first + 2 * k]), float(x[first + 2 * k + 1])
        x[first + 2 * k], x[first + 2 * k + 1] = a * cos - b * sin, a * sin + b * cos
    return x


def compressed_entries(h: Vectors, w: Weights, overlap: bool, frequencies: list[float], eps: float) -> Vectors:
    """One entry per complete block of tokens; `w` holds the compressor's own four tensors."""
    ratio, width = len(w["position_bias"]), len(w["kv_norm.weight"])
    own = slice(width, 2 * width) if overlap else slice(0, width)
    entries = []
    for block in range(len(h) // ratio):
        candidates = [(block * ratio + j, own) for j in range(ratio)]
        if overlap and block > 0:
            candidates += [((block - 1) * ratio + j, slice(0, width)) for j in range(ratio)]
        total, normaliser = torch.zeros(width).double(), torch.zeros(width).double()
        for token, series in candidates:
            gate = (w["gate_proj.weight"] @ h[token] + w["position_bias"][token % ratio])[series].exp()
            total += gate * (w["kv_proj.weight"] @ h[token])[series]
            normaliser += gate
        entry = rms(total / normaliser, eps) * w["kv_norm.weight"]
        entries.append(turn(entry, block * ratio, frequencies))
    return entries


def v4_attention(config: Any, kind: str, h: Vectors, w: Weights) -> Vectors:
    """One layer's attention over a whole sequence of normalised inputs."""
    eps, heads, width, rope_dim = (
        config.rms_norm_eps,
        config.num_attention_heads,
        config.head_dim,
        config.qk_rope_head_dim,
    )
    compressed = kind != "sliding_attention"
    frequencies = rope_frequencies(config.rope_parameters["compress" if compressed else "main"], rope_dim)
    latents = [rms(w["q_a_proj.weight"] @ x, eps) * w["q_a_norm.weight"] for x in h]
    raw = [turn(rms(w["kv_proj.weight"] @ x, eps) * w["kv_norm.weight"], t, frequencies) for t, x in enumerate(h)]
    entries: Vectors = []
    index_keys: Vectors = []
    if compressed:
        overlap = kind == "compressed_sparse_attention"
        entries = compressed_entries(h, under(w, "compressor."), overlap, frequencies, eps)
        if overlap:
            index_keys = compressed_entries(h, under(w, "compressor.indexer."), True, frequencies, eps)
    outputs = []
    for t, x in enumerate(h):
        keys = [raw[s] for s in range(max(0, t - config.sliding_window + 1), t + 1)]
        if compressed:
            complete = [i for i in range(len(entries)) if (i + 1) * config.compress_rates[kind] <= t + 1]
            if index_keys:
                scores = {i: index_score(config, index_keys[i], x, latents[t], t, frequencies, w) for i in complete}
                complete = sorted(complete, key=lambda i: (-scores[i], i))[: config.index_topk]
            keys += [entries[i] for i in complete]
        mixed = []
        for head in range(heads):
            query = rms(w["q_b_proj.weight"][head * width : (head + 1) * width] @ latents[t], eps)
            query = turn(query, t, frequencies)
            shares = [math.exp(float(query @ key) / math.sqrt(width)) for key in keys]
            normaliser = sum(shares) + math.exp(float(w["sinks"][head]))
            value = sum((share / normaliser * key for share, key in zip(shares, keys, strict=True)), torch.zeros(width))
            mixed.append(turn(value.double(), -t, frequencies))
        per_group = heads // config.o_groups
        latent = [
            w["o_a_proj.weight"][g * config.o_lora_rank : (g + 1) * config.o_lora_rank]
            @ torch.cat(mixed[g * per_group : (g + 1) * per_group])
            for g in range(config.o_groups)
        ]
        outputs.append(w["o_b_proj.weight"] @ torch.cat(latent))
    return outputs


def index_score(
    config: Any, key: torch.Tensor, x: torch.Tensor, latent: torch.Tensor, t: int, frequencies: list[float], w: Weights
) -> float:
    width, heads = config.index_head_dim, config.index_n_heads
    head_weights = w["compressor.indexer.scorer.weights_proj.weight"] @ x / math.sqrt(width * heads)
    score = 0.0
    for head in range(heads):
        query = w["compressor.indexer.q_b_proj.weight"][head * width : (head + 1) * width] @ latent
        score += float(head_weights[head]) * max(float(turn(query, t, frequencies) @ key), 0.0)
    return score


def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """One [n, n] matrix of any dtype, by plain operations that autograd records."""
    matrix = torch.softmax(logits, dim=1) + eps
    matrix = matrix / (matrix.sum(dim=0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(dim=1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=0, keepdim=True) + eps)
    return matrix


def hyper_connection(config: Any, x: torch.Tensor, w: Weights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token's streams [n, D] -> collapsed [D], expansion weights [n], residual matrix [n, n] (from, to)."""
    n = len(x)
    mix = w["fn"] @ rms(x.flatten(), config.rms_norm_eps)
    pre = torch.sigmoid(w["scale"][0] * mix[:n] + w["base"][:n]) + config.hc_eps
    post = 2 * torch.sigmoid(w["scale"][1] * mix[n : 2 * n] + w["base"][n : 2 * n])
    residual = (w["scale"][2] * mix[2 * n :] + w["base"][2 * n :]).view(n, n)
    return pre @ x, post, sinkhorn(residual, config.hc_sinkhorn_iters, config.hc_eps)


def hyper_expand(x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    n = len(x)
    return torch.stack([post[k] * y + sum(residual[j, k] * x[j] for j in range(n)) for k in range(n)])


def hyper_head(config: Any, x: torch.Tensor, w: Weights) -> torch.Tensor:
    """One token's streams after the last layer [n, D] -> [D]."""
    mix = w["fn"] @ rms(x.flatten(), config.rms_norm_eps)
    return (torch.sigmoid(w["scale"] * mix + w["base"]) + config.hc_eps) @ x


def v4_moe(config: Any, token_id: int, u: torch.Tensor, w: Weights) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """One token -> output, affinities [E], the experts it is sent to."""

    def expert(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        limit = config.swiglu_limit
        capped = (gate @ u).clamp(max=limit)
        return down @ (capped * torch.sigmoid(capped) * (up @ u).clamp(-limit, limit))

    logits = w["gate.weight"] @ u
    match config.scoring_func:
        case "sqrtsoftplus":
            scores = torch.log(1 + logits.exp()).sqrt()
        case "sigmoid":
            scores = 1 / (1 + torch.exp(-logits))
        case _:
            scores = logits.exp() / logits.exp().sum()
    if "gate.tid2eid" in w:
        chosen = [int(e) for e in w["gate.tid2eid"][token_id]]
    else:
        biased = (scores + w["gate.e_score_correction_bias"]).tolist()
        chosen = sorted(range(len(biased)), key=lambda e: -biased[e])[: config.num_experts_per_tok]
    out = expert(*(w[f"shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")))
    for e in chosen:
        gate, up = w["experts.gate_up_proj"][e].chunk(2)
        share = scores[e] / sum(scores[i] for i in chosen) * config.routed_scaling_factor
        out = out + share * expert(gate, up, w["experts.down_proj"][e])
    return out, scores, chosen


def v4_trunk(config: Any, weights: Weights, token_ids: list[int]) -> tuple[Vectors, list[float], list[list[int]]]:
    """Each token's streams [n, D] after the last layer; balance loss and expert load of each score-routed layer."""
    streams = [weights["model.embed_tokens.weight"][i].expand(config.hc_mult, -1) for i in token_ids]
    balance: list[float] = []
    load: list[list[int]] = []
    for layer, kind in enumerate(config.layer_types):
        w = under(weights, f"model.layers.{layer}.")
        sites = [hyper_connection(config, x, under(w, "attn_hc.")) for x in streams]
        h = [rms(collapsed, config.rms_norm_eps) * w["input_layernorm.weight"] for collapsed, _, _ in sites]
        attended = v4_attention(config, kind, h, under(w, "self_attn."))
        streams = [hyper_expand(x, y, site[1], site[2]) for x, y, site in zip(streams, attended, sites, strict=True)]
        sent, shares, num_experts = [0] * config.n_routed_experts, torch.zeros(1), config.n_routed_experts
        for t, x in enumerate(streams):
            collapsed, post, residual = hyper_connection(config, x, under(w, "ffn_hc."))
            u = rms(collapsed, config.rms_norm_eps) * w["post_attention_layernorm.weight"]
            y, scores, chosen = v4_moe(config, token_ids[t], u, under(w, "mlp."))
            streams[t] = hyper_expand(x, y, post, residual)
            shares = shares + scores / scores.sum()
            for e in chosen:
                sent[e] += 1
        if config.mlp_layer_types[layer] == "moe":
            length, k = len(token_ids), config.num_experts_per_tok
            balance.append(
                sum(num_experts * sent[e] / (k * length) * float(shares[e]) / length for e in range(num_experts))
            )
            load.append(sent)
    return streams, balance, load


def v4_forward(
    config: Any, weights: Weights, token_ids: list[int]
) -> tuple[torch.Tensor, list[float], list[list[int]]]:
    """Hidden states [T, D] before the head; balance loss and expert load of each score-routed layer."""
    streams, balance, load = v4_trunk(config, weights, token_ids)
    hidden = []
    for x in streams:
        collapsed = hyper_head(config, x, under(weights, "model.hc_head.hc_"))
        hidden.append(rms(collapsed, config.rms_norm_eps) * weights["model.norm.weight"])
    return torch.stack(hidden), balance, load


def v4_mtp(config: Any, weights: Weights, token_ids: list[int]) -> tuple[torch.Tensor, list[list[int]]]:
    """The block that predicts ahead: hidden states [T - 1, D], of which index t predicts token t + 2, and the experts
    of each place. The last index predicts the token that would follow the sequence."""
    w, eps = under(weights, "mtp.0."), config.rms_norm_eps
    trunk, _, _ = v4_trunk(config, weights, token_ids)
    streams = []
    for t in range(len(token_ids) - 1):
        token = rms(weights["model.embed_tokens.weight"][token_ids[t + 1]], eps) * w["enorm.weight"]
        state = [rms(stream, eps) * w["hnorm.weight"] for stream in trunk[t]]
        streams.append(torch.stack([w["e_proj.weight"] @ token + w["h_proj.weight"] @ stream for stream in state]))
    sites = [hyper_connection(config, x, under(w, "attn_hc.")) for x in streams]
    h = [rms(collapsed, eps) * w["input_layernorm.weight"] for collapsed, _, _ in sites]
    attended = v4_attention(config, "sliding_attention", h, under(w, "self_attn."))
    hidden, experts = [], []
    for x, y, (_, post, residual) in zip(streams, attended, sites, strict=True):
        x = hyper_expand(x, y, post, residual)
        collapsed, post, residual = hyper_connection(config, x, under(w, "ffn_hc."))
        u = rms(collapsed, eps) * w["post_attention_layernorm.weight"]
        y, _, chosen = v4_moe(config, -1, u, under(w, "mlp."))
        x = hyper_expand(x, y, post, residual)
        hidden.append(rms(hyper_head(config, x, under(w, "hc_head.hc_")), eps) * w["norm.weight"])
        experts.append(chosen)
    return torch.stack(hidden), experts


def mtp_nll(config: Any, weights: Weights, token_ids: list[int]) -> float:
    """Mean cross-entropy of tokens 2, 3, ... of one sequence, each from the state two before it."""
    hidden, _ = v4_mtp(config, weights, token_ids)
    total = 0.0
    for t in range(len(token_ids) - 2):
        logits = weights["lm_head.weight"] @ hidden[t]
        total += float(torch.log(torch.exp(logits - logits.max()).sum()) + logits.max() - logits[token_ids[t + 2]])
    return total / (len(token_ids) - 2)


def under(weights: Weights, prefix: str) -> Weights:
    """The entries below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


# ---- rollout: one token of one request at a time, float64, noise in Python's own integers ----------------------------


def noise(key: int, position: int) -> float:
    """Output number `position` of SplitMix64 started at `key`, as the middle of one of 2^52 equal parts of (0, 1)."""
    word = 2**64
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) % word
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % word
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % word
    z = z ^ (z >> 31)
    return (2 * (z >> 12) + 1) / 2**53


def drawn_from(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> list[float]:
    """The probabilities that a token is drawn from: temperature, then the k likeliest, then their shortest prefix of
    mass top_p, then those of at least min_p times the likeliest; of equal logits the lower id goes first."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    if top_p < 1.0:
        total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
        for i in kept:
            if mass < top_p:
                nucleus.append(i)
            mass += weights[i] / total
        kept = nucleus
    kept = [i for i in kept if weights[i] >= min_p * max(weights)]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def draw(probabilities: list[float], noise: float) -> int:
    """The first token at which the cumulative distribution exceeds the noise."""
    mass = 0.0
    for token, probability in enumerate(probabilities):
        mass += probability
        if mass > noise:
            return token
    raise AssertionError(f"the noise {noise} is not below the total mass {mass}")


def complete(
    logits_after: Callable[[list[int]], list[float]],
    prompt: list[int],
    key: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    most_tokens: int,
    stop_ids: list[int],
) -> tuple[list[int], list[float], str]:
    """Sampled tokens of one request (at most `most_tokens`), their log-probabilities, and why it ended."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while True:
        logits = logits_after(prompt + tokens)
        if temperature == 0.0:
            token, probabilities = logits.index(max(logits)), drawn_from(logits, 1.0, 0, 1.0)
        else:
            probabilities = drawn_from(logits, temperature, top_k, top_p, min_p)
            token = draw(probabilities, noise(key, len(prompt) + len(tokens)))
        tokens.append(token)
        logprobs.append(math.log(probabilities[token]))
        if token in stop_ids:
            return tokens, logprobs, "stop"
        if len(tokens) == most_tokens:
            return tokens, logprobs, "length"
