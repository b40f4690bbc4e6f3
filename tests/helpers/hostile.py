"""Texts that a record may hold and that must act on nothing: no terminal, no page, no file, no path of a field."""

import json

TEXTS = {
    "ANSI escapes": "\x1b[31m red \x1b]0;title\x07 \x9b31m",
    "control characters": "nul \0 bel \x07 bs \x08 del \x7f",
    "bidi overrides": "left \u202eright\u2066 isolated \u200f\u200b\ufeff",
    "other line ends": "line\u2028sep\u2029para\x85nel\x0b\x0c",
    "lone CR": "\r lone \r cr \r\n crlf \n",
    "a long word": "W" * 6000,
    "half surrogates in JSON": r'{"\ud800": "\udfff", "a\u0000b": 1, "\ude00\ud83d": "\ud83d"}',
    "odd keys": r'{"a.b": 1, "a": {"b": 2, "": {"": 3}}, "": 4, "a[0]": 5, " ": 6, "0": 7, "\"": 8, "\u202e": 0}',
    "huge numbers": f'{{"n": {"9" * 4299}, "m": -{"9" * 100}, "e": 1e308, "z": -0.0}}',
    "too huge a number": f'{{"n": {"9" * 5000}}}',
    "more than a float": '{"f": 1e999}',
    "no numbers": '{"n": NaN, "i": [-Infinity]}',
    "deep lists": "[" * 10_000 + "]" * 10_000,
    "deep objects": '{"a":' * 10_000 + "1" + "}" * 10_000,
    "just too deep": "[" * 500 + "]" * 500,
    "long key": json.dumps({"k" * 2000: "v" * 2000}),
    "many fields": json.dumps({f"f{k}": k for k in range(500)}),
    "markup": "</textarea><script>alert(1)</script><img src=x onerror=alert(1)>",
    "templates": "{{7*7}} {% raw %} $x_1^2$ %s {0} \\u0041",
    "nothing": "",
    "space": " \u3000\xa0",
    "beyond the BMP": "\U0001f600\U0010ffff\ue000\ufffe",
}
# Lines that are no record, and why.
BAD_LINES = {
    r'{"id": "\ud800", "messages": []}': "holds half a surrogate pair (\\ud800 to \\udfff), which is no valid text",
    '{"id": 1e999}': "holds the number 1e999, which is too large to be read: the largest is 1.8e308",
    '{"id": [-1e400]}': "holds the number -1e400, which is too large to be read: the largest is 1.8e308",
    f'{{"id": {"9" * 400}.5}}': f"holds the number {'9' * 20}, which is too large to be read: the largest is 1.8e308",
    '{"id": ' + "[" * 10_000 + "]" * 10_000 + "}": "nested too deeply to be read",
    '{"id": ' + "[" * 200 + "]" * 200 + "}": "nested too deeply to be read",
    f'{{"id": {"9" * 5000}}}': "holds a number of more than 4300 digits",
    '{"a": "x\x1b"}': "not JSON: Invalid control character at column 9",
}


def rows() -> list[dict]:
    """Rows that hold each text as id, question, role, answer, error, confidence, name and value of fields."""
    found, texts = [], list(TEXTS.values())
    for k, text in enumerate(texts):
        other, name = texts[(k * 7 + 3) % len(texts)], text[:300]
        sure = {"min": -0.1 * k, "mean": -0.05, "tokens": text, "fields": {name: {"min": -0.5}, "a.b": {"min": text}}}
        blocks = [{"type": "text", "text": text}, {"type": "image", "image": text or "x"}]
        found += [
            {"id": text if k % 3 else k, "messages": [{"role": "user", "content": blocks}], "expected": text}
            | {"actual": other if k % 4 else f"{text}x", "finish_reason": text, "thinking": other, "confidence": sure}
            | {"kind": text, name or "empty": other, "meta": {"a.b": text, "a": {"b": other}, "": text}}
            | {"deep": json.loads("[" * 150 + "]" * 150), "big": int("9" * 4000), "float": 1e308, "none": None},
            {"id": f"e{k}", "messages": [{"role": "user", "content": text}], "expected": text, "error": text},
            {"id": {text: [text]}, "messages": [{"role": text, "content": text, "x": {text: text}}, text, None]}
            | {"expected": text, "actual": [text]},
            {"id": ["l", k], "messages": [{"role": "user", "content": "q"}], "expected": other, "actual": text}
            | {"confidence": {"min": -float(k), "fields": text}},
            {"id": 10**300 + k, "messages": [{"role": "user", "content": "q", "name": text}]}
            | {"expected": text or "a"},
        ]
    return found


def read_strictly(text: str):
    """JSON as the standard has it: without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def acts_on_a_terminal(text: str) -> list[str]:
    """The lines with anything that a terminal does not just print."""
    return [line[:200] for line in text.split("\n") if not line.isprintable()]
