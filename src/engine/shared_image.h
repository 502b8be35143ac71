// The memory of an image that clients share: a sparse memory file, filled as its pages are asked for.
//
// Clients map it privately, so that a page which they have not written is the same physical page for all. It
// is filled by pwrite(2) only: the kernel makes a page visible when all of it is there, which writing through
// a mapping would not. What is filled is known here, and not asked of the file: a client that touches a hole
// without being served makes the kernel fill it with zeros. It lies in a second memory file, for a successor
// that has both descriptors. Threads: any; several sessions use it at once.
// Lifetime: it goes, and its memory with it, when the last session that shares it has ended. Invariants: each
// page is written at most once, by the one Job that has it; a page is `filled` only after it was written.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/sharing_mode.h>
#include <uffdkit/store.h>
#include <uffdkit/unique_fd.h>
#include <uffdkit/units.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "engine/fetch.h"
#include "engine/session_state.h"
#include "engine/store_lane.h"

namespace uffdkit {

class SharedImage final : public FetchSink,
                          public IdleWork,
                          public std::enable_shared_from_this<SharedImage> {
 public:
  // Errors: no memory files to be had.
  static Result<std::shared_ptr<SharedImage>> create(std::shared_ptr<StoreLane> lane);
  // The same memory again, of a process that has ended, by its two files. Errors: no room to map them; then
  // they stay the caller's.
  static Result<std::shared_ptr<SharedImage>> take_up(std::shared_ptr<StoreLane> lane, UniqueFd& file,
                                                      UniqueFd& filled);

  const std::shared_ptr<StoreLane>& lane() const { return lane_; }
  int file() const { return file_.get(); }
  int filled_file() const { return filled_file_.get(); }
  ByteCount size() const { return lane_->store()->size(); }
  std::uint64_t filled_pages() const { return filled_count_.load(std::memory_order_relaxed); }
  // How a client is to share it, which needs pages that it gave back to read as zero, or does not.
  SharingMode mode_for(bool removed_reads_zero);
  // A client has it resolved: from now on no pages are gathered into huge ones, since each that is mapped
  // already would be a minor fault once more. mode_for() sees to it; for clients that were taken up, their
  // session.
  void keep_small_pages();
  // A descriptor of the file for a client: open for reading only.
  Result<UniqueFd> open_for_client() const;

  bool has(PageIndex page) const {
    return (filled_[page.value / 64].load(std::memory_order_acquire) >> (page.value % 64) & 1) != 0;
  }
  // The end of the run from `from` on, at most `end`, of pages that are all there or all not.
  PageIndex end_of_run(PageIndex from, PageIndex end) const;

  enum class Fill : std::uint8_t {
    done,       // all pages are there
    under_way,  // some are being read, for this caller or another: fetch() tells when they have come
    no_memory,  // for the file's pages
  };
  struct Filled {
    Fill fill;
    ByteCount read;  // from the store
  };
  // Fills what is missing of `pages`, as far as the store has it at hand; starts reading the rest. `scratch`
  // is as long as `pages`.
  Filled fill(PageRange pages, std::span<std::byte> scratch);
  // Gives `fetch`, whose buffer is not used, to `sink` when none of its pages is being read any more. Those
  // that are not there then, could not be read (then it says so), or not be written.
  void fetch(std::unique_ptr<Fetch> fetch, std::weak_ptr<FetchSink> sink);
  // The page is missing in spite of all: if the file has lost it, it counts as missing again.
  void look_again(PageIndex page);

  // FetchSink: what the lane has read.
  void fetched(std::unique_ptr<Fetch> fetch) override;
  // IdleWork: makes 2 MiB of which each page is there one huge page, for clients that map it from then on.
  void work_a_piece() override;

 private:
  // Somebody's fetch, until the jobs that bring its pages are done.
  struct Waiter {
    std::unique_ptr<Fetch> fetch;
    std::weak_ptr<FetchSink> sink;
    std::size_t jobs = 0;
  };
  // Pages that one thread is bringing.
  struct Job {
    std::uint64_t id;
    PageRange pages;
    std::vector<std::shared_ptr<Waiter>> waiters;
  };

  SharedImage(std::shared_ptr<StoreLane> lane, UniqueFd file, UniqueFd filled_file, StateMapping filled);

  bool is_hole(PageRange pages) const;       // of the store
  const Job* job_at(PageIndex page) const;   // with mutex_ held
  std::uint64_t start_job(PageRange pages);  // likewise
  void read_on_lane(std::uint64_t job, PageRange pages);
  // 0, or the errno of what went wrong.
  int write(PageRange pages, std::span<const std::byte> bytes) const;
  // `outcome` says what could not be read; nullptr if all was read.
  void finish(std::uint64_t job, PageRange written, const Fetch* outcome);
  void mark_filled(PageRange pages);  // with mutex_ held
  // A huge page of the file, by number: 2 MiB of it.
  bool is_complete(std::uint64_t huge) const;
  // Adds those of the huge pages that `pages` lie in of which all is there to `complete_`. With mutex_ held.
  void note_complete(PageRange pages);

  const std::shared_ptr<StoreLane> lane_;
  const UniqueFd file_;
  const UniqueFd filled_file_;
  const StateMapping filled_memory_;
  std::atomic<std::uint64_t>* const filled_;  // in it: a bit for each page; set with mutex_ held
  std::atomic<std::uint64_t> filled_count_{0};

  std::mutex mutex_;  // guards what follows
  std::vector<Job> jobs_;
  std::uint64_t last_job_ = 0;
  std::vector<std::uint64_t> complete_;  // huge pages of which all was there, yet to be gathered
  bool gathers_ = false;                 // the lane has been asked for a piece of that
  bool small_pages_ = false;             // nothing is to be gathered
  bool huge_pages_ = false;  // were possible when it was made, or at any later time that was looked at
};

// How a region shares its image.
struct Sharing {
  SharingMode mode = SharingMode::none;
  std::shared_ptr<SharedImage> image{};
};

}  // namespace uffdkit
