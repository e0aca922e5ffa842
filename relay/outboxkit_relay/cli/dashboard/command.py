"""``outboxkit dashboard``: serves the page on this machine, to whoever has the address that it prints."""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import click

from outboxkit.policy import duration
from outboxkit_relay.cli.console import database
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.cli.dlq.replays import resolver
from outboxkit_relay.daemon import lifecycle

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from outboxkit_relay.cli.main import Invocation
    from outboxkit_relay.dashboard import Visitor
    from outboxkit_relay.settings import Settings

__all__ = ["command", "page"]

_HOST: Final = "127.0.0.1"
_COOKIE: Final = "outboxkit-page"
_LEVELS: Final = ("read", "operate", "all")


@click.command()
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65_535), help="0 takes a free one.")
@click.option(
    "--access",
    type=click.Choice(_LEVELS),
    default="read",
    show_default=True,
    help="operate: replay, pause, resume. all: also reveal payloads, repair, discard.",
)
@click.option("--limit", default="30s", show_default=True, help="A message that is pending longer is stuck.")
@click.pass_obj
def command(invocation: Invocation, port: int, access: str, limit: str) -> None:
    """Serve a page that shows what the commands show, until SIGTERM or SIGINT.

    It listens on this machine only, and answers only to whoever opens the address that it prints: the address holds a
    token. What is done there is in the audit log under your name. From afar: ssh -L, or kubectl port-forward.
    """
    import uvicorn

    token = secrets.token_urlsafe(24)
    with database.opened(invocation) as engine:
        with database.connect(engine) as connection:
            lifecycle.require_tables(connection)
        app = page(engine, invocation.settings, token=token, access=access, limit=limit)
        config = uvicorn.Config(
            app,
            host=_HOST,
            port=port,
            log_config=None,
            log_level="warning",  # its start is told by the address
            access_log=False,
            server_header=False,
            lifespan="on",
        )
        listener = config.bind_socket()
        listener.listen(config.backlog)  # whoever opens the address at once waits for the page, and is not turned away
        click.echo(f"http://{_HOST}:{listener.getsockname()[1]}/enter?token={token}")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="outboxkit-page")
        with lifecycle.stop_on_signals(lambda: setattr(server, "should_exit", True)):
            thread.start()  # there uvicorn leaves signals alone, and the command ends with 0
            thread.join()


def page(engine: Engine, settings: Settings, *, token: str, access: str, limit: str) -> Starlette:
    """The page behind its entrance: ``/enter`` changes the token of the address for a cookie.

    The page stands under a path that nobody can guess, and its cookies are for that path: a browser sends cookies of
    this machine to whatever listens on any of its ports.
    """
    from starlette.applications import Starlette
    from starlette.routing import Mount, Route

    from outboxkit_relay.dashboard import Access, Visitor, dashboard

    visitor = Visitor(name=f"{who()} (page)", access=Access[access.upper()])
    session, place = secrets.token_urlsafe(24), f"/{secrets.token_urlsafe(12)}"
    inner = dashboard(
        engine,
        access=_holder(session, visitor),
        patience=duration(limit),
        inbox_retention=settings.retention.inbox,
        resolve=resolver(settings),
    )
    return Starlette(
        routes=[
            Route("/enter", _entrance(token, session, place)),
            Mount(place, inner),
            Route("/{elsewhere:path}", _closed),
        ],
        lifespan=inner.router.lifespan_context,
    )


def _holder(session: str, visitor: Visitor) -> Callable[[Request], Visitor | None]:
    def resolve(request: Request) -> Visitor | None:
        given = request.cookies.get(_COOKIE, "")
        return visitor if hmac.compare_digest(given.encode(), session.encode()) else None

    return resolve


def _entrance(token: str, session: str, place: str) -> Callable[[Request], Response]:
    from starlette.responses import RedirectResponse

    from outboxkit_relay.dashboard.access import why_not_host

    def enter(request: Request) -> Response:
        given = request.query_params.get("token", "")
        is_ours = not why_not_host(request.headers.get("host", ""), ())
        if not is_ours or not hmac.compare_digest(given.encode(), token.encode()):
            return _closed(request)
        answer = RedirectResponse(f"{place}/", HTTPStatus.SEE_OTHER)
        answer.set_cookie(_COOKIE, session, path=place, httponly=True, samesite="strict")
        return answer

    return enter


def _closed(_: Request) -> Response:
    from starlette.responses import PlainTextResponse

    why = "this is not the address that `outboxkit dashboard` has printed: open that one\n"
    return PlainTextResponse(why, HTTPStatus.UNAUTHORIZED)
