"""50-69: what was asked for: restore points, disks, places to write to, to serve at and to mount on."""

from __future__ import annotations

from graincopy.core.errors.base import GraincopyError


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
