"""A real PostgreSQL server, written to without pause: every restore point starts up and has lost nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator

import lab
import pytest
import server
import story
from server import Server
from story import Cli

POINTS = 4


@pytest.fixture
def programs() -> str:
    found = server.find_programs()
    if found is None:
        pytest.skip("needs PostgreSQL (apt: postgresql) and its user")
    return found


@pytest.fixture
def database(stage: story.Stage, programs: str, sockets: str) -> Iterator[Server]:
    """A server on the first LUN with its ledger in a tablespace on the second one."""
    for lun in stage.luns:
        os.chmod(lun.path, 0o755)
        os.mkdir(f"{lun.path}/pg")
        shutil.chown(f"{lun.path}/pg", server.USER)
    space = stage.path(1, "pg/space")
    os.mkdir(space)
    shutil.chown(space, server.USER)
    with Server(programs, stage.path(0, "pg/data"), sockets, 5971).make() as database:
        database.start()
        database.sql(f"CREATE TABLESPACE far LOCATION '{space}'")
        database.sql(server.LOAD)
        database.sql("ALTER TABLE ledger SET TABLESPACE far")
        yield database


def configure(cli: Cli, database: Server) -> None:
    cli.configure(f'[subsystem.shop]\nkind = "postgresql"\ndirectories = [{json.dumps(database.data)}]\n')


def restored(cli: Cli, point: str, folder: str, database: Server) -> Server:
    """The server of ``point`` in ``folder``, its tablespace beside it."""
    cli.ok("restore", point, "--to", folder)
    os.chmod(folder, 0o755)
    (link,) = os.listdir(f"{folder}/data/pg_tblspc")
    os.unlink(f"{folder}/data/pg_tblspc/{link}")
    os.symlink(f"{folder}/space", f"{folder}/data/pg_tblspc/{link}")
    os.chmod(f"{folder}/space", 0o700)
    return Server(database.programs, f"{folder}/data", database.sockets, database.port + 1)


@lab.root_test
@pytest.mark.slow
def test_every_restore_point_of_a_busy_server_is_sound(database: Server, cli: Cli, stage: story.Stage) -> None:
    configure(cli, database)
    committed: list[tuple[str, int]] = []
    with database.writers():
        for number in range(POINTS):
            before = int(database.sql("SELECT n FROM high"))
            document = cli.ok("backup", "subsystem:shop")
            assert (document["instant"], document["consistency"]) == ("one", "crash")
            committed.append((document["restore_point"], before))
            if number == 0:
                database.sql("CREATE TABLE more AS SELECT generate_series(1, 20000) AS n")
            if number == 2:
                database.sql("DROP TABLE more")
    seen = []
    for point, before in committed:
        folder = f"{stage.outer.path}/back"
        with restored(cli, point, folder, database) as back:
            back.start()
            assert back.sql(server.JUDGE) == "t", point
            seen.append(int(back.sql("SELECT n FROM high")))
            assert seen[-1] >= before  # what was committed before the backup began is there
            back.amcheck()
        shutil.rmtree(folder)
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]
    cli.undamaged()


@lab.root_test
def test_a_server_goes_back_in_place(database: Server, cli: Cli) -> None:
    configure(cli, database)
    with database.writers():
        cli.ok("backup", "subsystem:shop")
    with database.writers():
        cli.ok("backup", "subsystem:shop")
    after = int(database.sql("SELECT n FROM high"))
    done = cli("restore", "latest~1", "--in-place", "--json")
    assert done.code != 3, "a running server must keep its files"
    assert "in use" in done.err or "open" in done.err
    database.stop()
    document = cli("restore", "latest~1", "--in-place", "--json")
    assert document.code in (0, 3), document
    database.start()
    assert database.sql(server.JUDGE) == "t"
    assert 0 < int(database.sql("SELECT n FROM high")) < after
    database.amcheck()
    assert cli.ok("backup", "subsystem:shop")["base"] is not None


@lab.root_test
def test_files_one_after_the_other_are_refused_unless_it_is_stopped(
    stage: story.Stage, programs: str, sockets: str, cli: Cli, tmp_path: os.PathLike[str]
) -> None:
    home = f"{stage.outer.path}/pg"
    os.chmod(stage.outer.path, 0o755)
    os.mkdir(home)
    try:
        with Server(programs, f"{home}/data", sockets, 5973).make() as database:
            database.start()
            database.sql(server.LOAD)
            database.sql(server.STEP)
            configure(cli, database)
            done = cli("backup", "subsystem:shop")
            assert done.code == 77
            assert "one after the other" in done.err
            database.stop()
            cli.ok("backup", "subsystem:shop")
            cli.ok("restore", "latest", "--to", f"{home}/back")
            os.chmod(f"{home}/back", 0o755)
            with Server(programs, f"{home}/back/data", sockets, 5974) as back:
                back.start()
                assert back.sql(server.JUDGE) == "t"
                assert back.sql("SELECT n FROM high") == "1"
    finally:
        shutil.rmtree(home)
        shutil.rmtree(f"{stage.outer.path}/.graincopy", ignore_errors=True)
