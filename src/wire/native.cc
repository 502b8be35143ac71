#include "wire/native.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "base/check.h"

namespace uffdkit::native {
namespace {

constexpr std::size_t kRegionBytes = 32;
constexpr std::size_t kRangeBytes = 16;

// What the header's type says. Requests count from 1, answers from 0x81.
enum class Type : std::uint16_t {
  hello = 1,
  image_info = 2,
  attach = 3,
  resume = 4,
  add_regions = 5,
  drop_regions = 6,
  detach = 7,
  query = 8,
  share_image = 9,
  welcome = 0x81,
  image_size = 0x82,
  attached = 0x83,
  ok = 0x84,
  status = 0x85,
  image_memory = 0x86,
  refused = 0xff,
};

template <class... Fs>
struct Overloaded : Fs... {
  using Fs::operator()...;
};

Failure broken(std::string what) {
  return Failure(Error(std::move(what), EPROTO).within("native protocol"));
}

// How many descriptors a frame of this type carries; nothing for types that are not known.
std::optional<std::size_t> fds_of(std::uint16_t type, FrameReader::Reads reads) {
  const bool requests = reads == FrameReader::Reads::requests;
  switch (static_cast<Type>(type)) {
    case Type::attach:
      if (requests) return 1;
      break;
    case Type::resume:
      if (requests) return 2;
      break;
    case Type::hello:
    case Type::image_info:
    case Type::add_regions:
    case Type::drop_regions:
    case Type::detach:
    case Type::query:
    case Type::share_image:
      if (requests) return 0;
      break;
    case Type::attached:
    case Type::image_memory:
      if (!requests) return 1;
      break;
    case Type::welcome:
    case Type::image_size:
    case Type::ok:
    case Type::status:
    case Type::refused:
      if (!requests) return 0;
      break;
  }
  return std::nullopt;
}

// ---- writing --------------------------------------------------------------------------------------------

template <class Number>
void write_at(std::byte* to, Number value) {
  for (std::size_t i = 0; i < sizeof(Number); ++i)
    to[i] = static_cast<std::byte>(static_cast<std::uint64_t>(value) >> (8 * i));
}

class Writer {
 public:
  Writer(Type type, std::uint32_t request_id) {
    put(kMagic);
    put(kVersion);
    put(static_cast<std::uint16_t>(type));
    put(std::uint32_t{0});  // the payload's length, when it is known
    put(request_id);
  }

  template <class Number>
  Writer& put(Number value) {
    const std::size_t at = frame_.bytes.size();
    frame_.bytes.resize(at + sizeof value);
    write_at(frame_.bytes.data() + at, value);
    return *this;
  }
  Writer& put_flags() { return put(std::uint32_t{0}); }
  Writer& put_text(std::string_view text) {
    put(static_cast<std::uint16_t>(text.size()));
    const auto bytes = std::as_bytes(std::span(text));
    frame_.bytes.insert(frame_.bytes.end(), bytes.begin(), bytes.end());
    return *this;
  }
  Writer& put_regions(std::span<const RequestedRegion> regions) {
    for (const RequestedRegion& region : regions) {
      put(region.memory.start.value).put(region.memory.length.value).put(region.offset.value);
      put(static_cast<std::uint32_t>(region.page_size.bytes().value)).put_flags();
    }
    return *this;
  }
  Writer& put_fd(UniqueFd fd) {
    frame_.fds.push_back(std::move(fd));
    return *this;
  }

  OutgoingFrame finish() {
    const std::size_t payload = frame_.bytes.size() - kHeaderBytes;
    CHECK(payload <= kPayloadBytesMax);
    write_at(frame_.bytes.data() + 8, static_cast<std::uint32_t>(payload));
    return std::move(frame_);
  }

 private:
  OutgoingFrame frame_;
};

std::uint32_t count_of(std::size_t entries) {
  CHECK(entries <= kRegionsMax);
  return static_cast<std::uint32_t>(entries);
}

// ---- reading --------------------------------------------------------------------------------------------

template <class Number>
Number read_at(const std::byte* from) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < sizeof(Number); ++i)
    value |= std::to_integer<std::uint64_t>(from[i]) << (8 * i);
  return static_cast<Number>(value);
}

// Takes a payload apart. The first thing that is wrong is kept; what is read after it is 0 or empty, so that
// a decoder may read on and ask once, in the end.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> payload) : rest_(payload) {}

  template <class Number>
  Number get() {
    if (rest_.size() < sizeof(Number)) {
      fail("payload is too short");
      rest_ = {};
      return 0;
    }
    const Number value = read_at<Number>(rest_.data());
    rest_ = rest_.subspan(sizeof(Number));
    return value;
  }

  // Reserved for later versions.
  template <class Number>
  void get_zero(const char* what) {
    if (const Number value = get<Number>(); value != 0)
      fail(fmt::format("{} is {:#x}, but no bit of it is defined", what, value));
  }

  std::string get_text(std::size_t bytes_max) {
    const auto bytes = get<std::uint16_t>();
    if (bytes > bytes_max)
      fail(fmt::format("a text of {} bytes, more than the limit of {}", bytes, bytes_max));
    if (bytes > rest_.size()) fail("payload is too short for its text");
    if (failed()) return {};
    std::string text(reinterpret_cast<const char*>(rest_.data()), bytes);
    rest_ = rest_.subspan(bytes);
    return text;
  }

  std::string get_image_name() {
    std::string name = get_text(kImageNameBytesMax);
    if (name.empty()) fail("image name is empty");
    if (name.find('\0') != std::string::npos) fail("image name has a zero byte");
    return name;
  }

  // A count of entries of so many bytes; 0 after an error.
  std::uint32_t get_count(std::size_t entry_bytes) {
    const auto count = get<std::uint32_t>();
    if (count == 0) fail("count is 0");
    if (count > kRegionsMax) fail(fmt::format("count is {}, more than the limit of {}", count, kRegionsMax));
    if (!failed() && count * entry_bytes > rest_.size()) fail("payload is too short for its count");
    return failed() ? 0 : count;
  }

  std::vector<RequestedRegion> get_regions(std::uint32_t count) {
    std::vector<RequestedRegion> regions;
    for (std::uint32_t i = 0; i < count && !failed(); ++i) {
      const Address start(get<std::uint64_t>());
      const ByteCount length(get<std::uint64_t>());
      const StoreOffset offset(get<std::uint64_t>());
      const auto page_bytes = get<std::uint32_t>();
      get_zero<std::uint32_t>("a region's flags word");
      const std::optional<PageSize> page_size = served_page_size(page_bytes);
      if (!page_size) fail(fmt::format("region {}: page size {} is not served", i, page_bytes));
      regions.push_back(
          {.memory = {start, length}, .offset = offset, .page_size = page_size.value_or(kPage4K)});
    }
    return regions;
  }

  void fail(std::string what) {
    if (!error_) error_ = std::move(what);
  }
  bool failed() const { return error_.has_value(); }

  // What was read, if all was right and nothing is left.
  template <class Value>
  Result<Value> finish(const char* frame, Value value) {
    if (!failed() && !rest_.empty()) fail(fmt::format("{} bytes too many", rest_.size()));
    if (error_) return broken(fmt::format("{}: {}", frame, *error_));
    return value;
  }

 private:
  std::span<const std::byte> rest_;
  std::optional<std::string> error_;
};

Result<Request> decode_hello(Reader& reader) {
  const auto version_min = reader.get<std::uint16_t>();
  const auto version_max = reader.get<std::uint16_t>();
  reader.get_zero<std::uint32_t>("flags word");
  if (version_min > version_max) reader.fail("its lowest version is above its highest");
  return reader.finish<Request>("HELLO", Hello{.version_min = version_min, .version_max = version_max});
}

Result<Request> decode_image_info(Reader& reader) {
  reader.get_zero<std::uint32_t>("flags word");
  ImageInfo info{.image = reader.get_image_name()};
  return reader.finish<Request>("IMAGE_INFO", std::move(info));
}

SharingMode get_sharing_mode(Reader& reader) {
  const auto mode = reader.get<std::uint32_t>();
  if (mode > static_cast<std::uint32_t>(SharingMode::resolve))
    reader.fail(fmt::format("sharing mode {} is not defined", mode));
  return static_cast<SharingMode>(mode);
}

Result<Request> decode_attach(Reader& reader, std::vector<UniqueFd> fds) {
  const SharingMode sharing = get_sharing_mode(reader);
  const std::uint32_t count = reader.get_count(kRegionBytes);
  CHECK(fds.size() == 1);
  Attach attach{.request = {.image = {}, .regions = reader.get_regions(count)},
                .uffd = std::move(fds[0]),
                .sharing = sharing};
  attach.request.image = reader.get_image_name();
  return reader.finish<Request>("ATTACH", std::move(attach));
}

Result<Request> decode_resume(Reader& reader, std::vector<UniqueFd> fds) {
  reader.get_zero<std::uint32_t>("flags word");
  reader.get_zero<std::uint32_t>("reserved word");
  const SessionId session{reader.get<std::uint64_t>()};
  CHECK(fds.size() == 2);
  return reader.finish<Request>(
      "RESUME", Resume{.session = session, .uffd = std::move(fds[0]), .state_file = std::move(fds[1])});
}

Result<Request> decode_add_regions(Reader& reader) {
  reader.get_zero<std::uint32_t>("flags word");
  const std::uint32_t count = reader.get_count(kRegionBytes);
  return reader.finish<Request>("ADD_REGIONS", AddRegions{.regions = reader.get_regions(count)});
}

Result<Request> decode_drop_regions(Reader& reader) {
  reader.get_zero<std::uint32_t>("flags word");
  DropRegions drop;
  const std::uint32_t count = reader.get_count(kRangeBytes);
  for (std::uint32_t i = 0; i < count; ++i) {
    const Address start(reader.get<std::uint64_t>());
    drop.ranges.push_back({start, ByteCount(reader.get<std::uint64_t>())});
  }
  return reader.finish<Request>("DROP_REGIONS", std::move(drop));
}

Result<Request> decode_detach(Reader& reader) {
  reader.get_zero<std::uint32_t>("flags word");
  const auto mode = static_cast<DetachMode>(reader.get<std::uint32_t>());
  if (mode != DetachMode::populate && mode != DetachMode::release)
    reader.fail(fmt::format("mode {} is not defined", static_cast<std::uint32_t>(mode)));
  return reader.finish<Request>("DETACH", Detach{.mode = mode});
}

Result<Request> decode_query(Reader& reader) {
  reader.get_zero<std::uint32_t>("flags word");
  return reader.finish<Request>("QUERY", Query{});
}

constexpr std::uint32_t kRemovedReadsZero = 1;

Result<Request> decode_share_image(Reader& reader) {
  const auto flags = reader.get<std::uint32_t>();
  if ((flags & ~kRemovedReadsZero) != 0) reader.fail(fmt::format("flags word is {:#x}", flags));
  ShareImage share{.image = reader.get_image_name(), .removed_reads_zero = flags != 0};
  return reader.finish<Request>("SHARE_IMAGE", std::move(share));
}

Result<Answer> decode_welcome(Reader& reader) {
  const auto version = reader.get<std::uint16_t>();
  reader.get_zero<std::uint16_t>("reserved word");
  reader.get_zero<std::uint32_t>("flags word");
  const auto features = reader.get<std::uint64_t>();
  return reader.finish<Answer>("WELCOME", Welcome{.version = version, .features = features});
}

Result<Answer> decode_image_size(Reader& reader) {
  const ByteCount size(reader.get<std::uint64_t>());
  return reader.finish<Answer>("IMAGE_SIZE", ImageSize{.size = size});
}

Result<Answer> decode_attached(Reader& reader, std::vector<UniqueFd> fds) {
  const SessionId session{reader.get<std::uint64_t>()};
  const ByteCount image_size(reader.get<std::uint64_t>());
  const auto regions = reader.get<std::uint32_t>();
  reader.get_zero<std::uint32_t>("flags word");
  CHECK(fds.size() == 1);
  return reader.finish<Answer>(
      "ATTACHED",
      Attached{
          .session = session, .image_size = image_size, .regions = regions, .state_file = std::move(fds[0])});
}

Result<Answer> decode_status(Reader& reader) {
  const auto served = reader.get<std::uint64_t>();
  const auto pending = reader.get<std::uint64_t>();
  return reader.finish<Answer>("STATUS", Status{.pages_served = served, .faults_pending = pending});
}

Result<Answer> decode_image_memory(Reader& reader, std::vector<UniqueFd> fds) {
  const ByteCount size(reader.get<std::uint64_t>());
  const SharingMode mode = get_sharing_mode(reader);
  reader.get_zero<std::uint32_t>("flags word");
  if (mode == SharingMode::none) reader.fail("it does not say how the image is shared");
  CHECK(fds.size() == 1);
  return reader.finish<Answer>("IMAGE_MEMORY",
                               ImageMemory{.size = size, .mode = mode, .memory = std::move(fds[0])});
}

Result<Answer> decode_refused(Reader& reader) {
  const auto code = static_cast<ErrorCode>(reader.get<std::uint32_t>());
  Refused refused{.code = code, .message = reader.get_text(kErrorMessageBytesMax)};
  return reader.finish<Answer>("ERROR", std::move(refused));
}

// A header's fields, checked as far as it goes.
struct Header {
  std::uint16_t type;
  std::uint32_t payload_bytes;
  std::uint32_t request_id;
};

Result<Header> decode_header(std::span<const std::byte> bytes) {
  const auto magic = read_at<std::uint32_t>(bytes.data());
  const auto version = read_at<std::uint16_t>(bytes.data() + 4);
  const Header header{.type = read_at<std::uint16_t>(bytes.data() + 6),
                      .payload_bytes = read_at<std::uint32_t>(bytes.data() + 8),
                      .request_id = read_at<std::uint32_t>(bytes.data() + 12)};
  if (magic != kMagic)
    return broken(fmt::format("a frame begins with {:#010x}, not {:#010x}", magic, kMagic));
  if (version != kVersion) return broken(fmt::format("a frame of version {}, not {}", version, kVersion));
  if (header.payload_bytes > kPayloadBytesMax)
    return broken(fmt::format("a payload of {} bytes, more than the limit of {}", header.payload_bytes,
                              kPayloadBytesMax));
  return header;
}

}  // namespace

std::string to_string(ErrorCode code) {
  switch (code) {
    case ErrorCode::protocol:
      return "protocol error";
    case ErrorCode::unsupported:
      return "unsupported";
    case ErrorCode::version:
      return "no common version";
    case ErrorCode::no_such_image:
      return "no such image";
    case ErrorCode::not_permitted:
      return "not permitted";
    case ErrorCode::invalid:
      return "invalid";
    case ErrorCode::bad_descriptor:
      return "bad descriptor";
    case ErrorCode::busy:
      return "busy";
    case ErrorCode::no_such_session:
      return "no such session";
    case ErrorCode::limit:
      return "limit reached";
    case ErrorCode::shutting_down:
      return "shutting down";
    case ErrorCode::internal:
      return "internal error";
  }
  return fmt::format("error {}", static_cast<std::uint32_t>(code));
}

std::vector<int> OutgoingFrame::fd_numbers() const {
  std::vector<int> numbers;
  numbers.reserve(fds.size());
  for (const UniqueFd& fd : fds) numbers.push_back(fd.get());
  return numbers;
}

OutgoingFrame encode_request(std::uint32_t request_id, Request request) {
  const auto name_fits = [](const std::string& name) {
    return !name.empty() && name.size() <= kImageNameBytesMax;
  };
  return std::visit(
      Overloaded{
          [&](Hello& hello) {
            return Writer(Type::hello, request_id)
                .put(hello.version_min)
                .put(hello.version_max)
                .put_flags()
                .finish();
          },
          [&](ImageInfo& info) {
            CHECK(name_fits(info.image));
            return Writer(Type::image_info, request_id).put_flags().put_text(info.image).finish();
          },
          [&](Attach& attach) {
            CHECK(name_fits(attach.request.image));
            return Writer(Type::attach, request_id)
                .put(static_cast<std::uint32_t>(attach.sharing))
                .put(count_of(attach.request.regions.size()))
                .put_regions(attach.request.regions)
                .put_text(attach.request.image)
                .put_fd(std::move(attach.uffd))
                .finish();
          },
          [&](Resume& resume) {
            return Writer(Type::resume, request_id)
                .put_flags()
                .put_flags()
                .put(static_cast<std::uint64_t>(resume.session))
                .put_fd(std::move(resume.uffd))
                .put_fd(std::move(resume.state_file))
                .finish();
          },
          [&](AddRegions& add) {
            return Writer(Type::add_regions, request_id)
                .put_flags()
                .put(count_of(add.regions.size()))
                .put_regions(add.regions)
                .finish();
          },
          [&](DropRegions& drop) {
            Writer writer(Type::drop_regions, request_id);
            writer.put_flags().put(count_of(drop.ranges.size()));
            for (const AddressRange& range : drop.ranges)
              writer.put(range.start.value).put(range.length.value);
            return writer.finish();
          },
          [&](Detach& detach) {
            return Writer(Type::detach, request_id)
                .put_flags()
                .put(static_cast<std::uint32_t>(detach.mode))
                .finish();
          },
          [&](Query&) { return Writer(Type::query, request_id).put_flags().finish(); },
          [&](ShareImage& share) {
            CHECK(name_fits(share.image));
            return Writer(Type::share_image, request_id)
                .put(share.removed_reads_zero ? kRemovedReadsZero : 0)
                .put_text(share.image)
                .finish();
          },
          [&](Unsupported&) -> OutgoingFrame {
            CHECK(false && "a request that is not known cannot be sent");
            return {};
          },
      },
      request);
}

OutgoingFrame encode_answer(std::uint32_t request_id, Answer answer) {
  return std::visit(
      Overloaded{
          [&](Welcome& welcome) {
            return Writer(Type::welcome, request_id)
                .put(welcome.version)
                .put(std::uint16_t{0})
                .put_flags()
                .put(welcome.features)
                .finish();
          },
          [&](ImageSize& size) { return Writer(Type::image_size, request_id).put(size.size.value).finish(); },
          [&](Attached& attached) {
            return Writer(Type::attached, request_id)
                .put(static_cast<std::uint64_t>(attached.session))
                .put(attached.image_size.value)
                .put(attached.regions)
                .put_flags()
                .put_fd(std::move(attached.state_file))
                .finish();
          },
          [&](Ok&) { return Writer(Type::ok, request_id).finish(); },
          [&](Status& status) {
            return Writer(Type::status, request_id)
                .put(status.pages_served)
                .put(status.faults_pending)
                .finish();
          },
          [&](ImageMemory& memory) {
            return Writer(Type::image_memory, request_id)
                .put(memory.size.value)
                .put(static_cast<std::uint32_t>(memory.mode))
                .put_flags()
                .put_fd(std::move(memory.memory))
                .finish();
          },
          [&](Refused& refused) {
            return Writer(Type::refused, request_id)
                .put(static_cast<std::uint32_t>(refused.code))
                .put_text(std::string_view(refused.message).substr(0, kErrorMessageBytesMax))
                .finish();
          },
      },
      answer);
}

Result<Request> decode_request(Frame frame) {
  Reader reader(frame.payload);
  switch (static_cast<Type>(frame.type)) {
    case Type::hello:
      return decode_hello(reader);
    case Type::image_info:
      return decode_image_info(reader);
    case Type::attach:
      return decode_attach(reader, std::move(frame.fds));
    case Type::resume:
      return decode_resume(reader, std::move(frame.fds));
    case Type::add_regions:
      return decode_add_regions(reader);
    case Type::drop_regions:
      return decode_drop_regions(reader);
    case Type::detach:
      return decode_detach(reader);
    case Type::query:
      return decode_query(reader);
    case Type::share_image:
      return decode_share_image(reader);
    default:
      return Unsupported{.type = frame.type};
  }
}

Result<Answer> decode_answer(Frame frame) {
  Reader reader(frame.payload);
  switch (static_cast<Type>(frame.type)) {
    case Type::welcome:
      return decode_welcome(reader);
    case Type::image_size:
      return decode_image_size(reader);
    case Type::attached:
      return decode_attached(reader, std::move(frame.fds));
    case Type::ok:
      return reader.finish<Answer>("OK", Ok{});
    case Type::status:
      return decode_status(reader);
    case Type::image_memory:
      return decode_image_memory(reader, std::move(frame.fds));
    case Type::refused:
      return decode_refused(reader);
    default:
      return broken(fmt::format("type {:#x} is no answer", frame.type));
  }
}

Result<std::vector<Frame>> FrameReader::feed(Piece piece) {
  if (piece.fds_lost)
    return broken(
        "descriptors were lost on the way; too many were sent, or the limit of open files is reached");
  if (piece.fds.size() > kFrameFdsMax - fds_.size())
    return broken(fmt::format("more than {} descriptors with one frame", kFrameFdsMax));
  std::ranges::move(piece.fds, std::back_inserter(fds_));
  buffer_.insert(buffer_.end(), piece.bytes.begin(), piece.bytes.end());

  const auto wrong_count = [this](std::uint16_t type, std::size_t expected) {
    return broken(fmt::format("a frame of type {:#x} came with {} descriptors instead of {}", type,
                              fds_.size(), expected));
  };
  std::vector<Frame> frames;
  std::size_t at = 0;
  while (buffer_.size() - at >= kHeaderBytes) {
    const std::span<const std::byte> rest = std::span(buffer_).subspan(at);
    const Result<Header> header = decode_header(rest);
    if (!header) return Failure(header.error());
    if (rest.size() - kHeaderBytes < header->payload_bytes) break;
    const std::span<const std::byte> payload = rest.subspan(kHeaderBytes, header->payload_bytes);
    const std::optional<std::size_t> expected = fds_of(header->type, reads_);
    // The kernel hands out the bytes of frames without descriptors and the first of one with some as one
    // piece.
    const bool takes = expected && *expected > 0;
    if (takes && *expected != fds_.size()) return wrong_count(header->type, *expected);
    frames.push_back({.type = header->type,
                      .request_id = header->request_id,
                      .payload = {payload.begin(), payload.end()},
                      .fds = takes ? std::exchange(fds_, {}) : std::vector<UniqueFd>()});
    at += kHeaderBytes + header->payload_bytes;
  }
  if (at == buffer_.size() && !fds_.empty() && !frames.empty()) {
    // They came with the last one then.
    if (fds_of(frames.back().type, reads_)) return wrong_count(frames.back().type, 0);
    fds_.clear();
  }
  buffer_.erase(buffer_.begin(), buffer_.begin() + static_cast<std::ptrdiff_t>(at));
  if (piece.end && !buffer_.empty()) return broken("the connection ended within a frame");
  return frames;
}

}  // namespace uffdkit::native
