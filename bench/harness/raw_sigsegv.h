/* How memory is brought on demand without userfaultfd: it is mapped with PROT_NONE, and a handler of SIGSEGV
   reads the page and lets it be touched by mprotect(2). The page is written by way of a second mapping of the
   same memory, since other threads would see it half written otherwise. One page a fault, one region in the
   process, and no errors to survive. */
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* As raw_sigbus_map() of raw_sigbus.h. */
void* raw_sigsegv_map(int image, size_t bytes);

#ifdef __cplusplus
}
#endif
