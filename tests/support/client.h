// A process whose memory a manager serves, and which knows what must be in it.
//
// The work of a client is a function of the test, run in a forked child (support/child.h) whose memory has
// been handed over. What is wrong there is thrown, printed and gives exit code 1. A client that hangs is
// ended by SIGALRM after a minute, so that the test fails.
#pragma once

#include <uffdkit/abi.h>
#include <uffdkit/uffd.h>
#include <uffdkit/unique_fd.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "support/child.h"
#include "support/image.h"
#include "support/mapping.h"

namespace uffdkit::test {

// What a client maps. Pages are of 4 KiB here, on huge pages too.
struct ClientShape {
  struct Region {
    std::size_t pages;
    std::size_t image_page = 0;  // the page of the image that its first one shows
  };
  enum class Memory : std::uint8_t { anonymous, shared, huge_pages };

  std::vector<Region> regions;
  Memory memory = Memory::anonymous;
};
// One region that shows all of the image.
ClientShape whole(const Image& image);

// Why no client can be made here ("needs ..."); empty if one can. Clients touch their memory in system calls
// too.
std::string clients_lack();
// Likewise why no page can be poisoned.
std::string poisoning_lacks();

// The memory of a client in this process, its pages counted through all regions. Calls that find something
// wrong throw.
class ClientMemory {
 public:
  ClientMemory(const Image& image, ClientShape shape);

  const Uffd& uffd() const { return uffd_; }
  std::size_t pages() const { return pages_.size(); }
  std::span<std::byte, 4096> bytes(std::size_t page) const {
    return std::span<std::byte, 4096>(pages_[page].bytes, 4096);
  }
  // The page of the image that this page shows.
  std::size_t image_page(std::size_t page) const { return pages_[page].image_page; }

  // What Firecracker says of its memory.
  nlohmann::json handshake() const;
  // Hands the memory over as Firecracker does; returns the connection, which is of no more use.
  UniqueFd hand_over(const std::string& socket) const;
  // Closes the userfaultfd here: what holds it elsewhere is all that is left.
  void give_up_descriptor() const;

  // Touches this page and compares all of its bytes with the image.
  void check(std::size_t page) const;
  // Likewise all pages, in random order, by so many threads at once, each of which touches all of them.
  void check_all(unsigned threads, std::uint64_t seed) const;
  // Touches this page, which must be zero.
  void check_zero(std::size_t page) const;
  // Gives pages back, by an advice of madvise(2).
  void give_back(std::size_t first, std::size_t count, int advice) const;

 private:
  struct Page {
    std::byte* bytes;
    std::size_t image_page;
  };

  const Image& image_;
  ClientShape shape_;
  Uffd uffd_;
  std::vector<Mapping> mappings_;
  std::vector<Page> pages_;
};

// What a client does.
using ClientWork = std::function<void(const ClientMemory&, const Channel&)>;
// Touches the first page and says so; does `work` when it is sent something.
ClientWork after_one_page(ClientWork work);
// Touches all pages.
void check_all_pages(const ClientMemory& memory, const Channel& channel);

// A client that has handed its memory over to the manager at `socket` as Firecracker does.
Child client(const Image& image, const ClientShape& shape, const std::string& socket, const ClientWork& work);
// A process without memory of that kind, under the same rules.
Child program(const std::function<void(const Channel&)>& work);

// Runs these at once and waits for all. Throws what one of them threw.
void at_once(const std::vector<std::function<void()>>& works);

// Throws with this text unless `holds`.
void require(bool holds, const std::string& what);

// A connection to `socket`.
UniqueFd connect_to(const std::string& socket);
// Sends all of `bytes`, the descriptors with the first of them.
void send_with_fds(int socket, std::string_view bytes, std::span<const int> fds);

}  // namespace uffdkit::test
