// Layer: base
// How clients of one image share its memory. Docs: docs/protocol.md, "Sharing an image".
#pragma once

#include <cstdint>

namespace uffdkit {

enum class SharingMode : std::uint32_t {
  none = 0,        // every client has pages of its own
  page_cache = 1,  // the kernel maps what is in the image's memory; a page given back reads as the image
  resolve = 2,     // the manager maps each page (UFFDIO_CONTINUE); a page given back reads as zero
};

}  // namespace uffdkit
