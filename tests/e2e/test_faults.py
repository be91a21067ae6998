"""Drivers that lie, storage that cannot be read, people who cannot be told: the workflow notices and says so."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import story
from story import GRAIN, MIB, Cli, Stage, noise

from graincopy.app.wiring import Wiring
from graincopy.core.extent import Extents
from graincopy.model.change_map import Changed, ChangeMap
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim
from graincopy.volumes.base import FileImage, VolumeDriver
from graincopy.volumes.wrappers import FaultyImage, Wrapped

Wrap = Callable[[VolumeDriver], VolumeDriver]


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> Callable[[Wrap], None]:
    """From now on every driver is what the function makes of it."""

    def use(wrap: Wrap) -> None:
        real = Wiring.drivers

        def drivers(wiring: Wiring) -> Mapping[str, VolumeDriver]:
            return {name: wrap(driver) for name, driver in real(wiring).items()}

        monkeypatch.setattr(Wiring, "drivers", drivers)

    return use


class Lying(Wrapped):
    """Calls the second half of what changed unchanged."""

    def changed(self, base: Target, now: Target) -> ChangeMap:
        answer = super().changed(base, now)
        assert isinstance(answer, Changed)
        return Changed(answer.extents.clip(0, 0), answer.source)


class Blind(Wrapped):
    """Cannot read the grains numbered 3 and 5 of any file."""

    @contextmanager
    def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        with super().open(target, claim) as image:
            bad = Extents.of((3 * GRAIN, 4 * GRAIN), (5 * GRAIN, 6 * GRAIN))
            yield UnreadableImage(image, bad)


class UnreadableImage(FaultyImage):
    def __init__(self, inner: FileImage, bad: Extents) -> None:
        super().__init__(inner, lambda point, subject: None, "")
        self._bad = bad

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if self._bad.clip(offset, offset + len(buffer)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().readinto(offset, buffer)


@pytest.fixture
def path(plain: str) -> str:
    return story.make_disk(f"{plain}/a.raw", MIB, (0, noise(1, MIB)))


@pytest.mark.root
@pytest.mark.parametrize("audit", ["64", "all", "100%"])
def test_a_change_map_that_lies_is_caught_and_the_disk_compared(
    stage: Stage, cli: Cli, wrapped: Callable[[Wrap], None], audit: str
) -> None:
    path = story.make_disk(stage.path(0, "a.raw"), 4 * MIB, (0, noise(1, MIB)))
    cli.backup(path)
    wrapped(Lying)
    story.write(path, (2 * GRAIN, b"not told"), (9 * GRAIN, b"not told either"))
    document = cli.warned("backup", path, "--audit", audit)
    disk = document["disks"][0]
    assert (disk["change_map"], disk["audit_mismatches"]) == (
        "compared: the audit found grains wrongly called unchanged",
        2,
    )
    assert (disk["dirty_bytes"], disk["read_bytes"]) == (2 * GRAIN, MIB)
    assert "a.raw: 2 of 16 audited grains differ" in document["warnings"][0]
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")["disks"][0]["target"]
    assert story.digest(out) == story.digest(path)


@pytest.mark.root
def test_a_restore_does_not_believe_a_lying_change_map(stage: Stage, cli: Cli, wrapped: Callable[[Wrap], None]) -> None:
    path = story.make_disk(stage.path(0, "a.raw"), 4 * MIB, (0, noise(1, MIB)))
    cli.backup(path)
    before = story.digest(path)
    story.write(path, (2 * GRAIN, b"not told"))
    wrapped(Lying)
    document = cli.warned("restore", "latest", "--in-place")
    disk = document["disks"][0]
    assert (disk["how"], disk["differing_bytes"]) == ("compared", GRAIN)
    assert "1 of 16 audited grains differ" in document["warnings"][0]
    assert story.digest(path) == before


@pytest.mark.root
@pytest.mark.parametrize("finished", [False, True])
def test_undo_brings_back_what_a_lying_change_map_hid(
    stage: Stage, cli: Cli, wrapped: Callable[[Wrap], None], monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """The lie is seen only when the restore has written what the map told; the rest is written when it is resumed."""
    path = story.make_disk(stage.path(0, "a.raw"), 4 * MIB, (0, noise(1, MIB)))
    cli.backup(path)
    stored = story.digest(path)
    story.write(path, (2 * GRAIN, b"not told"), (9 * GRAIN, b"not told either"))
    before = story.digest(path)
    wrapped(Lying)
    with monkeypatch.context() as patch:
        patch.setattr("graincopy.workflow.difference.mismatches", lambda *sample: 0)  # the audit had no luck
        failed = cli("restore", "latest", "--in-place")
    assert failed.code == 58, failed
    restore = cli.ok("targets")["restores"][0]["restore"]
    if finished:
        assert cli.ok("restore", "latest", "--in-place")["restore"] == restore
        assert story.digest(path) == stored
        with open(path, "r+b") as file:  # and what came since is not lost without a word
            file.seek(9 * GRAIN)
            file.write(b"since")
        assert cli("undo", restore).code == 57
        cli.ok("undo", restore, "--force")
    else:
        cli.ok("undo", restore)
    assert story.digest(path) == before
    assert cli.ok("targets")["restores"] == []


@pytest.mark.root
def test_how_much_is_audited(stage: Stage, cli: Cli) -> None:
    path = story.make_disk(stage.path(0, "a.raw"), 16 * MIB, (0, noise(1, 10 * MIB)))
    cli.backup(path)
    grains = {}
    for audit in ("0", "5%", "7", "all", "64"):
        disk = cli.ok("backup", path, "--audit", audit)["disks"][0]
        assert (disk["read_bytes"], disk["audit_mismatches"]) == (0, 0)
        grains[audit] = disk["audit_bytes"] // GRAIN
        assert (disk["audit_bound"] is None) == (audit == "0")
    assert grains == {"0": 0, "5%": 8, "7": 7, "all": 160, "64": 64}
    text = cli("backup", path)
    assert "at 95 %" in text.out
    cli.configure('[backup]\naudit = "3"')
    assert cli.ok("backup", path)["disks"][0]["audit_bytes"] == 3 * GRAIN


def test_what_cannot_be_read_whole_is_not_published(path: str, cli: Cli, wrapped: Callable[[Wrap], None]) -> None:
    wrapped(Blind)
    done = cli("backup", path)
    assert done.code == 19
    assert "--allow-partial" in done.err
    assert cli.ok("points") == []
    assert not os.listdir(f"{cli.repo}/runs")


@pytest.mark.root
def test_a_partial_point_is_flagged_and_never_a_base(
    stage: Stage, cli: Cli, wrapped: Callable[[Wrap], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = story.make_disk(stage.path(0, "a.raw"), MIB, (0, noise(1, MIB)))
    whole = cli.backup(path)["restore_point"]
    with monkeypatch.context() as patch:
        real = Wiring.drivers
        patch.setattr(Wiring, "drivers", lambda wiring: {name: Blind(one) for name, one in real(wiring).items()})
        story.write(path, (3 * GRAIN, b"cannot be read"), (8 * GRAIN, b"can be read"))
        document = cli("backup", path, "--allow-partial", "--audit", "0", "--json")
    assert document.code == 3, document
    assert document.json["incomplete"] is True
    points = cli.ok("points")
    assert [point["incomplete"] for point in points] == [True, False]
    assert points[0]["missing"] == {"a.raw": [[3 * GRAIN, 4 * GRAIN]]}
    assert "INCOMPLETE" in cli("points").out
    after = cli.backup(path)
    assert (after["base"], after["disks"][0]["change_map"]) == (whole, "extents")
    assert after["disks"][0]["dirty_bytes"] == 2 * GRAIN
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")["disks"][0]["target"]
    assert story.digest(out) == story.digest(path)
    cli.ok("expire", "--keep-last", "1")
    left = {point["restore_point"]: point["incomplete"] for point in cli.ok("points")}
    assert left.get(after["restore_point"]) is False  # the incomplete one took nobody's place


# --- telling people -------------------------------------------------------------------------------


apprise_is_old = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")


class Sink(HTTPServer):
    """Remembers every body that was posted to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Listener)
        self.bodies: list[str] = []
        self.answer = 200


class Listener(BaseHTTPRequestHandler):
    server: Sink

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def listening(cli: Cli, sink: Sink, more: str = "") -> None:
    cli.configure(f'[notify]\nurls = ["json://127.0.0.1:{sink.server_port}"]\n{more}')


@apprise_is_old
def test_people_hear_of_success_and_of_failure(path: str, cli: Cli, sink: Sink) -> None:
    listening(cli, sink)
    point = cli.backup(path)["restore_point"]
    assert "backup done" in sink.bodies[0]
    assert point in sink.bodies[0]
    assert cli("backup", f"{path}-not").code == 11
    assert "backup failed" in sink.bodies[1]
    assert f"{path}-not does not exist" in sink.bodies[1]
    cli.ok("backup", path, "--dry-run")
    assert len(sink.bodies) == 2


@apprise_is_old
def test_people_hear_of_what_they_asked_for_only(path: str, cli: Cli, sink: Sink) -> None:
    listening(cli, sink, 'on = ["failure"]')
    cli.backup(path)
    assert sink.bodies == []
    assert cli("backup", f"{path}-not").code == 11
    assert len(sink.bodies) == 1


@apprise_is_old
def test_what_cannot_be_delivered_fails_no_backup_and_is_reported(path: str, cli: Cli, sink: Sink) -> None:
    listening(cli, sink)
    sink.answer = 500
    done = cli("backup", path, "--json")
    assert done.code == 0
    assert done.err == "warning: no notification could be sent to json://…\n"
    assert done.json["notification_warnings"] == ["no notification could be sent to json://…"]
    assert len(cli.ok("points")) == 1
    assert cli("backup", f"{path}-not").code == 11
    cli.configure('[notify]\nurls = ["nosuchkind://somewhere/secret"]')
    done = cli("backup", path)
    assert done.code == 0
    assert "secret" not in done.err
