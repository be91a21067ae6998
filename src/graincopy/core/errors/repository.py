"""30-49: the repository and its medium."""

from __future__ import annotations

from graincopy.core.errors.base import GraincopyError


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
