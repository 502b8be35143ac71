// A guest that can be asked to do things, whatever runs it: a virtual CPU, or threads of this process.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu_state.h"
#include "layout.h"
#include "memory.h"
#include "result.h"

namespace tinyvmm {

struct Walked {
  GuestAddress next;       // where the walk goes on
  std::uint32_t checksum;  // sum of the check words passed
};

/// Each call returns when the guest has done it. A page with wrong content is an error that says which and
/// what. Calls come from one thread. A guest uses its memory and layout until it is destroyed.
class Guest {
 public:
  virtual ~Guest() = default;

  /// Builds the nodes in all of the guest's memory; gives the CPU as a snapshot needs it. For a new guest
  /// only.
  virtual Result<CpuState> fill() = 0;
  /// Lets a resumed guest execute its first instruction.
  virtual Result<void> wake() = 0;
  /// Follows the chain from `start` over `nodes` nodes, at least 1, verifies each, writes to one in four.
  virtual Result<Walked> walk(GuestAddress start, std::uint32_t nodes) = 0;
  /// Verifies that pages read as zero, then writes to one in four.
  virtual Result<void> check_zero(PageSpan span) = 0;
};

/// What a guest says of a page that is not as it must be.
struct WrongPage {
  GuestAddress address;
  std::uint32_t expected;
  std::uint32_t found;
  std::uint32_t first_word;
};
std::string describe(const WrongPage& page);

}  // namespace tinyvmm
