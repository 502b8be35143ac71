#define _GNU_SOURCE
#include "raw_sigsegv.h"

#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096 };

static int region_image;
static char* region;
static char* region_writable; /* the same memory */

static void bring_page(int signal, siginfo_t* info, void* context) {
  (void)signal;
  (void)context;
  const uint64_t offset = (uint64_t)((char*)info->si_addr - region) & ~(uint64_t)(PAGE_BYTES - 1);
  if (pread(region_image, region_writable + offset, PAGE_BYTES, (off_t)offset) != PAGE_BYTES) abort();
  /* The kernel keeps so many mappings as there are runs of pages with equal permissions, and refuses more
     than vm.max_map_count. */
  if (mprotect(region + offset, PAGE_BYTES, PROT_READ | PROT_WRITE) != 0) abort();
}

void* raw_sigsegv_map(int image, size_t bytes) {
  region_image = image;
  const int memory = memfd_create("raw_sigsegv", MFD_CLOEXEC);
  if (memory < 0 || ftruncate(memory, (off_t)bytes) != 0) return NULL;
  region = mmap(NULL, bytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, memory, 0);
  region_writable = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory, 0);
  if (region == MAP_FAILED || region_writable == MAP_FAILED) return NULL;
  struct sigaction action = {.sa_sigaction = bring_page, .sa_flags = SA_SIGINFO | SA_RESTART};
  if (sigaction(SIGSEGV, &action, NULL) < 0) return NULL;
  return region;
}
