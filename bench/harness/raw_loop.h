/* The plainest handler of page faults that there is: what the benches compare with. It knows no events, no
 * errors to recover from, no second client, and brings one page a fault. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum raw_way {
  RAW_READ,   /* blocking read(2) of the userfaultfd, pread(2) of the page from the image, UFFDIO_COPY */
  RAW_POLL,   /* poll(2), then the same with a non-blocking userfaultfd */
  RAW_MEMORY, /* as RAW_READ, but copies out of a mapping of the image: nothing is read */
};

struct raw_region {
  int uffd;           /* blocking for RAW_READ and RAW_MEMORY, non-blocking for RAW_POLL */
  int image;          /* the file */
  const char* mapped; /* the file's mapping, for RAW_MEMORY */
  uint64_t start;     /* the address of the image's first byte in the client */
};

/* Serves until the client has exited. Returns 0, or the errno of what went wrong. */
int raw_serve(enum raw_way way, const struct raw_region* region);

#ifdef __cplusplus
}
#endif
