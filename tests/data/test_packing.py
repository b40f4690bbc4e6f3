"""Which records share a sequence: all of them once, hardly anything empty, and still enough steps to learn in."""

import random

import pytest

from mistral_ft.data.packing import choose_length, fill, pack, round_up


def page_lengths(count: int) -> list[int]:
    """Tokens of pages of 900 to 1540 pixels, short questions and answers."""
    rng = random.Random(0)
    lengths = []
    for _ in range(count):
        height = rng.randint(900, 1540)
        rows, columns = -(-height // 28), -(-round(height * rng.uniform(0.7, 0.8)) // 28)
        lengths.append(rows * (columns + 1) + rng.randint(20, 80))
    return lengths


def test_packs_are_literal():
    assert sorted(map(sorted, pack([6, 5, 4, 3, 2], 10))) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("capacity", [2600, 4096, 9000])
def test_every_record_is_in_one_pack_and_no_pack_is_too_long(capacity):
    lengths = page_lengths(500)
    packs = pack(lengths, capacity)
    assert sorted(number for numbers in packs for number in numbers) == list(range(500))
    assert max(sum(lengths[number] for number in numbers) for numbers in packs) <= capacity


def test_packs_are_drawn_anew_with_another_seed_only():
    lengths = [100] * 50
    assert pack(lengths, 300, seed=1) == pack(lengths, 300, seed=1) != pack(lengths, 300, seed=2)


@pytest.mark.parametrize("count", [300, 2000])
def test_pages_of_mixed_sizes_fill_their_sequences(count):
    lengths = page_lengths(count)
    length = choose_length(lengths, most=4352, epochs=3)
    assert max(lengths) <= length <= 4352
    assert fill(lengths, length) > 0.97


def test_a_longer_record_gets_its_way():
    assert choose_length([500, 9000], most=4352, epochs=3) == round_up(9000) == 9088


def test_short_records_are_not_packed_into_a_handful_of_steps():
    lengths = [200] * 300
    length = choose_length(lengths, most=4352, epochs=1)
    assert length <= 896  # four records, not twenty
    assert len(pack(lengths, length)) >= 75
    assert choose_length(lengths * 100, most=4352, epochs=1) > 2000  # where there are plenty, as long as it is fast


def test_accumulated_sequences_count_as_one_step():
    lengths = [200] * 3000
    assert choose_length(lengths, 4352, 1, sequences_per_step=4) < choose_length(lengths, 4352, 1)
