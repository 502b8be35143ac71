#include "manager/records.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <uffdkit/store.h>
#include <unistd.h>

#include <memory>
#include <utility>
#include <vector>

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

}  // namespace
}  // namespace uffdkit
