// A manager in a thread, for tests of the client library: small, and with faults on demand. It serves one
// connection at a time from an image whose pages all differ, and keeps its record of a session in the state
// file, so that another FakeManager can resume it.
#pragma once

#include <uffdkit/uffd.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "wire/native.h"
#include "wire/unix_socket.h"

namespace uffdkit::test {

// What the image "image" holds at `offset`: no page is like another, and none is zero.
std::byte image_byte(std::uint64_t offset);

class FakeManager {
 public:
  struct Script {
    ByteCount image_size{64 * 4096};
    std::optional<native::ErrorCode> refuse_attach{};  // answers ATTACH and RESUME so
    bool silent = false;                               // accepts, and never answers
    bool garbage = false;                              // answers with bytes that are no frame
    bool read_messages = true;                         // false: leaves faults and events in the kernel
    bool serve_pages = true;                           // false: reads faults and leaves them alone
    std::uint32_t lose = 0;          // hangs up instead of answering so many ATTACHes, QUERYs and RESUMEs
    std::uint32_t hold_queries = 0;  // keeps back the answers to so many QUERYs until the next one
  };

  explicit FakeManager(const std::string& path) : FakeManager(path, Script{}) {}
  FakeManager(const std::string& path, Script script);
  // Like a death: everything is closed at once.
  ~FakeManager();

  // Hangs up on the client; a new connection is accepted.
  void hang_up() { hang_up_ = true; }

  int attaches() const { return attaches_; }
  int resumes() const { return resumes_; }
  int connections() const { return connections_; }

 private:
  void run();
  void accept();
  void receive();
  void serve_faults();
  void fill(AddressRange range);
  void close_connection();
  native::Answer answer(native::Request request);
  native::Answer attach(native::Attach attach);
  native::Answer resume(native::Resume resume);
  native::Attached attached() const;
  void send(std::uint32_t request_id, native::Answer answer);

  const Script script_;
  ListeningSocket listener_;
  std::atomic<bool> stop_ = false;
  std::atomic<bool> hang_up_ = false;
  std::atomic<int> attaches_ = 0;
  std::atomic<int> resumes_ = 0;
  std::atomic<int> connections_ = 0;

  // Of the thread alone.
  UniqueFd connection_;
  native::FrameReader reader_{native::FrameReader::Reads::requests};
  std::optional<Uffd> uffd_;
  UniqueFd state_file_;
  std::vector<RequestedRegion> regions_;
  std::uint64_t pages_served_ = 0;
  std::uint32_t lost_ = 0;
  std::uint32_t queries_held_ = 0;
  std::vector<std::uint32_t> held_;

  std::thread thread_;
};

}  // namespace uffdkit::test
