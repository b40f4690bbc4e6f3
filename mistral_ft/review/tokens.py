"""What the model sees of a record: the tokens and labels of the one prompt encoder, in stretches for people to read."""

import itertools
import threading
from pathlib import Path

from mistral_ft.data.image_fitter import TEXT_ONLY, ImageFitter
from mistral_ft.data.pages import page_size
from mistral_ft.data.prompt.encoder import PromptEncoder, encode_record
from mistral_ft.data.records import Record, checked, image_blocks
from mistral_ft.errors import UserError
from mistral_ft.files import JsonObject
from mistral_ft.folders import check_tokenizer, find_prompt_folders
from mistral_ft.review.page_files import find_page

MOST_TOKENS = 20_000  # that are shown one by one


class TokenView:
    """The encoder of a model or run; loaded when it is first needed, as that takes seconds.

    Args:
        model: folder or hub id; None if there is none.
    """

    def __init__(self, model: str | None):
        self.model = model
        self._loaded: tuple[PromptEncoder, ImageFitter | None] | None = None
        self._lock = threading.Lock()

    def tokens(self, row: JsonObject, images_dir: Path) -> JsonObject:
        """The tokens of a record.

        Returns:
            `stretches` of tokens of one kind ("control", "text" or "image") and one label state, each with its `texts`
            and `ids`, or for an image its grid, the page's size and the size it is fed at, in pixels; the `count` of
            all tokens, of `image` tokens and of `learned` ones, which have a label.

        Raises:
            ValueError: if the record cannot be encoded, in one line.
        """
        encoder, fitter = self._load()
        record = Record(Path(), 1, checked(row), images_dir)
        names = image_blocks(record.messages)
        if names and not fitter:
            raise ValueError(TEXT_ONLY)
        sizes = [page_size(find_page(images_dir, name), fitter) for name in names]
        grids = [fitter.grid(*size) for size in sizes] if fitter else []
        cell = fitter.cell_size if fitter else 0
        ids, labels = encode_record(encoder, record, grids, with_answer=True)
        control = vars(encoder.control)
        image_ids = {control["image"], control["image_break"], control["image_end"]}

        def kind_of(place: int) -> tuple[str, bool]:
            kind = "image" if ids[place] in image_ids else "control" if ids[place] in control.values() else "text"
            return kind, labels[place] >= 0

        stretches, pages, shown = [], iter(zip(sizes, grids, strict=True)), 0
        for (kind, learned), places in itertools.groupby(range(len(ids)), kind_of):
            part = [ids[place] for place in places]
            if kind != "image":
                shown += len(part)
                part = part[: max(0, len(part) - max(0, shown - MOST_TOKENS))]
                texts = [encoder.tokenizer.id_to_token(i) if kind == "control" else encoder.decode([i]) for i in part]
                stretches.append({"kind": kind, "learned": learned, "texts": texts, "ids": part})
                continue
            # Images that follow each other make one stretch.
            while part:
                size, (rows, columns) = next(pages)
                del part[: rows * (columns + 1)]
                fed = (columns * cell, rows * cell)
                stretches.append({"kind": kind, "learned": learned, "grid": (rows, columns), "size": size, "fed": fed})
        return {
            "model": self.model,
            "stretches": stretches,
            "count": len(ids),
            "image": sum(i in image_ids for i in ids),
            "learned": sum(label >= 0 for label in labels),
            "hidden": max(0, shown - MOST_TOKENS),
        }

    def _load(self) -> tuple[PromptEncoder, ImageFitter | None]:
        if self.model is None:
            raise UserError("start the server with --model and a model's or run's folder to see tokens")
        with self._lock:
            if self._loaded is None:
                run, base = find_prompt_folders(self.model)
                if run != base:
                    check_tokenizer(run)
                self._loaded = PromptEncoder.from_folder(run), ImageFitter.from_folder(base)
        return self._loaded


def find_run(path: Path) -> str | None:
    """The run that a predictions file is named after, if it is there: output/<name>."""
    folder = Path("output") / path.name.removesuffix(".jsonl")
    return str(folder) if (folder / "adapter_config.json").is_file() else None
