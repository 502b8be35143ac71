#include "guest.h"

namespace tinyvmm {

std::string describe(const WrongPage& page) {
  if (page.expected == 0) {
    return fmt::format("page at {:#x} should be zero, but holds {:#010x} (first word {:#010x})", page.address,
                       page.found, page.first_word);
  }
  return fmt::format("page at {:#x} has check word {:#010x} instead of {:#010x} (first word {:#010x})",
                     page.address, page.found, page.expected, page.first_word);
}

}  // namespace tinyvmm
