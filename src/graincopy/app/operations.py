"""The operations table: name, input, help and output of everything graincopy does. All faces are made from it.

Nothing heavy is imported here, so that ``graincopy --help`` answers at once; ``action`` names the function that does
the work, as ``module:function``, and is looked up when the operation runs.
"""

from __future__ import annotations

import msgspec


class Input(msgspec.Struct, frozen=True):
    """One argument. A name that begins with ``-`` is an option, any other is positional."""

    name: str
    help: str
    kind: str = "text"  # "text", "flag", "number", "many" (one or more), "any" (none or more), "optional", "repeated"
    metavar: str = ""
    default: object = None
    choices: tuple[str, ...] = ()


class Operation(msgspec.Struct, frozen=True):
    """One thing that can be asked for."""

    name: str
    summary: str
    action: str
    inputs: tuple[Input, ...] = ()
    examples: tuple[str, ...] = ()
    about: str = ""
    changes: bool = False  # has effects, so it takes --dry-run
    results: tuple[tuple[int, str], ...] = ()  # exit codes that mean something special here
    opens: bool = True  # the repository, so its key can be derived while the rest is being imported


_POINT = Input("point", "an id, a unique beginning of one, latest, or latest~N", metavar="POINT")
_DISK = Input("--disk", "only this disk (its NAME in the restore point)", metavar="NAME")
_WARNED = (3, "done, with warnings")
_HYBRID = (
    Input("--medium-only", "take no snapshot of the original volumes; read everything from the medium", kind="flag"),
    Input("--trust-map", "do not prove by its id what is read from the original volumes", kind="flag"),
)


class Table(msgspec.Struct, frozen=True):
    """All operations, by name."""

    operations: tuple[Operation, ...] = msgspec.field(default_factory=tuple)

    def find(self, name: str) -> Operation:
        """The operation called ``name``. Raises KeyError."""
        for operation in self.operations:
            if operation.name == name:
                return operation
        raise KeyError(name)


OPERATIONS = Table(
    (
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
                Input(
                    "--exclude", "leave this disk of a VM out (vdb, or web:vdb); may be repeated", "repeated", "DISK"
                ),
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
            results=(_WARNED,),
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
            (_POINT,),
            ("graincopy show latest",),
        ),
        Operation(
            "diff",
            "show where two restore points differ",
            "graincopy.app.reading:diff",
            (
                Input("first", _POINT.help, metavar="POINT"),
                Input("second", _POINT.help, metavar="POINT"),
            ),
            ("graincopy diff latest~1 latest",),
        ),
        Operation(
            "restore",
            "bring disks back, in place or as new files",
            "graincopy.app.making:restore",
            (
                _POINT,
                _DISK,
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
                *_HYBRID,
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
            results=(_WARNED,),
        ),
        Operation(
            "verify",
            "start a virtual machine from a throw-away copy, and see whether it lives",
            "graincopy.app.trial:verify",
            (
                _POINT,
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
        Operation(
            "serve-nbd",
            "serve disks of a restore point over NBD, at once, without restoring",
            "graincopy.app.serving:serve_nbd",
            (
                _POINT,
                _DISK,
                Input("--socket", "serve at this Unix socket; default: one of its own, printed", metavar="PATH"),
                Input("--port", "serve TCP at this port; 0 is any that is free", kind="number", metavar="N"),
                Input("--bind", "with --port: the address; any but loopback needs --tls", metavar="ADDRESS"),
                Input("--tls", "ca-cert.pem, server-cert.pem, server-key.pem; clients show one too", metavar="DIR"),
                Input("--writable", "take writes; they are thrown away at the end", kind="flag"),
                Input("--overlay", "take writes and keep them in FILE, to be taken up again later", metavar="FILE"),
                *_HYBRID,
            ),
            (
                "graincopy serve-nbd latest --disk web.raw --socket /run/web.sock",
                "graincopy serve-nbd latest --disk web.raw --writable --port 10809",
            ),
            "The export's name is the disk's NAME; of a single disk also the empty name. It serves until SIGTERM or"
            " Ctrl-C. Clean grains come from the original volume, dirty ones from the medium.",
            results=(_WARNED,),
        ),
        Operation(
            "mount",
            "show the disks of a restore point as files below a directory",
            "graincopy.app.browsing:mount",
            (
                _POINT,
                Input("directory", "an empty directory", metavar="DIR"),
                _DISK,
                Input("--allow-other", "let other users in too (root, or user_allow_other in fuse.conf)", kind="flag"),
                *_HYBRID,
            ),
            ("graincopy mount latest /mnt/point",),
            "It stays in the foreground until DIR is unmounted (fusermount3 -u DIR) or a signal comes.",
            results=(_WARNED,),
        ),
        Operation(
            "files",
            "list partitions, directories and files inside a disk of a restore point",
            "graincopy.app.browsing:files",
            (_POINT, Input("where", "DISK, DISK:PATH, or DISK@PARTITION:PATH", metavar="DISK[:PATH]")),
            (
                "graincopy files latest web.raw",
                "graincopy files latest web.raw:/etc",
                "graincopy files latest web.raw@2:/",
            ),
            results=(_WARNED,),
        ),
        Operation(
            "extract",
            "take files and trees out of a disk of a restore point",
            "graincopy.app.browsing:extract",
            (
                _POINT,
                Input("where", "DISK:PATH, or DISK@PARTITION:PATH", metavar="DISK:PATH"),
                Input("--to", "directory to put it in, or - for standard output", metavar="DIR"),
                Input("--setuid", "keep setuid, setgid and file capabilities", kind="flag"),
                Input("--devices", "make device nodes", kind="flag"),
                *_HYBRID,
            ),
            (
                "graincopy extract latest web.raw:/etc --to /restore",
                "graincopy extract latest web.raw:/etc/fstab --to -",
            ),
            results=(_WARNED,),
        ),
        Operation(
            "expire",
            "remove restore points by retention rules",
            "graincopy.app.keeping:expire",
            (
                Input("--point", "remove just this one, also when it is damaged", metavar="POINT"),
                Input("--workload", "only those of this workload (name or id)", metavar="W"),
                *(
                    Input(f"--keep-{span}", f"keep the newest of each of the last N {unit}", kind="number", metavar="N")
                    for span, unit in (
                        ("last", "points"),
                        ("hourly", "hours"),
                        ("daily", "days"),
                        ("weekly", "weeks"),
                        ("monthly", "months"),
                        ("yearly", "years"),
                    )
                ),
            ),
            ("graincopy expire --keep-last 3 --keep-daily 14 --dry-run",),
            "The last good restore point of a workload always stays. Space is reclaimed by graincopy collect.",
            changes=True,
        ),
        Operation(
            "collect",
            "reclaim the space that no restore point needs",
            "graincopy.app.keeping:collect",
            (Input("--patience", "seconds to wait for runs that are still open", kind="number", metavar="S"),),
            ("graincopy collect",),
            changes=True,
        ),
        Operation(
            "check",
            "prove the repository's structure, with --data every byte",
            "graincopy.app.keeping:check",
            (Input("--data", "read, open and prove every byte of every object", kind="flag"),),
            ("graincopy check --data",),
        ),
        Operation(
            "key",
            "generate, add, list or remove passphrases",
            "graincopy.app.keys:key",
            (
                Input("verb", "what to do", choices=("generate", "add", "list", "remove")),
                Input("key", "for remove: the key's id", kind="optional", metavar="KEY"),
                Input("--label", "for add: a name for people", default=""),
                Input(
                    "--new-passphrase-file",
                    "for add: file whose first line is the new passphrase; for generate: the file to make",
                    metavar="FILE",
                ),
            ),
            (
                "graincopy key generate --new-passphrase-file /root/passphrase",
                "graincopy key add --label offsite --new-passphrase-file /root/second",
                "graincopy key list",
            ),
            "A generated passphrase is 256 random bits, for hosts that start graincopy by themselves: nobody can guess"
            " it, so it is not stretched. Any other one is, by Argon2id, which is meant to take a while.",
        ),
        Operation(
            "volumes",
            "explain on which volumes files lie and what can be done there",
            "graincopy.app.looking:volumes",
            (Input("path", "disk files or devices", kind="many", metavar="PATH"),),
            ("graincopy volumes /ds1/web.raw",),
            opens=False,
        ),
        Operation(
            "workloads",
            "list virtual machines, sets and subsystems that can be backed up",
            "graincopy.app.machines:workloads",
            (),
            ("graincopy workloads", "graincopy workloads --json"),
            results=(_WARNED,),
            opens=False,
        ),
        Operation(
            "targets",
            "list what graincopy has left on storage, and remove what nobody owns",
            "graincopy.app.looking:targets",
            (
                Input("--reap", "remove what no living process and no restore point needs", kind="flag"),
                Input(
                    "--silence",
                    "with --reap: watch other hosts' runs for S seconds, and fence those that give no sign of life",
                    kind="number",
                    metavar="S",
                ),
            ),
            ("graincopy targets", "graincopy targets --reap"),
            changes=True,
        ),
        Operation(
            "validate-volume",
            "run the conformance suite of volume drivers against your storage",
            "graincopy.app.looking:validate_volume",
            (
                Input("driver", "reflink, btrfs, locked, copied, qemu, lvm-thin, rbd or flashcopy", metavar="DRIVER"),
                Input("directory", "a directory on that storage to work in; of rbd also POOL", metavar="DIR"),
            ),
            ("graincopy validate-volume reflink /ds1", "graincopy validate-volume qemu /var/lib/libvirt/images"),
            "Everything is made in a folder of its own (of rbd as images of its own) and removed again.",
            opens=False,
        ),
        Operation(
            "validate-medium",
            "run the conformance suite of media against a place for backups",
            "graincopy.app.looking:validate_medium",
            (Input("url", "a directory to work in; it must be empty or absent", metavar="URL"),),
            ("graincopy validate-medium /backup/try",),
            opens=False,
        ),
        Operation(
            "doctor",
            "say what this host can do, and what to install for the rest",
            "graincopy.app.looking:doctor",
            (),
            ("graincopy doctor",),
            opens=False,
        ),
        Operation(
            "config",
            "explain the configuration in force",
            "graincopy.app.looking:config",
            (Input("verb", "what to do", choices=("check",)),),
            ("graincopy config check",),
            opens=False,
        ),
        Operation(
            "completion",
            "print a completion script for the shell",
            "graincopy.cli.main:completion",
            (Input("shell", "which one", choices=("bash", "zsh", "tcsh")),),
            ("graincopy completion bash > /etc/bash_completion.d/graincopy",),
            opens=False,
        ),
    )
)
