// What must outlive the thread, the process and the program that serves a session: its regions, its layout,
// the state of its pages, and the messages that were read and are not applied yet, in a file of its own (a
// memfd).
//
// The file is what a session is: whoever holds it and the userfaultfd can go on serving. It is kept right at
// every instant, so that it can be read after its writer was cut off anywhere: regions are filled in before
// they are counted, the layout is written beside the old one and then switched to by one store, page states
// are single stores (PageTable). Messages of the userfaultfd are read straight into it, so that each is in
// the kernel or here; that one has been applied is said by the same store that switches the layout. It cannot
// be shrunk (sealed), so that a peer who holds it too cannot take mapped memory away. docs/session-state.md
// says every byte. Threads: none; the session is the only one to write.
#pragma once

#include <uffdkit/abi.h>
#include <uffdkit/error.h>
#include <uffdkit/sharing_mode.h>
#include <uffdkit/unique_fd.h>
#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/layout.h"
#include "engine/page_table.h"

namespace uffdkit {

// The most regions that a session has in its life at one time; a client protocol may allow fewer.
inline constexpr std::uint32_t kSessionRegionsMax = 1024;
// The most segments: what vm.max_map_count allows on machines that raise it generously.
inline constexpr std::uint32_t kSegmentsMax = 1u << 20;
// Messages that are read at once.
inline constexpr std::size_t kInboxMessages = 64;  // 2 KiB
// The end of user addresses on machines with 5-level page tables, the widest there are.
inline constexpr Address kStateAddressEnd{1ull << 56};

// A region as the file has it.
struct RegionRecord {
  bool live = false;  // false: dropped, its number may be used again, and nothing else is set
  ByteCount length;
  StoreOffset offset;  // of its first byte in the store
  PageSize page_size = kPage4K;
  SharingMode sharing = SharingMode::none;
  friend constexpr bool operator==(const RegionRecord&, const RegionRecord&) = default;
};

// Memory mapped from the file; unmapped by the destructor.
class StateMapping {
 public:
  StateMapping() = default;
  static Result<StateMapping> map(int fd, std::uint64_t offset, std::uint64_t bytes);
  StateMapping(StateMapping&& other) noexcept;
  StateMapping& operator=(StateMapping&& other) noexcept;
  ~StateMapping();
  std::byte* data() const { return data_; }
  std::uint64_t size() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;
};

class SessionState {
 public:
  // A new session's file. `image` (at most 255 bytes) is what to open when a session is taken up again.
  static Result<SessionState> create(const std::string& image);
  // Takes up a session from its file, checking all that is in it. Pages that its former owner was fetching
  // are absent again. The descriptor may be open for reading only. Errors: not such a file, not sealed, of
  // another version, damaged (says what).
  static Result<SessionState> open(UniqueFd file);
  // The same, but a file that is refused stays the caller's.
  static Result<SessionState> open_or_leave(UniqueFd& file);

  // The same session as it is now, in a file of its own: what a child has after fork(2). Its inbox is empty.
  Result<SessionState> clone() const;

  // The image's name in a state file, of which nothing else is looked at or changed. Errors: not such a file,
  // or damaged where this can be told from its header.
  static Result<std::string> image_of(int file);
  // The descriptors of children that a state file's inbox names, of forks that have not been applied. None if
  // it is no such file.
  static std::vector<int> forks_in_inbox(int file);

  // Gives the file up.
  UniqueFd leave() && { return std::move(file_); }
  // The file. To hand it to a client, reopen it for reading only.
  int fd() const { return file_.get(); }
  const std::string& image() const { return image_; }
  // All regions by number, dropped ones too.
  const std::vector<RegionRecord>& regions() const { return regions_; }
  const Layout& layout() const { return layout_; }
  // The page states of a live region.
  PageTable& table(RegionId region) { return tables_[region]; }

  // A new region, all of it absent, at `memory`. Errors: too many regions; no memory.
  Result<RegionId> add_region(AddressRange memory, StoreOffset offset, PageSize page_size,
                              SharingMode sharing = SharingMode::none);
  // Forgets what lies in `memory`; a region of which nothing is left is dropped, and its page states freed.
  Result<void> erase(AddressRange memory);
  // What mremap(2) did; see Layout::move.
  Result<void> move(AddressRange from, Address to);
  // The file that is mapped at `from` is mapped from there on at `to` as well. How far nobody tells: as far
  // as it goes there, and nothing else lies here.
  Result<void> map_again(Address from, Address to);
  // The mapping that ended with the segment has grown up to `end`, and is a file's: the region goes on behind
  // the segment, if it does.
  Result<void> grow(const Segment& segment, Address end);
  // See Layout::settle.
  Result<void> settle(Address left_behind, bool is_file);

  // Empties the inbox: kInboxMessages slots for read(2) to fill, from the first on. All that was in it has
  // been applied.
  std::span<abi::Msg> empty_inbox();
  // The messages that were read, and which of them have been applied: those below unapplied(). Of an inbox
  // that was taken up, the messages end at the first slot whose event is 0.
  std::span<const abi::Msg> inbox() const;
  std::size_t unapplied() const { return unapplied_; }
  // What follows, up to applied(), is the effect of message `index` of the inbox: a change of the layout says
  // that it has been applied in the same store.
  void applying(std::size_t index) { unapplied_ = index + 1; }
  void applied() { publish_progress(); }

 private:
  SessionState(UniqueFd file, StateMapping head, std::string image)
      : file_(std::move(file)), head_(std::move(head)), image_(std::move(image)) {}

  Result<void> map_table(RegionId region, std::uint64_t at);
  Result<void> take_up_table(RegionId region);
  Result<void> publish_layout();
  void publish_progress();
  void drop_regions_without_segments();
  Result<void> load_regions(std::uint32_t count, std::uint64_t file_bytes);
  Result<void> load_layout(std::uint32_t count);

  UniqueFd file_;
  StateMapping head_;
  std::string image_;
  std::uint64_t tables_end_ = 0;     // where the next table goes
  std::uint32_t active_layout_ = 0;  // which of the two lists counts
  std::size_t unapplied_ = 0;        // the first message of the inbox that has not been applied
  bool inbox_is_own_ = false;        // nobody but this object has filled it
  std::vector<RegionRecord> regions_;
  std::vector<std::uint64_t> table_at_;  // where the region's page states lie in the file
  std::vector<StateMapping> table_memory_;
  std::vector<PageTable> tables_;
  Layout layout_;
};

}  // namespace uffdkit
