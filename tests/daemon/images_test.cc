// Compressed images: the commands that make them and look at them, and clients that are served from them.
#include <elf.h>
#include <fcntl.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <span>
#include <string_view>
#include <thread>

#include "daemon/fixture.h"
#include "support/child.h"
#include "support/paths.h"
#include "support/program.h"
#include "support/sigbus.h"

namespace uffdkit::test {
namespace {

using Strings = std::vector<std::string>;

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(file)), {});
}

// Runs "uffdkit image ...", which must succeed; what it prints as JSON.
nlohmann::json image_command(Strings arguments) {
  arguments.insert(arguments.begin(), "image");
  arguments.emplace_back("--json");
  const Finished done = run_program("uffdkit", arguments);
  EXPECT_EQ(done.exit_code, 0) << done.err;
  return nlohmann::json::parse(done.out, nullptr, false);
}

// What one that fails says.
std::string failure(Strings arguments, int exit_code = 1) {
  arguments.insert(arguments.begin(), "image");
  const Finished done = run_program("uffdkit", arguments);
  EXPECT_EQ(done.exit_code, exit_code) << done.out;
  return done.err;
}

class ImageCommand : public testing::Test {
 protected:
  const TempDir directory_;
  const Image raw_{directory_ / "raw", 1024};
  const std::string image_ = directory_ / "image";
};

TEST_F(ImageCommand, ZstdGivesTheMemoryBack) {
  image_command({"create", "--raw", raw_.path(), image_});
  const std::string command = "zstd -dcq " + image_ + " | cmp - " + raw_.path();
  const int status = std::system(command.c_str());
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 127) GTEST_SKIP() << "needs the command zstd";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST_F(ImageCommand, CreateInfoVerifyAndExtractAgree) {
  const auto made = image_command({"create", "--raw", raw_.path(), image_});
  const auto info = image_command({"info", image_});
  EXPECT_EQ(info.at("kind"), "whole");
  EXPECT_EQ(info.at("memory_bytes"), 1024 * 4096);
  EXPECT_EQ(info.at("identity"), made.at("identity"));
  EXPECT_EQ(info.at("file_bytes"), std::filesystem::file_size(image_));
  EXPECT_EQ(info.at("stored_pages").get<int>() + info.at("zero_pages").get<int>(), 1024);
  const auto verified = image_command({"verify", image_});
  EXPECT_EQ(verified.at("sound"), true);
  EXPECT_EQ(verified.at("identity"), made.at("identity"));
  image_command({"extract", image_, directory_ / "out"});
  EXPECT_TRUE(contents(directory_ / "out") == contents(raw_.path()));
  struct stat status;
  ASSERT_EQ(stat(image_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600u);
}

TEST_F(ImageCommand, ShowsOnATerminalHowFarItHasComeAndTakesThatAway) {
  winsize size{.ws_row = 24, .ws_col = 60, .ws_xpixel = 0, .ws_ypixel = 0};
  int master = -1;
  int slave = -1;
  ASSERT_EQ(::openpty(&master, &slave, nullptr, nullptr, &size), 0);
  const UniqueFd terminal(master);
  UniqueFd its_end(slave);
  Child command([&](const Channel&) {
    ::dup2(its_end.get(), STDERR_FILENO);
    ::execl(built("uffdkit").c_str(), "uffdkit", "image", "create", "--json", "--raw", raw_.path().c_str(),
            image_.c_str(), nullptr);
    return 127;
  });
  its_end.reset();
  std::string shown;
  std::array<char, 4096> piece;
  for (ssize_t bytes = 0; (bytes = ::read(terminal.get(), piece.data(), piece.size())) > 0;)
    shown.append(piece.data(), static_cast<std::size_t>(bytes));
  EXPECT_EQ(command.wait(), 0);
  constexpr std::string_view kTakenAway = "\r\033[K";
  EXPECT_EQ(shown.find("\rcreate "), 0u) << shown;
  EXPECT_TRUE(shown.ends_with(kTakenAway)) << shown;
  for (std::size_t at = 0; at < shown.size();) {
    const std::size_t end = std::min(shown.find('\r', at + 1), shown.size());
    EXPECT_LT(end - at, 60 + kTakenAway.size()) << shown;
    at = end;
  }
}

TEST_F(ImageCommand, DiffsAreMadeConvertedAndApplied) {
  const Image other(directory_ / "other", 1024, 2);
  image_command({"create", "--raw", raw_.path(), image_});
  const auto diff = image_command({"diff", image_, other.path(), directory_ / "diff"});
  EXPECT_EQ(diff.at("kind"), "diff");
  EXPECT_EQ(diff.at("parent"), "image");
  const auto info = image_command({"info", directory_ / "diff"});
  ASSERT_EQ(info.at("parents").size(), 1u);
  EXPECT_EQ(info.at("parents")[0].at("identity"), diff.at("parent_identity"));
  const auto smaller = image_command(
      {"convert", "--frame-size", "16K", "--level", "9", directory_ / "diff", directory_ / "diff2"});
  EXPECT_EQ(smaller.at("identity"), diff.at("identity"));
  EXPECT_EQ(smaller.at("kind"), "diff");
  EXPECT_EQ(smaller.at("frame_bytes"), 16384);
  const auto flat = image_command({"apply", directory_ / "diff2", directory_ / "flat"});
  EXPECT_EQ(flat.at("identity"), diff.at("identity"));
  EXPECT_EQ(flat.at("kind"), "whole");
  image_command({"extract", directory_ / "flat", directory_ / "out"});
  EXPECT_TRUE(contents(directory_ / "out") == contents(other.path()));
}

TEST_F(ImageCommand, DamageIsFoundAndNamed) {
  image_command({"create", "--raw", raw_.path(), image_});
  EXPECT_NE(failure({"create", "--raw", raw_.path(), image_}).find("--force"), std::string::npos);
  std::string bytes = contents(image_);
  bytes[bytes.size() / 3] ^= 1;
  std::ofstream(image_, std::ios::binary | std::ios::trunc) << bytes;
  EXPECT_NE(failure({"verify", image_}).find(image_ + ": frame "), std::string::npos);
  EXPECT_NE(failure({"extract", image_, directory_ / "out"}).find("frame "), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(directory_ / "out"));
  std::filesystem::resize_file(image_, bytes.size() - 1);
  EXPECT_NE(failure({"info", image_}).find("does not end with a seek table"), std::string::npos);
  std::filesystem::resize_file(image_, 8192);
  EXPECT_NE(failure({"info", image_}).find("cannot be told"), std::string::npos);
}

TEST_F(ImageCommand, ADiffInAnotherFolderThanItsParentIsRefused) {
  const TempDir elsewhere;
  image_command({"create", "--raw", raw_.path(), image_});
  EXPECT_NE(failure({"diff", image_, raw_.path(), elsewhere / "diff"}).find("the same folder"),
            std::string::npos);
  EXPECT_NE(failure({"diff", raw_.path(), image_, directory_ / "diff"}).find("image create --raw"),
            std::string::npos);
}

TEST_F(ImageCommand, ADiffDoesNotReplaceWhatItIsMadeOf) {
  const Image other(directory_ / "other", 1024, 2);
  const std::string diff = directory_ / "diff";
  image_command({"create", "--raw", raw_.path(), image_});
  image_command({"diff", image_, other.path(), diff});
  EXPECT_NE(failure({"diff", "--force", image_, image_, image_}).find("would be lost"), std::string::npos);
  EXPECT_NE(failure({"diff", "--force", diff, raw_.path(), image_}).find("would be lost"), std::string::npos);
  const std::string second = directory_ / "second";
  image_command({"diff", diff, raw_.path(), second});
  EXPECT_NE(failure({"convert", "--force", second, image_}).find("would be lost"), std::string::npos);
  image_command({"verify", diff});
}

TEST_F(ImageCommand, WrongUseIsToldApartFromFailure) {
  EXPECT_NE(failure({"create", image_}, 2).find("--raw"), std::string::npos);
  EXPECT_NE(failure({"create", "--raw", raw_.path(), "--frame-size", "8K", image_}, 2).find("frame-size"),
            std::string::npos);
  EXPECT_NE(failure({"create", "--raw", directory_ / "none", image_}).find("none"), std::string::npos);
}

// ---- processes and core files ---------------------------------------------------------------------------

class ImageOfAProcess : public testing::Test {
 protected:
  void SetUp() override {
    const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0) GTEST_SKIP() << "needs /proc/self/pagemap";
    close(fd);
    const Result<Pagemap> pagemap = Pagemap::open(0);
    std::array<ScannedRange, 1> found;
    const ScanQuery query{.range = {Address(0x10000), ByteCount(4096)}, .any_of = abi::kPagePresent};
    if (!pagemap || !pagemap->scan(query, found)) GTEST_SKIP() << "needs PAGEMAP_SCAN (Linux 6.7)";
  }

  // The bytes that an image of a process has at an address; empty where it has none.
  std::string bytes_at(std::uint64_t address, std::size_t count) {
    const nlohmann::json info = image_command({"info", image_});
    for (const auto& region : info.at("regions")) {
      const auto start = region.at("address").get<std::uint64_t>();
      if (address < start || address >= start + region.at("bytes").get<std::uint64_t>()) continue;
      if (!std::filesystem::exists(out_)) image_command({"extract", image_, out_});
      std::ifstream file(out_, std::ios::binary);
      file.seekg(static_cast<std::streamoff>(region.at("offset").get<std::uint64_t>() + address - start));
      std::string bytes(count, '\0');
      file.read(bytes.data(), static_cast<std::streamsize>(count));
      return bytes;
    }
    return {};
  }

  static std::string status_line(pid_t pid, const std::string& name) {
    std::ifstream file("/proc/" + std::to_string(pid) + "/status");
    for (std::string line; std::getline(file, line);)
      if (line.starts_with(name)) return line;
    return {};
  }

  const TempDir directory_;
  const std::string image_ = directory_ / "image";
  const std::string out_ = directory_ / "out";
};

TEST_F(ImageOfAProcess, HasWhatTheProcessHasWrittenAndSaysWhereItLay) {
  const std::string file = directory_ / "file";
  std::ofstream(file) << std::string(8 * 4096, 'f');
  Child process([&](const Channel& channel) {
    std::atomic<bool> end = false;
    std::thread other([&] {
      while (!end) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    const auto map = [](std::size_t pages, int protection, int flags, int fd) {
      return static_cast<char*>(mmap(nullptr, pages * 4096, protection, flags, fd, 0));
    };
    char* own = map(300, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    std::memset(own, 'a', 4096);
    std::memset(own + 2 * 4096, 'b', 4096);
    std::memset(own + 200 * 4096, 'c', 4096);
    mprotect(own + 200 * 4096, 4096, PROT_NONE);
    char* shared = map(2, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
    std::memset(shared, 's', 8192);
    const int fd = open(file.c_str(), O_RDONLY | O_CLOEXEC);
    char* mapped = map(8, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
    mapped[3 * 4096] = 'g';
    for (const char* address : {own, shared, mapped}) channel.send(reinterpret_cast<std::uintptr_t>(address));
    channel.receive();
    end = true;
    other.join();
    return own[0] == 'a' && mapped[3 * 4096] == 'g' ? 0 : 1;
  });
  const std::uint64_t own = process.channel().receive();
  const std::uint64_t shared = process.channel().receive();
  const std::uint64_t mapped = process.channel().receive();
  image_command({"create", "--pid", std::to_string(process.pid()), image_});

  EXPECT_TRUE(bytes_at(own, 4096) == std::string(4096, 'a'));
  EXPECT_TRUE(bytes_at(own + 2 * 4096, 4096) == std::string(4096, 'b'));
  EXPECT_TRUE(bytes_at(own + 200 * 4096, 4096) == std::string(4096, 'c'));
  EXPECT_TRUE(bytes_at(own + 4096, 4096) == std::string(4096, '\0')) << "a small gap is zero";
  EXPECT_EQ(bytes_at(own + 150 * 4096, 1), "") << "what was never touched is not in the image";
  EXPECT_EQ(bytes_at(shared, 1), "");
  EXPECT_TRUE(bytes_at(mapped + 3 * 4096, 4096) == "g" + std::string(4095, 'f'));
  EXPECT_EQ(bytes_at(mapped, 1), "") << "what is in the file still is not in the image";
  bool stack = false;
  bool name = false;
  const nlohmann::json info = image_command({"info", image_});
  for (const auto& region : info.at("regions")) {
    stack = stack || region.at("name") == "[stack]";
    name = name || (region.at("name") == file && region.at("address") == mapped + 3 * 4096);
  }
  EXPECT_TRUE(stack);
  EXPECT_TRUE(name);
  EXPECT_EQ(image_command({"verify", image_}).at("sound"), true);
  // It goes on as if nothing had been.
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(ImageOfAProcess, GoesOnWhenTheCommandIsKilled) {
  Child process([](const Channel& channel) {
    constexpr std::size_t kBytes = 64 << 20;
    auto* memory = static_cast<std::uint64_t*>(
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (std::size_t i = 0; i < kBytes / 8; ++i) memory[i] = i * i * 0x9e37'79b9'7f4a'7c15;
    channel.send(1);
    channel.send(channel.receive() + 1);
    return 0;
  });
  process.channel().receive();
  Child command([&](const Channel&) {
    const std::string pid = std::to_string(process.pid());
    execl(built("uffdkit").c_str(), "uffdkit", "image", "create", "--level", "19", "--pid", pid.c_str(),
          image_.c_str(), nullptr);
    return 1;
  });
  EXPECT_TRUE(
      eventually([&] { return status_line(process.pid(), "State:").find("t (") != std::string::npos; }));
  command.kill();
  EXPECT_TRUE(eventually([&] { return status_line(process.pid(), "TracerPid:") == "TracerPid:\t0"; }));
  process.channel().send(41);
  EXPECT_EQ(process.channel().receive(), 42u);
  EXPECT_EQ(process.wait(), 0);
  EXPECT_FALSE(std::filesystem::exists(image_));
}

TEST_F(ImageOfAProcess, OneThatIsNotThereIsAnError) {
  Child process([](const Channel&) { return 0; });
  const std::string pid = std::to_string(process.pid());
  EXPECT_EQ(process.wait(), 0);
  const std::string error = failure({"create", "--pid", pid, image_});
  EXPECT_NE(error.find("find the threads of process"), std::string::npos) << error;
}

TEST_F(ImageCommand, ACoreFilesSegmentsAreInTheImageAndItsMap) {
  std::string core(3 * 4096, '\0');
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_ident[EI_DATA] = ELFDATA2LSB;
  header.e_type = ET_CORE;
  header.e_phoff = sizeof header;
  header.e_phentsize = sizeof(Elf64_Phdr);
  header.e_phnum = 4;
  const auto segment = [](Elf64_Word type, std::uint64_t address, std::uint64_t offset, std::uint64_t in_file,
                          Elf64_Word flags) {
    return Elf64_Phdr{.p_type = type,
                      .p_flags = flags,
                      .p_offset = offset,
                      .p_vaddr = address,
                      .p_paddr = 0,
                      .p_filesz = in_file,
                      .p_memsz = 8192,
                      .p_align = 1};
  };
  // Their bytes lie anywhere in the file, as gcore writes them; one was not dumped.
  const std::array segments = {
      segment(PT_NOTE, 0, 400, 10, PF_R), segment(PT_LOAD, 0x10000, 0, 0, PF_R | PF_X),
      segment(PT_LOAD, 0x40000, 1001, 8192, PF_R | PF_W), segment(PT_LOAD, 0x90000, 9500, 100, PF_R)};
  std::memcpy(core.data(), &header, sizeof header);
  std::memcpy(core.data() + sizeof header, segments.data(), sizeof segments);
  std::ranges::fill(std::span(core).subspan(1001, 8192), 'x');
  std::ranges::fill(std::span(core).subspan(9500, 100), 'y');
  const auto write = [&](const std::string& bytes) {
    std::ofstream(directory_ / "core", std::ios::binary | std::ios::trunc) << bytes;
  };
  write(core);
  image_command({"create", "--core", directory_ / "core", image_});
  const auto regions = image_command({"info", image_}).at("regions");
  ASSERT_EQ(regions.size(), 2u);
  EXPECT_EQ(regions[0],
            nlohmann::json(
                {{"address", 0x40000}, {"bytes", 8192}, {"offset", 0}, {"protection", 3}, {"name", ""}}));
  EXPECT_EQ(regions[1],
            nlohmann::json(
                {{"address", 0x90000}, {"bytes", 4096}, {"offset", 8192}, {"protection", 1}, {"name", ""}}));
  image_command({"extract", image_, directory_ / "out"});
  EXPECT_TRUE(contents(directory_ / "out") ==
              std::string(8192, 'x') + std::string(100, 'y') + std::string(3996, '\0'));

  // The map goes along into diffs and flattened images.
  const auto list = [&](const std::string& path) { return image_command({"info", path}).at("regions"); };
  image_command({"diff", image_, image_, directory_ / "diff"});
  EXPECT_EQ(list(directory_ / "diff"), regions);
  image_command({"apply", directory_ / "diff", directory_ / "flat"});
  EXPECT_EQ(list(directory_ / "flat"), regions);

  write(core.substr(0, 5000));
  EXPECT_NE(failure({"create", "--core", directory_ / "core", directory_ / "x"}).find("was cut short"),
            std::string::npos);
  write(core.substr(0, 100));
  EXPECT_NE(failure({"create", "--core", directory_ / "core", directory_ / "x"}).find("no room"),
            std::string::npos);
  EXPECT_NE(failure({"create", "--core", raw_.path(), directory_ / "x"}).find("no core file"),
            std::string::npos);
}

TEST_F(ImageCommand, ASparseDiffIsMadeOnTopOfItsParent) {
  image_command({"create", "--raw", raw_.path(), image_});
  const std::string sparse = directory_ / "sparse";
  std::string expected = contents(raw_.path());
  const int fd = open(sparse.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  ASSERT_EQ(ftruncate(fd, static_cast<off_t>(expected.size())), 0);
  const std::string page(4096, 'p');
  ASSERT_EQ(pwrite(fd, page.data(), page.size(), 77 * 4096), 4096);
  close(fd);
  expected.replace(77 * 4096, 4096, page);
  image_command({"create", "--raw", sparse, "--parent", image_, directory_ / "diff"});
  image_command({"extract", directory_ / "diff", directory_ / "out"});
  EXPECT_TRUE(contents(directory_ / "out") == expected);
}

class Images : public ManagerTest {
 protected:
  void SetUp() override {
    ManagerTest::SetUp();
    if (IsSkipped()) return;
    image_command({"create", "--raw", raw_.path(), image_});
  }

  Strings serve(const std::string& image, Strings more = {}) const {
    Strings arguments = {"--firecracker", socket_ + "=" + image};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  // A client that checks all of the memory of `expected`.
  int check_all(const Image& expected, const std::string& socket) {
    Child process = client(expected, whole(expected), socket,
                           [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 1); });
    return process.wait();
  }

  const Image raw_{directory_ / "raw", 2048};
  const std::string image_ = directory_ / "image";
  const std::string socket_ = directory_ / "fc.sock";
};

TEST_F(Images, ACompressedImageIsServedByteForByte) {
  for (const char* cache : {"256M", "128K", "0"}) {
    ManagerProcess manager(directory_, serve(image_, {"--image-cache", cache}));
    EXPECT_EQ(check_all(raw_, socket_), 0) << manager.log();
    const auto status = manager.status().at("image_cache");
    EXPECT_GT(status.at("decoded"), 0);
    EXPECT_LE(status.at("bytes"), status.at("bytes_max"));
    EXPECT_EQ(manager.stop(), 0);
  }
}

TEST_F(Images, ALayeredImageIsServedByteForByte) {
  const Image other(directory_ / "other", 2048, 2);
  image_command({"diff", image_, other.path(), directory_ / "diff"});
  ManagerProcess manager(directory_, serve(directory_ / "diff"));
  EXPECT_EQ(check_all(other, socket_), 0) << manager.log();
}

TEST_F(Images, ClientsOfImagesThatShareABaseDecompressItOnce) {
  image_command({"diff", image_, raw_.path(), directory_ / "a"});
  image_command({"diff", image_, raw_.path(), directory_ / "b"});
  const std::string second = directory_ / "second.sock";
  ManagerProcess manager(directory_,
                         serve(directory_ / "a", {"--firecracker", second + "=" + (directory_ / "b")}));
  EXPECT_EQ(check_all(raw_, socket_), 0) << manager.log();
  const auto decoded = manager.status().at("image_cache").at("decoded");
  EXPECT_EQ(check_all(raw_, second), 0) << manager.log();
  EXPECT_EQ(manager.status().at("image_cache").at("decoded"), decoded);
}

TEST_F(Images, ADamagedFramePoisonsItsPagesAndIsNeverServed) {
  if (const std::string lacking = poisoning_lacks(); !lacking.empty()) GTEST_SKIP() << lacking;
  // The first frame lies in the first page of the file, and others behind it: all pages of the first 64 KiB.
  ManagerProcess manager(directory_,
                         serve(image_, {"--store-fault", "corrupt,from=0,to=4K", "--read-retries", "1"}));
  Child process = client(raw_, whole(raw_), socket_, [&](const ClientMemory& memory, const Channel&) {
    require(raises_sigbus(memory.bytes(0).data()), "a page of the damaged frame can be read");
    require(raises_sigbus(memory.bytes(1).data()), "another page of it can be read");
    memory.check(5);  // zero
    for (std::size_t page = 512; page < memory.pages(); ++page) memory.check(page);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
  EXPECT_TRUE(manager.logged("at offset 0: " + image_ + ": frame 0")) << manager.log();
  EXPECT_GT(manager.status().at("image_cache").at("failed"), 0);
}

TEST_F(Images, BytesThatArriveWrongNowAndThenAreReadAgain) {
  ManagerProcess manager(directory_, serve(image_, {"--store-fault", "corrupt,times=2"}));
  EXPECT_EQ(check_all(raw_, socket_), 0) << manager.log();
  EXPECT_GT(manager.status().at("image_cache").at("failed"), 0);
}

TEST_F(Images, AnImageThatCannotBeOpenedEndsTheStartWithTheReason) {
  std::filesystem::resize_file(image_, 8192);
  const Finished done = run_program("uffdkit", {"serve", "--firecracker", socket_ + "=" + image_});
  EXPECT_EQ(done.exit_code, 1);
  EXPECT_NE(done.err.find("cannot be told"), std::string::npos) << done.err;
}

}  // namespace
}  // namespace uffdkit::test
