"""How a policy's forward computes while it is trained: in which precision, and what of it is kept for the backward.

The idea: weights stay FP32 masters, whatever the precision; a module that multiplies by one casts it at use. So the
optimizer, checkpoints and snapshots never see anything else, and MXFP4 values, which BF16 holds exactly, are rounded
from the masters. All changes give a module a subclass of its own class, so that copies of a model keep them and hooks
that others put on it run around them.

Left out: the losses, which multiply by the head in FP32 whatever is chosen here, and norms, routing, residual mixing
and softmax of a DeepSeek-V4, which widen to FP32 themselves.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.model import DeepseekV4
from opd.model.attention import Attention
from opd.model.block import Block


def multiply_in_bfloat16(model: nn.Module) -> None:
    """Linear layers and embeddings of a DeepSeek-V4 (experts follow their input), and all modules with weights of an hf
    model, compute in bfloat16; gradients reach the FP32 weights in FP32."""
    for module in list(model.modules()):
        owns = any(parameter is not None for parameter in module._parameters.values())
        if owns and (not isinstance(model, DeepseekV4) or isinstance(module, nn.Linear | nn.Embedding)):
            _become(module, _narrow(type(module)))


def recompute_layers(model: nn.Module) -> None:
    """Attention and experts of each layer (a DeepSeek-V4), or each layer (an hf model), keep their input alone and are
    computed again in the backward. Values and gradients are the same."""
    for module in list(model.modules()):
        if isinstance(module, Attention | GradientCheckpointingLayer):
            _become(module, _recomputed(type(module), "forward"))
        elif isinstance(module, Block):
            _become(module, _recomputed(type(module), "apply_experts"))


def seal_reports(model: nn.Module) -> None:
    """What an attention layer says of its indexer comes in a closed box: which rows have it differs between ranks, and
    ZeRO stage 3, which follows every tensor that a module returns, must see the same on all of them."""
    for module in list(model.modules()):
        if isinstance(module, Attention):
            _become(module, _sealed(type(module)))


def _become(module: Any, kind: type[nn.Module]) -> None:
    module.__class__ = kind


@functools.cache
def _narrow(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        held = self._parameters
        self._parameters = {name: _cast(parameter) for name, parameter in held.items()}
        try:
            inputs = [_cast(value) for value in args]
            return kind.forward(self, *inputs, **{name: _cast(value) for name, value in kwargs.items()})
        finally:
            self._parameters = held

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _cast(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


@functools.cache
def _recomputed(kind: type[nn.Module], method: str) -> type[nn.Module]:
    original = getattr(kind, method)

    def again(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(self, *args, **kwargs)
        return checkpoint(functools.partial(original, self), *args, use_reentrant=False, **kwargs)

    return type(kind.__name__, (kind,), {method: again, "__module__": kind.__module__})


@functools.cache
def _sealed(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mixed, report = kind.forward(self, *args, **kwargs)
        return mixed, None if report is None else SimpleNamespace(loss=report.loss, recall=report.recall)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
