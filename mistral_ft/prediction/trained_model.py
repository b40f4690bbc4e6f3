"""A base, a base with its adapter, or a merged model: where its parts are, and how it is loaded."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mistral_ft.data.processor import Processor
from mistral_ft.errors import UserError
from mistral_ft.files import read_settings, sha256_file
from mistral_ft.folders import check_tokenizer, find_model_folder, find_run_folder
from mistral_ft.model.adapter import Adapter
from mistral_ft.model.layers import Seeds
from mistral_ft.model.loading import check_model_folder, load_base
from mistral_ft.model.rounding import FOUR_BITS, FP8, is_four_bit


@dataclass(frozen=True)
class ModelFolders:
    """Where a model's parts are.

    Attributes:
        base: hub id or folder of the base or merged model.
        folder: its folder; of a hub id's files, the weights may still be missing there.
        adapter: the adapter on top of it, or None.
        rounding: what the text layers' weights are rounded to. The adapter then stays beside them: merged into such
            weights it would be rounded away.
    """

    base: str
    folder: Path
    adapter: Adapter | None = None
    rounding: str | None = None

    @classmethod
    def find(cls, model: str, four_bit: bool | None = None, base_dtype: str | None = None) -> "ModelFolders":
        """An adapter folder and the base it names, or a model folder or hub id by itself.

        Args:
            four_bit: whether to keep the weights in 4 bits.
            base_dtype: "fp8" keeps them in FP8, "bf16" does neither. Where nothing is said against it, the weights are
                those that the adapter was trained on.

        Raises:
            UserError: if the folder is neither, or the adapter's tokenizer is not the one it was trained with.
        """
        if not Adapter.is_one(model):
            if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
                raise UserError(f"{model}: holds neither adapter_config.json nor config.json; did its training finish?")
            return cls._with_weights(model, find_model_folder(model, weights=False), None, four_bit, base_dtype)
        adapter = Adapter(model)
        run = find_run_folder(model)
        check_tokenizer(run)
        return cls._with_weights(adapter.base_model, adapter.find_base(weights=False), adapter, four_bit, base_dtype)

    @classmethod
    def _with_weights(
        cls, base: str, folder: Path, adapter: Adapter | None, four_bit: bool | None, base_dtype: str | None
    ) -> "ModelFolders":
        is_copy = is_four_bit(check_model_folder(folder))
        if is_copy and (four_bit is False or base_dtype):
            flag = f"--base_dtype {base_dtype}" if base_dtype else "--no-load_in_4bit"
            raise UserError(f"{flag}: {folder} holds 4-bit weights only; name the bf16 model they are from")
        if is_copy or four_bit:
            return cls(base, folder, adapter, FOUR_BITS)
        if base_dtype is not None:
            return cls(base, folder, adapter, FP8 if base_dtype == "fp8" else None)
        trained = adapter.rounding if adapter else None
        return cls(base, folder, adapter, None if four_bit is False and trained == FOUR_BITS else trained)

    def load_processor(self) -> Processor:
        """The model's, with the run's own tokenizer where there is an adapter."""
        return Processor.from_folder(self.folder, find_run_folder(self.adapter.folder) if self.adapter else None)

    def load(self, device: torch.device) -> Any:
        """The model with the adapter, ready to generate: merged into it, or beside rounded weights."""
        folder = find_model_folder(self.base)
        model = load_base(folder, device, rounding=self.rounding)
        if self.adapter and self.rounding:
            wrapped: Any = self.adapter.put_on(model)
            Seeds(wrapped)  # runs the adapter in the base's dtype, as in training
            model = wrapped.get_base_model()
        elif self.adapter:
            config = read_settings(folder / "config.json")
            dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "bfloat16")
            self.adapter.merge_into(model, dtype)
        return model.eval()

    def fingerprint(self) -> str:
        """A hash that changes with the weights. Of the base's shards it reads name, size and time, not 48 GB."""
        # A hub id's folder is named by its commit; its shards may not be there yet.
        parts: list[Any] = [self.folder.name]
        if Path(self.base).is_dir():
            shards = sorted(self.folder.glob("*.safetensors"))
            parts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
        parts.append(sha256_file(self.folder / "config.json"))
        if self.adapter:
            parts += [sha256_file(path) for path in sorted(self.adapter.folder.glob("adapter_*"))]
        parts += [self.rounding] if self.rounding else []
        return hashlib.sha256(json.dumps([str(self.base), parts]).encode()).hexdigest()
