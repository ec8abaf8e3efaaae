/* Counts the calls that change what lies below a folder, whoever makes them: Python, orbax, or
   tensorstore's threads. The n-th one kills the process, or fails with an errno, before it is done.
   Loaded by LD_PRELOAD; nothing is counted until shim_arm. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096];
static atomic_long count, target;
static int failure, sticky, log_file = -1;
static atomic_int armed;

/* errno_ 0: kill. sticky_: every later call fails as well. log_: a descriptor, or -1. */
void shim_arm(const char *root_, long n, int errno_, int sticky_, int log_) {
  snprintf(root, sizeof root, "%s", root_);
  atomic_store(&count, 0);
  atomic_store(&target, n);
  failure = errno_; sticky = sticky_; log_file = log_;
  atomic_store(&armed, 1);
}
long shim_disarm(void) { atomic_store(&armed, 0); return atomic_load(&count); }

static int below(int folder, const char *path, char *full) {
  if (!atomic_load(&armed)) return 0;
  char link[64], base[4096] = "";
  if (path == NULL || (path[0] != '/' && folder != AT_FDCWD)) {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, base, sizeof base - 1);
    if (n < 0) return 0;
    base[n] = 0;
  }
  if (path == NULL) snprintf(full, 8192, "%s", base);
  else if (path[0] == '/') snprintf(full, 8192, "%s", path);
  else snprintf(full, 8192, "%s/%s", base, path);
  return strncmp(full, root, strlen(root)) == 0;
}

static unsigned long inode(const char *path) {
  struct stat s;
  return lstat(path, &s) ? 0 : s.st_ino;
}

/* 1: the call is to fail, errno is set. `folder`: of its name, where it changes a folder. */
static int met(const char *name, const char *path, const char *other) {
  long n = atomic_fetch_add(&count, 1) + 1;
  if (log_file >= 0) {
    char parent[8192];
    snprintf(parent, sizeof parent, "%s", path);
    char *slash = strrchr(parent, '/');
    if (slash) *slash = 0;
    dprintf(log_file, "%ld\t%s\t%lu\t%lu\t%s\t%s\n", n, name, inode(path), inode(parent), path, other);
  }
  long t = atomic_load(&target);
  if (n == t || (sticky && t > 0 && n > t)) {
    if (!failure) { kill(getpid(), SIGKILL); for (;;) pause(); }
    errno = failure;
    return 1;
  }
  return 0;
}

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);
#define BY_FD(name, fd) { char full[8192]; if (below(fd, NULL, full) && met(name, full, "")) return -1; }
#define BY_PATH(name, at, path) { char full[8192]; if (below(at, path, full) && met(name, full, "")) return -1; }
#define BY_TWO(name, at, path, at2, path2) { char full[8192], other[8192] = ""; \
  int here = below(at, path, full), there = below(at2, path2, other); \
  if ((here || there) && met(name, here ? full : other, other)) return -1; }
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, int); va_end(a); }
#define CHANGES (flags & (O_CREAT | O_TRUNC))

int open(const char *path, int flags, ...) { MODE REAL(int, open, const char *, int, ...)
  if (CHANGES) BY_PATH("open", AT_FDCWD, path) return real(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE REAL(int, open64, const char *, int, ...)
  if (CHANGES) BY_PATH("open", AT_FDCWD, path) return real(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE REAL(int, openat, int, const char *, int, ...)
  if (CHANGES) BY_PATH("open", at, path) return real(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE REAL(int, openat64, int, const char *, int, ...)
  if (CHANGES) BY_PATH("open", at, path) return real(at, path, flags, mode); }
int creat(const char *path, mode_t mode) { REAL(int, creat, const char *, mode_t)
  BY_PATH("open", AT_FDCWD, path) return real(path, mode); }
ssize_t write(int fd, const void *b, size_t n) { REAL(ssize_t, write, int, const void *, size_t)
  if (fd != log_file) BY_FD("write", fd) return real(fd, b, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { REAL(ssize_t, pwrite, int, const void *, size_t, off_t)
  BY_FD("write", fd) return real(fd, b, n, o); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)
  BY_FD("write", fd) return real(fd, b, n, o); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(ssize_t, writev, int, const struct iovec *, int)
  BY_FD("write", fd) return real(fd, v, n); }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t o) { REAL(ssize_t, pwritev, int, const struct iovec *, int, off_t)
  BY_FD("write", fd) return real(fd, v, n, o); }
ssize_t copy_file_range(int i, off64_t *io, int fd, off64_t *oo, size_t n, unsigned f) {
  REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned)
  BY_FD("write", fd) return real(i, io, fd, oo, n, f); }
int ftruncate(int fd, off_t n) { REAL(int, ftruncate, int, off_t) BY_FD("write", fd) return real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(int, ftruncate64, int, off64_t) BY_FD("write", fd) return real(fd, n); }
int fallocate(int fd, int m, off_t o, off_t n) { REAL(int, fallocate, int, int, off_t, off_t) BY_FD("write", fd) return real(fd, m, o, n); }
int fsync(int fd) { REAL(int, fsync, int) BY_FD("fsync", fd) return real(fd); }
int fdatasync(int fd) { REAL(int, fdatasync, int) BY_FD("fsync", fd) return real(fd); }
int rename(const char *a, const char *b) { REAL(int, rename, const char *, const char *)
  BY_TWO("rename", AT_FDCWD, a, AT_FDCWD, b) return real(a, b); }
int renameat(int x, const char *a, int y, const char *b) { REAL(int, renameat, int, const char *, int, const char *)
  BY_TWO("rename", x, a, y, b) return real(x, a, y, b); }
int renameat2(int x, const char *a, int y, const char *b, unsigned f) { REAL(int, renameat2, int, const char *, int, const char *, unsigned)
  BY_TWO("rename", x, a, y, b) return real(x, a, y, b, f); }
int link(const char *a, const char *b) { REAL(int, link, const char *, const char *)
  BY_TWO("link", AT_FDCWD, a, AT_FDCWD, b) return real(a, b); }
int linkat(int x, const char *a, int y, const char *b, int f) { REAL(int, linkat, int, const char *, int, const char *, int)
  BY_TWO("link", x, a, y, b) return real(x, a, y, b, f); }
int unlink(const char *p) { REAL(int, unlink, const char *) BY_PATH("unlink", AT_FDCWD, p) return real(p); }
int unlinkat(int at, const char *p, int f) { REAL(int, unlinkat, int, const char *, int)
  BY_PATH(f & AT_REMOVEDIR ? "rmdir" : "unlink", at, p) return real(at, p, f); }
int rmdir(const char *p) { REAL(int, rmdir, const char *) BY_PATH("rmdir", AT_FDCWD, p) return real(p); }
int mkdir(const char *p, mode_t m) { REAL(int, mkdir, const char *, mode_t) BY_PATH("mkdir", AT_FDCWD, p) return real(p, m); }
int mkdirat(int at, const char *p, mode_t m) { REAL(int, mkdirat, int, const char *, mode_t)
  BY_PATH("mkdir", at, p) return real(at, p, m); }
