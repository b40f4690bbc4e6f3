"""How far long work is: a bar on a terminal, a line now and then elsewhere, on stderr."""

import math
import sys
import time

from tqdm import tqdm

from mistral_ft.distributed import rank


class Progress:
    """Shows count, rate and time left; of several processes, the first one's.

    Args:
        description: what is done, such as "training".
        total: how much there is to do.
        unit: what is counted, in the singular.
        done: how much of it was done before.
        seconds: time between two lines where there is no terminal; the first and the last are always written.
        passing: it is gone from a terminal when it is over, and elsewhere told only if it takes `seconds`.
    """

    def __init__(
        self, description: str, total: int, unit: str, done: int = 0, seconds: float = 15, passing: bool = False
    ):
        self.description, self.unit, self.seconds = description, unit, seconds
        self.before = done
        self.started = time.perf_counter()
        self.printed, self.passing = self.started if passing else -math.inf, passing
        hidden = True if rank() else None  # None: where there is no terminal
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=unit,
            disable=hidden,
            dynamic_ncols=True,
            leave=not passing,
        )
        self.done, self.total = done, total

    def update(self, count: int = 1, text: str = "") -> None:
        """Count more of it as done; `text` is shown beside it."""
        ends = self.done < self.total <= self.done + count
        self.done += count
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(count)
        now = time.perf_counter()
        if rank() == 0 and self.bar.disable and (now - self.printed >= self.seconds or (ends and not self.passing)):
            parts = [f"{self.unit} {self.done}/{self.total}", text]
            rate = (self.done - self.before) / (now - self.started)
            # The first line comes at once, when what was started tells nothing about the pace.
            if rate and (self.printed > -math.inf or self.done >= self.total):
                left = tqdm.format_interval((self.total - self.done) / rate)
                parts += [f"{rate:.3g} {self.unit}s/s", f"{left} left"]
            self.printed = now
            print(f"{self.description}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)

    @staticmethod
    def print(text: str) -> None:
        """Print a line to stdout, above any bar that a terminal shows."""
        tqdm.write(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()
