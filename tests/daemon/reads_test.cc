// What has to be read from a disk: by io_uring, and by threads where there is none.
#include <seccomp.h>

#include <cerrno>
#include <memory>
#include <string>
#include <vector>

#include "daemon/fixture.h"
#include "manager/read_rings.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kPages = 2048;

class Reads : public ManagerTest {
 protected:
  // By what the image is read while clients touch each page of it in an order of their own: twice by their
  // faults, and once by a recording.
  std::string serve_from_a_cold_disk(std::vector<std::string> options) {
    options.insert(options.end(), {"--firecracker", socket_ + "=" + image_.path(), "--fault-around", "1"});
    std::string reads_by;
    for (const char* what : {"--no-prefetch", "--record", "--background=off"}) {
      std::vector<std::string> arguments = options;
      arguments.emplace_back(what);
      ManagerProcess manager(directory_, arguments);
      image_.make_cold();
      std::vector<std::unique_ptr<Child>> clients;
      for (std::uint64_t seed = 1; seed <= 3; ++seed)
        clients.emplace_back(new Child(
            client(image_, whole(image_), socket_,
                   [seed](const ClientMemory& memory, const Channel&) { memory.check_all(8, seed); })));
      for (const auto& process : clients) EXPECT_EQ(process->wait(), 0) << manager.log();
      EXPECT_EQ(manager.total("read_errors"), 0u);
      reads_by = manager.status().at("reads_by").get<std::string>();
      EXPECT_EQ(manager.stop(), 0);
    }
    return reads_by;
  }

  const Image image_{directory_ / "image", kPages};
  const std::string socket_ = directory_ / "fc.sock";
};

// As containers do by their filters.
void refuse_io_uring() {
  const std::unique_ptr<void, decltype(&seccomp_release)> filter(seccomp_init(SCMP_ACT_ALLOW),
                                                                 &seccomp_release);
  require(seccomp_rule_add(filter.get(), SCMP_ACT_ERRNO(EPERM), SCMP_SYS(io_uring_setup), 0) == 0 &&
              seccomp_load(filter.get()) == 0,
          "no filter");
}

TEST_F(Reads, AreByIoUringWhereThereIsOne) {
  const bool has_rings = ReadRings::create().has_value();
  EXPECT_EQ(serve_from_a_cold_disk({}), has_rings ? "io_uring" : "threads");
}

TEST_F(Reads, AreByThreadsWhereThatIsAskedFor) {
  EXPECT_EQ(serve_from_a_cold_disk({"--no-io-uring"}), "threads");
}

TEST_F(Reads, AreByThreadsWhereIoUringIsRefused) {
  Child confined = program([this](const Channel&) {
    refuse_io_uring();
    const std::string reads_by = serve_from_a_cold_disk({});
    require(reads_by == "threads", reads_by);
    require(!HasFailure(), "see above");
  });
  EXPECT_EQ(confined.wait(), 0);
}

}  // namespace
}  // namespace uffdkit::test
