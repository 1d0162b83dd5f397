/* What a process does to files, counted; at one of them the process ends, or the file system fails. For LD_PRELOAD.
 *
 * FAULT_STATE  a file of four 64-bit numbers: how many operations were counted, at which of them it happens (-1: never),
 *              whether it did (else 0), and whether it does at all after it too; and what happens: "kill", "stop", "torn"
 *              (half of a write, then the end), "short" (half of a read or write), or an errno
 * FAULT_UNDER  only what lies below this directory is counted
 * FAULT_OPS    which operations, separated by commas: create write sync rename remove mkdir mode size open read close
 * FAULT_ROLE   "worker" or "driver": only Ray's workers, only others
 * FAULT_LOG    a line an operation
 * FAULT_NO_EXCHANGE  names cannot be exchanged, as on some file systems
 * FAULT_NO_ALLOCATE  no room can be set aside, as on NFS before 4.2
 *
 * All is read when something happens, so that a forked process can be given others.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))real(#name))
#define PASS 0
#define SHORT (-1)

struct state { long count, target, fired, onwards; char action[16]; };

static void *real(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

static int is_worker(void)
{
    static int known = -1;
    if (known < 0) {
        char line[4096] = "";
        int fd = syscall(SYS_open, "/proc/self/cmdline", O_RDONLY, 0);
        long n = syscall(SYS_read, fd, line, sizeof line - 1);
        syscall(SYS_close, fd);
        for (long k = 0; k < n; k++)
            if (!line[k])
                line[k] = ' ';
        known = strstr(line, "default_worker.py") || !strncmp(line, "ray::", 5);
    }
    return known;
}

static int listed(const char *list, const char *op)
{
    size_t n = strlen(op);
    for (const char *at = list; (at = strstr(at, op)); at += n)
        if ((at == list || at[-1] == ',') && (!at[n] || at[n] == ','))
            return 1;
    return 0;
}

static struct state *shared(const char *file)
{
    static struct state *mapped;
    static char of[PATH_MAX];
    if (!mapped || strcmp(of, file)) {
        int fd = syscall(SYS_open, file, O_RDWR, 0);
        if (fd < 0)
            return NULL;
        mapped = mmap(NULL, sizeof *mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        syscall(SYS_close, fd);
        snprintf(of, sizeof of, "%s", file);
    }
    return mapped;
}

static void tell(long number, const char *op, const char *path)
{
    char line[PATH_MAX + 64];
    const char *log = getenv("FAULT_LOG");
    if (!log)
        return;
    int n = snprintf(line, sizeof line, "%ld %s %s %s\n", number, is_worker() ? "worker" : "driver", op, path);
    int fd = syscall(SYS_open, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
    syscall(SYS_write, fd, line, n);
    syscall(SYS_close, fd);
}

static void end(int with)
{
    syscall(SYS_kill, getpid(), with);
}

/* PASS, SHORT, or the errno to fail with; or it does not return. */
static int decide(const char *op, const char *path, int can_tear)
{
    const char *file = getenv("FAULT_STATE"), *under = getenv("FAULT_UNDER"), *ops = getenv("FAULT_OPS");
    const char *role = getenv("FAULT_ROLE");
    if (!file || !under || !ops || strncmp(path, under, strlen(under)) || !listed(ops, op))
        return PASS;
    if (role && strcmp(role, is_worker() ? "worker" : "driver"))
        return PASS;
    int before = errno;
    struct state *state = shared(file);
    if (!state)
        return PASS;
    long number = __atomic_fetch_add(&state->count, 1, __ATOMIC_SEQ_CST);
    tell(number, op, path);
    errno = before;
    if (state->target < 0 || number < state->target || (number > state->target && !state->onwards))
        return PASS;
    state->fired = getpid();
    const char *action = state->action;
    if (!strcmp(action, "kill") || (!strcmp(action, "torn") && !can_tear))
        end(SIGKILL);
    if (!strcmp(action, "stop"))
        end(SIGSTOP);
    if (!strcmp(action, "short") || !strcmp(action, "torn"))
        return SHORT;
    return atoi(action);
}

static int torn(void)
{
    const char *file = getenv("FAULT_STATE");
    struct state *state = file ? shared(file) : NULL;
    return state && !strcmp(state->action, "torn");
}

static const char *of_descriptor(int fd, char *into)
{
    char name[64];
    int before = errno;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlink, name, into, PATH_MAX - 1);
    into[n > 0 ? n : 0] = 0;
    errno = before;
    return into;
}

static const char *of_name(int directory, const char *path, char *into)
{
    if (path[0] == '/') {
        snprintf(into, PATH_MAX, "%s", path);
        return into;
    }
    if (directory == AT_FDCWD) {
        if (!getcwd(into, PATH_MAX))
            into[0] = 0;
    } else
        of_descriptor(directory, into);
    size_t n = strlen(into);
    snprintf(into + n, PATH_MAX - n, "/%s", path);
    return into;
}

static int by_name(const char *op, int directory, const char *path)
{
    char full[PATH_MAX];
    return getenv("FAULT_STATE") ? decide(op, of_name(directory, path, full), 0) : PASS;
}

static int by_descriptor(const char *op, int fd, int can_tear)
{
    char full[PATH_MAX];
    return getenv("FAULT_STATE") ? decide(op, of_descriptor(fd, full), can_tear) : PASS;
}

#define FAIL(how) do { int error_ = (how); if (error_ > 0) { errno = error_; return -1; } } while (0)

static int opening(int directory, const char *path, int flags)
{
    return by_name(flags & (O_CREAT | O_TRUNC) ? "create" : "open", directory, path);
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

#define OPEN(name) int name(const char *path, int flags, ...) \
{ MODE(flags) FAIL(opening(AT_FDCWD, path, flags)); return REAL(name)(path, flags, mode); }
OPEN(open)
OPEN(open64)

#define OPENAT(name) int name(int directory, const char *path, int flags, ...) \
{ MODE(flags) FAIL(opening(directory, path, flags)); return REAL(name)(directory, path, flags, mode); }
OPENAT(openat)
OPENAT(openat64)

int close(int fd)
{
    int how = by_descriptor("close", fd, 0);
    int done = REAL(close)(fd);
    FAIL(how);
    return done;
}

static ssize_t cut(ssize_t done)
{
    if (torn())
        end(SIGKILL);
    return done;
}

ssize_t write(int fd, const void *data, size_t size)
{
    int how = by_descriptor("write", fd, 1);
    FAIL(how);
    return how == SHORT ? cut(REAL(write)(fd, data, (size + 1) / 2)) : REAL(write)(fd, data, size);
}

#define PWRITE(name, kind) ssize_t name(int fd, const void *data, size_t size, kind offset) \
{ \
    int how = by_descriptor("write", fd, 1); \
    FAIL(how); \
    return how == SHORT ? cut(REAL(name)(fd, data, (size + 1) / 2, offset)) : REAL(name)(fd, data, size, offset); \
}
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t read(int fd, void *data, size_t size)
{
    int how = by_descriptor("read", fd, 0);
    FAIL(how);
    return REAL(read)(fd, data, how == SHORT ? (size + 1) / 2 : size);
}

#define PREAD(name, kind) ssize_t name(int fd, void *data, size_t size, kind offset) \
{ \
    int how = by_descriptor("read", fd, 0); \
    FAIL(how); \
    return REAL(name)(fd, data, how == SHORT ? (size + 1) / 2 : size, offset); \
}
PREAD(pread, off_t)
PREAD(pread64, off64_t)

#define PREADV(name, kind) ssize_t name(int fd, const struct iovec *parts, int count, kind offset) \
{ \
    int how = by_descriptor("read", fd, 0); \
    FAIL(how); \
    struct iovec first = {parts[0].iov_base, (parts[0].iov_len + 1) / 2}; \
    return how == SHORT ? REAL(name)(fd, &first, 1, offset) : REAL(name)(fd, parts, count, offset); \
}
PREADV(preadv, off_t)
PREADV(preadv64, off64_t)

int fsync(int fd) { FAIL(by_descriptor("sync", fd, 0)); return REAL(fsync)(fd); }
int fdatasync(int fd) { FAIL(by_descriptor("sync", fd, 0)); return REAL(fdatasync)(fd); }
int ftruncate(int fd, off_t size) { FAIL(by_descriptor("size", fd, 0)); return REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { FAIL(by_descriptor("size", fd, 0)); return REAL(ftruncate64)(fd, size); }
int fchmod(int fd, mode_t mode) { FAIL(by_descriptor("mode", fd, 0)); return REAL(fchmod)(fd, mode); }
int chmod(const char *path, mode_t mode) { FAIL(by_name("mode", AT_FDCWD, path)); return REAL(chmod)(path, mode); }

int fallocate(int fd, int mode, off_t at, off_t size)
{
    FAIL(getenv("FAULT_NO_ALLOCATE") ? EOPNOTSUPP : by_descriptor("size", fd, 0));
    return REAL(fallocate)(fd, mode, at, size);
}

int rename(const char *from, const char *to) { FAIL(by_name("rename", AT_FDCWD, to)); return REAL(rename)(from, to); }

int renameat(int from_in, const char *from, int to_in, const char *to)
{
    FAIL(by_name("rename", to_in, to));
    return REAL(renameat)(from_in, from, to_in, to);
}

int renameat2(int from_in, const char *from, int to_in, const char *to, unsigned flags)
{
    FAIL(flags && getenv("FAULT_NO_EXCHANGE") ? EINVAL : by_name("rename", to_in, to));
    return REAL(renameat2)(from_in, from, to_in, to, flags);
}

int link(const char *from, const char *to) { FAIL(by_name("create", AT_FDCWD, to)); return REAL(link)(from, to); }
int unlink(const char *path) { FAIL(by_name("remove", AT_FDCWD, path)); return REAL(unlink)(path); }
int rmdir(const char *path) { FAIL(by_name("remove", AT_FDCWD, path)); return REAL(rmdir)(path); }
int unlinkat(int in, const char *path, int flags) { FAIL(by_name("remove", in, path)); return REAL(unlinkat)(in, path, flags); }
int mkdir(const char *path, mode_t mode) { FAIL(by_name("mkdir", AT_FDCWD, path)); return REAL(mkdir)(path, mode); }
int mkdirat(int in, const char *path, mode_t mode) { FAIL(by_name("mkdir", in, path)); return REAL(mkdirat)(in, path, mode); }
