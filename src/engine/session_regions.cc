// What owners of a session ask for: regions that are added, and memory that is served no more.
#include "engine/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "engine/session_detail.h"

namespace uffdkit {

using namespace session;

namespace {

Result<void> check_region(AddressRange memory, StoreOffset offset, PageSize page_size, const Store& store) {
  const std::uint64_t size = store.size().value;
  if (page_size.bytes().value > kPageBytesMax)
    return Failure(Error(fmt::format("pages of {} bytes are not served", page_size.bytes().value), EINVAL));
  if (memory.length.value == 0 || !page_size.is_aligned(memory.start.value) ||
      !page_size.is_aligned(memory.length.value) || !kPage4K.is_aligned(offset.value))
    return Failure(Error("a region is not of whole pages", EINVAL));
  if (memory.start >= kStateAddressEnd || memory.length > kStateAddressEnd - memory.start)
    return Failure(Error("a region lies outside of the address space", EINVAL));
  if (offset.value > size || memory.length.value > size - offset.value)
    return Failure(Error(fmt::format("a region needs {} bytes from offset {} of {}, which has {}",
                                     memory.length.value, offset.value, store.name(), size),
                         EINVAL));
  return {};
}

}  // namespace

Result<void> Session::add_region(AddressRange memory, StoreOffset offset, PageSize page_size,
                                 std::shared_ptr<StoreLane> lane, RegionTag tag, Sharing sharing) {
  if (auto valid = check_region(memory, offset, page_size, *lane->store()); !valid) return valid;
  if (sharing.mode != SharingMode::none && page_size != kPage4K)
    return Failure(Error("an image is shared in pages of 4 KiB only", EINVAL));
  const Result<RegionId> id = state_.add_region(memory, offset, page_size, sharing.mode);
  if (!id) return Failure(id.error());
  serving_.resize(state_.regions().size());
  serving_[*id] = {
      .lane = std::move(lane), .serial = ++last_serial_, .tag = tag, .shared = std::move(sharing.image)};
  populate_again_from(memory.start);
  // Its pages were passed over.
  if (prefetching_ != nullptr && !prefetching_->begun) prefetching_->next = 0;
  if (options_.background != Background::off) {
    prefetching().background = true;
    prefetching().background_from = std::min(prefetching().background_from, memory.start);
  }
  forget_dropped_regions();
  return {};
}

Result<std::vector<AddressRange>> Session::drop_tagged(RegionTag tag) {
  std::vector<AddressRange> left;
  for (const Segment& segment : state_.layout().segments())
    if (segment.region != kZeroRegion && serving_[segment.region].tag == tag) left.push_back(segment.memory);
  for (const AddressRange memory : left)
    if (auto dropped = drop(memory); !dropped) return Failure(std::move(dropped).error());
  return left;
}

Result<void> Session::drop(AddressRange memory) {
  const Put zeroed = zero_all(memory);
  if (zeroed != Put::done && zeroed != Put::gone)
    return Failure(Error("the client is changing its memory", EAGAIN).with_remedy("ask again"));
  Result<void> erased = state_.erase(memory);
  forget_dropped_regions();
  std::erase_if(pending_, [&](const Pending& pending) { return memory.contains(pending.page); });
  return erased;
}

void Session::forget_dropped_regions() {
  for (RegionId id = 0; id < serving_.size(); ++id)
    if (!state_.regions()[id].live) serving_[id] = RegionServing();
}

}  // namespace uffdkit
