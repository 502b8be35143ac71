// Whether this build is watched by a sanitizer, whose own threads and shadow memory some tests cannot tell
// from ours.
#pragma once

#if defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define UFFDKIT_SANITIZED 1
#endif
#endif

namespace uffdkit::test {

#ifdef UFFDKIT_SANITIZED
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

}  // namespace uffdkit::test
