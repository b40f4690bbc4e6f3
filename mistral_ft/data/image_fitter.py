"""Images: the one way to turn a page into the numbers the model was trained on (`pages.py` opens it).

The fit and the numbers are those of transformers' Pixtral image processor, without torchvision: a page is shrunk to
fit into `longest_edge`, then stretched to whole cells of `cell_size` pixels (patch size 14 x merge size 2), so that one
cell is one image token.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mistral_ft.errors import UserError
from mistral_ft.files import read_settings

TEXT_ONLY = "shows an image, but the model reads text only; leave it out, or take a model with a vision tower"


@dataclass(frozen=True)
class ImageFitter:
    """Turns pages into pixel arrays.

    Attributes:
        patch_size: pixels along the edge of one patch of the vision tower.
        cell_size: pixels along the edge of one image token.
        longest_edge: pixels that the longer side of a page may have.
        mean, std: per channel (red, green, blue), of values in 0..1.
        resample: the PIL resampling filter.
    """

    patch_size: int
    cell_size: int
    longest_edge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "ImageFitter | None":
        """Read preprocessor_config.json and config.json of a model folder; None if the model has no vision tower.

        Raises:
            UserError: if one is missing, or asks for something other than resize, rescale by 1/255 and normalise.
        """
        folder = Path(folder)
        config = read_settings(folder / "config.json")
        if "vision_config" not in config:
            return None
        settings = read_settings(folder / "preprocessor_config.json")
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if settings.get(name, True) is not True:
                raise UserError(f"{folder / 'preprocessor_config.json'}: {name} is off, which is not supported")
        if not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255):
            raise UserError(f"{folder / 'preprocessor_config.json'}: rescale_factor is not 1/255, not supported")
        try:
            fitter = cls(
                patch_size=config["vision_config"]["patch_size"],
                cell_size=config["vision_config"]["patch_size"] * config.get("spatial_merge_size", 1),
                longest_edge=settings["size"]["longest_edge"],
                mean=tuple(map(float, settings["image_mean"])),
                std=tuple(map(float, settings["image_std"])),
                resample=Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC)),
            )
            good = len(fitter.mean) == 3 == len(fitter.std) and min(*fitter.std, fitter.cell_size) > 0
            if not good or fitter.longest_edge < fitter.cell_size:
                raise ValueError("values out of range")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'preprocessor_config.json'}: broken: {error!r}") from None
        return fitter

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The (rows, columns) of image tokens of a page of `width` x `height` pixels.

        Raises:
            ValueError: if the page is so thin that nothing is left of its short side.
        """
        ratio = max(width / self.longest_edge, height / self.longest_edge)
        if ratio > 1:
            width, height = math.floor(width / ratio), math.floor(height / ratio)
        if not width or not height:
            raise ValueError(f"the image is too thin: fitted into {self.longest_edge} px it has no pixel left")
        return math.ceil(height / self.cell_size), math.ceil(width / self.cell_size)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The page as float32 of shape (3, rows * cell_size, columns * cell_size), normalised."""
        rows, columns = self.grid(*image.size)
        resized = image.resize((columns * self.cell_size, rows * self.cell_size), self.resample)
        # (x / 255 - mean) / std as one multiplication and one addition.
        scale = (1 / (255 * np.asarray(self.std))).astype(np.float32)
        offset = (-np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32)
        return np.ascontiguousarray((np.asarray(resized, np.float32) * scale + offset).transpose(2, 0, 1))


def to_patches(pixels: np.ndarray, patch_size: int, cell_size: int) -> np.ndarray:
    """Pixels of shape (3, height, width) to patches of shape (patches, 3 * patch_size**2).

    Cell by cell, row by row, and within a cell row by row: the patches that make one image token stand together.
    """
    merge = cell_size // patch_size
    _, height, width = pixels.shape
    cut = pixels.reshape(3, height // cell_size, merge, patch_size, width // cell_size, merge, patch_size)
    return np.ascontiguousarray(cut.transpose(1, 4, 2, 5, 0, 3, 6)).reshape(-1, 3 * patch_size**2)
