// Marked steps: instants at which tests cut a worker off, to see that the next one goes on from there.
//
// Here a step is nothing. The program uffdkit-steps of the tests is linked with another step(), at which a
// process that was told a number ends (tests/crash/step.cc). Threads: any.
#pragma once

#include <cstdint>

namespace uffdkit {

// One such instant: before or after something that a next worker can see.
void step();
// This process is the worker of this number, counted from 1: its steps count from here on.
void count_steps_of_worker(std::uint64_t worker);

}  // namespace uffdkit
