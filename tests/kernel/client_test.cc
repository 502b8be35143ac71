// The client library against a manager in a thread, on the running kernel.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <uffdkit/client.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <thread>

#include "support/fake_manager.h"
#include "support/sanitizers.h"
#include "support/temp_dir.h"

namespace uffdkit {
namespace {

using namespace std::chrono_literals;
using native::ErrorCode;
using test::FakeManager;
using test::image_byte;
using test::TempDir;
using State = RemoteConnection::State;

constexpr std::size_t kPage = 4096;

// Time limits of these tests are for hangs only; nothing is expected to come near them.
template <class Condition>
bool eventually(Condition condition) {
  const auto give_up = std::chrono::steady_clock::now() + 20s;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > give_up) return false;
    std::this_thread::sleep_for(1ms);
  }
  return true;
}

std::size_t open_fds() {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                                                std::filesystem::directory_iterator()));
}

// A thread that was joined may be listed for an instant more.
std::set<std::string> thread_directories() {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) names.insert(entry.path());
  return names;
}

// How many of these bytes are not those of the image from `offset` on.
std::size_t wrong_bytes(std::span<const std::byte> bytes, std::uint64_t offset = 0) {
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i)
    if (bytes[i] != image_byte(offset + i)) ++wrong;
  return wrong;
}

// Anonymous memory of the test's own, with a userfaultfd for it.
struct OwnMemory {
  std::byte* data;
  std::size_t size;
  std::optional<Uffd> uffd;

  explicit OwnMemory(std::size_t pages)
      : data(static_cast<std::byte*>(
            ::mmap(nullptr, pages * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))),
        size(pages * kPage) {}
  ~OwnMemory() { ::munmap(data, size); }
  AddressRange pages(std::size_t first, std::size_t count) const {
    return {Address(reinterpret_cast<std::uintptr_t>(data) + first * kPage), ByteCount(count * kPage)};
  }
  RequestedRegion region(std::size_t first, std::size_t count) const {
    return {.memory = pages(first, count), .offset = StoreOffset(first * kPage), .page_size = kPage4K};
  }
};

class Client : public testing::Test {
 protected:
  void SetUp() override {
    if (auto uffd = Uffd::create({}); !uffd)
      GTEST_SKIP() << "needs a userfaultfd with kernel faults: " << uffd.error().text();
  }
  Result<RemoteMapping> attach_image(const AttachOptions& options = {}) {
    return attach(socket_, "image", options);
  }
  const TempDir dir_;
  const std::string socket_ = dir_ / "s";
};

TEST_F(Client, AttachServesEveryByteOfTheImage) {
  const FakeManager manager(socket_);
  auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  ASSERT_EQ(memory->size(), 64 * kPage);
  EXPECT_EQ(memory->session().image_size(), ByteCount(64 * kPage));
  EXPECT_EQ(memory->session().id(), 7u);
  EXPECT_EQ(memory->session().connection().state, State::attached);
  EXPECT_EQ(wrong_bytes(memory->bytes()), 0u);
  const auto status = memory->query();
  ASSERT_TRUE(status) << status.error().text();
  EXPECT_EQ(status->pages_served, 64u);
}

TEST_F(Client, AttachServesAPartOfTheImage) {
  const FakeManager manager(socket_);
  auto memory = attach_image({.offset = StoreOffset(3 * kPage), .length = ByteCount(5 * kPage)});
  ASSERT_TRUE(memory) << memory.error().text();
  ASSERT_EQ(memory->size(), 5 * kPage);
  EXPECT_EQ(wrong_bytes(memory->bytes(), 3 * kPage), 0u);
}

TEST_F(Client, SystemCallsMayTouchMissingPages) {
  const FakeManager manager(socket_);
  const auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  EXPECT_EQ(::write(ends[1], memory->data(), 2 * kPage), static_cast<ssize_t>(2 * kPage));
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_F(Client, ARefusalIsAnErrorWithItsReasonAndLeavesNothingBehind) {
  const FakeManager manager(socket_, {.refuse_attach = ErrorCode::not_permitted});
  const std::size_t fds = open_fds();
  const std::set<std::string> running = thread_directories();
  const auto memory = attach_image();
  ASSERT_FALSE(memory);
  EXPECT_NE(memory.error().message().find("not permitted"), std::string::npos) << memory.error().message();
  EXPECT_NE(memory.error().message().find("by the script"), std::string::npos) << memory.error().message();
  // The manager closes its end of the connection in its own time.
  EXPECT_TRUE(eventually([&] { return open_fds() == fds; }));
  EXPECT_TRUE(eventually([&] { return std::ranges::includes(running, thread_directories()); }));
}

TEST_F(Client, AnUnknownImageIsAnError) {
  const FakeManager manager(socket_);
  const auto memory = attach(socket_, "other");
  ASSERT_FALSE(memory);
  EXPECT_NE(memory.error().message().find("no such image"), std::string::npos) << memory.error().message();
}

TEST_F(Client, NobodyListeningIsAnErrorThatSaysSo) {
  const auto memory = attach_image();
  ASSERT_FALSE(memory);
  EXPECT_EQ(memory.error().os_error(), ENOENT);
  EXPECT_FALSE(memory.error().remedy().empty());
}

TEST_F(Client, AManagerThatDoesNotAnswerIsGivenUp) {
  const FakeManager manager(socket_, {.silent = true});
  const auto memory = attach_image({.limits = {.answer = 30ms}});
  ASSERT_FALSE(memory);
  EXPECT_EQ(memory.error().os_error(), ETIMEDOUT);
}

TEST_F(Client, AManagerThatSpeaksSomethingElseIsAnError) {
  const FakeManager manager(socket_, {.garbage = true});
  const auto memory = attach_image();
  ASSERT_FALSE(memory);
  EXPECT_NE(memory.error().message().find("native protocol"), std::string::npos) << memory.error().message();
}

TEST_F(Client, OptionsThatMakeNoSenseForTheImageAreErrors) {
  const FakeManager manager(socket_, {.image_size = ByteCount(10 * kPage + 100)});
  EXPECT_FALSE(attach_image());  // not whole pages
  EXPECT_FALSE(attach_image({.offset = StoreOffset(100), .length = ByteCount(kPage)}));
  EXPECT_FALSE(attach_image({.offset = StoreOffset(11 * kPage)}));
  EXPECT_FALSE(attach_image({.length = ByteCount(11 * kPage)}));
  EXPECT_FALSE(attach_image({.length = ByteCount(kPage), .page_size = kPage2M}));
  EXPECT_FALSE(attach(socket_, ""));
  EXPECT_FALSE(attach(socket_, std::string(5000, 'x')));
  EXPECT_EQ(manager.attaches(), 0);
  EXPECT_TRUE(attach_image({.length = ByteCount(10 * kPage)}));
}

TEST_F(Client, AConnectionThatEndsIsMadeAgain) {
  FakeManager manager(socket_);
  auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  EXPECT_EQ(wrong_bytes(memory->bytes().first(kPage)), 0u);
  manager.hang_up();
  ASSERT_TRUE(eventually([&] { return memory->session().connection().resumes == 1; }));
  EXPECT_EQ(manager.resumes(), 1);
  EXPECT_EQ(wrong_bytes(memory->bytes()), 0u);
}

TEST_F(Client, AnAttachWhoseAnswerIsLostIsMadeAgain) {
  const FakeManager manager(socket_, {.lose = 3});
  const auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  EXPECT_EQ(manager.attaches(), 1);
  EXPECT_EQ(wrong_bytes(memory->bytes()), 0u);
}

TEST_F(Client, AnAttachWhoseAnswersAreAllLostIsGivenUp) {
  const FakeManager manager(socket_, {.lose = ~0u});
  const std::size_t fds = open_fds();
  const auto memory = attach_image({.limits = {.answer = 200ms}});
  ASSERT_FALSE(memory);
  EXPECT_GT(manager.connections(), 1);
  EXPECT_TRUE(eventually([&] { return open_fds() == fds; }));
}

TEST_F(Client, ARequestWhoseAnswerIsLostIsMadeAgainOfWhoeverIsThereNext) {
  auto first = std::make_optional<FakeManager>(socket_);
  auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  // The session comes to one that hangs up over the RESUME, over the request, and over the next RESUME.
  first.reset();
  const FakeManager second(socket_, {.lose = 3});
  ASSERT_TRUE(eventually([&] { return memory->session().connection().resumes >= 1; }));
  const auto status = memory->query();
  ASSERT_TRUE(status) << status.error().text();
  EXPECT_EQ(second.resumes(), static_cast<int>(memory->session().connection().resumes));
  EXPECT_EQ(wrong_bytes(memory->bytes()), 0u);
}

TEST_F(Client, WhenTheManagerDiesThreadsWaitForTheNextOneAndReadNoZeros) {
  auto first = std::make_optional<FakeManager>(socket_, FakeManager::Script{.serve_pages = false});
  auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  // One thread whose fault the first manager takes with it into death, and one that comes afterwards.
  std::atomic<int> before = -1;
  std::atomic<int> after = -1;
  std::thread early([&] { before = std::to_integer<int>(memory->data()[0]); });
  std::this_thread::sleep_for(20ms);  // likely to be waiting by now; right either way
  first.reset();
  ASSERT_TRUE(eventually([&] { return memory->session().connection().state == State::looking; }));
  std::thread late([&] { after = std::to_integer<int>(memory->data()[5 * kPage]); });
  ASSERT_TRUE(eventually(
      [&] { return memory->session().connection().last_error.find("connect") != std::string::npos; }));
  EXPECT_EQ(before, -1);
  EXPECT_EQ(after, -1);
  EXPECT_FALSE(memory->query());

  const FakeManager second(socket_);
  early.join();
  late.join();
  EXPECT_EQ(before, std::to_integer<int>(image_byte(0)));
  EXPECT_EQ(after, std::to_integer<int>(image_byte(5 * kPage)));
  EXPECT_EQ(wrong_bytes(memory->bytes()), 0u);
  EXPECT_EQ(memory->session().connection().state, State::attached);
}

TEST_F(Client, AManagerThatRefusesToResumeIsAskedAgain) {
  auto refusing = std::make_optional<FakeManager>(socket_);
  auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  refusing.reset();
  refusing.emplace(socket_, FakeManager::Script{.refuse_attach = ErrorCode::busy});
  ASSERT_TRUE(eventually([&] { return refusing->connections() >= 2; }));
  EXPECT_EQ(memory->session().connection().state, State::looking);
  refusing.reset();
  const FakeManager willing(socket_);
  EXPECT_EQ(wrong_bytes(memory->bytes()), 0u);
}

TEST_F(Client, AfterTheLimitNoManagerIsLookedForAndDestructionStillWorks) {
  auto manager = std::make_optional<FakeManager>(socket_);
  auto memory = attach_image({.limits = {.resume = 1ms}});
  ASSERT_TRUE(memory) << memory.error().text();
  manager.reset();
  ASSERT_TRUE(eventually([&] { return memory->session().connection().state == State::given_up; }));
  const auto status = memory->query();
  ASSERT_FALSE(status);
  EXPECT_NE(status.error().message().find(socket_), std::string::npos);
  EXPECT_FALSE(memory->detach(DetachWay::release));
}

TEST_F(Client, DestructionWorksWhileAManagerIsLookedForAndLeavesNothingBehind) {
  if (test::kSanitized) GTEST_SKIP() << "needs a build without sanitizers: they have threads of their own";
  const std::size_t fds = open_fds();
  const std::set<std::string> running = thread_directories();
  {
    auto manager = std::make_optional<FakeManager>(socket_);
    auto memory = attach_image();
    ASSERT_TRUE(memory) << memory.error().text();
    EXPECT_EQ(wrong_bytes(memory->bytes().first(kPage)), 0u);
    manager.reset();
    ASSERT_TRUE(eventually([&] { return memory->session().connection().state == State::looking; }));
  }
  EXPECT_EQ(open_fds(), fds);
  EXPECT_TRUE(eventually([&] { return std::ranges::includes(running, thread_directories()); }));
}

TEST_F(Client, DestructionDoesNotWaitForAManagerThatReadsNoEvents) {
  const FakeManager manager(socket_, {.read_messages = false});
  auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  RemoteMapping moved = std::move(*memory);
  EXPECT_EQ(moved.size(), 64 * kPage);
}

TEST_F(Client, AssigningEndsTheOldMappingAndKeepsTheNewOne) {
  const FakeManager manager(socket_);
  auto first = attach_image();
  ASSERT_TRUE(first) << first.error().text();
  auto other_socket = dir_ / "t";
  const FakeManager other(other_socket);
  auto second = attach(other_socket, "image");
  ASSERT_TRUE(second) << second.error().text();
  const std::byte* old = first->data();
  *first = std::move(*second);
  EXPECT_EQ(::msync(const_cast<std::byte*>(old), kPage, MS_ASYNC), -1);  // ENOMEM: not mapped any more
  EXPECT_EQ(wrong_bytes(first->bytes()), 0u);
}

TEST_F(Client, AfterPopulatingTheMemoryNeedsNoManager) {
  auto manager = std::make_optional<FakeManager>(socket_);
  auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  memory->data()[2 * kPage] = std::byte{0xff};
  const auto detached = memory->detach(DetachWay::populate);
  ASSERT_TRUE(detached) << detached.error().text();
  manager.reset();
  EXPECT_EQ(memory->session().connection().state, State::detached);
  EXPECT_EQ(memory->data()[2 * kPage], std::byte{0xff});
  memory->data()[2 * kPage] = image_byte(2 * kPage);
  EXPECT_EQ(wrong_bytes(memory->bytes()), 0u);
  EXPECT_TRUE(memory->detach(DetachWay::populate));
  EXPECT_FALSE(memory->query());
}

TEST_F(Client, AfterReleaseMissingPagesReadAsZeroAndPresentOnesStay) {
  const FakeManager manager(socket_);
  auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  EXPECT_EQ(wrong_bytes(memory->bytes().first(kPage)), 0u);
  ASSERT_TRUE(memory->detach(DetachWay::release));
  EXPECT_EQ(wrong_bytes(memory->bytes().first(kPage)), 0u);
  EXPECT_TRUE(
      std::ranges::all_of(memory->bytes().subspan(kPage), [](std::byte b) { return b == std::byte{0}; }));
}

TEST_F(Client, MemoryOfTheProgramsOwnIsServedAddedToAndDropped) {
  const FakeManager manager(socket_);
  const OwnMemory memory(8);
  auto uffd = Uffd::create({});
  ASSERT_TRUE(uffd);
  ASSERT_TRUE(uffd->register_range(memory.pages(0, 2), kMissing));
  const std::vector<RequestedRegion> regions = {memory.region(0, 2)};
  auto session = attach_memory(socket_, "image", std::move(*uffd), regions);
  ASSERT_TRUE(session) << session.error().text();
  const auto added = session->add(memory.region(2, 4));
  ASSERT_TRUE(added) << added.error().text();
  EXPECT_EQ(wrong_bytes(std::span(memory.data, 5 * kPage)), 0u);

  const auto dropped = session->drop(memory.pages(2, 4));
  ASSERT_TRUE(dropped) << dropped.error().text();
  EXPECT_EQ(wrong_bytes(std::span(memory.data, 5 * kPage)), 0u);  // what is present stays
  EXPECT_EQ(memory.data[5 * kPage], std::byte{0});
  EXPECT_TRUE(session->add(memory.region(6, 2)));
  EXPECT_EQ(wrong_bytes(std::span(memory.data + 6 * kPage, 2 * kPage), 6 * kPage), 0u);
}

TEST_F(Client, ARegionThatOverlapsOrLiesBeyondTheImageIsNotAddedAndTheOthersAreServedOn) {
  const FakeManager manager(socket_);
  const OwnMemory memory(100);
  auto uffd = Uffd::create({});
  ASSERT_TRUE(uffd);
  ASSERT_TRUE(uffd->register_range(memory.pages(0, 4), kMissing));
  const std::vector<RequestedRegion> regions = {memory.region(0, 4)};
  auto session = attach_memory(socket_, "image", std::move(*uffd), regions);
  ASSERT_TRUE(session) << session.error().text();
  EXPECT_FALSE(session->add(memory.region(3, 2)));
  EXPECT_FALSE(session->add(memory.region(63, 2)));
  EXPECT_EQ(wrong_bytes(std::span(memory.data, 4 * kPage)), 0u);
  EXPECT_EQ(memory.data[4 * kPage], std::byte{0});
}

TEST_F(Client, RegionsThatMakeNoSenseAreRefusedBeforeTheManagerIsAsked) {
  const FakeManager manager(socket_);
  const OwnMemory memory(4);
  const std::vector<std::vector<RequestedRegion>> bad = {
      {}, {memory.region(0, 2), memory.region(1, 2)}, std::vector(kRegionsMax + 1, memory.region(0, 1))};
  for (const auto& regions : bad) {
    auto uffd = Uffd::create({});
    ASSERT_TRUE(uffd);
    EXPECT_FALSE(attach_memory(socket_, "image", std::move(*uffd), regions));
  }
  EXPECT_EQ(manager.connections(), 0);
}

TEST_F(Client, TheLibrarysThreadRunsNoSignalHandlerOfTheProgram) {
  const FakeManager manager(socket_);
  const std::set<std::string> before = thread_directories();
  const auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  std::vector<std::string> added;
  std::ranges::set_difference(thread_directories(), before, std::back_inserter(added));
  ASSERT_EQ(added.size(), 1u);
  std::ifstream status(added[0] + "/status");
  std::string blocked;
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("SigBlk:")) blocked = line.substr(line.find_first_not_of(" \t", 7));
  ASSERT_FALSE(blocked.empty());
  const std::uint64_t mask = std::stoull(blocked, nullptr, 16);
  for (const int signal : {SIGALRM, SIGCHLD, SIGPROF, SIGTERM, SIGUSR1})
    EXPECT_NE(mask >> (signal - 1) & 1, 0u) << signal;
}

TEST_F(Client, AForkedChildDiesOfATouchAndNeverReadsZeros) {
  const FakeManager manager(socket_);
  const auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGSEGV, SIG_DFL);
    ::_exit(std::to_integer<int>(*static_cast<volatile std::byte*>(memory->data())));
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV) << status;
}

TEST_F(Client, AForkedChildThatDestroysItsCopyLeavesTheParentServed) {
  const FakeManager manager(socket_);
  auto memory = attach_image();
  ASSERT_TRUE(memory) << memory.error().text();
  const pid_t child = ::fork();
  if (child == 0) {
    {
      const RemoteMapping gone = std::move(*memory);
    }
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(wrong_bytes(memory->bytes()), 0u);
}

TEST_F(Client, HugePagesAreReservedOrTheErrorSaysWhatToDo) {
  constexpr std::uint64_t kHuge = 2u << 20;
  const FakeManager manager(socket_, {.image_size = ByteCount(std::uint64_t{1} << 40)});
  // A tebibyte of huge pages: no machine of a test has so many.
  const auto memory = attach_image({.length = ByteCount(524'288 * kHuge), .page_size = kPage2M});
  ASSERT_FALSE(memory);
  EXPECT_NE(memory.error().remedy().find("nr_hugepages"), std::string::npos) << memory.error().text();
}

}  // namespace
}  // namespace uffdkit
