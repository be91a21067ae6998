"""70-79, 100-104: hypervisors and guests, and bringing virtual machines back."""

from __future__ import annotations

from graincopy.core.errors.base import GraincopyError

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
