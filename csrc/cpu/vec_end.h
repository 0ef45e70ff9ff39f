// Ends the target that vec.h raised: the last line of a translation unit that includes it. clang insists.
#if defined(__x86_64__) && !defined(GCONV_ISA_PORTABLE)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
