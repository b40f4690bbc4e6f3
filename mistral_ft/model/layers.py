"""How the layers run in training: LoRA in the base's dtype, dropout without stored masks, compiled, recomputed."""

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Share of what a compiled layer would keep for backward that it may keep. On the 24B 0.7 halves it (150 instead of
# 306 KB a token and layer) and costs no time that could be measured; 0.5 saves 5 % more and costs 1.5 %.
ACTIVATION_MEMORY_BUDGET = 0.7


def hashed_dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Dropout whose mask is a function of position and seed, so that it is made again in backward, never stored.

    A compiled graph keeps the mask of torch's own dropout: with 40 layers of the 24B 60 KB a token and layer. The hash
    is the finaliser of MurmurHash3 (Appleby 2011, public domain); its shifts are made logical by the masks.

    Args:
        p: share of the numbers to drop, in [0, 1).
        seed: int32 of shape (), another one for each call.
    """
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + seed
    h = (h ^ ((h >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    h = h ^ ((h >> 16) & 0xFFFF)
    keep = (h & 0x7FFFFFFF) >= int(p * 2**31)
    return torch.where(keep, x / (1 - p), 0)


class LoraLinear(PeftLinear):
    """peft's layer, over plain or 4-bit weights, with fp32 adapter weights that are used in the dtype of its input.

    peft itself turns the layer's input into the adapter's fp32 and leaves it to autocast to turn it back.

    Attributes:
        seed: int32 of shape (), for dropout: a view into one tensor of all layers (see `Seeds`).
    """

    seed: torch.Tensor
    lora_A: Any  # nn.ModuleDict, of linear layers
    lora_B: Any
    lora_dropout: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (name,) = self.active_adapters
        low = x
        p = self.lora_dropout[name].p if self.training and isinstance(self.lora_dropout[name], nn.Dropout) else 0.0
        if p:
            # Run step by step, the hash would make ten large tensors of integers.
            low = hashed_dropout(x, p, self.seed) if torch.compiler.is_compiling() else F.dropout(x, p)
        low = F.linear(low, self.lora_A[name].weight.to(x.dtype)) * self.scaling[name]
        return self.base_layer(x) + F.linear(low, self.lora_B[name].weight.to(x.dtype))


class Seeds:
    """Turns the plain LoRA layers of a model into `LoraLinear` and gives their dropout its seeds."""

    def __init__(self, model: nn.Module):
        # peft's layer for 4-bit weights is another class; it exists where bitsandbytes does.
        plain = ("Linear", "Linear4bit")
        layers: list[Any] = [
            m for m in model.modules() if isinstance(m, LoraLayer) and type(m).__name__ in plain and not m.lora_variant
        ]
        device = next(model.parameters()).device
        # Four to a row, so that each layer's own stands where compiled code expects tensors to start.
        self.seeds = torch.zeros(len(layers), 4, dtype=torch.int32, device=device)
        for layer, row in zip(layers, self.seeds, strict=True):
            layer.__class__ = LoraLinear
            layer.seed = row[0]

    def draw(self) -> None:
        """New seeds, from torch's generator: a run that is resumed draws what it would have drawn."""
        self.seeds.random_(-(2**31), 2**31 - 1)


class EmbeddingNoise:
    """NEFTune (Jain et al. 2023): uniform noise on the embeddings that a model in training reads.

    Its size is alpha / sqrt(tokens of the record * numbers of an embedding). transformers' own takes all records of a
    packed sequence for one, which makes the noise the smaller the more of them there are.

    Args:
        model: whose input embeddings get it; in evaluation they do not.

    Attributes:
        bounds: int (records + 1,): where each record starts, and at last the number of tokens.
    """

    def __init__(self, model: nn.Module, alpha: float):
        self.alpha = alpha
        self.bounds: torch.Tensor | None = None
        embeddings: Any = model.get_input_embeddings
        embeddings().register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        assert self.bounds is not None  # whoever calls the model sets them
        tokens = self.bounds.diff()
        size = self.alpha / (tokens * output.shape[-1]).sqrt().repeat_interleave(tokens, output_size=output.shape[1])
        return output + (torch.rand_like(output, dtype=torch.float32) * 2 - 1).mul(size[:, None]).to(output.dtype)


class LayerRunner:
    """Runs the layers of a model in training as told, without touching their weights.

    Args:
        layers: layers of one class, in order.
        dynamic: whether compiled code takes sequences of any length, or is made anew for each length.

    Attributes:
        compiled: whether torch.compile makes one graph for all layers; inductor then fuses what stands between the
            matrix products, and computes that again in backward instead of keeping it.
        count: how many layers there are.
        recomputed: how many of the layers, the first ones, are computed a second time in backward (activation
            checkpointing); of those only the input is kept.
        offloaded: whether that input is kept in the machine's memory instead of the GPU's.
    """

    def __init__(self, layers: nn.ModuleList, compiled: bool, dynamic: bool = False):
        self.compiled = compiled
        self.count = len(layers)
        self.recomputed = 0
        self.offloaded = False
        self._forward = type(layers[0]).forward
        self._compiled_forward = torch.compile(self._forward, dynamic=dynamic)
        for index, layer in enumerate(layers):
            layer.forward = partial(self._run, index, layer)

    def _run(self, index: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A decoder's cache (see `decoding`) is written into, and every token finds it longer: nothing to compile.
        forward = self._compiled_forward if self.compiled and "cache" not in kwargs else self._forward
        if index >= self.recomputed or not torch.is_grad_enabled():
            return forward(layer, *args, **kwargs)
        with save_on_cpu(pin_memory=True) if self.offloaded else nullcontext():
            return checkpoint(forward, layer, *args, use_reentrant=False, **kwargs)


def set_up_compiler() -> None:
    """Choose how layers are compiled, and where the results are kept for the next run."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "mistral_ft" / "inductor"))
    torch._functorch.config.activation_memory_budget = ACTIVATION_MEMORY_BUDGET
    torch._dynamo.config.recompile_limit = 64  # beyond it, torch would run the layers uncompiled without a word
