#include "handshake.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

namespace tinyvmm {
namespace {

constexpr char kDevice[] = "/dev/userfaultfd";

// KVM touches guest memory from inside the kernel, so the descriptor must be one for kernel-mode faults too.
// The device comes first because access to it can be given to a user; the system call needs a capability.
Result<Fd> open_userfaultfd() {
  constexpr int kFlags = O_CLOEXEC | O_NONBLOCK;
  const Fd device(open(kDevice, O_RDWR | O_CLOEXEC));
  const int device_error = device ? 0 : errno;
  if (device) {
    if (Fd faults(ioctl(device.get(), USERFAULTFD_IOC_NEW, kFlags)); faults) return faults;
    return failure("{} gives no userfaultfd: {}", kDevice, reason(errno));
  }
  if (Fd faults(static_cast<int>(syscall(SYS_userfaultfd, kFlags))); faults) return faults;
  return failure(
      "cannot create a userfaultfd that gets the faults of the kernel, as KVM needs.\n"
      "  {0}: {1}\n"
      "  userfaultfd(2): {2}\n"
      "Any of these helps:\n"
      "  setfacl -m u:$USER:rw {0}         (Linux 6.1 or later)\n"
      "  sysctl vm.unprivileged_userfaultfd=1\n"
      "  running with CAP_SYS_PTRACE",
      kDevice, reason(device_error), reason(errno));
}

Result<void> enable(const Fd& faults) {
  // EVENT_REMOVE makes the server hear of pages that a balloon gave back: without it, it would bring old data
  // back.
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_EVENT_REMOVE;
  if (ioctl(faults.get(), UFFDIO_API, &api) == 0) return {};
  return failure("this kernel's userfaultfd lacks EVENT_REMOVE ({}): Linux 4.11 or later is needed",
                 reason(errno));
}

Result<void> register_regions(const Fd& faults, const GuestMemory& memory) {
  for (const MemoryRegion& region : memory.regions()) {
    uffdio_register request{};
    request.range = {.start = reinterpret_cast<std::uintptr_t>(region.host), .len = region.size};
    request.mode = UFFDIO_REGISTER_MODE_MISSING;
    if (ioctl(faults.get(), UFFDIO_REGISTER, &request) != 0) {
      return failure("cannot register {} bytes of guest memory: {}", region.size, reason(errno));
    }
  }
  return {};
}

Result<Fd> connect_to(const std::filesystem::path& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.native().size() >= sizeof address.sun_path) {
    return failure("the socket's path is too long for the kernel ({} bytes, at most {}): {}",
                   path.native().size(), sizeof address.sun_path - 1, path.string());
  }
  path.native().copy(address.sun_path, path.native().size());
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) return failure("cannot make a socket: {}", reason(errno));
  if (connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return socket;
  const int error = errno;
  return failure("cannot connect to {}: {}{}", path.string(), reason(error),
                 error == ENOENT || error == ECONNREFUSED
                     ? fmt::format("\n  nobody serves there; start a server first:\n"
                                   "  uffdkit serve --firecracker {}=DIR/vm.mem",
                                   path.string())
                     : "");
}

std::string describe_regions(const GuestMemory& memory) {
  nlohmann::ordered_json regions = nlohmann::ordered_json::array();
  for (const MemoryRegion& region : memory.regions()) {
    regions.push_back({{"base_host_virt_addr", reinterpret_cast<std::uintptr_t>(region.host)},
                       {"size", region.size},
                       {"offset", region.offset},
                       {"page_size", memory.page_bytes()},
                       {"page_size_kib", memory.page_bytes()}});  // in bytes too, whatever its name says
  }
  return regions.dump();
}

// One sendmsg carries all of the text, and the descriptor with it.
Result<void> send_with_fd(const Fd& socket, std::string text, const Fd& passed) {
  iovec piece{.iov_base = text.data(), .iov_len = text.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  const int fd = passed.get();
  std::memcpy(CMSG_DATA(header), &fd, sizeof fd);

  const ssize_t sent = sendmsg(socket.get(), &message, MSG_NOSIGNAL);
  if (sent < 0) return failure("cannot send the handshake: {}", reason(errno));
  if (static_cast<std::size_t>(sent) != text.size()) {
    return failure("only {} of the handshake's {} bytes could be sent at once", sent, text.size());
  }
  return {};
}

}  // namespace

Result<ServedMemory> hand_over(const GuestMemory& memory, const std::filesystem::path& socket_path) {
  Result<Fd> faults = open_userfaultfd();
  if (!faults) return std::unexpected(faults.error());
  if (Result<void> enabled = enable(*faults); !enabled) return std::unexpected(enabled.error());
  if (Result<void> registered = register_regions(*faults, memory); !registered) {
    return std::unexpected(registered.error());
  }
  Result<Fd> socket = connect_to(socket_path);
  if (!socket) return std::unexpected(socket.error());
  if (Result<void> sent = send_with_fd(*socket, describe_regions(memory), *faults); !sent) {
    return std::unexpected(sent.error());
  }
  return ServedMemory{.faults = std::move(*faults), .socket = std::move(*socket)};
}

}  // namespace tinyvmm
