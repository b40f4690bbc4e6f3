"""What the model sees of a record: the tokens and labels of the one prompt encoder, in stretches for people to read."""

import threading
from collections import Counter
from pathlib import Path

from mistral_ft.data.pages import page_size
from mistral_ft.data.processor import Processor
from mistral_ft.data.prompt.encoder import IGNORE_INDEX, encode_record
from mistral_ft.data.prompt.token_view import stretches, token_texts
from mistral_ft.data.records import Record, checked, image_blocks
from mistral_ft.errors import UserError
from mistral_ft.files import JsonObject
from mistral_ft.review.page_files import find_page

MOST_TOKENS = 20_000  # that are shown one by one


class TokenView:
    """The encoder of a model or run; loaded when it is first needed, as that takes seconds.

    Args:
        model: folder or hub id; None if there is none.
    """

    def __init__(self, model: str | None):
        self.model = model
        self._loaded: Processor | None = None
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
        processor = self._load()
        encoder, fitter = processor.encoder, processor.fitter
        record = Record(Path(), 1, checked(row), images_dir)
        pages = [find_page(images_dir, name) for name in image_blocks(record.messages)]
        grids = processor.grids(pages)
        ids, labels = encode_record(encoder, record, grids, with_answer=True)
        images, count = iter(zip(pages, grids, strict=True)), Counter[str]()
        shown: list[JsonObject] = []
        for kind, learned, part in stretches(encoder, ids, labels):
            before = count["control"] + count["text"]
            count[kind] += len(part)
            if kind != "image":
                part = part[: max(0, MOST_TOKENS - before)]
                texts = token_texts(encoder, kind, part)
                shown.append({"kind": kind, "learned": learned, "texts": texts, "ids": part})
                continue
            assert fitter is not None  # the model has grids
            while part:  # images that follow each other make one stretch
                page, (rows, columns) = next(images)
                del part[: rows * (columns + 1)]
                fed = (columns * fitter.cell_size, rows * fitter.cell_size)
                size = page_size(page, fitter)
                shown.append({"kind": kind, "learned": learned, "grid": (rows, columns), "size": size, "fed": fed})
        return {
            "model": self.model,
            "stretches": shown,
            "count": len(ids),
            "image": count["image"],
            "learned": len(labels) - labels.count(IGNORE_INDEX),
            "hidden": max(0, count["control"] + count["text"] - MOST_TOKENS),
        }

    def _load(self) -> Processor:
        if self.model is None:
            raise UserError("start the server with --model and a model's or run's folder to see tokens")
        with self._lock:
            if self._loaded is None:
                self._loaded = Processor.from_model(self.model)
        return self._loaded


def find_run(path: Path) -> str | None:
    """The run that a predictions file is named after, if it is there: output/<name>."""
    folder = Path("output") / path.name.removesuffix(".jsonl")
    return str(folder) if (folder / "adapter_config.json").is_file() else None
