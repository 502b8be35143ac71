// Clients that do at random all that clients do with their memory, and know at every moment what must be in
// it: touch, write, give back, move, fork. They run until they are stopped, each in processes of its own.
//
// What they find wrong is printed and counted; one that makes no step for kHangSeconds hangs.
#pragma once

#include <uffdkit/client.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "support/child.h"
#include "support/image.h"
#include "support/mapping.h"

namespace uffdkit::test {

class Turmoil {
 public:
  static constexpr int kHangSeconds = 30;

  // How a client hands its memory over.
  enum class Kind : std::uint8_t { firecracker, forking, native };
  struct Setting {
    Kind kind = Kind::forking;
    std::string socket;
    std::string image_name;   // for native clients
    AttachOptions options{};  // likewise
    std::uint64_t seed = 1;
    // A client is one process after the other, each of which hands its memory over anew.
    std::uint64_t steps = 1500;  // of one process
    std::size_t lives = 0;       // processes; 0: until stop()
    unsigned rest_us = 0;        // between two steps, at most
  };
  struct Counts {
    std::uint64_t steps = 0;  // touches, writes, and so on
    std::uint64_t removes = 0;
    std::uint64_t moves = 0;
    std::uint64_t forks = 0;
  };

  // Why no client of this kind can be made here; empty if one can.
  static std::string lack(Kind kind);

  explicit Turmoil(const Image& image);
  ~Turmoil();
  // Before this process has threads.
  void start(const Setting& setting);

  // What they have done so far, together.
  Counts counts() const;
  // Empty, or which of them has not made a step for so long.
  std::string hanging(std::chrono::seconds limit = std::chrono::seconds(kHangSeconds)) const;
  // The longest touch or call of each since the last time this was asked, in microseconds; one that is in one
  // counts with that.
  std::vector<std::uint64_t> longest_us() const;
  // Has them end, and waits for it. Returns how many found something wrong or did not end.
  std::size_t stop();
  // The same for those that end by themselves.
  std::size_t wait();

 private:
  // Of one client, in memory that it shares with the test.
  struct Shared;
  class Life;
  static void in_process(Shared& shared, const std::function<void()>& work);
  static void run(const Image& image, const Setting& setting, Shared& shared);
  static void live(const Image& image, const Setting& setting, std::uint64_t seed, Shared& shared);
  Shared& shared(std::size_t client) const;

  const Image& image_;
  Mapping memory_;
  std::vector<std::unique_ptr<Child>> clients_;
};

}  // namespace uffdkit::test
