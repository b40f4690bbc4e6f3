"""The fields of JSON answers: no two have one path, and all can be printed and written."""

import json

import pytest

from mistral_ft.data.json_fields import fields_of, flatten, has_half, is_too_deep


@pytest.mark.parametrize(
    "text",
    ["plain", "", None, "{", "[sic]", '{"a": NaN}', '{"a":' * 10**5, "[" * 201 + "]" * 201, "[" + "9" * 5000 + "]"],
)
def test_what_is_no_json(text):
    assert fields_of(text) is None


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('{"a.b": 1, "a": {"b": 2}}', {'"a.b"': "1", "a.b": "2"}),
        ('{"0": "x"}', {'"0"': '"x"'}),
        ('["x"]', {"0": '"x"'}),
        ('{"a[0]": 1, "a[]": 2}', {'"a[0]"': "1", '"a[]"': "2"}),
        ('{"a": 4.0, "b": " x ", "c": {}, "d": []}', {"a": "4", "b": '"x"', "c": "{}", "d": "[]"}),
        ("[" * 200 + "]" * 200, {".".join("0" * 199): "[]"}),
        ('{"": "x"}', {'""': '"x"'}),
        (r'{"na\ud83dme": "x\ud83d"}', {r'"na\ud83dme"': r'"x\ud83d"'}),
        (r'{"a\u202eb": "ü"}', {r'"a\u202eb"': '"ü"'}),
    ],
)
def test_no_two_fields_have_one_name_and_every_name_can_be_printed(text, fields):
    assert fields_of(text) == fields


def test_the_items_of_a_list_can_share_a_path():
    data = {"a": [{"b": 1}, {"b": 2, "c": []}], "a[]": 3}
    assert list(flatten(data, places=False)) == [("a[].b", 1), ("a[].b", 2), ("a[].c", []), ('"a[]"', 3)]
    assert list(flatten([[1], 2], places=False)) == [("[][]", 1), ("[]", 2)]


def test_depth_does_not_depend_on_the_stack():
    for depth, deep in ((200, False), (201, True), (100_000, True)):
        data: list = []
        for _ in range(depth - 1):
            data = [data]
        assert is_too_deep("[" * depth, data) is deep
        while data:  # taken apart level by level: its destructor must not recurse either
            data = data.pop()
    assert not is_too_deep("[]" * 1000, [[]] * 1000)
    assert not is_too_deep(json.dumps("[" * 1000), "[" * 1000)


@pytest.mark.parametrize(("text", "half"), [("a", False), ("ü\U0001f600", False), ("\ud83d", True), ("a\udfff", True)])
def test_half_a_surrogate_pair(text, half):
    assert has_half(text) is half
