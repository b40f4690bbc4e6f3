"""Frozen linear layers in FP8: half the bytes of bf16, and products at twice the rate, on GPUs that have them."""

from typing import Any

import torch
from torch import nn

from mistral_ft.errors import UserError

E4M3 = torch.float8_e4m3fn
# Products of FP8 take matrices whose edges are multiples of this.
EDGE = 16


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to FP8 (e4m3: 4 bits of exponent, 3 of mantissa), each row scaled so that its largest number fits.

    Args:
        x: float of shape (rows, n).

    Returns:
        The numbers, FP8 of shape (rows, n), and what to multiply them with, fp32 of shape (rows, 1).
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(E4M3).max
    return (x / scale).to(E4M3), scale


class _Product(torch.autograd.Function):
    """x @ weight.T with both rounded to FP8 row by row; so is, in backward, the gradient.

    Sums are made by the tensor cores as they do it fastest, with a few bits less than fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        rows = x.flatten(0, -2)
        return _multiply(*round_rows(rows), weight.t(), scale.t(), x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        # The sum is now over the weight's rows: their scales cannot be drawn out of it, so the gradient takes them.
        rows = gradient.flatten(0, -2) * scale.t().to(gradient.dtype)
        columns = weight.t().contiguous().t()  # the kernels want each column of the second factor in one piece
        ones = scale.new_ones(1, weight.shape[1])
        product = _multiply(*round_rows(rows), columns, ones, gradient.dtype)
        return product.unflatten(0, gradient.shape[:-1]), None, None


def _multiply(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    if not a.is_cuda:  # torch 2.11 has the product there with one scale for all rows only
        return (a.float() * a_scale @ (b.float() * b_scale)).to(dtype)
    # torch.nn.functional.scaled_mm is the same, but torch 2.11 does not compile it.
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=dtype, use_fast_accum=True)


class FP8Linear(nn.Linear):
    """A frozen linear layer without bias whose weight is kept in FP8.

    Attributes:
        weight: uint8 of shape (out features, in features): the bits of FP8 numbers. As such peft takes them for what
            they are, quantised, and does not make the adapter's matrices of the same kind.
        scale: fp32 of shape (out features, 1).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self.weight.view(E4M3), self.scale)


def round_layers(layers: nn.ModuleList, device: torch.device) -> None:
    """Move layers to the device, one after the other, the weights of their linear layers rounded to FP8 on it.

    Raises:
        UserError: if one has a bias, or a shape that the GPUs' products do not take.
    """
    for layer in layers:
        layer.to(device)
        for name, linear in layer.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            if linear.bias is not None or linear.in_features % EDGE or linear.out_features % EDGE:
                raise UserError(f"--base_dtype fp8: {name} has a bias, or a shape that is no multiple of {EDGE}")
            weight, scale = round_rows(linear.weight.detach())
            linear.__class__ = FP8Linear
            linear.weight = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
            linear.register_buffer("scale", scale, persistent=False)
