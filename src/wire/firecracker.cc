#include "wire/firecracker.h"

#include <fmt/format.h>

#include <cerrno>
#include <nlohmann/json.hpp>
#include <string_view>

namespace uffdkit {
namespace {

using Json = nlohmann::json;

// An array of flat objects needs 2; what a later version may put inside them is not looked at.
constexpr std::size_t kDepthMax = 16;
constexpr std::uint64_t kPageSizeDefault = 4096;

bool is_space(char c) {
  return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

Failure refuse(std::string what) {
  return Failure(Error(std::move(what), EPROTO).within("Firecracker handshake"));
}

// A value as the log shall show it: what a peer sends may be long and is not to be trusted.
std::string excerpt(const Json& value) {
  constexpr std::size_t kShown = 40;
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kShown) text = text.substr(0, kShown) + "...";
  return text;
}

Result<std::uint64_t> number(std::size_t region, const char* key, const Json& value) {
  if (value.is_number_unsigned()) return value.get<std::uint64_t>();
  return refuse(
      fmt::format("region {}: {} is {}, not a whole number from 0 to 2^64 - 1", region, key, excerpt(value)));
}

Result<std::uint64_t> required_number(std::size_t region, const char* key, const Json& object) {
  const auto found = object.find(key);
  if (found == object.end()) return refuse(fmt::format("region {}: {} is missing", region, key));
  return number(region, key, *found);
}

Result<std::uint64_t> page_size_of(std::size_t region, const Json& object) {
  constexpr const char* kKey = "page_size";
  constexpr const char* kOldKey = "page_size_kib";
  const auto found = object.find(kKey);
  const auto found_old = object.find(kOldKey);
  if (found == object.end() && found_old == object.end()) return kPageSizeDefault;
  if (found_old == object.end()) return number(region, kKey, *found);
  const Result<std::uint64_t> old_value = number(region, kOldKey, *found_old);
  if (found == object.end() || !old_value) return old_value;
  const Result<std::uint64_t> value = number(region, kKey, *found);
  if (value && *value != *old_value)
    return refuse(fmt::format("region {}: page_size is {} but page_size_kib is {}; both are in bytes", region,
                              *value, *old_value));
  return value;
}

Result<RequestedRegion> region_of(std::size_t region, const Json& object) {
  if (!object.is_object())
    return refuse(fmt::format("region {}: {} is not an object", region, excerpt(object)));
  const Result<std::uint64_t> address = required_number(region, "base_host_virt_addr", object);
  if (!address) return Failure(address.error());
  const Result<std::uint64_t> size = required_number(region, "size", object);
  if (!size) return Failure(size.error());
  const Result<std::uint64_t> offset = required_number(region, "offset", object);
  if (!offset) return Failure(offset.error());
  const Result<std::uint64_t> page_bytes = page_size_of(region, object);
  if (!page_bytes) return Failure(page_bytes.error());
  const std::optional<PageSize> page_size = served_page_size(*page_bytes);
  if (!page_size)
    return refuse(fmt::format("region {}: page size {} is not served, only {} and {}", region, *page_bytes,
                              kPage4K.bytes().value, kPage2M.bytes().value));
  return RequestedRegion{.memory = {Address(*address), ByteCount(*size)},
                         .offset = StoreOffset(*offset),
                         .page_size = *page_size};
}

}  // namespace

// Looks at the bytes from `from` on, once: how deep they are nested, and whether they lie in a string.
// Whether they are JSON is for the parser to say.
Result<std::optional<std::size_t>> FirecrackerDecoder::find_end(std::size_t from) {
  for (std::size_t i = from; i < text_.size(); ++i) {
    const char c = text_[i];
    if (depth_ == 0) {
      if (is_space(c)) continue;
      if (c != '[') return refuse("does not begin with a JSON array");
      depth_ = 1;
    } else if (in_string_) {
      if (escaped_)
        escaped_ = false;
      else if (c == '\\')
        escaped_ = true;
      else if (c == '"')
        in_string_ = false;
    } else if (c == '"') {
      in_string_ = true;
    } else if (c == '[' || c == '{') {
      if (++depth_ > kDepthMax) return refuse(fmt::format("nested more than {} deep", kDepthMax));
    } else if (c == ']' || c == '}') {
      if (--depth_ == 0) return i + 1;
    }
  }
  return std::nullopt;
}

Result<FirecrackerHandshake> FirecrackerDecoder::finish() {
  const Json array = Json::parse(text_, nullptr, /*allow_exceptions=*/false);
  if (array.is_discarded()) return refuse("not valid JSON");
  if (array.size() > kRegionsMax)
    return refuse(fmt::format("{} regions, more than the limit of {}", array.size(), kRegionsMax));
  FirecrackerHandshake handshake;
  handshake.request.image = std::move(image_);
  for (const Json& object : array) {
    Result<RequestedRegion> region = region_of(handshake.request.regions.size(), object);
    if (!region) return Failure(std::move(region).error());
    handshake.request.regions.push_back(*region);
  }
  if (!uffd_) return refuse("no descriptor came with it; one was expected, the userfaultfd");
  handshake.uffd = std::move(uffd_);
  handshake.fds_closed = fds_closed_;
  return handshake;
}

Result<std::optional<FirecrackerHandshake>> FirecrackerDecoder::feed(Piece piece) {
  if (piece.fds_lost)
    return refuse(
        "descriptors were lost on the way; too many were sent, or the limit of open files is reached");
  for (UniqueFd& fd : piece.fds) {
    if (!uffd_ && !done_)
      uffd_ = std::move(fd);
    else
      ++fds_closed_;
  }
  const std::string_view bytes(reinterpret_cast<const char*>(piece.bytes.data()), piece.bytes.size());
  if (done_) {
    for (const char c : bytes)
      if (!is_space(c)) return refuse("bytes after the array");
    return std::nullopt;
  }
  if (piece.end)
    return refuse(fmt::format("the connection ended after {} bytes, before the array did", text_.size()));
  if (bytes.size() > kHandshakeBytesMax - text_.size())
    return refuse(fmt::format("longer than {} bytes", kHandshakeBytesMax));

  const std::size_t looked_at = text_.size();
  text_ += bytes;
  const Result<std::optional<std::size_t>> end = find_end(looked_at);
  if (!end) return Failure(end.error());
  const std::optional<std::size_t> array_end = *end;
  if (!array_end) return std::nullopt;
  for (std::size_t i = *array_end; i < text_.size(); ++i)
    if (!is_space(text_[i])) return refuse("bytes after the array");
  done_ = true;
  Result<FirecrackerHandshake> handshake = finish();
  text_.clear();
  text_.shrink_to_fit();
  if (!handshake) return Failure(std::move(handshake).error());
  return std::optional(std::move(*handshake));
}

}  // namespace uffdkit
