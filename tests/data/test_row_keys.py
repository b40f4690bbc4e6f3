"""Right answers, and what makes rows the same."""

import re

import pytest

from mistral_ft.data.row_keys import expected_of, right_answers


def test_a_string_is_one_right_answer_and_a_list_several():
    assert right_answers({}) == right_answers({"expected": None}) == []
    assert right_answers({"expected": ""}) == [""]
    assert right_answers({"expected": '["a"]'}) == ['["a"]']
    assert right_answers({"expected": ["b", "a", "b"]}) == ["b", "a"]


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        ([], "`expected` is an empty list; name at least one right answer in it, or leave it out"),
        (["a", None], "answer 2 in `expected` must be a string, got nothing; put JSON answers in quotes"),
        ([["a"]], "answer 1 in `expected` must be a string, got a list; put JSON answers in quotes"),
        ({"text": ["a"]}, "`expected` must be a string, got an object; put JSON answers in quotes"),
        (False, "`expected` must be a string, got true/false; put JSON answers in quotes"),
    ],
)
def test_anything_else_is_refused(expected, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        right_answers({"expected": expected})


def test_what_is_expected_alike_has_one_hash():
    def alike(one, other):
        return expected_of({"expected": one}) == expected_of({"expected": other})

    assert alike("A", [" A\n"])
    assert alike(["A", "A"], "A")
    assert alike(["A", "B ", "A"], ["A", "B"])
    assert not alike(["A", "B"], "A")
    assert not alike(["A", "B"], ["B", "A"])  # another one is learned
    assert not alike('["A", "B"]', ["A", "B"])
    assert not alike(["A", 1], ["A", 2])  # no answers, but not the same
    assert expected_of({}) == expected_of({"expected": None}) != expected_of({"expected": []})
