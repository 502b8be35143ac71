// attach: memory of this process that a running manager fills while it is read.
//
//   uffdkit serve --listen /tmp/uffdkit.sock --image guest=vm.mem &
//   attach /tmp/uffdkit.sock guest
//
// Nothing is read from the image but what is touched; here that is all of it, once, to add its bytes up.
// Exit status: 0 done; 1 no manager, or it refuses; 2 the command line is wrong.
#include <uffdkit/client.h>

#include <cstdint>
#include <cstdio>

namespace {

int fail(const uffdkit::Error& error) {
  std::fprintf(stderr, "attach: %s\n", error.text().c_str());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: attach SOCKET IMAGE\n");
    return 2;
  }
  // System calls do not touch the memory here, so no privilege is needed.
  uffdkit::Result<uffdkit::RemoteMapping> memory =
      uffdkit::attach(argv[1], argv[2], {.kernel_faults = false});
  if (!memory) return fail(memory.error());

  std::uint64_t sum = 0;
  for (const std::byte byte : memory->bytes()) sum += std::to_integer<std::uint64_t>(byte);

  const uffdkit::Result<uffdkit::RemoteStatus> status = memory->query();
  if (!status) return fail(status.error());
  std::printf("%zu bytes in %ju pages, sum %ju\n", memory->size(),
              static_cast<std::uintmax_t>(status->pages_served), static_cast<std::uintmax_t>(sum));
  return 0;
}
