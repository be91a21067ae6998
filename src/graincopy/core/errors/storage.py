"""10-29, 85, 90-94: the workload and its files, snapshots of the volumes they lie on, storage arrays."""

from __future__ import annotations

from graincopy.core.errors.base import GraincopyError

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
