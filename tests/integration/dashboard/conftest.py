"""A browser as people have one, and a shop whose messages fail until somebody mends its handler."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import uvicorn
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.applications import Starlette

from outboxkit import Consumer, RetryPolicy, event, migrations, publish
from outboxkit.dialects import open_engine
from outboxkit_relay import Relay, settings
from outboxkit_relay.dashboard import Access, Visitor, dashboard
from tests.deadlines import DEADLINE

if TYPE_CHECKING:  # at run time in the full profile only
    from playwright.sync_api import Browser, Locator, Page

AXE = "axe-core@4.14.1"
AXE_SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
QUIET = ("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update")


@event("order.placed", version=1)
@dataclass(frozen=True)
class OrderPlaced:
    number: int


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert program, "there is no Chromium; scripts/test --full installs it on Debian"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*QUIET, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core, which looks for barriers; it is no part of this repository."""
    folder = tmp_path_factory.mktemp("axe")
    subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, check=True, capture_output=True)
    (package,) = folder.glob("*.tgz")
    assert base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode() == AXE_SHA512
    with tarfile.open(package) as content:
        script = content.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    found = open_engine(database_url, patience=timedelta(seconds=30))
    with found.begin() as connection:
        migrations.upgrade(connection)
    yield found
    found.dispose()


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The address of an application while the block runs."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="on")
    listener = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def page_of(engine: Engine) -> Iterator[str]:
    """The page over a database, for a visitor who may do everything."""
    with served(dashboard(engine, access=lambda _: Visitor(name="ana@ops", access=Access.ALL))) as address:
        yield address


@contextmanager
def looking(
    chromium: Browser, *, width: int = 1300, scheme: str = "light", script: bool = True, may_complain: bool = False
) -> Iterator[Page]:
    """A window; what the browser complains about is an error."""
    shape: Any = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    context = chromium.new_context(**shape, java_script_enabled=script)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert may_complain or complaints == []


def expect(what: Locator) -> Any:
    """Waits for a fact about a part of a page."""
    from playwright.sync_api import expect as expected

    expected.set_options(timeout=DEADLINE * 1000)
    return expected(what)


def content(page: Page, address: str = "") -> str:
    """The page as it is when it is loaded (again)."""
    page.goto(address or page.url)
    text: str = page.content()
    return text


@dataclass
class Shop:
    """A consumer that fails until it is mended, and a relay."""

    engine: Engine
    broker: str = field(default_factory=lambda: f"memory://{uuid4().hex}")
    is_mended: bool = False
    handled: list[int] = field(default_factory=list)

    @contextmanager
    def open(self, folder: Path) -> Iterator[None]:
        """Relay and consumer run while the block does."""
        file = folder / "outboxkit.toml"
        url = self.engine.url.render_as_string(hide_password=False)
        file.write_text(f'database_url = "{url}"\nbroker_url = "{self.broker}"\n')
        with Relay(settings.load(file)), self._consuming():
            yield

    def place(self, *numbers: int) -> None:
        """Commits an order each, of three customers."""
        with Session(self.engine) as session, session.begin():
            for number in numbers:
                publish(session, OrderPlaced(number), topic="orders", key=f"customer-{number % 3}")

    @contextmanager
    def _consuming(self) -> Iterator[None]:
        consumer = Consumer("billing", sessions=sessionmaker(self.engine), retry=RetryPolicy(poison=KeyError))

        @consumer.on(OrderPlaced, topic="orders")
        def charge(event: OrderPlaced, session: Session) -> None:
            if not self.is_mended:
                _ = {"amount": event.number}["currency"]
            self.handled.append(event.number)

        loop = asyncio.new_event_loop()
        stop = asyncio.Event()
        thread = threading.Thread(target=lambda: loop.run_until_complete(consumer.run(self.broker, stop)))
        thread.start()
        try:
            yield
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()


@pytest.fixture
def shop(engine: Engine, tmp_path: Path) -> Iterator[Shop]:
    found = Shop(engine)
    with found.open(tmp_path):
        yield found
