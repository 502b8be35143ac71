#include "client/channel.h"

#include <gtest/gtest.h>
#include <sys/eventfd.h>

#include "support/fake_manager.h"
#include "support/temp_dir.h"

namespace uffdkit::internal {
namespace {

using namespace std::chrono_literals;
using test::FakeManager;
using test::TempDir;

constexpr Patience kPatient{.limit = 20s};

TEST(Channel, ALateAnswerIsNotTakenForTheNextOne) {
  const TempDir dir;
  const FakeManager manager(dir / "s", {.hold_queries = 1});
  auto channel = Channel::open(dir / "s", 20s, kPatient);
  ASSERT_TRUE(channel) << channel.error().text();
  const auto timed_out = channel->ask<native::Status>(native::Query{}, {.limit = 1ms});
  ASSERT_FALSE(timed_out);
  EXPECT_EQ(timed_out.error().os_error(), ETIMEDOUT);
  const auto status = channel->ask<native::Status>(native::Query{}, kPatient);
  ASSERT_TRUE(status) << status.error().text();
  EXPECT_EQ(status->faults_pending, 0u);  // the late one says 999
}

TEST(Channel, WaitingEndsWhenItIsCancelled) {
  const TempDir dir;
  const FakeManager manager(dir / "s", {.silent = true});
  const UniqueFd cancel(::eventfd(1, EFD_CLOEXEC));
  const auto channel = Channel::open(dir / "s", 20s, {.limit = {}, .cancel_fd = cancel.get()});
  ASSERT_FALSE(channel);
  EXPECT_EQ(channel.error().os_error(), ECANCELED);
}

TEST(Channel, AnAnswerOfTheWrongKindIsAnErrorAndEndsTheConnection) {
  const TempDir dir;
  const FakeManager manager(dir / "s");
  auto channel = Channel::open(dir / "s", 20s, kPatient);
  ASSERT_TRUE(channel) << channel.error().text();
  EXPECT_FALSE(channel->ask<native::Ok>(native::Query{}, kPatient));
  EXPECT_FALSE(channel->ask<native::Status>(native::Query{}, kPatient));
}

}  // namespace
}  // namespace uffdkit::internal
