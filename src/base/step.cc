#include "base/step.h"

namespace uffdkit {

void step() {}
void count_steps_of_worker(std::uint64_t) {}

}  // namespace uffdkit
