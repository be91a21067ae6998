"""Operations that show a restore point without restoring it: as an NBD export, as files."""

from __future__ import annotations

from graincopy.app.operations.base import DISK, HYBRID, POINT, WARNED, Input, Operation

VIEWS = (
    Operation(
        "serve-nbd",
        "serve disks of a restore point over NBD, at once, without restoring",
        "graincopy.app.serving:serve_nbd",
        (
            POINT,
            DISK,
            Input("--socket", "serve at this Unix socket; default: one of its own, printed", metavar="PATH"),
            Input("--port", "serve TCP at this port; 0 is any that is free", kind="number", metavar="N"),
            Input("--bind", "with --port: the address; any but loopback needs --tls", metavar="ADDRESS"),
            Input("--tls", "ca-cert.pem, server-cert.pem, server-key.pem; clients show one too", metavar="DIR"),
            Input("--writable", "take writes; they are thrown away at the end", kind="flag"),
            Input("--overlay", "take writes and keep them in FILE, to be taken up again later", metavar="FILE"),
            *HYBRID,
        ),
        (
            "graincopy serve-nbd latest --disk web.raw --socket /run/web.sock",
            "graincopy serve-nbd latest --disk web.raw --writable --port 10809",
        ),
        "The export's name is the disk's NAME; of a single disk also the empty name. It serves until SIGTERM or"
        " Ctrl-C. Clean grains come from the original volume, dirty ones from the medium.",
        results=(WARNED,),
    ),
    Operation(
        "mount",
        "show the disks of a restore point as files below a directory",
        "graincopy.app.browsing:mount",
        (
            POINT,
            Input("directory", "an empty directory", metavar="DIR"),
            DISK,
            Input("--allow-other", "let other users in too (root, or user_allow_other in fuse.conf)", kind="flag"),
            *HYBRID,
        ),
        ("graincopy mount latest /mnt/point",),
        "It stays in the foreground until DIR is unmounted (fusermount3 -u DIR) or a signal comes.",
        results=(WARNED,),
    ),
    Operation(
        "files",
        "list partitions, directories and files inside a disk of a restore point",
        "graincopy.app.browsing:files",
        (POINT, Input("where", "DISK, DISK:PATH, or DISK@PARTITION:PATH", metavar="DISK[:PATH]")),
        (
            "graincopy files latest web.raw",
            "graincopy files latest web.raw:/etc",
            "graincopy files latest web.raw@2:/",
        ),
        results=(WARNED,),
        looks_inside=True,
    ),
    Operation(
        "extract",
        "take files and trees out of a disk of a restore point",
        "graincopy.app.browsing:extract",
        (
            POINT,
            Input("where", "DISK:PATH, or DISK@PARTITION:PATH", metavar="DISK:PATH"),
            Input("--to", "directory to put it in, or - for standard output", metavar="DIR"),
            Input("--setuid", "keep setuid, setgid and file capabilities", kind="flag"),
            Input("--devices", "make device nodes", kind="flag"),
            *HYBRID,
        ),
        (
            "graincopy extract latest web.raw:/etc --to /restore",
            "graincopy extract latest web.raw:/etc/fstab --to -",
        ),
        results=(WARNED,),
        looks_inside=True,
    ),
)
