#include <uffdkit/faulty_store.h>

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <utility>

namespace uffdkit {
namespace {

constexpr std::uint64_t kPageBytes = 4096;
// How often a stalled read looks whether it may go on.
constexpr std::chrono::milliseconds kStallLook{5};

// splitmix64: every bit of the result depends on every bit of the input.
std::uint64_t mixed(std::uint64_t value) {
  value += 0x9e37'79b9'7f4a'7c15;
  value = (value ^ (value >> 30)) * 0xbf58'476d'1ce4'e5b9;
  value = (value ^ (value >> 27)) * 0x94d0'49bb'1331'11eb;
  return value ^ (value >> 31);
}

// From 0 to below 1.
double chance(std::uint64_t seed, std::uint64_t page, std::uint64_t read) {
  return static_cast<double>(mixed(mixed(mixed(seed) ^ page) ^ read) >> 11) * 0x1p-53;
}

bool exists(const std::string& path) {
  return ::access(path.c_str(), F_OK) == 0;
}

class FaultyStore final : public Store {
 public:
  FaultyStore(std::shared_ptr<Store> store, std::vector<StoreFault> faults)
      : store_(std::move(store)), faults_(std::move(faults)), reads_(faults_.size()) {}

  ByteCount size() const noexcept override { return store_->size(); }
  std::string name() const override { return store_->name(); }
  Extent extent_at(StoreOffset from) const noexcept override { return store_->extent_at(from); }

  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    // What is concerned is read where it may wait, so that each read is hit or not exactly once.
    if (wait == Wait::no)
      return concerns_any(from, to.size()) ? ReadStatus::would_block : store_->read(from, to, wait);
    std::optional<Error> error;
    for (std::size_t i = 0; i < faults_.size(); ++i)
      if (const StoreFault& fault = faults_[i]; fault.kind != StoreFault::Kind::corrupt)
        if (const auto page = first_hit(i, from, to.size()); page && !error) error = suffer(fault, *page);
    if (error) return Failure(*std::move(error));
    Result<ReadStatus> read = store_->read(from, to, wait);
    if (!read || *read != ReadStatus::done) return read;
    for (std::size_t i = 0; i < faults_.size(); ++i)
      if (faults_[i].kind == StoreFault::Kind::corrupt) corrupt(i, from, to);
    return read;
  }

 private:
  static bool concerns(const StoreFault& fault, std::uint64_t page) {
    return page + kPageBytes > fault.from.value && page < fault.to.value;
  }

  bool concerns_any(StoreOffset from, std::uint64_t bytes) const {
    return std::ranges::any_of(faults_, [&](const StoreFault& fault) {
      return from.value + bytes > fault.from.value && from.value < fault.to.value;
    });
  }

  // Whether this read of the page is hit. Counts it.
  bool hits(std::size_t index, std::uint64_t page) {
    const StoreFault& fault = faults_[index];
    if (!concerns(fault, page)) return false;
    if (!fault.only_while.empty() && !exists(fault.only_while)) return false;
    std::uint64_t before = 0;
    {
      const std::lock_guard lock(mutex_);
      before = reads_[index][page]++;
    }
    if (fault.times == 0) return chance(fault.seed, page, before) < fault.rate;
    return before < fault.times && chance(fault.seed, page, 0) < fault.rate;
  }

  // The first page of a read that is hit; all of its pages are counted.
  std::optional<std::uint64_t> first_hit(std::size_t index, StoreOffset from, std::uint64_t bytes) {
    std::optional<std::uint64_t> first;
    const std::uint64_t end = from.value + bytes;
    for (std::uint64_t page = from.value / kPageBytes * kPageBytes; page < end; page += kPageBytes)
      if (hits(index, page) && !first) first = page;
    return first;
  }

  std::optional<Error> suffer(const StoreFault& fault, std::uint64_t page) {
    switch (fault.kind) {
      case StoreFault::Kind::error:
        return Error(fmt::format("read {} at offset {}: an injected error", name(), page), EIO);
      case StoreFault::Kind::short_read:
        return Error(fmt::format("read {} at offset {}: an injected short read of {} bytes", name(), page,
                                 kPageBytes / 2),
                     EIO);
      case StoreFault::Kind::delay:
        std::this_thread::sleep_for(fault.delay);
        return std::nullopt;
      case StoreFault::Kind::stall:
        while (fault.only_while.empty() || exists(fault.only_while)) std::this_thread::sleep_for(kStallLook);
        return std::nullopt;
      case StoreFault::Kind::corrupt:
        break;
    }
    return std::nullopt;
  }

  void corrupt(std::size_t index, StoreOffset from, std::span<std::byte> bytes) {
    for (std::size_t at = 0; at < bytes.size();) {
      const std::uint64_t page = (from.value + at) / kPageBytes * kPageBytes;
      const std::size_t end = std::min<std::uint64_t>(bytes.size(), page + kPageBytes - from.value);
      const std::uint64_t where = mixed(faults_[index].seed ^ page);
      if (hits(index, page))
        bytes[at + where % (end - at)] ^= static_cast<std::byte>(1u << (where >> 32) % 8);
      at = end;
    }
  }

  const std::shared_ptr<Store> store_;
  const std::vector<StoreFault> faults_;
  std::mutex mutex_;
  // How often each page was read, by fault: as much memory as what it is used on deserves.
  std::vector<std::unordered_map<std::uint64_t, std::uint64_t>> reads_;
};

Failure refuse(std::string_view text, const std::string& what) {
  return Failure(Error(fmt::format("store fault '{}': {}", text, what), EINVAL)
                     .with_remedy("for example: error,rate=0.1,from=1M,to=2M,seed=7"));
}

// A whole number; `scaled` ones may end in K, M or G.
std::optional<std::uint64_t> number(std::string_view text, bool scaled) {
  unsigned shift = 0;
  if (scaled && !text.empty()) {
    const auto unit = std::string_view("KMG").find(text.back());
    if (unit != std::string_view::npos) {
      shift = 10 * (static_cast<unsigned>(unit) + 1);
      text.remove_suffix(1);
    }
  }
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  if (value > UINT64_MAX >> shift) return std::nullopt;
  return value << shift;
}

std::optional<StoreFault::Kind> kind_of(std::string_view word) {
  using Kind = StoreFault::Kind;
  if (word == "error") return Kind::error;
  if (word == "short") return Kind::short_read;
  if (word == "corrupt") return Kind::corrupt;
  if (word == "delay") return Kind::delay;
  if (word == "stall") return Kind::stall;
  return std::nullopt;
}

// Puts one KEY=VALUE in; what is wrong with it, if anything.
std::string apply(StoreFault& fault, std::string_view key, std::string_view value) {
  if (value.empty()) return fmt::format("'{}' has no value", key);
  if (key == "image") return fault.image = value, "";
  if (key == "while") return fault.only_while = value, "";
  if (key == "rate") {
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), fault.rate);
    const bool good = error == std::errc() && end == value.data() + value.size();
    return good && fault.rate >= 0 && fault.rate <= 1 ? "" : "rate is not from 0 to 1";
  }
  const bool is_offset = key == "from" || key == "to";
  const std::optional<std::uint64_t> count = number(value, is_offset);
  if (!count) return fmt::format("'{}' is no whole number", value);
  if (key == "from") return fault.from = StoreOffset(*count), "";
  if (key == "to") return fault.to = StoreOffset(*count), "";
  if (key == "times") return fault.times = *count, *count == 0 ? "times is 0" : "";
  if (key == "seed") return fault.seed = *count, "";
  if (key != "ms") return fmt::format("there is no key '{}'", key);
  constexpr std::uint64_t kDelayMsMax = 86'400'000;  // a day
  if (*count > kDelayMsMax) return fmt::format("ms is more than {}", kDelayMsMax);
  fault.delay = std::chrono::milliseconds(*count);
  return "";
}

}  // namespace

Result<StoreFault> parse_store_fault(std::string_view text) {
  const auto word_of = [](std::string_view& rest) {
    const std::string_view word = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(rest.size(), word.size() + 1));
    return word;
  };
  std::string_view rest = text;
  const std::optional<StoreFault::Kind> kind = kind_of(word_of(rest));
  if (!kind) return refuse(text, "it does not begin with error, short, corrupt, delay or stall");
  StoreFault fault{.kind = *kind};
  while (!rest.empty()) {
    const std::string_view word = word_of(rest);
    const std::size_t equals = word.find('=');
    if (equals == std::string_view::npos) return refuse(text, fmt::format("'{}' is not KEY=VALUE", word));
    const std::string wrong = apply(fault, word.substr(0, equals), word.substr(equals + 1));
    if (!wrong.empty()) return refuse(text, wrong);
  }
  if (fault.from >= fault.to) return refuse(text, "from is not below to");
  return fault;
}

std::shared_ptr<Store> make_faulty_store(std::shared_ptr<Store> store,
                                         const std::vector<StoreFault>& faults) {
  std::vector<StoreFault> own;
  for (const StoreFault& fault : faults)
    if (store->name().find(fault.image) != std::string::npos) own.push_back(fault);
  if (own.empty()) return store;
  return std::make_shared<FaultyStore>(std::move(store), std::move(own));
}

}  // namespace uffdkit
