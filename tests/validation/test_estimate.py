"""What fits on the card and how long an epoch takes: the figures follow from the plan and what was measured."""

import json
import random

import pytest

from mistral_ft.data.packing import activation_bytes
from mistral_ft.validation.estimate import describe_training, duration, epoch_seconds, is_measured, longest_that_fits
from tests.conftest import TINY


def test_memory_of_a_token_of_the_24b():
    kept, at_work = activation_bytes(40, 5120, 32768)
    assert (kept, at_work) == (6_062_080, 999_424)
    assert kept // 40 == 151_552  # 148 KB a layer


def test_what_fits_agrees_with_what_was_measured():
    """A record of 31,602 tokens took 74.7 of 78.5 GiB, and sequences of 4,096 to 4,700 need no layer twice."""
    assert longest_that_fits(recomputed=True) == 34_398
    assert longest_that_fits(recomputed=False) == 4_716


def test_measured_speeds_come_back():
    seconds, length = epoch_seconds([31_602])
    assert length == 31_616
    assert seconds == pytest.approx(31_602 / 2624, rel=1e-3)
    # 5,237 tokens a second in sequences that are 96.8 % full.
    seconds, length = epoch_seconds([1152] * 4000)
    assert length == 4608
    assert seconds == pytest.approx(4000 * 1152 / 5237 * 0.968, rel=1e-3)
    # Short sequences cost their share of 30 ms more: those of 256 tokens take 54 % longer.
    seconds, length = epoch_seconds([64] * 4)
    assert length == 256
    assert seconds == pytest.approx(256 / 5237 * 0.968 * (1 + 150 / 256) / (1 + 150 / 4716), rel=1e-3)


def test_a_long_record_slows_all():
    rng = random.Random(0)
    lengths = [rng.randint(900, 2450) for _ in range(2000)]
    assert list(describe_training([*lengths, 18_000, 40_000], [("a.jsonl:2", 40_000), ("a.jsonl:1", 18_000)])) == [
        "On an 80 GB card (78.5 GiB; figures of the 24B on one H200, rank 16; not run on an A100):",
        "  longer than the about 34,000 tokens that fit: 1, such as a.jsonl:2 (40,000)",
        "  one epoch takes about 16 min: 3,348,586 tokens, in sequences of 18,048",
        "  the longest record sets the length of all sequences: without those of more than 4,700 tokens (1) it takes "
        "about 11 min",
    ]
    assert list(describe_training([40_000], [("a.jsonl:2", 40_000)]))[1:] == [
        "  longer than the about 34,000 tokens that fit: 1, such as a.jsonl:2 (40,000)"
    ]
    assert list(describe_training([100], [("a.jsonl:1", 100)]))[1:] == [
        "  all records fit: the longest has 100 tokens, and about 34,000 have room",
        "  one epoch takes about 0.073 s: 100 tokens, in sequences of 256",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (47.1, "47 s"), (120, "2 min"), (4321, "72 min"), (7300, "2 h"), (1e6, "12 days")],
)
def test_durations_have_two_digits(seconds, text):
    assert duration(seconds) == text


def test_only_the_24b_was_measured(tmp_path):
    assert not is_measured(TINY)
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 32768}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_measured(tmp_path)
