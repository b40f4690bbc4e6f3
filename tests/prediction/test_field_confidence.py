"""How sure the model was of each field of a JSON answer."""

import json

import pytest

from mistral_ft.prediction.field_confidence import field_confidences, token_ends, value_spans
from mistral_ft.prediction.generator import Answer


def test_values_are_found_where_they_stand():
    text = ' {"number": "A-1", "total": 12.50,\n "lines": [{"a": "}"}, 2], "paid": null} '
    spans = value_spans(text)
    assert {key: text[start:end] for key, (start, end) in spans.items()} == {
        "number": '"A-1"', "total": "12.50", "lines": '[{"a": "}"}, 2]', "paid": "null",
    }  # fmt: skip
    assert value_spans("{}") == {}


@pytest.mark.parametrize(
    "text",
    ["", "Paris", "[1]", '{"a": 1', '{"a" 1}', '{"a": 1,}', '{"a": 1} x', "{1: 2}", '{"a": nope}', "{" * 5000,
     '{"a": ' * 5000, '{"a": 1 "b": 2}'],
)  # fmt: skip
def test_other_texts_have_no_fields(text):
    assert value_spans(text) == {}


def test_a_field_is_as_sure_as_its_tokens():
    pieces = ['{"', "no", '": ', '"A', "-1", '", "t', 'otal": ', "12", ".5", "}", ""]
    text = "".join(pieces)
    assert json.loads(text) == {"no": "A-1", "total": 12.5}
    ends = token_ends(["".join(pieces[: count + 1]) for count in range(len(pieces))])
    log_probs = [0, 0, 0, -0.5, -1.0, -0.3, 0, -0.1, -0.7, -9.0, -9.0]
    assert field_confidences(text, ends, log_probs) == {
        "no": {"mean": -0.6, "min": -1.0},  # the token that closes the string is one of them
        "total": {"mean": -0.4, "min": -0.7},
    }


def test_fields_are_written_beside_the_answers_confidence():
    fields = {"no": {"mean": -0.6, "min": -1.0}}
    written = Answer("x", (-0.5, -1.5), fields).write_into({"id": 1})
    assert written["confidence"] == {"sum": -2.0, "mean": -1.0, "min": -1.5, "tokens": 2, "fields": fields}
    assert "fields" not in Answer("x", (-0.5,)).write_into({})["confidence"]


def test_a_key_with_half_a_surrogate_pair_can_be_written():
    found = field_confidences(r'{"\ud800": 1, "a.b": 2, "": 3}', [100], [-1.0])
    assert list(found) == [r'"\ud800"', "a.b", ""]
    json.dumps(found, ensure_ascii=False).encode("utf-8")
