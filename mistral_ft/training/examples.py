"""What a training learns from and is measured on: records read, checked against the model, and divided."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mistral_ft.data.dataset import RecordDataset, RecordSize, cut_texts, measure_records
from mistral_ft.data.pages import fingerprint, limit_pages
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import Record, read_records
from mistral_ft.data.row_images import keep_image_tag
from mistral_ft.data.row_keys import hash_json
from mistral_ft.data.splitting import Splitter
from mistral_ft.errors import UserError
from mistral_ft.training.evaluation import Evaluator
from mistral_ft.training.settings import Settings


def read_data(settings: Settings) -> tuple[list[Record], list[Record]]:
    """The records of --dataset and of --eval_dataset, their shape checked.

    Raises:
        UserError: for bad records, and for a vision tower or projector that would see no image.
    """
    folder, lora = settings.data.images_dir, settings.lora
    limit_pages(settings.data.max_image_pixels, settings.data.pdf_seconds)
    keep_image_tag(settings.data.keep_image_tag)
    records = read_records(settings.data.dataset, folder, expected_required=True)
    held_out = read_records(settings.evaluation.eval_dataset or (), folder, expected_required=True)
    sees = lora.vision_lora or lora.train_projector
    if sees and lora.init_adapter is None and not any(record.image_paths for record in records):
        raise UserError("--vision_lora and --train_projector have no effect: no record has an image")
    return records, held_out


@dataclass(frozen=True)
class Examples:
    """Records that are learned, and those that are held out.

    Attributes:
        dataset, sizes: what is learned.
        rows: of the data files that it is from; plain text may be cut into several records.
        evaluator: measures on what is held out; None: nothing is.
    """

    dataset: RecordDataset
    sizes: list[RecordSize]
    rows: int
    evaluator: Evaluator | None

    @classmethod
    def measure(
        cls, records: Sequence[Record], held_out: Sequence[Record], processor: Processor, settings: Settings
    ) -> "Examples":
        """Open every page and encode every record, and divide them as --eval_fraction says.

        Raises:
            UserError: for records that cannot be trained, or cannot be divided.
        """
        data, evaluation = settings.data, settings.evaluation
        learned, held_out = (cut_texts(some, processor.encoder, data.max_seq_length) for some in (records, held_out))
        held = [False] * len(learned) + [True] * len(held_out)
        together = [*learned, *held_out]
        sizes = measure_records(together, processor, data.max_seq_length)
        if evaluation.eval_fraction is not None:
            held = hold_out(together, evaluation.eval_fraction, settings.training.seed)
        (learned, sizes), (held_out, held_sizes) = divide(together, sizes, held)
        rows = len({(record.path, record.line) for record in learned})
        lengths = [size.tokens for size in sizes]
        print(f"{len(learned)} records, {sum(lengths):,} tokens, the longest {max(lengths):,}")
        evaluator = None
        if held_out:
            answered = evaluation.answered(settings.speed.shard_base)
            evaluator = Evaluator(RecordDataset(held_out, processor), held_sizes, answered)
            print(f"{len(held_out)} records to evaluate on, {len(evaluator.answered)} of them answered")
        return cls(RecordDataset(learned, processor), sizes, rows, evaluator)


def hold_out(records: Sequence[Record], fraction: float, seed: int) -> list[bool]:
    """For each record whether it is kept from training; those of one page, text or row are so together.

    Raises:
        UserError: if no such division leaves records on both sides.
    """
    splitter = Splitter()
    hashes: dict[str, str] = {}
    for record in records:
        images = record.image_paths
        hashes |= {image: fingerprint(image) for image in images if image not in hashes}
        keys: list[Hashable] = [hashes[image] for image in images]
        splitter.add([(record.path, record.line), *(keys or [hash_json([record.messages, record.text])])])
    held = splitter.divide(fraction, seed)
    if len(set(held)) == 1:
        raise UserError(
            f"--eval_fraction {fraction:g}: {len(records)} records cannot be divided so, for records of one page stay "
            "together; give another fraction, or --eval_dataset"
        )
    return held


def divide(
    records: Sequence[Record], sizes: Sequence[RecordSize], held: Sequence[bool]
) -> list[tuple[list[Record], list[RecordSize]]]:
    """Records and their sizes in two: those that are learned, and those that are held out."""
    rows = list(zip(records, sizes, held, strict=True))
    return [([r for r, _, h in rows if h == side], [s for _, s, h in rows if h == side]) for side in (False, True)]
