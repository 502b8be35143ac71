// The engine for one's own process: one session, one worker, many regions.
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <uffdkit/pager.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <future>
#include <optional>
#include <utility>

#include "engine/engine.h"
#include "engine/map_options.h"

namespace uffdkit {
namespace {

constexpr std::size_t kHugePageFlags = MAP_HUGETLB | (21 << MAP_HUGE_SHIFT);

AddressRange range_of(void* memory, ByteCount length) {
  return {Address(reinterpret_cast<std::uintptr_t>(memory)), length};
}

// Errors reach the program as SIGBUS of the page concerned; whoever wants the reason asks the store.
class SilentListener final : public EngineListener {
  void session_ended(const SessionStatus&, SessionEnd) override {}
  Result<SessionCounters*> session_forks(SessionId, SessionId, const SessionFiles&) override {
    return nullptr;
  }
  void session_forked(const SessionStatus&) override {}
  void detach_failed(SessionId, const Error&) override {}
  void page_failed(SessionId, const Error&) override {}
  void warn(SessionId, const std::string&) override {}
};

// Waits for what the engine answers.
template <class T = void, class Request>
Result<T> wait_for(const Request& request) {
  std::promise<Result<T>> answer;
  request([&](Result<T> result) { answer.set_value(std::move(result)); });
  return answer.get_future().get();
}

// The program's own process where the kernel cannot poison a page (before 6.6): a thread that touches one
// which cannot be read ends it then, rather than wait for ever.
Result<std::optional<UniqueFd>> process_to_end() {
  const Result<KernelFeatures> kernel = probe_features();
  if (kernel && kernel->available.has(Features(abi::kFeaturePoison))) return std::nullopt;
  UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)));
  if (!process) return Failure(Error::from_errno("pidfd_open", errno).with_remedy("use Linux 5.3 or newer"));
  return process;
}

}  // namespace

// Members go in reverse order: the engine stops before its listener goes.
struct Pager::Impl {
  Impl(Uffd own, std::unique_ptr<SilentListener> silent, std::unique_ptr<Engine> serving, SessionId served)
      : uffd(std::move(own)), listener(std::move(silent)), engine(std::move(serving)), session(served) {}

  Uffd uffd;  // another descriptor of the session's, for registering and unregistering from any thread
  std::unique_ptr<SilentListener> listener;
  std::unique_ptr<Engine> engine;
  const SessionId session;
  std::atomic<RegionTag> last_tag{0};
};

class Region::Impl {
 public:
  Impl(std::shared_ptr<Pager::Impl> pager, void* memory, ByteCount length)
      : pager_(std::move(pager)), tag_(++pager_->last_tag), memory_(memory), length_(length) {}
  ~Impl() {
    // First nothing more is brought, so that nothing arrives in memory that is mapped here later. Then only
    // what is left of the region goes: the program may have unmapped parts, and something else may lie there.
    const auto left = wait_for<std::vector<AddressRange>>(
        [&](Engine::Dropped done) { pager_->engine->drop_tagged(pager_->session, tag_, std::move(done)); });
    if (!left) return;
    for (const AddressRange part : *left) {
      (void)pager_->uffd.unregister_range(part);
      ::munmap(reinterpret_cast<void*>(part.start.value), part.length.value);
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(memory_); }
  ByteCount size() const { return length_; }
  AddressRange range() const { return range_of(memory_, length_); }
  RegionTag tag() const { return tag_; }

 private:
  std::shared_ptr<Pager::Impl> pager_;
  RegionTag tag_;
  void* memory_;
  ByteCount length_;
};

Region::Region(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Region::Region(Region&&) noexcept = default;
Region& Region::operator=(Region&&) noexcept = default;
Region::~Region() = default;
std::byte* Region::data() const {
  return impl_->data();
}
ByteCount Region::size() const {
  return impl_->size();
}

Pager::Pager(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Pager::Pager(Pager&&) noexcept = default;
Pager& Pager::operator=(Pager&&) noexcept = default;
Pager::~Pager() = default;

Result<Pager> Pager::create(const PagerOptions& options) {
  if (Result<void> good = check_fault_around(options.fault_around); !good)
    return Failure(std::move(good).error());
  const Features events = Features(abi::kFeatureEventRemove) | Features(abi::kFeatureEventRemap) |
                          Features(abi::kFeatureEventUnmap);
  Result<Uffd> uffd =
      Uffd::create({.kernel_faults = options.kernel_faults, .required = events, .wanted = {}});
  if (!uffd) return Failure(std::move(uffd).error());
  Result<Uffd> own = uffd->duplicate();
  if (!own) return Failure(std::move(own).error());
  Result<std::optional<UniqueFd>> process = process_to_end();
  if (!process) return Failure(std::move(process).error());
  Result<SessionState> state = SessionState::create("");
  if (!state) return Failure(std::move(state).error());

  auto listener = std::make_unique<SilentListener>();
  Result<std::unique_ptr<Engine>> engine =
      Engine::create({.workers = 1, .session = {.fault_around = options.fault_around}}, *listener);
  if (!engine) return Failure(std::move(engine).error());
  const Result<SessionId> session = (*engine)->attach({.uffd = std::move(*uffd),
                                                       .state = std::move(*state),
                                                       .regions = {},
                                                       .lane = nullptr,
                                                       .process = *std::move(process)});
  if (!session) return Failure(session.error());
  auto impl = std::make_shared<Impl>(std::move(*own), std::move(listener), std::move(*engine), *session);
  return Pager(std::move(impl));
}

Result<Region> Pager::map(std::shared_ptr<Store> store, const MapOptions& options) {
  const PageSize page_size = options.huge_pages ? kPage2M : kPage4K;
  const Result<ByteCount> mapped = length_to_map(*store, options.offset, options.length, page_size);
  if (!mapped) return Failure(mapped.error());
  const ByteCount length = *mapped;
  Result<std::shared_ptr<StoreLane>> lane = StoreLane::create(std::move(store));
  if (!lane) return Failure(std::move(lane).error());

  const int flags =
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (options.huge_pages ? int{kHugePageFlags} : 0);
  // Out of reach until it is served: a program that locks its memory (mlockall) would have it filled with
  // zeros here and now.
  void* memory = ::mmap(nullptr, length.value, PROT_NONE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    Error error = Error::from_errno(fmt::format("map {} bytes", length.value), errno);
    if (options.huge_pages)
      error = std::move(error).with_remedy("enlarge the pool of huge pages (vm.nr_hugepages)");
    return Failure(std::move(error));
  }
  const AddressRange range = range_of(memory, length);
  auto region = std::make_unique<Region::Impl>(impl_, memory, length);
  // The session knows the region before the first fault can happen.
  Result<void> added = wait_for([&](Engine::Done done) {
    impl_->engine->add_region(
        impl_->session,
        {.memory = range, .offset = options.offset, .page_size = page_size, .tag = region->tag()},
        std::move(*lane), std::move(done));
  });
  if (!added) {
    ::munmap(memory, length.value);
    return Failure(std::move(added).error());
  }
  const Result<RangeIoctls> registered = impl_->uffd.register_range(range, kMissing);
  if (!registered) return Failure(registered.error());
  if (::mprotect(memory, length.value, PROT_READ | PROT_WRITE) < 0)
    return Failure(Error::from_errno("make a region accessible", errno));
  return Region(std::move(region));
}

PagerStatus Pager::status() const {
  const SessionStatus status = impl_->engine->session(impl_->session).value_or(SessionStatus{});
  return {.faults = status.faults,
          .pages_copied = status.pages_copied,
          .pages_zeroed = status.pages_zeroed,
          .pages_removed = status.pages_removed,
          .pages_poisoned = status.pages_poisoned,
          .bytes_read = status.bytes_read};
}

}  // namespace uffdkit
