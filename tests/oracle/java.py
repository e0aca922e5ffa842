"""Apache Avro Java in one JVM: all questions at once, because starting it takes longer than a thousand answers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.servers.cache import cached
from tests.servers.server import Unavailable

__all__ = ["VERSION", "ask"]

VERSION = "1.12.2"
_SOURCE = Path(__file__).with_name("Oracle.java")
_POM = f"""<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>outboxkit</groupId><artifactId>avro-oracle</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.avro</groupId><artifactId>avro</artifactId><version>{VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""


def ask(questions: Sequence[Sequence[Any]]) -> list[str]:
    """The answers, in order; a part of a question that is no text is sent as JSON."""
    java = _program("java")
    libs = cached(f"avro-{VERSION}", _download) / "libs"
    command = [java, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{libs}/*", str(_SOURCE)]
    lines = ["\t".join(part if isinstance(part, str) else json.dumps(part) for part in one) for one in questions]
    done = subprocess.run(
        command, input="\n".join([*lines, ""]), capture_output=True, text=True, timeout=600, check=True
    )
    answers = done.stdout.split("\n")[:-1]
    if len(answers) != len(questions):
        raise RuntimeError(f"{len(questions)} questions, {len(answers)} answers: {done.stderr[-1000:]}")
    return answers


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Unavailable(f"no {name} for the Avro Java oracle: install a JDK and Maven (Debian: default-jdk maven)")
    return found


def _download(folder: Path) -> None:
    """The library's jars, by Maven (its own settings and mirrors apply)."""
    (folder / "pom.xml").write_text(_POM)
    goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={folder / 'libs'}"]
    done = subprocess.run(
        [_program("mvn"), "-q", "-B", "-f", folder / "pom.xml", *goal],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise Unavailable(f"Maven could not fetch Avro Java {VERSION}: {(done.stdout + done.stderr).strip()[-1500:]}")
