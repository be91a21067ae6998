"""Operations on restore points: made, listed, brought back, tried out."""

from __future__ import annotations

from graincopy.app.operations.base import DISK, HYBRID, POINT, WARNED, Input, Operation

RESTORE_POINTS = (
    Operation(
        "init",
        "make a new repository",
        "graincopy.app.making:init",
        (
            Input("--grain-size", "unit of change and of storage, a power of two from 64K to 4M", default="64K"),
            Input("--no-encryption", "no passphrase; whoever reads the medium reads the disks", kind="flag"),
        ),
        ("graincopy init --repo /backup/vms",),
        "The passphrase is taken from GRAINCOPY_PASSPHRASE or GRAINCOPY_PASSPHRASE_FILE. Without it nothing can"
        " ever be read again.",
        opens=False,
    ),
    Operation(
        "backup",
        "take one consistent restore point of a workload",
        "graincopy.app.making:backup",
        (
            Input(
                "workload",
                "PATH, files:PATH,PATH, rbd:POOL/IMAGE, vm:NAME, set:NAME or subsystem:NAME",
                kind="many",
                metavar="WORKLOAD",
            ),
            Input("--name", "a stable name for these files; default: derived from their paths"),
            Input("--exclude", "leave this disk of a VM out (vdb, or web:vdb); may be repeated", "repeated", "DISK"),
            Input("--audit", "how much of what is called unchanged is re-read: 64, 5%%, all or 0"),
            Input("--no-checkpoint", "leave nothing on the storage; the next backup compares", kind="flag"),
            Input("--allow-partial", "publish a flagged point even when parts cannot be read", kind="flag"),
        ),
        (
            "graincopy backup /ds1/web.raw /ds2/db.raw",
            "graincopy backup --name shop /ds1/web.raw --dry-run",
            "graincopy backup vm:web --exclude vdb",
        ),
        "Several WORKLOADs make one restore point, at one instant where the storage allows it.",
        changes=True,
        results=(WARNED,),
    ),
    Operation(
        "points",
        "list restore points, newest first",
        "graincopy.app.reading:points",
        (Input("--workload", "only those of this workload (name or id)", metavar="W"),),
        ("graincopy points", "graincopy points --workload shop --json"),
    ),
    Operation(
        "show",
        "say everything about one restore point",
        "graincopy.app.reading:show",
        (POINT,),
        ("graincopy show latest",),
    ),
    Operation(
        "diff",
        "show where two restore points differ",
        "graincopy.app.reading:diff",
        (
            Input("first", POINT.help, metavar="POINT"),
            Input("second", POINT.help, metavar="POINT"),
        ),
        ("graincopy diff latest~1 latest",),
    ),
    Operation(
        "restore",
        "bring disks back, in place or as new files",
        "graincopy.app.making:restore",
        (
            POINT,
            DISK,
            Input("--in-place", "write what differs onto the files the disks came from", kind="flag"),
            Input("--to", "write each disk as a new file DIR/NAME", metavar="DIR"),
            Input("--compare", "find the difference by reading everything; for use after a crash", kind="flag"),
            Input("--preallocate", "with --to: take the whole space at once", kind="flag"),
            Input("--as", "with --to: define the virtual machine anew under this name", metavar="NEWVM"),
            Input("--vm", "which machine, where the restore point holds several", metavar="NAME"),
            Input("--onto", "with --to: write this disk onto a block device instead", "repeated", "DISK=DEVICE"),
            Input("--instant", "start NEWVM at once, and pull its disks to their place meanwhile", kind="flag"),
            Input("--stop", "in place: shut the machines down first", kind="flag"),
            Input("--stop-timeout", "seconds that they have for it; default: 120", kind="number", metavar="S"),
            Input("--force-stop", "pull the plug of one that does not shut down in time", kind="flag"),
            Input("--start", "start the machines when their disks are back", kind="flag"),
            *HYBRID,
        ),
        (
            "graincopy restore latest~3 --in-place",
            "graincopy restore 3f9c --disk web.raw --to /restore",
            "graincopy restore latest --in-place --stop --start",
            "graincopy restore latest --to /vms/web2 --as web2 --start",
            "graincopy restore latest --instant --to /vms/web2 --as web2",
        ),
        "In place, an undo is kept first; graincopy undo takes the restore back. A restore that was cut off is"
        " finished by the same command. --instant may be given --to NEWVM alone: its disks go into a folder of"
        " that name beside the original ones. --medium-only and --trust-map go with --instant.",
        changes=True,
        results=(WARNED,),
    ),
    Operation(
        "verify",
        "start a virtual machine from a throw-away copy, and see whether it lives",
        "graincopy.app.trial:verify",
        (
            POINT,
            Input("--boot", "start it: without a network, under another name, until it gives a sign", kind="flag"),
            Input("--vm", "which machine, where the restore point holds several", metavar="NAME"),
            Input("--until", "sign of life: agent, or console:TEXT; default: agent", metavar="SIGN"),
            Input("--timeout", "seconds to wait for it; default: 300", kind="number", metavar="S"),
            Input("--picture", "write what its screen showed at the end to FILE (PNG)", metavar="FILE"),
        ),
        (
            "graincopy verify latest --boot",
            "graincopy verify latest --boot --vm web --until 'console:login:' --timeout 120",
        ),
        "Everything is read from the medium. Result, duration and picture are kept beside the restore point;"
        " graincopy show lists them.",
    ),
    Operation(
        "undo",
        "take an in-place restore back",
        "graincopy.app.making:undo",
        (
            Input("restore", "the id that restore printed, or a unique beginning", metavar="RESTORE"),
            Input("--force", "also overwrite what was changed after the restore", kind="flag"),
        ),
        ("graincopy undo 8d20",),
        changes=True,
    ),
)
