// The engine's sessions on the model of userfaultfd, under a seed: simulated client processes whose threads
// read, write, madvise, munmap, mremap and fork, on small pages and on huge ones; sessions that are to be
// completed or given up; a store that answers when the seed says so; a clock that only
// the seed moves; clients that are killed, and a manager that is killed between any two system calls of its
// and followed by another.
//
// One thread; the same seed gives the same run. After every turn of a simulated thread each byte that was
// read is compared with what it must be, and after every step of the world no thread may sleep without a
// cause that is under way.
#pragma once

#include <cstdint>

#include "simulate/story.h"

namespace uffdkit::simulate {

// A bug that is put between the engine and the model, to see that it is found.
enum class Bug : std::uint8_t {
  none,
  no_wake_after_present,       // EEXIST, and nobody is woken
  fault_before_older_remove,   // a remove is heard of only after the faults that came later
  stale_fetch,                 // what was read before a remove is installed after it
  short_copy_taken_for_whole,  // a COPY that stopped half-way counts as done
  refused_fault_forgotten,     // a fill that was refused because memory is changing counts as done
  leaked_descriptor,           // a userfaultfd is not closed
};

// One run.
Found run(std::uint64_t seed, Bug bug = Bug::none);

// The first of the seeds from 1 to `most` that finds the bug; 0 if none does.
std::uint64_t first_seed_that_finds(Bug bug, std::uint64_t most);

}  // namespace uffdkit::simulate
