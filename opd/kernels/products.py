"""Products of float32 matrices on the CPU whose bits depend on a row's own numbers alone, with their gradients.

The one idea is in `products.cpp`: every sum runs in one fixed order, whatever the shape, so a token has the same hidden
state alone, in a batch, in a chunk of a prefill and in a decoding step, and a rollout that is continued somewhere else
goes on with the same numbers. The V4 report calls for the same of its kernels (3.3, batch invariance).

Left out: other dtypes and devices, for which callers have torch's own products, and packed FP4 weights (`cpu`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from opd.kernels.library import operators


def usable(*tensors: Tensor) -> bool:
    """Whether tensors like these are multiplied here; torch's own products take their place where they are not."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_cpu:
            return False
    return operators() is not None and not torch.is_autocast_enabled("cpu")


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a b for matrices [M, K], [K, N] or stacks of them [G, M, K], [G, K, N]; with `add` out + a b, into `out`.

    Of a and b one of the last two strides should be 1, or they are copied; of `out` the last must be. No gradient.
    """
    if out is None:
        out = a.new_empty(*a.shape[:-1], b.shape[-1])
    if not usable(a, b, out):
        if not add:
            return torch.matmul(a, b, out=out)
        return out.addmm_(a, b) if a.ndim == 2 else out.baddbmm_(a, b)
    ops: Any = operators()
    if a.ndim == 3:
        ops.products(a, b, out, add)
    else:
        ops.products(a[None], b[None], out[None], add)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ops: Any = operators()
        ctx.save_for_backward(x, weight)
        return ops.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, len(weight))
        of_x, of_weight = ctx.needs_input_grad
        grad_x = matmul(grad, weight).view(x.shape) if of_x else None
        return grad_x, matmul(grad.t(), x.reshape(-1, x.shape[-1])) if of_weight else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., K], [N, K], [N] -> [..., N]."""
    if not usable(x, weight):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled():
        product = _Linear.apply(x, weight)
    else:
        ops: Any = operators()
        product = ops.linear(x, weight)
    return product if bias is None else product + bias


class _Linears(torch.autograd.Function):
    """Several products of one input, so that its gradient is summed where it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ops: Any = operators()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        return tuple([ops.linear(x, weight) for weight in weights])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        of_x, *of_weights = ctx.needs_input_grad
        rows, grad_x = x.reshape(-1, x.shape[-1]), None
        grad_weights: list[Tensor | None] = []
        for given, weight, is_asked in zip(grads, weights, of_weights, strict=True):
            grad = None if given is None else given.reshape(-1, len(weight))
            if grad is not None and of_x:
                grad_x = matmul(grad, weight, grad_x, add=grad_x is not None)
            grad_weights.append(matmul(grad.t(), rows) if grad is not None and is_asked else None)
        return None if grad_x is None else grad_x.view(x.shape), *grad_weights


def linears(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each layer makes of x, all of which should be used; layers that are no more than a matrix do it in one
    recorded step, and the weight of what is not used gets no gradient, which hooks are told."""
    plain = [
        layer.weight
        for layer in layers
        if type(layer) is Linear and layer._parameters["bias"] is None and not layer._forward_hooks
    ]
    if len(plain) < len(layers) or not torch.is_grad_enabled() or not usable(x, *plain):
        return [layer(x) for layer in layers]
    return list(_Linears.apply(x, *plain))


class _LinearBySegment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return _by_segment(x, weight.mT, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_weight = None
        if ctx.needs_input_grad[1]:
            ops: Any = operators()
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            ops.products_over_rows(grad, x, ctx.sizes, grad_weight)
        return _by_segment(grad, weight, ctx.sizes) if ctx.needs_input_grad[0] else None, grad_weight, None


def _by_segment(x: Tensor, matrices: Tensor, sizes: tuple[int, ...]) -> Tensor:
    ops: Any = operators()
    out = x.new_empty(len(x), matrices.shape[-1])
    ops.products_by_rows(x, matrices, sizes, out)
    return out


def linear_by_segment(x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """As `opd.model.layers.linear_by_segment`."""
    if torch.is_grad_enabled():
        return _LinearBySegment.apply(x, weight, sizes)
    return _by_segment(x, weight.mT, sizes)


def _grouped(x: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty(len(x), *weight.shape[:2])
    matmul(x.transpose(0, 1), weight.mT, out.transpose(0, 1))
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _grouped(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].transpose(0, 1)
        of_x, of_weight = ctx.needs_input_grad
        grad_x = None
        if of_x:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            matmul(grad, weight, grad_x.transpose(0, 1))
        return grad_x, matmul(grad.mT, x.transpose(0, 1)) if of_weight else None


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Group g of the rows through matrix g: [N, G, K], [G, F, K] -> [N, G, F]."""
    if torch.is_grad_enabled():
        return _GroupedLinear.apply(x, weight)
    return _grouped(x, weight)


class Linear(nn.Linear):
    """torch's layer, by these products where they are usable."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_in(model: nn.Module) -> None:
    """Makes the plain linear layers of any model multiply by these products."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
