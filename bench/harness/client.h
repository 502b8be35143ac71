// A process whose memory is served by somebody else, and which says how long that took.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "harness/server.h"
#include "support/child.h"

namespace uffdkit::bench {

class Client {
 public:
  // `bytes` of memory that show the image of `server`, handed over already. At most `touches_max` pages can
  // be named in one call. `sessions`: hands over as many such memories, of which the first is used. Throws
  // where the machine cannot do it.
  Client(const Server& server, int cpu, std::uint64_t bytes, std::size_t touches_max, unsigned sessions = 1);
  ~Client();

  // Reads one word of each of these pages, one after another, by so many threads at once, each an equal part;
  // nanoseconds that each took. A page that does not hold its stamp ends the bench.
  std::vector<std::uint32_t> touch(std::span<const std::uint64_t> pages, unsigned threads = 1);
  // What all of the last touch() took, from its first page to its last one, with waiting for the CPU.
  std::uint64_t took_ns() const { return took_ns_; }
  // The same, without a time of each page; nanoseconds that all of it took.
  std::uint64_t touch_all(std::span<const std::uint64_t> pages, unsigned threads);
  // Nanoseconds from before the handing over until the first page could be read.
  std::uint64_t attach_ns() const { return attach_ns_; }
  // How often its threads have given up a CPU or have been taken off it, those that have ended too.
  std::uint64_t context_switches();
  // Pages of the memory that are there.
  std::uint64_t resident_pages();
  pid_t pid() const { return child_->pid(); }

 private:
  struct Shared;
  void put(std::span<const std::uint64_t> pages);
  std::uint64_t ask(std::uint64_t command, std::size_t pages, unsigned threads);

  std::size_t touches_max_;
  Shared* shared_;
  std::unique_ptr<test::Child> child_;
  std::uint64_t attach_ns_ = 0;
  std::uint64_t took_ns_ = 0;
};

}  // namespace uffdkit::bench
