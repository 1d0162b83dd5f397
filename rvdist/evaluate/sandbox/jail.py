"""What a process asks of the Linux kernel to lose its powers for good: namespaces, Landlock, seccomp, limits.

Each call is one the C library or the kernel has; nothing is installed and no privilege is needed where the kernel
lets a user make namespaces. Knows nothing of programs and verdicts. Every failure is an OSError that names the call.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Sequence

NOBODY = 65534
_NAMESPACES = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
_USER_NAMESPACE = 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY_NOSUID_NODEV = -100, 0x8000, 7
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
# the same number on every architecture
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3

# machine → (the kernel's number for it, its fcntl, system calls that a program may not make). Refused with EPERM are:
# making a process or a thread, running another program, reaching another process or its limits, sockets, mounts,
# memory or objects that outlive a process, and changing what files are (Landlock does not watch owners and modes).
_SYSTEM_CALLS = {
    "x86_64": (
        0xC000003E,
        72,
        {
            "clone": 56, "fork": 57, "vfork": 58, "clone3": 435, "execve": 59, "execveat": 322,
            "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
            "pidfd_open": 434, "pidfd_send_signal": 424, "pidfd_getfd": 438, "ptrace": 101, "kcmp": 312,
            "process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440, "migrate_pages": 256,
            "move_pages": 279, "prctl": 157, "prlimit64": 302, "setrlimit": 160, "setpriority": 141, "ioprio_set": 251,
            "sched_setaffinity": 203, "sched_setscheduler": 144, "sched_setparam": 142, "sched_setattr": 314,
            "setsid": 112, "setpgid": 109, "setuid": 105, "setresuid": 117, "capset": 126,
            "socket": 41, "socketpair": 53, "io_uring_setup": 425, "bpf": 321, "perf_event_open": 298,
            "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249, "seccomp": 317,
            "mount": 165, "umount2": 166, "move_mount": 429, "open_tree": 428, "fsopen": 430, "fspick": 433,
            "mount_setattr": 442, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308,
            "open_by_handle_at": 304, "fanotify_init": 300,
            "shmget": 29, "shmat": 30, "shmctl": 31, "semget": 64, "semop": 65, "semctl": 66, "semtimedop": 220,
            "msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "mq_open": 240, "mq_unlink": 241,
            "memfd_create": 319, "memfd_secret": 447,
            "truncate": 76, "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "lchown": 94,
            "fchown": 93, "fchownat": 260, "utime": 132, "utimes": 235, "utimensat": 280, "futimesat": 261,
            "setxattr": 188, "lsetxattr": 189, "setxattrat": 463, "removexattr": 197, "lremovexattr": 198,
            "removexattrat": 466, "file_setattr": 469,
        },
    ),
    "aarch64": (
        0xC00000B7,
        25,
        {
            "clone": 220, "clone3": 435, "execve": 221, "execveat": 281,
            "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
            "pidfd_open": 434, "pidfd_send_signal": 424, "pidfd_getfd": 438, "ptrace": 117, "kcmp": 272,
            "process_vm_readv": 270, "process_vm_writev": 271, "process_madvise": 440, "migrate_pages": 238,
            "move_pages": 239, "prctl": 167, "prlimit64": 261, "setrlimit": 164, "setpriority": 140, "ioprio_set": 30,
            "sched_setaffinity": 122, "sched_setscheduler": 119, "sched_setparam": 118, "sched_setattr": 274,
            "setsid": 157, "setpgid": 154, "setuid": 146, "setresuid": 147, "capset": 91,
            "socket": 198, "socketpair": 199, "io_uring_setup": 425, "bpf": 280, "perf_event_open": 241,
            "userfaultfd": 282, "keyctl": 219, "add_key": 217, "request_key": 218, "seccomp": 277,
            "mount": 40, "umount2": 39, "move_mount": 429, "open_tree": 428, "fsopen": 430, "fspick": 433,
            "mount_setattr": 442, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268,
            "open_by_handle_at": 265, "fanotify_init": 262,
            "shmget": 194, "shmctl": 195, "shmat": 196, "semget": 190, "semctl": 191, "semtimedop": 192, "semop": 193,
            "msgget": 186, "msgctl": 187, "msgrcv": 188, "msgsnd": 189, "mq_open": 180, "mq_unlink": 181,
            "memfd_create": 279, "memfd_secret": 447,
            "truncate": 45, "fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "fchown": 55, "fchownat": 54,
            "utimensat": 88, "setxattr": 5, "lsetxattr": 6, "setxattrat": 463, "removexattr": 14, "lremovexattr": 15,
            "removexattrat": 466, "file_setattr": 469,
        },
    ),
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(name: str, *args: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A function of the C library; whole numbers go as C longs, as prctl and syscall expect."""
    given = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = int(getattr(_libc, name)(*given))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def enter_namespaces(readable: Sequence[str], scratch_bytes: int) -> None:
    """From here on this process's children live alone: no network, no other process, and a file tree that holds
    `readable`, read-only, and an empty /scratch of `scratch_bytes` in memory, which is gone with the last of them.

    Root does it with its own power and gives that up in `become_nobody`; anyone else through a user namespace.
    """
    flags = sum(_NAMESPACES.values())
    if os.geteuid() == 0:
        _call("unshare", flags)
    else:
        user, group = os.geteuid(), os.getegid()
        _call("unshare", flags | _USER_NAMESPACE)
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    root = "/proc"  # any directory that is sure to exist and hides nothing needed below
    scratch = root + "/scratch"
    _call("mount", b"tmpfs", root.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=1m,mode=755")
    for path in readable:
        inside = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(path), inside)
        else:
            os.makedirs(inside, exist_ok=True)
            _call("mount", os.fsencode(path), os.fsencode(inside), None, _MS_BIND | _MS_REC, None)
    os.mkdir(scratch)
    read_only = ctypes.create_string_buffer(struct.pack("QQQQ", _MOUNT_ATTR_RDONLY_NOSUID_NODEV, 0, 0, 0), 32)
    _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, root.encode(), _AT_RECURSIVE, read_only, 32)
    options = f"size={scratch_bytes},nr_inodes=1024,mode=1777".encode()
    _call("mount", b"tmpfs", scratch.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", 2)  # MNT_DETACH: the old tree, which lies on top
    os.chdir("/scratch")


def see_only(readable: Sequence[str], listable: Sequence[str]) -> None:
    """From here on this process and its children can open only what lies under `readable`, and only to read, and see
    the names under `listable`."""
    version = _call("syscall", _LANDLOCK_CREATE, None, 0, 1)
    files = (1 << 13 + (version >= 2) + (version >= 3) + (version >= 5)) - 1
    fields = [files] + [3] * (version >= 4) + [3] * (version >= 6)  # files; TCP; abstract sockets and signals
    rules = ctypes.create_string_buffer(struct.pack(f"{len(fields)}Q", *fields), 8 * len(fields))
    ruleset = _call("syscall", _LANDLOCK_CREATE, rules, 8 * len(fields), 0)
    allowed = [(path, _READ_FILE | _READ_DIR) for path in readable] + [(path, _READ_DIR) for path in listable]
    for path, access in allowed:
        directory = os.open(path, os.O_PATH)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access, directory), 12)
        _call("syscall", _LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(directory)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("syscall", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)
    os.chdir("/")


def adopt_orphans() -> None:
    """Processes below this one that lose their parent become its children, so that it can wait for the last."""
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends. Changing users undoes it."""
    _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def become_nobody() -> None:
    """Give up root; in a user namespace everyone is nobody already."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def drop_capabilities() -> None:
    """All of them: root's, and those that whoever makes a user namespace has in it."""
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
    _call("capset", header, ctypes.create_string_buffer(24))


def confine(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
    """Limits and the system call filter, for good: the last step before code that is not ours."""
    die_with_parent()
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)  # no other process of the same user may look into this one
    for limit, soft, hard in (
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, 32, 32),
        (resource.RLIMIT_NPROC, 1, 1),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        ceiling = resource.getrlimit(limit)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(limit, (soft, hard))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    program = ctypes.create_string_buffer(_filter())
    address = struct.pack("HxxxxxxQ", (len(program) - 1) // 8, ctypes.addressof(program))
    _call("prctl", _PR_SET_SECCOMP, 2, ctypes.create_string_buffer(address, len(address)), 0, 0)


def _filter() -> bytes:
    """The filter program: kill on a foreign calling convention, EPERM for the calls listed, allow the rest."""
    machine = os.uname().machine
    if machine not in _SYSTEM_CALLS:
        raise OSError(f"no list of system calls for {machine}")
    architecture, fcntl, refused = _SYSTEM_CALLS[machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    steps = [
        (load, 0, 0, 4),  # which calling convention
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # which call
        (at_least, 0, 1, 0x40000000),  # x32, a second numbering on x86_64
        (give, 0, 0, kill),
    ]
    for number in refused.values():
        steps += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    steps += [
        (equal, 0, 5, fcntl),
        (load, 0, 0, 24),  # its second argument: F_SETOWN, F_SETSIG and F_SETOWN_EX are a way to signal others
        (equal, 2, 0, 8),
        (equal, 1, 0, 10),
        (equal, 0, 1, 15),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
