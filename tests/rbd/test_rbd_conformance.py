"""The volume laws against a real Ceph: with the map of objects, without it and in a namespace, and for clones."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from graincopy.app.host import SystemClock
from graincopy.testing.laws import Law, NotTried
from graincopy.testing.laws_restore import restore_laws
from graincopy.testing.laws_volume import volume_laws
from graincopy.testing.machines import run_soundness
from graincopy.testing.rbd_clone_lab import RbdCloneLab
from graincopy.testing.rbd_images import FAST, SLOW
from graincopy.testing.rbd_lab import RbdLab
from graincopy.testing.volume_suite import VolumeSuite
from graincopy.volumes.places import MemoryPlaces


class TestFastDiff(VolumeSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, ceph: str) -> Iterator[RbdLab]:
        yield RbdLab(ceph, MemoryPlaces(), SystemClock(), features=FAST)


class TestWithoutObjectMap(VolumeSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, ceph: str) -> Iterator[RbdLab]:
        made = ["rbd", "--conf", ceph, "namespace", "create", "rbd/laws"]
        subprocess.run(made, capture_output=True, timeout=60, check=False)
        yield RbdLab(ceph, MemoryPlaces(), SystemClock(), namespace="laws", features=SLOW)


class TestClones:
    """What a parent can make wrong: what is shown, what is zero, what changed."""

    @pytest.fixture(scope="class")
    @classmethod
    def clones(cls, ceph: str) -> Iterator[dict[int, RbdCloneLab]]:
        labs = {
            features: RbdCloneLab(ceph, MemoryPlaces(), SystemClock(), features=features) for features in (FAST, SLOW)
        }
        yield labs
        for lab in labs.values():
            lab.close()

    @pytest.fixture
    def lab(self, clones: dict[int, RbdCloneLab], request: pytest.FixtureRequest) -> Iterator[RbdLab]:
        yield clones[request.param]
        clones[request.param].reset()

    @pytest.mark.parametrize(
        ("lab", "kind"),
        [*((FAST, kind) for kind in ("01", "02", "06", "12-resize", "15")), (SLOW, "12-resize"), (SLOW, "15")],
        indirect=["lab"],
    )
    def test_laws(self, lab: RbdLab, kind: str) -> None:
        tried = 0
        for law in [law for law in (*volume_laws(), *restore_laws()) if law.name.startswith(kind)]:
            tried += _holds(law, lab)
            lab.reset()
        assert tried

    @pytest.mark.parametrize("lab", [FAST, SLOW], ids=["fast-diff", "without-object-map"], indirect=True)
    def test_random_walk(self, lab: RbdLab) -> None:
        run_soundness(lab, 3, 10)


def _holds(law: Law[RbdLab], lab: RbdLab) -> bool:
    try:
        law.check(lab)
    except NotTried:
        return False
    return True
