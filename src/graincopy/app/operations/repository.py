"""Operations that keep the repository in order."""

from __future__ import annotations

from graincopy.app.operations.base import WARNED, Input, Operation

REPOSITORY = (
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
        results=(WARNED,),
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
)
