// Layer: client
// Memory of this process that a running manager (uffdkit serve --listen SOCKET) fills on demand.
//
//   Result<RemoteMapping> memory = attach("/run/uffdkit.sock", "guest.mem");
//   if (!memory) return report(memory.error());
//   use(memory->data(), memory->size());
//
// What is promised: a page is either the image's or the thread that touches it waits. When the manager dies,
// threads that touch missing pages wait; the library finds the next manager at the same socket and goes on.
// It never lets a page read as zero instead.
//
// How: the process keeps its own descriptor of the userfaultfd, so the kernel never takes it for abandoned,
// and the manager's state file (a small memory file, which is not written here). A thread of the library
// sleeps until the connection ends, then connects again, at once and after pauses of 100 ms doubling to 2 s.
// That thread has all signals blocked and touches no served memory.
//
// fork(2): the memory that attach() makes is not inherited (MADV_DONTFORK); a child that touches it gets
// SIGSEGV, where it would otherwise read zeros. A child must not call anything here on objects of its parent,
// but may destroy them: that closes its copies of their descriptors and leaves the parent's memory alone.
// A child that wants the memory calls attach() itself; or attach_memory(), with a userfaultfd that it makes,
// for what it maps at the same addresses, which are free in it. Either way it gets the image, not what its
// parent has written since. Memory calls: munmap, mremap and madvise on served memory are told to the
// manager, and wait until it has read them; while there is no manager, they wait too. Threads: calls on one
// object may come from any thread, and take turns; moving and destroying must not overlap with other calls on
// the same object.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/requested_region.h>
#include <uffdkit/sharing_mode.h>
#include <uffdkit/uffd.h>
#include <uffdkit/units.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace uffdkit {

// How long to wait for a manager.
struct RemoteLimits {
  // For connecting, and for each answer but detach()'s.
  std::chrono::milliseconds answer{5000};
  // How long to look for a manager after the connection has ended; nothing: for ever. After it, threads that
  // touch missing pages still wait, until the object is destroyed.
  std::optional<std::chrono::milliseconds> resume{};
};

struct AttachOptions {
  StoreOffset offset{};  // where in the image the memory begins; a multiple of 4096
  ByteCount length{};    // how much of it; 0: up to the image's end. A multiple of the page size
  // kPage2M: huge pages, reserved at once; needs as many free ones (vm.nr_hugepages).
  PageSize page_size = kPage4K;
  // Whether system calls and KVM guests may touch missing pages. That needs a privilege; see UffdNeeds.
  bool kernel_faults = true;
  // if_possible: maps the image's memory at the manager, privately, so that every page that was not written
  // is one physical page for all clients of the image, and is read once for all; session().sharing() says
  // what came of it. Pages of 4 KiB only. If the manager or the kernel cannot, as `never`. What clients owe
  // each other then: docs/protocol.md, "Sharing an image". Keep in mind that a process of the manager's own
  // user can change what is not complete yet, for all.
  enum class Share : std::uint8_t { never, if_possible };
  Share sharing = Share::never;
  // Whether pages given back by madvise(2) have to read as zero when the image is shared, as they do when it
  // is not; otherwise they may read as the image again. Costs the cheap faults of SharingMode::page_cache.
  bool removed_reads_zero = false;
  RemoteLimits limits{};
};

// What the manager did for a session.
struct RemoteStatus {
  std::uint64_t pages_served;
  std::uint64_t faults_pending;
};

// Whether a manager serves the memory at this moment.
struct RemoteConnection {
  enum class State : std::uint8_t {
    attached,  // yes
    looking,   // the connection has ended; a manager is looked for
    given_up,  // none was found within RemoteLimits::resume
    detached,  // detach() was called: no manager is needed any more
  };
  State state;
  std::uint64_t resumes;   // how many times the memory went to another connection
  std::string last_error;  // of the last attempt to find a manager; empty if there was none
};

enum class DetachWay : std::uint8_t {
  populate,  // the manager first fills every page that is missing
  release,   // at once; pages that are missing read as zero from then on, which the caller consents to
};

namespace internal {
class RemoteSessionCore;
}

// A manager's service for memory of this process that somebody else owns. Move-only. After a move only
// destruction and assignment are allowed.
class RemoteSession {
 public:
  RemoteSession(RemoteSession&&) noexcept;
  RemoteSession& operator=(RemoteSession&&) noexcept;
  // Stops the library's thread, unregisters the memory and closes the connection. Never waits for a manager.
  // Missing pages read as zero from then on, so no thread may use the memory any more, unless detach()
  // succeeded before. Threads that waited for pages go on with zeros; those of a RemoteMapping that shares
  // its image get SIGSEGV, since zeros would be everybody's.
  ~RemoteSession();

  // The manager's number for the session.
  std::uint64_t id() const;
  // Of the image, in bytes, as of attaching.
  ByteCount image_size() const;
  RemoteConnection connection() const;
  // How the memory that attach() made shares the image. Constant.
  SharingMode sharing() const;

  // Serves another region as well: registers it for missing pages, then asks the manager. The memory is
  // mapped by the caller, and must not be used before this returns. On an error it is unregistered again.
  // Errors: the region makes no sense (see RequestedRegion), overlaps with one that is served, or lies beyond
  // the image; the kernel refuses to register it; no manager at this moment.
  Result<void> add(const RequestedRegion& region);

  // Serves a range no longer; pages of it that are not served are skipped. Once it returns nothing is written
  // there, and pages that were missing read as zero. After an error threads may wait for its pages: call it
  // again. Start and length are multiples of the page size of the region.
  // Errors: alignment; no manager at this moment.
  Result<void> drop(AddressRange range);

  // Errors: no manager at this moment.
  Result<RemoteStatus> query();

  // Ends the service; the memory is ordinary memory of the process afterwards. With DetachWay::populate this
  // takes as long as reading all of the image that is missing; nothing limits it but the manager's end. After
  // an error the memory is served as before. A second call does nothing.
  // Errors: no manager at this moment, or it ended meanwhile; pages that cannot be read.
  Result<void> detach(DetachWay way);

 private:
  friend Result<RemoteSession> attach_memory(const std::string&, const std::string&, Uffd,
                                             std::span<const RequestedRegion>, const RemoteLimits&);
  friend class RemoteMapping;
  explicit RemoteSession(std::unique_ptr<internal::RemoteSessionCore> core);
  std::unique_ptr<internal::RemoteSessionCore> core_;
};

// Memory that attach() made, with its session. Move-only. After a move only destruction and assignment are
// allowed.
class RemoteMapping {
 public:
  RemoteMapping(RemoteMapping&&) noexcept;
  RemoteMapping& operator=(RemoteMapping&&) noexcept;
  // Ends the session as ~RemoteSession does, and unmaps the memory.
  ~RemoteMapping();

  // The first byte: readable and writable private memory. Writes never reach the image.
  std::byte* data() const { return data_; }
  // In bytes.
  std::size_t size() const { return size_; }
  std::span<std::byte> bytes() const { return {data_, size_}; }

  // For what else can be asked. Lives as long as this object.
  RemoteSession& session() { return session_; }
  const RemoteSession& session() const { return session_; }

  // See RemoteSession. data() stays valid after detach().
  Result<RemoteStatus> query() { return session_.query(); }
  Result<void> detach(DetachWay way) { return session_.detach(way); }

 private:
  friend Result<RemoteMapping> attach(const std::string&, const std::string&, const AttachOptions&);
  static Result<RemoteMapping> attach_once(const std::string& socket, const std::string& image,
                                           const AttachOptions& options);
  RemoteMapping(std::unique_ptr<internal::RemoteSessionCore> core, std::byte* data, std::size_t size);
  void unmap();

  RemoteSession session_;
  std::byte* data_;
  std::size_t size_;
  int owner_;  // the pid of the process whose memory it is
};

// Asks the manager at `socket` for the image's size, maps private memory for it, and has it served:
// anonymous, or the image's (AttachOptions::sharing). `image` is a name that the manager knows. The
// userfaultfd hears of madvise, and of mremap and munmap where the kernel has that. Since Linux 4.11. Errors:
// nobody listens, or does not answer in time; the manager refuses (its reason is in the message); the offset
// and length make no sense for the image; no memory or huge pages; no userfaultfd can be created (see
// Uffd::create). Nothing is left behind on an error.
Result<RemoteMapping> attach(const std::string& socket, const std::string& image,
                             const AttachOptions& options = {});

// The same for memory and a userfaultfd that the program has made itself. The regions are registered with
// `uffd` for missing pages already, and must not be used before this returns. `uffd` is non-blocking, has
// event-remove enabled if the program ever calls madvise on the memory (event-remap, event-unmap likewise),
// and is owned from here on. The memory stays the caller's and must outlive the session. The caller decides
// what a fork(2) does: without MADV_DONTFORK a child reads zeros where pages were missing. Errors: as
// attach(). On an error `uffd` is closed, which unregisters the memory.
Result<RemoteSession> attach_memory(const std::string& socket, const std::string& image, Uffd uffd,
                                    std::span<const RequestedRegion> regions,
                                    const RemoteLimits& limits = {});

}  // namespace uffdkit
