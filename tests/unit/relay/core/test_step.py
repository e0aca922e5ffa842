"""The core, event by event: the corners that a whole simulation reaches only now and then."""

from __future__ import annotations

from datetime import timedelta

from outboxkit.policy import Failure, Followers, Order
from outboxkit.rows import microseconds
from outboxkit_relay.core.protocol import (
    Fetch,
    GiveUp,
    Leave,
    Owned,
    Rebalance,
    Settle,
    Settled,
    StopRelay,
    Tick,
    Woken,
)
from outboxkit_relay.core.state import RelayConfig
from tests.unit.relay.core.builders import ALL, NOW, Core, K, only, row, sent


def test_a_keyless_message_that_was_refused_goes_out_again_when_it_is_due() -> None:
    core = Core(Order.STRICT)
    core.fetched(row(1, None))
    settle = only(Settle, core.answered(1, 1, (0, Failure.REJECTED)))
    core.on(Settled(settle, frozenset()))

    commands = core.fetched(due=(row(1, None, waiting_id=9, attempts=1),))

    assert sent(commands) == [[1]]


def test_a_settlement_that_stops_a_key_is_not_forgotten_by_an_older_answer() -> None:
    core = Core()
    core.fetched(row(1))
    core.now += timedelta(seconds=4)
    settle = only(Settle, core.answered(1, 1, (0, Failure.REJECTED)))
    if not core.state.busy:
        core.fetched()  # the reader must be free to balance
        core.on(Tick())
    assert core.state.busy
    core.on(Settled(settle, frozenset({K})))

    core.on(Owned(ALL, has_surplus=False, stopped=frozenset()))

    assert K in core.state.stopped


def test_an_answer_for_fewer_shards_frees_no_key_but_the_settlement_s_own() -> None:
    core = Core()
    core.on(Owned(ALL, has_surplus=False, stopped=frozenset({K, ("bills", b"x")})))
    core.fetched(due=(row(1, waiting_id=9),))
    settle = only(Settle, core.answered(1, 1))
    assert settle.freed == (K,)

    core.on(Settled(settle, frozenset()))

    assert core.state.stopped == {("bills", b"x")}


def test_a_late_follower_of_a_key_that_is_being_freed_waits_in_line() -> None:
    core = Core()
    core.on(Owned(ALL, has_surplus=False, stopped=frozenset({K})))
    core.fetched(due=(row(1, waiting_id=9),))
    freeing = only(Settle, core.answered(1, 1))

    aside = only(Settle, core.fetched(row(2)))
    core.on(Settled(freeing, frozenset()))

    assert [one.position for one in aside.to_waiting] == [2]
    assert K in core.state.stopped, "its follower is still on its way to the waiting room"
    core.on(Settled(aside, frozenset({K})))
    assert K in core.state.stopped


def test_skip_lets_the_followers_go_and_buries_the_head_alone() -> None:
    core = Core(followers=Followers.SKIP)
    core.on(Owned(ALL, has_surplus=False, stopped=frozenset({K})))
    core.fetched(due=(row(1, waiting_id=9, attempts=1),))

    burial = only(Settle, core.answered(1, 1, (0, Failure.TOO_LARGE))).buried[0]

    assert (burial.row.position, burial.fate, burial.followers) == (1, Followers.SKIP, ())


def test_followers_that_were_accepted_are_settled_and_the_rest_waits() -> None:
    core = Core(Order.PIPELINED)
    core.fetched(row(1), row(2))
    core.fetched(row(3))

    settle = only(Settle, core.answered(1, 2, (0, Failure.REJECTED)))

    assert [one.position for batch in settle.evidence for one in batch.rows] == [2]
    assert [failed.row.position for failed in settle.failed] == [1]
    after = only(Settle, core.answered(2, 1, (0, Failure.REJECTED)))
    assert [one.position for one in after.to_waiting] == [3]


def test_an_unknown_outcome_resets_once_and_nothing_is_sent_before_all_answers_are_there() -> None:
    core = Core(Order.PIPELINED)
    core.fetched(row(1), row(2))
    core.fetched(row(3), row(4, b"other"))

    first = core.answered(1, 2, (0, Failure.INDETERMINATE), (1, Failure.INDETERMINATE))
    second = core.answered(2, 2, (0, Failure.INDETERMINATE), (1, Failure.INDETERMINATE))

    assert [type(command) for command in first if isinstance(command, GiveUp)] == [GiveUp]
    assert sent(first) == sent(second) == []
    assert not [command for command in second if isinstance(command, GiveUp)]


def test_a_due_message_of_a_topic_that_was_paused_meanwhile_is_left_where_it_is() -> None:
    core = Core()
    core.fetched(row(1, b"other"))
    core.answered(1, 1, (0, Failure.BROKER_DOWN))

    commands = core.fetched(due=(row(2, waiting_id=9),))

    assert (sent(commands), core.state.waiting) == ([], set())


def test_a_due_message_that_came_too_late_is_evidenced_and_frees_its_key() -> None:
    core = Core()
    late = row(1, waiting_id=7)._replace(expires_us=microseconds(NOW - timedelta(seconds=1)))

    commands = core.fetched(due=(late,))

    settlement = only(Settle, commands)
    assert sent(commands) == []
    assert [(one.outcome, list(one.rows)) for one in settlement.evidence] == [("expired", [late])]
    assert settlement.freed == (K,)


def test_a_paused_topic_comes_back_by_a_scan_when_its_time_has_come() -> None:
    core = Core()
    core.fetched(row(1))
    core.answered(1, 1, (0, Failure.BROKER_DOWN))
    core.fetched()
    core.now += timedelta(seconds=1)

    fetch = only(Fetch, core.on(Tick()))

    assert (fetch.lane, fetch.reading.parts[0].seen) == ("orders", None)


def test_surplus_shards_go_back_only_when_nothing_is_under_way() -> None:
    core = Core()
    core.fetched(row(1), row(2))
    busy = core.on(Owned(ALL, has_surplus=True, stopped=frozenset()))
    core.fetched(row(3))
    settle = only(Settle, core.answered(1, 1))
    assert not [command for command in busy if isinstance(command, Rebalance)]

    released = core.on(Settled(settle, None))

    assert only(Rebalance, released).release
    core.on(Owned(frozenset({0}), has_surplus=False, stopped=frozenset()))
    assert (core.state.queued, core.state.positions & {2, 3}) == (0, set()), "what was queued may belong to them"


def test_a_stop_while_reading_hands_nothing_over_and_leaves_when_the_page_is_there() -> None:
    core = Core()
    assert core.state.reading
    assert not core.on(StopRelay(core.now + timedelta(seconds=5)))

    commands = core.fetched(row(1))

    assert [type(command) for command in commands] == [Leave]


def test_a_stop_ends_even_if_the_broker_never_answers() -> None:
    core = Core()
    core.fetched(row(1))
    core.on(StopRelay(NOW + timedelta(seconds=1)))

    core.now = NOW + timedelta(seconds=1)
    assert GiveUp("") in core.on(Tick())
    assert Leave() not in core.on(Tick())
    core.now = NOW + timedelta(seconds=7)
    assert Leave() in core.on(Tick())


def test_a_row_in_hand_is_dropped_from_whatever_read_finds_it_again() -> None:
    core = Core(Order.PIPELINED)
    assert sent(core.fetched(row(1))) == [[1]]

    assert sent(core.fetched(row(1), row(2))) == [[2]]


def test_what_a_crash_would_send_again_is_bounded_though_the_settler_is_slow() -> None:
    """No more batches than the window may be acknowledged and not settled when another one goes out."""
    core, window, unsettled = Core(Order.PIPELINED), RelayConfig().window, list[Settle]()
    for number in range(1, 4 * window):
        for batch in sent(core.fetched(row(number))):
            (position,) = batch
            unsettled.append(only(Settle, core.answered(position, 1)))
    assert len(unsettled) == window

    assert sent(core.on(Settled(unsettled[0], None)))[0] == [window + 1, window + 2]


def test_a_read_for_a_hint_is_not_delayed_by_the_waiting_room_which_is_looked_at_all_the_same() -> None:
    core = Core()
    core.fetched()
    looks = []
    for _ in range(20):
        core.now += timedelta(milliseconds=50)
        core.state.lease_until = core.state.rebalance_at = core.now + timedelta(hours=1)
        looks.append(only(Fetch, core.on(Woken())).look)
        core.fetched()

    assert [at for at, look in enumerate(looks) if look] == [0, 10], "in a second of hints, every 50 ms one"


def test_a_hint_during_a_read_is_followed_by_another_read_at_once() -> None:
    core = Core()
    core.on(Woken())

    assert any(isinstance(command, Fetch) for command in core.fetched())
