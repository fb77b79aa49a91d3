// Closes what target_begin.h opened.
}  // namespace FASTATTN_ISA
}  // namespace fastattn

#if FASTATTN_AVX2 && defined(__clang__)
#pragma clang attribute pop
#elif FASTATTN_AVX2
#pragma GCC pop_options
#endif
