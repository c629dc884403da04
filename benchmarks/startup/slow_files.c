/* A file system that takes its time: preloaded, it lets every call of libc that names a file below SLOW_PREFIX (several,
   separated by ':') wait SLOW_US microseconds first, as a busy network file system would, and counts these calls. At
   the end of a process their number is added as one line to SLOW_LOG. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static atomic_long calls;

static void wait_for(const char *path) {
    const char *prefixes = getenv("SLOW_PREFIX");
    while (path && prefixes && *prefixes) {
        size_t length = strcspn(prefixes, ":");
        if (length && !strncmp(path, prefixes, length)) {
            const char *us = getenv("SLOW_US");
            long t = us ? atol(us) : 0;
            struct timespec pause = {t / 1000000, t % 1000000 * 1000};
            atomic_fetch_add(&calls, 1);
            if (t)
                nanosleep(&pause, NULL);
            return;
        }
        prefixes += length + (prefixes[length] == ':');
    }
}

__attribute__((destructor)) static void tell(void) {
    const char *log = getenv("SLOW_LOG");
    FILE *file = log && calls ? fopen(log, "a") : NULL;
    if (file) {
        fprintf(file, "%ld\n", (long)calls);
        fclose(file);
    }
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define MODE(after) mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, after); \
    mode = va_arg(list, mode_t); va_end(list); }

int open(const char *path, int flags, ...) { REAL(open); MODE(flags) wait_for(path); return real(path, flags, mode); }
int open64(const char *path, int flags, ...) { REAL(open64); MODE(flags) wait_for(path); return real(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) {
    REAL(openat); MODE(flags) wait_for(path); return real(at, path, flags, mode);
}
int stat(const char *path, struct stat *to) { REAL(stat); wait_for(path); return real(path, to); }
int lstat(const char *path, struct stat *to) { REAL(lstat); wait_for(path); return real(path, to); }
int stat64(const char *path, struct stat64 *to) { REAL(stat64); wait_for(path); return real(path, to); }
int lstat64(const char *path, struct stat64 *to) { REAL(lstat64); wait_for(path); return real(path, to); }
int fstatat(int at, const char *path, struct stat *to, int flags) {
    REAL(fstatat); wait_for(path); return real(at, path, to, flags);
}
int access(const char *path, int how) { REAL(access); wait_for(path); return real(path, how); }
ssize_t readlink(const char *path, char *to, size_t size) { REAL(readlink); wait_for(path); return real(path, to, size); }
FILE *fopen(const char *path, const char *how) { REAL(fopen); wait_for(path); return real(path, how); }
FILE *fopen64(const char *path, const char *how) { REAL(fopen64); wait_for(path); return real(path, how); }
