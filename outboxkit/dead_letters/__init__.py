"""Dead letters: messages that could not be published or handled, understood, repaired and replayed from here.

A letter is made and stored where a message ends (`burial`); it says what the message was (`letter`) and why it died
(`cause`). Operators look for letters and their groups (`search`); what they may replay is decided first (`preflight`),
then it goes through the outbox again (`replay`), repaired or as it was (`repair`), many by a kept plan (`plan`), at a
pace that stops when it hurts (`pace`). Its burial or its effect closes the letter; `progress` tells of those that
nobody has closed. `reveal` shows a payload. Copies on a topic serve other tools (`topic_copy`); letters travel as JSON
lines, and those of other tools are read (`transfer`).

Invariants: the original bytes never change. A consumer's message is dead or its effect is committed, never both: the
letter takes the inbox row. States go ``dead → replaying → replayed`` or ``dead → discarded``. A replay that dies again
is a new letter with ``parent_id`` and the next ``generation``; its parent is ``replayed``: the replay was carried out,
the child tells how it ended. A letter is closed by its own number, which its replay carries.

Every verb raises ConfigurationError when the tables are missing.
"""

from outboxkit.dead_letters.burial import bury, mark_replayed, of_delivery, of_row, store
from outboxkit.dead_letters.cause import words_of
from outboxkit.dead_letters.letter import DeadLetter, Filter, Side, Stage, State
from outboxkit.dead_letters.preflight import MAX_REPLAYS, Decision, Terms
from outboxkit.dead_letters.replay import audit, discard, outgoing, repair_and_replay, replay
from outboxkit.dead_letters.reveal import reveal
from outboxkit.dead_letters.search import Group, annotate, count, family, find, get, groups, ids, in_order

__all__ = [
    "MAX_REPLAYS",
    "DeadLetter",
    "Decision",
    "Filter",
    "Group",
    "Side",
    "Stage",
    "State",
    "Terms",
    "annotate",
    "audit",
    "bury",
    "count",
    "discard",
    "family",
    "find",
    "get",
    "groups",
    "ids",
    "in_order",
    "mark_replayed",
    "of_delivery",
    "of_row",
    "outgoing",
    "repair_and_replay",
    "replay",
    "reveal",
    "store",
    "words_of",
]
