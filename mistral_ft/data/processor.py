"""What a model is fed: the encoder of its prompts, and the fitter of its pages."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_ft.data.image_fitter import TEXT_ONLY, ImageFitter
from mistral_ft.data.pages import page_size
from mistral_ft.data.prompt.encoder import PromptEncoder
from mistral_ft.data.records import Record
from mistral_ft.folders import check_tokenizer, find_prompt_folders


@dataclass(frozen=True)
class Processor:
    """The encoder and the fitter of one model: where one goes, the other does.

    Attributes:
        fitter: None for a model that reads text only.
        folder: of the model whose page settings these are; an adapter leaves them to its base.
    """

    encoder: PromptEncoder
    fitter: ImageFitter | None
    folder: Path

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, prompt: str | os.PathLike | None = None) -> "Processor":
        """Read a model's folder, and if it is elsewhere that of the tokenizer which an adapter was trained with."""
        return cls(PromptEncoder.from_folder(prompt or folder), ImageFitter.from_folder(folder), Path(folder))

    @classmethod
    def from_model(cls, name: str) -> "Processor":
        """Find and read those of a model, a run or an adapter; no weights are needed.

        Raises:
            UserError: if they are not to be found, or a run's tokenizer is not the one it was trained with.
        """
        prompt, folder = find_prompt_folders(name)
        if prompt != folder:
            check_tokenizer(prompt)
        return cls.from_folder(folder, prompt)

    def check_images(self, records: Sequence[Record]) -> None:
        """Raises RecordError for the first record with an image, if the model reads text only."""
        if self.fitter is None and (record := next((record for record in records if record.image_paths), None)):
            raise record.error(TEXT_ONLY)

    def grids(self, pages: Sequence[str | os.PathLike]) -> list[tuple[int, int]]:
        """The (rows, columns) of image tokens of each page, from the files' headers.

        Raises:
            ValueError: if a page has none, or the model reads text only.
        """
        if pages and self.fitter is None:
            raise ValueError(TEXT_ONLY)
        return [self.fitter.grid(*page_size(page, self.fitter)) for page in pages] if self.fitter else []
