// Layer: kernel
// The userfaultfd interface of Linux as numbers and layouts, complete to kernel 6.18.
//
// The project defines it itself because distributions' headers lag (Debian 12's stop at Linux 6.1). Names are
// those of <linux/userfaultfd.h> and <linux/fs.h> without their prefixes. All integers are native-endian.
// Fields called "out" are written by the kernel and never read by it.
// Source: ioctl_userfaultfd(2), userfaultfd(2), ioctl_pagemap_scan(2),
// Documentation/admin-guide/mm/userfaultfd.rst.
#pragma once

#include <cstddef>
#include <cstdint>

namespace uffdkit::abi {

inline constexpr std::uint64_t kApi = 0xAA;
inline constexpr char kDevicePath[] = "/dev/userfaultfd";  // since 6.1
inline constexpr int kUserModeOnly = 1;                    // flag of userfaultfd(2), since 5.11

// ---- ioctl requests -------------------------------------------------------------------------------------
inline constexpr unsigned long kIocNew = 0x0000aa00;  // on /dev/userfaultfd; the argument is an int of flags
inline constexpr unsigned long kIoctlApi = 0xc018aa3f;
inline constexpr unsigned long kIoctlRegister = 0xc020aa00;
inline constexpr unsigned long kIoctlUnregister = 0x8010aa01;
inline constexpr unsigned long kIoctlWake = 0x8010aa02;
inline constexpr unsigned long kIoctlCopy = 0xc028aa03;
inline constexpr unsigned long kIoctlZeropage = 0xc020aa04;
inline constexpr unsigned long kIoctlMove = 0xc028aa05;          // since 6.8
inline constexpr unsigned long kIoctlWriteprotect = 0xc018aa06;  // since 5.7
inline constexpr unsigned long kIoctlContinue = 0xc020aa07;      // since 5.13
inline constexpr unsigned long kIoctlPoison = 0xc020aa08;        // since 6.6
inline constexpr unsigned long kIoctlPagemapScan = 0xc0606610;   // on /proc/PID/pagemap, since 6.7

// Bits of RegisterArgs::ioctls: which ioctls a range supports. Bits not named here are kept as they are.
inline constexpr std::uint64_t kHasWake = 1u << 2;
inline constexpr std::uint64_t kHasCopy = 1u << 3;
inline constexpr std::uint64_t kHasZeropage = 1u << 4;
inline constexpr std::uint64_t kHasMove = 1u << 5;
inline constexpr std::uint64_t kHasWriteprotect = 1u << 6;
inline constexpr std::uint64_t kHasContinue = 1u << 7;
inline constexpr std::uint64_t kHasPoison = 1u << 8;

// ---- features (UFFDIO_API) ------------------------------------------------------------------------------
inline constexpr std::uint64_t kFeaturePagefaultFlagWp = 1u << 0;    // 5.7
inline constexpr std::uint64_t kFeatureEventFork = 1u << 1;          // 4.11; needs CAP_SYS_PTRACE
inline constexpr std::uint64_t kFeatureEventRemap = 1u << 2;         // 4.11
inline constexpr std::uint64_t kFeatureEventRemove = 1u << 3;        // 4.11
inline constexpr std::uint64_t kFeatureMissingHugetlbfs = 1u << 4;   // 4.11
inline constexpr std::uint64_t kFeatureMissingShmem = 1u << 5;       // 4.11
inline constexpr std::uint64_t kFeatureEventUnmap = 1u << 6;         // 4.11
inline constexpr std::uint64_t kFeatureSigbus = 1u << 7;             // 4.14
inline constexpr std::uint64_t kFeatureThreadId = 1u << 8;           // 4.14
inline constexpr std::uint64_t kFeatureMinorHugetlbfs = 1u << 9;     // 5.13
inline constexpr std::uint64_t kFeatureMinorShmem = 1u << 10;        // 5.14
inline constexpr std::uint64_t kFeatureExactAddress = 1u << 11;      // 5.18
inline constexpr std::uint64_t kFeatureWpHugetlbfsShmem = 1u << 12;  // 5.19
inline constexpr std::uint64_t kFeatureWpUnpopulated = 1u << 13;     // 6.4
inline constexpr std::uint64_t kFeaturePoison = 1u << 14;            // 6.6
inline constexpr std::uint64_t kFeatureWpAsync = 1u << 15;           // 6.7
inline constexpr std::uint64_t kFeatureMove = 1u << 16;              // 6.8
inline constexpr std::uint64_t kFeaturesKnown = (1u << 17) - 1;

// ---- modes ----------------------------------------------------------------------------------------------
inline constexpr std::uint64_t kRegisterMissing = 1;
inline constexpr std::uint64_t kRegisterWp = 2;
inline constexpr std::uint64_t kRegisterMinor = 4;
inline constexpr std::uint64_t kDontWake = 1;  // COPY, ZEROPAGE, MOVE, CONTINUE, POISON
inline constexpr std::uint64_t kCopyWp = 2;
inline constexpr std::uint64_t kContinueWp = 2;
inline constexpr std::uint64_t kMoveAllowSrcHoles = 2;
inline constexpr std::uint64_t kWriteprotectWp = 1;
inline constexpr std::uint64_t kWriteprotectDontWake = 2;

// ---- ioctl arguments ------------------------------------------------------------------------------------
struct ApiArgs {
  std::uint64_t api;
  std::uint64_t features;  // in: wanted; out: all that the kernel has
  std::uint64_t ioctls;    // out
};
struct RangeArgs {  // UNREGISTER, WAKE, and the head of the others
  std::uint64_t start;
  std::uint64_t len;
};
struct RegisterArgs {
  RangeArgs range;
  std::uint64_t mode;
  std::uint64_t ioctls;  // out
};
struct CopyArgs {  // COPY and MOVE
  std::uint64_t dst;
  std::uint64_t src;
  std::uint64_t len;
  std::uint64_t mode;
  std::int64_t done;  // out: bytes, or a negative errno
};
struct FillArgs {  // ZEROPAGE, CONTINUE, POISON
  RangeArgs range;
  std::uint64_t mode;
  std::int64_t done;  // out: bytes, or a negative errno
};
struct WriteprotectArgs {
  RangeArgs range;
  std::uint64_t mode;
};

// ---- messages -------------------------------------------------------------------------------------------
inline constexpr std::uint8_t kEventPagefault = 0x12;
inline constexpr std::uint8_t kEventFork = 0x13;
inline constexpr std::uint8_t kEventRemap = 0x14;
inline constexpr std::uint8_t kEventRemove = 0x15;
inline constexpr std::uint8_t kEventUnmap = 0x16;

inline constexpr std::uint64_t kPagefaultWrite = 1;
inline constexpr std::uint64_t kPagefaultWp = 2;
inline constexpr std::uint64_t kPagefaultMinor = 4;

struct Msg {
  std::uint8_t event;
  std::uint8_t reserved[7];
  union {
    struct {
      std::uint64_t flags;
      std::uint64_t address;
      std::uint32_t ptid;
    } pagefault;
    struct {
      std::uint32_t ufd;
    } fork;
    struct {
      std::uint64_t from;
      std::uint64_t to;
      std::uint64_t len;
    } remap;
    struct {  // REMOVE and UNMAP
      std::uint64_t start;
      std::uint64_t end;
    } remove;
  } arg;
};

// ---- PAGEMAP_SCAN (6.7) ---------------------------------------------------------------------------------
inline constexpr std::uint64_t kScanWpMatching = 1;
inline constexpr std::uint64_t kScanCheckWpAsync = 2;
inline constexpr std::uint64_t kPageWpAllowed = 1u << 0;
inline constexpr std::uint64_t kPageWritten = 1u << 1;
inline constexpr std::uint64_t kPageFile = 1u << 2;
inline constexpr std::uint64_t kPagePresent = 1u << 3;
inline constexpr std::uint64_t kPageSwapped = 1u << 4;
inline constexpr std::uint64_t kPagePfnZero = 1u << 5;
inline constexpr std::uint64_t kPageHuge = 1u << 6;
inline constexpr std::uint64_t kPageSoftDirty = 1u << 7;

struct PageRegion {
  std::uint64_t start;
  std::uint64_t end;
  std::uint64_t categories;
};
struct ScanArgs {
  std::uint64_t size;
  std::uint64_t flags;
  std::uint64_t start;
  std::uint64_t end;
  std::uint64_t walk_end;  // out
  std::uint64_t vec;
  std::uint64_t vec_len;
  std::uint64_t max_pages;
  std::uint64_t category_inverted;
  std::uint64_t category_mask;
  std::uint64_t category_anyof_mask;
  std::uint64_t return_mask;
};

static_assert(sizeof(ApiArgs) == 24 && sizeof(RangeArgs) == 16 && sizeof(RegisterArgs) == 32);
static_assert(sizeof(CopyArgs) == 40 && sizeof(FillArgs) == 32 && sizeof(WriteprotectArgs) == 24);
static_assert(sizeof(Msg) == 32 && offsetof(Msg, arg) == 8 && offsetof(Msg, arg.pagefault.ptid) == 24);
static_assert(sizeof(ScanArgs) == 96 && sizeof(PageRegion) == 24);

}  // namespace uffdkit::abi
