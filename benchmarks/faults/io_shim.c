/* Fails the n-th call that changes files below a directory: LD_PRELOAD it (see disk.py).

   HPCMLP_IO_BELOW  directory; calls elsewhere pass
   HPCMLP_IO_AT     number of the call that fails, from 1; 0: none
   HPCMLP_IO_ERRNO  what it fails with
   HPCMLP_IO_FROM   1: all later calls that need room fail too, as on a full disk
   HPCMLP_IO_LOG    file that the number of calls is written to at exit
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;

static long number(const char *name) { const char *text = getenv(name); return text ? atol(text) : 0; }

static int below(const char *path) {
    const char *base = getenv("HPCMLP_IO_BELOW");
    return base && path && strncmp(path, base, strlen(base)) == 0;
}

static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length <= 0) return 0;
    path[length] = 0;
    return below(path);
}

/* Whether this call fails; errno is set then. `room`: it would take space on the disk. */
static int fails(int room) {
    long at = number("HPCMLP_IO_AT"), now = atomic_fetch_add(&calls, 1) + 1;
    if (at && (now == at || (now > at && room && number("HPCMLP_IO_FROM")))) {
        errno = (int)number("HPCMLP_IO_ERRNO");
        return 1;
    }
    return 0;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (fd > 2 && fd_below(fd) && fails(1)) {
        if (number("HPCMLP_IO_FROM") && size > 1 && atomic_load(&calls) == number("HPCMLP_IO_AT"))
            return real(fd, data, size / 2);        /* the last room is filled, as a full disk does */
        return -1;
    }
    return real(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    return fd_below(fd) && fails(1) ? -1 : real(fd, data, size, at);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    return fd_below(fd) && fails(1) ? -1 : real(fd, data, size, at);
}

int fsync(int fd) {
    REAL(fsync);
    return fd_below(fd) && fails(0) ? -1 : real(fd);
}

int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    return fd_below(fd) && fails(0) ? -1 : real(fd, size);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return below(to) && fails(0) ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return below(path) && fails(1) ? -1 : real(path, mode);
}

int open64(const char *path, int flags, ...) {
    REAL(open64);
    va_list list;
    va_start(list, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;
    va_end(list);
    return flags & O_CREAT && below(path) && fails(1) ? -1 : real(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    REAL(open);
    va_list list;
    va_start(list, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;
    va_end(list);
    return flags & O_CREAT && below(path) && fails(1) ? -1 : real(path, flags, mode);
}

__attribute__((destructor)) static void tell(void) {
    const char *log = getenv("HPCMLP_IO_LOG");
    FILE *file = log && atomic_load(&calls) ? fopen(log, "a") : NULL;
    if (file) {
        fprintf(file, "%ld\n", atomic_load(&calls));
        fclose(file);
    }
}
