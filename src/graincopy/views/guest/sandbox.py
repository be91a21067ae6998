"""What the process that reads hostile file systems gives up before it reads the first byte of one.

In this order: other processes' memory and files (an unprivileged user without groups), ways back (no_new_privs),
more than a bounded amount of memory, processor time and descriptors (setrlimit(2)), and all system calls but those
that reading takes (seccomp(2), filter mode; Documentation/userspace-api/seccomp_filter.rst).
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable
from dataclasses import dataclass

_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 8, 22, 38  # linux/prctl.h
_SECCOMP_MODE_FILTER = 2
_ALLOW, _ERRNO_EPERM = 0x7FFF0000, 0x00050001  # linux/seccomp.h
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h
_X32 = 0x40000000
_CAPABILITY_VERSION_3, _CAP_DAC_READ_SEARCH = 0x20080522, 2  # linux/capability.h

# asm/unistd_64.h for x86-64, asm-generic/unistd.h for the others; audit architecture from linux/audit.h
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3}
_COLUMNS = {"x86_64": 0, "aarch64": 1, "riscv64": 1}
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "getpid": (39, 172),
    "exit": (60, 93),
    "fcntl": (72, 25),
    "readlink": (89, None),
    "gettimeofday": (96, 169),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "fgetxattr": (193, 10),
    "flistxattr": (196, 13),
    "futex": (202, 98),
    "getdents64": (217, 61),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "exit_group": (231, 94),
    "openat": (257, 56),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "getrandom": (318, 278),
    "statx": (332, 291),
}
_FILE_CALLS = {"dup", "fcntl", "readlink", "fgetxattr", "flistxattr", "getdents64", "openat", "readlinkat", "pread64"}


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much the reader may take. Bytes, seconds of processor time, descriptors."""

    memory: int = 512 << 20
    processor: int = 3600
    descriptors: int = 1024
    user: int = 65534


def give_up(bounds: Bounds, root_fd: int = -1) -> None:
    """Give up everything that reading does not take. With ``root_fd``, a mounted file system, that becomes the whole
    world of files, and may be read whoever owns them; without, no file can be opened any more.

    Raises OSError when something cannot be given up that this process has.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if root_fd >= 0:
        os.fchdir(root_fd)
        os.chroot(".")
    _limit(bounds)
    if os.geteuid() == 0:
        _become(libc, bounds.user, keep_reading=root_fd >= 0)
    _prctl(libc, _PR_SET_DUMPABLE, 0)
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    _filter_calls(libc, _CALLS if root_fd >= 0 else _CALLS.keys() - _FILE_CALLS)


def _limit(bounds: Bounds) -> None:
    for what, most in (
        (resource.RLIMIT_AS, bounds.memory),
        (resource.RLIMIT_CPU, bounds.processor),
        (resource.RLIMIT_NOFILE, bounds.descriptors),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _become(libc: ctypes.CDLL, user: int, keep_reading: bool) -> None:
    """Another user without groups, and of root's powers none; or the one to read what others own."""
    if keep_reading:
        _prctl(libc, _PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    powers = 1 << _CAP_DAC_READ_SEARCH if keep_reading else 0
    header = struct.pack("=LL", _CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, struct.pack("=LLLLLL", powers, powers, 0, 0, 0, 0)))


def _filter_calls(libc: ctypes.CDLL, names: Iterable[str]) -> None:
    """Every other system call fails with EPERM from now on. Machines whose numbers are not known go without."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return
    numbers = [_CALLS[name][_COLUMNS[machine]] for name in names]
    program = _program(_ARCHITECTURES[machine], [number for number in numbers if number is not None])
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    _check(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(described), 0, 0))


def _program(architecture: int, numbers: list[int]) -> bytes:
    """A classic BPF program over struct seccomp_data: number (u32) at 0, architecture (u32) at 4."""
    count = len(numbers)
    steps = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQUAL, 0, count + 2, architecture),
        (_LOAD, 0, 0, 0),
        (_JUMP_AT_LEAST, count, 0, _X32),
        *((_JUMP_EQUAL, count - at, 0, number) for at, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ERRNO_EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBL", *step) for step in steps)


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    _check(libc.prctl(option, value, 0, 0, 0))


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
