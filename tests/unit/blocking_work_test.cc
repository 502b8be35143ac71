#include "manager/blocking_work.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace uffdkit {
namespace {

// Holds whoever waits for it until it is opened.
class Door {
 public:
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return open_; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

class Work : public testing::Test {
 protected:
  const std::unique_ptr<EventLoop> loop_ = *EventLoop::create();
  const std::shared_ptr<Door> door_ = std::make_shared<Door>();
  BlockingWork work_{*loop_};

  // Work that is stuck until the door is opened.
  BlockingWork::Work stuck(std::function<void()> finish = [] {}) {
    return [door = door_, finish = std::move(finish)] { return door->wait(), finish; };
  }
};

TEST_F(Work, RunsElsewhereAndIsFinishedOnTheLoop) {
  const std::thread::id here = std::this_thread::get_id();
  std::thread::id worked;
  std::thread::id finished;
  work_.run("a", [&] {
    worked = std::this_thread::get_id();
    return [&] {
      finished = std::this_thread::get_id();
      loop_->stop();
    };
  });
  loop_->run();
  EXPECT_NE(worked, here);
  EXPECT_EQ(finished, here);
}

TEST_F(Work, ThatIsStuckKeepsOnlyOnePlaceHoweverMuchOfItThereIs) {
  for (std::size_t i = 0; i < 3 * BlockingWork::kThreadsMax; ++i) work_.run("stuck", stuck());
  work_.run("other", [&] { return [&] { loop_->stop(); }; });
  loop_->run();
  door_->open();
}

TEST_F(Work, OnOneSubjectRunsInOrderAndNeverTwiceAtOnce) {
  std::atomic<int> inside = 0;
  std::string order;
  for (char name = 'a'; name <= 'j'; ++name)
    work_.run("subject", [&, name] {
      EXPECT_EQ(++inside, 1);
      std::this_thread::yield();
      --inside;
      return [&, name] {
        order += name;
        if (name == 'j') loop_->stop();
      };
    });
  loop_->run();
  EXPECT_EQ(order, "abcdefghij");
}

TEST_F(Work, BeyondTheBoundWaitsAndIsDoneThen) {
  const std::size_t count = BlockingWork::kThreadsMax + 3;
  std::size_t finished = 0;
  for (std::size_t i = 0; i < count; ++i)
    work_.run(std::to_string(i), stuck([&] {
                if (++finished == count) loop_->stop();
              }));
  loop_->post([&] { door_->open(); });
  loop_->run();
  EXPECT_EQ(finished, count);
}

TEST_F(Work, ThatNobodyWantsAnyMoreIsNotBegun) {
  work_.run("subject", stuck());
  bool begun = false;
  const BlockingWork::Ticket unwanted = work_.run("subject", [&] {
    begun = true;
    return [] {};
  });
  work_.run("subject", [&] { return [&] { loop_->stop(); }; });
  work_.forget(unwanted);
  door_->open();
  loop_->run();
  EXPECT_FALSE(begun);
}

TEST(BlockingWork, ThatIsStuckKeepsNobodyFromEnding) {
  const auto door = std::make_shared<Door>();
  const auto token = std::make_shared<int>();
  {
    const std::unique_ptr<EventLoop> loop = *EventLoop::create();
    BlockingWork work(*loop);
    work.run("stuck", [door, token] {
      door->wait();
      return [token] { FAIL() << "nobody is there to hear it"; };
    });
  }
  door->open();
  while (token.use_count() > 1) std::this_thread::yield();
}

}  // namespace
}  // namespace uffdkit
