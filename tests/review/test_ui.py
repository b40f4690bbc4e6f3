"""The review page in a real browser: an installed Chromium, driven by playwright."""

import json
import re
import shutil
import signal

import pytest
from PIL import Image

from mistral_ft.data.predictions import Predictions
from mistral_ft.review.log import log_path
from tests.conftest import make_page, read_rows, row, write_jsonl
from tests.helpers import hostile
from tests.helpers.review import OTHER, THOUGHT, Server, wait_for, write_status

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed here (apt-get install chromium)"),
]

ROWS = [
    row(0, "A", ["0.png"]) | {"actual": "A", "confidence": {"min": -0.1, "mean": -0.1, "sum": -0.1, "tokens": 1}},
    row(1, "Brown fox", ["1.png"]) | {"actual": "Brawn fox", "language": "fr", "confidence": {"min": -0.5}},
    row(2, "C", ["2.png", "many.pdf"]) | {"actual": "", "language": "en"},
    row(3, "D", ["half.png"]) | {"error": "image gone"},
    row(4, "E") | {"actual": "E"},
    row(5, '{"sum": 4, "tax": 1}') | {"actual": '{"sum": 4, "tax": 2}'},
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        make_page(tmp_path / f"{number}.png", number + 1, (400, 600))
    (tmp_path / "half.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    sheets = [Image.new("L", (300 + 100 * k, 400), 250) for k in range(2)]
    sheets[0].save(tmp_path / "many.pdf", save_all=True, append_images=sheets[1:], resolution=200)
    write_jsonl(tmp_path / "p.jsonl", ROWS)
    return tmp_path


@pytest.fixture
def start(folder):
    """start(…) -> a server on the folder's file."""
    running = []

    def start(*arguments, file="p.jsonl"):
        running.append(Server(folder / file, *arguments))
        return running[-1]

    yield start
    for server in running:
        server.stop(signal.SIGKILL)


@pytest.fixture
def open_page(browser):
    """open_page(server) -> the page, which must not complain in its console."""
    complaints, contexts = [], []

    def open_page(server, link="", **options):
        context = browser.new_context(viewport={"width": 1280, "height": 720}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.goto(f"http://127.0.0.1:{server.port}/{link}")
        until(page, "document.querySelector('#record-name').textContent !== ''")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # A refused image or decision is an answer of 409 or 422, which Chromium lists as an error.
    # So is a server that is stopped, whatever state its connections are in.
    allowed = r"status of (409|422)|ERR_CONNECTION_(REFUSED|RESET|CLOSED)|ERR_EMPTY_RESPONSE"
    assert [text for text in complaints if not re.search(allowed, text)] == []


def names(page) -> list[str]:
    return page.locator(".row .row-name").all_inner_texts()


def until(page, condition, argument=None) -> None:
    """Wait for a condition; playwright's own way needs eval, which the page's policy forbids."""
    wait_for(lambda: page.evaluate(condition, argument))


def shown(page, name) -> None:
    until(page, "name => document.querySelector('#record-name').textContent === name", name)


def total(page, text) -> None:
    until(page, "text => document.querySelector('#total').textContent === text", text)


def press(page, *keys) -> None:
    for key in keys:
        page.keyboard.press(key)


def said(page, text) -> None:
    until(page, "text => document.querySelector('#notice').textContent.includes(text)", text)


def test_open_filter_search_and_step(start, open_page):
    page = open_page(start())
    shown(page, "0")
    total(page, "6 rows")
    assert names(page) == ["0", "1", "2", "3", "4", "5"]
    page.get_by_role("radio", name="Errors").click()
    total(page, "4 rows")
    assert names(page) == ["1", "2", "3", "5"]  # the empty answer of row 2 and the error of row 3 are errors
    shown(page, "1")
    press(page, "j")
    shown(page, "2")
    assert page.get_by_test_id("actual").inner_text() == "(empty)"
    press(page, "ArrowUp")
    shown(page, "1")
    page.get_by_role("radio", name="All", exact=True).click()
    total(page, "6 rows")
    press(page, "Home")
    shown(page, "0")
    for name in ("1", "2", "3", "5"):
        press(page, "n")
        shown(page, name)
    press(page, "n")
    said(page, "No error after this row.")
    press(page, "Shift+N")
    shown(page, "3")
    press(page, "/")
    page.keyboard.type("brawn")
    total(page, "1 row")
    shown(page, "1")
    page.fill("#search", "")
    total(page, "6 rows")
    page.select_option("#sort", "confidence")
    until(page, "document.querySelector('.row .row-name').textContent === '1'")
    page.select_option("#field", "language")
    page.select_option("#value", "=en")
    total(page, "1 row")
    shown(page, "2")


def test_differences_by_words_and_characters(start, open_page):
    page = open_page(start(), "#id=1")
    shown(page, "1")
    assert page.locator("[data-testid=expected] del").all_inner_texts() == ["Brown"]
    assert page.locator("[data-testid=actual] ins").all_inner_texts() == ["Brawn"]
    press(page, "m")
    assert page.locator("[data-testid=expected] del").all_inner_texts() == ["o"]
    assert page.locator("[data-testid=actual] ins").all_inner_texts() == ["a"]
    page.goto(page.url.split("#")[0] + "#id=5")
    shown(page, "5")
    assert page.locator("table[aria-label='JSON fields'] tr.wrong").inner_text().split() == ["tax", "1", "2", "–"]


def test_several_right_answers_are_shown_and_kept(start, open_page, folder):
    rows = [row(0, ["12 May", "12.05.", "May 12"]) | {"actual": "12.06."}, row(1, ["A", "B"]) | {"actual": "B"}]
    write_jsonl(folder / "several.jsonl", rows)
    page = open_page(start(file="several.jsonl"))
    shown(page, "0")
    assert page.get_by_test_id("expected").inner_text() == "12 May"
    assert page.get_by_test_id("or").all_inner_texts() == ["12.05.", "May 12"]
    assert page.locator("[data-testid=or] del").all_inner_texts() == ["05"]  # of the nearest
    assert page.locator("[data-testid=expected] del").count() == 0
    assert page.locator("[data-testid=actual] ins").all_inner_texts() == ["06"]
    press(page, "e")
    assert page.input_value("#edited") == "12 May"
    page.fill("#edited", "12 June")
    press(page, "Control+Enter")
    said(page, "Saved.")
    assert page.get_by_test_id("expected").inner_text() == "12 June"
    assert page.get_by_test_id("or").all_inner_texts() == ["12.05.", "May 12"]
    press(page, "j")
    shown(page, "1")
    assert page.locator("#badges .badge").all_inner_texts() == ["right"]
    press(page, "s")
    said(page, "The actual answer is the expected one now.")
    until(page, "document.querySelector('[data-testid=expected]').textContent === 'B'")
    assert page.get_by_test_id("or").all_inner_texts() == ["A"]
    press(page, "u")
    said(page, "Undone: 1")
    until(page, "document.querySelector('[data-testid=expected]').textContent === 'A'")
    press(page, "a")
    said(page, "Accepted.")
    page.get_by_role("button", name="Export").click()
    page.wait_for_selector("#exported")
    exported = read_rows(folder / "several.corrected.jsonl")
    assert [record["expected"] for record in exported] == [["12 June", "12.05.", "May 12"], ["A", "B"]]


def test_pages_zoom_pan_rotate_and_tabs(start, open_page):
    page = open_page(start(), "#id=2")
    shown(page, "2")
    until(page, "document.querySelector('#page:not(.loading)[src]') !== null")
    assert page.locator("[role=tab]").all_inner_texts() == ["2.png", "many.pdf – 1", "many.pdf – 2"]
    width = lambda: page.locator("#page").bounding_box()["width"]  # noqa: E731
    until(page, "document.querySelector('#page').getBoundingClientRect().height > 100")
    fitted = width()
    box = page.locator("#stage").bounding_box()
    assert page.locator("#page").bounding_box()["height"] == pytest.approx(box["height"] - 24, abs=2)
    press(page, "+")
    assert width() == pytest.approx(fitted * 1.25, rel=0.01)
    press(page, "w")
    assert width() == pytest.approx(box["width"] - 24, abs=2)
    press(page, "1")
    assert width() == pytest.approx(400, abs=1)
    before = page.locator("#page").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 70, box["y"] + 60, steps=3)
    page.mouse.up()
    after = page.locator("#page").bounding_box()
    assert (after["x"] - before["x"], after["y"] - before["y"]) == pytest.approx((-30, -40), abs=1)
    # Zooming with the wheel keeps the point under the mouse.
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    until(page, "document.querySelector('#page').getBoundingClientRect().width > 500")
    zoomed, x = page.locator("#page").bounding_box(), box["x"] + 70
    assert (x - zoomed["x"]) / zoomed["width"] == pytest.approx((x - after["x"]) / after["width"], abs=0.01)
    press(page, "0", "r")
    turned = page.locator("#page").bounding_box()
    assert turned["width"] / turned["height"] == pytest.approx(600 / 400, rel=0.02)
    press(page, "]", "]")
    until(page, "document.querySelector('#page-size').textContent === '400 × 400 px'")
    until(page, "document.querySelector('#page').naturalWidth === 400")
    press(page, "[")
    until(page, "document.querySelector('#page').naturalWidth === 300")


def test_pages_that_cannot_be_shown_say_why(start, open_page):
    page = open_page(start(), "#id=3")
    page.wait_for_selector("#page-note:visible")
    until(page, "document.querySelector('#page-note').textContent.includes('cannot be opened')")
    assert page.locator("#record-body .problem").inner_text() == "Predict could not answer: image gone"
    press(page, "j")
    until(page, "document.querySelector('#page-note').textContent === 'This record has no image.'")


def test_decide_undo_restart_and_export(start, open_page, folder):
    server = start()
    page = open_page(server)
    shown(page, "0")
    press(page, "a")  # row 0 is right
    shown(page, "1")
    press(page, "s")  # row 1: the actual answer is
    shown(page, "2")
    press(page, "e")
    page.fill("#edited", "Corrected „ü“\nsecond line")
    press(page, "Control+Enter")
    said(page, "Saved.")
    press(page, "f")
    said(page, "Flagged.")
    press(page, "j")
    shown(page, "3")
    press(page, "a")
    shown(page, "4")
    press(page, "u")  # back to row 3
    shown(page, "3")
    said(page, "Undone: 3")
    until(page, "document.querySelector('#progress-text').textContent === '3 of 6 reviewed'")
    press(page, "e")
    page.fill("#edited", "a draft")
    server.stop(signal.SIGKILL)
    press(page, "Control+Enter")
    said(page, "Not saved: the server does not answer")
    assert page.input_value("#edited") == "a draft"

    again = start()
    page = open_page(again, "#id=2")
    shown(page, "2")
    assert page.get_by_test_id("expected").inner_text() == "Corrected „ü“\nsecond line"
    assert page.locator("#progress-text").inner_text() == "3 of 6 reviewed"
    assert page.locator("#badges .badge").all_inner_texts() == ["wrong", "corrected", "reviewed", "flagged"]
    page.get_by_role("radio", name="Edited").click()
    total(page, "2 rows")
    page.get_by_role("button", name="Export").click()
    page.wait_for_selector("#exported")
    assert page.locator("#exported").inner_text() == str(folder / "p.corrected.jsonl")
    exported = read_rows(folder / "p.corrected.jsonl")
    assert [record["expected"] for record in exported] == [
        "A", "Brawn fox", "Corrected „ü“\nsecond line", "D", "E", '{"sum": 4, "tax": 1}',
    ]  # fmt: skip
    assert read_rows(folder / "p.jsonl") == ROWS


def test_keys_pressed_faster_than_rows_come_skip_none(start, open_page, folder):
    write_jsonl(folder / "many.jsonl", [row(k, "A") | {"actual": "B"} for k in range(60)])
    server = start(file="many.jsonl")
    page = open_page(server)
    shown(page, "0")
    press(page, *"aaaaaaaaaasaaaaasaaaa")
    page.wait_for_timeout(500)
    here = int(page.locator("#record-name").inner_text())
    assert 1 <= here <= 21
    reviewed = [server.get(f"/api/row?row={k}")["reviewed"] for k in range(60)]
    assert reviewed == [k < here for k in range(60)]


def test_two_tabs(start, open_page):
    server = start()
    first, second = open_page(server, "#id=1"), open_page(server, "#id=1")
    shown(first, "1")
    shown(second, "1")
    press(second, "e")
    second.fill("#edited", "from the second tab")
    press(first, "e")
    first.fill("#edited", "from the first tab")
    press(first, "Control+Enter")
    said(first, "Saved.")
    press(second, "Control+Enter")
    said(second, "changed in another tab")
    # Nothing is lost: theirs is shown, the text that was typed is still there, and saving it again works.
    assert second.get_by_test_id("expected").inner_text() == "from the first tab"
    assert second.input_value("#edited") == "from the second tab"
    press(second, "Control+Enter")
    said(second, "Saved.")
    until(first, "document.querySelector('[data-testid=expected]').textContent === 'from the second tab'")


def test_compare_and_numbers(start, open_page, folder):
    page = open_page(start("--compare", write_jsonl(folder / "o.jsonl", OTHER)))
    page.get_by_role("radio", name="Fixed").click()
    total(page, "1 row")
    shown(page, "0")
    assert page.get_by_test_id("other").inner_text() == "wrong"
    page.get_by_role("radio", name="Broken").click()
    shown(page, "1")
    assert page.get_by_test_id("other").inner_text() == "Brown fox"
    page.get_by_role("radio", name="All", exact=True).click()
    total(page, "6 rows")
    press(page, "d")
    page.wait_for_selector("#scores .big")
    assert page.locator("#scores .big").inner_text() == "33.33 %"
    assert "2 of 6 right" in page.locator("#scores").inner_text()
    assert "McNemar p" in page.locator("#scores").inner_text()
    page.get_by_role("button", name="the answer is empty").click()
    total(page, "1 row")
    shown(page, "2")


def test_thinking_is_folded_away(start, open_page, folder):
    write_jsonl(folder / "thought.jsonl", [THOUGHT | {"id": "a", "thinking": "<b>Hm.</b>\nSo A."}])
    write_jsonl(folder / "o.jsonl", [THOUGHT | {"id": "a", "thinking": "Other."}])
    page = open_page(start("--compare", folder / "o.jsonl", file="thought.jsonl"))
    shown(page, "a")
    assert page.get_by_test_id("actual").inner_text() == "A"
    folded = page.locator("details.thinking")
    assert [part.locator(".text").is_visible() for part in folded.all()] == [False, False, False]
    for part in folded.all():
        part.locator("summary").click()
    assert folded.locator(".text").all_inner_texts() == ["<b>Hm.</b>\nSo A.", "Other.", "Draft."]


def test_rows_appear_while_the_file_grows(start, open_page, folder):
    page = open_page(start())
    total(page, "6 rows")
    shown(page, "0")
    with open(folder / "p.jsonl", "a") as file:
        file.write(json.dumps(row(6, "new") | {"actual": "new"}) + "\n")
    total(page, "7 rows")
    shown(page, "0")
    page.get_by_role("radio", name="Errors").click()
    total(page, "4 rows")
    with open(folder / "p.jsonl", "a") as file:
        file.write(json.dumps(row(7, "new") | {"actual": ""}) + "\n")
    page.wait_for_selector("#newer:visible")
    page.click("#newer")
    total(page, "5 rows")


def test_no_field_of_a_record_can_run_a_script(start, open_page, folder):
    evil = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"><svg onload="window.hacked=1">'
    worse = f"\"'>{evil}\u202e{{{{7*7}}}}javascript:window.hacked=1"
    fields = {worse: worse, "language": worse, "nested": {worse: worse}}
    rows = [
        {"id": worse, "messages": [{"role": "user", "content": [{"type": "text", "text": worse},
         {"type": "image", "image": worse}]}], "expected": worse, "actual": worse + "x",
         "confidence": {"min": -1, "mean": worse, "tokens": worse, "fields": {worse: {"min": -1}}},
         "finish_reason": worse, "thinking": worse, **fields},
        {"id": {"a": evil}, "messages": [{"role": worse, "content": worse, "tool_calls": [evil]},
         {"role": "assistant", "content": [{"type": "thinking", "thinking": evil}]}], "error": worse,
         "expected": json.dumps({worse: worse}), "tools": [evil], **fields},
        {"messages": evil, "expected": [evil], "actual": evil},
    ]  # fmt: skip
    write_jsonl(folder / "evil.jsonl", rows)
    with open(folder / "evil.jsonl", "a") as file:
        file.write(evil + "\n")
    write_jsonl(folder / "other.jsonl", [rows[0] | {"actual": evil}])
    page = open_page(start("--compare", folder / "other.jsonl", file="evil.jsonl"))
    for number in range(3):
        page.wait_for_timeout(200)
        assert page.locator(".row.chosen").get_attribute("aria-posinset") == str(number + 1)
        press(page, "m", "v")
        page.wait_for_selector("dialog[open]")
        press(page, "Escape", "j")
    page.click("#bad-lines")
    page.wait_for_selector("dialog[open]")
    press(page, "Escape", "d")
    page.wait_for_selector("#scores .card")
    page.select_option("#slice-by", "language")
    page.wait_for_timeout(400)
    assert page.evaluate("window.hacked") is None
    # The elements are the page's own: no script but its module, no image but its page.
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 1
    assert page.locator("svg").count() == 0
    assert page.evaluate("document.querySelectorAll('[onerror], [onload], [onclick]').length") == 0


def test_texts_of_any_kind_are_shown_and_saved_as_they_are(start, open_page, folder):
    lines = "one\r\ntwo \x1b[31m\0\u202e\u2028\r\n"
    write_jsonl(folder / "p.jsonl", [*hostile.rows(), row("r", lines, text="R?"), row("c", "a\rb", text="C?")])
    page = open_page(start())
    total(page, "112 rows")
    for number in range(1, 112):
        press(page, "j")
        until(page, "line => document.querySelector('#record-line').textContent === line", f"line {number + 1}")
    shown(page, "c")
    press(page, "e")
    page.fill("#edited", "a\nb\nc")
    press(page, "Control+Enter")
    said(page, "Saved.")
    press(page, "k")
    shown(page, "r")
    press(page, "e")
    press(page, "Control+Enter")
    said(page, "Saved.")
    assert page.evaluate("document.querySelectorAll('#record-body script, #record-body img').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    log = [json.loads(line) for line in log_path(folder / "p.jsonl").read_bytes().splitlines()]
    assert [(entry["id"], entry["expected"]) for entry in log] == [("c", "a\rb\rc"), ("r", None)]


def test_the_policy_holds_in_the_browser(start, browser):
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{start().port}/")
    blocked = """(async () => {
        const found = [];
        document.addEventListener('securitypolicyviolation', event => found.push(event.effectiveDirective));
        const script = document.createElement('script');
        try { script.textContent = 'window.hacked = 1'; document.body.append(script); } catch { found.push('trusted'); }
        try { document.body.innerHTML += '<p>'; } catch { found.push('html'); }
        const image = document.createElement('img'); image.src = 'https://example.invalid/x.png';
        document.body.append(image);
        await fetch('https://example.invalid/').catch(() => found.push('fetch'));
        await new Promise(done => setTimeout(done, 300));
        return [window.hacked ?? null, found];
    })()"""
    hacked, found = page.evaluate(blocked)
    assert hacked is None
    assert {"html", "fetch", "connect-src", "img-src"} <= set(found)
    page.close()


def test_a_foreign_page_gets_nothing(start, browser, folder):
    """A page of another origin in the same browser neither reads, embeds nor changes anything."""
    server = start()
    attacker = Server(write_jsonl(folder / "attacker.jsonl", ROWS))  # another port is another origin
    try:
        page = browser.new_page()
        page.route("**/attack", lambda route: route.fulfill(body="<title>evil</title>", content_type="text/html"))
        page.goto(f"http://127.0.0.1:{attacker.port}/attack")
        found = page.evaluate(
            """async address => {
                const tries = {};
                tries.read = await fetch(address + '/api/row?row=1').then(r => r.text(), () => 'refused');
                const forged = {row: 1, generation: 1, version: 0, expected: 'forged', reviewed: true, flagged: false};
                const body = JSON.stringify(forged);
                tries.blind = await fetch(address + '/api/review', {method: 'POST', mode: 'no-cors', body})
                    .then(r => r.type, () => 'refused');
                const headers = {'Content-Type': 'application/json'};
                tries.json = await fetch(address + '/api/review', {method: 'POST', body, headers})
                    .then(r => r.status, () => 'refused');
                const image = new Image();
                tries.image = await new Promise(done => {
                    image.onload = () => done('shown');
                    image.onerror = () => done('refused');
                    image.src = address + '/api/image?row=1&image=0&page=0';
                });
                const frame = document.createElement('iframe');
                frame.src = address + '/';
                document.body.append(frame);
                await new Promise(done => setTimeout(done, 500));
                try { tries.frame = frame.contentDocument ? 'open' : 'refused'; } catch { tries.frame = 'refused'; }
                return tries;
            }""",
            f"http://127.0.0.1:{server.port}",
        )
        assert (found["read"], found["json"], found["image"], found["frame"]) == ("refused",) * 4
        assert found["blind"] in ("opaque", "refused")
        assert log_path(folder / "p.jsonl").read_bytes() == b""
        page.close()
    finally:
        attacker.stop(signal.SIGKILL)


def test_a_long_list_scrolls_to_its_end(start, open_page, folder):
    write_jsonl(folder / "long.jsonl", [{"id": k} for k in range(300_000)])
    server = start(file="long.jsonl")
    wait_for(lambda: server.get("/api/status")["ready"], 240)
    page = open_page(server)
    total(page, "300,000 rows")
    press(page, "End")
    shown(page, "299999")
    page.wait_for_selector("#row-299999.chosen")
    box, list_box = page.locator("#row-299999").bounding_box(), page.locator("#list").bounding_box()
    assert list_box["y"] <= box["y"] <= list_box["y"] + list_box["height"] - box["height"] + 1
    page.evaluate("document.querySelector('#list').scrollTop = 7000000")
    until(page, "document.querySelector('.row .row-name')?.textContent > '1'")
    assert page.locator(".row").count() < 40


@pytest.mark.parametrize("size", [(1280, 720), (1024, 768), (820, 1180)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_usable_and_readable_at(start, open_page, size, scheme):
    page = open_page(start(), "#id=1", color_scheme=scheme)
    page.set_viewport_size({"width": size[0], "height": size[1]})
    shown(page, "1")
    for name in ("accept", "take", "edit", "flag", "next", "zoom-in", "rotate", "search", "export"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["width"] >= 24, name
        assert box["height"] >= 24, name
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= size[0], name
        assert box["y"] + box["height"] <= size[1], name
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Contrast of text to what lies behind it, WCAG 2.2's 4.5 : 1.
    poor = page.evaluate(
        """() => {
            const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
            const rgb = colour => {
                canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data];
            };
            const light = colour => {
                const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
                const [r, g, b] = rgb(colour).map(v => linear(v / 255));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const behind = element => {
                for (; element; element = element.parentElement) {
                    const colour = getComputedStyle(element).backgroundColor;
                    if (rgb(colour)[3] > 250) return colour;
                }
                return 'white';
            };
            const found = [];
            for (const element of document.querySelectorAll('body *')) {
                const text = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
                if (!text || element.disabled || !element.checkVisibility()) continue;
                const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
                if ((a + 0.05) / (b + 0.05) < 4.5) found.push(element.outerHTML.slice(0, 80));
            }
            return found;
        }"""
    )
    assert poor == []


def test_every_control_has_a_name(start, open_page):
    page = open_page(start())
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea, [role=listbox], [role=tablist]')]
            .filter(e => !e.hidden && !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length))
            .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    press(page, "?")
    assert page.locator("dialog[open] .keys tr").count() == 15
    press(page, "Escape")
    until(page, "!document.querySelector('dialog').open")
    press(page, "Tab")
    assert page.evaluate("document.activeElement !== document.body")


def test_a_predict_that_ends_keeps_the_row_and_what_is_typed(start, open_page, folder):
    rows = [row(k, "A") for k in range(4)]
    run = Predictions(folder / "run.jsonl", {"model": "m"}, [[2, 0], [3, 1]])
    run.add({2: rows[2] | {"actual": "A"}, 0: rows[0] | {"actual": "B"}})
    page = open_page(start(file="run.jsonl"), "#id=0")
    shown(page, "0")
    until(page, "document.querySelector('#reading').textContent === 'predict is at work'")
    press(page, "e")
    page.fill("#edited", "typed")
    run.add({3: rows[3] | {"actual": "A"}, 1: rows[1] | {"actual": "A"}})
    total(page, "4 rows")
    run.finish()
    until(page, "document.querySelector('#reading').textContent === ''")
    until(page, "document.querySelector('.row .row-name')?.textContent === '0'")
    shown(page, "0")
    assert page.input_value("#edited") == "typed"
    for _ in range(10):  # while the list is made again, nothing is saved and the text stays
        press(page, "Control+Enter")
        page.wait_for_timeout(1000)
        if not page.is_visible("#editor"):
            break
        assert page.input_value("#edited") == "typed"
    assert [line["id"] for line in read_rows(log_path(folder / "run.jsonl"))] == [0]


def test_training_runs_are_told_while_they_last(start, folder, open_page):
    runs = folder / "runs"
    run = write_status(runs / "happy-otter", state="training", step=1200, steps=3000, loss=0.31234, seconds_left=3940)
    (run / "loss.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="80" height="40"/>')
    page = open_page(start("--runs_dir", runs))
    line = "name => [...document.querySelectorAll('.run')].some((run) => run.innerText.replace(/\\s+/g, ' ') === name)"
    until(page, line, "happy-otter training step 1,200 of 3,000 loss 0.3123 1:05:40 left Loss curve")
    page.get_by_role("button", name="Loss curve").click()
    until(page, "document.querySelector('#plot').naturalWidth === 80")
    page.keyboard.press("Escape")
    write_status(run, state="failed", step=1201, steps=3000, error="<b>no</b> memory")
    until(page, line, "happy-otter failed: <b>no</b> memory step 1,201 of 3,000 Loss curve")
    shutil.rmtree(run)
    until(page, "document.querySelector('#runs').hidden")


def test_without_runs_nobody_asks_for_them(start, folder, open_page):
    server = start("--runs_dir", folder)
    page = open_page(server)
    shown(page, "0")
    assert page.locator("#runs").is_hidden()
    asked = []
    page.route("**/api/runs*", lambda route: (asked.append(1), route.continue_()))
    # As without the folder.
    page.route("**/api/status*", lambda route: route.fulfill(json=route.fetch().json() | {"runs": False}))
    page.reload()
    shown(page, "0")
    page.wait_for_timeout(500)
    assert asked == []


def test_a_hidden_tab_asks_for_no_runs(start, folder, open_page):
    write_status(folder / "runs/happy-otter", state="training")
    page = open_page(start("--runs_dir", folder / "runs"))
    until(page, "!document.querySelector('#runs').hidden")
    asked = []
    page.on("request", lambda request: "/api/runs" in request.url and asked.append(1))
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {get: () => window.away, configurable: true}), window.away = true"
    )
    page.wait_for_timeout(7000)
    assert len(asked) <= 1  # one may have been on its way
    asked.clear()
    page.evaluate("window.away = false, document.dispatchEvent(new Event('visibilitychange'))")
    wait_for(lambda: page.evaluate("1") and asked)
