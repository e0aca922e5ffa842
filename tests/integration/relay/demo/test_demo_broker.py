"""`outboxkit demo-broker`: a broker that a reader of the tutorial needs not install."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from outboxkit_relay.settings import environment

PROGRAM = [sys.executable, "-m", "outboxkit_relay"]


def test_it_serves_other_processes_by_the_url_in_its_file_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "broker.url"
    settings = environment(database_url=f"sqlite:///{tmp_path}/app.db", broker_url_file=str(file))
    serve = [*PROGRAM, "demo-broker", str(file)]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=settings) as broker:
        assert broker.stdout is not None
        said = broker.stdout.readline()
        url = file.read_text().strip()

        init = [*PROGRAM, "init", "--topic", "orders"]
        done = subprocess.run(init, env=settings, capture_output=True, text=True, check=False)
        broker.send_signal(signal.SIGTERM)

    assert said == f"serving {url} until Ctrl-C; export OUTBOXKIT_BROKER_URL_FILE={file}\n"
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("topic orders created")
    assert (broker.returncode, file.exists()) == (0, False)
