"""What `import outboxkit` costs, and what it does not load, in processes that know nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SQLALCHEMY = "import sqlalchemy, sqlalchemy.orm, sqlalchemy.ext.asyncio"

PRODUCER = """
import json, sys
from dataclasses import dataclass
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from outboxkit import Outbox, OutboxMixin, event, outbox_tables, publish

class Base(DeclarativeBase): ...
outbox_tables(Base.metadata)

@event("order.placed")
@dataclass
class Placed:
    order_id: int

class Order(OutboxMixin, Base):
    __tablename__ = "orders"
    __outbox__ = Outbox(topic="orders", key="id")
    id: Mapped[int] = mapped_column(primary_key=True)

engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
with engine.begin() as connection:
    from outboxkit import migrations
    migrations.upgrade(connection)
ours = lambda: sorted(name for name in sys.modules if name.startswith("outboxkit."))
with Session(engine) as session:
    order = Order()
    order.emit(lambda: Placed(order.id))
    session.add(order)
    publish(session, Placed(2), topic="orders")
    session.commit()
    print(json.dumps({"rows": session.connection().exec_driver_sql("SELECT count(*) FROM outbox_messages").scalar(),
                      "modules": ours()}))
"""


def run(program: str) -> Any:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_the_root_costs_little_beside_sqlalchemy() -> None:
    """A ratio of processor times, so that a slow or loaded machine makes no difference; the first run may compile."""
    for what, share in (
        ("import outboxkit", 0.1),
        ("from outboxkit import Outbox, OutboxMixin, event, publish, send", 0.8),
    ):
        program = f"""
import json, time
began = time.process_time()
{SQLALCHEMY}
between = time.process_time()
{what}
print(json.dumps((time.process_time() - between) / (between - began)))
"""
        assert min(run(program) for _ in range(3)) <= share, what


def test_importing_the_root_loads_no_module_that_nobody_asked_for() -> None:
    program = "import sys, json, outboxkit; print(json.dumps([n for n in sys.modules if n.startswith('outboxkit.')]))"

    assert run(program) == []


def test_a_producer_of_json_works_and_loads_no_avro_and_no_consumer() -> None:
    found = run(PRODUCER)

    assert found["rows"] == 2
    forbidden = (
        "outboxkit.avro",
        "outboxkit.codecs.avro",
        "outboxkit.consumer",
        "outboxkit.brokers",
        "outboxkit.registries",
    )
    assert [name for name in found["modules"] if name.startswith(forbidden)] == []


def test_every_name_of_the_root_is_there_and_listed() -> None:
    program = (
        "import json, outboxkit\n"
        "missing = [name for name in outboxkit.__all__ if getattr(outboxkit, name, None) is None]\n"
        "print(json.dumps([missing, sorted(set(outboxkit.__all__) - set(dir(outboxkit))), len(outboxkit.__all__)]))"
    )

    missing, unlisted, count = run(program)
    assert (missing, unlisted) == ([], [])
    assert count <= 26


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    program = "import json, outboxkit\nprint(json.dumps([hasattr(outboxkit, 'pubish'), outboxkit.__version__]))"

    has, version = run(program)
    assert not has
    assert version


def test_a_module_that_listens_to_sessions_listens_however_it_is_imported() -> None:
    """Lazy names must not mean that a session is not heard."""
    for way in (
        "from outboxkit import OutboxMixin",
        "from outboxkit import publish",
        "import outboxkit.capture",
        "from outboxkit.capture.emit import publish",
        "from outboxkit.capture.route import Outbox",
    ):
        program = (
            f"import json\n{way}\nfrom sqlalchemy.orm import Session\n"
            "names = ['before_flush', 'after_flush', 'before_commit', 'do_orm_execute', 'transient_to_pending']\n"
            "print(json.dumps([name for name in names if not list(getattr(Session().dispatch, name))]))"
        )
        assert run(program) == [], way
