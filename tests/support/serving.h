// What tests that serve faults of the running kernel have in common.
#pragma once

#include <gtest/gtest.h>
#include <uffdkit/uffd.h>

#include <atomic>
#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

// Declares `name`, a Uffd made for these needs; skips the test where this machine cannot make one.
#define UFFD_OR_SKIP(name, ...)                                                            \
  ::uffdkit::Result<::uffdkit::Uffd> made_##name = ::uffdkit::Uffd::create(__VA_ARGS__);   \
  if (!made_##name) GTEST_SKIP() << "needs a userfaultfd: " << made_##name.error().text(); \
  const ::uffdkit::Uffd name = std::move(*made_##name)

namespace uffdkit::test {

// Needs of tests whose memory is touched in user mode only, with these features required.
UffdNeeds user_faults(std::uint64_t required_features = 0);

// The next message. Throws when none comes within half a minute.
Message next_message(const Uffd& uffd);
// The next message, which must be a fault.
Fault next_fault(const Uffd& uffd);

// How many threads wait on this userfaultfd of this process, their messages read or not (/proc/self/fdinfo).
std::size_t waiting_threads(const Uffd& uffd);

// A thread that touches or changes memory that `uffd` serves. If the test ends before it has, the memory is
// unregistered and its events are read, so that it always ends.
class Background {
 public:
  Background(const Uffd& uffd, AddressRange served, std::function<void()> work);
  ~Background();
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  bool finished() const { return finished_; }
  // Waits until it has ended by itself.
  void join() { thread_.join(); }

 private:
  const Uffd& uffd_;
  AddressRange served_;
  std::atomic<bool> finished_ = false;
  std::thread thread_;
};

}  // namespace uffdkit::test
