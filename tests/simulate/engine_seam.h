// What the engine meets in its simulated world: a store, the memory of an image that clients share, and the
// manager's system calls. Threads move there between any two calls, the manager may be killed there, reads
// come late or fail, and bugs are planted.
#pragma once

#include <uffdkit/abi.h>
#include <uffdkit/sim.h>
#include <uffdkit/store.h>
#include <uffdkit/system_calls.h>
#include <uffdkit/unique_fd.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/session.h"
#include "simulate/expected.h"
#include "simulate/story.h"
#include "simulate/world.h"
#include "support/forwarding_calls.h"

namespace uffdkit::simulate {

inline constexpr std::uint64_t kHugePages = kPage2M.bytes().value / kPage;  // small ones of a huge one

// The image. It answers at once, later or not at all, as the seed says; a prompt one always at once.
class SeededStore final : public Store {
 public:
  static constexpr std::uint64_t kPages = 3 * kHugePages;

  explicit SeededStore(Story& story, bool prompt = false) : story_(story), prompt_(prompt) {}
  ByteCount size() const noexcept override { return ByteCount(kPages * kPage); }
  std::string name() const override { return "image"; }
  Extent extent_at(StoreOffset from) const noexcept override;
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override;

  void fail_no_more() { fails_ = false; }
  // Whether this page could not be read once.
  bool has_failed(std::uint64_t page) const { return failed_.contains(page); }

 private:
  Story& story_;
  const bool prompt_;
  bool fails_ = true;
  std::set<std::uint64_t> failed_;
};

// The memory of one image that clients map privately. What the manager writes there, into a real file, is
// shown to them by show().
class ClonedImage {
 public:
  ClonedImage(Story& story, sim::Kernel& kernel);
  const std::shared_ptr<SharedImage>& image() const { return image_; }
  const sim::ObjectPtr& object() const { return object_; }
  void show();
  void fail_no_more() { store_->fail_no_more(); }

 private:
  Story& story_;
  std::shared_ptr<SeededStore> store_;
  std::shared_ptr<SharedImage> image_;
  UniqueFd file_;
  sim::ObjectPtr object_;
  std::uint64_t shown_pages_ = 0;
};

// Thrown out of a system call: the manager is killed there.
struct Killed {};

class ManagerCalls final : public test::ForwardingCalls {
 public:
  // What happens beside the manager.
  struct Meanwhile {
    std::function<void()> between_calls;  // may throw Killed
    std::function<void()> before_ioctl;
  };

  ManagerCalls(Story& story, Bug bug, sim::Process& manager, Meanwhile meanwhile)
      : ForwardingCalls(manager.system_calls()), story_(story), bug_(bug), meanwhile_(std::move(meanwhile)) {}
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override;
  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override;
  int close(int fd) override;
  // Whether a read would bring something, also what a planted bug holds back.
  bool has_messages(int fd) const { return held_.contains(fd) || calls_.poll_readable(fd, 0) != 0; }

 private:
  Story& story_;
  const Bug bug_;
  const Meanwhile meanwhile_;
  bool was_present_ = false;
  std::map<int, std::vector<abi::Msg>> held_;
};

}  // namespace uffdkit::simulate
