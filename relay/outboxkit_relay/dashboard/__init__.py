"""The page: what the commands show and do, in a browser; for one machine, or mounted in an application.

    app.mount("/outbox", dashboard(engine, access=who_is_it, hosts=["ops.example.org"]))

Reading order: `access` decides who may do what, and stands around everything; `views`, `failures` and `replays` read
what a page shows, through `reading`, whose every statement is bounded; `search` is its search field; `actions` change
things, each by the function of its command; `runs` carries replays out; `rendering` and `charts` make HTML and SVG.

Without a resolver it can only be read, and only from this machine. Nothing of it needs a script, a build, or a network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from outboxkit.dialects import is_about_the_row, is_unreadable, trouble_of
from outboxkit.errors import OutboxKitError
from outboxkit_relay.dashboard import failures, replays, views
from outboxkit_relay.dashboard.access import FIELD, Access, Guard, Resolver, Visitor, is_token_of, level_of
from outboxkit_relay.dashboard.actions import ACTIONS, Shown
from outboxkit_relay.dashboard.rendering import rendered
from outboxkit_relay.dashboard.runs import Runs
from outboxkit_relay.dashboard.setup import Malformed, NotFound, Setup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sqlalchemy import Engine

__all__ = ["Access", "Visitor", "dashboard"]

_HERE: Final = Path(__file__).parent
_MAX_FORM: Final = 1_000_000  # bytes
_MAX_FIELDS: Final = 50
_STATUS: Final = {NotFound: HTTPStatus.NOT_FOUND, Malformed: HTTPStatus.BAD_REQUEST}  # else 409
_PAGES: Final[Mapping[str, tuple[str, Callable[..., Any]]]] = {
    "/": ("overview.html", views.overview),
    "/messages": ("messages.html", views.messages),
    "/messages/{id:path}": ("message.html", views.message),
    "/trace": ("trace.html", views.conversation),
    "/failures": ("failures.html", failures.failures),
    "/failures/{name}": ("group.html", failures.group),
    "/letters/{id}": ("letter.html", failures.letter),
    "/replay": ("preflight.html", replays.preflight),
    "/replays": ("replays.html", replays.replays),
    "/replays/{id}": ("replay.html", replays.replay),
    "/quarantine": ("quarantine.html", views.quarantine),
    "/sagas": ("sagas.html", views.sagas),
    "/sagas/show": ("saga.html", views.saga_instance),
    "/control": ("control.html", views.control),
    "/audit": ("audit.html", views.audit),
}


def dashboard(
    engine: Engine,
    *,
    access: Resolver | None = None,
    hosts: Collection[str] = (),
    patience: timedelta = timedelta(seconds=30),
    inbox_retention: timedelta = timedelta(days=14),
    resolve: Callable[[str], str] | None = None,
) -> Starlette:
    """Makes the page, an ASGI application of its own that can be mounted in any other.

    Args:
        engine: of the outbox's database, a synchronous one; its statements run in threads.
        access: takes the request, says who it is and what they may do, or None; may be a coroutine function. Without
            one everybody on this machine may read, and nobody may change anything.
        hosts: names under which the page is reached, beside those of this machine.
        patience: a message that is pending for longer is stuck.
        inbox_retention: the setting ``retention.inbox``: how long inboxes remember.
        resolve: finds the schema text that a dead message names, when no table has it.
    """
    runs = Runs(engine, resolve)
    setup = Setup(engine=engine, patience=patience, inbox_retention=inbox_retention, resolve=resolve, runs=runs)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(runs.close)

    return Starlette(
        routes=[
            *(Route(path, _showing(setup, *page), methods=["GET"]) for path, page in _PAGES.items()),
            Route("/do/{action}", _doing(setup), methods=["POST"]),
            Mount("/static", StaticFiles(directory=_HERE / "static")),
        ],
        middleware=[Middleware(Guard, resolve=access, hosts=hosts)],
        exception_handlers={OutboxKitError: _fault, DBAPIError: _of_database, PoolTimeout: _away},
        lifespan=lifespan,
    )


def _showing(setup: Setup, template: str, view: Callable[..., Any]) -> Callable[..., Response]:
    """The endpoint of a page: one connection that only reads; starlette runs it in a thread."""

    def show(request: Request) -> Response:
        given = _possible({**request.query_params, **request.path_params})
        with setup.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            page = view(connection, setup, given)
        return rendered(request, template, page)

    return show


def _doing(setup: Setup) -> Callable[..., Any]:
    """The endpoint of all changes: the visitor has the level, the form is the visitor's own."""

    async def do(request: Request) -> Response:
        name, visitor = request.path_params["action"], request.state.visitor
        if name not in ACTIONS:
            return PlainTextResponse("there is no such action\n", HTTPStatus.NOT_FOUND)
        if not visitor.may(level_of(name)):
            why = f"you may {visitor.access.name.lower()}; this takes {level_of(name).name.lower()}\n"
            return PlainTextResponse(why, HTTPStatus.FORBIDDEN)
        form = await _form(request)
        if form is None:
            return PlainTextResponse("the form is too large, or none\n", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if not is_token_of(request, form.get(FIELD, "")):
            return PlainTextResponse("this form was not made for you: load the page again\n", HTTPStatus.FORBIDDEN)
        try:
            result = await run_in_threadpool(ACTIONS[name], setup, _possible(form), visitor.name)
        except (KeyError, ValueError) as error:
            return _bad_request(request, error)
        if isinstance(result, Shown):
            return await run_in_threadpool(rendered, request, result.template, result.page)
        return RedirectResponse(request.scope.get("root_path", "") + result, HTTPStatus.SEE_OTHER)

    return do


async def _form(request: Request) -> dict[str, str] | None:
    """The fields of a form; None when it is larger than any of ours."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_FORM:
                return None
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MAX_FIELDS, strict_parsing=True))
    except (ValueError, ClientDisconnect):
        return None


def _possible(given: Mapping[str, str]) -> Mapping[str, str]:
    """Refuses what no text of a database can hold, before one database takes it and another does not."""
    for name, value in given.items():
        if "\0" in value:
            raise Malformed(f"{name} holds a NUL character, which is in no name or text here")
    return given


def _bad_request(request: Request, error: Exception) -> Response:
    if isinstance(error, OutboxKitError):
        return _fault(request, error)
    return PlainTextResponse("a field of this form is missing, or is not what it should be\n", HTTPStatus.BAD_REQUEST)


def _fault(request: Request, error: Exception) -> Response:
    """A refusal, told where the change was asked for."""
    status = next((told for kind, told in _STATUS.items() if isinstance(error, kind)), HTTPStatus.CONFLICT)
    text = error.message if isinstance(error, OutboxKitError) else ""
    return rendered(request, "fault.html", text, status=status)


def _of_database(request: Request, error: Exception) -> Response:
    """A value that the database refuses is the visitor's; everything else keeps the page from being shown at all."""
    if is_unreadable(error):
        text = (
            "A stored row cannot be read: bytes that are no text, or a damaged page. `outboxkit doctor` looks for it."
        )
        return rendered(request, "fault.html", text, status=HTTPStatus.INTERNAL_SERVER_ERROR)
    if trouble_of(error) is None and (isinstance(error, DataError) or is_about_the_row(error)):
        return _fault(request, Malformed("a value is too large, or too long, for the database"))
    return _away(request, error)


def _away(request: Request, _: Exception) -> Response:
    text = "The database does not answer. Messages wait in it, and nothing is lost."
    return rendered(request, "fault.html", text, status=HTTPStatus.SERVICE_UNAVAILABLE)
