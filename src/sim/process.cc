#include <algorithm>
#include <cerrno>

#include "base/check.h"
#include "sim/fault.h"
#include "sim/machine.h"

namespace uffdkit::sim {
namespace {

// How much of [address, address + bytes) lies on the page at `address`.
std::size_t part_of_page(Address address, const Frame& frame, std::size_t bytes) {
  return std::min<std::size_t>(bytes, frame.bytes.size() - address.value % frame.bytes.size());
}

}  // namespace

ProcessImpl::ProcessImpl(Machine& machine, Credentials who, std::shared_ptr<DescriptorTable> descriptors,
                         std::shared_ptr<AddressSpace> space)
    : machine_(machine),
      pid_(machine.next_id()),
      who_(std::move(who)),
      descriptors_(std::move(descriptors)),
      space_(std::move(space)),
      calls_(make_system_calls(*this)) {}

ProcessImpl::~ProcessImpl() = default;

Caller ProcessImpl::caller() {
  return {.who = who_, .options = machine_.options, .space = space_, .descriptors = *descriptors_};
}

Thread& ProcessImpl::spawn_thread() {
  CHECK(alive_);
  // The first thread of a process has its number.
  const int tid = threads_.empty() ? pid_ : machine_.next_id();
  threads_.push_back(std::make_unique<ThreadImpl>(*this, tid));
  return *threads_.back();
}

std::vector<Thread*> ProcessImpl::threads() {
  std::vector<Thread*> all;
  all.reserve(threads_.size());
  for (const auto& thread : threads_) all.push_back(thread.get());
  return all;
}

Result<Address> ProcessImpl::map(const MapRequest& request) {
  CHECK(alive_);
  const std::int64_t address = map_area(machine_, *space_, request);
  if (address < 0) return Failure(Error::from_errno("map simulated memory", static_cast<int>(-address)));
  return Address(static_cast<std::uint64_t>(address));
}

const Pte* ProcessImpl::entry(Address address) const {
  const Area* area = space_->find(address.value);
  return area == nullptr ? nullptr : space_->entry(address.value / area->page() * area->page());
}

std::optional<std::byte> ProcessImpl::peek(Address address) const {
  const Pte* pte = entry(address);
  if (pte == nullptr || !pte->present()) return std::nullopt;
  if (pte->zero) return std::byte{};
  return pte->frame->bytes[address.value % pte->frame->bytes.size()];
}

std::size_t ProcessImpl::peek(Address address, std::span<std::byte> to) const {
  static const Frame zeros(kSmallPage);
  std::size_t done = 0;
  while (done < to.size()) {
    const Address at = address + ByteCount(done);
    const Pte* pte = entry(at);
    if (pte == nullptr || !pte->present()) break;
    const Frame& frame = pte->frame ? *pte->frame : zeros;
    const std::size_t part = part_of_page(at, frame, to.size() - done);
    std::copy_n(frame.bytes.begin() + static_cast<std::ptrdiff_t>(at.value % frame.bytes.size()), part,
                to.begin() + static_cast<std::ptrdiff_t>(done));
    done += part;
  }
  return done;
}

std::size_t ProcessImpl::poke(Address address, std::span<const std::byte> bytes) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const Address at = address + ByteCount(done);
    Pte* pte = reachable(*space_, at.value, true);
    if (pte == nullptr) break;
    std::vector<std::byte>& page = pte->frame->bytes;
    const std::size_t part = part_of_page(at, *pte->frame, bytes.size() - done);
    std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(done), part,
                page.begin() + static_cast<std::ptrdiff_t>(at.value % page.size()));
    done += part;
  }
  return done;
}

bool ProcessImpl::present(Address address) const {
  const Pte* pte = entry(address);
  return pte != nullptr && pte->present();
}

bool ProcessImpl::write_protected(Address address) const {
  const Pte* pte = entry(address);
  return pte != nullptr && pte->wp;
}

void ProcessImpl::pin(FramePtr frame) {
  ++frame->pins;
  pinned_.push_back(std::move(frame));
}

void ProcessImpl::unpin() {
  for (const FramePtr& frame : pinned_) --frame->pins;
  pinned_.clear();
}

// Source: unix(7), SCM_RIGHTS.
int ProcessImpl::pass_descriptor(int fd, Process& to) {
  FilePtr file = descriptors_->file(fd);
  if (!file) return -EBADF;
  return static_cast<ProcessImpl&>(to).descriptors_->install(std::move(file), descriptors_->flags(fd));
}

Process& ProcessImpl::clone_with_files() {
  return machine_.new_process(who_, descriptors_, machine_.new_space());
}

void ProcessImpl::end_threads() {
  for (const auto& thread : threads_) thread->end();
}

// No event tells of it; userfaultfds of others find that the memory is gone. Source: mm/mmap.c, exit_mmap();
// fs/userfaultfd.c, mmget_not_zero() in its ioctls.
void ProcessImpl::kill() {
  if (!alive_) return;
  alive_ = false;
  end_threads();
  unpin();
  space_->alive = false;
  space_->remove(0, UINT64_MAX);
  // Descriptors that another process shares stay open.
  descriptors_ = std::make_shared<DescriptorTable>(0);
}

// Source: execve(2), "Effect on process attributes".
void ProcessImpl::exec() {
  CHECK(alive_);
  end_threads();
  threads_.clear();
  unpin();
  space_->alive = false;
  space_->remove(0, UINT64_MAX);
  space_ = machine_.new_space();
  descriptors_ = std::make_shared<DescriptorTable>(*descriptors_);
  descriptors_->close_on_exec();
}

}  // namespace uffdkit::sim
