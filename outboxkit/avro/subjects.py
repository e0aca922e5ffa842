"""Under which subject a schema is registered: the three strategies of Confluent's serializers, by their names."""

from __future__ import annotations

from enum import Enum

__all__ = ["SubjectStrategy", "subject_for"]


class SubjectStrategy(Enum):
    """Naming strategies: the unit that a subject stands for.

    TOPIC: one schema history per topic; RECORD: one per record type, on whatever topic; TOPIC_RECORD: one per record
    type on each topic, for topics that carry several types.
    """

    TOPIC = "TopicNameStrategy"
    RECORD = "RecordNameStrategy"
    TOPIC_RECORD = "TopicRecordNameStrategy"


def subject_for(strategy: SubjectStrategy, *, topic: str, record: str, part: str = "value") -> str:
    """Returns the subject; ``part`` is ``value`` or ``key`` and counts only with TOPIC."""
    if strategy is SubjectStrategy.TOPIC:
        return f"{topic}-{part}"
    return record if strategy is SubjectStrategy.RECORD else f"{topic}-{record}"
