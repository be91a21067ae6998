"""Operations on this host and its storage: what is there, what can be done, what is left."""

from __future__ import annotations

from graincopy.app.operations.base import WARNED, Input, Operation

HOST = (
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
        results=(WARNED,),
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
        "graincopy.app.doctor:doctor",
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
