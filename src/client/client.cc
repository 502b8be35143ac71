#include <fmt/format.h>
#include <sys/mman.h>
#include <uffdkit/client.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <thread>
#include <utility>

#include "base/address_space.h"
#include "client/channel.h"
#include "client/session.h"
#include "wire/attach_request.h"
#include "wire/unix_socket.h"

namespace uffdkit {
namespace {

using internal::Channel;
using internal::RemoteSessionCore;

constexpr int kHugePage2M = 21 << MAP_HUGE_SHIFT;

Result<void> check_name(const std::string& image) {
  if (image.empty()) return Failure(Error("the image's name is empty", EINVAL));
  if (image.size() > native::kImageNameBytesMax)
    return Failure(Error(fmt::format("the image's name has {} bytes, more than the limit of {}", image.size(),
                                     native::kImageNameBytesMax),
                         ENAMETOOLONG));
  if (image.find('\0') != std::string::npos)
    return Failure(Error("the image's name has a zero byte", EINVAL));
  return {};
}

// How many bytes to map.
Result<ByteCount> length_of(const AttachOptions& options, ByteCount image_size) {
  if (options.offset.value > image_size.value)
    return Failure(Error(
        fmt::format("offset {} lies beyond the image's {} bytes", options.offset.value, image_size.value),
        EINVAL));
  if (options.length.value != 0) return options.length;
  const ByteCount rest(image_size.value - options.offset.value);
  if (rest.value == 0 || !options.page_size.is_aligned(rest.value))
    return Failure(Error(fmt::format("from offset {} the image has {} bytes, which is not a number of whole "
                                     "pages of {} bytes",
                                     options.offset.value, rest.value, options.page_size.bytes().value),
                         EINVAL)
                       .with_remedy("give a length"));
  return rest;
}

// Memory until somebody else takes it over.
struct Mapped {
  void* start = MAP_FAILED;
  std::size_t length = 0;

  Mapped(void* mapped, std::size_t bytes) : start(mapped), length(bytes) {}
  Mapped(Mapped&& other) noexcept : start(std::exchange(other.start, MAP_FAILED)), length(other.length) {}
  Mapped& operator=(Mapped&& other) noexcept {
    std::swap(start, other.start);
    std::swap(length, other.length);
    return *this;
  }
  ~Mapped() {
    if (start != MAP_FAILED) ::munmap(start, length);
  }
  std::byte* release() { return static_cast<std::byte*>(std::exchange(start, MAP_FAILED)); }
};

// `memory`: the image's, to be mapped from `offset` on; none: anonymous.
Result<Mapped> map(ByteCount length, PageSize page_size, const UniqueFd& memory, StoreOffset offset) {
  const bool huge = page_size == kPage2M;
  // Huge pages are reserved now: an error here is better than a page that cannot be had at a fault.
  const int flags =
      MAP_PRIVATE | (memory ? 0 : MAP_ANONYMOUS) | (huge ? MAP_HUGETLB | kHugePage2M : MAP_NORESERVE);
  // Where address and offset agree so, the kernel can map huge pages of a file. Without room for it, it may
  // still find an address.
  Mapped room(memory ? take_addresses(length.value, kPage2M.bytes().value, offset.value) : MAP_FAILED,
              length.value);
  const bool has_room = room.start != MAP_FAILED;
  Mapped mapped(::mmap(has_room ? room.start : nullptr, length.value, PROT_READ | PROT_WRITE,
                       flags | (has_room ? MAP_FIXED : 0), memory ? memory.get() : -1,
                       memory ? static_cast<off_t>(offset.value) : 0),
                length.value);
  if (has_room && mapped.start != MAP_FAILED) (void)room.release();  // it lies there
  if (mapped.start == MAP_FAILED) {
    Error error = Error::from_errno(fmt::format("map {} bytes of memory", length.value), errno);
    if (huge)
      error = std::move(error).with_remedy(fmt::format(
          "{} free huge pages of 2 MiB are needed: sysctl vm.nr_hugepages", page_size.pages(length).value));
    return Failure(std::move(error));
  }
  if (::madvise(mapped.start, length.value, MADV_DONTFORK) != 0)
    return Failure(Error::from_errno("keep memory from being inherited", errno));
  return mapped;
}

UffdNeeds needs_of(const AttachOptions& options) {
  return {.kernel_faults = options.kernel_faults,
          .required = Features(abi::kFeatureEventRemove),
          .wanted = Features(abi::kFeatureEventRemap) | Features(abi::kFeatureEventUnmap)};
}

// Memory that is registered, and not served yet.
struct Prepared {
  RequestedRegion region;
  SharingMode sharing;
  Mapped mapped;
  Uffd uffd;  // after `mapped`, so closed before it is unmapped, if an error ends this
};

// `memory`: how large the image is, and what to map if it is shared.
Result<Prepared> prepare(const std::string& image, const AttachOptions& options, native::ImageMemory memory) {
  const Result<ByteCount> length = length_of(options, memory.size);
  if (!length) return Failure(Error(length.error()).within(image));
  // Before anything is mapped, so that no mistake is blamed on the system; the address is not known yet.
  RequestedRegion region{
      .memory = {Address(0), *length}, .offset = options.offset, .page_size = options.page_size};
  if (auto valid = validate(std::span(&region, 1), memory.size); !valid)
    return Failure(std::move(valid).error().within(image));
  Result<Mapped> mapped = map(*length, options.page_size, memory.memory, options.offset);
  if (!mapped) return Failure(std::move(mapped).error());
  region.memory.start = Address(reinterpret_cast<std::uintptr_t>(mapped->start));

  Result<Uffd> uffd = Uffd::create(needs_of(options));
  if (!uffd) return Failure(std::move(uffd).error());
  const RegisterModes modes = memory.mode == SharingMode::resolve ? kMissing | kMinor : kMissing;
  if (auto registered = uffd->register_range(region.memory, modes); !registered)
    return Failure(std::move(registered).error());
  return Prepared{
      .region = region, .sharing = memory.mode, .mapped = std::move(*mapped), .uffd = std::move(*uffd)};
}

}  // namespace

// ---- RemoteSession --------------------------------------------------------------------------------------

RemoteSession::RemoteSession(std::unique_ptr<RemoteSessionCore> core) : core_(std::move(core)) {}
RemoteSession::RemoteSession(RemoteSession&&) noexcept = default;
RemoteSession& RemoteSession::operator=(RemoteSession&&) noexcept = default;
RemoteSession::~RemoteSession() = default;

std::uint64_t RemoteSession::id() const {
  return core_->id();
}

ByteCount RemoteSession::image_size() const {
  return core_->image_size();
}

SharingMode RemoteSession::sharing() const {
  return core_->sharing();
}

RemoteConnection RemoteSession::connection() const {
  return core_->connection();
}

Result<void> RemoteSession::add(const RequestedRegion& region) {
  return core_->add(region);
}

Result<void> RemoteSession::drop(AddressRange range) {
  return core_->drop(range);
}

Result<RemoteStatus> RemoteSession::query() {
  return core_->query();
}

Result<void> RemoteSession::detach(DetachWay way) {
  return core_->detach(way);
}

// ---- RemoteMapping --------------------------------------------------------------------------------------

RemoteMapping::RemoteMapping(std::unique_ptr<RemoteSessionCore> core, std::byte* data, std::size_t size)
    : session_(std::move(core)), data_(data), size_(size), owner_(::getpid()) {}

RemoteMapping::RemoteMapping(RemoteMapping&& other) noexcept
    : session_(std::move(other.session_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      owner_(other.owner_) {}

RemoteMapping& RemoteMapping::operator=(RemoteMapping&& other) noexcept {
  if (this == &other) return *this;
  unmap();
  session_ = std::move(other.session_);
  data_ = std::exchange(other.data_, nullptr);
  size_ = std::exchange(other.size_, 0);
  owner_ = other.owner_;
  return *this;
}

RemoteMapping::~RemoteMapping() {
  unmap();
}

void RemoteMapping::unmap() {
  // Threads that wait for pages are woken when the memory is unregistered, and would then fill holes of an
  // image's memory for everybody.
  if (session_.core_ && data_ != nullptr && ::getpid() == owner_ && session_.sharing() != SharingMode::none &&
      session_.connection().state != RemoteConnection::State::detached)
    ::mprotect(data_, size_, PROT_NONE);
  // First the session: unmapping registered memory would wait for a manager to hear of it.
  session_.core_.reset();
  if (data_ != nullptr && ::getpid() == owner_) ::munmap(data_, size_);
  data_ = nullptr;
}

// ---- attaching ------------------------------------------------------------------------------------------

Result<RemoteSession> attach_memory(const std::string& socket, const std::string& image, Uffd uffd,
                                    std::span<const RequestedRegion> regions, const RemoteLimits& limits) {
  if (auto named = check_name(image); !named) return Failure(std::move(named).error());
  // How large the image is, the manager knows.
  constexpr ByteCount kAnySize{std::numeric_limits<std::uint64_t>::max()};
  if (auto valid = validate(regions, kAnySize); !valid) return Failure(std::move(valid).error());
  Result<Channel> channel = Channel::open(socket, limits.answer, {.limit = limits.answer});
  if (!channel) return Failure(std::move(channel).error());
  auto core = RemoteSessionCore::start(std::move(*channel), socket, image, std::move(uffd), regions,
                                       SharingMode::none, limits);
  if (!core) return Failure(std::move(core).error());
  return RemoteSession(std::move(*core));
}

Result<RemoteMapping> attach(const std::string& socket, const std::string& image,
                             const AttachOptions& options) {
  if (auto named = check_name(image); !named) return Failure(std::move(named).error());
  const auto give_up = std::chrono::steady_clock::now() + options.limits.answer;
  for (;;) {
    Result<RemoteMapping> attached = RemoteMapping::attach_once(socket, image, options);
    if (attached || !is_lost(attached.error()) || std::chrono::steady_clock::now() >= give_up)
      return attached;
    // A manager that was replaced while it was asked: the next one is asked.
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

Result<RemoteMapping> RemoteMapping::attach_once(const std::string& socket, const std::string& image,
                                                 const AttachOptions& options) {
  const internal::Patience patience{.limit = options.limits.answer};
  Result<Channel> channel = Channel::open(socket, options.limits.answer, patience);
  if (!channel) return Failure(std::move(channel).error());
  Result<Prepared> prepared = Failure(Error("nothing prepared"));
  if (options.sharing == AttachOptions::Share::if_possible && options.page_size == kPage4K) {
    Result<native::ImageMemory> memory = channel->ask<native::ImageMemory>(
        native::ShareImage{.image = image, .removed_reads_zero = options.removed_reads_zero}, patience);
    if (memory) prepared = prepare(image, options, std::move(*memory));
  }
  if (!prepared) {
    const Result<native::ImageSize> size =
        channel->ask<native::ImageSize>(native::ImageInfo{.image = image}, patience);
    if (!size) return Failure(Error(size.error()).within("ask for the size of " + image));
    prepared = prepare(image, options, {.size = size->size, .mode = SharingMode::none, .memory = {}});
  }
  if (!prepared) return Failure(std::move(prepared).error());
  auto core = RemoteSessionCore::start(std::move(*channel), socket, image, std::move(prepared->uffd),
                                       std::span(&prepared->region, 1), prepared->sharing, options.limits);
  if (!core) return Failure(std::move(core).error());
  return RemoteMapping(std::move(*core), prepared->mapped.release(), prepared->region.memory.length.value);
}

}  // namespace uffdkit
