"""Slow and obvious versions of the numeric modules, one section each. They follow the definitions and share no code
with what they check."""

from __future__ import annotations

import math

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


def dense_reverse_kl(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    weights: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Every field of KlResult and the gradients of its loss, from whole [N, V] distributions in float64."""
    hidden = student_hidden.detach().double().requires_grad_()
    head = student_head.detach().double().requires_grad_()
    log_p = torch.log_softmax(hidden @ head.T / temperature, dim=-1)
    log_q = torch.log_softmax(teacher_hidden.double() @ teacher_head.double().T / temperature, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    loss = (weights.double() * kl).sum()
    hidden_grad, head_grad = torch.autograd.grad(loss, (hidden, head))
    return {
        "loss": loss.detach(),
        "kl": kl.detach(),
        "student_entropy": -(log_p.exp() * log_p).sum(dim=-1).detach(),
        "teacher_entropy": -(log_q.exp() * log_q).sum(dim=-1),
        "student_logprobs": log_p.gather(1, targets[:, None])[:, 0].detach(),
        "teacher_logprobs": log_q.gather(1, targets[:, None])[:, 0],
        "top1_agree": log_p.argmax(dim=-1) == log_q.argmax(dim=-1),
        "hidden_grad": hidden_grad,
        "head_grad": head_grad,
    }


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
