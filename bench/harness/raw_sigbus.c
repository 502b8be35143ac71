#define _GNU_SOURCE
#include "raw_sigbus.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096 };

static int region_uffd;
static int region_image;
static uint64_t region_start;

static void bring_page(int signal, siginfo_t* info, void* context) {
  (void)signal;
  (void)context;
  char page[PAGE_BYTES];
  const uint64_t address = (uintptr_t)info->si_addr & ~(uint64_t)(PAGE_BYTES - 1);
  if (pread(region_image, page, PAGE_BYTES, (off_t)(address - region_start)) != PAGE_BYTES) abort();
  struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)page, .len = PAGE_BYTES};
  if (ioctl(region_uffd, UFFDIO_COPY, &copy) < 0 && errno != EEXIST) abort();
}

void* raw_sigbus_map(int image, size_t bytes) {
  region_image = image;
  region_uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
  if (region_uffd < 0) return NULL;
  struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_SIGBUS};
  if (ioctl(region_uffd, UFFDIO_API, &api) < 0) return NULL;
  void* memory =
      mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return NULL;
  region_start = (uintptr_t)memory;
  struct uffdio_register all = {.range = {.start = region_start, .len = bytes},
                                .mode = UFFDIO_REGISTER_MODE_MISSING};
  if (ioctl(region_uffd, UFFDIO_REGISTER, &all) < 0) return NULL;
  struct sigaction action = {.sa_sigaction = bring_page, .sa_flags = SA_SIGINFO | SA_RESTART};
  if (sigaction(SIGBUS, &action, NULL) < 0) return NULL;
  return memory;
}
