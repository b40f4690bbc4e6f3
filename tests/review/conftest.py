"""A review server on rows, within the test's own process."""

import contextlib
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mistral_ft.review.app import ReviewApp
from mistral_ft.review.desk import Desk
from mistral_ft.review.guard import Guard
from mistral_ft.review.log import ReviewLog
from mistral_ft.review.tokens import TokenView
from tests.conftest import write_jsonl
from tests.helpers.review import HOST, ROWS, Server, wait_for


@pytest.fixture
def serve(tmp_path):
    """serve(rows or path, …) -> a client of a server on them."""
    with contextlib.ExitStack() as stack:

        def start(rows=ROWS, other=None, model=None, host="127.0.0.1", token=None, images=None, runs=None):
            path = rows if isinstance(rows, Path) else write_jsonl(tmp_path / "p.jsonl", rows)
            log = ReviewLog(path)
            stack.callback(log.close)
            app = ReviewApp(Desk(path, log, other), images or path.parent, TokenView(model and str(model)), runs)
            client = TestClient(
                Guard(app.starlette(), host, 8000, token), base_url=HOST, raise_server_exceptions=False,
                follow_redirects=False,
            )  # fmt: skip
            stack.enter_context(client)
            wait_for(lambda: app.desk.ready)
            return client

        yield start


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    running = Server(write_jsonl(folder / "p.jsonl", ROWS))
    yield running
    running.stop()
