// The guest: 32-bit flat protected mode, no paging, no interrupts, no stack. What it needs to know comes in
// registers, so its memory holds only its nodes and this code. The code uses relative jumps only, and runs
// wherever the monitor puts it. It may be run by an instruction emulator at a million instructions a second:
// that is why each loop is about a dozen instructions a page.

#include "guest_abi.h"

        .section .rodata
        .code32
        .global guest_code, guest_awake, guest_code_end
        .balign 16

// Fill. ebx: increment, ebp: mask, ecx: end of the node pages, edi: salt.
guest_code:
        xor     %eax, %eax
        xor     %esi, %esi
fill:   imul    $GUEST_MULTIPLIER, %eax, %eax
        add     %ebx, %eax
        and     %ebp, %eax
        cmp     %ecx, %eax
        jae     fill                            // the period is a power of two: skip what is too high
        mov     %eax, (%esi)
        imul    $GUEST_MIX, %esi, %edx
        xor     %edi, %edx
        add     %eax, %edx
        mov     %edx, GUEST_CHECK_OFFSET(%esi)
        mov     %eax, %esi
        test    %eax, %eax
        jnz     fill                            // back at page 0: all are done
        out     %eax, $GUEST_PORT_FILLED

guest_awake:
        out     %eax, $GUEST_PORT_AWAKE
        jmp     serve
done:   out     %eax, $GUEST_PORT_DONE
serve:  cmp     $GUEST_REQUEST_WALK, %eax
        je      walk
        cmp     $GUEST_REQUEST_ZERO, %eax
        je      zero
        hlt

walk:   mov     (%esi), %eax
        imul    $GUEST_MIX, %esi, %edx
        xor     %edi, %edx
        add     %eax, %edx
        cmp     GUEST_CHECK_OFFSET(%esi), %edx
        jne     wrong_node
        add     %edx, %ebp
        test    $GUEST_WRITE_BITS, %edx
        jnz     1f
        incl    GUEST_VISITS_OFFSET(%esi)
1:      mov     %eax, %esi
        loop    walk
        jmp     done

wrong_node:
        mov     GUEST_CHECK_OFFSET(%esi), %ebx
        out     %eax, $GUEST_PORT_WRONG
        hlt

zero:   mov     (%esi), %ebx
        or      GUEST_VISITS_OFFSET(%esi), %ebx
        or      GUEST_CHECK_OFFSET(%esi), %ebx
        jnz     wrong_zero
        test    $GUEST_WRITE_BITS, %esi
        jnz     1f
        incl    GUEST_VISITS_OFFSET(%esi)
1:      add     $4096, %esi
        loop    zero
        jmp     done

wrong_zero:
        mov     (%esi), %eax
        xor     %edx, %edx
        out     %eax, $GUEST_PORT_WRONG
        hlt
guest_code_end:

        .section .note.GNU-stack, "", @progbits
