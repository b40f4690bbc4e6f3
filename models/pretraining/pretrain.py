"""Teach the embedded base to read: pages are drawn on the fly, and it transcribes the part that it is asked for.

    python -m models.pretraining.pretrain --output OUT --steps 13000          # 11.5 minutes of one H200

Two losses are added. The language model's, on the answers to "Read the heading." and the like; and an auxiliary one on
the image cells, without which reading hardly appears: each projected cell of 28 x 28 pixels must name the token that it
shows most of, through lm_head, and the characters in it, through a linear layer. That layer is dropped afterwards.

An answer is a transcription line by line, " |" at the end of each: "Decree 41 on | Bridge Tolls |". Some pages come
with random tokens to repeat: to lm_head, the tokens that no page shows, such as those of JSON, would otherwise all look
alike, and an adapter could not tell them apart. The questions of the sample in dataset/ and the form of their answers
do not occur.

Long trainings may be cut into legs: --seconds ends one, --resume OUT begins the next from its weights.
"""

import argparse
import base64
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mistral_ft.data.prompt.tokenizer import load_tokenizer
from mistral_ft.model.vision import patch_positions
from models.pretraining import pages
from models.pretraining.glyphs import CHARACTERS, GREYS
from models.pretraining.pages import CELL, Line, Page
from models.tiny.build import CONTROLS, IMAGE_MEAN, IMAGE_STD, find_tekken, save_weights, tiny_config

BOS, EOS, INST, INST_END, IMG, PAD, BREAK, END = 1, 2, 3, 4, 10, 11, 12, 13
STRIP = (4, 10)  # rows and columns of cells
SHAPES = [(12, 9), (14, 10), (12, 12), (16, 12)]
SLOTS = 7  # places in a cell, 4 pixels apart, whose characters are named
BLANK_WEIGHT = 0.1  # of a cell or place with nothing on it
KEYS = (
    "Number Date Total Name Place Reference Order Account Amount Paid Item Code Street Office Volume Weight Price Clerk"
).split()
CLASSES = np.zeros(256, np.int64)  # of characters; 0 is none
CLASSES[CHARACTERS] = np.arange(1, len(CHARACTERS) + 1)


class Writer:
    """Makes up texts, lays out pages with them, and turns pages into arrays."""

    def __init__(self, folder: Path, tekken: Path, seed: int, repeat: float = 0.0):
        self.rng, self.tokenizer, self.repeat = random.Random(seed), load_tokenizer(folder), repeat
        self.vocabulary = range(CONTROLS, self.tokenizer.get_vocab_size())
        self.tokens: dict[str, tuple[list[int], np.ndarray]] = {}
        # The words of Tekken's whole vocabulary; most are several tokens in the one that is cut short.
        entries = (base64.b64decode(entry["token_bytes"]) for entry in json.loads(tekken.read_text())["vocab"])
        texts = (entry.decode(errors="replace") for entry in entries)
        self.words = [text[1:] for text in texts if re.fullmatch(r" [a-zà-öø-ÿ]{2,12}", text)]

    def word(self) -> str:
        return self.words[int(len(self.words) * self.rng.random() ** 2)]  # the frequent ones stand first

    def name(self) -> str:
        return self.word().capitalize()

    def title(self, rng: random.Random) -> str:
        style = rng.random()
        if style < 0.3:
            number = rng.choice(
                [
                    str(rng.randint(1, 999)),
                    f"No. {rng.randint(1, 99)}",
                    f"{rng.randint(1, 99)}/{rng.randint(1990, 2029)}",
                ]
            )
            link = rng.choice(["on", "on", "of", "for", "and", "to", "–", "in"])
            return " ".join([self.name(), number, link, *(self.name() for _ in range(rng.randint(1, 3)))])
        words = [self.word() for _ in range(rng.randint(1, 5))]
        if style < 0.6:
            words = [word.capitalize() for word in words]
        elif style < 0.7:
            words = [word.upper() for word in words[:3]]
        else:
            words[0] = words[0].capitalize()
        if rng.random() < 0.15:
            at = rng.randrange(len(words))
            words[at] = rng.choice(["{},", "({})", "“{}”", "{}:", "{}-" + self.word(), "{}’s", "{}."]).format(words[at])
        return " ".join(words)

    def value(self, key: str) -> str:
        makers = {"Number": pages.make_number, "Reference": pages.make_number, "Account": pages.make_number,
                  "Date": pages.make_date, "Paid": pages.make_date, "Total": pages.make_total,
                  "Amount": pages.make_total, "Price": pages.make_total}  # fmt: skip
        return pages.draw_free(
            makers.get(key, lambda rng: " ".join(self.name() for _ in range(rng.randint(1, 2)))), self.rng
        )

    def page(self, shape: tuple[int, int]) -> Page:
        """A page of `shape` (rows, columns) cells with random contents."""
        rng, size = self.rng, (shape[1] * CELL, shape[0] * CELL)
        title = pages.draw_free(self.title, rng)
        letter = rng.random() < 0.5
        if shape == STRIP:
            keys = rng.sample(KEYS, 2)
            if letter:
                return pages.lay_out_letter(size, "", title, "", rng)
            return pages.lay_out_form(size, "", "", {key: self.value(key) for key in keys}, "", rng)
        letterhead = " ".join(self.name() for _ in range(rng.randint(1, 3))) if rng.random() < 0.6 else ""
        body = " ".join(
            self.word() if rng.random() < 0.85 else rng.choice([pages.make_total, pages.make_number])(rng)
            for _ in range(rng.randint(10, 80))
        )
        if letter:
            return pages.lay_out_letter(size, letterhead, title, body, rng)
        keys = rng.sample(KEYS[:3], rng.randint(1, 3)) + rng.sample(KEYS[3:], rng.randint(1, 3))
        rng.shuffle(keys)
        return pages.lay_out_form(size, letterhead, title, {key: self.value(key) for key in keys}, body, rng)

    def encode(self, text: str) -> tuple[list[int], np.ndarray]:
        """Ids, and the (start, end) characters of each, of shape (n, 2)."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, np.asarray(encoding.offsets, np.int64).reshape(-1, 2)

    def encode_often(self, text: str) -> list[int]:
        if text not in self.tokens:
            self.tokens[text] = self.encode(text)[0]
        return self.tokens[text]

    def read(self, page: Page, shape: tuple[int, int]) -> tuple[dict[str, list[int]], np.ndarray, np.ndarray]:
        """What is printed where.

        Returns:
            The transcription of each part as ids; the token of each cell, (rows, columns), PAD where there is none; the
            character class of each place, (rows, columns * SLOTS).
        """
        marks = Marks(shape)
        for key in page.keys:
            marks.add(key, *self.encode(key.text))
        answers = {}
        for part, lines in page.parts.items():
            answers[part] = []
            for index, line in enumerate(lines):
                ids, spans = self.encode(" " * (index > 0) + line.text)
                marks.add(line, ids, np.maximum(spans - (index > 0), 0))
                answers[part] += [*ids, *self.encode_often(" |")]
        return answers, marks.tokens, marks.characters

    def batch(self, shape: tuple[int, int], count: int) -> dict:
        """Arrays of `count` pages.

        Returns:
            `glyphs` (n, 3), `page` (n,) and `area` for `pages.draw`; `ids` and `labels` (count, text length), where a
            label is the id that follows; `cells` (count, cells looked at) with the `tokens` and `characters` (…, SLOTS)
            that they show; `asked`: a question and its answer per page.
        """
        length, looked_at = (40, 24) if shape == STRIP else (72, 48)
        rows, columns = shape
        out = {"glyphs": [], "page": [], "ids": [], "labels": [], "cells": [], "tokens": [], "characters": []}
        asked = []
        for number in range(count):
            page = self.page(shape)
            answers, tokens, characters = self.read(page, shape)
            out["glyphs"] += page.glyphs
            out["page"].append(np.full(sum(map(len, page.glyphs)), number, np.int32))
            # Several questions about a page make one conversation: the tower's work pays more often.
            ids, labels = [], []
            turns = [(self.encode_often(f"Read the {part}."), answers[part]) for part in answers]
            self.rng.shuffle(turns)
            asked.append((self.tokenizer.decode(turns[0][0])[9:-1], self.tokenizer.decode(turns[0][1])))
            if self.rng.random() < self.repeat:
                some = self.rng.choices(self.vocabulary, k=self.rng.randint(3, 6))
                turns.insert(self.rng.randint(0, 1), (self.encode_often("Repeat") + some, some))
            for question, answer in turns:
                question, answer = [INST] * bool(ids) + question + [INST_END], [*answer, EOS]
                if len(ids) + len(question) + len(answer) > length:
                    continue
                labels += [-100] * (len(question) - 1) + answer + [-100]
                ids += question + answer
            out["ids"].append(ids + [PAD] * (length - len(ids)))
            out["labels"].append(labels + [-100] * (length - len(labels)))
            # Cells with something on them first, in random order.
            flat = tokens.reshape(-1)
            order = np.argsort((flat == PAD) + np.random.default_rng(self.rng.getrandbits(32)).random(len(flat)))[
                :looked_at
            ]
            out["cells"].append(order)
            out["tokens"].append(flat[order])
            out["characters"].append(characters.reshape(rows, columns, SLOTS).reshape(-1, SLOTS)[order])
        arrays = {name: torch.from_numpy(np.concatenate(out[name])) for name in ("glyphs", "page")}
        arrays |= {name: torch.from_numpy(np.asarray(out[name], np.int64)) for name in ("ids", "labels")}
        arrays |= {name: torch.from_numpy(np.stack(out[name])) for name in ("cells", "tokens", "characters")}
        return arrays | {"shape": shape, "area": pages.area_of(arrays["glyphs"].numpy()), "asked": asked}


class Marks:
    """Which token each cell of a page shows most of, and which characters; see `Writer.read`."""

    def __init__(self, shape: tuple[int, int]):
        rows, columns = shape
        self.tokens = np.full(shape, PAD, np.int64)
        self.most = np.zeros(shape)
        self.characters = np.zeros((rows, columns * SLOTS), np.int64)
        self.tallest = np.zeros((rows, columns * SLOTS))
        self.left = np.arange(columns) * CELL
        self.centres = (np.arange(columns * SLOTS) + 0.5) * CELL / SLOTS

    def add(self, line: Line, ids: list[int], spans: np.ndarray) -> None:
        """Mark a printed line whose token `ids[i]` is its characters spans[i, 0] to spans[i, 1]."""
        edge = line.x + pages.edges(line.text, line.font)
        codes = pages.encode(line.text)
        starts = spans[:, 0] + (codes[np.minimum(spans[:, 0], len(codes) - 1)] == 32)
        x0, x1 = edge[np.minimum(starts, len(codes))], edge[spans[:, 1]]
        # Most of the ink lies between the base line and the height of a capital.
        height = 0.72 * pages.load_glyphs().size[line.font]
        wide = np.clip(np.minimum(x1[:, None], self.left + CELL) - np.maximum(x0[:, None], self.left), 0, None)
        shown, wide = np.asarray(ids)[wide.argmax(0)], wide.max(0)
        which = np.searchsorted(edge, self.centres, "right") - 1
        inside = (which >= 0) & (which < len(codes))
        classes = CLASSES[codes[np.clip(which, 0, len(codes) - 1)]] * inside
        for row in range(max(0, int((line.y - height) // CELL)), min(len(self.tokens) - 1, line.y // CELL) + 1):
            tall = min(line.y, (row + 1) * CELL) - max(line.y - height, row * CELL)
            if tall < 0.3 * height:
                continue
            better = wide * tall > self.most[row] + 20
            self.tokens[row, better], self.most[row, better] = shown[better], (wide * tall)[better]
            better = inside & (tall > self.tallest[row])
            self.characters[row, better], self.tallest[row, better] = classes[better], tall


class Batches(torch.utils.data.IterableDataset):
    """Endless batches of one shape each: strips only at first, then mostly pages."""

    def __init__(self, args, step):
        self.args, self.step = args, step

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        writer = Writer(
            self.args.folder,
            self.args.tekken,
            hash((self.args.seed, self.step.value, worker.id if worker else 0)),
            self.args.repeat,
        )
        while True:
            strips = 1 if self.step.value < self.args.strip_steps else self.args.strips
            shape = STRIP if writer.rng.random() < strips else writer.rng.choice(SHAPES)
            yield writer.batch(shape, self.args.cells // (shape[0] * shape[1]))


class Reader(nn.Module):
    """The model with what only pre-training needs."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        hidden = model.config.text_config.hidden_size
        self.norm = nn.RMSNorm(hidden)
        self.characters = nn.Linear(hidden, SLOTS * (len(CHARACTERS) + 1))
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def draw(self, batch: dict, scanned: bool) -> torch.Tensor:
        """The pages as pixel values, (count, 3, height, width); `scanned`: as from a scanner, half of them."""
        rows, columns = batch["shape"]
        count = len(batch["ids"])
        ink = pages.draw(batch["glyphs"], batch["page"], batch["area"], (columns * CELL, rows * CELL), count) / GREYS
        if scanned:
            ink = scan(ink)
        return ((1 - ink)[:, None] - self.mean) / self.std

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected cells, (count, cells, hidden size): what the model computes, for all pages at once.

        (transformers' tower joins the pages into one sequence under a mask, and its patch merger goes through them one
        by one, which takes longer than all the rest.)
        """
        tower, projector = self.model.model.vision_tower, self.model.model.multi_modal_projector
        rows, columns = (length // tower.patch_size for length in pixels.shape[-2:])
        # Cell by cell, the four patches of a cell together.
        patches = F.pixel_unshuffle(tower.patch_conv(pixels), 2).unflatten(1, (-1, 4)).permute(0, 3, 4, 2, 1)
        hidden = tower.ln_pre(patches.flatten(1, 3))
        rotary = tower.patch_positional_embedding(hidden, patch_positions(rows, columns, 2).to(hidden.device))
        for layer in tower.transformer.layers:
            hidden = layer(hidden, None, position_embeddings=rotary)
        cells = projector.norm(hidden).unflatten(1, (-1, 4)).transpose(2, 3).flatten(2)
        return projector.linear_2(projector.act(projector.linear_1(projector.patch_merger.merging_layer(cells))))

    def hidden(self, features: torch.Tensor, ids: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """The text model's output at `ids` (count, text length), which stand behind the page: (…, hidden size)."""
        rows, _columns = shape
        embed = self.model.model.language_model.embed_tokens
        count, device = len(ids), ids.device
        page = embed(torch.tensor([BREAK] * (rows - 1) + [END], device=device)).expand(count, rows, -1)
        page = torch.cat([features.unflatten(1, shape), page[:, :, None].to(features.dtype)], 2).flatten(1, 2)
        start = embed(torch.tensor([BOS, INST], device=device)).expand(count, 2, -1)
        inputs = torch.cat([start.to(page.dtype), page, embed(ids).to(page.dtype)], 1)
        output = self.model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return output[:, -ids.shape[1] :]

    def losses(self, batch: dict, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean losses of answers, cells' tokens and characters; shares of cells and characters that are right."""
        features = self.features(pixels)
        hidden = self.hidden(features, batch["ids"], batch["shape"])
        answers = F.cross_entropy(self.model.lm_head(hidden).float().flatten(0, 1), batch["labels"].flatten())
        cells = features.gather(1, batch["cells"][..., None].expand(-1, -1, features.shape[-1]))
        tokens, tokens_right = weighted(self.model.lm_head(self.norm(cells)), batch["tokens"], PAD)
        characters, characters_right = weighted(
            self.characters(cells).unflatten(-1, (SLOTS, -1)), batch["characters"], 0
        )
        return {"answers": answers, "tokens": tokens, "characters": characters, "tokens_right": tokens_right,
                "characters_right": characters_right}  # fmt: skip

    @torch.no_grad()
    def transcribe(self, batch: dict, encode) -> list[list[int]]:
        """What it reads, greedily, as ids, when asked the first question of each page."""
        questions = [[*encode(f"Read the {part}."), INST_END] for part, _ in batch["asked"]]
        device, steps = batch["ids"].device, 44
        at = torch.tensor([len(question) for question in questions], device=device)
        ids = torch.tensor([q + [PAD] * (at.max().item() + steps - len(q)) for q in questions], device=device)
        rows = torch.arange(len(ids), device=device)
        features = self.features(self.draw(batch, scanned=False))
        done = torch.zeros(len(ids), dtype=torch.bool, device=device)
        for _ in range(steps):
            chosen = self.model.lm_head(self.hidden(features, ids, batch["shape"])[rows, at - 1]).argmax(-1)
            ids[rows, at] = chosen
            at, done = at + 1, done | (chosen == EOS)
            if done.all():
                break
        read = [row[len(question) :] for row, question in zip(ids.tolist(), questions, strict=True)]
        return [row[: row.index(EOS)] if EOS in row else row for row in read]


def weighted(logits: torch.Tensor, targets: torch.Tensor, blank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy in which blanks weigh little, and the share of the others that is right."""
    logits, targets = logits.float().flatten(0, -2), targets.flatten()
    printed = targets != blank
    weights = torch.where(printed, 1.0, BLANK_WEIGHT)
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    return loss, ((logits.argmax(-1) == targets) & printed).sum() / printed.sum()


def scan(ink: torch.Tensor) -> torch.Tensor:
    """Half of the pages as a scanner might give them: askew, blurred, faint on grey paper, noisy. Ink from 0 to 1."""
    count, height, width = ink.shape

    def some(low: float, high: float) -> torch.Tensor:
        """A random number per page, 0 for half of them; the same pages each time."""
        return torch.empty(count, 1, 1, device=ink.device).uniform_(low, high) * chosen

    chosen = (torch.rand(count, 1, 1, device=ink.device) < 0.5).float()
    angle = some(-0.012, 0.012)  # radians: 0.7 degrees
    nothing = torch.zeros_like(angle)
    first = torch.cat([1 + some(-0.04, 0.04), -angle * height / width, nothing], 2)
    second = torch.cat([angle * width / height, 1 + some(-0.04, 0.04), nothing], 2)
    grid = F.affine_grid(torch.cat([first, second], 1), (count, 1, height, width), align_corners=False)
    skewed = F.grid_sample(ink[:, None], grid, align_corners=False)
    blurred = torch.lerp(skewed, F.avg_pool2d(skewed, 3, 1, 1), some(0, 0.7)[:, None])[:, 0]
    ink = torch.where(chosen > 0, blurred, ink)
    paper = some(0, 0.15)
    return ink * (1 - paper - some(0, 0.3)) + paper + torch.randn_like(ink) * some(0, 0.05)


def save(reader: Reader, folder: Path) -> None:
    """Two bf16 shards and the configuration under the hub's names, and what --resume needs besides."""
    model = reader.model
    plain = type(model)._from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict({name.replace("._orig_mod", ""): tensor for name, tensor in model.state_dict().items()})
    save_weights(plain, folder, max_shard_size="9MB")
    torch.save({"norm": reader.norm.state_dict(), "characters": reader.characters.state_dict()}, folder / "heads.pt")


def rate_at(step: int, steps: int, since_start: int, peak: float) -> float:
    """Warm-up over 200 steps of each leg, constant, and a straight fall over the last quarter."""
    return peak * min(1, (since_start + 1) / 200, max(0.01, (steps - step) / (0.25 * steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights and log.jsonl")
    parser.add_argument("--steps", type=int, required=True, help="length of the whole training")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="length of this leg")
    parser.add_argument("--resume", type=Path, help="output folder of the leg before")
    parser.add_argument("--folder", type=Path, default=Path("models/tiny"), help="folder with tokenizer files")
    parser.add_argument(
        "--tekken", type=Path, default=None, help="whole Tekken file, for its words (default: mistral-common's)"
    )
    parser.add_argument("--cells", type=int, default=40000, help="image cells per step")
    parser.add_argument("--strip_steps", type=int, default=1500, help="steps at the start with strips only")
    parser.add_argument("--strips", type=float, default=0.15, help="share of strips later")
    parser.add_argument(
        "--repeat", type=float, default=0.5, help="share of pages with a turn of random tokens to repeat"
    )
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--report", type=float, default=10, help="seconds between lines")
    parser.add_argument("--check", type=float, default=45, help="seconds between held-out checks")
    parser.add_argument("--held_out", type=int, default=128, help="pages per shape in a check")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.tekken = args.tekken or find_tekken()

    from transformers import Mistral3ForConditionalGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = Mistral3ForConditionalGeneration._from_config(tiny_config(), dtype=torch.float32)
    reader = Reader(model).to(device)
    step = start = seen = 0
    before = 0.0
    args.output.mkdir(parents=True, exist_ok=True)
    if args.resume:
        weights = Mistral3ForConditionalGeneration.from_pretrained(args.resume, dtype=torch.float32).state_dict()
        model.load_state_dict(weights)
        for name, part in torch.load(args.resume / "heads.pt", map_location=device).items():
            getattr(reader, name).load_state_dict(part)
        log = (args.resume / "log.jsonl").read_text()
        last = json.loads(log.splitlines()[-1])
        step = start = last["step"]
        seen, before = last["pages"], last["seconds"]
        (args.output / "log.jsonl").write_text(log)
    matrices = [p for p in reader.parameters() if p.ndim > 1]
    groups = [{"params": matrices}, {"params": [p for p in reader.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, (0.9, 0.98), weight_decay=0.05, fused=True)
    if device == "cuda":
        # Layer by layer and for all shapes at once: whole and for each shape it would take minutes.
        for layer in [*model.model.vision_tower.transformer.layers, *model.model.language_model.layers]:
            layer.compile(dynamic=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)

    # Held-out pages: words drawn apart from training; the same in every leg.
    writer = Writer(args.folder, args.tekken, 10**9)
    checks = [move(writer.batch(shape, args.held_out), device) for shape in [STRIP, *SHAPES]]
    print(f"{len(writer.words):,} words", flush=True)
    counter = torch.multiprocessing.Value("q", step)
    loader = torch.utils.data.DataLoader(
        Batches(args, counter), batch_size=None, num_workers=args.workers, pin_memory=device == "cuda",
        prefetch_factor=4 if args.workers else None,
    )  # fmt: skip
    began = reported = checked = time.time()
    waited, seen_at_report = 0.0, seen
    batches = iter(loader)
    while True:
        asked_at = time.time()
        batch = move(next(batches), device)
        waited += time.time() - asked_at
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, args.steps, step - start, args.learning_rate)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses = reader.losses(batch, reader.draw(batch, scanned=step >= args.strip_steps))
        (losses["answers"] + losses["tokens"] + losses["characters"]).backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + len(batch["ids"])
        counter.value = step
        now = time.time()
        ends = step == args.steps or now - began > args.seconds
        if now - reported > args.report or ends:
            line = {"step": step, "pages": seen, "seconds": round(before + now - began)}
            line |= {name: round(loss.item(), 4) for name, loss in losses.items()}
            rate = (seen - seen_at_report) / (now - reported)
            print(
                json.dumps(line),
                f"{rate:,.0f} pages/s, waited {waited / (now - reported):.0%}, shape {batch['shape']}",
                flush=True,
            )
            if now - checked > args.check or ends:
                line["exact"], samples = check(reader, checks, writer, device)
                print(
                    f"exact match {json.dumps(line['exact'])}",
                    *samples,
                    f"({time.time() - now:.1f} s)",
                    sep="\n    ",
                    flush=True,
                )
                with open(args.output / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                save(reader, args.output)
                checked = time.time()
            reported, seen_at_report, waited = time.time(), seen, 0.0
        if ends:
            break


def move(batch: dict, device: str) -> dict:
    """The batch with its arrays on the device."""
    arrays = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}
    return batch | arrays | {"shape": tuple(batch["shape"])}


def check(reader: Reader, checks: list[dict], writer: Writer, device: str) -> tuple[dict, list[str]]:
    """Exact match per part over the held-out pages, on strips and on pages, and some things read."""
    right: dict[str, list[bool]] = {}
    samples = []
    for batch in checks:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), torch.compiler.set_stance("force_eager"):
            read = [writer.tokenizer.decode(ids) for ids in reader.transcribe(batch, writer.encode_often)]
        for (part, printed), text in zip(batch["asked"], read, strict=True):
            kind = re.sub(" of .*", "", part) + ("/strip" if batch["shape"] == STRIP else "")
            right.setdefault(kind, []).append(text == printed)
        samples += [
            f"{printed!r} read as {text!r}" for (_, printed), text in list(zip(batch["asked"], read, strict=True))[:2]
        ]
    return {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(right.items())}, samples


if __name__ == "__main__":
    main()
