#include "manager/records.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <uffdkit/store.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/session_state.h"
#include "support/cut_stores.h"

namespace uffdkit {
namespace {

UniqueFd file_of_pages(const char* name) {
  UniqueFd file(::memfd_create(name, MFD_CLOEXEC));
  EXPECT_EQ(::ftruncate(file.get(), 64 * 4096), 0);
  return file;
}

// What a worker finds whose predecessor was killed. Descriptors are named by number, so both are this
// process.
class RecordsTest : public testing::Test {
 protected:
  Records::Session session(SessionId id) const {
    return {.id = id,
            .kind = SessionKind::firecracker,
            .uffd = some_.get(),
            .state_file = some_.get(),
            .acknowledged = true};
  }
  std::unique_ptr<Records> next_worker() const {
    return Records::open(UniqueFd(::fcntl(records_->fd(), F_DUPFD_CLOEXEC, 0))).value();
  }
  // Whether the worker after the next one still has the image's file. Its sweep is a copy's.
  bool image_stays() const {
    const pid_t worker = ::fork();
    if (worker == 0) {
      (void)next_worker()->sweep();
      ::_exit(::fcntl(lane_->file(), F_GETFD) >= 0 ? 0 : 1);
    }
    int status = 0;
    EXPECT_EQ(::waitpid(worker, &status, 0), worker);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }

  const std::unique_ptr<Records> records_ = Records::create().value();
  const UniqueFd some_ = file_of_pages("some");
  UniqueFd image_ = file_of_pages("image");
  const std::shared_ptr<Store> store_ = open_file_store(image_.get(), "image").value();
  const std::shared_ptr<StoreLane> lane_ = StoreLane::create(store_, {}, std::move(image_)).value();
};

TEST_F(RecordsTest, AnImageStaysForAsLongAsOneOfItsSessions) {
  ASSERT_TRUE(records_->add(session(1), lane_, nullptr));
  ASSERT_TRUE(records_->add(session(2), lane_, nullptr));
  records_->remove(1);
  EXPECT_TRUE(image_stays());
  records_->remove(2);
  EXPECT_FALSE(image_stays());
}

TEST_F(RecordsTest, AnImageStaysThoughTheFirstOfItsSessionsEndsWhileOthersAreTakenUp) {
  ASSERT_TRUE(records_->add(session(1), lane_, nullptr));
  ASSERT_TRUE(records_->add(session(2), lane_, nullptr));
  const std::unique_ptr<Records> next = next_worker();
  const std::vector<Records::Session> found = next->sessions();
  ASSERT_EQ(found.size(), 2u);
  next->hold_image(found[0].image, lane_.get());
  next->taken_up(found[0], lane_, nullptr);
  next->remove(1);
  next->taken_up(found[1], lane_, nullptr);
  next->release_image(lane_.get());
  EXPECT_TRUE(image_stays());
  next->remove(2);
  EXPECT_FALSE(image_stays());
}

// Where workers are killed sooner than they have taken up all, nobody may be the last one each time.
TEST_F(RecordsTest, EachSessionIsAmongTheFirstThatSomeWorkerTakesUp) {
  constexpr SessionId kSessions = 64;
  constexpr std::size_t kTakenUp = 8;
  for (SessionId id = 1; id <= kSessions; ++id) ASSERT_TRUE(records_->add(session(id), lane_, nullptr));
  std::set<SessionId> had_turn;
  for (std::size_t worker = 1; worker <= 2 * kSessions / kTakenUp; ++worker) {
    records_->shared().workers = worker;
    const std::vector<Records::Session> found = next_worker()->sessions();
    std::set<SessionId> all;
    for (const Records::Session& session : found) all.insert(session.id);
    ASSERT_EQ(all.size(), kSessions);
    for (std::size_t i = 0; i < kTakenUp; ++i) had_turn.insert(found[i].id);
  }
  EXPECT_EQ(had_turn.size(), kSessions);
}

// A child that ended before would leave the number of its descriptor to somebody else.
TEST_F(RecordsTest, WhoseForkIsNotAppliedIsTakenUpBeforeItsChild) {
  SessionState state = SessionState::create("image").value();
  state.empty_inbox()[0] = {.event = abi::kEventFork, .reserved = {}, .arg = {.fork = {.ufd = 77}}};
  constexpr SessionId kParent = 5;
  ASSERT_TRUE(records_->add(session(1), lane_, nullptr));
  for (SessionId other = 2; other < kParent; ++other)
    ASSERT_TRUE(records_->add(session(other), lane_, nullptr));
  Records::Session parent = session(kParent);
  parent.state_file = state.fd();
  ASSERT_TRUE(records_->add(parent, lane_, nullptr));
  // The child gets a place before its parent's.
  records_->remove(1);
  ASSERT_TRUE(records_->add_fork(kParent, 6, some_.get(), some_.get()));
  for (std::uint64_t worker = 0; worker < 20; ++worker) {
    records_->shared().workers = worker;
    const std::vector<Records::Session> found = next_worker()->sessions();
    const auto place = [&](SessionId id) { return std::ranges::find(found, id, &Records::Session::id); };
    ASSERT_LT(place(kParent), place(6)) << worker;
    ASSERT_NE(place(6), found.end());
  }
}

// The records as they are now, in a file of their own: what would be found if their writer were cut off here.
UniqueFd copy_of(int fd) {
  UniqueFd copy(::memfd_create("copy", MFD_CLOEXEC));
  EXPECT_EQ(::ftruncate(copy.get(), ::lseek(fd, 0, SEEK_END)), 0);
  std::array<char, 1 << 16> buffer;
  for (off_t at = 0; (at = ::lseek(fd, at, SEEK_DATA)) >= 0;) {
    const ssize_t bytes = ::pread(fd, buffer.data(), buffer.size(), at);
    EXPECT_EQ(::pwrite(copy.get(), buffer.data(), static_cast<std::size_t>(bytes), at), bytes);
    at += bytes;
  }
  return copy;
}

// What the next worker must find, whenever this one is cut off.
class CutRecords : public RecordsTest {
 protected:
  struct Known {
    std::shared_ptr<StoreLane> lane;
    std::shared_ptr<SharedImage> memory;
  };

  void SetUp() override {
    if (const std::string lacking = test::stores_cannot_be_cut(); !lacking.empty()) GTEST_SKIP() << lacking;
  }

  static std::shared_ptr<StoreLane> lane(const char* name) {
    UniqueFd file = file_of_pages(name);
    const std::shared_ptr<Store> store = open_file_store(file.get(), name).value();
    return StoreLane::create(store, {}, std::move(file)).value();
  }

  // Does it, and looks at what the next worker would find after each store. `doubtful`: the session that may
  // be there or not meanwhile.
  void cut(SessionId doubtful, const std::function<void()>& work) {
    test::after_each_store(test::mapping_of(records_->fd()), work, [&] {
      ++cuts_;
      look(doubtful);
    });
  }
  void add(SessionId id, const std::shared_ptr<StoreLane>& lane,
           const std::shared_ptr<SharedImage>& memory = nullptr) {
    Records::Session added = session(id);
    added.shares = memory != nullptr;
    in_doubt_ = {lane, memory};
    cut(id, [&] { ASSERT_TRUE(records_->add(added, lane, memory)); });
    known_[id] = {lane, memory};
    look(0);
  }
  void remove(SessionId id) {
    in_doubt_ = known_.at(id);
    known_.erase(id);
    cut(id, [&] { records_->remove(id); });
    look(0);
  }

  void look(SessionId doubtful) const {
    const std::unique_ptr<Records> next = Records::open(copy_of(records_->fd())).value();
    std::map<SessionId, Known> left = known_;
    for (const Records::Session& found : next->sessions()) {
      const auto known = left.find(found.id);
      ASSERT_TRUE(known != left.end() || found.id == doubtful) << "session " << found.id;
      const Known& wanted = known != left.end() ? known->second : in_doubt_;
      EXPECT_EQ(found.uffd, some_.get());
      EXPECT_EQ(found.state_file, some_.get());
      EXPECT_EQ(found.shares, wanted.memory != nullptr);
      const Records::Image image = next->image(found.image);
      EXPECT_EQ(image.file, wanted.lane->file());
      EXPECT_EQ(image.name, wanted.lane->store()->name());
      if (wanted.memory) {
        EXPECT_EQ(image.memory, wanted.memory->file());
        EXPECT_EQ(image.filled, wanted.memory->filled_file());
      }
      // Its number is given to nobody else.
      EXPECT_GE(next->shared().last_session, found.id);
      if (known != left.end()) left.erase(known);
    }
    EXPECT_TRUE(left.empty()) << "session " << left.begin()->first << " is not found";
    EXPECT_TRUE(keeps_what_is_needed());
  }
  // Whether a next worker closes nothing of the sessions that it finds. Its table of descriptors is a copy.
  bool keeps_what_is_needed() const {
    const pid_t worker = ::fork();
    if (worker == 0) {
      const std::unique_ptr<Records> next = Records::open(copy_of(records_->fd())).value();
      (void)next->sweep();
      bool kept = true;
      for (const auto& [id, known] : known_) {
        kept = kept && ::fcntl(known.lane->file(), F_GETFD) >= 0 && ::fcntl(some_.get(), F_GETFD) >= 0;
        if (known.memory)
          kept = kept && ::fcntl(known.memory->file(), F_GETFD) >= 0 &&
                 ::fcntl(known.memory->filled_file(), F_GETFD) >= 0;
      }
      ::_exit(kept ? 0 : 1);
    }
    int status = 0;
    EXPECT_EQ(::waitpid(worker, &status, 0), worker);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }

  std::map<SessionId, Known> known_;
  Known in_doubt_;
  std::size_t cuts_ = 0;
};

TEST_F(CutRecords, AtAnyStoreTheySayWhichSessionsThereAreAndWhatTheyNeed) {
  const std::shared_ptr<StoreLane> first = lane("first");
  const std::shared_ptr<StoreLane> second = lane("second");
  const std::shared_ptr<SharedImage> memory = SharedImage::create(second).value();
  add(1, first);
  add(2, second);
  add(3, first);
  remove(1);
  add(4, second, memory);
  remove(2);
  add(5, second, memory);
  remove(4);
  remove(5);
  add(6, second);
  remove(3);
  add(7, first);
  EXPECT_GT(cuts_, 60u);
}

TEST_F(CutRecords, AtAnyStoreAForkedChildIsThereWithItsParentsImageOrNotAtAll) {
  const std::shared_ptr<StoreLane> first = lane("first");
  const std::shared_ptr<SharedImage> memory = SharedImage::create(first).value();
  add(1, first, memory);
  in_doubt_ = known_.at(1);
  cut(2, [&] { ASSERT_TRUE(records_->add_fork(1, 2, some_.get(), some_.get())); });
  known_[2] = known_.at(1);
  remove(1);
  remove(2);
}

TEST_F(CutRecords, AtAnyStoreWhatSessionsHaveCountedIsThereOnce) {
  const std::shared_ptr<StoreLane> first = lane("first");
  for (SessionId id = 1; id <= 3; ++id) records_->add(session(id), first, nullptr).value()->faults = 10 * id;
  const auto look = [&] {
    const std::unique_ptr<Records> next = Records::open(copy_of(records_->fd())).value();
    std::uint64_t faults = next->totals().counters.faults;
    std::uint64_t sessions = next->totals().sessions;
    for (const Records::Session& found : next->sessions()) {
      faults += next->taken_up(found, first, nullptr)->faults;
      ++sessions;
    }
    EXPECT_EQ(faults, 60u);
    EXPECT_EQ(sessions, 3u);
  };
  for (const SessionId id : {2u, 1u, 3u})
    test::after_each_store(test::mapping_of(records_->fd()), [&] { records_->remove(id); }, look);
  EXPECT_EQ(records_->totals().sessions, 3u);
  // The next one at the same place begins anew.
  EXPECT_EQ(records_->add(session(4), first, nullptr).value()->faults, 0u);
}

TEST_F(RecordsTest, OneThatIsRefusedAfterAllIsNotCounted) {
  records_->add(session(1), lane_, nullptr).value()->faults = 7;
  records_->withdraw(1);
  EXPECT_EQ(records_->totals().sessions, 0u);
  EXPECT_EQ(records_->totals().counters.faults, 0u);
  EXPECT_TRUE(records_->sessions().empty());
}

TEST_F(CutRecords, AtAnyStoreAListenerIsThereAsItWasMadeOrNotAtAll) {
  const std::shared_ptr<StoreLane> first = lane("first");
  const auto look = [&] {
    const std::unique_ptr<Records> next = Records::open(copy_of(records_->fd())).value();
    const std::vector<Records::Listener> found = next->listeners();
    ASSERT_LE(found.size(), 1u);
    if (found.empty()) return;
    EXPECT_EQ(found[0].socket, some_.get());
    EXPECT_EQ(found[0].path, "/run/vm.sock");
    EXPECT_EQ(found[0].allow, "user:7");
    EXPECT_EQ(next->image(found[0].image).file, first->file());
  };
  const std::span<std::byte> memory = test::mapping_of(records_->fd());
  for (int times = 0; times < 2; ++times) {
    const auto add = [&] {
      ASSERT_TRUE(records_->add({.kind = ListenerKind::firecracker,
                                 .socket = some_.get(),
                                 .device = 1,
                                 .inode = 2,
                                 .path = "/run/vm.sock",
                                 .allow = "user:7"},
                                first));
    };
    test::after_each_store(memory, add, look);
    EXPECT_EQ(Records::open(copy_of(records_->fd())).value()->listeners().size(), 1u);
    test::after_each_store(memory, [&] { records_->remove_listener(some_.get()); }, look);
    EXPECT_TRUE(Records::open(copy_of(records_->fd())).value()->listeners().empty());
  }
}

}  // namespace
}  // namespace uffdkit
