// Whether this build is watched by a sanitizer, whose own threads and shadow memory some tests cannot tell
// from ours.
#pragma once

namespace uffdkit::test {

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UFFDKIT_THREAD_SANITIZED 1
#endif
#if __has_feature(address_sanitizer)
#define UFFDKIT_ADDRESS_SANITIZED 1
#endif
#endif

#ifdef UFFDKIT_THREAD_SANITIZED
inline constexpr bool kThreadSanitized = true;
#else
inline constexpr bool kThreadSanitized = false;
#endif

#ifdef UFFDKIT_ADDRESS_SANITIZED
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = kThreadSanitized;
#endif

}  // namespace uffdkit::test
