"""Runs the tests of the PostgreSQL store on this system's PostgreSQL, which has another major version than the one that
the other tests install, and through this system's PgBouncer in transaction mode. With NOTECASE_POSTGRES, the URL of a
superuser, on that server instead: neither is then started.

Each process of the tests has its own server and pooler, on sockets in a directory that is removed at the end.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.promises import ROOT
from tests.store.suite import PARTS
from tests.support import pgbouncer, postgres

POOLED = "tests/cli/test_pgbouncer.py"
"""The tests that need a pooler."""

ALL = [
    *("tests/store", "tests/e2e", "tests/cli/test_postgresql.py", POOLED),
    *("-k", "postgres or whole_store or store_owner or pgbouncer"),
]

QUICK = [
    *(f"tests/store/test_{part}.py" for part in PARTS),
    *("tests/store/test_postgres.py", "tests/cli/test_postgresql.py", POOLED),
    *("-k", "(postgres or pgbouncer) and not the_fold_of_the_log and not what_the_log_says and not more_requests"),
]
"""What every store promises, but for a few long tests of it; what only PostgreSQL has; a conversation and a copy."""

NEEDED = "PostgreSQL is not here. Install it, on Debian with: apt install postgresql pgbouncer"

NO_POOLER = (
    f"PgBouncer is not here, so {POOLED} is skipped, and the tests in tests/store reach PostgreSQL directly. Install "
    "it, on Debian with: apt install pgbouncer"
)


def main() -> int:
    """Says what the tests run on, and returns the exit code of pytest."""
    parser = argparse.ArgumentParser(prog="make test-postgresql", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    chosen, others = parser.parse_known_args()
    env = dict(os.environ)
    if env.get(postgres.SERVER):
        say(f"On the server that {postgres.SERVER} names.")
    else:
        binaries = programs()
        if binaries is None:
            say(NEEDED)
            return 1
        say(f"On {version(binaries / 'postgres')}")
        env[postgres.PROGRAMS] = str(binaries)
        pooler = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if pooler is None:
            say(NO_POOLER)
        else:
            say(f"Through {version(pooler)}")
            env[pgbouncer.PROGRAM] = pooler
    tests = [test for test in (QUICK if chosen.quick else ALL) if test != POOLED or pgbouncer.PROGRAM in env]
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal", *tests, *others]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def programs() -> Path | None:
    """Returns the directory of the newest PostgreSQL server that is installed; Debian has one for each version."""
    versions = sorted(Path("/usr/lib/postgresql").glob("[0-9]*/bin"), key=lambda path: float(path.parent.name))
    on_path = shutil.which("initdb")
    places = [*reversed(versions), *([Path(on_path).resolve().parent] if on_path else [])]
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


def version(program: Path | str) -> str:
    """Returns the first line of a program's version."""
    return subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
