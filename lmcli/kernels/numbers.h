/* Single numbers, for kernels.c and decode_products.h: bfloat16 and e^x. */

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float bits_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float load_bfloat16(uint16_t x) { return bits_float((uint32_t)x << 16); }
static inline uint16_t store_bfloat16(float x) {  /* to the nearest, ties to even; a NaN must not become infinity */
    uint32_t bits = float_bits(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (x == x ? rounded : 0x7fc00000) >> 16;
}

/* e^x to 2 units in the last place (the polynomial of Cephes' expf); 0 below -87, NaN for NaN. */
static inline float exponential_float(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(bounded * 1.44269504088896341f), r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float y = (p * r * r + r + 1.0f) * bits_float((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : y;
}
