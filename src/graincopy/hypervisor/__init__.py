"""Below stages 2 to 5: talking to libvirtd and QEMU, and nothing that decides what a backup is."""
