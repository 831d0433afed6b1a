/* stub: unpacks one LZ4 block (the format: lz4_Block_format.md). The library's decoder needs a C library and vector registers. */

#define UNPACK_SLACK 16 /* bytes that may be written beyond the end, and read beyond that of the input */
static void copy8(uint8_t *d, const uint8_t *s, const uint8_t *end) {
  do {
    __builtin_memcpy(d, s, 8);
    d += 8, s += 8;
  } while (d < end);
}
/* A length that went beyond its four bits. NULL: the input ends in it. */
static const uint8_t *more_length(const uint8_t *s, const uint8_t *end, uint32_t *n) {
  for (uint8_t b = 255; b == 255; *n += b) {
    if (s >= end || *n > PS) return 0;
    b = *s++;
  }
  return s;
}
/* Bytes written, at most max; -1: it is not such a block. */
static long unpack(uint8_t *to, uint32_t max, const uint8_t *s, uint32_t size) {
  uint8_t *d = to, *to_end = to + max;
  const uint8_t *end = s + size;
  while (s < end) {
    uint8_t token = *s++;
    uint32_t n = token >> 4, back, m = token & 15;
    if (n == 15 && !(s = more_length(s, end, &n))) return -1;
    if (n > (uint32_t)(end - s) || n > (uint32_t)(to_end - d)) return -1;
    if (n) copy8(d, s, d + n);
    d += n, s += n;
    if (s == end) return d - to;
    if (end - s < 2) return -1;
    back = (uint32_t)(s[0] | s[1] << 8), s += 2;
    if (m == 15 && !(s = more_length(s, end, &m))) return -1;
    m += 4;
    if (!back || back > (uint32_t)(d - to) || m > (uint32_t)(to_end - d)) return -1;
    if (back >= 8) copy8(d, d - back, d + m);
    else
      for (uint32_t i = 0; i < m; i++) *(volatile uint8_t *)(d + i) = d[(long)i - (long)back];
    d += m;
  }
  return -1;
}
