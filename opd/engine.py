"""The DeepSpeed engine of one rank, made to behave the same under every ZeRO stage. The only file that imports
deepspeed, and it does so when an Engine is built.

The idea: gradients are summed over ranks and divided by nothing; the learning rate and the clipping are the learner's;
and state is addressed by parameter name and place in the parameter, never by the layout it happens to have. So a
checkpoint of any stage and number of ranks is one of every other.

    stage  weights  gradients  optimizer state
    0      whole    whole      whole
    1      whole    whole      divided          AdamW: DeepSpeed's slices; Muon: `opd.shards`, whole matrices
    2      whole    divided    divided          the same
    3      divided  divided    divided          AdamW only

Left out: the order of micro-batches and the numbers that are kept of them (`opd.learner`), files (`opd.state`).
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd.compute import seal_reports
from opd.config import ConfigError, LearnerConfig
from opd.model.attention import Attention
from opd.model.hyper_connection import HyperConnection
from opd.model.moe import MoE
from opd.model.mtp import MtpBlock
from opd.muon import MuonAdamW, build_optimizer
from opd.objective import Objective, Outcome, Work
from opd.shards import Shards
from opd.weights import named_weights

# Under stage 3 these are gathered and released as one, because what of them runs depends on the rows: ranks would ask
# for each other's weights in different orders.
GATHERED_WHOLE = (Attention, MoE, MtpBlock)
ADAMW_STATE, MUON_STATE = ("exp_avg", "exp_avg_sq"), ("momentum",)


@dataclass(slots=True, kw_only=True, frozen=True)
class Stretch:
    """Where this rank holds optimizer state: `numel` numbers of a parameter from `start`, at `offset` of what the
    optimizer calls a parameter (the parameter itself, a piece of it, or a slice of many)."""

    name: str
    start: int
    numel: int
    holder: Tensor
    offset: int
    keys: tuple[str, ...]  # of the state


@dataclass(slots=True, kw_only=True, frozen=True)
class Fragment:
    """Optimizer state of `numel` numbers of parameter `name` from `start`: value float32 [numel]."""

    name: str
    key: str
    start: int
    value: Tensor


@contextlib.contextmanager
def loading_divided(device: str) -> Iterator[None]:
    """Inside, what transformers loads is divided among the ranks tensor by tensor (ZeRO stage 3), so that no rank holds
    a whole model at any time."""
    prepare_deepspeed(device)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    switch = HfDeepSpeedConfig(config)  # transformers looks whether this object lives
    try:
        yield
    finally:
        del switch


def prepare_deepspeed(device: str) -> None:
    """What must be said before deepspeed is used for the first time."""
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault("LOCAL_RANK", "0")  # each rank sees its own devices only
    import deepspeed.ops

    # DeepSpeed calls torch.distributed by names that torch is about to change; each call would say so.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # A compiled all-reduce within one host; gloo does the same work without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """Every method is called on all ranks, in the same order."""

    def __init__(self, objective: Objective, learner: LearnerConfig, learning_rate: float, device: str) -> None:
        self.objective, self.learner, self.device = objective, learner, device
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.num_updates = 0  # steps that changed the weights
        self._names = {id(parameter): name for name, parameter in objective.model.named_parameters()}
        optimizer = build_optimizer(objective.model, learner.optimizer, learning_rate)
        self._shards: Shards | None = None
        self._stage = learner.zero_stage  # that DeepSpeed sees
        if isinstance(optimizer, MuonAdamW) and learner.zero_stage > 0:
            self._shards = Shards(
                objective.model, optimizer, self.rank, self.num_ranks, divides_gradients=learner.zero_stage == 2
            )
            optimizer, self._stage = self._shards.optimizer, 0
        self._optimizer = optimizer
        self._engine = self._start()

    @property
    def divides_weights(self) -> bool:
        return self._stage == 3

    def _start(self) -> Any:
        """The DeepSpeed engine (its type is not imported here)."""
        prepare_deepspeed(self.device)
        import deepspeed
        from deepspeed.runtime.zero import utils as zero_utils
        from deepspeed.utils import set_z3_leaf_modules

        zero: dict[str, Any] = {"stage": self._stage}
        if self.divides_weights:
            seal_reports(self.objective.model)
            modules = list(self.objective.model.modules())
            zero_utils.warned = True  # of results that are no tensors, which are meant here
            # Mixing of the residual streams happens outside of these modules' forward, so their weights stay whole.
            always = [m.fn.numel() for m in modules if isinstance(m, HyperConnection)]
            zero["stage3_param_persistence_threshold"] = max(always, default=0)
            if whole := {type(module) for module in modules if isinstance(module, GATHERED_WHOLE)}:
                set_z3_leaf_modules(self.objective, list(whole))
        if self.learner.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device == "cuda"}
        config = {
            "train_micro_batch_size_per_gpu": 1,  # counted by no one: see `Plan.num_loss_tokens`
            "gradient_accumulation_steps": 1,  # the boundary is set by hand, so nothing is divided by this
            "gradient_allreduce_op": "mean" if self.divides_weights else "sum",  # stage 3 knows the mean only
            "gradient_clipping": self.learner.grad_clip if self._stage > 0 else 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also where state is offloaded
            "steps_per_print": None,
        }
        engine, *_ = deepspeed.initialize(model=self.objective, optimizer=self._optimizer, config=config)
        if self._shards is not None and self._shards.divides_gradients:
            engine.enable_backward_allreduce = False  # each gradient goes to its owner alone
        return engine

    def forward(self, work: Work | None, *, is_last: bool) -> tuple[Tensor, Outcome | None]:
        """The loss of a micro-batch; `is_last` says that the next backward ends the step's gradient."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        return self._engine(work)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.num_ranks if self.divides_weights else loss)
        if self._shards is not None:
            self._shards.finish_backward()

    def update(self, learning_rate: float) -> float:
        """Clips the gradient to `grad_clip`, steps the optimizer and forgets the gradient; returns the norm of the
        whole step's gradient before clipping. If that is not finite, weights and optimizer state stay as they are."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self._stage > 0:
            self._engine.step()  # ZeRO clips, and leaves everything alone when the norm is not finite
            norm = float(self._engine.get_global_grad_norm())
        else:
            norm = self._update_whole()
        self.num_updates += math.isfinite(norm)
        return norm

    def _update_whole(self) -> float:
        shards = self._shards
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        if shards is not None:
            gradients = shards.gradients()
        norm = torch.nn.utils.get_total_norm(gradients)
        if shards is not None and shards.divides_gradients and self.num_ranks > 1:
            square = norm.double().square().to(self.device)
            dist.all_reduce(square)
            norm = square.sqrt().float()
        if not math.isfinite(norm.item()):
            self._engine.zero_grad()
            if shards is not None:
                shards.drop_gradients()
            return norm.item()
        # Before the optimizer, not inside it: Muon's update has a norm of its own.
        if self.learner.grad_clip > 0:
            scale = min(1.0, self.learner.grad_clip / (norm.item() + 1e-6))
            for gradient in gradients:
                gradient.mul_(scale)
        if shards is not None:
            shards.attach()
        self._engine.step()
        if shards is not None:
            shards.spread()
        return norm.item()

    def weights(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name: the model's own tensors, or, under stage 3, copies in host memory
        on rank 0 and nothing on the other ranks."""
        if not self.divides_weights:
            return named_weights(self.objective.model)
        import deepspeed

        weights: dict[str, Tensor] = {}
        parameters = self._parameters()
        for name, held in named_weights(self.objective.model).items():
            gathered = [parameters[name]] if name in parameters else []
            with deepspeed.zero.GatheredParameters(gathered, enabled=bool(gathered)):
                if self.rank == 0:
                    weights[name] = (parameters[name].detach() if gathered else held).to("cpu", copy=True)
        return weights if self.rank == 0 else {}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor], names: Collection[str] | None = None) -> None:
        """Writes parameters and persistent buffers: those of `names`, or all. All ranks give the same. Raises
        ConfigError, before the first is written, for a name or shape that the model has otherwise."""
        import deepspeed

        held, parameters = named_weights(self.objective.model), self._parameters()
        if names is not None:
            held = {name: weight for name, weight in held.items() if name in names}
        shapes = {name: tuple(getattr(parameters.get(name), "ds_shape", held[name].shape)) for name in held}
        for name in shapes.keys() | weights.keys():
            if name not in weights or name not in shapes or tuple(weights[name].shape) != shapes[name]:
                saved = list(weights[name].shape) if name in weights else "nothing"
                raise ConfigError(f"the checkpoint has {saved} for {name}, the model {list(shapes.get(name, ()))}")
        for name in held:
            if self.divides_weights and name in parameters:
                with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                    if self.rank == 0:
                        parameters[name].copy_(weights[name])
            else:
                held[name].copy_(weights[name])
        if self._stage > 0:
            self._engine.optimizer.refresh_fp32_params()

    def state(self) -> list[Fragment]:
        """Copies in host memory of the optimizer state that this rank is to save: of all ranks together, each number
        once."""
        if self._stage == 0 and self._shards is None and self.rank > 0:
            return []  # rank 0 has the same
        fragments = []
        for stretch in self._stretches():
            for key in stretch.keys:
                if (values := self._optimizer.state[stretch.holder].get(key)) is not None:
                    value = values.view(-1)[stretch.offset : stretch.offset + stretch.numel]
                    fragments.append(
                        Fragment(name=stretch.name, key=key, start=stretch.start, value=value.to("cpu", copy=True))
                    )
        return fragments

    def load_state(self, read: Callable[[str, str, int, int], Tensor], num_updates: int) -> None:
        """Takes up saved state; `read(name, key, start, end)` gives numbers of it, float32 [end - start]."""
        self.num_updates = num_updates
        self._optimizer.state.clear()
        if num_updates == 0:
            return
        for stretch in self._stretches():
            state = self._optimizer.state[stretch.holder]
            if stretch.keys == ADAMW_STATE:
                state["step"] = torch.tensor(float(num_updates))
            for key in stretch.keys:
                if key not in state:
                    state[key] = torch.zeros_like(stretch.holder, requires_grad=False)
                place = state[key].view(-1)[stretch.offset : stretch.offset + stretch.numel]
                place.copy_(read(stretch.name, key, stretch.start, stretch.start + stretch.numel))

    def close(self) -> None:
        """Lets go of the engine's memory."""
        self._engine.destroy()

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.objective.model.named_parameters())

    def _stretches(self) -> Iterator[Stretch]:
        """All state of this rank. DeepSpeed's own maps are read here, and nowhere else."""
        zero = self._engine.optimizer
        if self._shards is not None:
            for piece, view in self._shards.views.items():
                name = self._names[id(self._shards.parameter(piece))]
                keys = MUON_STATE if piece.blocks else ADAMW_STATE
                yield Stretch(name=name, start=piece.start, numel=piece.numel, holder=view, offset=0, keys=keys)
        elif self._stage == 0:
            for group in self._optimizer.param_groups:
                keys = MUON_STATE if group.get("algorithm") == "muon" else ADAMW_STATE
                for p in group["params"]:
                    name = self._names[id(p)]
                    yield Stretch(name=name, start=0, numel=p.numel(), holder=p, offset=0, keys=keys)
        elif self._stage < 3:
            for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                for p in group:
                    if (link := p._hp_mapping) is not None:
                        yield Stretch(
                            name=self._names[id(p)],
                            start=link.lp_fragment_address.start,
                            numel=link.lp_fragment_address.numel,
                            holder=flat,
                            offset=link.hp_fragment_address.start,
                            keys=ADAMW_STATE,
                        )
        else:
            for group in zero.fp16_groups:
                for p in group:
                    index, offset, size = zero.grad_position[zero.get_param_id(p)]
                    start = min(self.rank * size, p.ds_numel)
                    yield Stretch(
                        name=self._names[id(p)],
                        start=start,
                        numel=min(size, p.ds_numel - start),
                        holder=zero.fp32_partitioned_groups_flat[index],
                        offset=offset,
                        keys=ADAMW_STATE,
                    )
