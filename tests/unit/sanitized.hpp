#pragma once

/// Whether the filter is compiled with a sanitizer, under which everything takes many times as
/// long.
#ifdef SANITIZED
inline constexpr bool sanitized = true;
#else
inline constexpr bool sanitized = false;
#endif
