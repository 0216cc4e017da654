"""The optimizers: V4's Muon for matrices, AdamW for everything else (V4 report 2.4, Algorithm 1, eq. 28).

Muon replaces the momentum of a matrix by the nearest matrix with orthonormal rows or columns, found by Newton-Schulz
iteration, and gives the update a root mean square of 0.18, so that one learning rate serves both algorithms. What is
orthogonalised is the *logically independent* matrix, not the tensor that stores it: `assign` cuts stacked experts,
gate and up, the two series of a CSA compressor, the grouped output projection and the three maps of a hyper-connection
apart. Matrices of equal shape, whatever parameter they belong to, go through Newton-Schulz in one batch.

Left out: ZeRO partitioning (an optimizer that is handed flat slices sees no matrices; `opd.learner` refuses it) and a
split per attention head, which the report does not mention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from opd.config import OptimizerConfig
from opd.kernels.products import matmul

STEEP = (3.4445, -4.7750, 2.0315)  # lifts small singular values fast and leaves all of them near 1
SETTLE = (2.0, -1.5, 0.5)  # has 1 as a stable fixed point
STEEP_STEPS, SETTLE_STEPS = 8, 2
UPDATE_RMS = 0.18

# Newton-Schulz works on batches of about this many numbers on a CPU, so that its four buffers stay in the second-level
# cache; measured on 96 matrices of 128 x 128, that is a third faster than one batch.
CPU_BATCH_NUMBERS = 1 << 17


@dataclass(slots=True, kw_only=True)
class Assignment:
    """Which parameter is trained by what. `blocks` are row counts: a parameter [..., R, C] whose blocks are (r1, r2)
    stores matrices [r1, C] and [r2, C] below each other, once per leading index."""

    muon: list[nn.Parameter] = field(default_factory=list)
    blocks: list[tuple[int, ...]] = field(default_factory=list)  # one entry per parameter of `muon`
    decayed: list[nn.Parameter] = field(default_factory=list)  # AdamW with weight decay: embedding and head
    undecayed: list[nn.Parameter] = field(default_factory=list)  # AdamW without


def assign(model: nn.Module) -> Assignment:
    """Sorts a model's trainable parameters by the report's rule, each under its first name.

    AdamW: embeddings, the output head, everything of one dimension (norms, biases, sinks, mHC scale and base), and two
    choices of ours: position biases (a table that is added to gate logits, no map between spaces) and convolutions.
    Muon: all other matrices. The report does not say whether norms and biases decay; here only embedding and head do.
    Works for any transformers causal LM; `model.head` (see `opd.model`) is recognised as the head whatever its name.
    """
    config = getattr(model, "config", None)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables.add(id(getattr(model, "head", None)))
    result = Assignment()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            result.decayed.append(parameter)
        elif parameter.ndim < 2 or name.endswith("bias") or "conv" in name:
            result.undecayed.append(parameter)
        else:
            result.muon.append(parameter)
            result.blocks.append(split_of(name, tuple(parameter.shape), config))
    return result


def split_of(name: str, shape: tuple[int, ...], config: Any) -> tuple[int, ...]:
    """Row counts of the independent matrices a parameter [..., R, C] stores; (R,) if it is one matrix.

    `config` is the transformers config (or None, which splits nothing but gate and up). Raises ValueError if a
    parameter's name says that it is fused and its rows do not divide accordingly.
    """
    rows = shape[-2]
    parts = name.removesuffix(".weight").split(".")
    leaf, owner = parts[-1], parts[-2] if len(parts) > 1 else ""
    sizes: tuple[int, ...] = (rows,)
    if leaf == "gate_up_proj" and shape[-1] == getattr(config, "hidden_size", shape[-1]):
        # Dense and stacked experts alike, output features as rows. A layout with inputs as rows stays whole.
        sizes = (rows // 2,) * 2
    elif owner in ("compressor", "indexer") and leaf in ("kv_proj", "gate_proj"):
        # Overlapping compression has two series, the one carried to the next block and the block's own.
        width = config.index_head_dim if owner == "indexer" else config.head_dim
        sizes = (width,) * (rows // width)
    elif leaf == "o_a_proj":
        sizes = (rows // config.o_groups,) * config.o_groups
    elif owner in ("attn_hc", "ffn_hc") and leaf == "fn":
        sizes = (config.hc_mult, config.hc_mult, config.hc_mult**2)  # pre, post, residual
    if sum(sizes) != rows:
        raise ValueError(f"{name} has {rows} rows, which do not divide into {len(sizes)} matrices of {sizes} rows")
    return sizes


@torch.no_grad()
def newton_schulz(matrices: Tensor, steep_dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal factor U V^T of each matrix U S V^T, [B, R, C] -> float32 [B, R, C].

    Eight steep iterations and two settling ones. A positive factor on a matrix changes nothing; a zero matrix stays
    zero; transposing commutes. Singular values end in [0.999, 1.003] for condition numbers to 1e3. `steep_dtype` is
    that of the eight steep iterations; in bfloat16 the singular values end as close to 1, since the last two are always
    float32, but the factor itself is off by about half a per cent.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return newton_schulz(matrices.mT, steep_dtype).mT
    count, rows, columns = matrices.shape
    size = max(1, CPU_BATCH_NUMBERS // max(1, rows * columns)) if matrices.device.type == "cpu" else max(1, count)
    result = torch.empty(matrices.shape, dtype=torch.float32, device=matrices.device)
    for start in range(0, count, size):
        x = matrices[start : start + size].float()
        # The largest entry first: squares of tiny gradients would underflow in the norm.
        x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        x = _iterate(x.to(steep_dtype), STEEP, STEEP_STEPS).float()
        result[start : start + size] = _iterate(x, SETTLE, SETTLE_STEPS)
    return result


def _iterate(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """`steps` times X <- a X + (b A + c A A) X with A = X X^T, for a batch with no more rows than columns."""
    a, b, c = coefficients
    x = x.contiguous()
    gram = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    polynomial, other = torch.empty_like(gram), torch.empty_like(x)
    for _ in range(steps):
        matmul(x, x.mT, gram)
        matmul(gram, gram, polynomial).mul_(c).add_(gram, alpha=b)
        matmul(polynomial, x, other).add_(x, alpha=a)
        x, other = other, x
    return x


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups whose `algorithm` is "muon", AdamW for those whose `algorithm` is "adamw".

    A muon group also has `blocks` (see `Assignment`) and `momentum`, an adamw group `betas` and `eps`; both have `lr`
    and a decoupled `weight_decay`. Parameters and state are float32; a parameter without a gradient is left alone.
    `state_dict` and `load_state_dict` make the next step bitwise the same.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], steep_dtype: torch.dtype = torch.float32) -> None:
        self.steep_dtype = steep_dtype
        super().__init__(groups, {})
        for group in self.param_groups:
            if group["algorithm"] not in ("muon", "adamw"):
                raise ValueError(f"algorithm={group['algorithm']!r} of a parameter group is not allowed; muon or adamw")
            if any(parameter.dtype != torch.float32 for parameter in group["params"]):
                raise ValueError("MuonAdamW updates float32 parameters only; keep float32 masters and cast at use")
            if group["algorithm"] == "muon" and len(group["blocks"]) != len(group["params"]):
                raise ValueError(f"{len(group['blocks'])} blocks for {len(group['params'])} parameters of a muon group")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._muon(group)
            else:
                self._adamw(group)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        batches: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # wide shape -> (update, weights) views
        for parameter, sizes in zip(group["params"], group["blocks"], strict=True):
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            momentum = self.state[parameter]["momentum"]
            momentum.mul_(group["momentum"]).add_(parameter.grad)
            update = parameter.grad.add(momentum, alpha=group["momentum"])  # Nesterov
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            rows, columns = parameter.shape[-2:]
            updates = update.view(-1, rows, columns).split(list(sizes), dim=1)
            weights = parameter.view(-1, rows, columns).split(list(sizes), dim=1)
            for matrix, weight in zip(updates, weights, strict=True):
                if matrix.shape[1] > columns:
                    matrix, weight = matrix.mT, weight.mT
                batches.setdefault((matrix.shape[1], matrix.shape[2]), []).append((matrix, weight))

        for (_, columns), pairs in batches.items():
            orthogonal = newton_schulz(torch.cat([matrix for matrix, _ in pairs]), self.steep_dtype)
            rate = group["lr"] * UPDATE_RMS * columns**0.5
            for update, (_, weight) in zip(orthogonal.split([len(m) for m, _ in pairs]), pairs, strict=True):
                weight.sub_(update, alpha=rate)

    def _adamw(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros((), dtype=torch.float32),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def build_optimizer(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer `learner.optimizer` asks for, over `assign`'s groups.

    name=muon: `MuonAdamW`, whose steep Newton-Schulz iterations run in bfloat16 on a GPU (the report allows it) and in
    float32 on a CPU. name=adamw: torch's AdamW for all parameters, weight decay on matrices, embedding and head.
    """
    parts = assign(model)
    adamw_options = {"lr": learning_rate, "betas": (config.betas[0], config.betas[1]), "eps": config.eps}
    if config.name == "adamw":
        groups: list[dict[str, Any]] = [
            {"params": parts.muon + parts.decayed, "weight_decay": config.weight_decay},
            {"params": parts.undecayed, "weight_decay": 0.0},
        ]
        # Fused: one pass over the numbers, and no copies of the state on the way.
        return torch.optim.AdamW([group for group in groups if group["params"]], fused=True, **adamw_options)
    groups = [
        {
            "algorithm": "muon",
            "params": parts.muon,
            "blocks": parts.blocks,
            "lr": learning_rate,
            "momentum": config.momentum,
            "weight_decay": config.weight_decay,
        },
        {"algorithm": "adamw", "params": parts.decayed, "weight_decay": config.weight_decay, **adamw_options},
        {"algorithm": "adamw", "params": parts.undecayed, "weight_decay": 0.0, **adamw_options},
    ]
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    return MuonAdamW(
        [group for group in groups if group["params"]], steep_dtype=torch.bfloat16 if on_gpu else torch.float32
    )
