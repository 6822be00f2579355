#!/usr/bin/env bash
# A backup job that compresses with 64 workers, over storage that takes a random
# time for each request: entries overtake their data, and yet
# qcowcache-verify=error refuses nothing.
#
# LONG=1: 30 backups instead of 2.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

requires_program qemu-storage-daemon

cat >"$work/slow.c" <<'END'
#include <nbdkit-plugin.h>
#include <stdlib.h>
#include <unistd.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
static const char *name;
static int file = -1;

static void some_time (void)
{
  static __thread unsigned seed;
  if (seed == 0)
    seed = (unsigned) gettid ();
  usleep ((useconds_t) (rand_r (&seed) % 16000));
}
static int slow_config (const char *key, const char *value) { name = value; return 0; }
static int slow_get_ready (void)
{
  char *path = nbdkit_absolute_path (name);
  file = open (path, O_RDWR);
  return file == -1 ? -1 : 0;
}
static void *slow_open (int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t slow_get_size (void *handle) { return lseek (file, 0, SEEK_END); }
static int slow_can_multi_conn (void *handle) { return 1; }
static int slow_pread (void *handle, void *buffer, uint32_t count, uint64_t offset, uint32_t flags)
{
  some_time ();
  return pread (file, buffer, count, (off_t) offset) == (ssize_t) count ? 0 : -1;
}
static int slow_pwrite (void *handle, const void *buffer, uint32_t count, uint64_t offset, uint32_t flags)
{
  some_time ();
  return pwrite (file, buffer, count, (off_t) offset) == (ssize_t) count ? 0 : -1;
}
static int slow_flush (void *handle, uint32_t flags) { some_time (); return 0; }

static struct nbdkit_plugin plugin = {
  .name = "slow",
  .config = slow_config,
  .get_ready = slow_get_ready,
  .open = slow_open,
  .get_size = slow_get_size,
  .can_multi_conn = slow_can_multi_conn,
  .pread = slow_pread,
  .pwrite = slow_pwrite,
  .flush = slow_flush,
};
NBDKIT_REGISTER_PLUGIN (plugin)
END
${CC:-cc} -D_GNU_SOURCE -DNBDKIT_API_VERSION=2 -std=gnu11 -O2 -fPIC -include fcntl.h -shared \
    -o "$work/slow.so" "$work/slow.c" ||
    fail "there is no C compiler, or nbdkit's headers are missing: ./bootstrap installs them"

# backup: $work/source to the image behind $work/server.sock
backup ()
{
    timeout 120 "$PYTHON" "$(dirname "$0")/backup_job.py" "$work/source" "$work/server.sock" \
        '{"x-perf": {"max-workers": 64}}'
}

make_tar_image "$work/source" 24M
count=2
[ "${LONG:-}" != 1 ] || count=30
for ((run = 0; run < count; run++)); do
    type=zlib
    [ $((run % 2)) -eq 0 ] || type=zstd
    fresh_file "$work/disk" 48M
    # Little memory, so that clients meet the storage.
    start_nbdkit server --filter="$FILTER" "$work/slow.so" file="$work/disk" qcowcache-verify=error \
        qcowcache-size=4M qcowcache-max-write=256K
    qemu-img create -q -f qcow2 -o "compression_type=$type" "$(uri server)" 24M
    backup
    stop_nbdkit server
    ! grep qcowcache "$work/server.err" || fail "run $run: an alarm for a backup that went well"
    image_holds "$work/disk" "$work/source"
done
