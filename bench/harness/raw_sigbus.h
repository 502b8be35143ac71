/* The plainest way to bring one's own pages from a file in a handler of SIGBUS: pread(2), UFFDIO_COPY, one
   page a fault, one region in the process, and no errors to survive. */
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Maps `bytes` bytes whose pages come from the file `image` from then on. NULL, with errno set, where the
   machine cannot do it. It stays for the life of the process. */
void* raw_sigbus_map(int image, size_t bytes);

#ifdef __cplusplus
}
#endif
