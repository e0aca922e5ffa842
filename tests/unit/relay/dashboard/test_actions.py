"""What is pressed on the page is done by the functions of the commands, once, under the visitor's name."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, update

from outboxkit import dead_letters, tables
from outboxkit.dead_letters import State, plan
from outboxkit.headers import pack_headers
from outboxkit.outbox import pauses
from outboxkit_relay.dashboard import Access
from outboxkit_relay.dashboard.access import COOKIE, FIELD
from tests.deadlines import DEADLINE
from tests.unit.relay.dashboard.world import HERE, Browser, bury, rows, uuid_of, waiting

LETTERS = tables.dead_letters.c


def group_of(engine: Engine, error: str = "KeyError") -> str:
    return next(str(row["group"]) for row in rows(engine, tables.dead_letters) if row["error_class"] == error)


def letter_of(engine: Engine, error: str = "KeyError") -> str:
    return next(str(row["id"]) for row in rows(engine, tables.dead_letters) if row["error_class"] == error)


def state_of(engine: Engine, letter: str) -> str:
    with engine.connect() as connection:
        found = dead_letters.get(connection, UUID(letter))
    assert found is not None
    return found.state.value


def told(engine: Engine, action: str) -> list[tuple[str, str]]:
    return [(row["who"], row["why"]) for row in rows(engine, tables.outbox_audit) if row["action"] == action]


def replay_of(engine: Engine, number: UUID) -> plan.Replay:
    with engine.connect() as connection:
        (found,) = plan.replays(connection, number)
    return found


def wait_for(engine: Engine, number: UUID, is_it: Any) -> plan.Replay:
    deadline, pause = time.monotonic() + DEADLINE, threading.Event()
    while not is_it(found := replay_of(engine, number)):
        assert time.monotonic() < deadline, found
        pause.wait(0.01)
    return found


def queued(engine: Engine) -> list[str]:
    """Ids of letters in the outbox rows that replays have written."""
    return [row["message_id"].hex for row in rows(engine, tables.outbox_messages) if row["topic"] == "orders"]


# --- replays -----------------------------------------------------------------------------------------------------


def test_a_button_pressed_twice_replays_exactly_the_letters_that_were_shown_once(browser: Browser) -> None:
    engine = browser.engine
    with engine.begin() as connection:
        for at in range(332):
            bury(connection, offset=1000 + at, key=f"order-{at % 5}".encode())
    group = group_of(engine)
    with engine.begin() as connection:  # one cause, whatever lines of code it came through
        connection.execute(update(tables.dead_letters).where(LETTERS.error_class == "KeyError").values(group=group))
    assert "344" in browser.get(f"/failures/{group}")
    page = browser.get(f"/replay?group={group}&limit=100")
    assert "244 stay" in page
    form = browser.fields(f"/replay?group={group}&limit=100", "replay")
    shown = form["ids"].split()
    assert len(shown) == len(set(shown)) == 100
    with engine.begin() as connection:
        bury(connection, offset=5000)  # dies between the look and the button: it was not looked at

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: browser.send("replay", **form, canary="0", why="mended"), range(4)))
    answers.append(browser.send("replay", **form, canary="0", why="mended"))

    assert {answer.status_code for answer in answers} == {200}
    assert {str(answer.url) for answer in answers} == {f"{HERE}/replays/{form['number']}"}
    found = wait_for(engine, UUID(form["number"]), lambda one: not one.waiting)
    assert (found.chosen, found.queued, found.requested_by, found.why) == (100, 100, "ana", "mended")
    replaying = {str(row["id"]) for row in rows(engine, tables.dead_letters) if row["state"] == "replaying"}
    assert replaying == set(shown)
    assert Counter(Counter(queued(engine)).values()) == {1: 100}
    assert told(engine, "dlq.replay") == [("ana", "mended")]


def test_letters_go_out_in_the_original_order_of_their_key(browser: Browser) -> None:
    group = group_of(browser.engine)

    answer = browser.press(f"/replay?group={group}", "replay", canary="0", why="x")

    wait_for(browser.engine, uuid_of(answer.url), lambda one: not one.waiting)
    by_id = {UUID(row["message_id"]).hex: row for row in rows(browser.engine, tables.dead_letters) if row["message_id"]}
    sent = sorted(rows(browser.engine, tables.outbox_messages), key=lambda row: row["position"])
    order = [by_id[row["message_id"].hex] for row in sent if row["topic"] == "orders"]
    for key in {row["key"] for row in order}:
        positions = [row["source_position"] for row in order if row["key"] == key]
        assert positions == sorted(positions)
        assert len(positions) > 1


def test_the_first_letters_decide_whether_the_rest_is_sent(browser: Browser) -> None:
    engine = browser.engine
    answer = browser.press(f"/replay?group={group_of(engine)}", "replay", canary="2", why="x")
    number = uuid_of(answer.url)

    found = wait_for(engine, number, lambda one: one.queued == 2)
    assert found.waiting == 10
    assert "the rest waits until they take effect" in browser.get(f"/replays/{number}")
    with engine.begin() as connection:  # their consumer has handled them
        handled = {"state": State.REPLAYED, "closed_at": tables.dead_letters.c.died_at}
        connection.execute(update(tables.dead_letters).where(LETTERS.state == "replaying").values(**handled))

    assert wait_for(engine, number, lambda one: not one.waiting).queued == 12


def test_a_replay_stops_where_it_is_and_goes_on(browser: Browser) -> None:
    engine = browser.engine
    answer = browser.press(f"/replay?group={group_of(engine)}", "replay", canary="1", rate="0.5", why="x")
    number = uuid_of(answer.url)
    wait_for(engine, number, lambda one: one.queued == 1)

    form = browser.fields(f"/replays/{number}", "stop")
    page = browser.send("stop", **form).text
    assert "no longer as it was shown" not in page
    assert "11 letters were not sent" in page
    assert replay_of(engine, number).state == "stopped"
    browser.press(f"/replays/{number}", "go-on")
    assert wait_for(engine, number, lambda one: not one.waiting).queued == 12
    assert "no longer as it was shown" in browser.send("stop", **form).text
    assert [told(engine, f"dlq.replay.{what}")[0][0] for what in ("stop", "resume")] == ["ana", "ana"]


def test_what_cannot_be_replayed_is_left_out_with_the_reason(browser: Browser) -> None:
    engine = browser.engine
    letter = letter_of(engine)
    with engine.begin() as connection:
        many = {"generation": 3}
        connection.execute(update(tables.dead_letters).where(LETTERS.id == UUID(letter)).values(**many))

    page = browser.get(f"/replay?group={group_of(engine)}")
    assert "11 letters can be replayed, 11 to billing" in page
    assert "1 letter is left out: it was replayed 3 times and died each time" in page
    assert "cannot be replayed as it is" in browser.get(f"/letters/{letter}")
    forced = browser.get(f"/replay?group={group_of(engine)}&force=on")
    assert "12 letters can be replayed" in forced


def test_the_preflight_says_what_is_in_the_way(browser: Browser) -> None:
    engine = browser.engine
    with engine.begin() as connection:
        connection.execute(tables.outbox_relays.delete())
        connection.execute(tables.inbox_consumers.delete())
        pauses.pause(connection, pauses.Target(pauses.Scope.DESTINATION, "orders"), by="ben", reason="x")

    page = browser.get(f"/replay?group={group_of(engine)}")

    assert "no relay is alive" in page
    assert "no process of billing is known to run" in page
    assert "paused on the way: orders" in page


def test_a_reader_sees_the_preflight_and_no_button(furnished: Engine) -> None:
    page = Browser(furnished, Access.READ).get(f"/replay?group={group_of(furnished)}")

    assert "12 letters can be replayed" in page
    assert "<button" not in page


@pytest.mark.parametrize(
    "wrong",
    [{"canary": "-1"}, {"canary": "x"}, {"rate": "0"}, {"rate": "nan"}, {"rate": "inf"}, {"ids": ""}, {"ids": "x"}],
)
def test_a_wrong_number_is_refused_with_a_line(browser: Browser, wrong: dict[str, str]) -> None:
    answer = browser.press(
        f"/replay?group={group_of(browser.engine)}", "replay", **{"canary": "0", "why": "x", **wrong}
    )

    assert answer.status_code in (400, 409)
    assert not rows(browser.engine, tables.dead_letter_replays)


# --- letters -----------------------------------------------------------------------------------------------------


def test_a_letter_is_repaired_checked_and_sent_under_a_new_id(browser: Browser) -> None:
    engine, letter = browser.engine, letter_of(browser.engine)
    path = f"/letters/{letter}"
    form = browser.fields(path, "reveal")

    wrong = browser.send("repair", **form, text='{"order": 7', step="check").text
    assert "not JSON at line 1" in wrong
    assert "{&#34;order&#34;: 7" in wrong
    checked = browser.send("repair", **form, text='{"order": 7, "currency": "USD"}\r\n', step="check").text
    assert "USD" in checked
    assert "It is valid" in checked
    assert state_of(engine, letter) == "dead"
    sent = browser.send("repair", **form, text='{"order": 7, "currency": "USD"}', step="send", why="wrong currency")
    again = browser.send("repair", **form, text='{"order": 7, "currency": "USD"}', step="send", why="wrong currency")

    assert "on its way" in sent.text
    assert "is replayed" in again.text
    (child,) = [row for row in rows(engine, tables.dead_letters) if row["parent_id"] == UUID(letter)]
    assert json.loads(child["payload"])["currency"] == "USD"
    assert (child["state"], state_of(engine, letter)) == ("replaying", "replayed")
    assert told(engine, "dlq.repair") == [("ana", "wrong currency")]
    assert str(child["id"]) in browser.get(path)


def test_a_letter_shows_which_places_are_the_applications_own(browser: Browser) -> None:
    page = browser.get(f"/letters/{letter_of(browser.engine)}")

    assert re.search(r"world\.py:\d+ in _(charge|pick|refund)  your code", page)


def test_a_letter_is_discarded_with_a_reason_and_what_is_behind_it_goes_on(browser: Browser) -> None:
    engine, letter = browser.engine, letter_of(browser.engine)
    with engine.begin() as connection:
        row = {"side": "relay", "consumer": "", "key": b"order-9", "source_position": 77}
        connection.execute(update(tables.dead_letters).where(LETTERS.id == UUID(letter)).values(**row))
        connection.execute(update(tables.outbox_stopped_keys).values(reason="parked", due_at=None))

    assert browser.press(f"/letters/{letter}", "discard", why=" ").status_code == 409
    assert state_of(engine, letter) == "dead"
    browser.press(f"/letters/{letter}", "discard", why="a test order")

    assert state_of(engine, letter) == "discarded"
    assert told(engine, "dlq.discard") == [("ana", "a test order")]
    assert rows(engine, tables.outbox_stopped_keys)[0]["request"] == "skip"


def test_all_letters_of_a_page_are_discarded_and_no_other(browser: Browser) -> None:
    engine = browser.engine
    group = group_of(engine, "StockUnknown")

    browser.press(f"/failures/{group}", "discard", why="the warehouse is closed")

    states = Counter((row["error_class"], row["state"]) for row in rows(engine, tables.dead_letters))
    assert states["StockUnknown", "discarded"] == 3
    assert states["KeyError", "dead"] == 12


def test_what_was_discarded_is_counted_and_what_was_not_is_told(browser: Browser) -> None:
    engine, (first, second, third) = (
        browser.engine,
        [str(row["id"]) for row in rows(browser.engine, tables.dead_letters)[:3]],
    )
    form = browser.fields(f"/letters/{first}", "discard")

    def discard(*letters: str) -> Any:
        return browser.send("discard", **{**form, "ids": " ".join(letters), "why": "x"})

    assert "Discarded: 1 letter.<" in discard(first).text
    again = discard(first)
    assert "no longer as it was shown" in again.text
    assert "Discarded" not in again.text
    assert "Discarded: 1 letter. 2 letters left alone: no longer as shown." in discard(first, second, str(uuid4())).text
    with engine.begin() as connection:
        connection.execute(update(tables.dead_letters).where(LETTERS.id == UUID(third)).values(state="replaying"))
    assert "no longer as it was shown" in discard(first, third).text
    assert state_of(engine, third) == "replaying"
    assert discard(str(uuid4())).status_code == 404
    assert told(engine, "dlq.discard") == [("ana", "x")] * 2


def test_more_letters_than_a_page_takes_are_refused_and_none_is_discarded(browser: Browser) -> None:
    letter = letter_of(browser.engine)
    form = browser.fields(f"/letters/{letter}", "discard")

    answer = browser.send(
        "discard", **{**form, "ids": " ".join([letter, *(str(uuid4()) for _ in range(1_000))])}, why="x"
    )

    assert answer.status_code == 409
    assert "1 to 1,000 letters at once" in answer.text
    assert state_of(browser.engine, letter) == "dead"


def test_a_note_is_kept_with_its_cause(browser: Browser) -> None:
    group = group_of(browser.engine)

    page = browser.press(f"/failures/{group}", "note", note="see ticket 12", owner="billing team").text

    assert "see ticket 12 (billing team)" in page
    assert "see ticket 12" in browser.get("/failures")


# --- keys, sagas, control ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["release", "skip"])
def test_a_request_is_about_the_head_that_was_shown(browser: Browser, what: str) -> None:
    engine, form = browser.engine, browser.fields("/quarantine", "release")
    with engine.begin() as connection:
        connection.execute(update(tables.outbox_stopped_keys).values(position=78))

    assert "no longer as it was shown" in browser.send(what, **form, why="x").text
    assert rows(engine, tables.outbox_stopped_keys)[0]["request"] is None

    assert "Asked." in browser.press("/quarantine", "release", why="x").text if what == "release" else True
    browser.send(what, **browser.fields("/quarantine", "release"), why="the queue is larger now")
    assert rows(engine, tables.outbox_stopped_keys)[0]["request"] == what
    assert ("ana", "the queue is larger now") in told(engine, f"quarantine.{what}")


def test_a_pause_is_set_seen_and_ended(browser: Browser) -> None:
    token = browser.fields("/control", "pause")
    browser.send("pause", **token, scope="key", name="orders", key="order \\xff", why="a bad key", lasts="30m")

    page = browser.get("/control")
    assert "orders order\\x20\\xff" in unescape(page) or "orders order \\xff" in unescape(page)
    assert "a bad key" in browser.get("/")
    with browser.engine.connect() as connection:
        held = {one.target.key: one for one in pauses.pauses(connection)}
    assert held[b"order \xff"].until is not None
    done = browser.send("resume", **token, scope="key", name="orders", key="order \\xff")
    assert "Resumed." in done.text
    assert "no longer as it was shown" in browser.send("resume", **token, scope="key", name="orders", key="z").text
    assert told(browser.engine, "control.pause")[-1] == ("ana", "a bad key")


@pytest.mark.parametrize(
    "wrong", [{"why": " "}, {"lasts": "soon"}, {"lasts": "-1h"}, {"name": "\x1b"}, {"scope": "world"}, {"scope": "key"}]
)
def test_a_wrong_pause_is_refused_with_a_line(browser: Browser, wrong: dict[str, str]) -> None:
    token = browser.fields("/control", "pause")
    before = rows(browser.engine, tables.outbox_control)

    form = {**token, "scope": "destination", "name": "orders", "why": "x", "lasts": "", **wrong}
    answer = browser.send("pause", **form)

    is_key = wrong == {"scope": "key"}  # an empty key is a key
    assert answer.status_code == 200 if is_key else answer.status_code in (400, 409)
    assert is_key or rows(browser.engine, tables.outbox_control) == before


def test_a_saga_is_asked_to_go_on_and_to_undo(browser: Browser) -> None:
    path = "/sagas/show?saga=checkout&key=order-7"

    browser.press(path, "resume-saga", why="the bank is back")
    browser.send("compensate", **browser.fields(path, "resume-saga"), why="the customer has left")

    sent = [row["type"] for row in rows(browser.engine, tables.outbox_messages) if row["topic"] == "checkout.timers"]
    assert len(sent) == 2
    whys = [row["why"] for row in rows(browser.engine, tables.outbox_audit) if row["action"].startswith("saga")]
    assert whys == ["the bank is back", "the customer has left"]
    assert browser.client.get("/sagas/show?saga=checkout&key=none").status_code == 404


@pytest.mark.parametrize(
    ("status", "action"), [("completed", "resume-saga"), ("completed", "compensate"), ("compensating", "compensate")]
)
def test_a_saga_that_has_gone_on_since_its_page_was_loaded_is_left_as_it_is(
    browser: Browser, status: str, action: str
) -> None:
    form = browser.fields("/sagas/show?saga=checkout&key=order-7", "resume-saga")
    with browser.engine.begin() as connection:
        connection.execute(update(tables.outbox_sagas).values(status=status))
    before = rows(browser.engine, tables.outbox_messages)

    answer = browser.send(action, **form, why="x")

    assert "no longer as it was shown" in answer.text
    assert rows(browser.engine, tables.outbox_messages) == before
    assert not told(browser.engine, f"saga.{action.removesuffix('-saga')}")


def test_a_scheduled_message_is_cancelled(browser: Browser) -> None:
    form = browser.fields("/messages?q=state:scheduled", "cancel")

    assert "Cancelled." in browser.send("cancel", **form, why="not wanted").text
    assert "no longer as it was shown" in browser.send("cancel", **form, why="not wanted").text
    assert told(browser.engine, "messages.cancel") == [("ana", "not wanted")]


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/letters/none", "/letters/018f0000-0000-7000-8000-000000000000", "/failures/none", "/replay?group=none",
             "/replay?letter=x", "/replays/018f0000-0000-7000-8000-000000000000", "/replay"],
)  # fmt: skip
def test_what_is_not_there_is_told_with_a_line(browser: Browser, path: str) -> None:
    answer = browser.client.get(path)

    assert answer.status_code == 404
    assert "That was not done" in answer.text


def test_a_form_without_a_field_is_refused(browser: Browser) -> None:
    browser.get("/")
    for action in ("replay", "note", "reveal", "repair", "release", "pause", "cancel", "stop"):
        answer = browser.send(action, **{FIELD: browser.client.cookies[COOKIE]})
        assert answer.status_code in (400, 409), action


def test_a_database_that_is_away_is_told_and_no_more(furnished: Engine) -> None:
    browser = Browser(furnished)
    with furnished.begin() as connection:
        tables.outbox_relays.drop(connection)

    answer = browser.client.get("/")

    assert answer.status_code == 503
    assert "The database does not answer" in answer.text
    assert "outbox_relays" not in answer.text


# --- one message -------------------------------------------------------------------------------------------------


def test_a_message_is_followed_from_the_list_to_its_letter_and_its_replay(browser: Browser) -> None:
    letter = letter_of(browser.engine)
    (message,) = re.findall(r'href="(/messages/[^"]+)"', browser.get(f"/letters/{letter}"))
    assert "died" in browser.get(message)
    assert f"/letters/{letter}" in browser.get(message)
    answer = browser.press(f"/replay?letter={letter}", "replay", canary="0", why="mended")
    wait_for(browser.engine, uuid_of(answer.url), lambda one: not one.waiting)

    page = browser.get(message)

    assert "in the outbox for orders" in page
    assert "mended" in page
    assert browser.client.get("/messages/none").status_code == 404


def test_a_message_that_waits_leads_to_its_timeline(browser: Browser) -> None:
    page = browser.get("/messages?q=state:scheduled")
    (message,) = re.findall(r'href="(/messages/[^"]+)"', page)

    assert "scheduled for" in browser.get(message)


def test_a_conversation_is_shown_as_causes_and_effects(browser: Browser) -> None:
    """Each message stands below the one that caused it, also where the causes go in a circle."""
    with browser.engine.begin() as connection:
        order, bill, mail = (str(uuid4()) for _ in range(3))
        for message_id, cause, name in (
            (mail, bill, "mail.sent"),
            (bill, order, "bill.made"),
            (order, mail, "order.new"),
        ):
            names = (("ce_id", message_id), ("ce_type", name), ("ce_correlationid", "c-77"), ("ce_causationid", cause))
            headers = pack_headers(tuple((header, value.encode()) for header, value in names))
            row = waiting(message_id=UUID(message_id), key=b"order-77", type=name, headers=headers)
            connection.execute(tables.outbox_messages.insert().values(**row))
    circle = browser.get("/trace?q=c-77")
    with browser.engine.begin() as connection:
        one = tables.outbox_messages.c.message_id == UUID(order)
        first = pack_headers((("ce_id", order.encode()), ("ce_type", b"order.new"), ("ce_correlationid", b"c-77")))
        connection.execute(tables.outbox_messages.update().where(one).values(headers=first))

    page = browser.get("/trace?q=order-77")

    shown = re.findall(r'<li class="depth-(\d)"><a class="row" href="/messages/([^"]+)"', page)
    assert shown == [("0", order), ("1", bill), ("2", mail)]
    assert page.count("in the outbox for orders") == 3
    assert circle.count("in the outbox for orders") == 3
    assert len(re.findall('<li class="depth-', circle)) == 3
    assert "Nothing of this name" in browser.get("/trace?q=none")
    assert browser.client.get("/trace").status_code == 200
