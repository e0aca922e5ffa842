"""Rendering: a view becomes HTML. Every value that a template writes is made inert first, whoever has chosen it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from outboxkit_relay import words
from outboxkit_relay.dashboard import charts
from outboxkit_relay.dashboard.access import COOKIE, Access, token_of

__all__ = ["FRAGMENT", "rendered"]

FRAGMENT: Final = "x-fragment"  #: header: only the part that changes is wanted
_HERE: Final = Path(__file__).parent
_NUMBER: Final = re.compile("[0-9]{1,4}")
#: what was done; an address names it, so that no text of an address is shown
_DONE: Final = {
    "asked": "Asked. It is done within seconds.",
    "cancelled": "Cancelled.",
    "discarded": "Discarded: {number}.{left}",
    "moved": "Nothing was changed: it is no longer as it was shown.",
    "noted": "Noted.",
    "paused": "Paused. Relays obey within seconds.",
    "repaired": "The repaired message is on its way, under a new id.",
    "resumed": "Resumed.",
}


def rendered(request: Request, template: str, page: Any, *, status: int = 200) -> Response:
    """The answer that shows a view."""
    token = token_of(request)
    root = request.scope.get("root_path", "")
    text = (
        _environment()
        .get_template(template)
        .render(
            page=page,
            layout="fragment.html" if FRAGMENT in request.headers else "layout.html",
            root=root,
            here=request.url.path.removeprefix(root),
            visitor=request.state.visitor,
            Access=Access,
            csrf=token,
            done=_done(request.query_params),
            now=datetime.now(UTC),
        )
    )
    answer = HTMLResponse(text, status)
    if request.cookies.get(COOKIE) != token:
        is_secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, token, path=root or "/", httponly=True, samesite="strict", secure=is_secure)
    return answer


def _done(query: Mapping[str, str]) -> str:
    """Tells what was done, as the address names it: only numbers of an address are shown."""
    number, left = (int(text) if _NUMBER.fullmatch(text := query.get(name, "")) else 0 for name in ("number", "left"))
    others = f" {words.count(left, 'letter')} left alone: no longer as shown." if left else ""
    return _DONE.get(query.get("done", ""), "").format(number=words.count(number, "letter"), left=others)


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_inert,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"ago": _ago, "n": lambda number: f"{number:,}", "text": words.text_of, "count": words.count}
    found.filters["shortened"] = words.shortened
    found.filters |= {
        "seconds": lambda number: words.ago(timedelta(seconds=number)),
        "time": _time,
        "sparkline": charts.sparkline,
        "share": charts.share,
    }
    return found


def _inert(value: Any) -> Any:
    return value if isinstance(value, Markup) else words.safe(value)


def _ago(since: datetime | None, now: datetime) -> str:
    return "-" if since is None else f"{words.ago(now - since)} ago" if since <= now else f"in {words.ago(since - now)}"


def _time(at: datetime | None) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if at else "-"
