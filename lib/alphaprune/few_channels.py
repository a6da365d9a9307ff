"""BatchNorm of few channels on a CPU, in training, as fast as of many.

torch's kernel goes through the channels of a place in whole registers and takes the rest one by one; of 5 channels that is all. Where
channels lie last, k neighbouring places are k C columns of a matrix, as they are in memory, and registers are filled again:

    (N, C, H, W), channels last  =  (N H W, C)  =  (N H W / k, k C)

    mean = 1/k sum_j mean_j,   var = 1/k sum_j (var_j + (mean_j - mean)^2)        over the k columns j of a channel
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

REGISTER = 16  # numbers of float32 in the widest registers of a CPU
COLUMNS = 64  # at least: of fewer, the kernel's loop around them shows
SIZE = 1 << 18  # N C H W: of fewer, the operations around the kernels take about as long as is saved

_statistics = torch.ops.aten.batch_norm_update_stats
_normalise = torch.ops.aten.native_batch_norm
_reduced = torch.ops.aten.native_batch_norm_backward


def batch_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer gives for x, up to rounding; its running statistics go on as it would have them.

    It has gradients of any order, backwards; forward-mode differentiation it has not.

    Args:
        layer: any module; anything but a plain `nn.BatchNorm2d` in training is called as it is.
        x: (N, C, H, W).
    """
    k = _places_in_a_row(layer, x)
    if k == 1:
        return layer(x)
    y, mean, var = _BatchNorm.apply(x, layer.weight, layer.bias, layer.eps, k)
    rows = x.numel() // x.shape[1]
    layer.num_batches_tracked.add_(1)
    layer.running_mean.lerp_(mean, layer.momentum)
    layer.running_var.lerp_(var * (rows / (rows - 1)), layer.momentum)
    return y


def _places_in_a_row(layer: nn.Module, x: Tensor) -> int:
    """k; 1 where torch's own way is at least as fast, or the only one."""
    if type(layer) is not nn.BatchNorm2d or not layer.training or torch.compiler.is_compiling():
        return 1
    held = (layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.num_batches_tracked)
    if any(t is None for t in held) or not layer.momentum or _is_changed(layer):
        return 1
    if x.dim() != 4 or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return 1
    channels, rows = x.shape[1], x.numel() // max(x.shape[1], 1)
    if x.dtype != layer.weight.dtype or channels != layer.num_features or channels % (REGISTER // 2) == 0:
        return 1
    if x.numel() < SIZE or not x.is_contiguous(memory_format=torch.channels_last):
        return 1
    k = 1
    while k * channels < COLUMNS or k * channels % REGISTER:
        k *= 2
    return k if rows % k == 0 else 1


def _is_changed(layer: nn.Module) -> bool:
    """Whether calling it does more than its class does: hooks, a forward() put in its place."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or _has_any_global_hook() or "forward" in vars(layer)


class _BatchNorm(torch.autograd.Function):
    """(y, mean, var) of x, weight, bias, eps and k; mean and var, (C,), carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        means, variances = (s.view(k, -1) for s in _statistics(_in_rows(x, k), None, None, 0.0))
        mean = means.mean(0)
        var = (variances + (means - mean).square_()).mean(0)
        given = (t.repeat(k) for t in (weight, bias, mean, var))
        y = _normalise(_in_rows(x, k), *given, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.k = eps, k
        ctx.mark_non_differentiable(mean, var)
        return _as_images(y, x), mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """dx = w / sd (dy - mean(dy) - xn mean(dy xn)),  xn = (x - mean) / sd;  dw = sum(dy xn),  db = sum(dy)."""
        x, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient of this gradient is asked for: torch has it
            given, asked = (
                (mean, (var + ctx.eps).rsqrt(), True, ctx.eps),
                [ctx.needs_input_grad[0], True, True],
            )
            return *_reduced(dy, x, weight, None, None, *given, asked), None, None
        k, rows = ctx.k, x.numel() // x.shape[1]
        x_in_rows, dy_in_rows = _in_rows(x, k), _in_rows(dy.contiguous(memory_format=torch.channels_last), k)
        given = (t.repeat(k) for t in (weight, mean, var))
        _, dw, db = _reduced(dy_in_rows, x_in_rows, *given, None, None, False, ctx.eps, [False, True, True])
        dw, db = (s.view(k, -1).sum(0) for s in (dw, db))
        if not ctx.needs_input_grad[0]:
            return None, dw, db, None, None
        over_sd = (var + ctx.eps).rsqrt_()
        of_dy = weight * over_sd
        of_x = -of_dy * over_sd * dw / rows
        rest = -of_dy * db / rows - of_x * mean
        dx = torch.addcmul(_column(rest, k), x_in_rows, _column(of_x, k))
        dx.addcmul_(dy_in_rows, _column(of_dy, k))
        return _as_images(dx, x), dw, db, None, None


def _in_rows(x: Tensor, k: int) -> Tensor:
    """(N, C, H, W) -> (1, k C, N H W / k, 1), the same memory."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(1, n * h * w // k, 1, k * c).permute(0, 3, 1, 2)


def _as_images(rows: Tensor, like: Tensor) -> Tensor:
    n, c, h, w = like.shape
    return rows.permute(0, 2, 3, 1).reshape(n, h, w, c).permute(0, 3, 1, 2)


def _column(values: Tensor, k: int) -> Tensor:
    """(C,) -> (1, k C, 1, 1)."""
    return values.repeat(k).view(1, -1, 1, 1)
