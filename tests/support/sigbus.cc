#include "support/sigbus.h"

#include <csetjmp>
#include <csignal>

namespace uffdkit::test {
namespace {

sigjmp_buf after_fault;

}  // namespace

bool raises_sigbus(const std::byte* byte) {
  struct sigaction action = {};
  struct sigaction before = {};
  action.sa_handler = [](int) { siglongjmp(after_fault, 1); };
  sigaction(SIGBUS, &action, &before);
  volatile bool raised = true;  // read after the jump
  if (sigsetjmp(after_fault, 1) == 0) {
    (void)*static_cast<const volatile std::byte*>(byte);
    raised = false;
  }
  sigaction(SIGBUS, &before, nullptr);
  return raised;
}

}  // namespace uffdkit::test
