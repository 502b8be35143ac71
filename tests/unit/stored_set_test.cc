// The pages of a working set that are stored for themselves beside their image.
#include "image/stored_set.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "image/open_image.h"
#include "image/write_image.h"
#include "support/image.h"
#include "support/temp_dir.h"

namespace uffdkit::image {
namespace {

constexpr std::uint64_t kPages = 256;

class StoredSets : public testing::Test {
 protected:
  StoredSets() {
    const auto source = memory_of(raw_store_, raw_store_->size().value);
    write_image(*source, path_, std::nullopt, {}, {}).value();
  }

  // Stores every third page of the image for itself, as a diff of `name`.
  void store_set(const std::string& name = "image") {
    const OpenImage image = opener_.open(directory_ / name).value();
    std::vector<bool> kept(kPages);
    for (std::uint64_t page = 0; page < kPages; page += 3) kept[page] = true;
    const auto source = difference(image.store, image.store, image.raw_bytes, kept);
    const Parent parent{.name = name, .identity = image.layers.front()->record().identity};
    write_image(*source, path_ + kStoredSetSuffix, parent, {}, {.replace = true}).value();
  }

  // The image with what lies beside it; `said` is why that is not used.
  OpenImage open(std::string* said = nullptr) {
    OpenImage image = opener_.open(path_).value();
    const UniqueFd file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
    const Result<void> added = opener_.add_stored_set(image, file.get(), path_);
    if (said != nullptr) *said = added ? "" : added.error().text();
    return image;
  }

  void expect_the_memory(Store& store) const {
    for (std::uint64_t page = 0; page < kPages; ++page) {
      std::array<std::byte, kPageBytes> read;
      std::array<std::byte, kPageBytes> wanted;
      const StoreOffset from(page * kPageBytes);
      ASSERT_TRUE(raw_store_->read(from, wanted, Wait::yes));
      const Result<ReadStatus> status = store.read(from, read, Wait::yes);
      ASSERT_TRUE(status) << status.error().text();
      ASSERT_EQ(std::memcmp(read.data(), wanted.data(), read.size()), 0) << page;
    }
  }

  const test::TempDir directory_;
  const test::Image raw_{directory_ / "raw", kPages};
  const std::shared_ptr<Store> raw_store_ = open_file_store(raw_.path()).value();
  const std::string path_ = directory_ / "image";
  ImageOpener opener_{std::make_shared<FrameCache>(ByteCount(0))};
};

TEST_F(StoredSets, AnImageWithoutOneIsReadAsItIs) {
  std::string said;
  EXPECT_EQ(open(&said).stored_set, nullptr);
  EXPECT_EQ(said, "");
}

TEST_F(StoredSets, PagesOfTheSetAreReadFromTheFileAndOthersFromTheImage) {
  store_set();
  const OpenImage image = open();
  ASSERT_NE(image.stored_set, nullptr);
  EXPECT_EQ(image.store->name(), path_);
  expect_the_memory(*image.store);
  const auto unit = [&](std::uint64_t page) {
    return image.stored_set->unit_at(StoreOffset(page * kPageBytes));
  };
  // Pages that lay in two frames are in one.
  EXPECT_EQ(unit(3), unit(30));
  EXPECT_NE(unit(3), unit(4));
  EXPECT_FALSE(image.stored_set->problem());
}

TEST_F(StoredSets, OneThatTurnsOutToBeDamagedIsReadNoMoreAndNamedOnce) {
  store_set();
  const UniqueFd file(::open((path_ + kStoredSetSuffix).c_str(), O_WRONLY | O_CLOEXEC));
  ASSERT_EQ(::pwrite(file.get(), "damage", 6, 100), 6);
  const OpenImage image = open();
  ASSERT_NE(image.stored_set, nullptr);
  expect_the_memory(*image.store);
  const std::optional<Error> problem = image.stored_set->problem();
  ASSERT_TRUE(problem);
  EXPECT_NE(problem->text().find(path_ + kStoredSetSuffix), std::string::npos) << problem->text();
  EXPECT_FALSE(image.stored_set->problem());
  EXPECT_EQ(image.stored_set->unit_at(StoreOffset(3 * kPageBytes)),
            image.stored_set->unit_at(StoreOffset(4 * kPageBytes)));
}

TEST_F(StoredSets, OneOfAnotherImageIsLeftAloneAndNamed) {
  const test::Image other(directory_ / "other.raw", kPages, 2);
  const auto other_store = open_file_store(other.path()).value();
  write_image(*memory_of(other_store, other_store->size().value), directory_ / "other", std::nullopt, {}, {})
      .value();
  store_set("other");
  std::string said;
  const OpenImage image = open(&said);
  EXPECT_EQ(image.stored_set, nullptr);
  EXPECT_NE(said.find("is no working set stored of"), std::string::npos) << said;
  expect_the_memory(*image.store);
}

TEST_F(StoredSets, WhatIsNoImageIsLeftAloneAndNamed) {
  std::ofstream(path_ + kStoredSetSuffix) << "somebody's";
  std::string said;
  EXPECT_EQ(open(&said).stored_set, nullptr);
  EXPECT_NE(said.find(path_ + kStoredSetSuffix), std::string::npos) << said;
}

TEST_F(StoredSets, AnotherUsersIsLeftAloneAndNamed) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  store_set();
  ASSERT_EQ(::chown(path_.c_str(), 1, 1), 0);
  ASSERT_EQ(::chown((path_ + kStoredSetSuffix).c_str(), 2, 2), 0);
  std::string said;
  EXPECT_EQ(open(&said).stored_set, nullptr);
  EXPECT_NE(said.find("another user's"), std::string::npos) << said;
  // Of whoever reads it, and of the image's owner.
  for (const uid_t owner : {0u, 1u}) {
    ASSERT_EQ(::chown((path_ + kStoredSetSuffix).c_str(), owner, owner), 0);
    EXPECT_NE(open().stored_set, nullptr) << owner;
  }
}

// Whose every first, second ... read fails while `fails` says so.
class FailingStore final : public Store, public ReadAhead {
 public:
  FailingStore(std::shared_ptr<Store> store, std::vector<bool> fails)
      : store_(std::move(store)), fails_(std::move(fails)) {}
  ByteCount size() const noexcept override { return store_->size(); }
  std::string name() const override { return "failing"; }
  Extent extent_at(StoreOffset from) const noexcept override { return store_->extent_at(from); }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    if (reads_ < fails_.size() && fails_[reads_++]) return Failure(Error("it fails", EIO));
    return store_->read(from, to, wait);
  }
  void will_need(StoreOffset, ByteCount) noexcept override {}
  std::uint64_t unit_at(StoreOffset) const noexcept override { return 0; }
  bool is_only_copied() const noexcept override { return true; }

 private:
  const std::shared_ptr<Store> store_;
  const std::vector<bool> fails_;
  std::size_t reads_ = 0;
};

class StoredSetReads : public testing::Test {
 protected:
  // By the file and by the image, each of whose reads fails or not; whether all of two reads came.
  bool reads(const std::vector<bool>& file_fails, const std::vector<bool>& image_fails) {
    const auto memory = make_memory_store(std::vector<std::byte>(kPageBytes, std::byte{7}));
    set_ = std::make_unique<StoredSet>(std::make_shared<FailingStore>(memory, file_fails),
                                       std::make_shared<FailingStore>(memory, image_fails));
    bool all = true;
    for (int time = 0; time < 2; ++time) {
      std::array<std::byte, kPageBytes> page{};
      const auto read = set_->read(StoreOffset(0), page, Wait::yes);
      all = all && read && *read == ReadStatus::done && page.back() == std::byte{7};
    }
    return all;
  }

  std::unique_ptr<StoredSet> set_;
};

TEST_F(StoredSetReads, AnErrorThatGoesAwayIsNoDamage) {
  EXPECT_TRUE(reads({true}, {}));
  EXPECT_FALSE(set_->problem());
}

TEST_F(StoredSetReads, AnErrorThatStaysIsOneWhereTheImageHasNone) {
  EXPECT_TRUE(reads({true, true}, {}));
  EXPECT_TRUE(set_->problem());
}

TEST_F(StoredSetReads, WhereTheImageCannotBeReadEitherTheFileIsNotBlamed) {
  EXPECT_FALSE(reads({true}, {true}));
  EXPECT_FALSE(set_->problem());
}

TEST_F(StoredSets, ALinkIsNotFollowed) {
  store_set();
  std::filesystem::rename(path_ + kStoredSetSuffix, directory_ / "elsewhere");
  std::filesystem::create_symlink("elsewhere", path_ + kStoredSetSuffix);
  std::string said;
  EXPECT_EQ(open(&said).stored_set, nullptr);
  EXPECT_NE(said, "");
}

}  // namespace
}  // namespace uffdkit::image
