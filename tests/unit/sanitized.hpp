#pragma once

/// Whether the filter is compiled with a sanitizer, under which everything takes many times as
/// long.
#ifdef SANITIZED
inline constexpr bool sanitized = true;
#else
inline constexpr bool sanitized = false;
#endif

/// Whether with the one for threads, to which it is all the same how often a test does something
/// that has only one.
#ifdef __SANITIZE_THREAD__
inline constexpr bool thread_sanitized = true;
#else
inline constexpr bool thread_sanitized = false;
#endif
