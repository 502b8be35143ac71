// What keeps a session served: the process's own descriptors, and a thread that finds the next manager.
#pragma once

#include <sys/types.h>
#include <uffdkit/client.h>
#include <uffdkit/unique_fd.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "client/channel.h"
#include "wire/native.h"

namespace uffdkit::internal {

// Threads: public calls from any, except that destruction is last.
class RemoteSessionCore {
 public:
  // Asks the manager at the other end of `channel` to serve `regions`, and starts the watcher.
  static Result<std::unique_ptr<RemoteSessionCore>> start(Channel channel, std::string socket,
                                                          const std::string& image, Uffd uffd,
                                                          std::span<const RequestedRegion> regions,
                                                          SharingMode sharing, const RemoteLimits& limits);
  RemoteSessionCore(const RemoteSessionCore&) = delete;
  RemoteSessionCore& operator=(const RemoteSessionCore&) = delete;
  ~RemoteSessionCore();

  std::uint64_t id() const;
  ByteCount image_size() const { return image_size_; }
  SharingMode sharing() const { return sharing_; }
  RemoteConnection connection() const;
  Result<void> add(const RequestedRegion& region);
  Result<void> drop(AddressRange range);
  Result<RemoteStatus> query();
  Result<void> detach(DetachWay way);

 private:
  RemoteSessionCore(Channel channel, std::string socket, Uffd uffd, native::Attached attached,
                    std::span<const RequestedRegion> regions, SharingMode sharing, const RemoteLimits& limits,
                    UniqueFd stop);

  Result<void> start_watcher();
  void watch();           // the watcher's body
  bool find_manager();    // false: the watcher is to end
  Result<void> resume();  // one attempt
  bool stopped_within(std::chrono::milliseconds pause) const;
  void stop_watcher();
  void let_go();                        // unregisters the memory and closes everything
  Result<void> check_attached() const;  // with mutex_ held
  // Asks the manager, and if it goes before it has answered, its successor: the request may have been done by
  // both. `lock` holds mutex_.
  template <class A, class Make>
  Result<A> ask(std::unique_lock<std::mutex>& lock, const Make& make, const Patience& patience);

  const pid_t owner_;  // a forked child must not touch its parent's memory
  const std::string socket_;
  const RemoteLimits limits_;
  const ByteCount image_size_;
  const SharingMode sharing_;
  const UniqueFd stop_;  // an eventfd, readable when the watcher is to end

  mutable std::mutex mutex_;  // guards what follows; held while a request is under way
  std::optional<Channel>
      channel_;  // none while a manager is looked for. Only the watcher puts another one here
  Uffd uffd_;
  native::SessionId session_;
  UniqueFd state_file_;
  std::vector<AddressRange> served_;
  RemoteConnection connection_{.state = RemoteConnection::State::attached, .resumes = 0, .last_error = {}};

  std::condition_variable found_manager_;  // or gave up

  std::unique_ptr<std::thread> watcher_;
};

}  // namespace uffdkit::internal
