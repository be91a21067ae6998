"""Every way in which graincopy says no: one class, one sentence, what to do next, its own exit code.

The sentence is a template on the class, filled with the facts of the case; the hint names the next command
or move. Codes 0-3 are results (done, failed, usage, done with warnings); errors have 10 and above.
"""

from __future__ import annotations

from typing import ClassVar

DONE = 0
FAILED = 1
USAGE = 2
WARNED = 3
INTERRUPTED = 130
TERMINATED = 143


def printable(value: object) -> str:
    """``value`` on one line: control characters and undecodable bytes as ``\\xNN``."""
    text = value if isinstance(value, str) else str(value)
    shown = []
    for char in text:
        code = ord(char)
        if 0xDC80 <= code <= 0xDCFF:
            shown.append(f"\\x{code - 0xDC00:02x}")
        elif code < 0x20 or code == 0x7F:
            shown.append(f"\\x{code:02x}")
        else:
            shown.append(char)
    return "".join(shown)


class GraincopyError(Exception):
    """Root of the tree. Callers catch it at the face (CLI) and nowhere else without a reason."""

    exit_code: ClassVar[int] = FAILED
    sentence: ClassVar[str] = "{what}"
    hint: ClassVar[str] = ""

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        shown = {name: printable(value) for name, value in facts.items()}
        self.message = self.sentence.format(**shown)
        self.next_move = self.hint.format(**shown)
        super().__init__(self.message)


class UsageWrong(GraincopyError):
    """The command line cannot be understood."""

    exit_code = USAGE
    hint = "See graincopy --help."


# --- 10-19: the workload and its files ------------------------------------------------------------


class Unsupported(GraincopyError):
    """An undeclared power was asked of a driver; nothing was done."""

    exit_code = 10
    sentence = "{driver} cannot {power}"
    hint = "graincopy volumes PATH shows what each driver can do."


class PathMissing(GraincopyError):
    exit_code = 11
    sentence = "{path} does not exist"
    hint = "Check the spelling; a WORKLOAD without a known prefix is a path."


class PathUnreadable(GraincopyError):
    exit_code = 12
    sentence = "{path} cannot be opened: {reason}"
    hint = "Run graincopy as the owner of the file or as root."


class PathUnfit(GraincopyError):
    """Something else than a disk: directory, FIFO, socket, symlink loop, a device that no driver knows."""

    exit_code = 13
    sentence = "{path} is {what}, not a disk image"
    hint = "Name the disk image files themselves; graincopy volumes PATH says what is possible."


class WorkloadWrong(GraincopyError):
    exit_code = 14
    sentence = "workload {workload}: {reason}"
    hint = "WORKLOAD is PATH, files:PATH,PATH, vm:NAME, set:NAME or subsystem:NAME."


class VolumeUnsupported(GraincopyError):
    exit_code = 15
    sentence = "{path} lies on no volume that graincopy can snapshot or lock: {reason}"
    hint = "graincopy volumes {path} explains what would make it possible."


class SourceChanged(GraincopyError):
    """The file vanished, shrank or was replaced between plan and snapshot. Running again is right."""

    exit_code = 16
    sentence = "{path} changed while the backup was starting: {reason}"
    hint = "Nothing was published. Run the same backup again."


class SourceInUse(GraincopyError):
    exit_code = 17
    sentence = "{path} is open for writing: {reason}"
    hint = "Stop whatever has the file open (fuser -v {path} shows it), then run the same command again."


class SourceWritten(GraincopyError):
    exit_code = 18
    sentence = "{path} was opened for writing or changed while it was being read"
    hint = "Nothing was published. Stop the writer, or put the file on XFS or Btrfs so that it can be snapshotted."


class ReadIncomplete(GraincopyError):
    exit_code = 19
    sentence = "{path} could not be read whole: {reason}"
    hint = "Nothing was published. Repair the storage, or add --allow-partial to keep what can be read."


# --- 20-29: snapshots -----------------------------------------------------------------------------


class FreezeRefused(GraincopyError):
    """Freezing would hang graincopy itself; nothing was frozen."""

    exit_code = 20
    sentence = "{mount} cannot be frozen because {what} lies on it ({path})"
    hint = "Move it to another file system and run the same command again."


class FrozenElsewhere(GraincopyError):
    exit_code = 21
    sentence = "{mount} was already frozen by somebody else; it was left as it is"
    hint = "Find who froze it (another backup?), or thaw it with fsfreeze -u {mount}; then run again."


class FreezeTooLong(GraincopyError):
    exit_code = 22
    sentence = "the freeze window is predicted to take {predicted_ms} ms, more than the limit of {limit_ms} ms ({why})"
    hint = "Nothing was frozen. Defragment the volume, or raise freeze.deadline in the configuration."


class FreezeBroken(GraincopyError):
    """The window was not kept; the targets are worthless and were deleted."""

    exit_code = 23
    sentence = "the freeze window was not kept: {reason}"
    hint = "Everything is thawed and nothing was published. Run the same command again; see docs/freeze.md."


class SnapshotFailed(GraincopyError):
    exit_code = 24
    sentence = "no target could be made of {volume}: {reason}"
    hint = "Nothing was published. graincopy targets shows what is left; graincopy volumes PATH what is possible."


class TargetNoSpace(GraincopyError):
    exit_code = 25
    sentence = "no space left for the target of {volume}"
    hint = "Free space on that storage (graincopy targets --reap removes what graincopy left), then run again."


class TargetLost(GraincopyError):
    exit_code = 26
    sentence = "target {target} is gone or no longer readable: {reason}"
    hint = "Nothing was published. Run the same command again."


class AttachFailed(GraincopyError):
    exit_code = 27
    sentence = "the target of {volume} cannot be attached: {reason}"
    hint = "graincopy doctor tells whether this host can attach targets."


class VolumeBusy(GraincopyError):
    exit_code = 29
    sentence = "{volume} is held by {holder}"
    hint = "Wait for it to end, or end it; graincopy targets shows the holder."


class StorageUnreachable(GraincopyError):
    """The other end of a network does not answer, or does not let us in. Nothing was changed there."""

    exit_code = 85
    sentence = "{storage} cannot be reached: {reason}"
    hint = "Nothing was published. Check the network, the address and the credentials, then run again."


# --- 30-49: the repository and its medium ---------------------------------------------------------


class RepositoryMissing(GraincopyError):
    exit_code = 30
    sentence = "{url} is not a graincopy repository: {reason}"
    hint = "Check --repo or GRAINCOPY_REPO; graincopy init makes a new repository."


class RepositoryExists(GraincopyError):
    exit_code = 31
    sentence = "{url} already is a graincopy repository, or is not empty"
    hint = "Nothing was changed. Use it as it is, or name another place."


class RepositoryTooNew(GraincopyError):
    exit_code = 32
    sentence = "{url} has format {found}; this graincopy reads format {known}"
    hint = "Use the graincopy that made it, or a newer one."


class PassphraseWrong(GraincopyError):
    exit_code = 33
    sentence = "the passphrase opens none of the keys of {url}"
    hint = "Check GRAINCOPY_PASSPHRASE or GRAINCOPY_PASSPHRASE_FILE."


class PassphraseMissing(GraincopyError):
    exit_code = 34
    sentence = "{url} is encrypted and no passphrase was given"
    hint = "Set GRAINCOPY_PASSPHRASE or GRAINCOPY_PASSPHRASE_FILE."


class ObjectDamaged(GraincopyError):
    exit_code = 35
    sentence = "{name} in the repository is damaged: {reason}"
    hint = "graincopy check --data says which restore points are affected."


class ObjectMissing(GraincopyError):
    exit_code = 36
    sentence = "{name} is missing from the repository"
    hint = "graincopy check says which restore points are affected."


class MediumFull(GraincopyError):
    exit_code = 37
    sentence = "no space left on the medium {url}"
    hint = "Nothing was published. Free space there (graincopy expire, graincopy collect) and run again."


class MediumReadOnly(GraincopyError):
    exit_code = 38
    sentence = "the medium {url} is read-only: {reason}"
    hint = "Mount it writable, or correct its permissions."


class MediumFailed(GraincopyError):
    exit_code = 39
    sentence = "the medium {url} failed: {reason}"
    hint = "Repair it and run the same command again; what was stored is found again."


class RunFenced(GraincopyError):
    exit_code = 40
    sentence = "run {run} was fenced by graincopy collect and lost; it published nothing"
    hint = "Run the same backup again; its chunks that survived are found."


class WorkloadBusy(GraincopyError):
    exit_code = 41
    sentence = "workload {workload} is held by run {run} ({owner})"
    hint = "Wait for it to end. A dead run: graincopy targets --reap; of another host: add --silence 300."


class RunsOpen(GraincopyError):
    exit_code = 42
    sentence = "{count} runs are still open ({owners}); nothing was swept"
    hint = "Run graincopy collect again when they have ended; dead runs of this host are fenced by themselves."


class KeyUnknown(GraincopyError):
    exit_code = 43
    sentence = "there is no key {key}"
    hint = "graincopy key list shows the keys."


class LastKey(GraincopyError):
    exit_code = 44
    sentence = "{key} is the last key; without it nothing could be read any more"
    hint = "Add another one first: graincopy key add."


class RestoreOpen(GraincopyError):
    exit_code = 45
    sentence = "restore {restore} of {path} was begun and not ended"
    hint = "Finish it (graincopy restore {point} --in-place) or take it back (graincopy undo {restore})."


class PointPinned(GraincopyError):
    exit_code = 46
    sentence = "restore point {point} is in use by {holder}"
    hint = "Run the same command again when that has ended."


# --- 50-69: what was asked for --------------------------------------------------------------------


class PointUnknown(GraincopyError):
    exit_code = 50
    sentence = "there is no restore point {point}"
    hint = "graincopy points lists them; POINT is an id, a unique prefix, latest or latest~N."


class PointAmbiguous(GraincopyError):
    exit_code = 51
    sentence = "{point} is the beginning of {count} restore points"
    hint = "Give more digits; graincopy points lists them."


class DiskUnknown(GraincopyError):
    exit_code = 52
    sentence = "restore point {point} has no disk {disk}; it has {disks}"
    hint = "Name one of these with --disk."


class OutputExists(GraincopyError):
    exit_code = 53
    sentence = "{path} exists and is not overwritten"
    hint = "Name another directory, or remove it first."


class OutputUnfit(GraincopyError):
    exit_code = 54
    sentence = "{path} cannot take the restored disks: {reason}"
    hint = "Name a directory that exists or can be made."


class RestoreNoSpace(GraincopyError):
    exit_code = 55
    sentence = "{path} needs {needed} more bytes and has {free}"
    hint = "Free space there; nothing was written, or graincopy restore goes on where it stopped."


class RestoreUnknown(GraincopyError):
    exit_code = 56
    sentence = "there is no restore {restore} that can be undone: {reason}"
    hint = "graincopy targets lists the restores that can."


class UndoConflict(GraincopyError):
    exit_code = 57
    sentence = "{path}: {count} grains changed after the restore; undo would lose these changes"
    hint = "Nothing was written. Add --force to bring back the bytes of before the restore all the same."


class RestoreFailed(GraincopyError):
    exit_code = 58
    sentence = "{path} could not be restored: {reason}"
    hint = "Run the same restore again to finish it, or graincopy undo {restore} to take it back."


class ConfigWrong(GraincopyError):
    exit_code = 60
    sentence = "configuration {path}: {reason}"
    hint = "graincopy config check explains the configuration."


class ToolMissing(GraincopyError):
    exit_code = 61
    sentence = "{tool} is needed and not there"
    hint = "Install it: {install}."


class ConformanceFailed(GraincopyError):
    exit_code = 62
    sentence = "{what} does not keep the contract: {count} laws are broken"
    hint = "Do not back up to or from it; the laws are listed above."


class CheckFailed(GraincopyError):
    exit_code = 63
    sentence = "the repository has {count} findings, {points} restore points are affected"
    hint = "They are listed above. Back up again: what is damaged is stored anew."


class AddressTaken(GraincopyError):
    """The place to serve at belongs to somebody else; it was left as it is."""

    exit_code = 64
    sentence = "cannot listen on {address}: {reason}"
    hint = "Name another --socket or --port, or end what is there."


class OverlayUnfit(GraincopyError):
    exit_code = 65
    sentence = "overlay {path}: {reason}"
    hint = "Name another file with --overlay; this one was left as it is."


class TlsUnfit(GraincopyError):
    exit_code = 66
    sentence = "TLS certificates in {path}: {reason}"
    hint = "docs/nbd.md says which files belong there and how to make them."


class GuestPathMissing(GraincopyError):
    """Inside a stored disk."""

    exit_code = 67
    sentence = "{disk} has no {path}: {reason}"
    hint = "graincopy files POINT {disk} lists its partitions, graincopy files POINT {disk}:PATH a directory."


class GuestUnreadable(GraincopyError):
    """No file system, one that nobody here can read, or one that is broken, or hostile."""

    exit_code = 68
    sentence = "the files in {where} cannot be read: {reason}"
    hint = "docs/files.md says what can be; graincopy mount shows the disk itself to other tools."


class MountPointUnfit(GraincopyError):
    exit_code = 69
    sentence = "{path} cannot be mounted on: {reason}"
    hint = "Name an empty directory of your own; see docs/files.md."


# --- 70-79: hypervisors and guests ----------------------------------------------------------------


class HypervisorDown(GraincopyError):
    exit_code = 70
    sentence = "libvirt at {uri} cannot be reached: {reason}"
    hint = "Start libvirtd and try again; guests that run are not touched by this."


class DomainUnknown(GraincopyError):
    exit_code = 71
    sentence = "libvirt at {uri} has no domain {domain}"
    hint = "graincopy workloads lists them."


class DomainBusy(GraincopyError):
    """Another job works on the domain: block job, migration, snapshot, backup."""

    exit_code = 72
    sentence = "domain {domain} is busy: {reason}"
    hint = "Wait for it to end (virsh domjobinfo), or stop it, then run the same command again."


class AgentFailed(GraincopyError):
    exit_code = 73
    sentence = "the guest agent of {domain} did not do its work: {reason}"
    hint = "See docs/kvm.md; without the agent the backup is crash-consistent."


class GuestThawFailed(GraincopyError):
    """The one that must be heard: a guest may stand still."""

    exit_code = 74
    sentence = "GUEST {domain} MAY STILL BE FROZEN OR PAUSED: {reason}"
    hint = "Look at it now: virsh domfsthaw {domain}, virsh resume {domain}."


class DomainInUse(GraincopyError):
    exit_code = 75
    sentence = "domain {domain} is running; its disks cannot be restored under it"
    hint = "Shut it down first (virsh shutdown {domain}), then run the same command again."


class DefineRefused(GraincopyError):
    exit_code = 76
    sentence = "domain {domain} cannot be defined: {reason}"
    hint = "Its XML is part of the restore point; disks that were restored stay where they are."


class SubsystemFailed(GraincopyError):
    exit_code = 77
    sentence = "subsystem {subsystem} cannot be backed up: {reason}"
    hint = "Nothing was published, and it was resumed. See docs/subsystems.md."


class ResumeFailed(GraincopyError):
    """The one that must be heard: a service may stand still."""

    exit_code = 78
    sentence = "SUBSYSTEM {subsystem} MAY STILL BE STANDING STILL: {reason}"
    hint = "Resume it now: {command}"


class HypervisorRefused(GraincopyError):
    """libvirt answered, and the answer was no."""

    exit_code = 79
    sentence = "libvirt at {uri} refused: {reason}"
    hint = "The log of libvirtd says more."


# --- 90-94: storage arrays ------------------------------------------------------------------------


class ArrayUnreachable(GraincopyError):
    exit_code = 90
    sentence = "array {array} does not answer: {reason}"
    hint = "Nothing was published. Check the network and its section in the configuration, then run again."


class ArrayLoginFailed(GraincopyError):
    """The host key, the key or the password was not accepted, by us or by the array."""

    exit_code = 91
    sentence = "array {array} cannot be logged in to: {reason}"
    hint = "Check user, key_file, password_file and known_hosts of [flashcopy.{array}] in the configuration."


class ArrayGarbled(GraincopyError):
    exit_code = 92
    sentence = "array {array} answered {command} with something that cannot be understood: {reason}"
    hint = "Nothing was published. Run the command on the array by hand; see docs/drivers/flashcopy.md."


class ArrayRefused(GraincopyError):
    exit_code = 93
    sentence = "array {array} refused {command}: {reason}"
    hint = "Remove the cause on the array, then run the same command again."


# --- 100-104: bringing virtual machines back ------------------------------------------------------


class MachineUnknown(GraincopyError):
    exit_code = 100
    sentence = "restore point {point} has no virtual machine {machine}; it has {machines}"
    hint = "Name one of these with --vm; graincopy show {point} says more."


class DomainStays(GraincopyError):
    exit_code = 101
    sentence = "domain {domain} did not shut down within {seconds} s"
    hint = "Nothing was written. Shut it down from inside, give it longer, or add --force-stop to pull the plug."


class StartRefused(GraincopyError):
    exit_code = 102
    sentence = "domain {domain} cannot be started: {reason}"
    hint = "It is defined and its disks are whole; correct what is missing and start it (virsh start {domain})."


class TrialFailed(GraincopyError):
    """The trial itself was held: the restore point is what did not come up."""

    exit_code = 103
    sentence = "restore point {point} gave no sign of life: {reason}"
    hint = "graincopy show {point} lists its trials; with a display, --picture FILE keeps what it showed."


class RecoveryStalled(GraincopyError):
    """Nothing is lost: what the guest wrote lies at the final place already."""

    exit_code = 104
    sentence = "the disks of {domain} are not all pulled to their place: {reason}"
    hint = "The domain needs the restore point until they are. Run the same command again."


class Interrupted(GraincopyError):
    """SIGINT; everything is thawed and the target removed or tagged."""

    exit_code = INTERRUPTED
    sentence = "interrupted"
    hint = "Nothing was published. What was stored is found by the next run."


class Terminated(GraincopyError):
    """SIGTERM; as :class:`Interrupted`."""

    exit_code = TERMINATED
    sentence = "terminated"
    hint = "Nothing was published. What was stored is found by the next run."


def error_classes() -> list[type[GraincopyError]]:
    """Every error class, by exit code: what EXIT STATUS lists."""
    found: list[type[GraincopyError]] = []
    waiting: list[type[GraincopyError]] = [GraincopyError]
    while waiting:
        cls = waiting.pop()
        found.append(cls)
        waiting.extend(cls.__subclasses__())
    return sorted(found, key=lambda cls: cls.exit_code)
