// Memory of this program that comes from a file, brought by whichever thread touches it: no other thread, no
// permission. And what that costs: system calls do not wait for pages.
#include <fcntl.h>
#include <uffdkit/sigbus_pager.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

constexpr std::size_t kPage = 4096;
constexpr std::size_t kPages = 1024;

static int fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  return 1;
}

int main() {
  // A file of 4 MiB: in each page, over and over, the page's number.
  std::FILE* file = std::tmpfile();
  if (file == nullptr) return fail("no temporary file");
  for (std::uint32_t page = 0; page < kPages; ++page) {
    const std::vector<std::uint32_t> numbers(kPage / sizeof page, page);
    std::fwrite(numbers.data(), sizeof page, numbers.size(), file);
  }
  std::fflush(file);

  auto store = uffdkit::open_file_store(::fileno(file), "the file");
  auto pager = uffdkit::SigbusPager::create();
  if (!store || !pager) return fail(store ? pager.error().text() : store.error().text());
  auto region = pager->map(*store);
  if (!region) return fail(region.error().text());

  // Each of these threads brings what it touches.
  bool right[4] = {true, true, true, true};
  {
    std::vector<std::jthread> threads;
    threads.reserve(4);
    for (std::size_t t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        for (std::size_t page = t; page < kPages / 2; page += 4) {
          std::uint32_t number = 0;
          std::memcpy(&number, region->data() + page * kPage + 40, sizeof number);
          right[t] = right[t] && number == page;
        }
      });
  }
  if (!(right[0] && right[1] && right[2] && right[3])) return fail("a page has another's bytes");

  // A system call is refused a page that is not there, until it has been brought.
  const int null = ::open("/dev/zero", O_RDONLY);
  const std::span<std::byte> last = region->bytes().last(kPage);
  if (::read(null, last.data(), last.size()) >= 0 || errno != EFAULT) return fail("read(2) got the page");
  if (auto brought = region->bring(last); !brought) return fail(brought.error().text());
  if (::read(null, last.data(), last.size()) != kPage) return fail("read(2) did not get the page");
  ::close(null);
  std::fclose(file);

  const uffdkit::SigbusPagerStatus status = pager->status();
  std::printf("%llu faults brought %llu pages\n", static_cast<unsigned long long>(status.faults),
              static_cast<unsigned long long>(status.pages_copied));
  return 0;
}
