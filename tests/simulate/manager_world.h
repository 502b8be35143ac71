// The manager as it is, on the model of userfaultfd, under a seed: clients that arrive by real sockets, as
// Firecracker's and by the native protocol, whose simulated threads read, write, madvise, munmap, mremap and
// fork; that add and drop regions, detach, lose their connections, come back and are killed; operators that
// ask for status, drain, and add and remove sockets; strangers that say nothing; and managers that end, each
// followed by another.
//
// All threads of the manager, the engine and the images run one at a time, as the seed says, by its clock
// (seeded_threads.h): the same seed gives the same run. After each step every byte that was read must be
// right. At rest no thread may be asleep, and in the end no descriptor and no thread may be left.
#pragma once

#include <cstdint>

#include "simulate/world.h"

namespace uffdkit::simulate {

// A bug that is put where the manager meets the machine, to see that it is found.
enum class ManagerBug : std::uint8_t {
  none,
  lost_notification,      // a thread that waits for work is not told of it
  lost_time,              // what is to be tried again later is not
  lost_event,             // of a descriptor that is armed for one event
  no_wake_at_succession,  // faults that the manager of before has read are never heard of again
  leaked_descriptor,      // a userfaultfd is not closed
};

// One run. Not beside other threads: processes are forked from this one.
Found run_manager(std::uint64_t seed, ManagerBug bug = ManagerBug::none);

// The first of the seeds from 1 to `most` that finds the bug; 0 if none does.
std::uint64_t first_seed_that_finds(ManagerBug bug, std::uint64_t most);

}  // namespace uffdkit::simulate
