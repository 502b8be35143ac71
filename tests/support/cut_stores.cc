#include "support/cut_stores.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>

#include "support/sanitizers.h"

namespace uffdkit::test {

#if defined(__x86_64__)

namespace {

constexpr greg_t kTrapFlag = 0x100;

// What the handlers work on; signal handlers have no other way to be told.
std::span<std::byte> watched;
const std::function<void()>* after_store = nullptr;

void protect(int protection) {
  if (mprotect(watched.data(), watched.size(), protection) != 0) _exit(126);
}

void let_through(int, siginfo_t* info, void* context) {
  const auto* address = static_cast<const std::byte*>(info->si_addr);
  if (address < watched.data() || address >= watched.data() + watched.size()) {
    signal(SIGSEGV, SIG_DFL);  // a fault of the program's own, which comes again
    return;
  }
  protect(PROT_READ | PROT_WRITE);
  static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] |= kTrapFlag;
}

void stored(int, siginfo_t*, void* context) {
  static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] &= ~kTrapFlag;
  protect(PROT_READ);
  (*after_store)();
}

// A handler for as long as this lives.
class Handler {
 public:
  Handler(int signal, void (*handler)(int, siginfo_t*, void*)) : signal_(signal) {
    struct sigaction action{};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (sigaction(signal_, &action, &before_) != 0)
      throw std::system_error(errno, std::generic_category(), "sigaction");
  }
  ~Handler() { sigaction(signal_, &before_, nullptr); }
  Handler(const Handler&) = delete;
  Handler& operator=(const Handler&) = delete;

 private:
  int signal_;
  struct sigaction before_{};
};

}  // namespace

std::string stores_cannot_be_cut() {
  return kSanitized ? "needs a build without sanitizers" : "";
}

void after_each_store(std::span<std::byte> memory, const std::function<void()>& work,
                      const std::function<void()>& look) {
  watched = memory;
  after_store = &look;
  const Handler segv(SIGSEGV, let_through);
  const Handler trap(SIGTRAP, stored);
  protect(PROT_READ);
  work();
  protect(PROT_READ | PROT_WRITE);
}

#else

std::string stores_cannot_be_cut() {
  return "needs x86-64";
}

void after_each_store(std::span<std::byte>, const std::function<void()>&, const std::function<void()>&) {}

#endif

std::span<std::byte> mapping_of(int fd) {
  struct stat status;
  if (fstat(fd, &status) != 0) throw std::system_error(errno, std::generic_category(), "fstat");
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    std::uintptr_t start = 0;
    std::uintptr_t end = 0;
    std::uint64_t offset = 0;
    std::uint64_t inode = 0;
    char dash = 0;
    std::string rights;
    std::string device;
    fields >> std::hex >> start >> dash >> end >> rights >> offset >> device >> std::dec >> inode;
    if (inode == status.st_ino && offset == 0) return {reinterpret_cast<std::byte*>(start), end - start};
  }
  throw std::runtime_error("the file is not mapped");
}

}  // namespace uffdkit::test
