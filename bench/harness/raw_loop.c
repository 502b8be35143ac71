#define _GNU_SOURCE
#include "raw_loop.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096 };

int raw_serve(enum raw_way way, const struct raw_region* region) {
  static _Thread_local char page[PAGE_BYTES] __attribute__((aligned(PAGE_BYTES)));
  for (;;) {
    if (way == RAW_POLL) {
      struct pollfd waiting = {.fd = region->uffd, .events = POLLIN};
      if (poll(&waiting, 1, -1) < 0 && errno != EINTR) return errno;
    }
    struct uffd_msg message;
    const ssize_t bytes = read(region->uffd, &message, sizeof message);
    if (bytes < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (bytes < 0) return errno;
    if (message.event != UFFD_EVENT_PAGEFAULT) continue;

    const uint64_t address = message.arg.pagefault.address & ~(uint64_t)(PAGE_BYTES - 1);
    const uint64_t offset = address - region->start;
    const char* from = page;
    if (way == RAW_MEMORY) {
      from = region->mapped + offset;
    } else if (pread(region->image, page, PAGE_BYTES, (off_t)offset) != PAGE_BYTES) {
      return EIO;
    }
    struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)from, .len = PAGE_BYTES};
    if (ioctl(region->uffd, UFFDIO_COPY, &copy) == 0) continue;
    if (errno == ESRCH) return 0;
    if (errno != EEXIST) return errno;
    struct uffdio_range there = {.start = address, .len = PAGE_BYTES};
    if (ioctl(region->uffd, UFFDIO_WAKE, &there) < 0) return errno;
  }
}
