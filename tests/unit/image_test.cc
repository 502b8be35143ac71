// Images as files: written, opened, read, layered, damaged.
#include "image/open_image.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <uffdkit/faulty_store.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "image/check_image.h"
#include "image/output_file.h"
#include "image/working_set.h"
#include "image/write_image.h"
#include "store/read_ahead.h"
#include "support/access_time.h"
#include "support/image.h"
#include "support/temp_dir.h"

namespace uffdkit::image {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::size_t kPages = 2048;

Bytes read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

void write_file(const std::string& path, std::span<const std::byte> bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

Bytes page_of(std::uint64_t number) {
  Bytes page(kPageBytes);
  for (std::size_t at = 0; at < page.size(); at += 8) {
    const std::uint64_t word = (number + 1) * 0x9e37'79b9'7f4a'7c15 + (at / 64);
    std::memcpy(page.data() + at, &word, sizeof word);
  }
  return page;
}

void put_page(Bytes& memory, std::size_t page, std::uint64_t number) {
  std::ranges::copy(page_of(number), memory.begin() + static_cast<std::ptrdiff_t>(page * kPageBytes));
}

// What a store has, read in pieces of many sizes.
Bytes contents(Store& store) {
  Bytes all(store.size().value, std::byte{0x55});
  std::size_t step = kPageBytes;
  for (std::size_t at = 0; at < all.size(); at += step) {
    step = std::min(all.size() - at, step * 3 % (67 * kPageBytes));
    const auto read = store.read(StoreOffset(at), std::span(all).subspan(at, step), Wait::yes);
    EXPECT_TRUE(read && *read == ReadStatus::done) << (read ? "" : read.error().text());
  }
  return all;
}

class Images : public testing::Test {
 protected:
  // An image of these bytes; a diff of `parent`, if that has a name.
  Record make(const std::string& name, const Bytes& memory, const std::string& parent = {},
              WriteOptions options = {}) {
    options.replace = true;
    const auto store = make_memory_store(memory);
    std::unique_ptr<MemorySource> source = memory_of(store, memory.size());
    std::optional<Parent> named;
    if (!parent.empty()) {
      const auto base = open(parent);
      named = {.name = parent, .identity = base.layers.front()->record().identity};
      source = difference(base.store, store, memory.size());
    }
    const Result<Written> written = write_image(*source, directory_ / name, named, {}, options);
    EXPECT_TRUE(written) << written.error().text();
    EXPECT_EQ(written->file_bytes, std::filesystem::file_size(directory_ / name));
    return written->record;
  }

  OpenImage open(const std::string& name) {
    Result<OpenImage> opened = opener_.open(directory_ / name);
    EXPECT_TRUE(opened) << opened.error().text();
    return std::move(*opened);
  }

  // What opening says.
  std::string complaint(const std::string& name) {
    const Result<OpenImage> opened =
        ImageOpener(std::make_shared<FrameCache>(ByteCount(0))).open(directory_ / name);
    return opened ? "opened" : opened.error().text();
  }

  const test::TempDir directory_;
  const test::Image raw_{directory_ / "raw", kPages};
  const Bytes memory_ = read_file(raw_.path());
  ImageOpener opener_{std::make_shared<FrameCache>(ByteCount(16 << 20))};
};

TEST_F(Images, EveryFrameSizeGivesTheMemoryBackByUsAndByZstd) {
  for (std::uint32_t frame_bytes = kFrameBytesMin; frame_bytes <= kFrameBytesMax; frame_bytes *= 2) {
    make("image", memory_, {}, {.frame_bytes = frame_bytes});
    EXPECT_TRUE(contents(*open("image").store) == memory_) << frame_bytes;
    const Bytes file = read_file(directory_ / "image");
    Bytes decompressed(memory_.size());
    EXPECT_EQ(ZSTD_decompress(decompressed.data(), decompressed.size(), file.data(), file.size()),
              memory_.size());
    EXPECT_TRUE(decompressed == memory_) << frame_bytes;
  }
}

TEST_F(Images, TheIdentityIsOfTheMemoryAloneAndNotOfHowItIsStored) {
  const Record one = make("one", memory_, {}, {.frame_bytes = kFrameBytesMin, .level = 1, .threads = 1});
  const Record other = make("other", memory_, {}, {.frame_bytes = kFrameBytesMax, .level = 9, .threads = 3});
  EXPECT_EQ(one.identity, other.identity);
  Bytes changed = memory_;
  changed[5'000'000] ^= std::byte{1};
  const Record third = make("third", changed, "one");
  EXPECT_NE(third.identity, one.identity);
  EXPECT_EQ(make("fourth", changed).identity, third.identity);
}

TEST_F(Images, MemoryThatIsNoWholePagesKeepsItsLengthAndEndsInZeros) {
  const Bytes odd(memory_.begin(), memory_.begin() + 100'001);
  make("image", odd);
  const OpenImage image = open("image");
  EXPECT_EQ(image.raw_bytes, odd.size());
  EXPECT_EQ(image.store->size().value, 25 * kPageBytes);
  Bytes padded = odd;
  padded.resize(25 * kPageBytes);
  EXPECT_TRUE(contents(*image.store) == padded);
  ASSERT_TRUE(extract_image(image, directory_ / "out", false, 2, {}));
  EXPECT_TRUE(read_file(directory_ / "out") == odd);
}

TEST_F(Images, ZerosAreKnownWithoutReadingAndTakeAlmostNoRoom) {
  Bytes memory(64 << 20);
  put_page(memory, 5000, 1);
  const Record record = make("image", memory);
  EXPECT_EQ(record.runs,
            (std::vector<PageRun>{{5000, PageKind::zero}, {1, PageKind::stored}, {11383, PageKind::zero}}));
  const OpenImage image = open("image");
  EXPECT_LT(image.layers.front()->file_bytes(), 20'000u);
  EXPECT_TRUE(image.store->extent_at(StoreOffset(0)).zero);
  EXPECT_EQ(image.store->extent_at(StoreOffset(0)).end.value, 5000 * kPageBytes);
  EXPECT_FALSE(image.store->extent_at(StoreOffset(5000 * kPageBytes)).zero);
  EXPECT_EQ(image.store->extent_at(StoreOffset(5001 * kPageBytes + 5)).end.value, memory.size());
  EXPECT_TRUE(contents(*image.store) == memory);
  EXPECT_EQ(opener_.cache().statistics().decoded, 1u);
}

TEST_F(Images, ExtractingGivesTheMemoryBackWithHoles) {
  make("image", memory_);
  ASSERT_TRUE(extract_image(open("image"), directory_ / "out", false, 2, {}));
  EXPECT_TRUE(read_file(directory_ / "out") == memory_);
  struct stat status;
  ASSERT_EQ(stat((directory_ / "out").c_str(), &status), 0);
  EXPECT_LT(status.st_blocks * 512, status.st_size * 3 / 4);
}

TEST_F(Images, AFileThatIsThereIsReplacedOnlyIfThatIsWanted) {
  make("image", memory_);
  const auto source = memory_of(make_memory_store(page_of(1)), kPageBytes);
  const auto refused = write_image(*source, directory_ / "image", std::nullopt, {}, {});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().os_error(), EEXIST);
  EXPECT_TRUE(contents(*open("image").store) == memory_);
  ASSERT_TRUE(write_image(*source, directory_ / "image", std::nullopt, {}, {.replace = true}));
  EXPECT_TRUE(contents(*open("image").store) == page_of(1));
}

TEST_F(Images, WhatIsNotFinishedHasNoNameAndLeavesNothing) {
  class Broken final : public MemorySource {
   public:
    std::uint64_t raw_bytes() const override { return 0; }
    Result<std::optional<Chunk>> next() override {
      if (++chunks_ == 20) return Failure(Error("the source broke", EIO));
      return Chunk{.offset = (chunks_ - 1) * kChunkBytes, .bytes = kChunkBytes};
    }
    Result<void> fill(Chunk& chunk) override {
      chunk.memory.assign(chunk.bytes, std::byte{7});
      return {};
    }

   private:
    std::uint64_t chunks_ = 0;
  };
  const test::TempDir empty;
  Broken source;
  const auto written = write_image(source, empty / "image", std::nullopt, {}, {});
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().message(), "the source broke");
  EXPECT_TRUE(std::filesystem::is_empty(empty.path()));
}

// ---- layers ---------------------------------------------------------------------------------------------

TEST_F(Images, ReadingIsNotNoted) {
  make("image", memory_);
  for (const char* name : {"raw", "image"}) {
    const OpenImage image = open(name);
    if (!test::set_accessed_long_ago(directory_ / name)) GTEST_SKIP() << "the file system notes no reads";
    contents(*image.store);
    EXPECT_EQ(test::accessed_at(directory_ / name), 1) << name;
  }
}

TEST_F(Images, LayersShowTheMemoryThatTheyWereMadeOf) {
  make("base", memory_);
  Bytes second = memory_;
  for (const std::size_t page : {0u, 17u, 300u, 301u, 302u, 2047u}) put_page(second, page, page);
  std::ranges::fill(std::span(second).subspan(400 * kPageBytes, 8 * kPageBytes), std::byte{0});
  make("second", second, "base");
  Bytes third = second;
  put_page(third, 300, 77);
  put_page(third, 404, 78);
  third.resize(third.size() + 3 * kPageBytes);
  put_page(third, 2049, 79);
  make("third", third, "second");

  EXPECT_TRUE(contents(*open("second").store) == second);
  const OpenImage image = open("third");
  EXPECT_EQ(image.layers.size(), 3u);
  EXPECT_TRUE(contents(*image.store) == third);
  EXPECT_TRUE(verify_image(image, 2, {}).problems.empty());
  // And flattened they are the same memory.
  const auto source = memory_of(image.store, image.raw_bytes);
  const auto flat = write_image(*source, directory_ / "flat", std::nullopt, {}, {});
  ASSERT_TRUE(flat);
  EXPECT_EQ(flat->record.identity, image.layers.front()->record().identity);
  EXPECT_TRUE(contents(*open("flat").store) == third);
}

TEST_F(Images, ADiffStoresOnlyWhatDiffers) {
  make("base", memory_);
  Bytes changed = memory_;
  put_page(changed, 8, 1);
  const Record record = make("diff", changed, "base");
  std::uint64_t stored = 0;
  for (const PageRun& run : record.runs)
    if (run.kind == PageKind::stored) stored += run.pages;
  EXPECT_EQ(stored, 1u);
  make("same", memory_, "base");
  EXPECT_EQ(open("same").layers.front()->frame_count(), 0u);
  EXPECT_TRUE(contents(*open("same").store) == memory_);
}

TEST_F(Images, ADiffStoresPagesThatAreKeptAlsoWhereBothHaveThemAlike) {
  make("base", memory_);
  std::vector<bool> kept(300);
  for (std::size_t page = 0; page < kept.size(); page += 3) kept[page] = true;
  const OpenImage base = open("base");
  const auto source = difference(base.store, base.store, memory_.size(), kept);
  const Parent parent{.name = "base", .identity = base.layers.front()->record().identity};
  const Result<Written> written = write_image(*source, directory_ / "diff", parent, {}, {});
  ASSERT_TRUE(written) << written.error().text();
  std::uint64_t stored = 0;
  for (const PageRun& run : written->record.runs)
    if (run.kind == PageKind::stored) stored += run.pages;
  std::uint64_t expected = 0;
  for (std::size_t page = 0; page < kept.size(); page += 3)
    expected += is_all_zero(std::span(memory_).subspan(page * kPageBytes, kPageBytes)) ? 0u : 1u;
  EXPECT_EQ(stored, expected);
  EXPECT_EQ(written->record.identity, parent.identity);
  EXPECT_TRUE(contents(*open("diff").store) == memory_);
}

TEST_F(Images, PagesOfOneFrameAreOneUnitAndThoseOfOthersAreNot) {
  Bytes memory;
  for (std::size_t page = 0; page < 64; ++page) std::ranges::copy(page_of(page), std::back_inserter(memory));
  Bytes changed = memory;
  for (const std::size_t page : {1u, 5u, 40u}) put_page(changed, page, 1000 + page);
  make("base", memory);
  make("diff", changed, "base");
  const OpenImage image = open("diff");
  const auto* frames = dynamic_cast<const ReadAhead*>(image.store.get());
  ASSERT_NE(frames, nullptr);
  const auto unit = [&](std::uint64_t page) { return frames->unit_at(StoreOffset(page * kPageBytes)); };
  EXPECT_EQ(unit(0), unit(15));
  EXPECT_NE(unit(15), unit(16));
  // Those that are stored in the diff are together there.
  EXPECT_EQ(unit(1), unit(40));
  EXPECT_NE(unit(1), unit(2));
}

TEST_F(Images, PagesOfAWorkingSetAreOrderedByTheFirstOfTheirFrame) {
  Bytes memory(64 * kPageBytes);
  for (std::size_t page = 0; page < 64; ++page)
    if (page != 3 && page != 50) put_page(memory, page, page);
  make("base", memory);
  const OpenImage base = open("base");
  std::vector<bool> kept(64);
  for (const std::size_t page : {1u, 17u, 40u}) kept[page] = true;
  const auto source = difference(base.store, base.store, memory.size(), kept);
  const Parent parent{.name = "base", .identity = base.layers.front()->record().identity};
  ASSERT_TRUE(write_image(*source, directory_ / "diff", parent, {}, {}));
  const std::vector<std::uint32_t> order = {40, 0, 3, 2, 17, 50, 16};
  // Pages of zeros lie in none.
  EXPECT_EQ(by_frames(order, *open("diff").store), (std::vector<std::uint32_t>{40, 17, 0, 2, 3, 50, 16}));
  EXPECT_EQ(by_frames(order, *make_memory_store(memory)), order);
}

TEST_F(Images, DataOfSeveralLayersThatLiesTogetherIsOneExtent) {
  Bytes memory(64 * kPageBytes);
  for (std::size_t page = 8; page < 32; ++page) put_page(memory, page, page);
  Bytes changed = memory;
  for (const std::size_t page : {10u, 12u, 33u}) put_page(changed, page, 1000 + page);
  make("base", memory);
  make("diff", changed, "base");
  const auto store = open("diff").store;
  const auto extent = [&](std::uint64_t page) { return store->extent_at(StoreOffset(page * kPageBytes)); };
  EXPECT_TRUE(extent(3).zero);
  EXPECT_EQ(extent(3).end.value, 8 * kPageBytes);
  EXPECT_FALSE(extent(8).zero);
  EXPECT_EQ(extent(11).end.value, 32 * kPageBytes);
  EXPECT_TRUE(extent(32).zero);
  EXPECT_FALSE(extent(33).zero);
  EXPECT_TRUE(extent(34).zero);
  EXPECT_EQ(extent(34).end.value, 64 * kPageBytes);
}

TEST_F(Images, AParentThatIsNotTheOneIsRefused) {
  make("base", memory_);
  Bytes changed = memory_;
  put_page(changed, 8, 1);
  make("diff", changed, "base");
  make("base", changed);
  EXPECT_NE(complaint("diff").find("is not the parent of"), std::string::npos) << complaint("diff");
  std::filesystem::copy_file(raw_.path(), directory_ / "base",
                             std::filesystem::copy_options::overwrite_existing);
  EXPECT_NE(complaint("diff").find("it is no compressed image"), std::string::npos) << complaint("diff");
  std::filesystem::remove(directory_ / "base");
  EXPECT_NE(complaint("diff").find("the parent of"), std::string::npos) << complaint("diff");
  // The same memory in another file is as good, whatever its frames are.
  make("base", memory_, {}, {.frame_bytes = kFrameBytesMin});
  EXPECT_TRUE(contents(*open("diff").store) == changed);
}

TEST_F(Images, AParentIsNoSymbolicLinkAndLiesInTheSameFolder) {
  make("base", memory_);
  make("diff", memory_, "base");
  std::filesystem::rename(directory_ / "base", directory_ / "moved");
  std::filesystem::create_symlink("moved", directory_ / "base");
  EXPECT_NE(complaint("diff").find("no symbolic links"), std::string::npos) << complaint("diff");
  // A link to the child leads to the folder where the child is.
  std::filesystem::rename(directory_ / "moved", directory_ / "base");
  const test::TempDir elsewhere;
  std::filesystem::create_symlink(directory_ / "diff", elsewhere / "link");
  EXPECT_TRUE(opener_.open(elsewhere / "link"));
}

TEST_F(Images, AnImageMayHaveSoManyLayersAndNoMore) {
  const Bytes memory(memory_.begin(), memory_.begin() + 16 * kPageBytes);
  make("0", memory);
  for (std::size_t layer = 1; layer <= kLayersMax; ++layer) {
    Bytes changed = memory;
    put_page(changed, layer % 16, layer);
    const auto parent = opener_.open(directory_ / std::to_string(layer - 1));
    ASSERT_TRUE(parent) << parent.error().text();
    make(std::to_string(layer), changed, std::to_string(layer - 1));
  }
  EXPECT_EQ(open(std::to_string(kLayersMax - 1)).layers.size(), kLayersMax);
  EXPECT_NE(complaint(std::to_string(kLayersMax)).find("more than 128 layers"), std::string::npos);
}

TEST_F(Images, TwoImagesThatShareABaseShareItsFrames) {
  make("base", memory_);
  Bytes a = memory_;
  put_page(a, 2040, 1);
  make("a", a, "base");
  Bytes b = memory_;
  put_page(b, 2041, 2);
  make("b", b, "base");
  const OpenImage first = open("a");
  const OpenImage second = open("b");
  EXPECT_EQ(first.layers[1], second.layers[1]);
  Bytes page(kPageBytes);
  ASSERT_TRUE(first.store->read(StoreOffset(0), page, Wait::yes));
  const auto before = opener_.cache().statistics().decoded;
  const auto read = second.store->read(StoreOffset(8 * kPageBytes), page, Wait::no);
  EXPECT_TRUE(read && *read == ReadStatus::done);
  EXPECT_EQ(opener_.cache().statistics().decoded, before);
}

TEST_F(Images, ASparseDiffsHolesAreTheParentsPages) {
  make("base", memory_);
  Bytes changed = memory_;
  const std::string sparse = directory_ / "sparse";
  const int fd = ::open(sparse.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  ASSERT_EQ(ftruncate(fd, static_cast<off_t>(memory_.size())), 0);
  for (const std::size_t page : {0u, 1u, 255u, 256u, 700u, 1024u, 2047u}) {
    put_page(changed, page, page);
    if (page == 700)
      std::ranges::fill(std::span(changed).subspan(page * kPageBytes, kPageBytes), std::byte{0});
    ASSERT_EQ(
        pwrite(fd, changed.data() + page * kPageBytes, kPageBytes, static_cast<off_t>(page * kPageBytes)),
        static_cast<ssize_t>(kPageBytes));
  }
  const OpenImage base = open("base");
  auto source = sparse_difference(base.store, base.raw_bytes, sparse);
  ASSERT_TRUE(source) << source.error().text();
  const Parent parent{.name = "base", .identity = base.layers.front()->record().identity};
  const auto written = write_image(**source, directory_ / "diff", parent, {}, {});
  ASSERT_TRUE(written) << written.error().text();
  EXPECT_TRUE(contents(*open("diff").store) == changed);
  EXPECT_EQ(written->record.identity, make("whole", changed).identity);
  ASSERT_EQ(ftruncate(fd, kPageBytes), 0);
  EXPECT_FALSE(sparse_difference(base.store, base.raw_bytes, sparse));
  close(fd);
}

// ---- damage ---------------------------------------------------------------------------------------------

TEST_F(Images, AnImageThatIsCutShortAnywhereIsRefused) {
  const Bytes memory(memory_.begin(), memory_.begin() + 64 * kPageBytes);
  make("image", memory);
  const Bytes file = read_file(directory_ / "image");
  for (std::size_t bytes = 4; bytes < file.size(); bytes += 1 + bytes / 50) {
    write_file(directory_ / "cut", std::span(file).first(bytes));
    ASSERT_NE(complaint("cut"), "opened") << bytes;
  }
  write_file(directory_ / "cut", std::span(file).first(2 * kPageBytes));
  EXPECT_NE(complaint("cut").find("cannot be told"), std::string::npos) << complaint("cut");
}

TEST_F(Images, AChangedByteAnywhereIsAnErrorAndNeverAWrongByte) {
  const Bytes memory(memory_.begin(), memory_.begin() + 64 * kPageBytes);
  make("image", memory, {}, {.frame_bytes = kFrameBytesMin});
  const Bytes file = read_file(directory_ / "image");
  for (std::size_t at = 4; at < file.size(); at += 97) {
    Bytes changed = file;
    changed[at] ^= std::byte{0x04};
    write_file(directory_ / "changed", changed);
    const auto image = ImageOpener(std::make_shared<FrameCache>(ByteCount(0))).open(directory_ / "changed");
    if (!image) continue;
    std::size_t errors = 0;
    for (std::size_t page = 0; page < 64; ++page) {
      Bytes read(kPageBytes);
      if (!image->store->read(StoreOffset(page * kPageBytes), read, Wait::yes)) {
        ++errors;
      } else {
        ASSERT_EQ(std::memcmp(read.data(), memory.data() + page * kPageBytes, kPageBytes), 0) << at;
      }
    }
    ASSERT_LE(errors, 4u) << "one frame has four pages";
    const Verified verified = verify_image(*image, 1, {});
    ASSERT_EQ(verified.problems.size(), 1u) << at;
  }
}

TEST_F(Images, BytesThatArriveWrongAreAnErrorOfTheirPagesAndTheNextReadMayBeRight) {
  make("image", memory_);
  const StoreFault fault{.kind = StoreFault::Kind::corrupt, .to = StoreOffset(4096), .times = 1};
  ImageOpener opener(std::make_shared<FrameCache>(ByteCount(16 << 20)), [&](std::shared_ptr<Store> file) {
    return make_faulty_store(std::move(file), {fault});
  });
  const auto image = opener.open(directory_ / "image");
  ASSERT_TRUE(image) << image.error().text();
  Bytes page(kPageBytes);
  const auto wrong = image->store->read(StoreOffset(0), page, Wait::yes);
  ASSERT_FALSE(wrong);
  EXPECT_NE(wrong.error().message().find("read " + directory_ / "image" + " at offset 0"), std::string::npos)
      << wrong.error().message();
  const auto right = image->store->read(StoreOffset(0), page, Wait::yes);
  ASSERT_TRUE(right);
  EXPECT_EQ(std::memcmp(page.data(), memory_.data(), kPageBytes), 0);
}

TEST_F(Images, AnImageWhoseMapHidesBytesIsFoundByVerifying) {
  Bytes memory(16 * kPageBytes);
  put_page(memory, 0, 1);
  put_page(memory, 1, 2);
  make("image", memory);
  Result<OpenImage> opened = opener_.open(directory_ / "image");
  ASSERT_TRUE(opened);
  Record record = opened->layers.front()->record();
  record.runs = {{1, PageKind::stored}, {15, PageKind::zero}};
  const Bytes file = read_file(directory_ / "image");
  const std::uint64_t data = opened->layers.front()->compressed_bytes();
  const FrameEntry frame{
      .compressed_bytes = static_cast<std::uint32_t>(data), .bytes = 65536, .checksum = checksum_of(memory)};
  Bytes forged(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(data));
  const Bytes table = encode_seek_table({&frame, 1});
  const Bytes tables = *encode_record(record, table, data);
  forged.insert(forged.end(), tables.begin(), tables.end());
  forged.insert(forged.end(), table.begin(), table.end());
  write_file(directory_ / "forged", forged);
  const Verified verified = verify_image(open("forged"), 1, {});
  ASSERT_EQ(verified.problems.size(), 1u);
  EXPECT_NE(verified.problems[0].message().find("other bytes than zero at offset 4096"), std::string::npos);
}

TEST_F(Images, WhatZstdCompressedIsReadAsAStream) {
  Bytes compressed(ZSTD_compressBound(memory_.size()));
  compressed.resize(ZSTD_compress(compressed.data(), compressed.size(), memory_.data(), memory_.size(), 1));
  write_file(directory_ / "mem.zst", compressed);
  auto source = memory_from_zstd(directory_ / "mem.zst");
  ASSERT_TRUE(source);
  ASSERT_TRUE(write_image(**source, directory_ / "image", std::nullopt, {}, {}));
  EXPECT_TRUE(contents(*open("image").store) == memory_);

  write_file(directory_ / "cut.zst", std::span(compressed).first(compressed.size() - 10));
  source = memory_from_zstd(directory_ / "cut.zst");
  ASSERT_TRUE(source);
  const auto written = write_image(**source, directory_ / "other", std::nullopt, {}, {});
  ASSERT_FALSE(written);
  EXPECT_NE(written.error().message().find("ends within a frame"), std::string::npos);
}

TEST_F(Images, ManyThreadsThatReadOneImageGetTheirBytes) {
  make("image", memory_);
  const OpenImage image = open("image");
  std::atomic<int> wrong = 0;
  {
    std::vector<std::jthread> readers;
    for (std::size_t thread = 0; thread < 4; ++thread)
      readers.emplace_back([&, thread] {
        Bytes page(kPageBytes);
        for (std::size_t i = 0; i < kPages; ++i) {
          const std::size_t at = (i * 5 + thread * 512) % kPages * kPageBytes;
          const auto read = image.store->read(StoreOffset(at), page, Wait::yes);
          wrong += !read || std::memcmp(page.data(), memory_.data() + at, kPageBytes) != 0;
        }
      });
  }
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace uffdkit::image
