"""A vision path that costs what the pages cost."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3Model

# Patches that go through the vision tower at once: about three full pages. More make it no faster and cost memory.
MAX_TOWER_PATCHES = 32768


class PageEncoder:
    """Mix-in for models with a Pixtral vision tower: images never see each other in it.

    transformers joins all images of a batch into one sequence under a dense block mask: time and memory grow with the
    square of all patches together. Here they form one sequence whose attention knows where each begins. Only the last
    layer's output is kept, and parts that do not learn keep no graph.
    """

    config: Any
    vision_tower: Any
    multi_modal_projector: Any

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: Any, vision_feature_layer: Any = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: float of shape (patches, 3 * patch_size**2): the patches of all images as `images.to_patches`
                orders them.
            image_sizes: each image's (height, width) in pixels, as numbers or as an int tensor of shape (images, 2).

        Returns:
            An output whose `pooler_output` is a list of tensors of shape (tokens of the image, hidden size).
        """
        assert self.config.vision_feature_layer == -1, "load_base refuses other layers"
        patch, merge = self.vision_tower.patch_size, merge_size(self.config)
        grids = [(height // patch, width // patch) for height, width in torch.as_tensor(image_sizes).tolist()]
        features: list[torch.Tensor] = []
        start = 0
        for some in _in_groups(grids, MAX_TOWER_PATCHES):
            count = sum(rows * columns for rows, columns in some)
            encoded = self._encode_patches(pixel_values[start : start + count], some)
            features += encoded.split([rows * columns // merge**2 for rows, columns in some])
            start += count
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]  # as transformers' own does

    def _encode_patches(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """The patches of images of some (rows, columns) to features of shape (tokens, hidden size)."""
        merge, projector = merge_size(self.config), self.multi_modal_projector
        with _grad_if_trained(self.vision_tower):
            hidden = self._run_tower(pixel_values, grids)
        with _grad_if_trained(self.vision_tower, projector):
            if hasattr(projector, "patch_merger"):  # Pixtral-12B has none
                # The projector without its PatchMerger, which sorts patches into cells one image at a time.
                cells = projector.norm(hidden).unflatten(0, (-1, merge**2)).transpose(1, 2).flatten(1)
                hidden = projector.patch_merger.merging_layer(cells)
            return projector.linear_2(projector.act(projector.linear_1(hidden)))

    def _run_tower(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """PixtralVisionModel.forward on patches that are cut out already: (patches, hidden size)."""
        tower = self.vision_tower
        weight = tower.patch_conv.weight  # a convolution whose stride is its kernel: one product per patch
        hidden = tower.ln_pre(F.linear(pixel_values.to(weight.dtype), weight.flatten(1)))[None]
        positions = torch.cat([patch_positions(*grid, merge_size(self.config)) for grid in grids])
        bounds = [0, *accumulate(rows * columns for rows, columns in grids)]
        rotary = tower.patch_positional_embedding(hidden, positions.to(hidden.device))
        packed = {
            "cu_seq_lens": torch.tensor(bounds, dtype=torch.int32, device=hidden.device),
            "max_length": max(rows * columns for rows, columns in grids),
        }
        for layer in tower.transformer.layers:
            hidden = layer(hidden, None, position_embeddings=rotary, **packed)
        return hidden[0]


class PageMistral3Model(PageEncoder, Mistral3Model):
    """Small 3.1 and 3.2, Magistral and Devstral with vision, Ministral 3."""


class PageLlavaModel(PageEncoder, LlavaModel):
    """Pixtral-12B."""


def merge_size(config: Any) -> int:
    """Patches along the edge of an image token's cell."""
    return getattr(config, "spatial_merge_size", 1)


@lru_cache(maxsize=256)
def patch_positions(rows: int, columns: int, merge: int) -> torch.Tensor:
    """(row, column) of an image's patches in the order of `images.to_patches`: int64 of shape (rows * columns, 2)."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(rows, columns, 2)
    return grid.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2).reshape(-1, 2)


def _in_groups(grids: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Images in their order, as many at once as have `most` patches together, but always one."""
    some: list[tuple[int, int]] = []
    for rows, columns in grids:
        if some and sum(r * c for r, c in some) + rows * columns > most:
            yield some
            some = []
        some.append((rows, columns))
    yield some


def _grad_if_trained(*modules: nn.Module) -> torch.set_grad_enabled:
    trained = any(parameter.requires_grad for module in modules for parameter in module.parameters())
    return torch.set_grad_enabled(trained and torch.is_grad_enabled())
