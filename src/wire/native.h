// uffdkit's own protocol, version 1; docs/protocol.md gives it byte by byte.
//
// A client connects and sends requests; each has exactly one answer. A frame is a header of 16 bytes and a
// payload. Here: typed requests and answers, their encoding, and a reader that cuts a stream into frames.
// Pure but for closing descriptors: no waiting. Threads: one at a time for each object.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/sharing_mode.h>
#include <uffdkit/unique_fd.h>
#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "wire/attach_request.h"
#include "wire/piece.h"

namespace uffdkit::native {

inline constexpr std::uint32_t kMagic = 0x6b666675;  // "uffk" on the wire
inline constexpr std::uint16_t kVersion = 1;
inline constexpr std::size_t kHeaderBytes = 16;
// ATTACH is the largest: kRegionsMax regions of 32 bytes and a name.
inline constexpr std::size_t kPayloadBytesMax = std::size_t{64} << 10;
// No frame of any version carries more; RESUME carries 2. So a client cannot make the manager hold many.
inline constexpr std::size_t kFrameFdsMax = 8;
inline constexpr std::size_t kImageNameBytesMax = 1024;
inline constexpr std::size_t kErrorMessageBytesMax = 4096;

enum class SessionId : std::uint64_t {};

// ---- requests -------------------------------------------------------------------------------------------

// The first request: the versions that the client speaks, both inclusive.
struct Hello {
  std::uint16_t version_min = kVersion;
  std::uint16_t version_max = kVersion;
};
// How large is this image? So that memory can be mapped before it is attached.
struct ImageInfo {
  std::string image;
};
// Give this client memory that holds the image and is shared with all who ask for it.
struct ShareImage {
  std::string image;
  bool removed_reads_zero = false;  // pages that the client gives back have to read as zero
};
// Serve these regions, which are registered with the userfaultfd already: for missing pages, and for
// SharingMode::resolve also for minor faults.
struct Attach {
  AttachRequest request;
  UniqueFd uffd;
  // What the regions are: memory of the client's own, or private mappings of what ShareImage brought.
  SharingMode sharing = SharingMode::none;
};
// Go on serving a session that another connection, or another manager, served before.
struct Resume {
  SessionId session;
  UniqueFd uffd;        // the same userfaultfd
  UniqueFd state_file;  // the one that Attached brought
};
// Serve these regions too; registered already.
struct AddRegions {
  std::vector<RequestedRegion> regions;
};
// Serve these ranges no longer. Once answered, nothing is written there any more.
struct DropRegions {
  std::vector<AddressRange> ranges;
};
enum class DetachMode : std::uint32_t {
  populate = 1,  // first fill every page that is missing
  release = 2,   // at once: the client consents to missing pages reading as zero
};
// End the session. Once answered, nothing is written any more; the client unregisters its memory.
struct Detach {
  DetachMode mode;
};
// What the session did so far.
struct Query {};
// A request of a later version. Answer it with ErrorCode::unsupported and go on.
struct Unsupported {
  std::uint16_t type;
};

using Request = std::variant<Hello, ImageInfo, Attach, Resume, AddRegions, DropRegions, Detach, Query,
                             ShareImage, Unsupported>;

// ---- answers --------------------------------------------------------------------------------------------

// To Hello.
struct Welcome {
  std::uint16_t version = kVersion;
  std::uint64_t features = 0;  // none are defined in version 1
};
// To ImageInfo.
struct ImageSize {
  ByteCount size;
};
// To Attach and Resume: from here on every fault is served, and the client may use its memory.
struct Attached {
  SessionId session;
  ByteCount image_size;
  std::uint32_t regions;  // how many are served
  UniqueFd state_file;    // the manager's record of the session; the client keeps it for Resume
};
// To AddRegions, DropRegions, Detach.
struct Ok {};
// To Query.
struct Status {
  std::uint64_t pages_served;
  std::uint64_t faults_pending;
};
// To ShareImage.
struct ImageMemory {
  ByteCount size;
  SharingMode mode;  // never `none`
  UniqueFd memory;   // open for reading only; to be mapped MAP_PRIVATE
};
// Why a request was refused.
enum class ErrorCode : std::uint32_t {
  protocol = 1,         // the bytes break the protocol; the connection is closed after it
  unsupported = 2,      // a request of a later version
  version = 3,          // no version in common; the connection is closed after it
  no_such_image = 4,    //
  not_permitted = 5,    // this client may not do this
  invalid = 6,          // well formed, but makes no sense: regions that overlap, a second ATTACH, ...
  bad_descriptor = 7,   // not an enabled, non-blocking userfaultfd, or not a state file
  busy = 8,             // RESUME of a session that a living connection serves
  no_such_session = 9,  //
  limit = 10,           // a quota is used up
  shutting_down = 11,   // the manager is about to end: connect again
  internal = 12,        // the manager failed
};
// To any request.
struct Refused {
  ErrorCode code;
  std::string message;  // for a person; cut to kErrorMessageBytesMax by the encoder
};

using Answer = std::variant<Welcome, ImageSize, Attached, Ok, Status, ImageMemory, Refused>;

// "busy", for logs; "error 99" for a code of a later version.
std::string to_string(ErrorCode code);

// ---- bytes to values and back ---------------------------------------------------------------------------

// A whole frame, checked except for its payload.
struct Frame {
  std::uint16_t type;
  std::uint32_t request_id;
  std::vector<std::byte> payload;
  std::vector<UniqueFd> fds;  // exactly as many as the type carries
};

// A frame to send, with the descriptors that go along with its first byte.
struct OutgoingFrame {
  std::vector<std::byte> bytes;
  std::vector<UniqueFd> fds;
  // For send_some() and send_all().
  std::vector<int> fd_numbers() const;
};

// Takes over the message's descriptors. What breaks the bounds above is a bug. Unsupported cannot be sent.
OutgoingFrame encode_request(std::uint32_t request_id, Request request);
OutgoingFrame encode_answer(std::uint32_t request_id, Answer answer);

// Errors: payload too short or too long for its type, reserved bits set, counts out of bounds, an image name
// that is empty, too long or has a zero byte, a page size that cannot be served. Answer with
// ErrorCode::protocol and close. Whether regions make sense is for validate() to say.
Result<Request> decode_request(Frame frame);
// Likewise; a type that is no answer is an error too.
Result<Answer> decode_answer(Frame frame);

// Cuts a stream into frames. Holds at most one frame that is not complete.
class FrameReader {
 public:
  enum class Reads { requests, answers };
  explicit FrameReader(Reads reads) : reads_(reads) {}

  // Takes one piece; returns the frames that it completes, in order. Descriptors belong to the first frame
  // since they came whose type carries some; there must be exactly as many, except that a type that is not
  // known may carry any, which are closed. Errors: wrong magic, version or reserved bits; a payload
  // larger than kPayloadBytesMax; descriptors missing, lost or too many; the end within a frame. The stream
  // is of no use after an error.
  Result<std::vector<Frame>> feed(Piece piece);

 private:
  Reads reads_;
  std::vector<std::byte> buffer_;
  std::vector<UniqueFd> fds_;
};

}  // namespace uffdkit::native
