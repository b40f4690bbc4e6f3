"""What the browser asks for, read from its requests."""

import json
import re

from starlette.exceptions import HTTPException
from starlette.requests import Request

from mistral_ft.files import JsonObject
from mistral_ft.review.desk import SHOWN, SORTS, Query

MOST_BODY = 4_000_000  # bytes of a request


async def body_of(request: Request) -> JsonObject:
    """The JSON object of a request."""
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise HTTPException(415, "expected application/json")
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > MOST_BODY:
            raise HTTPException(413, f"a request may have {MOST_BODY:,} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise HTTPException(400, "expected a JSON object")
    return found


def int_of(request: Request, name: str, default: int, most: int = 2**62) -> int:
    """A parameter that is a number from 0 on."""
    text = request.query_params.get(name, str(default))
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise HTTPException(400, f"`{name}` must be a number")
    return min(int(text), most) if int(text) >= 0 else default


def query_of(request: Request) -> Query:
    """What a request asks to be listed."""
    get = request.query_params.get
    show, sort = get("show", "all"), get("sort", "file")
    if show not in SHOWN or sort not in SORTS:
        raise HTTPException(400, "no such filter or order")
    names, values = request.query_params.getlist("field"), request.query_params.getlist("value")
    if len(names) != len(values):
        raise HTTPException(400, "every `field` needs a `value`")
    return Query(get("text", ""), show, tuple(zip(names, values, strict=True)), sort, get("descending") == "1")
