#include "support/serving.h"

#include <unistd.h>

#include <chrono>
#include <fstream>
#include <stdexcept>
#include <string>
#include <variant>

namespace uffdkit::test {

UffdNeeds user_faults(std::uint64_t required_features) {
  return {.kernel_faults = false, .required = Features(required_features)};
}

Message next_message(const Uffd& uffd) {
  constexpr int kPatienceMs = 30'000;
  while (uffd.wait_readable(kPatienceMs).value()) {
    abi::Msg raw;
    if (uffd.read({&raw, 1}).messages == 1) return decode(raw);
  }
  throw std::runtime_error("no message came");
}

Fault next_fault(const Uffd& uffd) {
  return std::get<Fault>(next_message(uffd));
}

std::size_t waiting_threads(const Uffd& uffd) {
  std::ifstream info("/proc/self/fdinfo/" + std::to_string(uffd.fd()));
  for (std::string word; info >> word;)
    if (word == "total:") {
      std::size_t total = 0;
      info >> total;
      return total;
    }
  throw std::runtime_error("no fdinfo of a userfaultfd");
}

Background::Background(const Uffd& uffd, AddressRange served, std::function<void()> work)
    : uffd_(uffd), served_(served), thread_([this, work = std::move(work)] {
        work();
        finished_ = true;
      }) {}

Background::~Background() {
  if (!thread_.joinable()) return;
  while (!finished_) {
    abi::Msg raw;
    while (uffd_.read({&raw, 1}).messages == 1) {
      const Message message = decode(raw);
      if (const auto* fork = std::get_if<ForkEvent>(&message)) close(fork->child_fd);
    }
    (void)uffd_.unregister_range(served_);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  thread_.join();
}

}  // namespace uffdkit::test
