// A child of fork(2) whose memory nobody can serve: there is no memory or descriptor for its state, or no
// place to record it. Closing its userfaultfd would turn what it has not got into zeros, and keeping it would
// have its threads wait for ever; so those pages answer with SIGBUS, for good, before it is closed.
#pragma once

#include <uffdkit/uffd.h>
#include <uffdkit/units.h>

#include <vector>

namespace uffdkit {

// Pages that a process has not got, side by side.
struct MissingPages {
  AddressRange memory;
  PageSize page_size;
};

// Poisons `missing`, and likewise in children that the child forks meanwhile, and closes the descriptors.
// Takes as long as that takes. False if it cannot be done, because the kernel cannot poison (before 6.6) or
// the child never stops changing its memory: then a descriptor is left open, and the threads wait.
bool condemn_child(Uffd child, std::vector<MissingPages> missing);

}  // namespace uffdkit
