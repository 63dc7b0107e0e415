/* What is on the disk after a power cut: preloaded into `metershipper run`, this keeps a copy of every file at each
 * fsync and fdatasync, and the names of a directory, which are durable only when the directory is synced.
 *
 * Beneath SYNCED_ROOT only. Each sync becomes one file in SYNCED_SNAPSHOTS, named by the time at which it was made
 * (CLOCK_MONOTONIC, in nanoseconds): a line "file PATH" or "directory PATH", then the content, or the names line by
 * line. It is made just before the real sync, and under a lock: if the process is killed in between, then what was
 * written is in the kernel's hands anyway, and nothing that was synced is missing here.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

static void fail(const char *what) {
    perror(what);
    abort();
}

static void copy_content(const char *from, FILE *to) {
    char block[65536];
    size_t length;
    FILE *file = fopen(from, "rb");
    if (!file) fail(from);
    while ((length = fread(block, 1, sizeof block, file)) > 0)
        if (fwrite(block, 1, length, to) != length) fail("snapshot");
    if (ferror(file)) fail(from);
    fclose(file);
}

static void list_names(const char *from, FILE *to) {
    struct dirent *entry;
    DIR *directory = opendir(from);
    if (!directory) fail(from);
    while ((entry = readdir(directory)))
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..")) fprintf(to, "%s\n", entry->d_name);
    closedir(directory);
}

static void snapshot(int fd, const char *root, const char *snapshots) {
    char link[64], path[PATH_MAX], written[PATH_MAX], name[PATH_MAX];
    struct stat status;
    struct timespec now;
    FILE *to;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0 || fstat(fd, &status)) fail(link);
    path[length] = 0;
    size_t root_length = strlen(root);
    if (strncmp(path, root, root_length) || (path[root_length] && path[root_length] != '/')) return;

    snprintf(written, sizeof written, "%s/.%d", snapshots, (int)getpid());
    if (!(to = fopen(written, "wb"))) fail(written);
    fprintf(to, "%s %s\n", S_ISDIR(status.st_mode) ? "directory" : "file", path);
    if (S_ISDIR(status.st_mode)) list_names(path, to);
    else copy_content(link, to);
    if (fclose(to)) fail(written);
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(name, sizeof name, "%s/%020lld", snapshots, now.tv_sec * 1000000000LL + now.tv_nsec);
    if (rename(written, name)) fail(name);
}

static int synced(int fd, const char *function) {
    const char *root = getenv("SYNCED_ROOT"), *snapshots = getenv("SYNCED_SNAPSHOTS");
    int (*real)(int);
    *(void **)&real = dlsym(RTLD_NEXT, function);
    if (!root || !snapshots) return real(fd);
    pthread_mutex_lock(&one_at_a_time);
    snapshot(fd, root, snapshots);
    int answer = real(fd);
    pthread_mutex_unlock(&one_at_a_time);
    return answer;
}

int fsync(int fd) { return synced(fd, "fsync"); }

int fdatasync(int fd) { return synced(fd, "fdatasync"); }
