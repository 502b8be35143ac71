// What the guest's code and the monitor must agree on: constants that both C++ and the assembler can read.
//
// A page that holds a node ("node page") has three words of 32 bits; all its other bytes are zero:
//   0                      address of the next node's page
//   GUEST_VISITS_OFFSET    how often the guest has written to this page since the snapshot
//   GUEST_CHECK_OFFSET     check word: (address * GUEST_MIX ^ salt) + next
// The check word is the last of the page, so a page that came only in part is noticed. The salt is odd and
// addresses are multiples of 4096, so a check word is never zero and a page lost to zeros is noticed too.
//
// Next node of the page at address x: x = (x * GUEST_MULTIPLIER + increment) & mask, until x < nodes_end.
// With a power of two over the pages, an odd page number as increment and a multiplier of 4k + 1 that is a
// generator with full period (Hull and Dobell, 1962), so the chain passes every node page once and comes back
// to 0.
#pragma once

#define GUEST_MULTIPLIER 1664525
#define GUEST_MIX 0x9e3779b1

#define GUEST_VISITS_OFFSET 8
#define GUEST_CHECK_OFFSET 4092

// Of the pages that the guest goes over it writes to those where these bits are clear: one in four.
// They are tested in the check word of a node page, and in the address of a zero page.
#define GUEST_WRITE_BITS 0x3000

// The guest tells of its progress by OUT to these ports. The monitor reads and sets its registers there.
#define GUEST_PORT_FILLED 0xe0 /* every node is in place: the snapshot is taken here */
#define GUEST_PORT_AWAKE 0xe1  /* the first instruction after a resume; eax takes the first request */
#define GUEST_PORT_DONE 0xe2   /* the request is done, eax takes the next one */
#define GUEST_PORT_WRONG \
  0xe3 /* esi: page, edx: word expected, ebx: word found, eax: first word of the page */

// Requests in eax. The guest halts at any other.
#define GUEST_REQUEST_WALK 1 /* esi: first node, ecx: nodes to pass, edi: salt; ebp: sum of check words */
#define GUEST_REQUEST_ZERO 2 /* esi: first page, ecx: pages that must read as zero */
