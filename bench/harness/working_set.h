// Which pages a job wants, written down as `uffdkit serve --record` does.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "harness/bench.h"

namespace uffdkit::bench {

// Leaves a working set of these pages, in this order, beside the image of `bytes` bytes; one that is there is
// replaced. Throws where it cannot.
void record_working_set(const Options& options, const std::string& image, std::uint64_t bytes,
                        std::span<const std::uint64_t> order);

}  // namespace uffdkit::bench
