#include "harness/server.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "support/arguments.h"
#include "wire/unix_socket.h"

namespace uffdkit::bench {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

// ---- the raw loop's process -------------------------------------------------------------------------------

int serve_raw(raw_way way, const std::string& image, const test::Channel& clients) {
  const int file = ::open(image.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (file < 0 || ::fstat(file, &status) != 0) fail("open " + image);
  const char* mapped = nullptr;
  if (way == RAW_MEMORY) {
    void* memory = ::mmap(nullptr, static_cast<std::size_t>(status.st_size), PROT_READ,
                          MAP_SHARED | MAP_POPULATE, file, 0);
    if (memory == MAP_FAILED) fail("map " + image);
    mapped = static_cast<const char*>(memory);
  }
  for (;;) {
    std::uint64_t start = 0;
    UniqueFd uffd = clients.receive_fd(start);
    std::thread([way, file, mapped, start, owned = std::move(uffd)] {
      const raw_region region{.uffd = owned.get(), .image = file, .mapped = mapped, .start = start};
      if (const int error = raw_serve(way, &region); error != 0) {
        fmt::print(stderr, "the raw loop: {}\n", std::strerror(error));
        ::_exit(1);
      }
    }).detach();
  }
}

// ---- uffdkit's --------------------------------------------------------------------------------------------

[[noreturn]] void run_uffdkit(const std::vector<std::string>& arguments, int output, int log) {
  ::dup2(output, STDOUT_FILENO);
  ::dup2(log, STDERR_FILENO);
  const std::vector<char*> argv = test::exec_pointers(arguments);
  ::execv(argv[0], argv.data());
  ::_exit(127);
}

// False if it ends before it is ready.
bool wait_until_ready(int output) {
  std::string text;
  std::array<char, 256> piece;
  while (text.find('\n') == std::string::npos) {
    const ssize_t bytes = ::read(output, piece.data(), piece.size());
    if (bytes <= 0) return false;
    text.append(piece.data(), static_cast<std::size_t>(bytes));
  }
  return true;
}

}  // namespace

RawServer::RawServer(raw_way way, const std::string& image)
    : way_(way), child_([&](const test::Channel& clients) { return serve_raw(way, image, clients); }) {}

UniqueFd RawServer::hand_over(int uffd, AddressRange memory) const {
  child_.channel().send_fd(memory.start.value, uffd);
  return {};
}

UffdkitServer::UffdkitServer(const std::string& binary, const std::string& directory,
                             const std::string& image, const std::vector<std::string>& options) {
  static int servers = 0;
  socket_ = fmt::format("{}/uffdkit-{}.sock", directory, ++servers);
  // One process: the one that serves is what is measured.
  std::vector<std::string> arguments = {binary, "serve", "--no-keeper", "--firecracker",
                                        socket_ + "=" + image};
  arguments.insert(arguments.end(), options.begin(), options.end());
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) fail("pipe2");
  const UniqueFd output(ends[0]);
  UniqueFd input(ends[1]);
  // What it logs of its sessions is of no interest unless it fails.
  const std::string log_path = socket_ + ".log";
  const UniqueFd log(::open(log_path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_APPEND, 0600));
  if (!log) fail("create " + log_path);
  child_ = std::make_unique<test::Child>(
      [&](const test::Channel&) -> int { run_uffdkit(arguments, input.get(), log.get()); });
  input.reset();
  if (wait_until_ready(output.get())) return;
  std::ifstream said(log_path);
  throw std::runtime_error(fmt::format("{} serve did not come up: {}", binary,
                                       std::string(std::istreambuf_iterator<char>(said), {})));
}

UniqueFd UffdkitServer::hand_over(int uffd, AddressRange memory) const {
  constexpr std::chrono::seconds kLimit{10};
  Result<UniqueFd> socket = connect_unix(socket_, kLimit);
  if (!socket) throw std::runtime_error(socket.error().text());
  const nlohmann::json regions = {{{"base_host_virt_addr", memory.start.value},
                                   {"size", memory.length.value},
                                   {"offset", 0},
                                   {"page_size", 4096},
                                   {"page_size_kib", 4096}}};
  const std::string text = regions.dump();
  const Result<void> sent = send_all(socket->get(), std::as_bytes(std::span(text)), {&uffd, 1}, kLimit);
  if (!sent) throw std::runtime_error(sent.error().text());
  return *std::move(socket);
}

}  // namespace uffdkit::bench
