#include "simulate/managers.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <uffdkit/store.h>
#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <optional>
#include <utility>
#include <vector>

#include "base/check.h"
#include "image/memory_source.h"
#include "image/write_image.h"
#include "simulate/expected.h"

namespace uffdkit::simulate {
namespace {

// Writes the image, and keeps it in the page cache: what of it is there decides who reads it, and the kernel
// may drop it at any time.
test::Mapping make_image(const std::string& path, bool compressed) {
  std::vector<std::byte> memory(Managers::kImagePages * kPage);
  for (std::uint64_t at = 0; at < memory.size(); ++at)
    memory[at] = static_cast<std::byte>(image_byte(at / kPage, at % kPage));
  if (compressed) {
    const auto source = image::memory_of(make_memory_store(memory), memory.size());
    (void)image::write_image(*source, path, std::nullopt, {},
                             {.frame_bytes = image::kFrameBytesMin, .threads = 1})
        .value();
  } else {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(memory.data()), static_cast<std::streamsize>(memory.size()));
  }
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  test::Mapping mapping =
      test::Mapping::map(nullptr, std::filesystem::file_size(path), PROT_READ, MAP_SHARED, file.get());
  // Not by mlock(3), of which sanitizers make nothing.
  CHECK(::syscall(SYS_mlock, mapping.data(), mapping.size()) == 0);
  return mapping;
}

}  // namespace

Managers::Managers(Story& story, SeededThreads& threads, SystemCalls& calls)
    : story_(story),
      threads_(threads),
      calls_(calls),
      compressed_(story.one_in(3)),
      image_in_memory_(make_image(image(), compressed_)) {
  if (compressed_) story_.note("the image is compressed");
}

void Managers::start() {
  ManagerOptions options{.workers = 1 + static_cast<unsigned>(story_.draw(3)),
                         .fault_around = PageCount(std::uint64_t{1} << story_.draw(5)),
                         .spin_ns = story_.one_in(2) ? 20'000 : 0,
                         .drain_ms = kEndNs / 1'000'000,
                         .record = story_.one_in(4),
                         .background = story_.one_in(4) ? Background::full : Background::off,
                         .system = calls_,
                         .threads = Threads(threads_)};
  // Part of the image is read by its lane only, and there a page may fail once; but not when an image is
  // opened, for which one that is compressed is read.
  const std::uint64_t border = story_.draw(std::filesystem::file_size(image()));
  if (border > 0)
    options.store_faults.push_back({.kind = StoreFault::Kind::error,
                                    .rate = compressed_ ? 0 : 0.1,
                                    .to = StoreOffset(border),
                                    .times = 1,
                                    .seed = story_.draw(1000)});
  manager_ = Manager::create(options).value();
  manager_->add_image("guest", image()).value();
  manager_->listen_native(native_socket()).value();
  manager_->listen_control(control_socket()).value();
  manager_->listen_firecracker(firecracker_socket(), image()).value();
  ending_ = false;
  ended_ = false;
  running_ = Threads(threads_)
                 .start("run the manager",
                        [this] {
                          ended_well_ = manager_->run();
                          ended_ = true;
                        })
                 .value();
  story_.note(fmt::format("a manager with {} workers", options.workers));
}

void Managers::tell_to_end() {
  if (std::exchange(ending_, true)) return;
  story_.note("the manager is to end");
  // Whom it cannot complete it kills, and has to wait for that.
  ends_by_ns_ = threads_.clock_ns() + 2 * kEndNs;
  manager_->stop();
}

void Managers::bury() {
  running_.join();
  manager_.reset();
  story_.note("the manager has ended");
}

void Managers::give_up() {
  manager_->stop();
  manager_->stop();
  while (!ended_) {
    const bool idle = threads_.run_until_idle();
    if (!ended_ && idle) CHECK(threads_.let_time_pass());
  }
  bury();
}

}  // namespace uffdkit::simulate
