/* The storage of tests, which compile it with make_uneven_plugin: an nbdkit plugin whose exports
 * are disks in memory. How a disk takes writes is the first word of its name, up to a digit:
 *
 *   hung      never, from the second mebibyte on
 *   slow      2 MB in a second, one write after the other
 *   healthy   250 MB in a second, one write after the other
 *   refusing  not, from the second mebibyte on: ENOSPC
 *   late      after a random time, as it does with each request
 *   damaging  wrongly: of every 100 000 bytes one, for as long as the file of damages=FILE exists
 *
 * kind=NAME is the name of the export without one.
 * Two writes of the same bytes at once end nbdkit: which of them stays would be left to chance, and
 * clients here send none, nor may the filter. What is read while it is written is read as it was
 * before, or after.
 * With entered=FILE a byte is added to that file, which may be a pipe, when a write begins that
 * will not end at once.
 */
#define _GNU_SOURCE
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#define DISK_SIZE (256 << 20)
#define MOST_DISKS 64
#define GOOD_BYTES (1 << 20)
#define SLOW_BYTES_PER_SECOND 2e6
#define HEALTHY_BYTES_PER_SECOND 250e6
#define MOST_LATE_MICROSECONDS 16000
#define BYTES_PER_DAMAGE 100000

/* A write that has begun. */
struct writing {
  uint64_t begin, end;
  struct writing* next;
};

struct disk {
  char* name;
  char* bytes;
  pthread_mutex_t one_at_a_time;
  uint64_t written;
  pthread_mutex_t lock; /* of the bytes, and of: */
  struct writing* writing;
};

static struct disk disks[MOST_DISKS];
static pthread_mutex_t disks_lock = PTHREAD_MUTEX_INITIALIZER;
static const char* entered;
static const char* kind = "";
static const char* damages;

static int uneven_config(const char* key, const char* value) {
  if (strcmp(key, "entered") == 0) {
    entered = value;
  } else if (strcmp(key, "kind") == 0) {
    kind = value;
  } else if (strcmp(key, "damages") == 0) {
    damages = value;
  } else {
    nbdkit_error("unknown parameter '%s'", key);
    return -1;
  }
  return 0;
}

static int is(const struct disk* disk, const char* what) {
  return strncmp(disk->name, what, strlen(what)) == 0;
}

static void* uneven_open(int readonly) {
  const char* name = nbdkit_export_name();
  if (*name == '\0')
    name = kind;
  struct disk* found = NULL;
  (void)readonly;
  pthread_mutex_lock(&disks_lock);
  for (int i = 0; i < MOST_DISKS && found == NULL; ++i) {
    if (disks[i].name == NULL) {
      disks[i].name = strdup(name);
      disks[i].bytes = calloc(1, DISK_SIZE);
      pthread_mutex_init(&disks[i].one_at_a_time, NULL);
      pthread_mutex_init(&disks[i].lock, NULL);
    }
    if (strcmp(disks[i].name, name) == 0)
      found = &disks[i];
  }
  pthread_mutex_unlock(&disks_lock);
  if (found == NULL || found->bytes == NULL) {
    nbdkit_error("no disk");
    return NULL;
  }
  return found;
}

static int64_t uneven_get_size(void* handle) {
  (void)handle;
  return DISK_SIZE;
}

static int uneven_can_multi_conn(void* handle) {
  (void)handle;
  return 1;
}

static void be_late(const struct disk* disk) {
  static __thread unsigned seed;
  if (!is(disk, "late"))
    return;
  if (seed == 0)
    seed = (unsigned)gettid();
  usleep((useconds_t)(rand_r(&seed) % MOST_LATE_MICROSECONDS));
}

static int uneven_pread(void* handle, void* buffer, uint32_t count, uint64_t offset,
                        uint32_t flags) {
  struct disk* disk = handle;
  (void)flags;
  be_late(disk);
  pthread_mutex_lock(&disk->lock);
  memcpy(buffer, disk->bytes + offset, count);
  pthread_mutex_unlock(&disk->lock);
  return 0;
}

static void note_entered(void) {
  if (entered == NULL)
    return;
  const int fd = open(entered, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  if (fd >= 0) {
    (void)!write(fd, "x", 1);
    close(fd);
  }
}

static void take_time(struct disk* disk, double seconds) {
  const struct timespec time = {.tv_sec = (time_t)seconds,
                                .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
  pthread_mutex_lock(&disk->one_at_a_time);
  nanosleep(&time, NULL);
  pthread_mutex_unlock(&disk->one_at_a_time);
}

static void damage(struct disk* disk, uint32_t count, uint64_t offset) {
  const int damaging = access(damages, F_OK) == 0;
  pthread_mutex_lock(&disk->one_at_a_time);
  const uint64_t begin = disk->written;
  disk->written += count;
  pthread_mutex_unlock(&disk->one_at_a_time);
  pthread_mutex_lock(&disk->lock);
  for (uint64_t next = (begin / BYTES_PER_DAMAGE + 1) * BYTES_PER_DAMAGE;
       damaging && next <= begin + count; next += BYTES_PER_DAMAGE)
    disk->bytes[offset + (next - begin) - 1] ^= 0x10;
  pthread_mutex_unlock(&disk->lock);
}

static void begin_to_write(struct disk* disk, struct writing* this) {
  pthread_mutex_lock(&disk->lock);
  for (const struct writing* each = disk->writing; each != NULL; each = each->next) {
    if (each->begin < this->end && this->begin < each->end) {
      nbdkit_error("two writes at once: %" PRIu64 "-%" PRIu64 " and %" PRIu64 "-%" PRIu64,
                   each->begin, each->end, this->begin, this->end);
      abort();
    }
  }
  this->next = disk->writing;
  disk->writing = this;
  pthread_mutex_unlock(&disk->lock);
}

static void end_writing(struct disk* disk, const struct writing* this, const void* buffer) {
  pthread_mutex_lock(&disk->lock);
  memcpy(disk->bytes + this->begin, buffer, this->end - this->begin);
  struct writing** link = &disk->writing;
  while (*link != this)
    link = &(*link)->next;
  *link = this->next;
  pthread_mutex_unlock(&disk->lock);
}

static int uneven_pwrite(void* handle, const void* buffer, uint32_t count, uint64_t offset,
                         uint32_t flags) {
  struct disk* disk = handle;
  struct writing writing = {.begin = offset, .end = offset + count};
  const int good = offset + count <= GOOD_BYTES;
  (void)flags;
  if (!good && is(disk, "hung")) {
    note_entered();
    for (;;)
      pause();
  }
  if (!good && is(disk, "refusing")) {
    note_entered();
    nbdkit_set_error(ENOSPC);
    return -1;
  }
  begin_to_write(disk, &writing);
  if (!good && is(disk, "slow")) {
    note_entered();
    take_time(disk, count / SLOW_BYTES_PER_SECOND);
  }
  if (!good && is(disk, "healthy"))
    take_time(disk, count / HEALTHY_BYTES_PER_SECOND);
  be_late(disk);
  end_writing(disk, &writing, buffer);
  if (is(disk, "damaging"))
    damage(disk, count, offset);
  return 0;
}

static int uneven_flush(void* handle, uint32_t flags) {
  (void)flags;
  be_late(handle);
  return 0;
}

/* Nothing may be left for the address sanitizer. */
static void uneven_unload(void) {
  for (int i = 0; i < MOST_DISKS && disks[i].name != NULL; ++i) {
    free(disks[i].name);
    free(disks[i].bytes);
  }
}

static struct nbdkit_plugin plugin = {
    .name = "uneven",
    .unload = uneven_unload,
    .config = uneven_config,
    .magic_config_key = "entered",
    .open = uneven_open,
    .get_size = uneven_get_size,
    .can_multi_conn = uneven_can_multi_conn,
    .pread = uneven_pread,
    .pwrite = uneven_pwrite,
    .flush = uneven_flush,
};

NBDKIT_REGISTER_PLUGIN(plugin)
